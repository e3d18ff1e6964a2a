"""Stage report: figures of the losses, the value of depth and the masked NLL, and the texts of each model on a page."""

import argparse
import html
import json
import sys
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])  # this project's packages; not the scripts beside this one

from workflow.stage import StageRun, check_params, run_stage

if __name__ == "__main__":
    check_params()  # before the imports that take seconds

from stackwise.artifacts.manifest import Artifact
from workflow.figures import choices, depth_curve, exits, loss_curves, main_figure, masked_nll, sample_quality
from workflow.summary import summary

KIND, SAMPLES = "report", "samples"


def declare(parser: argparse.ArgumentParser) -> None:
    """Arguments of the script."""
    parser.add_argument("--samples", type=Path, nargs="+", default=[], help="texts of the models")
    parser.add_argument("--depths", type=Path, nargs="+", required=True, help="metrics after each training, in order")
    parser.add_argument("--metrics", type=Path, nargs="+", required=True, help="metrics of the models, in order")
    parser.add_argument("--losses", type=Path, nargs="+", required=True, help="loss curves")
    parser.add_argument("--choices", type=Path, nargs="+", default=[], help="metrics of multiple-choice questions")
    parser.add_argument("--scores", type=Path, help="metrics of the texts of the models")
    parser.add_argument("--classifiers", type=Path, nargs="+", default=[], help="metrics of the classifiers, in order")
    parser.add_argument("--depth", type=Path, required=True, help="JSON file to write: the bound or NLL by depth")
    parser.add_argument("--summary", type=Path, required=True, help="JSON file to write: main figures of the models")
    parser.add_argument("--out", type=Path, required=True, help="artifact to write")


def work(run: StageRun) -> None:
    """Draw."""
    args = run.arguments
    depths = {path.stem: run.read_json(path) for path in args.depths}
    metrics = {path.stem: run.read_json(path) for path in args.metrics}
    diffusion = {name: m for name, m in metrics.items() if "masked" in m}
    samples = [run.read(f"samples.{path.name}", path, SAMPLES) for path in args.samples]
    curve = [{"training": i, **metrics[main_figure(metrics)]} for i, metrics in enumerate(depths.values())]
    run.write_json(args.depth, curve)
    classifiers = {path.stem: run.read_json(path) for path in args.classifiers}
    run.write_json(args.summary, summary(metrics | classifiers))
    with run.publish(args.out, KIND) as draft:
        loss_curves({path.stem: run.read_json(path) for path in args.losses}, draft.directory / "losses.svg")
        depth_curve(depths, draft.directory / "depth.svg")
        masked_nll(diffusion, draft.directory / "masked_nll.svg")
        exits({name: m["depths"] for name, m in metrics.items()}, draft.directory / "exits.svg")
        if args.choices:
            choices({path.stem: run.read_json(path) for path in args.choices}, draft.directory / "choices.svg")
        if args.scores:
            sample_quality(run.read_json(args.scores), draft.directory / "sample_quality.svg")
        (draft.directory / "samples.html").write_text(_page(samples), encoding="utf-8")


_STYLE = """
body { font: 15px sans-serif; margin: 2em; }
pre { white-space: pre-wrap; background: #f6f6f6; padding: 1em; }
pre mark { background: #dcebfb; color: inherit; }
"""
_METHODS = {"causal": "from left to right", "diffusion": "by unmasking"}


def _page(samples: list[Artifact]) -> str:
    """A page of all texts; what is marked was made by the model, all else was given."""
    parts = [f"<!doctype html><meta charset='utf-8'><title>Samples</title><style>{_STYLE}</style>"]
    for own in samples:
        parts.append(f"<h2>{html.escape(own.path.name)}, {_METHODS[own.facts['method']]}</h2>")
        with (own.path / "samples.jsonl").open(encoding="utf-8") as lines:
            parts += [f"<pre>{''.join(map(_marked, json.loads(line)['pieces']))}</pre>" for line in lines]
    return "\n".join(parts) + "\n"


def _marked(piece: dict[str, Any]) -> str:
    text = html.escape(piece["text"])
    return f"<mark>{text}</mark>" if piece["made"] else text


if __name__ == "__main__":
    run_stage(__doc__, declare, work)
