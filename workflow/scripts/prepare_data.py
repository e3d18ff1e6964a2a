"""Stage prepare: turn a fine-tuning branch's own data into token files, with the tokenizer of the rack."""

import argparse
import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])  # this project's packages; not the scripts beside this one

from workflow.stage import StageRun, check_params, run_stage

if __name__ == "__main__":
    check_params()  # before the imports that take seconds

from stackwise.data.examples import write_examples
from stackwise.data.tokens import KIND


def declare(parser: argparse.ArgumentParser) -> None:
    """Arguments of the script."""
    parser.add_argument("--branch", required=True, help="name of the branch")
    parser.add_argument("--tokens", type=Path, required=True, help="tokens artifact, whose tokenizer is taken")
    parser.add_argument("--out", type=Path, required=True, help="artifact to write")


def work(run: StageRun) -> None:
    """Write the token ids and labels."""
    params, name = run.params, run.arguments.branch
    own = params.fine_tune[name].data
    assert own is not None
    tokens = run.read("tokens", run.arguments.tokens, KIND)
    with run.publish(run.arguments.out, KIND) as draft:
        draft.facts |= write_examples(
            own,
            tokens,
            draft.directory,
            seq_len=params.seq_len if own.packed else None,
            seed=params.seed,
            key=f"fine_tune.{name}.data",
            progress=run.counter("rows"),
        )
        run.say(json.dumps(draft.facts, ensure_ascii=False))


if __name__ == "__main__":
    run_stage(__doc__, declare, work)
