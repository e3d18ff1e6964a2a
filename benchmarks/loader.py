"""How fast the activation store reads and writes, and how long a training loop waits for its batches.

Every figure is a ratio to a control that moves the same bytes on the same machine in the same run. The
contestants take turns, in a random order each round; the median over the rounds counts. Run it on an idle
machine:

    python -m benchmarks.loader --check

- Reading: batches of 32 random rows from files that are in memory (warm), into the buffers that a loader
  would use in turn. The control is `np.take` with `out=` and `mode="clip"` on an `np.memmap` of the same
  bytes, the fastest way to fill such a buffer: fancy indexing and the default mode copy everything twice.
- Narrow: the same rows from stores in int8 and fp8, decoded, against those from a bfloat16 store.
- Writing: shards with their checksums, each synced, against plain files of 16 MiB, each synced.
- Waiting: the share of its time that a loop with steps of about 40 ms waits for a `PrefetchLoader` whose
  batches come verified from the store; for comparison, the share if the loop reads them itself.
"""

import argparse
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.table import Line, report, take_turns
from stackwise.cache.loader import PrefetchLoader
from stackwise.cache.sizes import DTYPES, row_bytes, rows_per_shard
from stackwise.cache.store import ActivationStore, StoreLayout

BATCH = 32  # rows
SEQ, D_MODEL = 256, 512
DEPTH = 4  # batches ready
STEP_SECONDS = 0.04


def speed_lines(speeds: dict[str, list[float]], control: str, targets: dict[str, float | None]) -> list[Line]:
    """The speeds (bytes a second), each with its median ratio to the control of the same round."""
    lines = []
    for name, values in speeds.items():
        ratio = statistics.median(v / c for v, c in zip(values, speeds[control], strict=True))
        figure = f"{statistics.median(values) / 1e6:.0f} MB/s"
        lines.append(Line(name, figure, ratio, at_least=targets.get(name)))
    return lines


def prepare(directory: Path, rows: int) -> tuple[ActivationStore, np.memmap]:
    """A store of random rows and a plain file of the same rows."""
    row_bytes = SEQ * D_MODEL * 2
    layout = StoreLayout(rows, SEQ, D_MODEL, "bfloat16", rows_per_shard(row_bytes))
    store = ActivationStore.create(directory / "store", layout)
    rng = np.random.default_rng(0)
    with (directory / "plain").open("wb") as plain:
        for g in range(layout.shards):
            shape = (len(layout.shard_range(g)), SEQ, D_MODEL)
            activations = rng.integers(0, 2**16, shape, dtype=np.uint16)
            store.write_shard(g, activations)
            activations.tofile(plain)
    return store, np.memmap(directory / "plain", np.uint16, "r", shape=(rows, SEQ, D_MODEL))


def measure_reads(store: ActivationStore, plain: np.memmap, rounds: int) -> list[Line]:
    """Shuffled warm batches into the buffers that a `PrefetchLoader` would use in turn."""
    ring = [np.empty((BATCH, SEQ, D_MODEL), np.uint16) for _ in range(DEPTH + 1)]
    rng = np.random.default_rng(1)

    def through(read: Callable[[np.ndarray, np.ndarray], object]) -> Callable[[], float]:
        def run() -> float:
            order = rng.permutation(store.layout.rows)
            batches = [order[i : i + BATCH] for i in range(0, len(order) - BATCH + 1, BATCH)]
            began = time.perf_counter()
            for batch, out in zip(batches, itertools.cycle(ring), strict=False):
                read(batch, out)
            return len(batches) * ring[0].nbytes / (time.perf_counter() - began)

        return run

    speeds = take_turns(
        {
            "read: memmap, np.take(out=, mode='clip')": through(
                lambda rows, out: np.take(plain, rows, axis=0, out=out, mode="clip")
            ),
            "read: store, verified": through(lambda rows, out: store.read_rows(rows, out)),
            "read: store, not verified": through(lambda rows, out: store.read_rows(rows, out, verify=False)),
        },
        rounds,
    )
    targets: dict[str, float | None] = {"read: store, verified": 0.5, "read: store, not verified": 0.7}
    return speed_lines(speeds, "read: memmap, np.take(out=, mode='clip')", targets)


def measure_narrow(directory: Path, store: ActivationStore, rounds: int) -> list[Line]:
    """Shuffled warm batches as a training gets them, bfloat16 on the CPU; the speed is that of what comes out."""
    import torch

    from stackwise.cache.boundary import BoundaryReader
    from stackwise.cache.narrow import encode

    rows, rng = store.layout.rows, np.random.default_rng(4)
    residuals = torch.randn((min(rows, BATCH), SEQ, D_MODEL), generator=torch.Generator().manual_seed(0))
    stores = {"bf16": store}
    for name in ("int8", "fp8"):
        shard_rows = rows_per_shard(row_bytes(SEQ, D_MODEL, name))
        layout = replace(store.layout, dtype=DTYPES[name], shard_rows=shard_rows)
        stores[name] = ActivationStore.create(directory / name, layout)
        stored = encode(residuals, layout.dtype).numpy()
        for g in range(layout.shards):
            stores[name].write_shard(g, stored[np.arange(len(layout.shard_range(g))) % len(stored)])

    def through(reader: BoundaryReader) -> Callable[[], float]:
        def run() -> float:
            batches = rng.permutation(rows)[: rows // BATCH * BATCH].reshape(-1, BATCH)
            began = time.perf_counter()
            for batch in batches:
                reader.read(batch)
            return batches.size * SEQ * D_MODEL * 2 / (time.perf_counter() - began)

        return run

    def cannot_remake(shard: int) -> None:
        raise RuntimeError(f"shard {shard} of the benchmark's own store is damaged")

    contestants = {f"narrow: {name}": through(BoundaryReader(s, cannot_remake)) for name, s in stores.items()}
    return speed_lines(take_turns(contestants, rounds), "narrow: bf16", {})


def measure_writes(directory: Path, rounds: int, shards: int = 8) -> list[Line]:
    """New files of 16 MiB each, every one on the disk before the next is begun."""
    shard_rows = rows_per_shard(SEQ * D_MODEL * 2)
    layout = StoreLayout(shards * shard_rows, SEQ, D_MODEL, "bfloat16", shard_rows)
    store = ActivationStore.create(directory / "written", layout)
    activations = np.random.default_rng(2).integers(0, 2**16, (shard_rows, SEQ, D_MODEL), dtype=np.uint16)
    plain = [directory / f"plain-{g}" for g in range(shards)]
    sync = getattr(os, "fdatasync", os.fsync)

    def write_store() -> float:
        for g in range(shards):
            store.drop_shard(g)
        began = time.perf_counter()
        for g in range(shards):
            store.write_shard(g, activations)
        return shards * activations.nbytes / (time.perf_counter() - began)

    def write_plain() -> float:
        for path in plain:
            path.unlink(missing_ok=True)
        began = time.perf_counter()
        for path in plain:
            with path.open("wb", buffering=0) as file:
                file.write(activations.data)
                sync(file.fileno())
        return shards * activations.nbytes / (time.perf_counter() - began)

    speeds = take_turns({"write: plain files": write_plain, "write: store": write_store}, rounds)
    return speed_lines(speeds, "write: plain files", {"write: store": 0.3})


def measure_waiting(store: ActivationStore, rounds: int, steps: int) -> list[Line]:
    """Loops of matrix products that touch each batch once."""
    import torch

    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)

    def products(count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            torch.mm(a, b)
        return time.perf_counter() - began

    products(10)
    count = max(1, round(STEP_SECONDS / (statistics.median(products(5) for _ in range(9)) / 5)))
    ring = [np.empty((BATCH, SEQ, D_MODEL), np.uint16) for _ in range(DEPTH + 1)]
    rng = np.random.default_rng(3)
    orders = [rng.integers(0, store.layout.rows, BATCH) for _ in range(steps)]

    def make_batch(step: int) -> np.ndarray:
        out = ring[step % len(ring)]
        store.read_rows(orders[step], out)
        return out

    def train(batch: np.ndarray) -> None:
        torch.from_numpy(batch).view(torch.bfloat16).sum()
        products(count)

    def with_loader() -> float:
        began = time.perf_counter()
        with PrefetchLoader(make_batch, range(steps), DEPTH) as loader:
            for batch in loader:
                train(batch)
        return loader.waited / (time.perf_counter() - began)

    def without_loader() -> float:
        waited = 0.0
        began = time.perf_counter()
        for step in range(steps):
            asked = time.perf_counter()
            batch = make_batch(step)
            waited += time.perf_counter() - asked
            train(batch)
        return waited / (time.perf_counter() - began)

    shares = take_turns({"read in the loop": without_loader, "PrefetchLoader": with_loader}, rounds)
    targets = {"PrefetchLoader": 0.02}
    lines = []
    for name, values in shares.items():
        share = statistics.median(values)
        lines.append(Line(f"wait: {name}", f"{share:.1%}", share, at_most=targets.get(name)))
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table; returns 1 if a target is missed and `--check` was given, otherwise 0."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.loader", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=2048, help="rows of 256 KiB to read from (default: 2048)")
    parser.add_argument("--rounds", type=int, default=9, help="rounds that count (default: 9)")
    parser.add_argument("--steps", type=int, default=40, help="steps of a training loop (default: 40)")
    parser.add_argument("--dir", type=Path, help="where the temporary files go (default: the system's)")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")
    options = parser.parse_args(arguments)
    if options.rows < BATCH:
        parser.error(f"--rows must be at least {BATCH}")
    if options.rounds < 1 or options.steps < 1:
        parser.error("--rounds and --steps must be positive")

    with tempfile.TemporaryDirectory(dir=options.dir, prefix="stackwise-loader-") as name:
        directory = Path(name)
        store, plain = prepare(directory, options.rows)
        with store:
            lines = measure_reads(store, plain, options.rounds)
            lines += measure_narrow(directory, store, options.rounds)
            lines += measure_writes(directory, options.rounds)
            lines += measure_waiting(store, max(1, options.rounds // 3), options.steps)

    return report(lines, check=options.check)


if __name__ == "__main__":
    raise SystemExit(main())
