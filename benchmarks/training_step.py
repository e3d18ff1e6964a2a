"""What a stack's training step from cached activations costs, against the end-to-end step of the same rack.

Both sides are the real thing: `training.loop.train` on a window, with batches that a thread reads ahead. The stack
reads its boundary from an activation store, its checksums verified; the rack reads tokens. Batch, block size,
vocabulary and objective are the same. Run it on an idle machine:

    python -m benchmarks.training_step --check

- Time: the two take turns, a few steps each; the median over the rounds counts. The stack's share of the rack's time is
  held against its share of the floating-point operations of loss and gradients (counted, not estimated, the head with
  them).
- Memory: each side in a process of its own. What counts is the peak of resident memory over that after the imports and
  a few steps of something tiny, which load the code of the libraries: weights, gradients, optimizer state, saved
  activations, the loader's buffers, and whatever else there is.
- Waiting: the share of its time that the loop waits for data.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.table import Line, report, take_turns
from stackwise.cache.batches import BoundaryBatches
from stackwise.cache.boundary import BoundaryReader
from stackwise.cache.sizes import row_bytes, rows_per_shard
from stackwise.cache.store import ActivationStore, StoreLayout
from stackwise.config.model import AttentionParams, MLPParams, ModelParams
from stackwise.config.objective import ObjectiveParams
from stackwise.config.training import OptimizerParams
from stackwise.data.order import SampleOrder
from stackwise.data.tokens import TokenDataset
from stackwise.growth.batches import TokenBatches
from stackwise.growth.init import initialize
from stackwise.growth.window import Batch, Window
from stackwise.model.rack import Head, Rack, RackShape
from stackwise.model.stack import Stack
from stackwise.objectives.targets import MaskDiffusionObjective
from stackwise.precision.dtypes import autocast
from stackwise.training.checkpoint import Checkpoints
from stackwise.training.loop import Run, train

CPU = torch.device("cpu")
STACK, RACK = "stack, from cached activations", "rack, end to end"
VARIANTS = 2
PREFETCH = 4  # the default of `activations.prefetch`
MEMORY_STEPS = 3


@dataclass(frozen=True)
class Sizes:
    """What is trained."""

    d_model: int
    stacks: int
    blocks: int
    """Of a stack."""
    seq: int
    batch: int
    vocab: int
    dtype: str
    threads: int

    @property
    def model(self) -> ModelParams:
        """Heads of width 64, an MLP of 8/3 of the width."""
        hidden = round(self.d_model * 8 / 3 / 32) * 32
        attention = AttentionParams(n_heads=max(1, self.d_model // 64))
        return ModelParams(d_model=self.d_model, attention=attention, mlp=MLPParams(hidden=hidden))

    @property
    def samples(self) -> int:
        """Enough for a few steps without a repetition."""
        return 8 * self.batch


def prepare(directory: Path, sizes: Sizes) -> None:
    """Random tokens, and a store of random activations of the size that residuals have."""
    rng = np.random.default_rng(0)
    np.save(directory / "tokens.npy", rng.integers(0, sizes.vocab, sizes.samples * sizes.seq).astype(np.int32))
    rows = sizes.samples * VARIANTS
    shard_rows = rows_per_shard(row_bytes(sizes.seq, sizes.d_model, "bf16"))
    layout = StoreLayout(rows, sizes.seq, sizes.d_model, "bfloat16", shard_rows)
    with ActivationStore.create(directory / "store", layout) as store:
        for g in range(layout.shards):
            x = torch.randn(len(layout.shard_range(g)), sizes.seq, sizes.d_model).bfloat16()
            store.write_shard(g, x.view(torch.uint16).numpy())


class Side:
    """One of the two, ready to train; watches its own training."""

    def __init__(
        self, window: Window, batches: Callable[[int], Sequence[Batch]], sizes: Sizes, directory: Path
    ) -> None:
        self.window = window
        self.batches = batches
        self.sizes = sizes
        self.waiting_shares: list[float] = []
        """Of each call of `train`: the share of its time that the loop has waited for data."""
        self._checkpoints = Checkpoints(directory / "none")
        self._starts: list[float] = []
        self._waited = 0.0

    def loss(self, batch: Batch) -> Tensor:
        """The loss of a batch."""
        self._starts.append(time.perf_counter())
        return self.window.loss(batch, device=CPU, causal=False)

    def train(self, steps: int) -> float:
        """Train some steps with a fresh optimizer; returns the median seconds of a step, the first left out."""
        run = Run(
            module=self.window,
            batches=self.batches,
            loss=self.loss,
            steps=steps,
            lr=1e-4,
            optimizer=OptimizerParams(),
            device=CPU,
            dtype=self.sizes.dtype,
            checkpoints=self._checkpoints,
            checkpoint_every=steps + 1,
            prefetch=PREFETCH,
        )
        self._starts.clear()
        began = time.perf_counter()
        train(run, self)
        self.waiting_shares.append(self._waited / (time.perf_counter() - began))
        # The first step waits for the first batch and makes the optimizer's state.
        return statistics.median(np.diff(self._starts)[1:].tolist())

    def resumed(self, step: int) -> None:
        """There is nothing to resume from."""

    def stepped(self, step: int, losses: Sequence[float], waited: float) -> None:
        """Note how long the loop has waited."""
        self._waited = waited

    def count_flops(self) -> int:
        """Floating-point operations of the loss and the gradients of one batch."""
        (batch,) = self.batches(0)
        # The counter does not know the fused attention of CPUs; written out, it is the same products.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            with autocast(CPU, self.sizes.dtype):
                loss = self.loss(batch)
            loss.backward()
        self.window.zero_grad(set_to_none=True)
        return int(counter.get_total_flops())


@contextmanager
def make_side(name: str, directory: Path, sizes: Sizes) -> Iterator[Side]:
    """One of the two: `STACK` or `RACK`."""
    dataset = TokenDataset(directory / "tokens.npy", sizes.seq)
    objective = MaskDiffusionObjective(ObjectiveParams(variants=VARIANTS), seed=0, mask_id=sizes.vocab)
    order = SampleOrder(len(dataset), seed=0, stream="benchmark")
    from_tokens = TokenBatches(dataset, order, objective, sizes.batch, accumulate=1)
    if name == RACK:
        rack = Rack(RackShape.of(sizes.model, (sizes.blocks,) * sizes.stacks, sizes.vocab))
        for part, module in rack.named_children():
            initialize(module, name=part, seed=0)
        yield Side(Window.of(rack), from_tokens, sizes, directory)
        return
    stack, head = Stack(sizes.model, sizes.blocks), Head(sizes.model, sizes.vocab)
    initialize(stack, name="stacks", seed=0)
    initialize(head, name="head", seed=0)
    with ActivationStore.open(directory / "store") as store:
        batches = BoundaryBatches(from_tokens, BoundaryReader(store, _cannot_remake), VARIANTS)
        yield Side(Window([stack], head), batches, sizes, directory)


def _cannot_remake(shard: int) -> None:
    raise RuntimeError(f"shard {shard} of the benchmark's own store is damaged")


def measure_time(directory: Path, sizes: Sizes, rounds: int, steps: int) -> list[Line]:
    """The stack's share of the rack's time against its share of the operations; what both wait for data."""
    with make_side(STACK, directory, sizes) as stack, make_side(RACK, directory, sizes) as rack:
        flops = {STACK: stack.count_flops(), RACK: rack.count_flops()}
        seconds = take_turns({STACK: lambda: stack.train(steps), RACK: lambda: rack.train(steps)}, rounds)
        time_share = statistics.median(s / r for s, r in zip(seconds[STACK], seconds[RACK], strict=True))
        flops_share = flops[STACK] / flops[RACK]
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        lines = []
        for name in (RACK, STACK):
            lines.append(Line(f"step: {name}", f"{medians[name]:.3f} s", medians[name] / medians[RACK]))
        for name in (RACK, STACK):
            lines.append(Line(f"operations: {name}", f"{flops[name] / 1e9:.1f} G", flops[name] / flops[RACK]))
        lines.append(Line("time share / operations share", f"{time_share:.3f}", time_share / flops_share, at_most=1.15))
        for name, side in ((RACK, rack), (STACK, stack)):
            waiting = statistics.median(side.waiting_shares)
            lines.append(Line(f"wait: {name}", f"{waiting:.2%}", waiting, at_most=0.02))
        return lines


def measure_memory(directory: Path, sizes: Sizes, arguments: Sequence[str]) -> list[Line]:
    """Peak resident memory of both, each in a process of its own."""
    peaks = {}
    for name in (RACK, STACK):
        command = [sys.executable, "-m", "benchmarks.training_step", *arguments]
        command += ["--peak-of", name, "--dir", str(directory)]
        peaks[name] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return [
        Line(f"peak memory: {RACK}", f"{peaks[RACK] / 2**20:.0f} MiB", 1.0),
        Line(
            f"peak memory: {STACK}",
            f"{peaks[STACK] / 2**20:.0f} MiB",
            peaks[STACK] / peaks[RACK],
            # Of 4 stacks; where the rack has more or fewer, the target is the same distance from the ideal.
            at_most=0.35 * 4 / sizes.stacks,
        ),
    ]


def peak_of(name: str, directory: Path, sizes: Sizes) -> int:
    """Bytes of resident memory that training takes at most, over that of a process that has trained something tiny."""
    tiny = replace(sizes, d_model=64, stacks=1, blocks=1, seq=16, batch=2, vocab=64)
    with tempfile.TemporaryDirectory(dir=directory) as warm:
        prepare(Path(warm), tiny)
        with make_side(name, Path(warm), tiny) as side:
            side.train(MEMORY_STEPS)
    before = reset_peak()
    with make_side(name, directory, sizes) as side:
        side.train(MEMORY_STEPS)
    return peak() - before


def reset_peak() -> int:
    """Resident bytes now, from which on the peak is measured; where Linux does not do that, the peak so far."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return peak()
    return _status("VmRSS")


def peak() -> int:
    """The most bytes that have been resident since `reset_peak`."""
    if sys.platform == "linux":
        return _status("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table; returns 1 if a target is missed and `--check` was given, otherwise 0."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training_step", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--d-model", type=int, default=512, help="width of the residual stream (default: 512)")
    parser.add_argument("--stacks", type=int, default=4, help="stacks of the rack (default: 4)")
    parser.add_argument("--blocks", type=int, default=4, help="blocks of a stack (default: 4)")
    parser.add_argument("--seq", type=int, default=256, help="tokens of a sample (default: 256)")
    parser.add_argument("--batch", type=int, default=8, help="samples of a step (default: 8)")
    parser.add_argument("--vocab", type=int, default=4096, help="size of the vocabulary (default: 4096)")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="bf16", help="compute format (default: bf16)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count (default: 5)")
    parser.add_argument("--steps", type=int, default=5, help="steps of each side in a round, 3 at least (default: 5)")
    parser.add_argument("--only", choices=["time", "memory"], help="measure one of the two (default: both)")
    parser.add_argument("--dir", type=Path, help="where the temporary files go (default: the system's)")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")
    parser.add_argument("--peak-of", choices=[STACK, RACK], help=argparse.SUPPRESS)  # what the child processes do
    options = parser.parse_args(arguments)
    if options.steps < 3 or options.rounds < 1:
        parser.error("--steps must be at least 3, --rounds at least 1")
    names = ("d_model", "stacks", "blocks", "seq", "batch", "vocab", "dtype", "threads")
    sizes = Sizes(**{name: getattr(options, name) for name in names})
    torch.set_num_threads(sizes.threads)
    if options.peak_of:
        print(peak_of(options.peak_of, options.dir, sizes))
        return 0

    lines: list[Line] = []
    with tempfile.TemporaryDirectory(dir=options.dir, prefix="stackwise-step-") as name:
        directory = Path(name)
        prepare(directory, sizes)
        if options.only != "time":  # first, while this process is small
            lines += measure_memory(directory, sizes, arguments)
        if options.only != "memory":
            lines += measure_time(directory, sizes, options.rounds, options.steps)

    return report(lines, check=options.check)


if __name__ == "__main__":
    raise SystemExit(main())
