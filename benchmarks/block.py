"""What a block costs, against the decoder layer of transformers with the same weights.

Forward and backward of one causal layer, gradients of all weights and of the input. Both use the same attention kernel
of PyTorch; the control gets its rotary tables for nothing. Run it on an idle machine:

    python -m benchmarks.block --check

- Speed: the two take turns; the ratio of the medians over the rounds counts.
- Memory: each side in a process of its own. What counts is the peak of resident memory over that after a pass of
  something tiny, which loads the code of the libraries: weights, gradients, saved activations, temporary tensors.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from benchmarks.table import Line, report, take_turns
from benchmarks.training_step import peak, reset_peak
from stackwise.config.model import AttentionParams, MLPParams, ModelParams
from stackwise.growth.init import initialize
from stackwise.model.context import Context
from stackwise.model.stack import Block
from stackwise.precision.dtypes import DTYPES

BLOCK, CONTROL = "Block", "LlamaDecoderLayer"
FORMATS = ("fp32", "bf16")
NAMES = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm", "attention.": "self_attn."}


@dataclass(frozen=True)
class Sizes:
    """What is computed."""

    d_model: int
    heads: int
    hidden: int
    batch: int
    seq: int

    def build_block(self) -> Block:
        """Ours, with its initial weights."""
        attention, mlp = AttentionParams(n_heads=self.heads), MLPParams(hidden=self.hidden)
        block = Block(ModelParams(d_model=self.d_model, attention=attention, mlp=mlp))
        initialize(block, name="stacks.0.blocks.0", seed=0)
        return block

    def build_control(self) -> tuple[LlamaDecoderLayer, LlamaRotaryEmbedding]:
        """Theirs, with the same weights."""
        config = LlamaConfig(
            hidden_size=self.d_model,
            intermediate_size=self.hidden,
            num_attention_heads=self.heads,
            num_hidden_layers=1,
            rms_norm_eps=ModelParams().norm_eps,
        )
        config._attn_implementation = "sdpa"
        layer = LlamaDecoderLayer(config, 0)
        weights = {}
        for name, weight in self.build_block().state_dict().items():
            for ours, theirs in NAMES.items():
                name = name.replace(ours, theirs)
            weights[name] = weight
        layer.load_state_dict(weights)
        return layer, LlamaRotaryEmbedding(config)


class Side:
    """One of the two, its weights in `dtype`."""

    def __init__(self, name: str, sizes: Sizes, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(sizes.batch, sizes.seq, sizes.d_model, generator=generator).to(dtype).requires_grad_()
        self.grad = torch.randn(self.x.shape, generator=generator).to(dtype)
        self.module: torch.nn.Module
        self.forward: Callable[[Tensor], Tensor]
        if name == BLOCK:
            block = self.module = sizes.build_block().to(dtype)
            self.forward = lambda x: block(x, Context(causal=True))
        else:
            layer, rotary = sizes.build_control()
            self.module = layer.to(dtype)
            with torch.no_grad():
                tables = rotary(self.x, torch.arange(sizes.seq)[None])
            self.forward = lambda x: layer(x, attention_mask=None, position_embeddings=tables)

    def step(self) -> float:
        """A pass forward and back; returns its seconds."""
        began = time.perf_counter()
        self.forward(self.x).backward(self.grad)
        seconds = time.perf_counter() - began
        self.module.zero_grad(set_to_none=True)
        self.x.grad = None
        return seconds


def measure_time(sizes: Sizes, format_: str, rounds: int) -> list[Line]:
    """The speed of both, in passes a second."""
    sides = {name: Side(name, sizes, DTYPES[format_]) for name in (CONTROL, BLOCK)}
    with torch.no_grad():
        ours, theirs = (sides[name].forward(sides[name].x).double() for name in (BLOCK, CONTROL))
    if (ours - theirs).norm() > 1e-2 * theirs.norm():
        raise RuntimeError("the two do not compute the same")
    seconds = take_turns({name: side.step for name, side in sides.items()}, rounds)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return [
        Line(f"{format_}: {CONTROL}", f"{medians[CONTROL] * 1e3:.1f} ms", 1.0),
        Line(
            f"{format_}: {BLOCK}, speed",
            f"{medians[BLOCK] * 1e3:.1f} ms",
            medians[CONTROL] / medians[BLOCK],
            at_least=1.0,
        ),
    ]


def measure_memory(format_: str, arguments: Sequence[str]) -> list[Line]:
    """Peak resident memory of both, each in a process of its own."""
    peaks = {}
    for name in (CONTROL, BLOCK):
        command = [sys.executable, "-m", "benchmarks.block", *arguments, "--peak-of", name, "--format", format_]
        peaks[name] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    figures = {name: f"{value / 2**20:.1f} MiB" for name, value in peaks.items()}
    return [
        Line(f"{format_}: {CONTROL}, peak memory", figures[CONTROL], 1.0),
        Line(f"{format_}: {BLOCK}, peak memory", figures[BLOCK], peaks[BLOCK] / peaks[CONTROL], at_most=1.0),
    ]


def peak_of(name: str, sizes: Sizes, dtype: torch.dtype) -> int:
    """Bytes of resident memory that a side takes at most, over that of a process that has done something tiny."""
    Side(name, replace(sizes, d_model=16 * sizes.heads, hidden=64, batch=1, seq=8), dtype).step()
    before = reset_peak()
    side = Side(name, sizes, dtype)
    for _ in range(3):
        side.step()
    return peak() - before


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table; returns 1 if a target is missed and `--check` was given, otherwise 0."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.block", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--d-model", type=int, default=512, help="width of the residual stream (default: 512)")
    parser.add_argument("--heads", type=int, default=8, help="attention heads (default: 8)")
    parser.add_argument("--hidden", type=int, default=1408, help="hidden width of the SwiGLU (default: 1408)")
    parser.add_argument("--batch", type=int, default=8, help="samples (default: 8)")
    parser.add_argument("--seq", type=int, default=256, help="tokens of a sample (default: 256)")
    parser.add_argument("--format", choices=FORMATS, help="of weights and activations (default: each)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--rounds", type=int, default=31, help="rounds that count (default: 31)")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")
    parser.add_argument("--peak-of", choices=[BLOCK, CONTROL], help=argparse.SUPPRESS)  # what the child processes do
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error("--rounds must be positive")
    sizes = Sizes(**{name: getattr(options, name) for name in ("d_model", "heads", "hidden", "batch", "seq")})
    torch.set_num_threads(options.threads)
    if options.peak_of:
        print(peak_of(options.peak_of, sizes, DTYPES[options.format]))
        return 0

    lines: list[Line] = []
    for format_ in (options.format,) if options.format else FORMATS:
        lines += measure_memory(format_, arguments)
        lines += measure_time(sizes, format_, options.rounds)
    return report(lines, check=options.check)


if __name__ == "__main__":
    raise SystemExit(main())
