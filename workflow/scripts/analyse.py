"""Stage analyse: look inside the trained rack and the causal model made of it."""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])  # this project's packages; not the scripts beside this one

from workflow.stage import StageRun, check_params, run_stage

if __name__ == "__main__":
    check_params()  # before the imports that take seconds

import numpy as np
import torch
from torch import Tensor

from stackwise.analysis.attention import distance, entropy, uniform
from stackwise.analysis.reading import Condition, Lens, Reader
from stackwise.analysis.similarity import cka, effective_rank
from stackwise.config.evaluation import EvaluateParams
from stackwise.data.tokens import KIND as TOKENS
from stackwise.data.tokens import Tokens, open_tokens
from stackwise.growth.racks import KIND as RACK
from stackwise.growth.racks import load_rack
from stackwise.inference.evaluation import Evaluator, Metrics
from stackwise.inference.intervals import mean
from stackwise.model.rack import Rack
from stackwise.training.device import set_up
from workflow import inside

KIND = "analysis"


def declare(parser: argparse.ArgumentParser) -> None:
    """Arguments of the script."""
    parser.add_argument("--bidirectional", type=Path, help="rack whose positions look at all others")
    parser.add_argument("--causal", type=Path, help="rack whose positions look back")
    parser.add_argument("--labelled", action="store_true", help="what they predict are the labels of the documents")
    parser.add_argument("--tokens", type=Path, required=True, help="tokens artifact")
    parser.add_argument("--metrics", type=Path, required=True, help="JSON file to write: all figures")
    parser.add_argument("--boundaries", type=Path, required=True, help="JSON file to write: curves over the boundaries")
    parser.add_argument("--out", type=Path, required=True, help="artifact to write: figures, lens and maps")


def work(run: StageRun) -> None:
    """Read boundaries, heads and what each depth predicts."""
    args, params = run.arguments, run.params
    device = set_up(params.compute, threads=params.compute.branch_threads, seed=params.seed)
    tokens = open_tokens(run.read("tokens", args.tokens, TOKENS), params.seq_len)
    reader = Reader(tokens, params.analyse.samples, params.seed, device, params.compute.dtype)
    evaluator = Evaluator(
        tokens, EvaluateParams(samples=params.analyse.samples), params.seed, device, params.compute.dtype
    )
    racks = {
        role: load_rack(run.read(f"model.{role}", path, RACK).path).to(device).eval()
        for role in ("bidirectional", "causal")
        if (path := getattr(args, role)) is not None
    }
    ways = _ways(racks, params.analyse.mask_rates, labelled=args.labelled)
    found = {
        name: _measured(reader, evaluator, racks[role], condition, labelled=args.labelled)
        for name, (role, condition) in ways.items()
    }
    # The middle one of the mask rates stands for all where there is room for one.
    shown = {role: _middle([name for name, way in ways.items() if way[0] == role]) for role in racks}
    heads = {role: reader.heads(racks[role], ways[name][1]) for role, name in shown.items()}
    baselines = {role: _uniform(params.seq_len, ways[name][1]) for role, name in shown.items()}
    unigram = evaluator.unigram(labelled=args.labelled)
    metrics: Metrics = {name: {str(k): point for k, point in enumerate(own["points"])} for name, own in found.items()}
    metrics["attention"] = {
        role: {str(layer): {"entropy": np.mean(h.entropy), "distance": np.mean(h.distance)} for layer, h in own.items()}
        | {"uniform": baselines[role]}
        for role, own in heads.items()
    }
    metrics["unigram"] = unigram
    run.write_json(args.metrics, metrics)
    run.write_json(args.boundaries, [_row(k, found) for k in range(len(next(iter(found.values()))["points"]))])
    run.record.add("result", values=dict(_curves(found)))

    tokenizer = _tokenizer(tokens)
    lenses = {ways_name: reader.lens(racks[role], ways[ways_name][1]) for role, ways_name in shown.items()}
    panels = {name: _panel(lens, tokenizer, params.analyse.tokens, ways[name][1]) for name, lens in lenses.items()}
    maps = {
        name: _maps(reader.maps(racks[role], ways[name][1]), heads[role], panels[name]["inputs"], params.analyse.heads)
        for role, name in shown.items()
    }
    with run.publish(args.out, KIND) as draft:
        at = draft.directory
        inside.similarity({name: own["similarity"] for name, own in found.items()}, at / "similarity.svg")
        widest = max(rack.shape.model.d_model for rack in racks.values())
        inside.profile({name: own["points"] for name, own in found.items()}, widest, at / "boundaries.svg")
        inside.lens_curves(
            {name: own["points"] for name, own in found.items()}, unigram["nats_per_token"], at / "lens.svg"
        )
        inside.lens_text(panels, at / "lens_text.svg")
        if any(heads.values()):
            dots = {role: {layer: vars(h) for layer, h in own.items()} for role, own in heads.items() if own}
            inside.heads(dots, baselines, at / "attention.svg")
            inside.maps({name: own for name, own in maps.items() if own}, at / "maps.svg")
        else:
            for figure in ("attention.svg", "maps.svg"):
                inside.nothing(
                    "Every layer of these models is attention by kernels, which has no weights to show.", at / figure
                )
        (at / "similarity.json").write_text(json.dumps({name: own["similarity"] for name, own in found.items()}) + "\n")
        (at / "lens_text.json").write_text(json.dumps(panels, ensure_ascii=False, indent=1) + "\n")
        (at / "maps.json").write_text(json.dumps(maps, ensure_ascii=False) + "\n")
    for name, own in found.items():
        ranks = ", ".join(f"{point['effective_rank']:.0f}" for point in own["points"])
        run.say(f"{name}: effective rank of the boundaries {ranks}")


def _ways(racks: Mapping[str, Rack], rates: list[float], *, labelled: bool) -> dict[str, tuple[str, Condition]]:
    """Whom to read and how, by what figures call it."""
    found = {}
    for role in racks:
        causal = role == "causal"
        if causal or labelled:
            found[role] = (role, Condition(causal))
        else:
            found |= {f"{role}, {rate:.0%} masked": (role, Condition(causal, rate)) for rate in rates}
    return found


def _middle(names: list[str]) -> str:
    return names[len(names) // 2]


def _measured(reader: Reader, evaluator: Evaluator, rack: Rack, condition: Condition, *, labelled: bool) -> Any:
    """Similarity of the boundaries, and of each its rank, its size and what it predicts."""
    boundaries = reader.boundaries(rack, condition)
    if condition.rate is not None:
        predicted = evaluator.at_rate(rack, condition.rate, every_depth=True)
    else:
        predicted = evaluator.by_depth(rack, "labelled" if labelled else "next_token", causal=condition.causal)
    seq = evaluator.tokens.validation.seq_len
    points = []
    for k, x in enumerate(boundaries):
        size = mean(_norms(x).reshape(-1, seq).mean(1).numpy() / x.shape[1] ** 0.5)
        point = {"effective_rank": effective_rank(x - x.mean(0)), **size.named("rms"), **predicted[k]}
        if k:
            update = _norms(x - boundaries[k - 1]) / _norms(boundaries[k - 1])
            point["update"] = float(update.mean())
        points.append(point)
    similarity = cka(boundaries, generator=torch.Generator().manual_seed(reader.seed))
    return {"points": points, "similarity": [[round(value, 6) for value in row] for row in similarity.tolist()]}


def _norms(x: Tensor) -> Tensor:
    """`[n, d_model]` -> `[n]`."""
    return x.double().norm(dim=1)


def _uniform(seq: int, condition: Condition) -> dict[str, float]:
    weights = uniform(seq, causal=condition.causal)
    return {"entropy": float(entropy(weights).mean()), "distance": float(distance(weights).mean())}


def _row(k: int, found: Mapping[str, Any]) -> dict[str, float]:
    """A point of every curve over the boundaries, for plots."""
    row: dict[str, float] = {"boundary": k}
    for name, own in found.items():
        key = name.replace(", ", "_").replace("% masked", "")
        row |= {f"{key}_{figure}": own["points"][k][figure] for figure in ("effective_rank", "rms", "nats_per_token")}
    return row


def _curves(found: Mapping[str, Any]) -> list[tuple[str, float]]:
    """What the record is told: each figure at each boundary."""
    return [
        (f"analysis.{name.replace(', ', '_').replace('% ', '_')}.{k}.{figure}", value)
        for name, own in found.items()
        for k, point in enumerate(own["points"])
        for figure, value in point.items()
    ]


def _tokenizer(tokens: Tokens) -> Any:
    from transformers import AutoTokenizer  # takes a second or two

    return AutoTokenizer.from_pretrained(tokens.tokenizer)


def _panel(lens: Lens, tokenizer: Any, n: int, condition: Condition) -> dict[str, Any]:
    """The first `n` tokens of a text and what each boundary makes of them."""
    inputs, tokens = lens.inputs[:n].tolist(), lens.tokens[: n + 1].tolist()

    def text(ids: list[int]) -> list[str]:
        return [str(tokenizer.decode([i])) for i in ids]

    if condition.causal:
        wanted: list[str | None] = [*text(tokens[1 : n + 1])]
        wanted += [None] * (len(inputs) - len(wanted))
    else:
        masked = [a != b for a, b in zip(inputs, tokens[:n], strict=True)]
        wanted = [t if hidden else None for t, hidden in zip(text(tokens[:n]), masked, strict=True)]
    return {
        "inputs": text(inputs),
        "wanted": wanted,
        "guesses": [text(row) for row in lens.likeliest[:, :n].tolist()],
        "probabilities": [[round(p, 4) for p in row] for row in lens.probabilities[:, :n].tolist()],
    }


def _maps(found: Mapping[int, Tensor], heads: Mapping[int, Any], tokens: list[str], n: int) -> list[dict[str, Any]]:
    """Of `n` layers, spread over the depth, the head that looks at the fewest tokens, on the first tokens."""
    layers = sorted(found)
    chosen = [layers[i] for i in np.linspace(0, len(layers) - 1, min(n, len(layers))).round().astype(int)]
    shown = []
    for layer in chosen:
        head = int(np.argmin(heads[layer].entropy))
        weights = found[layer][head, : len(tokens), : len(tokens)]
        rounded = [[round(w, 4) for w in row] for row in weights.tolist()]
        shown.append({"layer": layer, "head": head, "weights": rounded, "tokens": tokens})
    return shown


if __name__ == "__main__":
    run_stage(__doc__, declare, work)
