"""Stage fine_tune of a classifier: teach the fused rack the labels of texts or of words."""

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])  # this project's packages; not the scripts beside this one

from workflow.stage import StageRun, check_params, run_stage

if __name__ == "__main__":
    check_params()  # before the imports that take seconds

from stackwise.data.tokens import KIND as TOKENS
from stackwise.data.tokens import TOKENIZER
from stackwise.finetuning.branch import save_tuned
from stackwise.finetuning.classification import fine_tune_classifier
from stackwise.finetuning.classifier import KIND, save_classifier
from stackwise.growth.racks import KIND as RACK
from stackwise.training.checkpoint import Checkpoints
from stackwise.training.device import set_up
from workflow.training import finish, watcher


def declare(parser: argparse.ArgumentParser) -> None:
    """Arguments of the script."""
    parser.add_argument("--branch", required=True, help="name of the branch")
    parser.add_argument("--model", type=Path, required=True, help="fused rack")
    parser.add_argument("--tokens", type=Path, required=True, help="tokens artifact of own data with labels")
    parser.add_argument("--out", type=Path, required=True, help="artifact to write")
    parser.add_argument("--losses", type=Path, required=True, help="JSON file for the loss curve")


def work(run: StageRun) -> None:
    """Train one branch."""
    args, params = run.arguments, run.params
    branch = params.fine_tune[args.branch]
    device = set_up(params.compute, threads=params.compute.branch_threads, seed=params.seed)
    data = run.read("tokens", args.tokens, TOKENS)
    model, checkpoints = run.read("model", args.model, RACK), Checkpoints(run.checkpoint_file())
    tuned = fine_tune_classifier(
        params,
        args.branch,
        model.path,
        data,
        device=device,
        checkpoints=checkpoints,
        watcher=watcher(run, steps=branch.steps, batch_size=branch.batch_size),
    )
    with run.publish(args.out, KIND) as draft:
        save_tuned(branch, tuned, draft.directory, data.path / TOKENIZER, save_classifier)
        draft.facts |= {"shape": tuned.model.shape.to_json(), "labels": data.facts["labels"], **tuned.facts}
    finish(run, tuned.losses, checkpoints)


if __name__ == "__main__":
    run_stage(__doc__, declare, work)
