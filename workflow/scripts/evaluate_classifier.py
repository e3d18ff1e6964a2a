"""Stage evaluate of a classifier: its accuracy and F1 on held-out rows."""

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])  # this project's packages; not the scripts beside this one

from workflow.stage import StageRun, check_params, run_stage

if __name__ == "__main__":
    check_params()  # before the imports that take seconds

from stackwise.data.tokens import KIND as TOKENS
from stackwise.data.tokens import open_tokens
from stackwise.finetuning.classifier import KIND, load_classifier
from stackwise.inference.classification import classification_metrics
from stackwise.training.device import set_up


def declare(parser: argparse.ArgumentParser) -> None:
    """Arguments of the script."""
    parser.add_argument("--name", required=True, help="what the model is called")
    parser.add_argument("--model", type=Path, required=True, help="classifier")
    parser.add_argument("--tokens", type=Path, required=True, help="tokens artifact of own data with labels")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")


def work(run: StageRun) -> None:
    """Measure one model."""
    args, params = run.arguments, run.params
    device = set_up(params.compute, threads=params.compute.branch_threads, seed=params.seed)
    tokens = open_tokens(run.read("tokens", args.tokens, TOKENS), params.seq_len)
    model = load_classifier(run.read("model", args.model, KIND).path).to(device).eval()
    metrics = classification_metrics(
        model, tokens, params.evaluate, seed=params.seed, device=device, dtype=params.compute.dtype
    )
    run.write_json(args.out, {"classification": metrics})
    run.report_metrics(args.name, {"classification": metrics}, depth=None)


if __name__ == "__main__":
    run_stage(__doc__, declare, work)
