"""Stage import: the blocks of another model as the first stacks, trained already."""

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])  # this project's packages; not the scripts beside this one

from workflow.stage import StageRun, check_params, run_stage

if __name__ == "__main__":
    check_params()  # before the imports that take seconds

from stackwise.data.tokens import KIND as TOKENS
from stackwise.growth.stacks import KIND
from stackwise.huggingface.importing import import_stacks


def declare(parser: argparse.ArgumentParser) -> None:
    """Arguments of the script."""
    parser.add_argument("--tokens", type=Path, required=True, help="tokens artifact, made with the model's tokenizer")
    parser.add_argument("--out", type=Path, required=True, help="artifact to write")


def work(run: StageRun) -> None:
    """Import."""
    args, params = run.arguments, run.params
    tokens = run.read("tokens", args.tokens, TOKENS)
    with run.publish(args.out, KIND) as draft:
        draft.facts |= import_stacks(params, draft.directory, vocab_size=tokens.facts["vocab_size"])
    run.say(f"{params.growth.imported} stacks of {params.growth.start}")


if __name__ == "__main__":
    run_stage(__doc__, declare, work)
