"""What decoding with a cache keeps and takes: multi-head latent attention beside grouped and standard heads.

Racks that differ in their attention alone continue a prompt token by token: with the decoding cache, and by a full pass
over all tokens for each, which is the control. Run it on an idle machine:

    python -m benchmarks.decoding --check

- Cache: bytes a token; of latent attention against the formula, (mla_rkv + rotary dimensions) numbers a block.
- Time: a token with the cache against a token without; the two take turns, and the ratio of the medians counts.
- Latents: a token in the latents' space against the same cache with the keys and values of all positions made anew.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from benchmarks.table import Line, report, take_turns
from stackwise.attention.latent import LatentAttention
from stackwise.config.model import AttentionParams, MLPParams, ModelParams
from stackwise.growth.init import initialize
from stackwise.model.rack import Rack, RackShape
from stackwise.precision.dtypes import DTYPES

VOCAB = 1024


class Decoder:
    """A rack of one attention type, and the text that it continues."""

    def __init__(self, attention: AttentionParams, options: argparse.Namespace) -> None:
        self.attention = attention
        self.width = options.d_model // attention.n_heads
        hidden = round(options.d_model * 8 / 3 / 32) * 32
        model = ModelParams(d_model=options.d_model, attention=attention, mlp=MLPParams(hidden=hidden))
        self.rack = Rack(RackShape.of(model, (options.blocks,), VOCAB))
        for part, module in self.rack.named_children():
            initialize(module, name=part, seed=0)
        self.rack.to(DTYPES[options.dtype]).eval().requires_grad_(False)
        self.prompt: int = options.prompt
        shape = (options.batch, options.prompt + options.new)
        self.tokens = torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(0))

    def cached(self) -> tuple[float, Tensor]:
        """Seconds a token, and the last residual stream, of decoding with the cache; the prompt is not timed."""
        cache = self.rack.new_cache(*self.tokens.shape)
        self.rack(self.tokens[:, : self.prompt], causal=True, cache=cache)
        return self._continue(lambda end: self.rack(self.tokens[:, end - 1 : end], causal=True, cache=cache))

    def recomputed(self) -> tuple[float, Tensor]:
        """The same without a cache."""
        return self._continue(lambda end: self.rack(self.tokens[:, :end], causal=True)[:, -1:])

    def _continue(self, step: Callable[[int], Tensor]) -> tuple[float, Tensor]:
        total = self.tokens.shape[1]
        began = time.perf_counter()
        for end in range(self.prompt + 1, total + 1):
            x = step(end)
        return (time.perf_counter() - began) / (total - self.prompt), x

    def cache_bytes(self) -> float:
        """Bytes a token of all blocks, measured."""
        cache = self.rack.new_cache(*self.tokens.shape)
        return sum(block.bytes() for stack in cache for block in stack) / self.tokens.numel()

    def formula_bytes(self, options: argparse.Namespace) -> float:
        """What the cache should take, by the type of attention."""
        attention = self.attention
        heads = attention.n_kv_heads or attention.n_heads
        numbers = 2 * heads * self.width
        if attention.mla_rkv is not None:
            numbers = attention.mla_rkv + attention.rope_dim(self.width)
        return float(options.blocks * numbers * DTYPES[options.dtype].itemsize)

    @contextmanager
    def expanding(self) -> Iterator[None]:
        """Make keys and values of all positions for every token, as adapted projections do."""
        blocks = [part for part in self.rack.modules() if isinstance(part, LatentAttention)]
        plain = [block.projections.kv_b_proj for block in blocks]
        for block in blocks:
            block.projections.kv_b_proj = nn.Sequential(block.projections.kv_b_proj)  # type: ignore[assignment]
        try:
            yield
        finally:
            for block, projection in zip(blocks, plain, strict=True):
                block.projections.kv_b_proj = projection


def measure(name: str, decoder: Decoder, standard: Decoder, options: argparse.Namespace) -> list[Line]:
    """The lines of one attention type."""
    results = {}

    def timed(side: str, run: Callable[[], tuple[float, Tensor]]) -> Callable[[], float]:
        def once() -> float:
            seconds, results[side] = run()
            return seconds

        return once

    def expanded() -> tuple[float, Tensor]:
        with decoder.expanding():
            return decoder.cached()

    sides = {"cached": timed("cached", decoder.cached), "recomputed": timed("recomputed", decoder.recomputed)}
    if decoder.attention.uses_latents:
        sides["expanded"] = timed("expanded", expanded)
    seconds = {side: statistics.median(values) for side, values in take_turns(sides, options.rounds).items()}
    for side, x in results.items():
        if (x - results["recomputed"]).norm() > 2e-2 * x.norm():
            raise RuntimeError(f"{name}, {side}: not what a full pass computes")

    stored, formula = decoder.cache_bytes(), decoder.formula_bytes(options)
    lines = [
        Line(f"{name}: cache a token, over standard", f"{stored:,.0f} B", stored / standard.cache_bytes()),
        Line(f"{name}: cache a token, over the formula", f"{formula:,.0f} B", stored / formula, at_most=1.0),
        Line(f"{name}: full pass a token", f"{seconds['recomputed'] * 1e3:.2f} ms", 1.0),
    ]
    speedup = seconds["recomputed"] / seconds["cached"]
    lines.append(Line(f"{name}: cached a token, speed", f"{seconds['cached'] * 1e3:.2f} ms", speedup, at_least=1.0))
    if "expanded" in seconds:
        gain = seconds["expanded"] / seconds["cached"]
        figure = f"{seconds['expanded'] * 1e3:.2f} ms"
        lines.append(Line(f"{name}: keys and values anew, over latents", figure, gain, at_least=1.0))
    return lines


@torch.inference_mode()
def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table; returns 1 if a target is missed and `--check` was given, otherwise 0."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.decoding", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--d-model", type=int, default=512, help="width of the residual stream (default: 512)")
    parser.add_argument("--heads", type=int, default=8, help="query heads (default: 8)")
    parser.add_argument("--kv-heads", type=int, default=2, help="key-value heads of gqa (default: 2)")
    parser.add_argument("--mla-rq", type=int, default=192, help="rank of the query latent (default: 192)")
    parser.add_argument("--mla-rkv", type=int, default=128, help="rank of the key-value latent (default: 128)")
    parser.add_argument("--blocks", type=int, default=2, help="blocks of a rack (default: 2)")
    parser.add_argument("--batch", type=int, default=2, help="texts at once (default: 2)")
    parser.add_argument("--prompt", type=int, default=512, help="tokens before the first (default: 512)")
    parser.add_argument("--new", type=int, default=4, help="tokens of a round (default: 4)")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="format of all (default: fp32)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count (default: 5)")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")
    options = parser.parse_args(arguments)
    if min(options.rounds, options.new, options.prompt) < 1:
        parser.error("--rounds, --new and --prompt must be positive")
    torch.set_num_threads(options.threads)

    heads = options.heads
    types = {
        "standard": AttentionParams(n_heads=heads),
        "gqa": AttentionParams(type="gqa", n_heads=heads, n_kv_heads=options.kv_heads),
        "mla": AttentionParams(type="mla", n_heads=heads, mla_rq=options.mla_rq, mla_rkv=options.mla_rkv),
    }
    decoders = {name: Decoder(attention, options) for name, attention in types.items()}
    lines: list[Line] = []
    for name, decoder in decoders.items():
        lines += measure(name, decoder, decoders["standard"], options)
    return report(lines, check=options.check)


if __name__ == "__main__":
    raise SystemExit(main())
