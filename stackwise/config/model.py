"""Section `model`: the architecture."""

from typing import Any, Literal

from pydantic import Field

from stackwise.config.section import Section

ATTENTION_KEYS: dict[str, tuple[str, ...]] = {
    "standard": ("dropout", "qk_norm"),
    "gqa": ("dropout", "qk_norm", "n_kv_heads"),
    "mla": ("dropout", "mla_rq", "mla_rkv", "mla_rope_dim", "mla_nope_dim", "mla_v_dim"),
    "kernel": ("qk_norm", "n_kv_heads", "kernel", "features", "bandwidth", "redraw"),
    "mlgka": (
        *("n_kv_heads", "mla_rq", "mla_rkv", "mla_rope_dim", "mla_nope_dim", "mla_v_dim"),
        *("kernel", "features", "bandwidth", "redraw"),
    ),
}
"""The keys of `model.attention` that only some types use."""
_NEEDED = {"gqa": ("n_kv_heads",), "mla": ("mla_rkv",), "mlgka": ("mla_rkv", "n_kv_heads")}
_MLP_KEYS = {
    "swiglu": (),
    "moe": ("n_experts", "top_k", "n_shared", "balance_weight"),
}
_SCALING_KEYS = ("rope_factor", "rope_original_len")


class AttentionParams(Section):
    """The attention of every block."""

    type: Literal["standard", "gqa", "mla", "kernel", "mlgka"] = "standard"
    """`standard`: multi-head. `gqa`: grouped queries. `mla`: multi-head latent attention. `kernel`: a kernel through
    random features, linear in `seq_len`. `mlgka`: latent projections, grouped heads and the kernel together."""
    n_heads: int = Field(default=4, ge=1)
    """Number of query heads; divides `model.d_model` into heads of an even width, unless `head_dim` is given."""
    head_dim: int | None = Field(default=None, ge=2)
    """Width of a head, an even number (null: `model.d_model` / `n_heads`)."""
    n_kv_heads: int | None = Field(default=None, ge=1)
    """Number of key-value heads, a divisor of `n_heads` (types `gqa`, `mlgka`; optional for `kernel`)."""
    qk_norm: bool = False
    """RMSNorm of every head's queries and keys before the rotation (types `standard`, `gqa`, `kernel`; the others norm
    their latents)."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the attention weights dropped while training (types `standard`, `gqa`, `mla`)."""
    rope_theta: float = Field(default=10000.0, gt=1)
    """Base of the rotary position embedding."""
    rope_scaling: Literal["none", "linear", "yarn", "llama3"] = "none"
    """How rotary frequencies are stretched for contexts longer than `rope_original_len`."""
    rope_factor: float | None = Field(default=None, ge=1)
    """How many times longer the context becomes (with `rope_scaling`)."""
    rope_original_len: int | None = Field(default=None, ge=1)
    """Context length before scaling, in tokens (`rope_scaling` yarn and llama3)."""
    mla_rq: int | None = Field(default=None, ge=1)
    """Rank of the query latent (types `mla`, `mlgka`; null: queries are projected directly)."""
    mla_rkv: int | None = Field(default=None, ge=1)
    """Rank of the joint key-value latent (types `mla`, `mlgka`)."""
    mla_rope_dim: int | None = Field(default=None, ge=2)
    """Rotary dimensions of a head, shared by all heads' keys (types `mla`, `mlgka`; null: half the head width)."""
    mla_nope_dim: int | None = Field(default=None, ge=1)
    """Dimensions of a head without rotation (types `mla`, `mlgka`; null: the rest of the head width)."""
    mla_v_dim: int | None = Field(default=None, ge=1)
    """Width of a head's values (types `mla`, `mlgka`; null: the head width)."""
    kernel: Literal["gaussian", "laplacian", "softmax", "linear", "uniform"] | None = None
    """Kernel whose features stand for queries and keys (types `kernel`, `mlgka`; null: softmax)."""
    features: int | None = Field(default=None, ge=2)
    """Random features of a head, an even number (null: twice the width of its keys; none with kernel linear)."""
    bandwidth: float | None = Field(default=None, gt=0)
    """Bandwidth of the kernels gaussian, laplacian and uniform (null: 1)."""
    redraw: int | None = Field(default=None, ge=1)
    """Draw the random features anew every so many training steps (null: never)."""

    def problems(self) -> list[tuple[str, str]]:
        """What does not fit the type, or each other."""
        found = []
        for key in sorted({key for keys in ATTENTION_KEYS.values() for key in keys}):
            is_set = getattr(self, key) != type(self).model_fields[key].default
            if is_set and key not in ATTENTION_KEYS[self.type]:
                users = ", ".join(name for name, keys in ATTENTION_KEYS.items() if key in keys)
                message = f"has no effect with attention type {self.type} (it has with {users}): leave it out"
                found.append((key, message))
            if not is_set and key in _NEEDED.get(self.type, ()):
                found.append((key, f"expected a number, because the attention type is {self.type}"))
        if self.n_kv_heads is not None and self.n_heads % self.n_kv_heads:
            found.append(("n_kv_heads", f"expected a divisor of n_heads ({self.n_heads})"))
        if self.uses_latents and self.head_dim and self.mla_rope_dim and self.mla_nope_dim and self.mla_v_dim:
            message = "has no effect with mla_rope_dim, mla_nope_dim and mla_v_dim, which say all: leave it out"
            found.append(("head_dim", message))
        if self.mla_rope_dim is not None and self.mla_rope_dim % 2:
            found.append(("mla_rope_dim", "expected an even number: rotary positions turn pairs"))
        return [*found, *self._kernel_problems(), *self._rope_problems()]

    def overridden(self, by: "AttentionParams") -> "AttentionParams":
        """These with the keys that are set in `by`; another type there drops the keys that it does not use."""
        update = {key: getattr(by, key) for key in by.model_fields_set}
        if by.type != self.type and "type" in update:
            foreign = {key for keys in ATTENTION_KEYS.values() for key in keys} - {*ATTENTION_KEYS[by.type]}
            update = {key: type(self).model_fields[key].default for key in foreign} | update
        return self.model_copy(update=update)

    @property
    def uses_latents(self) -> bool:
        """Whether queries, keys and values pass through latents."""
        return self.type in ("mla", "mlgka")

    def rope_dim(self, width: int) -> int:
        """Rotary dimensions of a latent head of `width`."""
        return self.mla_rope_dim or 2 * max(1, width // 4)

    def _kernel_problems(self) -> list[tuple[str, str]]:
        found: list[tuple[str, str]] = []
        if "kernel" not in ATTENTION_KEYS[self.type]:
            return found
        kernel = self.kernel or "softmax"
        if self.features is not None and kernel == "linear":
            found.append(("features", "has no effect with kernel linear, whose features are not random: leave it out"))
        if self.features is not None and self.features % 2:
            found.append(("features", "expected an even number: features come in pairs"))
        if self.redraw is not None and kernel == "linear":
            found.append(("redraw", "has no effect with kernel linear, whose features are not random: leave it out"))
        if self.bandwidth is not None and kernel in ("softmax", "linear"):
            found.append(("bandwidth", f"has no effect with kernel {kernel}: leave it out"))
        return found

    def _rope_problems(self) -> list[tuple[str, str]]:
        needed = {"none": (), "linear": ("rope_factor",)}.get(self.rope_scaling, _SCALING_KEYS)
        found = []
        for key in _SCALING_KEYS:
            if getattr(self, key) is not None and key not in needed:
                found.append((key, f"has no effect with rope_scaling {self.rope_scaling}: leave it out"))
            if getattr(self, key) is None and key in needed:
                found.append((key, f"expected a number, because rope_scaling is {self.rope_scaling}"))
        return found


class MLPParams(Section):
    """The feed-forward network of every block."""

    type: Literal["swiglu", "moe"] = "swiglu"
    """`swiglu`: one gated network. `moe`: a mixture of such networks, of which each token passes through a few."""
    hidden: int = Field(default=512, ge=1)
    """Width of the hidden layer (of each expert)."""
    frozen_up: bool = False
    """Keep the gate and up projections at their random initial values; only the down projection trains."""
    n_experts: int = Field(default=4, ge=2)
    """Number of routed experts (type `moe`)."""
    top_k: int = Field(default=2, ge=1)
    """Routed experts that each token passes through, at most `n_experts` (type `moe`)."""
    n_shared: int = Field(default=0, ge=0)
    """Experts that every token passes through besides (type `moe`)."""
    balance_weight: float = Field(default=0.01, ge=0)
    """Weight of the load-balancing loss (type `moe`)."""

    def problems(self) -> list[tuple[str, str]]:
        """What does not fit the type."""
        found = []
        for key in _MLP_KEYS["moe"]:
            if self.type != "moe" and getattr(self, key) != type(self).model_fields[key].default:
                found.append((key, f"has no effect with mlp type {self.type} (it has with moe): leave it out"))
        if self.type == "moe" and self.top_k > self.n_experts:
            found.append(("top_k", f"expected at most n_experts ({self.n_experts})"))
        return found

    def overridden(self, by: "MLPParams") -> "MLPParams":
        """These with the keys that are set in `by`."""
        update = {key: getattr(by, key) for key in by.model_fields_set}
        if update.get("type", self.type) == "swiglu":
            update = {key: type(self).model_fields[key].default for key in _MLP_KEYS["moe"]} | update
        return self.model_copy(update=update)


class TimeParams(Section):
    """What the stacks know of the mask rate t."""

    mode: Literal["none", "input", "depth"] = "none"
    """`none`: nothing. `input`: an embedding of t modulates every block (AdaLN-zero). `depth`: each stack owns a t, at
    which its training data is masked."""
    embedding: Literal["sinusoidal", "learned"] = "sinusoidal"
    """Embedding of t in mode `input`; `learned` has a row for each of `bins`."""
    width: int = Field(default=64, ge=2)
    """Width of the embedding of t, an even number (mode `input`)."""
    bins: int | None = Field(default=None, ge=1)
    """Cut t's range (0, 1] into so many equal bins (mode `input`; null: t is continuous)."""
    sampling: Literal["sample", "batch"] = "sample"
    """Whether every sample has a t of its own, or all samples of a batch the same."""
    mapping: Literal["linear", "exponential", "custom"] = "linear"
    """Times of the stacks in mode `depth`, from `objective.mask_max` for the lowest to `objective.mask_min` for the
    highest: evenly spaced, or with a constant ratio, or `time_per_stack`."""
    time_per_stack: list[float] = Field(default=[])
    """The t of each stack, in the order in which they are added (mode `depth`, mapping `custom`)."""

    def problems(self) -> list[tuple[str, str]]:
        """What does not fit the mode."""
        found = []
        used = {
            "none": ("sampling",),
            "input": ("sampling", "embedding", "width", "bins"),
            "depth": ("mapping", "time_per_stack"),
        }[self.mode]
        for key in ("embedding", "width", "bins", "sampling", "mapping", "time_per_stack"):
            if key not in used and getattr(self, key) != type(self).model_fields[key].default:
                found.append((key, f"has no effect with model.time.mode {self.mode}: leave it out"))
        if self.embedding == "learned" and self.bins is None:
            found.append(("bins", "expected a number, because model.time.embedding is learned"))
        if self.width % 2:
            found.append(("width", "expected an even number: sines and cosines"))
        if self.mode == "depth" and self.mapping != "custom" and self.time_per_stack:
            found.append(("time_per_stack", f"has no effect with model.time.mapping {self.mapping}: leave it out"))
        if any(not 0 < t <= 1 for t in self.time_per_stack):
            found.append(("time_per_stack", "expected numbers in (0, 1]"))
        return found


class PretrainedParams(Section):
    """Weights of another model's vocabulary."""

    source: str | None = None
    """Local directory or hub name of a model in safetensors (null: none; the weights start at random)."""
    tensor: Literal["embed_tokens", "lm_head"] = "embed_tokens"
    """Which of its matrices: the input embedding or the output head."""
    train: bool = True
    """Whether the matrix trains on; an adapter always does."""
    adapter_hidden: int | None = Field(default=None, ge=1)
    """Hidden width of the MLP between its width and `model.d_model` (needed where they differ; null: none)."""

    def problems(self) -> list[tuple[str, str]]:
        """Settings of a source that is not there."""
        if self.source is not None:
            return []
        return [
            (key, "has no effect without source: leave it out")
            for key in ("tensor", "train", "adapter_hidden")
            if getattr(self, key) != type(self).model_fields[key].default
        ]


class ModelParams(Section):
    """The architecture; single stacks may have another attention or feed-forward network."""

    d_model: int = Field(default=192, ge=2)
    """Width of the residual stream."""
    attention: AttentionParams = AttentionParams()
    """The attention of every block."""
    mlp: MLPParams = MLPParams()
    """The feed-forward network of every block."""
    time: TimeParams = TimeParams()
    """What the stacks know of the mask rate t."""
    embeddings: PretrainedParams = PretrainedParams()
    """Input embeddings taken from another model."""
    head: PretrainedParams = PretrainedParams()
    """Output head taken from another model."""
    document_mask: bool = False
    """Attention stays within a document where a sample holds several."""
    norm_eps: float = Field(default=1e-6, gt=0)
    """Epsilon of every RMSNorm."""
    tie_embeddings: bool = False
    """The output head is the transposed input embedding."""

    def same_weights(self, other: "ModelParams") -> bool:
        """Whether blocks of both have weights of the same names and shapes."""

        def weights(model: ModelParams) -> dict[str, Any]:
            without = {"attention": {"dropout", "redraw"}, "mlp": {"top_k", "balance_weight"}}
            return model.model_dump(exclude=without)

        return weights(self) == weights(other)

    def problems(self) -> list[tuple[str, str]]:
        """Parts that do not fit the width or each other."""
        found = []
        attention = self.attention
        width = attention.head_dim or self.d_model // attention.n_heads
        if attention.head_dim is None and self.d_model % attention.n_heads:
            found.append(("attention.n_heads", f"expected a divisor of model.d_model ({self.d_model})"))
        elif width % 2:
            key = "attention.head_dim" if attention.head_dim else "attention.n_heads"
            found.append((key, f"gives heads of width {width}: rotary positions need an even width"))
        elif attention.uses_latents and attention.mla_nope_dim is None and attention.rope_dim(width) >= width:
            found.append(("attention.mla_rope_dim", f"expected less than the head width ({width}), or mla_nope_dim"))
        for key in ("mla_rq", "mla_rkv"):
            rank = getattr(attention, key)
            if rank is not None and rank > self.d_model:
                found.append((f"attention.{key}", f"expected at most model.d_model ({self.d_model}): it is a low rank"))
        if self.tie_embeddings and self.head.source is not None:
            found.append(("head.source", "has no effect with model.tie_embeddings true: leave it out or untie"))
        if self.tie_embeddings and self.embeddings.adapter_hidden is not None:
            found.append(("tie_embeddings", "cannot be true with model.embeddings.adapter_hidden, whose widths differ"))
        return found
