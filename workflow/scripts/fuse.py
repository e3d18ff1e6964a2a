"""Stage fuse: merge the trained stacks, in full precision, into one rack."""

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])  # this project's packages; not the scripts beside this one

from workflow.stage import StageRun, check_params, run_stage

if __name__ == "__main__":
    check_params()  # before the imports that take seconds

from stackwise.data.tokens import KIND as TOKENS
from stackwise.data.tokens import TOKENIZER
from stackwise.growth.racks import KIND, save_rack
from stackwise.growth.stacks import KIND as STACK
from stackwise.growth.stacks import TrainedStack, fuse


def declare(parser: argparse.ArgumentParser) -> None:
    """Arguments of the script."""
    parser.add_argument("--stacks", type=Path, nargs="+", required=True, help="trained stacks, bottom to top")
    parser.add_argument("--tokens", type=Path, required=True, help="tokens artifact, for the tokenizer")
    parser.add_argument("--out", type=Path, required=True, help="artifact to write")


def work(run: StageRun) -> None:
    """Fuse."""
    stacks = [TrainedStack(run.read(f"stack.{k}", path, STACK)) for k, path in enumerate(run.arguments.stacks)]
    tokens = run.read("tokens", run.arguments.tokens, TOKENS)
    rack = fuse(stacks)
    with run.publish(run.arguments.out, KIND) as draft:
        save_rack(draft.directory, rack, tokens.path / TOKENIZER)
        draft.facts |= {
            "shape": rack.shape.to_json(),
            "parameters": sum(p.numel() for p in rack.parameters()),
            "steps": sum(stack.artifact.facts["steps"] for stack in stacks),
        }
    run.say(f"{len(stacks)} stacks, {draft.facts['parameters']:,} parameters")


if __name__ == "__main__":
    run_stage(__doc__, declare, work)
