"""How time and memory of kernel attention grow with the length of a sample, and from which length on it beats SDPA.

The whole attention of one block, its projections with it, forward and backward in fp32 on one sample. Lengths and
types take turns, in a random order each round; the median over the rounds counts. Run it on an idle machine:

    python -m benchmarks.kernel_attention --check

- Time and memory: T = 4096 over T = 1024; exactly linear is 4. Memory is the peak of what the allocator has given out
  between the beginning of the forward and the end of the backward pass. `documents`: with segments of some hundred
  tokens.
- Crossover: attention type `standard` (PyTorch's fused SDPA) is the control; the first length of a series from which on
  `kernel` takes less time.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.table import Line, report, take_turns
from stackwise.config.model import AttentionParams, ModelParams
from stackwise.growth.init import initialize
from stackwise.model.context import Context
from stackwise.model.parts import build_attention

SHORT, LONG = 1024, 4096
GROWTH = 4.6
SERIES = (256, 512, 1024, 2048, 4096, 8192)
MODES = ("bidirectional", "causal", "bidirectional, documents", "causal, documents")
DOCUMENT = 300  # tokens
KERNELS = ("softmax", "gaussian", "laplacian", "uniform", "linear")


def build(attention: AttentionParams, d_model: int) -> nn.Module:
    """The attention of one block, its weights drawn."""
    built = build_attention(ModelParams(d_model=d_model, attention=attention))
    initialize(built, name="attention", seed=0)
    return built


def context_of(mode: str, seq: int) -> Context:
    """What one of `MODES` means for a sample of `seq` tokens."""
    documents = torch.arange(seq)[None] // DOCUMENT if "documents" in mode else None
    return Context(causal=mode.startswith("causal"), segments=documents)


def prepare(attention: nn.Module, mode: str, seq: int, d_model: int) -> Callable[[], None]:
    """A forward and backward pass, which leaves nothing behind."""
    x = torch.randn(1, seq, d_model, generator=torch.Generator().manual_seed(0)).requires_grad_()
    context = context_of(mode, seq)

    def step() -> None:
        attention(x, context).sum().backward()
        attention.zero_grad(set_to_none=True)
        x.grad = None

    return step


def seconds(step: Callable[[], None]) -> float:
    """What one pass takes."""
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def peak_bytes(step: Callable[[], None]) -> int:
    """The most memory that one pass has at a time."""
    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    recorded = profiler.profiler
    assert recorded is not None
    events = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def measure_growth(attention: nn.Module, d_model: int, rounds: int) -> list[Line]:
    """Time and memory of the long sample over those of the short one, in every mode."""
    steps = {(mode, seq): prepare(attention, mode, seq, d_model) for mode in MODES for seq in (SHORT, LONG)}
    names = {f"{mode} {seq}": step for (mode, seq), step in steps.items()}
    taken = take_turns({name: partial(seconds, step) for name, step in names.items()}, rounds)
    lines = []
    for mode in MODES:
        short, long = (taken[f"{mode} {seq}"] for seq in (SHORT, LONG))
        ratio = statistics.median(b / a for a, b in zip(short, long, strict=True))
        figure = f"{statistics.median(long) * 1e3:.1f} ms"
        lines.append(Line(f"time: {mode}, {LONG} / {SHORT}", figure, ratio, at_most=GROWTH))
    for mode in MODES:
        small, large = (peak_bytes(steps[mode, seq]) for seq in (SHORT, LONG))
        figure = f"{large / 2**20:.1f} MiB"
        lines.append(Line(f"memory: {mode}, {LONG} / {SHORT}", figure, large / small, at_most=GROWTH))
    return lines


def measure_crossover(
    kernel: nn.Module, standard: nn.Module, d_model: int, rounds: int
) -> tuple[list[Line], list[str]]:
    """Time over that of SDPA at each length of the series, and the length from which on it is less."""
    lines, verdicts = [], []
    for mode in MODES[:2]:
        faster_from: int | None = None
        for seq in SERIES:
            pair = {"kernel": kernel, "standard": standard}
            steps = {name: prepare(module, mode, seq, d_model) for name, module in pair.items()}
            taken = take_turns({name: partial(seconds, step) for name, step in steps.items()}, rounds)
            ratio = statistics.median(a / b for a, b in zip(taken["kernel"], taken["standard"], strict=True))
            figure = f"{statistics.median(taken['kernel']) * 1e3:.1f} ms"
            lines.append(Line(f"time over SDPA: {mode}, {seq}", figure, ratio))
            faster_from = (faster_from or seq) if ratio < 1 else None
        where = "nowhere in the series" if faster_from is None else f"from T = {faster_from}"
        verdicts.append(f"{mode}: faster than SDPA {where}")
    return lines, verdicts


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table; returns 1 if a target is missed and `--check` was given, otherwise 0."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernel_attention", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--d-model", type=int, default=512, help="width of the residual stream (default: 512)")
    parser.add_argument("--n-heads", type=int, default=8, help="heads (default: 8)")
    parser.add_argument(
        "--kernel", choices=KERNELS, default="softmax", help="model.attention.kernel (default: softmax)"
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds that count (default: 7)")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    kernel = build(AttentionParams(type="kernel", n_heads=options.n_heads, kernel=options.kernel), options.d_model)
    standard = build(AttentionParams(n_heads=options.n_heads), options.d_model)

    lines = measure_growth(kernel, options.d_model, options.rounds)
    compared, verdicts = measure_crossover(kernel, standard, options.d_model, max(1, options.rounds // 2))
    code = report((*lines, *compared), check=options.check)
    print(*verdicts, sep="\n")
    return code


if __name__ == "__main__":
    raise SystemExit(main())
