"""Stage evaluate: measure a model on held-out documents."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])  # this project's packages; not the scripts beside this one

from workflow.stage import StageRun, check_params, run_stage

if __name__ == "__main__":
    check_params()  # before the imports that take seconds

import numpy as np
import torch

from stackwise.data.tokens import KIND as TOKENS
from stackwise.data.tokens import open_tokens
from stackwise.growth.fusing import fuse
from stackwise.growth.racks import KIND as RACK
from stackwise.growth.racks import load_rack
from stackwise.growth.stacks import KIND as STACK
from stackwise.growth.stacks import Training
from stackwise.growth.trunk import adapted_stacks
from stackwise.inference.completions import completion_metrics
from stackwise.inference.depth import costs
from stackwise.inference.evaluation import Evaluator, Metrics
from stackwise.model.rack import Rack
from stackwise.precision.trunk import KIND as TRUNK
from stackwise.training.device import set_up


def declare(parser: argparse.ArgumentParser) -> None:
    """Arguments of the script."""
    parser.add_argument("--name", required=True, help="what the model is called")
    parser.add_argument("--objective", choices=["clm", "mlm", "diffusion"], help="what it was fine-tuned for")
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--trainings", type=Path, nargs="+", help="trainings, in the order in which they took place")
    model.add_argument("--model", type=Path, help="fused or fine-tuned rack")
    parser.add_argument("--order", type=int, nargs="+", help="the stacks of their rack, bottom to top")
    parser.add_argument("--depth", type=int, help="trainings before the last: its place in the curves over depth")
    parser.add_argument(
        "--trunk", type=Path, nargs="+", default=[], help="trunk artifacts that adapters have learned on"
    )
    parser.add_argument("--tokens", type=Path, required=True, help="tokens artifact")
    parser.add_argument("--own", type=Path, help="tokens artifact of own data that it was fine-tuned on")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")


def work(run: StageRun) -> None:
    """Measure one model."""
    args, params = run.arguments, run.params
    device = set_up(params.compute, threads=params.compute.branch_threads, seed=params.seed)
    tokens = open_tokens(run.read("tokens", args.tokens, TOKENS), params.seq_len)
    if args.trainings:
        trainings = [Training(run.read(f"training.{i}", path, STACK)) for i, path in enumerate(args.trainings)]
        trunk = [run.read(f"trunk.{i}", path, TRUNK) for i, path in enumerate(args.trunk)]
        rack = fuse(trainings, args.order, adapted_stacks(trunk, trainings))
    else:
        rack = load_rack(run.read("model", args.model, RACK).path)
    rack = rack.to(device).eval()
    evaluator = Evaluator(tokens, params.evaluate, params.seed, device, params.compute.dtype)
    learned = args.objective or params.objective.type
    metrics = _measured(run, evaluator, rack, learned, by_depth=args.model is not None)
    if args.own is not None:
        own = replace(evaluator, tokens=open_tokens(run.read("own", args.own, TOKENS), params.seq_len))
        if own.tokens.validation.packed:
            metrics["own"] = completion_metrics(rack, own, causal=learned == "clm")
        else:
            metrics["own"] = _measured(run, own, rack, learned, by_depth=False)
    run.write_json(args.out, metrics)
    run.report_metrics(args.name, metrics, depth=args.depth)


def _measured(run: StageRun, evaluator: Evaluator, rack: Rack, learned: str, *, by_depth: bool) -> Metrics:
    """What is known of a rack on held-out text, beside the unigram baseline."""
    figure = {"clm": "next_token", "custom": "labelled"}.get(learned, "nelbo")
    causal = learned == "clm" or (learned == "custom" and run.params.objective.causal)
    if by_depth:
        metrics = _by_depth(run, evaluator, rack, figure, causal=causal)
    elif figure == "nelbo":
        metrics = evaluator.diffusion(rack)
    elif figure == "next_token":
        metrics = {figure: evaluator.next_token(rack)}
    else:
        metrics = {figure: evaluator.labelled(rack, causal=causal)}
    return {**metrics, "unigram": evaluator.unigram(labelled=learned == "custom")}


def _by_depth(run: StageRun, evaluator: Evaluator, rack: Rack, figure: str, *, causal: bool) -> Metrics:
    """What the rack is worth whole and stopped after each stack, with the operations that each takes. Seconds, which
    differ from run to run, go to the record."""
    depths = evaluator.by_depth(rack, figure, causal=causal)
    batch = np.arange(min(run.params.evaluate.batch_size, len(evaluator.tokens.validation)))
    tokens = torch.from_numpy(evaluator.tokens.validation.samples(batch)).to(evaluator.device)
    found = costs(rack, tokens, causal=causal, dtype=evaluator.dtype)
    seconds = {f"{run.arguments.name}.depths.{k}.seconds_per_sample": cost.seconds for k, cost in enumerate(found)}
    run.record.add("result", values=seconds)
    return {
        figure: depths[-1],
        **({"masked": evaluator.masked(rack)} if figure == "nelbo" else {}),
        "depths": {
            str(k): {figure: own, "operations_per_token": cost.operations}
            for k, (own, cost) in enumerate(zip(depths, found, strict=True))
        },
    }


if __name__ == "__main__":
    run_stage(__doc__, declare, work)
