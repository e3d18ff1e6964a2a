"""Section `model`: the architecture that all stacks share."""

from typing import Literal

from pydantic import Field

from stackwise.config.section import Section


class AttentionParams(Section):
    """The attention of every block."""

    type: Literal["standard", "gqa"] = "standard"
    """`standard`: multi-head attention. `gqa`: grouped-query attention with `n_kv_heads` key-value heads."""
    n_heads: int = Field(default=4, ge=1)
    """Number of query heads; divides `model.d_model`, into heads of an even width."""
    n_kv_heads: int | None = Field(default=None, ge=1)
    """Number of key-value heads, a divisor of `n_heads` (type `gqa`; must be null for `standard`)."""
    rope_theta: float = Field(default=10000.0, gt=1)
    """Base of the rotary position embedding."""

    def problems(self) -> list[tuple[str, str]]:
        """Numbers of heads that do not fit each other."""
        if self.type == "gqa" and self.n_kv_heads is None:
            return [("n_kv_heads", "expected a number, because model.attention.type is gqa")]
        if self.type == "standard" and self.n_kv_heads is not None:
            return [
                (
                    "n_kv_heads",
                    "has no effect with model.attention.type standard: set type to gqa or n_kv_heads to null",
                )
            ]
        if self.n_kv_heads is not None and self.n_heads % self.n_kv_heads:
            return [("n_kv_heads", f"expected a divisor of model.attention.n_heads ({self.n_heads})")]
        return []


class MLPParams(Section):
    """The SwiGLU feed-forward network of every block."""

    hidden: int = Field(default=512, ge=1)
    """Width of the hidden layer."""
    frozen_up: bool = False
    """Keep the gate and up projections at their random initial values; only the down projection trains."""


class ModelParams(Section):
    """The architecture that all stacks share."""

    d_model: int = Field(default=192, ge=2)
    """Width of the residual stream."""
    attention: AttentionParams = AttentionParams()
    """The attention of every block."""
    mlp: MLPParams = MLPParams()
    """The feed-forward network of every block."""
    norm_eps: float = Field(default=1e-6, gt=0)
    """Epsilon of every RMSNorm."""
    tie_embeddings: bool = False
    """The output head is the transposed input embedding."""

    def problems(self) -> list[tuple[str, str]]:
        """Heads that do not fit the width."""
        heads = self.attention.n_heads
        if self.d_model % heads:
            return [("attention.n_heads", f"expected a divisor of model.d_model ({self.d_model})")]
        if self.d_model // heads % 2:
            return [
                (
                    "attention.n_heads",
                    f"gives heads of width {self.d_model // heads}: rotary positions need an even width",
                )
            ]
        return []
