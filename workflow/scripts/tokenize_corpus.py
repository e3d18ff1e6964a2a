"""Stage tokenize: train or load the tokenizer, and turn the corpus into memory-mapped token ids."""

import argparse
import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])  # this project's packages; not the scripts beside this one

from workflow.stage import StageRun, check_params, run_stage

if __name__ == "__main__":
    check_params()  # before the imports that take seconds

from stackwise.data.corpus import KIND as CORPUS
from stackwise.data.encoding import write_token_dataset
from stackwise.data.tokens import KIND


def declare(parser: argparse.ArgumentParser) -> None:
    """Arguments of the script."""
    parser.add_argument("--corpus", type=Path, required=True, help="corpus to read")
    parser.add_argument("--out", type=Path, required=True, help="artifact to write")


def work(run: StageRun) -> None:
    """Write the tokenizer and the token ids."""
    corpus = run.read("corpus", run.arguments.corpus, CORPUS)
    with run.publish(run.arguments.out, KIND) as draft:
        draft.facts |= write_token_dataset(
            corpus.path, draft.directory, run.params.tokenizer, progress=run.counter("documents")
        )
        run.say(json.dumps(draft.facts))


if __name__ == "__main__":
    run_stage(__doc__, declare, work)
