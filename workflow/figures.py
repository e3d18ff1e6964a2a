"""The figures of the report: SVG files that are the same for the same numbers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Identifiers in an SVG are random unless salted; text stays text, so that it can be searched.
matplotlib.rcParams.update(
    {"svg.hashsalt": "stackwise", "svg.fonttype": "none", "font.size": 11, "axes.grid": True, "grid.alpha": 0.3}
)


def loss_curves(losses: Mapping[str, Sequence[Mapping[str, float]]], out: Path) -> None:
    """Training loss against optimizer steps, a line for each stack and branch.

    Args:
        losses: points {step, loss} by name.
        out: SVG file.
    """
    figure, axes = _axes("optimizer step", "training loss (nats, summed over masked tokens / tokens)")
    for name, points in losses.items():
        axes.plot([p["step"] for p in points], [p["loss"] for p in points], label=name.replace("_", " "))
    axes.legend()
    _save(figure, out)


MAIN_FIGURES = {"nelbo": "NELBO", "next_token": "NLL of the next token", "labelled": "NLL of the labels"}


def main_figure(metrics: Mapping[str, Any]) -> str:
    """The key of what a model is judged by."""
    return next(key for key in MAIN_FIGURES if key in metrics)


def depth_curve(depths: Mapping[str, Mapping[str, Any]], out: Path) -> None:
    """NELBO or NLL after each training of the rack with its 95 % interval, beside the unigram baseline.

    Args:
        depths: metrics of the rack after each training, by the training's name.
        out: SVG file.
    """
    first = next(iter(depths.values()))
    key = main_figure(first)
    figure, axes = _axes("after the training of", f"{MAIN_FIGURES[key]} on held-out text (bits per byte)")
    places = range(len(depths))
    found = [d[key] for d in depths.values()]
    axes.errorbar(
        places,
        [f["bits_per_byte"] for f in found],
        yerr=[1.96 * f["standard_error_bits_per_byte"] for f in found],
        marker="o",
        capsize=4,
        label="rack",
    )
    axes.axhline(first["unigram"]["bits_per_byte"], color="gray", linestyle="--", label="unigram baseline")
    axes.set_xticks(list(places), [name.replace("_", " ") for name in depths])
    axes.set_ylim(bottom=0)
    axes.legend()
    _save(figure, out)


def masked_nll(metrics: Mapping[str, Mapping[str, Any]], out: Path) -> None:
    """Cross-entropy of masked tokens against the mask rate, a line for each model.

    Args:
        metrics: of the diffusion models, by name.
        out: SVG file.
    """
    figure, axes = _axes("mask rate", "NLL of masked tokens (nats per token)")
    for name, values in metrics.items():
        rates = sorted(values["masked"], key=float)
        axes.plot(
            [float(r) for r in rates],
            [values["masked"][r]["nats_per_token"] for r in rates],
            marker="o",
            label=name.replace("_", " "),
        )
    axes.set_xlim(0, 1)
    if metrics:
        axes.legend()
    _save(figure, out)


def stage_costs(stages: Sequence[tuple[str, float, float]], out: Path) -> None:
    """Time and peak memory of each stage's latest execution.

    Args:
        stages: (name, seconds, bytes) in the order of the pipeline.
        out: SVG file.
    """
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(10, 1.2 + 0.26 * len(stages)), sharey=True, layout="constrained"
    )
    names = [name for name, _, _ in stages]
    left.barh(names, [seconds for _, seconds, _ in stages])
    left.set_xlabel("time (s)")
    left.invert_yaxis()
    right.barh(names, [size / 2**20 for _, _, size in stages], color="tab:orange")
    right.set_xlabel("peak memory of the process (MiB)")
    _save(figure, out)


def _axes(x: str, y: str) -> tuple[Figure, Axes]:
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    return figure, axes


def _save(figure: Figure, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, format="svg", metadata={"Date": None})
    plt.close(figure)
