"""The base of every section of `params.yaml`."""

from collections.abc import Iterable

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A mapping of `params.yaml`: immutable, no unknown keys, no silent conversion between types."""

    # What the docstrings of the keys say is for the reference (`schema`): pydantic would read them in every process.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    def problems(self) -> list[tuple[str, str]]:
        """Combinations of this section's own values that cannot be, as (key within the section, message)."""
        return []

    def changed(self, keys: Iterable[str]) -> list[str]:
        """Those of `keys` that are not at their defaults."""
        fields = type(self).model_fields
        return [key for key in keys if getattr(self, key) != fields[key].get_default(call_default_factory=True)]
