"""Stage tokenize: train or load the tokenizer, and turn the corpus into memory-mapped token ids."""

import argparse
import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])  # this project's packages; not the scripts beside this one

from workflow.stage import StageRun, check_params, run_stage

if __name__ == "__main__":
    check_params()  # before the imports that take seconds

from stackwise.config.data import TokenizerParams
from stackwise.config.params import Params
from stackwise.data.corpus import KIND as CORPUS
from stackwise.data.encoding import write_labelled_dataset, write_token_dataset
from stackwise.data.tokens import KIND


def declare(parser: argparse.ArgumentParser) -> None:
    """Arguments of the script."""
    parser.add_argument("--corpus", type=Path, required=True, help="corpus to read")
    parser.add_argument("--out", type=Path, required=True, help="artifact to write")


def tokenizer_params(params: Params) -> TokenizerParams:
    """Those of the tokenizer; one that is taken along has the name of the model that it comes with."""
    if not params.tokenizer.takes_along:
        return params.tokenizer
    name = params.growth.start or params.model.embeddings.source or params.model.head.source
    return params.tokenizer.model_copy(update={"name": name})


def work(run: StageRun) -> None:
    """Write the tokenizer and the token ids."""
    corpus = run.read("corpus", run.arguments.corpus, CORPUS)
    tokenizer = tokenizer_params(run.params)
    with run.publish(run.arguments.out, KIND) as draft:
        write = write_labelled_dataset if corpus.facts.get("labelled") else write_token_dataset
        draft.facts |= write(corpus.path, draft.directory, tokenizer, progress=run.counter("documents"))
        run.say(json.dumps(draft.facts))


if __name__ == "__main__":
    run_stage(__doc__, declare, work)
