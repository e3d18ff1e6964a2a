"""Stage report: figures of the losses, the value of depth and the masked NLL, and samples of text from each model."""

import argparse
import html
import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])  # this project's packages; not the scripts beside this one

from workflow.stage import StageRun, check_params, run_stage

if __name__ == "__main__":
    check_params()  # before the imports that take seconds

import torch

from stackwise.data.tokens import KIND as TOKENS
from stackwise.data.tokens import Tokens, open_tokens
from stackwise.growth.racks import KIND as RACK
from stackwise.growth.racks import load_rack
from stackwise.inference.sampling import sample_causal, sample_diffusion
from stackwise.training.device import set_up
from workflow.figures import depth_curve, loss_curves, main_figure, masked_nll

KIND = "report"


def declare(parser: argparse.ArgumentParser) -> None:
    """Arguments of the script."""
    parser.add_argument("--tokens", type=Path, required=True, help="tokens artifact")
    parser.add_argument("--models", type=Path, nargs="+", required=True, help="racks to sample from")
    parser.add_argument("--depths", type=Path, nargs="+", required=True, help="metrics after each training, in order")
    parser.add_argument("--metrics", type=Path, nargs="+", required=True, help="metrics of the racks, in their order")
    parser.add_argument("--losses", type=Path, nargs="+", required=True, help="loss curves")
    parser.add_argument("--depth", type=Path, required=True, help="JSON file to write: the bound or NLL by depth")
    parser.add_argument("--out", type=Path, required=True, help="artifact to write")


def work(run: StageRun) -> None:
    """Draw and sample."""
    args, params = run.arguments, run.params
    device = set_up(params.compute, threads=params.compute.branch_threads, seed=params.seed)
    tokens = open_tokens(run.read("tokens", args.tokens, TOKENS), params.seq_len)
    depths = {path.stem: run.read_json(path) for path in args.depths}
    metrics = {path.stem: run.read_json(path) for path in args.metrics}
    diffusion = {name: m for name, m in metrics.items() if "masked" in m}
    texts = {}
    for path, name in zip(args.models, metrics, strict=True):
        if "labelled" in metrics[name]:  # what it predicts need not be a text
            continue
        texts[name] = _sample(
            run, run.read(f"model.{name}", path, RACK).path, tokens, device, causal=name not in diffusion
        )
        run.say(f"{name}: {texts[name][0][:60]!r} ...")
    curve = [{"training": i, **metrics[main_figure(metrics)]} for i, metrics in enumerate(depths.values())]
    run.write_json(args.depth, curve)
    with run.publish(args.out, KIND) as draft:
        loss_curves({path.stem: run.read_json(path) for path in args.losses}, draft.directory / "losses.svg")
        depth_curve(depths, draft.directory / "depth.svg")
        masked_nll(diffusion, draft.directory / "masked_nll.svg")
        (draft.directory / "samples.json").write_text(json.dumps(texts, indent=1, ensure_ascii=False) + "\n")
        (draft.directory / "samples.html").write_text(_page(texts))


def _sample(run: StageRun, model: Path, tokens: Tokens, device: torch.device, *, causal: bool) -> list[str]:
    from transformers import AutoTokenizer  # takes a second or two

    params, generator = run.params.report, torch.Generator().manual_seed(run.params.seed)
    rack = load_rack(model).to(device).eval()
    n, seq, temperature = params.samples, run.params.seq_len, params.temperature
    if causal:
        first = tokens.vocabulary.eos_id
        ids = sample_causal(rack, n=n, seq=seq, temperature=temperature, first=first, generator=generator)
    else:
        mask_id, steps = tokens.vocabulary.mask_id, params.steps
        ids = sample_diffusion(
            rack, n=n, seq=seq, steps=steps, temperature=temperature, mask_id=mask_id, generator=generator
        )
    return [str(text) for text in AutoTokenizer.from_pretrained(tokens.tokenizer).batch_decode(ids)]


def _page(texts: dict[str, list[str]]) -> str:
    parts = [
        "<!doctype html><meta charset='utf-8'><title>Samples</title>",
        "<body style='font:15px sans-serif;margin:2em'>",
    ]
    for name, samples in texts.items():
        parts.append(f"<h2>{html.escape(name)}</h2>")
        parts += [
            f"<pre style='white-space:pre-wrap;background:#f4f4f4;padding:1em'>{html.escape(t)}</pre>" for t in samples
        ]
    return "\n".join([*parts, "</body>\n"])


if __name__ == "__main__":
    run_stage(__doc__, declare, work)
