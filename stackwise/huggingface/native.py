"""Racks that are, number for number, models that Transformers knows: names of their weights, and their configuration.

- Attention `standard` or `gqa`, feed-forward network `swiglu`: `LlamaForCausalLM`.
- The same with `qk_norm`: `Qwen3ForCausalLM`.
- Attention `mla`, feed-forward network `swiglu`: `DeepseekV3ForCausalLM`, all layers dense.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stackwise.config.model import AttentionParams, ModelParams
from stackwise.huggingface.tensors import Source
from stackwise.model.frozen import FrozenLinear
from stackwise.model.rack import RackShape

CLASSES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM", "deepseek_v3": "DeepseekV3ForCausalLM"}
"""By `model_type`."""
LATENT_EPS = 1e-6
"""Of the norms of DeepSeek-V3's latents in Transformers, whatever the configuration says of the others."""
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
_PARTS = {
    "attention_norm": "input_layernorm",
    "attention.projections.q_a_norm": "self_attn.q_a_layernorm",
    "attention.projections.kv_a_norm": "self_attn.kv_a_layernorm",
    "attention.projections.kv_a_proj": "self_attn.kv_a_proj_with_mqa",
    "attention.projections": "self_attn",
    "attention": "self_attn",
    "mlp_norm": "post_attention_layernorm",
    "mlp": "mlp",
}
"""Our name of a part of a block, or of what holds it, and theirs; the first that fits holds."""
_ENDS = {
    "embeddings.table": "model.embed_tokens.weight",
    "head.norm.weight": "model.norm.weight",
    "head.projection.weight": "lm_head.weight",
}


def obstacles(shape: RackShape, adapted: Iterable[str] = ()) -> list[str]:
    """What of a rack no class of Transformers computes, each with its parameter; none: it has one.

    Args:
        shape: of the rack.
        adapted: the names of the projections that have adapters, such as `q_proj`.
    """
    model, first = shape.model, shape.stack_model(0)
    attention, found = first.attention, []
    kinds = {s.attention.type for s in shape.stacks} - {"standard", "gqa", "mla"}
    found += [f"model.attention.type {kind}" for kind in sorted(kinds)]
    found += [f"model.mlp.type {kind}" for kind in sorted({s.mlp.type for s in shape.stacks} - {"swiglu"})]
    if not found and any(not _learned(shape, k).same_weights(_learned(shape, 0)) for k in range(len(shape.stacks))):
        found.append("stacks of different architectures (stacks.k.attention, stacks.k.mlp)")
    if model.time.mode == "input":
        found.append("model.time.mode input")
    for key, params in (("embeddings", model.embeddings), ("head", model.head)):
        if params.adapter_hidden is not None:
            found.append(f"model.{key}.adapter_hidden")
    if attention.type == "mla" and model.norm_eps != LATENT_EPS:
        found.append(f"model.norm_eps {model.norm_eps:g} with attention mla, whose latents have {LATENT_EPS:g} there")
    if attention.type == "mla" and {"gate_proj", "up_proj", "down_proj"} & set(adapted):
        found.append("adapters of mlp with attention mla, which PEFT takes for those of experts")
    if attention.type in ("standard", "gqa") and not attention.qk_norm and model.d_model % attention.n_heads:
        found.append("model.attention.head_dim with n_heads that are no divisor of model.d_model")
    return found


def _learned(shape: RackShape, k: int) -> ModelParams:
    """The architecture of a stack whose random matrices are weights as others."""
    model = shape.stack_model(k)
    return model.model_copy(update={"mlp": model.mlp.model_copy(update={"frozen_up": False})})


def model_type_of(attention: AttentionParams) -> str:
    """The model of Transformers that computes this attention."""
    if attention.type == "mla":
        return "deepseek_v3"
    return "qwen3" if attention.qk_norm else "llama"


def config_of(shape: RackShape, *, length: int) -> dict[str, Any]:
    """What `config.json` says of the architecture of a rack without `obstacles`.

    Args:
        shape: of the rack.
        length: tokens of the texts that it was trained on.
    """
    model, layers = shape.stack_model(0), sum(stack.blocks for stack in shape.stacks)
    attention = model.attention
    kind, width = model_type_of(attention), attention.head_dim or model.d_model // attention.n_heads
    if attention.rope_scaling in ("yarn", "llama3"):
        assert attention.rope_original_len is not None
        assert attention.rope_factor is not None
        length = max(length, round(attention.rope_original_len * attention.rope_factor))
    config = {
        "architectures": [CLASSES[kind]],
        "model_type": kind,
        "vocab_size": shape.vocab_size,
        "hidden_size": model.d_model,
        "intermediate_size": model.mlp.hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": attention.n_heads,
        "num_key_value_heads": attention.n_kv_heads or attention.n_heads,
        "hidden_act": "silu",
        "max_position_embeddings": length,
        "rms_norm_eps": model.norm_eps,
        "rope_parameters": _rope(attention),
        "attention_bias": False,
        "attention_dropout": attention.dropout,
        "tie_word_embeddings": model.tie_embeddings,
        "use_cache": True,
    }
    if kind == "deepseek_v3":
        rope_dim = attention.rope_dim(width)
        return config | {
            "q_lora_rank": attention.mla_rq,
            "kv_lora_rank": attention.mla_rkv,
            "qk_rope_head_dim": rope_dim,
            "qk_nope_head_dim": attention.mla_nope_dim or width - rope_dim,
            "v_head_dim": attention.mla_v_dim or width,
            "rope_interleave": False,
            "first_k_dense_replace": layers,
            "num_mtp_layers": 0,
        }
    config["head_dim"] = width
    if kind == "qwen3":
        return config | {"use_sliding_window": False}
    return config | {"mlp_bias": False}


def _rope(attention: AttentionParams) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": attention.rope_theta}
    if attention.rope_scaling == "none":
        return rope
    rope |= {"rope_type": attention.rope_scaling, "factor": attention.rope_factor}
    if attention.rope_original_len is not None:
        rope["original_max_position_embeddings"] = attention.rope_original_len
    if attention.rope_scaling == "llama3":
        rope |= _LLAMA3
    if attention.rope_scaling == "yarn" and attention.type == "mla":  # its factor is of whole queries and keys
        rope |= {"mscale": 1.0, "mscale_all_dim": 1.0}
    return rope


def names(shape: RackShape, stored: Iterable[str]) -> dict[str, str]:
    """The names of a rack's weights in Transformers, by ours, of those that it has there.

    Args:
        shape: of the rack.
        stored: our names of its weights; the seed of a frozen random matrix stands for the matrix.
    """
    layers = {place: number for number, place in enumerate(places(shape))}
    found = {}
    for ours in stored:
        if ours in _ENDS:
            found[ours] = _ENDS[ours]
        elif ours.startswith("stacks."):
            _, stack, _, block, path = ours.split(".", 4)
            theirs = name_of_part(path.removesuffix(".seed") + ".weight" * path.endswith(".seed"))
            found[ours] = f"model.layers.{layers[int(stack), int(block)]}.{theirs}"
    return found


def name_of_part(path: str) -> str:
    """The name in Transformers of a part of a block, such as `attention.q_proj.weight`."""
    ours = next(ours for ours in _PARTS if path.startswith(f"{ours}."))
    return _PARTS[ours] + path.removeprefix(ours)


def places(shape: RackShape) -> Iterator[tuple[int, int]]:
    """The stack and the place in it of each block, bottom to top."""
    for k, stack in enumerate(shape.stacks):
        yield from ((k, block) for block in range(stack.blocks))


def weights_of(shape: RackShape, stored: Mapping[str, Source]) -> dict[str, Source]:
    """The weights of a rack without `obstacles`, by their names in Transformers. The row of the mask token, which no
    causal model sees, is left out.

    Args:
        shape: of the rack.
        stored: its weights, by our names.
    """
    found: dict[str, Source] = {}
    for ours, theirs in names(shape, stored).items():
        found[theirs] = _drawn(shape, ours, stored[ours]) if ours.endswith(".seed") else stored[ours]
    return found


@dataclass(frozen=True)
class Drawn:
    """A frozen random matrix, drawn when it is asked for."""

    shape: tuple[int, int]
    seed: int
    dtype: torch.dtype = torch.float32

    def pieces(self) -> Iterator[Tensor]:
        """See `Source`."""
        d_out, d_in = self.shape
        matrix = FrozenLinear(d_in, d_out)
        matrix.reseed(self.seed)
        yield matrix.weight.view(-1)


def _drawn(shape: RackShape, name: str, seed: Source) -> Drawn:
    model = shape.stack_model(int(name.split(".")[1]))
    return Drawn((model.mlp.hidden, model.d_model), int(next(seed.pieces())[0]))
