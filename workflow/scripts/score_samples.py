"""Stage score_samples: how surprised a causal model is by the texts of all models, and how varied they are."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])  # this project's packages; not the scripts beside this one

from workflow.stage import StageRun, check_params, run_stage

if __name__ == "__main__":
    check_params()  # before the imports that take seconds

from stackwise.data.tokenizer import encode
from stackwise.data.tokens import KIND as TOKENS
from stackwise.data.tokens import open_tokens
from stackwise.generation.prompts import fills_in
from stackwise.growth.racks import KIND as RACK
from stackwise.growth.racks import load_rack
from stackwise.inference.samples import Metrics, weighed
from stackwise.inference.scoring import CausalScorer
from stackwise.objectives.held_out import spread
from stackwise.training.device import set_up

SAMPLES = "samples"


def declare(parser: argparse.ArgumentParser) -> None:
    """Arguments of the script."""
    parser.add_argument("--scorer", type=Path, required=True, help="causal rack that reads the texts")
    parser.add_argument("--samples", type=Path, nargs="+", required=True, help="texts of the models")
    parser.add_argument("--tokens", type=Path, required=True, help="tokens artifact, for held-out text")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")


def work(run: StageRun) -> None:
    """Weigh the texts of every model, and as many held-out ones."""
    args, params = run.arguments, run.params
    device = set_up(params.compute, threads=params.compute.branch_threads, seed=params.seed)
    tokens = open_tokens(run.read("tokens", args.tokens, TOKENS), params.seq_len)
    rack = load_rack(run.read("scorer", args.scorer, RACK).path).to(device).eval()
    scorer = CausalScorer(rack, tokens.vocabulary, device, params.compute.dtype, params.evaluate.batch_size)
    metrics: Metrics = {}
    made = {path.name: _texts(run, path) for path in args.samples}
    held_out = tokens.validation.samples(spread(len(tokens.validation), max(map(len, made.values())))).tolist()
    metrics["held_out"] = weighed(held_out, [[] for _ in held_out], scorer)
    prompts = _prompts(tokens.tokenizer, [text["prompt"] for own in made.values() for text in own])
    for name, own in made.items():
        given = [prompts[text["prompt"]] for text in own]
        rest = [text["ids"][len(ids) :] for text, ids in zip(own, given, strict=True)]
        pairs = [(text, ids) for text, ids in zip(rest, given, strict=True) if text]
        if pairs:  # a model may end every text at once
            metrics[name] = weighed([text for text, _ in pairs], [ids for _, ids in pairs], scorer)
    for name, own in metrics.items():
        run.say(f"{name}: perplexity {own['perplexity']:.1f}, token entropy {own['token_entropy']:.2f} bits")
    run.write_json(args.out, metrics)
    values = {f"{name}.samples.{key}": value for name, own in metrics.items() for key, value in own.items()}
    run.record.add("result", values=values)


def _texts(run: StageRun, path: Path) -> list[dict[str, Any]]:
    artifact = run.read(f"samples.{path.name}", path, SAMPLES)
    with (artifact.path / "samples.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _prompts(tokenizer: Path, texts: list[str]) -> dict[str, list[int]]:
    """The ids that texts begin with, by prompt; of one that is filled in nothing is taken off."""
    from transformers import AutoTokenizer  # takes a second or two

    known = sorted(set(texts))
    ids = encode(AutoTokenizer.from_pretrained(tokenizer), known)
    return {text: [] if fills_in(text) else own for text, own in zip(known, ids, strict=True)}


if __name__ == "__main__":
    run_stage(__doc__, declare, work)
