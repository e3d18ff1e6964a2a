"""Stage evaluate: measure a model on held-out documents."""

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])  # this project's packages; not the scripts beside this one

from workflow.stage import StageRun, check_params, run_stage

if __name__ == "__main__":
    check_params()  # before the imports that take seconds

from stackwise.config.training import FineTuneParams
from stackwise.data.tokens import KIND as TOKENS
from stackwise.data.tokens import open_tokens
from stackwise.growth.racks import KIND as RACK
from stackwise.growth.racks import load_rack
from stackwise.growth.stacks import KIND as STACK
from stackwise.growth.stacks import TrainedStack, fuse
from stackwise.inference.evaluation import Evaluator
from stackwise.training.device import set_up


def declare(parser: argparse.ArgumentParser) -> None:
    """Arguments of the script."""
    parser.add_argument("--name", required=True, help="what the model is called; fine-tuned ones by what they learned")
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--stacks", type=Path, nargs="+", help="trained stacks, bottom to top: the rack that ends here")
    model.add_argument("--model", type=Path, help="fused or fine-tuned rack")
    parser.add_argument("--tokens", type=Path, required=True, help="tokens artifact")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")


def work(run: StageRun) -> None:
    """Measure one model."""
    args, params = run.arguments, run.params
    device = set_up(params.compute, threads=params.compute.branch_threads, seed=params.seed)
    tokens = open_tokens(run.read("tokens", args.tokens, TOKENS), params.seq_len)
    if args.stacks:
        rack = fuse([TrainedStack(run.read(f"stack.{k}", path, STACK)) for k, path in enumerate(args.stacks)])
    else:
        rack = load_rack(run.read("model", args.model, RACK).path)
    evaluator = Evaluator(tokens, params.evaluate, params.seed, device, params.compute.dtype)
    rack = rack.to(device).eval()
    learned = args.name if args.name in FineTuneParams.model_fields else params.objective.type
    if learned == "clm":
        metrics = {"next_token": evaluator.next_token(rack)}
    elif learned == "custom":
        metrics = {"labelled": evaluator.labelled(rack, causal=params.objective.causal)}
    else:
        metrics = evaluator.diffusion(rack)
    metrics["unigram"] = evaluator.unigram(labelled=learned == "custom")
    run.write_json(args.out, metrics)
    run.report_metrics(args.name, metrics, depth=len(args.stacks) - 1 if args.stacks else None)


if __name__ == "__main__":
    run_stage(__doc__, declare, work)
