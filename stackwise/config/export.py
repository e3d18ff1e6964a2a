"""Section `export`: models for Transformers."""

from typing import Literal

from pydantic import Field

from stackwise.config.section import Section


class ExportParams(Section):
    """Models for Transformers."""

    models: list[str] = Field(default=[])
    """Which models are exported: `fused`, or the names of fine-tuning branches."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Format of their weights."""

    def problems(self) -> list[tuple[str, str]]:
        """Names that stand twice."""
        twice = len(set(self.models)) < len(self.models)
        return [("models", "expected each name once")] if twice else []
