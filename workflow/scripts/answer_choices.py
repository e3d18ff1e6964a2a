"""Stage answer_choices: multiple-choice questions, answered by what a model finds likeliest."""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])  # this project's packages; not the scripts beside this one

from workflow.stage import StageRun, check_params, run_stage

if __name__ == "__main__":
    check_params()  # before the imports that take seconds

from stackwise.data.choices import read_choices
from stackwise.data.tokens import KIND as TOKENS
from stackwise.data.tokens import open_tokens
from stackwise.growth.racks import KIND as RACK
from stackwise.growth.racks import load_rack
from stackwise.inference.choices import accuracy, choose
from stackwise.inference.scoring import BoundScorer, CausalScorer, Scorer
from stackwise.training.device import set_up


def declare(parser: argparse.ArgumentParser) -> None:
    """Arguments of the script."""
    parser.add_argument("--name", required=True, help="what the model is called")
    parser.add_argument("--model", type=Path, required=True, help="fused or fine-tuned rack")
    parser.add_argument("--tokens", type=Path, required=True, help="tokens artifact")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")


def work(run: StageRun) -> None:
    """Answer the questions of all files."""
    from transformers import AutoTokenizer  # takes a second or two

    args, params = run.arguments, run.params
    device = set_up(params.compute, threads=params.compute.branch_threads, seed=params.seed)
    tokens = open_tokens(run.read("tokens", args.tokens, TOKENS), params.seq_len)
    artifact = run.read("model", args.model, RACK)
    rack = load_rack(artifact.path).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(tokens.tokenizer)
    sizes: dict[str, Any] = {
        "batch_size": params.evaluate.batch_size,
        "seq_len": params.seq_len,
        "dtype": params.compute.dtype,
    }
    metrics = {}
    for own in params.evaluate.choices:
        rows = read_choices(Path(own.file))
        scorer: Scorer
        if artifact.facts["causal"]:
            scorer = CausalScorer(rack, tokens.vocabulary, device, **sizes)
        else:
            scorer = BoundScorer(rack, tokens.vocabulary, device, seed=params.seed, draws=own.draws, **sizes)
        metrics[own.name] = found = accuracy(rows, choose(rows, scorer, tokenizer))
        run.say(f"{own.file}: {found['accuracy']:.1%} of {len(rows)} right (chance {found['chance']:.1%})")
    run.write_json(args.out, metrics)
    values = {f"{args.name}.choices.{file}.{key}": v for file, own in metrics.items() for key, v in own.items()}
    run.record.add("result", values=values)


if __name__ == "__main__":
    run_stage(__doc__, declare, work)
