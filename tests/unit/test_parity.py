"""Racks against the models of transformers with the same weights: logits, gradients, rotary frequencies, MoE's loss.

All is in float64, but the references round their norms, softmaxes and rotary tables to fp32: they agree to about 2e-6
of the logits' size, fp32's rounding. A wrong model is off by 1e-2 or more.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from stackwise.config.model import AttentionParams, MLPParams, ModelParams
from stackwise.mlp.moe import MixtureOfExperts
from stackwise.model.rack import Rack, RackShape
from stackwise.model.rope import Rope

VOCAB = 19
BATCH, SEQ = 2, 24
BLOCKS = (2, 1)
TOLERANCE: dict[str, Any] = {"rtol": 0.0, "atol": 1e-5}
CPU = torch.device("cpu")

DENSE = MLPParams(hidden=48)
STANDARD = AttentionParams(n_heads=4, rope_theta=100.0)
GQA = AttentionParams(type="gqa", n_heads=4, n_kv_heads=2, rope_theta=100.0)
MLA = AttentionParams(
    type="mla", n_heads=4, mla_rq=10, mla_rkv=12, mla_rope_dim=4, mla_nope_dim=6, mla_v_dim=5, rope_theta=100.0
)
SCALINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "linear": ({"rope_factor": 4.0}, {"factor": 4.0}),
    "yarn": (
        {"rope_factor": 4.0, "rope_original_len": 64},
        {"factor": 4.0, "original_max_position_embeddings": 64},
    ),
    "llama3": (
        {"rope_factor": 8.0, "rope_original_len": 64},
        {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    ),
}
"""Our parameters and theirs, of the same scaling."""


def scaled(attention: AttentionParams, scaling: str) -> AttentionParams:
    return attention.model_copy(update={"rope_scaling": scaling, **SCALINGS[scaling][0]})


def model_of(attention: AttentionParams, mlp: MLPParams = DENSE, **others: Any) -> ModelParams:
    model = ModelParams(d_model=32, attention=attention, mlp=mlp, **others)
    assert not [*attention.problems(), *mlp.problems(), *model.problems()]
    return model


def build(model: ModelParams) -> Rack:
    """A rack whose weights are all random, norms too, and large enough to make every part count."""
    rack = Rack(RackShape.of(model, BLOCKS, VOCAB)).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in rack.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(1 + 0.3 * noise if p.ndim == 1 else noise * p.shape[1] ** -0.5)
    return rack.eval()


def some_tokens() -> Tensor:
    return torch.randint(0, VOCAB + 1, (BATCH, SEQ), generator=torch.Generator().manual_seed(0))


# --- the references


def reference_of(rack: Rack, model: ModelParams, *, interleaved: bool = False) -> Any:
    """The model of transformers for this architecture, with the weights of `rack`."""
    attention, mlp = model.attention, model.mlp
    rope = {"rope_type": "default", "rope_theta": attention.rope_theta}
    if attention.rope_scaling != "none":
        rope |= {"rope_type": attention.rope_scaling, **SCALINGS[attention.rope_scaling][1]}
    common: dict[str, Any] = {
        "vocab_size": VOCAB + 1,  # theirs has a row for the mask token in its head too
        "hidden_size": model.d_model,
        "intermediate_size": mlp.hidden,
        "num_hidden_layers": sum(BLOCKS),
        "num_attention_heads": attention.n_heads,
        "num_key_value_heads": attention.n_kv_heads or attention.n_heads,
        "head_dim": attention.head_dim or model.d_model // attention.n_heads,
        "rms_norm_eps": model.norm_eps,
        "max_position_embeddings": 256,
        "rope_parameters": rope,
        "tie_word_embeddings": model.tie_embeddings,
        "attn_implementation": "eager",
        "bos_token_id": None,
        "eos_token_id": None,
    }
    reference: Any
    if attention.type == "mla":
        if attention.rope_scaling == "yarn":
            rope |= {"mscale": 1.0, "mscale_all_dim": 1.0}
        latents: dict[str, Any] = {
            "head_dim": attention.mla_rope_dim,
            "q_lora_rank": attention.mla_rq,
            "kv_lora_rank": attention.mla_rkv,
            "qk_rope_head_dim": attention.mla_rope_dim,
            "qk_nope_head_dim": attention.mla_nope_dim,
            "v_head_dim": attention.mla_v_dim,
            "rope_interleave": interleaved,
            "first_k_dense_replace": sum(BLOCKS),
            "num_mtp_layers": 0,
        }
        reference = DeepseekV3ForCausalLM(DeepseekV3Config(**(common | latents)))
    elif mlp.type == "moe":
        routing: dict[str, Any] = {
            "num_local_experts": mlp.n_experts,
            "num_experts_per_tok": mlp.top_k,
            "experts_implementation": "eager",
        }
        reference = MixtralForCausalLM(MixtralConfig(**common, **routing))
    elif attention.qk_norm:
        reference = Qwen3ForCausalLM(Qwen3Config(**common))
    else:
        reference = LlamaForCausalLM(LlamaConfig(**common))
    weights = renamed(dict(rack.named_parameters()), model, interleaved=interleaved)
    reference = reference.double()
    reference.load_state_dict({name: w.detach().clone() for name, w in weights.items()})
    return reference.eval()


NAMES = {
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "attention.projections.": "self_attn.",
    "attention.": "self_attn.",
    "q_a_norm": "q_a_layernorm",
    "kv_a_norm": "kv_a_layernorm",
    "kv_a_proj": "kv_a_proj_with_mqa",
    "mlp.router": "mlp.gate",
}


def renamed(weights: dict[str, Tensor], model: ModelParams, *, interleaved: bool = False) -> dict[str, Tensor]:
    """Weights of a rack (or their gradients) in the names and layouts of the reference."""
    table, mask = weights["embeddings.table"], weights["embeddings.mask"]
    found = {"model.embed_tokens.weight": torch.cat([table, mask]), "model.norm.weight": weights["head.norm.weight"]}
    projection = table if model.tie_embeddings else weights["head.projection.weight"]
    found["lm_head.weight"] = torch.cat([projection, mask if model.tie_embeddings else torch.zeros_like(mask)])
    layer = 0
    for stack, blocks in enumerate(BLOCKS):
        for block in range(blocks):
            prefix = f"stacks.{stack}.blocks.{block}."
            for path, weight in weights.items():
                if path.startswith(prefix):
                    name = path.removeprefix(prefix)
                    if interleaved:
                        weight = interleave(name, weight, model.attention)
                    for ours, theirs in NAMES.items():
                        name = name.replace(ours, theirs)
                    found[f"model.layers.{layer}.{name}"] = weight
            layer += 1
    return joined_experts(found, model.mlp) if model.mlp.type == "moe" else found


def interleave(name: str, weight: Tensor, attention: AttentionParams) -> Tensor:
    """Rows of rotary dimensions so that pairs are neighbours, as in DeepSeek's checkpoints."""
    dim = attention.mla_rope_dim
    assert dim is not None
    if name.endswith(("q_b_proj.weight", "q_proj.weight")):
        heads = weight.unflatten(0, (attention.n_heads, -1))
    elif name.endswith("kv_a_proj.weight"):
        heads = weight[None]
    else:
        return weight
    pairs = heads[:, -dim:].unflatten(1, (2, dim // 2)).transpose(1, 2).flatten(1, 2)
    return torch.cat([heads[:, :-dim], pairs], dim=1).flatten(0, 1)


def joined_experts(weights: dict[str, Tensor], mlp: MLPParams) -> dict[str, Tensor]:
    """The experts' matrices as one tensor of all, gate and up projections together."""
    kept = {name: w for name, w in weights.items() if ".experts." not in name}
    for layer in range(sum(BLOCKS)):
        prefix = f"model.layers.{layer}.mlp.experts."

        def of_all(which: str, prefix: str = prefix) -> Tensor:
            return torch.stack([weights[f"{prefix}{i}.{which}_proj.weight"] for i in range(mlp.n_experts)])

        kept[f"{prefix}gate_up_proj"] = torch.cat([of_all("gate"), of_all("up")], dim=1)
        kept[f"{prefix}down_proj"] = of_all("down")
    return kept


# --- logits and gradients

MODELS = {
    "standard": model_of(STANDARD, norm_eps=1e-3),
    "standard-tied": model_of(STANDARD, norm_eps=1e-3, tie_embeddings=True),
    "standard-head-dim": model_of(STANDARD.model_copy(update={"head_dim": 12})),
    "gqa": model_of(GQA, norm_eps=1e-3),
    "gqa-tied": model_of(GQA, norm_eps=1e-3, tie_embeddings=True),
    "standard-qk-norm": model_of(STANDARD.model_copy(update={"qk_norm": True, "head_dim": 8}), norm_eps=1e-3),
    "gqa-qk-norm": model_of(GQA.model_copy(update={"qk_norm": True, "head_dim": 12}), norm_eps=1e-3),
    "mla": model_of(MLA),
    "mla-direct-queries": model_of(MLA.model_copy(update={"mla_rq": None})),
    "moe": model_of(STANDARD, MLPParams(type="moe", hidden=24, n_experts=5, top_k=2)),
    "moe-all-experts": model_of(GQA, MLPParams(type="moe", hidden=24, n_experts=3, top_k=3)),
    **{f"gqa-{scaling}": model_of(scaled(GQA, scaling)) for scaling in SCALINGS},
    **{f"mla-{scaling}": model_of(scaled(MLA, scaling)) for scaling in SCALINGS},
}


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_reference(name: str, causal: bool) -> None:
    rack, tokens = build(MODELS[name]), some_tokens()
    reference = reference_of(rack, MODELS[name])
    with torch.no_grad():
        expected = logits_of(reference, tokens, causal)
        found = rack.logits(tokens, causal=causal)
    assert found.shape == (BATCH, SEQ, VOCAB)
    assert expected.std() > 0.5
    torch.testing.assert_close(found, expected, **TOLERANCE)


@pytest.mark.parametrize("name", ["mla", "mla-direct-queries", "mla-yarn"])
def test_latent_attention_is_that_of_checkpoints_with_interleaved_pairs(name: str) -> None:
    rack, tokens = build(MODELS[name]), some_tokens()
    reference = reference_of(rack, MODELS[name], interleaved=True)
    with torch.no_grad():
        torch.testing.assert_close(rack.logits(tokens, causal=True), logits_of(reference, tokens, True), **TOLERANCE)


@pytest.mark.parametrize("name", ["gqa", "gqa-qk-norm", "mla", "moe"])
def test_gradients_are_those_of_the_reference(name: str) -> None:
    rack, tokens = build(MODELS[name]), some_tokens()
    reference = reference_of(rack, MODELS[name])
    direction = torch.randn(BATCH, SEQ, VOCAB, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (rack.logits(tokens, causal=True) * direction).sum().backward()
    (logits_of(reference, tokens, True) * direction).sum().backward()
    ours = {path: p.grad for path, p in rack.named_parameters() if p.grad is not None}
    assert len(ours) == len(list(rack.parameters()))
    expected = {path: p.grad for path, p in reference.named_parameters()}
    for path, grad in renamed(ours, MODELS[name]).items():
        scale = float(expected[path].abs().max())
        assert scale > 0.1, path
        assert float((grad - expected[path]).abs().max()) < 1e-5 * scale, path


def logits_of(reference: Any, tokens: Tensor, causal: bool) -> Tensor:
    """`[batch, seq, V]`; both ways if not `causal`: a mask of zeros, added to the scores, hides nothing."""
    mask = None if causal else torch.zeros(BATCH, 1, SEQ, SEQ, dtype=torch.float64)
    logits: Tensor = reference(tokens, attention_mask=mask).logits
    return logits[..., :VOCAB]


# --- parts


@pytest.mark.parametrize("theta", [100.0, 10000.0, 500000.0])
@pytest.mark.parametrize("original_len", [64, 4096])
@pytest.mark.parametrize("dim", [4, 16, 128])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_rotary_frequencies_are_those_of_the_reference(scaling: str, dim: int, original_len: int, theta: float) -> None:
    theirs = {"rope_type": scaling, "rope_theta": theta, **SCALINGS[scaling][1]}
    if scaling != "linear":
        theirs["original_max_position_embeddings"] = original_len
    config = LlamaConfig(head_dim=dim, max_position_embeddings=8 * original_len, rope_parameters=theirs)
    expected, amplitude = ROPE_INIT_FUNCTIONS[scaling](config, CPU)
    rope = Rope(theta, scaling, float(theirs["factor"]), original_len)
    torch.testing.assert_close(rope.frequencies(dim, CPU), expected, rtol=1e-5, atol=1e-9)
    assert rope.amplitude == pytest.approx(amplitude)


@pytest.mark.parametrize("top_k", [1, 2])
def test_balance_loss_is_that_of_the_reference(top_k: int) -> None:
    mlp = MLPParams(type="moe", hidden=8, n_experts=5, top_k=top_k, balance_weight=0.3)
    mixture = MixtureOfExperts(model_of(STANDARD, mlp)).train()
    x = torch.randn(BATCH, SEQ, 32, generator=torch.Generator().manual_seed(0))
    mixture(x)
    theirs = load_balancing_loss_func((mixture.router(x.flatten(0, 1)),), mlp.n_experts, top_k)
    assert isinstance(theirs, Tensor)
    assert mixture.balance_loss is not None
    # Theirs counts an assignment as a whole token: balanced, it is top_k.
    torch.testing.assert_close(mixture.balance_loss, 0.3 * theirs / top_k)
