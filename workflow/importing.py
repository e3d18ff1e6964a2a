"""`stackwise import`: a model of Transformers as a rack."""

import argparse
from pathlib import Path

import yaml

from stackwise.artifacts.manifest import publish
from stackwise.errors import UserError
from stackwise.huggingface.checkpoint import Checkpoint, open_checkpoint
from workflow.export import check_empty


def declare(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument(
        "--model", required=True, help="directory of a Llama, Mistral, Qwen3 or dense DeepSeek-V3 model, or a hub name"
    )
    parser.add_argument("--blocks-per-stack", type=int, required=True, metavar="N", help="where it is cut into stacks")
    parser.add_argument("--tokenizer", help="directory or hub name of its tokenizer (default: that of the model)")
    parser.add_argument("--out", type=Path, help="rack to write")
    parser.add_argument("--dry-run", action="store_true", help="write nothing: print what params.yaml would say")
    parser.add_argument("--force", action="store_true", help="replace what is in the directory")


def run(arguments: argparse.Namespace) -> None:
    """Import."""
    if (arguments.out is None) != arguments.dry_run:
        raise UserError("--out: expected a path for the rack, or --dry-run to write none")
    if not arguments.dry_run:
        check_empty(arguments.out, force=arguments.force)
    checkpoint = open_checkpoint(arguments.model)
    blocks = _cut(checkpoint, arguments.blocks_per_stack)
    if not arguments.dry_run:
        from stackwise.growth.racks import KIND  # torch takes its time, and what is wrong above needs none of it
        from stackwise.huggingface.importing import import_rack

        params = {"blocks": blocks}
        with publish(arguments.out, kind=KIND, params=params) as draft:
            tokenizer = arguments.tokenizer or str(checkpoint.directory)
            draft.facts |= import_rack(checkpoint, draft.directory, blocks=blocks, tokenizer=tokenizer)
        print(f"{arguments.out}: {len(blocks)} stacks, {draft.facts['parameters']:,} parameters")
    print("To go on from it in the pipeline, write in params.yaml:\n")
    print(_as_params(checkpoint, blocks))


def _cut(checkpoint: Checkpoint, n: int) -> list[int]:
    """Blocks of each stack; the last has what is left."""
    if not 1 <= n <= checkpoint.layers:
        raise UserError(f"--blocks-per-stack {n}: expected 1 to {checkpoint.layers}, the blocks that the model has")
    full, rest = divmod(checkpoint.layers, n)
    return [n] * full + [rest] * bool(rest)


def _as_params(checkpoint: Checkpoint, blocks: list[int]) -> str:
    """The parameters of a pipeline that starts with a model, all that are not defaults."""
    stacks = [{} if n == blocks[0] else {"blocks": n} for n in blocks]
    tree = {
        "tokenizer": {"type": "pretrained", "vocab_size": None},
        "model": checkpoint.model.model_dump(exclude_defaults=True),
        "n_stacks": len(blocks),
        "stack": {"blocks": blocks[0]},
        "stacks": stacks,
        "growth": {"start": str(checkpoint.directory), "start_stacks": len(blocks)},
    }
    return yaml.safe_dump(tree, default_flow_style=None, sort_keys=False, width=120)
