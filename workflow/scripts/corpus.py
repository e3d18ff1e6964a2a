"""Stage corpus: read the text source, clean it, drop duplicates, split it into training and validation documents."""

import argparse
import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])  # this project's packages; not the scripts beside this one

from workflow.stage import StageRun, check_params, run_stage

if __name__ == "__main__":
    check_params()  # before the imports that take seconds

from stackwise.data.corpus import KIND, write_corpus, write_labelled_corpus
from stackwise.data.sources import documents, labelled_documents


def declare(parser: argparse.ArgumentParser) -> None:
    """Arguments of the script."""
    parser.add_argument("--out", type=Path, required=True, help="artifact to write")


def work(run: StageRun) -> None:
    """Write the corpus."""
    data, seed = run.params.data, run.params.seed
    with run.publish(run.arguments.out, KIND) as draft:
        where, progress = draft.directory, run.counter("documents")
        if data.ids_column is None:
            draft.facts |= write_corpus(documents(data, seed), where, params=data, seed=seed, progress=progress)
        else:
            labelled = labelled_documents(data)
            draft.facts |= write_labelled_corpus(labelled, where, params=data, seed=seed, progress=progress)
        run.say(json.dumps(draft.facts))


if __name__ == "__main__":
    run_stage(__doc__, declare, work)
