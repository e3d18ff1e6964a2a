"""Tokens a second of decoding with the cache, against the same model under `transformers.generate` on the same CPU.

A causal rack of random weights continues prompts of one length; so does a `LlamaForCausalLM` with its weights. Both
take the likeliest token and must write the same text. The measured time has all that a user waits for, from prompts to
tokens; the two take turns, and the ratio of the medians counts. Run it on an idle machine:

    python -m benchmarks.generation --check
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.table import Line, report, take_turns
from stackwise.config.model import AttentionParams, MLPParams, ModelParams
from stackwise.generation.choosing import Choice
from stackwise.generation.decoding import continue_texts
from stackwise.generation.draws import draws_of_text
from stackwise.generation.packing import packed
from stackwise.growth.init import initialize
from stackwise.model.rack import Rack, RackShape

ALIKE = 1e-4
"""The most by which logits may differ, as a share of the largest."""


def build(options: argparse.Namespace) -> tuple[Rack, Any]:
    """A rack, and the same model of transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    d, heads, hidden = options.d_model, options.heads, round(options.d_model * 8 / 3 / 32) * 32
    attention = AttentionParams(type="gqa", n_heads=heads, n_kv_heads=options.kv_heads)
    model = ModelParams(d_model=d, attention=attention, mlp=MLPParams(hidden=hidden))
    rack = Rack(RackShape.of(model, (options.blocks,), options.vocab))
    for name, part in rack.named_children():
        initialize(part, name=name, seed=0)
    rack.eval().requires_grad_(False)
    config = LlamaConfig(
        vocab_size=options.vocab,
        hidden_size=d,
        intermediate_size=hidden,
        num_hidden_layers=options.blocks,
        num_attention_heads=heads,
        num_key_value_heads=options.kv_heads,
        rms_norm_eps=model.norm_eps,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    llama: Any = LlamaForCausalLM(config).eval().requires_grad_(False)
    weights = {
        "model.embed_tokens.weight": rack.embeddings.table,
        "model.norm.weight": rack.head.norm.weight,
        "lm_head.weight": rack.head.weight,
    }
    for name, weight in rack.stacks[0].get_submodule("blocks").state_dict().items():
        for ours, theirs in (
            ("attention_norm", "input_layernorm"),
            ("mlp_norm", "post_attention_layernorm"),
            ("attention.", "self_attn."),
        ):
            name = name.replace(ours, theirs)
        weights[f"model.layers.{name}"] = weight
    llama.load_state_dict(weights)
    return rack, llama


def decoder(rack: Rack, prompts: Tensor, new: int) -> Callable[[], Tensor]:
    """Continues `prompts` `[n, seq]` by `new` tokens, as `stackwise generate` does."""

    def run() -> Tensor:
        texts: list[list[int]] = prompts.tolist()

        def accept(row: int, token: int) -> bool:
            texts[row].append(token)
            return True

        draws = [draws_of_text(0, row) for row in range(len(prompts))]
        counts = [new] * len(prompts)
        continue_texts(rack, prompts.tolist(), counts, choice=Choice(0.0), draws=draws, accept=accept, eos_id=0)
        return torch.tensor(texts)

    return run


def generating(llama: Any, prompts: Tensor, new: int) -> Callable[[], Tensor]:
    """The same by `transformers.generate`."""
    everything = torch.ones_like(prompts)

    def run() -> Tensor:
        tokens: Tensor = llama.generate(
            prompts, attention_mask=everything, max_new_tokens=new, do_sample=False, pad_token_id=0
        )
        return tokens

    return run


def timed(run: Callable[[], Tensor]) -> Callable[[], float]:
    """Runs and returns the seconds that it took."""

    def once() -> float:
        began = time.perf_counter()
        run()
        return time.perf_counter() - began

    return once


@torch.inference_mode()
def measure(options: argparse.Namespace) -> list[Line]:
    """The lines of all batch sizes."""
    rack, llama = build(options)
    lines = []
    for n in options.batch:
        generator = torch.Generator().manual_seed(n)
        prompts = torch.randint(0, options.vocab, (n, options.prompt), generator=generator)
        ours, theirs = rack.logits(prompts, causal=True), llama(prompts).logits
        if (ours - theirs).abs().max() > ALIKE * theirs.abs().max():
            raise RuntimeError("the two are not the same model")
        runs = {
            "ours": decoder(packed(copy.deepcopy(rack), n), prompts, options.new),
            "plain": decoder(rack, prompts, options.new),
            "transformers": generating(llama, prompts, options.new),
        }
        texts = {name: run() for name, run in runs.items()}
        if not all(torch.equal(text, texts["ours"]) for text in texts.values()):
            raise RuntimeError("the two do not write the same text")

        times = take_turns({name: timed(run) for name, run in runs.items()}, options.rounds)
        speed = {name: n * options.new / statistics.median(values) for name, values in times.items()}
        lines.append(Line(f"batch {n}: transformers", f"{speed['transformers']:,.0f} tok/s", 1.0))
        plain = speed["plain"] / speed["transformers"]
        lines.append(Line(f"batch {n}: ours, PyTorch's layout", f"{speed['plain']:,.0f} tok/s", plain))
        ratio = speed["ours"] / speed["transformers"]
        lines.append(Line(f"batch {n}: ours", f"{speed['ours']:,.0f} tok/s", ratio, at_least=1.2))
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table; returns 1 if a target is missed and `--check` was given, otherwise 0."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.generation", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--d-model", type=int, default=512, help="width of the residual stream (default: 512)")
    parser.add_argument("--heads", type=int, default=8, help="query heads (default: 8)")
    parser.add_argument("--kv-heads", type=int, default=4, help="key-value heads (default: 4)")
    parser.add_argument("--blocks", type=int, default=8, help="(default: 8)")
    parser.add_argument("--vocab", type=int, default=8192, help="ids (default: 8192)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16], help="texts at once (default: 1 16)")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt (default: 32)")
    parser.add_argument("--new", type=int, default=64, help="tokens to add (default: 64)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count (default: 5)")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    return report(measure(options), check=options.check)


if __name__ == "__main__":
    raise SystemExit(main())
