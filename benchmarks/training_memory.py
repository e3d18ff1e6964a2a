"""What lowers the peak memory of a training step, and what that costs in time: each means alone, and all together.

All sides are the real thing: `training.loop.train` on a window of one stack and its head, from a boundary. They differ
in `compute.activation_checkpointing`, `optimizer.state` and `optimizer.in_backward`. Run it on an idle machine:

    python -m benchmarks.training_memory --check

- Memory: each side in a process of its own. What counts is the peak of resident memory over that after the imports and
  a few steps of something tiny, which load the code of the libraries: weights, gradients, optimizer state, saved
  activations, and whatever else there is. Where activations are the peak, gradients are not: what updates in the
  backward pass save shows beside the other two.
- Time: the sides take turns, a few steps each; the median over the rounds counts. Moments of 8 bits cost the same
  for every weight, however many tokens a step has: on a CPU some 20 ns of one thread.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.memory import peak, reset_peak
from benchmarks.table import Line, report, take_turns
from stackwise.config.model import AttentionParams, MLPParams, ModelParams
from stackwise.config.training import OptimizerParams
from stackwise.growth.init import initialize
from stackwise.growth.window import Batch, Window
from stackwise.model.rack import Head
from stackwise.model.stack import Stack
from stackwise.objectives.targets import masked_targets
from stackwise.training.checkpoint import Checkpoints
from stackwise.training.loop import Run, train

CPU = torch.device("cpu")
STEPS = 3


@dataclass(frozen=True)
class Means:
    """What is done to save memory, and its targets as shares of the control."""

    checkpointing: bool = False
    int8: bool = False
    in_backward: bool = False
    memory: float | None = None
    time: float | None = None


NOTHING = "nothing"
SIDES = {
    NOTHING: Means(),
    "activation checkpointing": Means(checkpointing=True, memory=0.82, time=1.45),
    "8-bit optimizer state": Means(int8=True, memory=0.93, time=1.5),
    "updates in the backward pass": Means(in_backward=True, time=1.15),
    "checkpointing and 8-bit state": Means(checkpointing=True, int8=True, memory=0.72, time=1.7),
    "all three": Means(checkpointing=True, int8=True, in_backward=True, memory=0.66, time=1.7),
}


@dataclass(frozen=True)
class Sizes:
    """What is trained."""

    d_model: int
    blocks: int
    seq: int
    batch: int
    vocab: int
    dtype: str

    @property
    def model(self) -> ModelParams:
        """Heads of width 64, an MLP of 8/3 of the width."""
        hidden = round(self.d_model * 8 / 3 / 32) * 32
        attention = AttentionParams(n_heads=max(1, self.d_model // 64))
        return ModelParams(d_model=self.d_model, attention=attention, mlp=MLPParams(hidden=hidden))


class Side:
    """A window, ready to train; watches its own training."""

    def __init__(self, means: Means, sizes: Sizes) -> None:
        stack, head = Stack(sizes.model, sizes.blocks), Head(sizes.model, sizes.vocab)
        initialize(stack, name="stacks.1", seed=0)
        initialize(head, name="head", seed=0)
        self.window = Window([stack], head, checkpointing=means.checkpointing)
        self.optimizer = OptimizerParams(
            grad_clip=None, state="int8" if means.int8 else "fp32", in_backward=means.in_backward
        )
        rng = np.random.default_rng(0)
        tokens = rng.integers(0, sizes.vocab, (sizes.batch, sizes.seq))
        targets = masked_targets(tokens, rng.random(tokens.shape) < 0.5, np.ones(sizes.batch))
        boundary = rng.standard_normal((*tokens.shape, sizes.d_model), np.float32)
        self.batch = Batch(torch.from_numpy(boundary).bfloat16(), targets)
        self._dtype = sizes.dtype
        self._starts: list[float] = []

    def loss(self, batch: Batch) -> Tensor:
        """The loss of a batch."""
        self._starts.append(time.perf_counter())
        return self.window.loss(batch, device=CPU, causal=False)

    def train(self) -> float:
        """Train some steps with a fresh optimizer; returns the median seconds of a step, the first left out."""
        run = Run(
            module=self.window,
            batches=lambda step: [self.batch],
            loss=self.loss,
            steps=STEPS,
            lr=1e-4,
            optimizer=self.optimizer,
            device=CPU,
            dtype=self._dtype,
            checkpoints=Checkpoints(Path("none")),  # none is written
            checkpoint_every=STEPS + 1,
        )
        self._starts.clear()
        train(run, self)
        return statistics.median(np.diff(self._starts)[1:].tolist())

    def resumed(self, step: int) -> None:
        """There is nothing to resume from."""

    def stepped(self, step: int, losses: Sequence[float], waited: float) -> None:
        """Nothing is noted."""


def measure_memory(arguments: Sequence[str]) -> list[Line]:
    """Peak resident memory of each side, in a process of its own."""
    lines = []
    control = 0.0
    for name, means in SIDES.items():
        command = [sys.executable, "-m", "benchmarks.training_memory", *arguments, "--peak-of", name]
        taken = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        control = control or taken
        figure = f"{taken / 2**20:.0f} MiB"
        lines.append(Line(f"peak memory: {name}", figure, taken / control, at_most=means.memory))
    return lines


def measure_time(sizes: Sizes, rounds: int) -> list[Line]:
    """A step of each side over one of the control."""
    sides = {name: Side(means, sizes) for name, means in SIDES.items()}
    seconds = take_turns({name: side.train for name, side in sides.items()}, rounds)
    lines = []
    for name, means in SIDES.items():
        ratio = statistics.median(a / b for a, b in zip(seconds[name], seconds[NOTHING], strict=True))
        figure = f"{statistics.median(seconds[name]):.3f} s"
        lines.append(Line(f"time: {name}", figure, ratio, at_most=means.time))
    return lines


def peak_of(means: Means, sizes: Sizes) -> int:
    """Bytes of resident memory that training takes at most, over that of a process that has trained something tiny."""
    Side(means, replace(sizes, d_model=64, blocks=1, seq=16, batch=2, vocab=64)).train()
    before = reset_peak()
    Side(means, sizes).train()
    return peak() - before


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table; returns 1 if a target is missed and `--check` was given, otherwise 0."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training_memory", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--d-model", type=int, default=512, help="width of the residual stream (default: 512)")
    parser.add_argument("--blocks", type=int, default=4, help="blocks of the stack (default: 4)")
    parser.add_argument("--seq", type=int, default=256, help="tokens of a sample (default: 256)")
    parser.add_argument("--batch", type=int, default=8, help="samples of a step (default: 8)")
    parser.add_argument("--vocab", type=int, default=4096, help="size of the vocabulary (default: 4096)")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="bf16", help="compute format (default: bf16)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds that count (default: 3)")
    parser.add_argument("--only", choices=["time", "memory"], help="measure one of the two (default: both)")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")
    parser.add_argument("--peak-of", choices=list(SIDES), help=argparse.SUPPRESS)  # what the child processes do
    options = parser.parse_args(arguments)
    sizes = Sizes(**{name: getattr(options, name) for name in ("d_model", "blocks", "seq", "batch", "vocab", "dtype")})
    torch.set_num_threads(options.threads)
    if options.peak_of:
        print(peak_of(SIDES[options.peak_of], sizes))
        return 0

    lines = measure_memory(arguments) if options.only != "time" else []  # first, while this process is small
    if options.only != "memory":
        lines += measure_time(sizes, options.rounds)
    return report(lines, check=options.check)


if __name__ == "__main__":
    raise SystemExit(main())
