"""The figures of the documentation: SVG files that are the same whenever they are drawn.

python docs/figures/draw.py            draw those of the concepts
python docs/figures/draw.py --check    exit with 1 if one differs from what is committed
python docs/figures/draw.py --depth    draw the curve over depth from metrics/ of a finished run
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from workflow.figures import depth_curve  # sets up matplotlib for SVG

HERE = Path(__file__).resolve().parent
GREY, BLUE, ORANGE, GREEN, INK = "#e9ecef", "#cfe2ff", "#ffe0b3", "#d3f0d9", "#333333"


def rack(out: Path) -> None:
    """Three trainings of a rack that grows by appending."""
    figure, axes = _canvas(10.5, 4.6)
    for k in range(3):
        left = 0.4 + 3.5 * k
        _box(axes, left, 0.2, "embeddings", GREY if k else ORANGE)
        for j in range(k + 1):
            newest = j == k
            _box(axes, left, 1.0 + 0.8 * j, f"stack {j}", ORANGE if newest else GREY)
        if k:
            _box(axes, left + 1.75, 0.2 + 0.8 * k, f"boundary {k}\non disk", GREEN, width=1.15)
            _arrow(axes, (left + 1.75, 0.5 + 0.8 * k), (left + 1.5, 1.25 + 0.8 * k))
        _box(axes, left, 1.8 + 0.8 * k, "norm, head", BLUE)
        low = 1.0 + 0.8 * k if k else 0.2
        window = FancyBboxPatch(
            (left - 0.12, low - 0.12), 1.74, (1.8 + 0.8 * k) + 0.62 - low + 0.12,
            boxstyle="round,pad=0,rounding_size=0.08", fill=False, edgecolor="#c05000", linewidth=1.6, linestyle="--",
        )  # fmt: skip
        axes.add_patch(window)
        axes.text(left + 0.75, -0.2, f"training {k}", ha="center", va="center", fontsize=11, color=INK)
    for x, color, text in ((0.4, ORANGE, "trains"), (2.0, BLUE, "trains in every one"), (4.8, GREY, "frozen")):
        _legend(axes, x, color, text)
    _legend(axes, 6.3, GREEN, "frozen stacks' output, read instead of them")
    axes.text(0.4, 4.95, "dashed: the window, all that is in memory", fontsize=10, color="#c05000", va="center")
    _finish(figure, axes, out, (0, 10.9), (-0.5, 5.2))


def _legend(axes: Axes, x: float, color: str, text: str) -> None:
    axes.add_patch(FancyBboxPatch((x, 4.45), 0.22, 0.16, boxstyle="round,pad=0,rounding_size=0.03", fc=color, ec=INK))
    axes.text(x + 0.32, 4.53, text, fontsize=10, va="center", color=INK)


def pipeline(out: Path) -> None:
    """The stages of a rack of three stacks, from left to right."""
    figure, axes = _canvas(12, 4.2)
    places = {
        "corpus": (0, 2, "corpus"), "tokens": (1.55, 2, "tokenize"),
        "s0": (3.1, 2, "train\nstack 0"), "s1": (6.2, 2, "train\nstack 1"), "s2": (9.3, 2, "train\nstack 2"),
        "q0": (4.0, 0.9, "quantize 0"), "c1": (5.55, 0.9, "cache\nboundary 1"),
        "q1": (7.1, 0.9, "quantize 1"), "c2": (8.65, 0.9, "cache\nboundary 2"),
        "fuse": (10.85, 2, "fuse"), "clm": (12.4, 3.0, "fine-tune\nclm"), "mlm": (12.4, 2, "fine-tune\nmlm"),
        "dif": (12.4, 1.0, "fine-tune\ndiffusion"), "report": (13.95, 2, "evaluate,\nsample,\nreport"),
    }  # fmt: skip
    colors = {"s": ORANGE, "q": GREY, "c": GREEN, "f": BLUE}
    for key, (x, y, text) in places.items():
        color = colors.get(key[0], BLUE) if key[1:].isdigit() else BLUE if key in ("fuse",) else "white"
        _box(axes, x, y, text, color, width=1.25, height=0.62)
    for k, (x, _, _) in enumerate((places["s0"], places["s1"], places["s2"])):
        _box(axes, x, 3.3, f"evaluate {k}", "white", width=1.25, height=0.5)
        _arrow(axes, (x + 0.62, 2.62), (x + 0.62, 3.3))
    links: tuple[str, ...] = (
        "corpus tokens",
        "tokens s0",
        "s0 s1",
        "s1 s2",
        "s2 fuse",
        "fuse clm",
        "fuse mlm",
        "fuse dif",
    )
    links = (*links, "clm report", "mlm report", "dif report", "q0 c1", "q1 c2")
    for link in links:
        (x, y, _), (u, v, _) = (places[key] for key in link.split())
        _arrow(axes, (x + 1.25, y + 0.31), (u, v + 0.31))
    for link in ("s0 q0", "s1 q1", "c1 s1", "c2 s2"):
        (x, y, _), (u, v, _) = (places[key] for key in link.split())
        down = y > v
        _arrow(axes, (x + 0.8, y + (0 if down else 0.62)), (u + 0.5, v + (0.62 if down else 0)))
    _finish(figure, axes, out, (-0.2, 15.4), (0.6, 4.0))


def masks(out: Path) -> None:
    """One text at three times, and what the bound adds up."""
    text = "a rack grows one stack at a time and every stack learns from the one below"
    words = text.split()
    draws = np.random.default_rng(1).random(len(words))
    figure, axes = _canvas(11, 2.5)
    for row, t in enumerate((0.2, 0.5, 0.9)):
        y = 1.6 - 0.75 * row
        axes.text(-0.15, y + 0.2, f"t = {t}", ha="right", va="center", fontsize=11, color=INK)
        x = 0.0
        for word, draw in zip(words, draws, strict=True):
            width = 0.16 * max(len(word), 3) + 0.16
            masked = draw < t
            _box(axes, x, y, "" if masked else word, "#495057" if masked else "white", width=width, height=0.4)
            x += width + 0.08
        weight = f"1/t = {1 / t:.1f}"
        axes.text(x + 0.15, y + 0.2, f"weight {weight}", va="center", fontsize=10, color=INK)
    _finish(figure, axes, out, (-1.2, 15.2), (-0.1, 2.2))


def depth(out: Path, metrics: Path = Path("metrics")) -> None:
    """The value of depth, from the metrics of a run that has finished."""
    names = sorted(metrics.glob("stack_*.json"), key=lambda path: int(path.stem.split("_")[1]))
    if not names:
        sys.exit(f"error: {metrics}: no stack_*.json; run `snakemake --cores 2 fused_model` first")
    depth_curve({path.stem: json.loads(path.read_text()) for path in names}, out)


def _canvas(width: float, height: float) -> tuple[Figure, Axes]:
    figure, axes = plt.subplots(figsize=(width, height))
    axes.axis("off")
    return figure, axes


def _box(axes: Axes, x: float, y: float, text: str, color: str, *, width: float = 1.5, height: float = 0.5) -> None:
    style = "round,pad=0,rounding_size=0.07"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=color, edgecolor=INK, linewidth=1))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=9.5, color=INK)


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=10, color=INK, linewidth=1, zorder=0))


def _finish(figure: Figure, axes: Axes, out: Path, x: tuple[float, float], y: tuple[float, float]) -> None:
    axes.set(xlim=x, ylim=y, aspect="equal")
    figure.subplots_adjust(0, 0, 1, 1)
    figure.savefig(out, format="svg", metadata={"Date": None}, bbox_inches="tight", pad_inches=0.1)
    plt.close(figure)


CONCEPTS = {"rack": rack, "pipeline": pipeline, "masks": masks}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--check", action="store_true", help="hold what is committed against what would be drawn")
    which.add_argument("--depth", action="store_true", help="draw depth.svg from metrics/ of the current directory")
    arguments = parser.parse_args()
    if arguments.depth:
        depth(HERE / "depth.svg")
        return
    with tempfile.TemporaryDirectory() as directory:
        for name, draw in CONCEPTS.items():
            new, committed = Path(directory) / f"{name}.svg", HERE / f"{name}.svg"
            draw(new)
            if arguments.check and (not committed.exists() or committed.read_bytes() != new.read_bytes()):
                sys.exit(f"error: {committed}: differs from what is drawn; run `python docs/figures/draw.py`")
            if not arguments.check:
                committed.write_bytes(new.read_bytes())


if __name__ == "__main__":
    main()
