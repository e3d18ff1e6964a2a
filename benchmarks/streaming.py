"""What it costs to read the frozen stacks below a window from disk in every training step, one at a time.

Both sides are the real thing: `training.loop.train` on a window of one stack above a trunk (`StreamedTrunk`), from
tokens. One side streams the trunk, the control keeps it in memory. Run it on an idle machine:

    python -m benchmarks.streaming --check

- Memory: one pass through the trunk in a process of its own. What counts is the peak of resident memory over that after
  the imports and a pass through something tiny, in stacks: weights, activations, and whatever else there is.
- Time: whole training steps; the two take turns, a few steps each, and the median over the rounds counts.
- `cold`: the pass alone, after the kernel was asked to forget the files, over the same pass with the files in memory.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.memory import peak, reset_peak
from benchmarks.table import Line, report, take_turns
from stackwise.artifacts import manifest
from stackwise.cache.streaming import StreamedTrunk
from stackwise.config.model import AttentionParams, MLPParams, ModelParams
from stackwise.config.training import OptimizerParams
from stackwise.growth.init import initialize
from stackwise.growth.stacks import EMBEDDINGS, Training, stack_file
from stackwise.growth.window import Batch, Window
from stackwise.model.context import Context
from stackwise.model.rack import Head, RackShape
from stackwise.objectives.targets import masked_targets
from stackwise.precision.trunk import TrunkStack, quantize_stack
from stackwise.training.checkpoint import Checkpoints
from stackwise.training.loop import Run, train

CPU = torch.device("cpu")
STREAMED, RESIDENT = "streamed", "resident"
MEMORY, TIME = 1.5, 1.15
STEPS = 3


@dataclass(frozen=True)
class Sizes:
    """What is trained, and on what."""

    d_model: int
    stacks: int
    """Of the trunk."""
    blocks: int
    """Of a stack."""
    seq: int
    batch: int
    vocab: int

    @property
    def shape(self) -> RackShape:
        """One stack with heads of width 64 and an MLP of 8/3 of the width."""
        hidden = round(self.d_model * 8 / 3 / 32) * 32
        attention = AttentionParams(n_heads=max(1, self.d_model // 64))
        model = ModelParams(d_model=self.d_model, attention=attention, mlp=MLPParams(hidden=hidden))
        return RackShape.of(model, [self.blocks], self.vocab)


def prepare(directory: Path, sizes: Sizes) -> int:
    """Write the trunk in bfloat16, its stacks alike, each in files of its own; returns the bytes of a stack."""
    shape = sizes.shape
    stack, embeddings = shape.build_stack(0), shape.build_embeddings()
    initialize(stack, name="stacks.0", seed=0)
    initialize(embeddings, name="embeddings", seed=0)
    with manifest.publish(directory / "training", kind="stack", params={}) as draft:
        save_file(stack.state_dict(), draft.directory / stack_file(0))
        save_file(embeddings.state_dict(), draft.directory / EMBEDDINGS)
        draft.facts |= {"stacks": [0], "adapters": {}, "embeddings": True, "shape": shape.to_json()}
    training = Training(manifest.read(directory / "training", "stack"))
    with manifest.publish(directory / "0", kind="trunk", params={}) as draft:
        draft.facts |= quantize_stack(training.stack(0), draft.directory, "bfloat16")
    for i in range(1, sizes.stacks):
        shutil.copytree(directory / "0", directory / str(i))
    os.sync()  # or the kernel could not forget the files
    return int(draft.facts["bytes"])


def open_trunk(name: str, directory: Path, sizes: Sizes) -> StreamedTrunk:
    """The trunk, streamed or resident."""
    stacks = [TrunkStack(manifest.read(directory / str(i), "trunk")) for i in range(sizes.stacks)]
    return StreamedTrunk(stacks, compute="bf16", activations="bf16", device=CPU, resident=name == RESIDENT)


def tokens_of(sizes: Sizes) -> np.ndarray:
    """Random tokens `[batch, seq]` int64."""
    return np.random.default_rng(0).integers(0, sizes.vocab, (sizes.batch, sizes.seq))


def through(trunk: StreamedTrunk, sizes: Sizes) -> Tensor:
    """A pass through the trunk alone."""
    return trunk(torch.from_numpy(tokens_of(sizes)), Context())


class Side:
    """A window on a trunk, ready to train; watches its own training."""

    def __init__(self, name: str, directory: Path, sizes: Sizes) -> None:
        shape = sizes.shape
        stack, head = shape.build_stack(0), Head(shape.model, sizes.vocab)
        initialize(stack, name="stacks.8", seed=0)
        initialize(head, name="head", seed=0)
        self.window = Window([stack], head, trunk=open_trunk(name, directory, sizes))
        tokens = tokens_of(sizes)
        masked = np.random.default_rng(1).random(tokens.shape) < 0.5
        inputs = torch.from_numpy(np.where(masked, sizes.vocab, tokens))
        self.batch = Batch(inputs, masked_targets(tokens, masked, np.ones(len(tokens))))
        self._checkpoints = Checkpoints(directory / "none")
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
            optimizer=OptimizerParams(),
            device=CPU,
            dtype="bf16",
            checkpoints=self._checkpoints,
            checkpoint_every=STEPS + 1,
        )
        self._starts.clear()
        train(run, self)
        return statistics.median(np.diff(self._starts)[1:].tolist())

    def resumed(self, step: int) -> None:
        """There is nothing to resume from."""

    def stepped(self, step: int, losses: Sequence[float], waited: float) -> None:
        """Nothing is noted."""


def measure_time(directory: Path, sizes: Sizes, rounds: int) -> list[Line]:
    """A training step on the streamed trunk over one on the resident trunk; the pass alone from cold files."""
    sides = {name: Side(name, directory, sizes) for name in (RESIDENT, STREAMED)}
    seconds = take_turns({name: side.train for name, side in sides.items()}, rounds)
    lines = []
    for name in (RESIDENT, STREAMED):
        ratio = statistics.median(a / b for a, b in zip(seconds[name], seconds[RESIDENT], strict=True))
        limit = TIME if name == STREAMED else None
        lines.append(Line(f"training step: {name}", f"{statistics.median(seconds[name]):.3f} s", ratio, at_most=limit))
    trunk = open_trunk(STREAMED, directory, sizes)
    passes: dict[str, Callable[[], float]] = {
        "warm": partial(pass_seconds, trunk, sizes),
        "cold": partial(pass_seconds, trunk, sizes, forgotten=directory),
    }
    taken = take_turns(passes, rounds)
    for name in passes:
        ratio = statistics.median(a / b for a, b in zip(taken[name], taken["warm"], strict=True))
        lines.append(Line(f"pass through the trunk: {name}", f"{statistics.median(taken[name]):.3f} s", ratio))
    return lines


def pass_seconds(trunk: StreamedTrunk, sizes: Sizes, forgotten: Path | None = None) -> float:
    """What one pass takes; with the trunk's files dropped from memory first if `forgotten` names where they lie."""
    for path in forgotten.glob("*/*.safetensors") if forgotten and hasattr(os, "posix_fadvise") else ():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    began = time.perf_counter()
    through(trunk, sizes)
    return time.perf_counter() - began


def measure_memory(directory: Path, stack_bytes: int, arguments: Sequence[str]) -> list[Line]:
    """Peak resident memory of a pass, in stacks, each side in a process of its own."""
    lines = []
    for name in (RESIDENT, STREAMED):
        command = [sys.executable, "-m", "benchmarks.streaming", *arguments, "--peak-of", name, "--dir", str(directory)]
        taken = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        limit = MEMORY if name == STREAMED else None
        lines.append(
            Line(f"peak memory: {name}, in stacks", f"{taken / 2**20:.0f} MiB", taken / stack_bytes, at_most=limit)
        )
    return lines


def peak_of(name: str, directory: Path, sizes: Sizes) -> int:
    """Bytes of resident memory that a pass takes at most, over that of a process that has done something tiny."""
    tiny = replace(sizes, d_model=64, stacks=2, blocks=1, seq=16, batch=2, vocab=64)
    with tempfile.TemporaryDirectory(dir=directory) as warm:
        prepare(Path(warm), tiny)
        through(open_trunk(name, Path(warm), tiny), tiny)
    trunk = open_trunk(name, directory, sizes)
    before = reset_peak()
    through(trunk, sizes)
    return peak() - before


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table; returns 1 if a target is missed and `--check` was given, otherwise 0."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.streaming", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--d-model", type=int, default=512, help="width of the residual stream (default: 512)")
    parser.add_argument("--stacks", type=int, default=8, help="stacks of the trunk (default: 8)")
    parser.add_argument("--blocks", type=int, default=8, help="blocks of a stack (default: 8)")
    parser.add_argument("--seq", type=int, default=64, help="tokens of a sample (default: 64)")
    parser.add_argument("--batch", type=int, default=8, help="samples of a step (default: 8)")
    parser.add_argument("--vocab", type=int, default=4096, help="size of the vocabulary (default: 4096)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count (default: 5)")
    parser.add_argument("--dir", type=Path, help="where the temporary files go (default: the system's)")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")
    parser.add_argument("--peak-of", choices=[STREAMED, RESIDENT], help=argparse.SUPPRESS)  # of the child processes
    options = parser.parse_args(arguments)
    sizes = Sizes(**{name: getattr(options, name) for name in ("d_model", "stacks", "blocks", "seq", "batch", "vocab")})
    torch.set_num_threads(options.threads)
    if options.peak_of:
        print(peak_of(options.peak_of, options.dir, sizes))
        return 0

    with tempfile.TemporaryDirectory(dir=options.dir, prefix="stackwise-streaming-") as name:
        directory = Path(name)
        stack_bytes = prepare(directory, sizes)
        lines = measure_memory(directory, stack_bytes, arguments)
        lines += measure_time(directory, sizes, options.rounds)
    return report(lines, check=options.check)


if __name__ == "__main__":
    raise SystemExit(main())
