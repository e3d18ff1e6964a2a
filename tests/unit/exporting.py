"""Racks of every kind on disk, as the tests of exports need them."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stackwise.artifacts.manifest import Artifact, publish, read
from stackwise.config.data import TokenizerParams
from stackwise.config.model import AttentionParams, MLPParams, ModelParams, PretrainedParams, TimeParams
from stackwise.data.tokenizer import build_tokenizer, save_tokenizer
from stackwise.growth.racks import KIND, facts_of, save_rack
from stackwise.huggingface.exporting import Exported, export_rack
from stackwise.model.frozen import FrozenRandom
from stackwise.model.rack import Rack, RackShape

VOCAB, LENGTH = 257, 64
BLOCKS = (2, 1)
DENSE = MLPParams(hidden=48)


def model_of(attention: dict[str, Any], mlp: MLPParams = DENSE, **others: Any) -> ModelParams:
    sizes = {"d_model": 32} | others
    model = ModelParams(attention=AttentionParams(n_heads=4, **attention), mlp=mlp, **sizes)
    assert not [*model.attention.problems(), *mlp.problems(), *model.problems()]
    return model


LATENTS = {"type": "mla", "mla_rkv": 12}
YARN = {"rope_scaling": "yarn", "rope_factor": 4.0, "rope_original_len": 16}
NATIVE: dict[str, tuple[str, ModelParams]] = {
    "standard": ("LlamaForCausalLM", model_of({}, norm_eps=1e-3)),
    "gqa-tied-llama3": (
        "LlamaForCausalLM",
        model_of(
            {
                **{"type": "gqa", "n_kv_heads": 2, "rope_theta": 100.0},
                **{"rope_scaling": "llama3", "rope_factor": 8.0, "rope_original_len": 16},
            },
            tie_embeddings=True,
        ),
    ),
    "head-dim-linear": (
        "LlamaForCausalLM",
        model_of({"head_dim": 12, "rope_scaling": "linear", "rope_factor": 2.0}, document_mask=True),
    ),
    "frozen-up-yarn": ("LlamaForCausalLM", model_of(YARN, MLPParams(hidden=48, frozen_up=True))),
    "qk-norm": ("Qwen3ForCausalLM", model_of({"qk_norm": True, "type": "gqa", "n_kv_heads": 1})),
    "mla": ("DeepseekV3ForCausalLM", model_of({**LATENTS, "mla_rq": 10, "mla_v_dim": 6})),
    "mla-direct-yarn-tied": ("DeepseekV3ForCausalLM", model_of({**LATENTS, **YARN}, tie_embeddings=True)),
    "depth-as-time": ("LlamaForCausalLM", model_of({}, time=TimeParams(mode="depth"))),
}
"""What each becomes."""
MOE = MLPParams(type="moe", hidden=24, n_experts=3, n_shared=1)
OWN: dict[str, tuple[str, ModelParams]] = {
    "kernel": ("model.attention.type kernel", model_of({"type": "kernel"})),
    "mlgka": ("model.attention.type mlgka", model_of({**LATENTS, "type": "mlgka", "n_kv_heads": 2})),
    "moe-frozen": ("model.mlp.type moe", model_of({}, MOE.model_copy(update={"frozen_up": True}))),
    "timed": ("model.time.mode input", model_of({}, time=TimeParams(mode="input", embedding="learned", bins=4))),
    "adapter": (
        "model.embeddings.adapter_hidden",
        model_of({}, embeddings=PretrainedParams(source="a/b", adapter_hidden=8)),
    ),
    "mla-eps": ("model.norm_eps 0.001", model_of(LATENTS, norm_eps=1e-3)),
    "odd-head-dim": ("model.attention.head_dim", model_of({"head_dim": 8}, d_model=30)),
}
"""What keeps each from being a class of Transformers."""


def build(model: ModelParams, *, vocab_size: int = VOCAB) -> Rack:
    """A rack whose weights are all random, norms too, and large enough to make every part count."""
    width = 40 if model.embeddings.adapter_hidden else None
    rack = Rack(RackShape.of(model, BLOCKS, vocab_size, embedding_width=width))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in rack.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(1 + 0.3 * noise if p.ndim == 1 else noise * p.shape[1] ** -0.5)
        for i, part in enumerate(m for m in rack.modules() if isinstance(m, FrozenRandom)):
            part.reseed(i)
    return rack.eval()


def tokenizer_in(directory: Path) -> Path:
    """The byte tokenizer."""
    built = build_tokenizer(TokenizerParams(type="byte", vocab_size=None), lambda: iter(()))
    save_tokenizer(built, directory / "tokenizer")
    return directory / "tokenizer"


def saved(rack: Rack, directory: Path, *, objective: str = "clm") -> Artifact:
    """An artifact as the pipeline publishes them."""
    path = directory / "rack"
    with publish(path, kind=KIND, params={"seq_len": LENGTH}) as draft:
        save_rack(draft.directory, rack, tokenizer_in(directory))
        draft.facts |= facts_of(rack, objective=objective, causal=objective == "clm", seq_len=LENGTH)
    return read(path, KIND)


def exported(artifact: Artifact, directory: Path, **options: Any) -> Exported:
    directory.mkdir()
    return export_rack(artifact, directory, name="tiny", **options)


def some_tokens(vocab: int = VOCAB, *, seq: int = 24) -> Tensor:
    return torch.randint(0, vocab, (2, seq), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def greedy(rack: Rack, tokens: Tensor, new: int) -> Tensor:
    """Token by token, each the likeliest, with the rack's own decoding cache."""
    cache = rack.new_cache(len(tokens), tokens.shape[1] + new)
    following = tokens
    for _ in range(new):
        following = rack.head(rack(following, causal=True, cache=cache))[:, -1:].argmax(dim=-1)
        tokens = torch.cat((tokens, following), dim=1)
    return tokens
