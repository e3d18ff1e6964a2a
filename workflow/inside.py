"""The figures of what is inside a rack: similarity, rank and norm of boundaries, logit lens, attention."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.ticker
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from workflow.figures import save

_CELL = 0.62
"""Inches of a cell that holds text."""


def similarity(matrices: Mapping[str, Sequence[Sequence[float]]], out: Path) -> None:
    """Linear CKA of every two boundaries, a panel for each way of use.

    Args:
        matrices: by what the panel is called.
        out: SVG file.
    """
    n = len(next(iter(matrices.values())))
    figure, panels = plt.subplots(
        1, len(matrices), figsize=(1.2 + 2.9 * len(matrices), 3.6), layout="constrained", squeeze=False
    )
    for axes, (name, matrix) in zip(panels[0], matrices.items(), strict=True):
        image = axes.imshow(matrix, vmin=0, vmax=1, cmap="viridis", origin="lower")
        for i in range(n):
            for j in range(n):
                value = matrix[i][j]
                axes.text(
                    j,
                    i,
                    f"{value:.2f}",
                    ha="center",
                    va="center",
                    fontsize=9,
                    color="white" if value < 0.6 else "black",
                )
        axes.set_title(name, fontsize=11)
        _integers(axes, "boundary", n)
        axes.grid(visible=False)
    panels[0][0].set_ylabel("boundary")
    figure.colorbar(image, ax=panels[0].tolist(), label="similarity (linear CKA)", shrink=0.85)
    save(figure, out)


def profile(lines: Mapping[str, Sequence[Mapping[str, float]]], d_model: int, out: Path) -> None:
    """Effective rank, size and relative change of the residual stream against depth.

    Args:
        lines: of each way of use the figures of boundaries 0 to K: {effective_rank, rms, rms_low, rms_high, update}.
        d_model: the highest rank that there could be.
        out: SVG file.
    """
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    for name, points in lines.items():
        depth = range(len(points))
        left.plot(depth, [p["effective_rank"] for p in points], marker="o", label=name)
        sizes = [p["rms"] for p in points]
        bars = [[p["rms"] - p["rms_low"] for p in points], [p["rms_high"] - p["rms"] for p in points]]
        middle.errorbar(depth, sizes, yerr=bars, marker="o", capsize=3, label=name)
        right.plot(depth[1:], [p["update"] for p in points[1:]], marker="o", label=name)
    left.axhline(d_model, color="gray", linestyle="--", linewidth=1)
    left.annotate("d_model", (0, d_model), xytext=(2, -12), textcoords="offset points", color="gray", fontsize=9)
    left.set_ylim(bottom=0)
    left.set_title("dimensions in use")
    left.set_ylabel("effective rank")
    for axes in (middle, right):
        axes.set_yscale("log")
        # Plain numbers where they have room; minor ones only within one decade.
        axes.yaxis.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(matplotlib.ticker.LogFormatter(labelOnlyBase=False, minor_thresholds=(1.5, 0.8)))
    middle.set_title("size of the residual stream")
    middle.set_ylabel("root mean square of its numbers")
    right.set_title("what the stack below adds")
    right.set_ylabel("|change| / |what came in|")
    n = len(next(iter(lines.values())))
    for axes in (left, middle, right):
        _integers(axes, "boundary", n)
    figure.legend(
        *left.get_legend_handles_labels(), loc="outside lower center", ncols=min(4, len(lines)), frameon=False
    )
    save(figure, out)


def lens_curves(lines: Mapping[str, Sequence[Mapping[str, float]]], unigram: float, out: Path) -> None:
    """NLL and accuracy of what each boundary already predicts.

    Args:
        lines: of each way of use the metrics at boundaries 0 to K, with their intervals.
        unigram: NLL of the baseline (nats per token).
        out: SVG file.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.2), layout="constrained")
    for name, points in lines.items():
        depth = range(len(points))
        for axes, key, factor in ((left, "nats_per_token", 1), (right, "accuracy", 100)):
            value, low, high = (np.array([p[key + end] for p in points]) * factor for end in ("", "_low", "_high"))
            axes.errorbar(depth, value, yerr=(value - low, high - value), marker="o", capsize=3, label=name)
    left.axhline(unigram, color="gray", linestyle="--", linewidth=1, label="unigram baseline")
    left.set_ylabel("NLL (nats per token)")
    left.set_title("how surprised the head is")
    right.set_ylabel("accuracy (%)")
    right.set_title("how often its first guess is right")
    right.set_ylim(bottom=0)
    n = len(next(iter(lines.values())))
    for axes in (left, right):
        _integers(axes, "boundary that the head reads", n)
    figure.legend(
        *left.get_legend_handles_labels(), loc="outside lower center", ncols=min(4, len(lines) + 1), frameon=False
    )
    save(figure, out)


def lens_text(panels: Mapping[str, Mapping[str, Any]], out: Path) -> None:
    """The likeliest token of each boundary at each position of a text.

    Args:
        panels: by name: {inputs: what the model saw, wanted: what is right there, guesses: by boundary,
            probabilities: of the guesses}, tokens as text; `wanted` is null where nothing was asked for.
        out: SVG file.
    """
    widest = max(len(p["inputs"]) for p in panels.values())
    depths = max(len(p["guesses"]) for p in panels.values())
    figure, rows = plt.subplots(
        len(panels),
        1,
        figsize=(2.4 + _CELL * widest, len(panels) * (1.5 + 0.42 * depths)),
        layout="constrained",
        squeeze=False,
    )
    for axes, (name, panel) in zip(rows[:, 0], panels.items(), strict=True):
        asked = np.array([wanted is not None for wanted in panel["wanted"]])
        shown = np.where(asked, np.array(panel["probabilities"]), np.nan)
        image = axes.imshow(shown, vmin=0, vmax=1, cmap="YlGn", aspect="auto", origin="lower")
        for k, guesses in enumerate(panel["guesses"]):
            for at, guess in enumerate(guesses):
                if asked[at]:
                    right = guess == panel["wanted"][at]
                    axes.text(
                        at,
                        k,
                        _plain(guess),
                        ha="center",
                        va="center",
                        fontsize=8,
                        color="white" if shown[k, at] > 0.7 else "black",
                        weight="bold" if right else "normal",
                    )
        axes.set_xticks(range(len(panel["inputs"])), [_plain(token) for token in panel["inputs"]], fontsize=8)
        axes.tick_params("x", rotation=45)
        above = axes.secondary_xaxis("top")
        above.set_xticks(
            range(len(panel["inputs"])),
            ["" if token is None else _plain(token) for token in panel["wanted"]],
            fontsize=8,
            weight="bold",
        )
        above.tick_params("x", rotation=45)
        axes.set_yticks(range(len(panel["guesses"])))
        axes.set_ylabel("boundary")
        axes.set_xlabel("what the model sees")
        above.set_xlabel(f"{name}: what is right")
        axes.grid(visible=False)
    figure.colorbar(image, ax=rows[:, 0].tolist(), label="probability of the guess", shrink=0.7)
    save(figure, out)


def heads(
    models: Mapping[str, Mapping[int, Mapping[str, Sequence[float]]]],
    uniform: Mapping[str, Mapping[str, float]],
    out: Path,
) -> None:
    """Entropy and distance of every head of every layer, the models side by side.

    Args:
        models: by name and layer {entropy: of each head (bits), distance: of each head (tokens)}.
        uniform: the same of heads that look at everything alike, by model.
        out: SVG file.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    width = 0.6 / max(1, len(models))
    for i, (name, layers) in enumerate(models.items()):
        color = f"C{i}"
        for axes, key in ((left, "entropy"), (right, "distance")):
            for layer, own in layers.items():
                places = np.full(len(own[key]), layer + (i - (len(models) - 1) / 2) * width)
                axes.plot(places, own[key], "o", color=color, alpha=0.65, markersize=6, markeredgewidth=0)
                axes.plot(places[:1], [np.mean(own[key])], "_", color=color, markersize=14, markeredgewidth=2.5)
            axes.axhline(uniform[name][key], color=color, linestyle="--", linewidth=1)
        left.plot([], [], "o", color=color, label=f"{name}: a head each, mean of the layer")
        left.plot([], [], "--", color=color, linewidth=1, label=f"{name}: looking at everything alike")
    left.set_title("how many tokens a head looks at")
    left.set_ylabel("entropy (bits)")
    right.set_title("how far it looks")
    right.set_ylabel("mean distance (tokens)")
    for axes in (left, right):
        axes.set_xlabel("layer")
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    save(figure, out)


def maps(panels: Mapping[str, Sequence[Mapping[str, Any]]], out: Path) -> None:
    """Attention maps of some heads, a row for each model.

    Args:
        panels: of each model {layer, head, weights `[n][n]`, tokens: n texts}.
        out: SVG file.
    """
    columns = max(map(len, panels.values()))
    figure, rows = plt.subplots(
        len(panels),
        columns,
        figsize=(1.4 + 3.5 * columns, 0.4 + 3.9 * len(panels)),
        layout="constrained",
        squeeze=False,
    )
    for axes_of_row, (name, shown) in zip(rows, panels.items(), strict=True):
        for axes in axes_of_row[len(shown) :]:
            axes.set_visible(False)
        for axes, panel in zip(axes_of_row, shown, strict=False):
            image = axes.imshow(panel["weights"], vmin=0, vmax=1, cmap="magma_r")
            places = range(len(panel["tokens"]))
            labels = [_plain(token) for token in panel["tokens"]]
            axes.set_xticks(places, labels, fontsize=6.5, rotation=90)
            axes.set_yticks(places, labels, fontsize=6.5)
            axes.set_title(f"{name}\nlayer {panel['layer']}, head {panel['head']}", fontsize=10)
            axes.grid(visible=False)
        axes_of_row[0].set_ylabel("who looks")
        for axes in axes_of_row[: len(shown)]:
            axes.set_xlabel("at whom")
    figure.colorbar(image, ax=rows.ravel().tolist(), label="share of the attention", shrink=0.6)
    save(figure, out)


def nothing(message: str, out: Path) -> None:
    """In place of a figure that cannot be, the reason.

    Args:
        message: why.
        out: SVG file.
    """
    figure, axes = plt.subplots(figsize=(8, 1.6), layout="constrained")
    axes.text(0.5, 0.5, message, ha="center", va="center", wrap=True)
    axes.set_axis_off()
    save(figure, out)


def _integers(axes: Axes, label: str, n: int) -> None:
    axes.set_xlabel(label)
    axes.set_xticks(range(n))
    if len(axes.get_images()):
        axes.set_yticks(range(n))


def _plain(token: str) -> str:
    """A token as text that can be seen and that no label takes for a formula."""
    for sign, shown in (("\n", "⏎"), ("\t", "⇥"), (" ", "·")):
        token = token.replace(sign, shown)
    token = "".join(c if c.isprintable() else "�" for c in token)
    return (token if len(token) <= 8 else f"{token[:7]}…").replace("$", r"\$")
