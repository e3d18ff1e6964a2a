"""The figures of the report: SVG files that are the same for the same numbers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, StrMethodFormatter

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
    save(figure, out)


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
    values = [f["bits_per_byte"] for f in found]
    axes.errorbar(places, values, yerr=_bars(found, "bits_per_byte"), marker="o", capsize=4, label="rack")
    axes.axhline(first["unigram"]["bits_per_byte"], color="gray", linestyle="--", label="unigram baseline")
    axes.set_xticks(list(places), [name.replace("_", " ") for name in depths])
    axes.set_ylim(bottom=0)
    axes.legend()
    save(figure, out)


def masked_nll(metrics: Mapping[str, Mapping[str, Any]], out: Path) -> None:
    """Cross-entropy of masked tokens against the mask rate, a line for each model.

    Args:
        metrics: of the diffusion models, by name.
        out: SVG file.
    """
    figure, axes = _axes("mask rate", "NLL of masked tokens (nats per token)")
    for name, values in metrics.items():
        rates = sorted(values["masked"], key=float)
        found = [values["masked"][r] for r in rates]
        axes.errorbar(
            [float(r) for r in rates],
            [f["nats_per_token"] for f in found],
            yerr=_bars(found, "nats_per_token"),
            marker="o",
            capsize=4,
            label=name.replace("_", " "),
        )
    axes.set_xlim(0, 1)
    if metrics:
        axes.legend()
    save(figure, out)


def exits(models: Mapping[str, Mapping[str, Mapping[str, Any]]], out: Path) -> None:
    """What each model is worth if it stops after stack k, against the operations that it then takes.

    Args:
        models: by name and number of the boundary, from 0: the main figure and `operations_per_token`.
        out: SVG file.
    """
    figure, axes = _axes("operations per token (millions)", "NELBO, or NLL of causal models (bits per byte)")
    for name, depths in models.items():
        points = [depths[k] for k in sorted(depths, key=int)]
        operations = [p["operations_per_token"] / 1e6 for p in points]
        found = [p[main_figure(p)] for p in points]
        values = [f["bits_per_byte"] for f in found]
        label = f"{name.replace('_', ' ')} ({MAIN_FIGURES[main_figure(points[0])]})"
        axes.errorbar(operations, values, yerr=_bars(found, "bits_per_byte"), marker="o", capsize=4, label=label)
    for k, x in enumerate(operations):
        axes.annotate(
            str(k), (x, 0), xycoords=("data", "axes fraction"), xytext=(0, 4), textcoords="offset points", ha="center"
        )
    axes.annotate("stacks passed:", (0, 0), xycoords="axes fraction", xytext=(4, 18), textcoords="offset points")
    axes.margins(y=0.15)
    axes.legend()
    save(figure, out)


def choices(models: Mapping[str, Mapping[str, Mapping[str, float]]], out: Path) -> None:
    """Accuracy on multiple-choice files with its 95 % interval, beside chance.

    Args:
        models: of each model the metrics by file.
        out: SVG file.
    """
    files = list(next(iter(models.values())))
    figure, axes = _axes("file", "right answers (%)")
    width = 0.8 / len(models)
    for i, (name, found) in enumerate(models.items()):
        own = [found[file] for file in files]
        places = [at + (i - (len(models) - 1) / 2) * width for at in range(len(files))]
        bars = [[100 * x for x in side] for side in _bars(own, "accuracy")]
        axes.bar(places, [100 * f["accuracy"] for f in own], width=0.9 * width, yerr=bars, capsize=4, label=name)
    for at, file in enumerate(files):
        chance = 100 * next(iter(models.values()))[file]["chance"]
        axes.hlines(chance, at - 0.45, at + 0.45, color="black", linestyle="--", label="" if at else "chance")
    rows = [next(iter(models.values()))[file]["rows"] for file in files]
    axes.set_xticks(range(len(files)), [f"{file}\n{n} questions" for file, n in zip(files, rows, strict=True)])
    axes.set_ylim(0, 100)
    axes.legend()
    save(figure, out)


def sample_quality(models: Mapping[str, Mapping[str, float]], out: Path) -> None:
    """Generative perplexity of sampled text against its token entropy, with 95 % intervals, beside held-out text.

    Args:
        models: metrics of each model's texts, and of `held_out`.
        out: SVG file.
    """
    figure, axes = _axes("token entropy of a text (bits)", "generative perplexity")
    for i, (name, found) in enumerate(models.items()):
        x, y = ([[side[0]] for side in _bars([found], key)] for key in ("token_entropy", "perplexity"))
        style: dict[str, Any] = {"marker": "o", "color": f"C{i - 1}"}
        if name == "held_out":
            style = {"marker": "*", "color": "black", "markersize": 14}
        label = f"{name.replace('_', '-' if name == 'held_out' else ' ')} ({found['texts']} texts)"
        place = found["token_entropy"], found["perplexity"]
        axes.errorbar(*place, xerr=x, yerr=y, capsize=4, linestyle="", label=label, **style)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.5)))
    axes.legend()
    save(figure, out)


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
    save(figure, out)


def _bars(found: Sequence[Mapping[str, float]], key: str) -> tuple[list[float], list[float]]:
    """How far the 95 % interval of each figure reaches down and up."""
    down = [f[key] - f[f"{key}_low"] for f in found]
    return down, [f[f"{key}_high"] - f[key] for f in found]


def _axes(x: str, y: str) -> tuple[Figure, Axes]:
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    return figure, axes


def save(figure: Figure, out: Path) -> None:
    """Write a figure as SVG, the same bytes for the same figure, and forget it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, format="svg", metadata={"Date": None})
    plt.close(figure)
