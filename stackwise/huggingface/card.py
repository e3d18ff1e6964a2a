"""The model card: what a model is, how to load it, what it was measured at, what it was made from."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from stackwise.model.rack import RackShape

_OBJECTIVES = {
    "clm": "predicts the next token",
    "mlm": "predicts masked tokens",
    "diffusion": "is a mask-diffusion model: it predicts masked tokens, of any share of them",
    "custom": "predicts targets that its training documents brought along",
}


@dataclass(frozen=True)
class Card:
    """What the card tells."""

    name: str
    shape: RackShape
    objective: str
    auto_class: str
    """Of Transformers, that loads it."""
    architecture: str
    """The class that is loaded."""
    reasons: tuple[str, ...]
    """Why it is not one of Transformers; none: it is."""
    needs: tuple[str, ...]
    """The packages that its own code imports."""
    dtype: str
    parameters: int
    length: int
    lineage: Mapping[str, Any]
    """Digests and parameters, as JSON values."""
    metrics: Mapping[str, Any] | None = None
    adapters: tuple[str, ...] = field(default=())
    """Directories of PEFT adapters that belong to it."""

    def text(self) -> str:
        """In Markdown."""
        parts = [self._front(), self._what(), self._load()]
        if self.reasons:
            parts.append(self._code())
        if self.metrics is not None:
            parts.append(self._measured())
        parts.append(
            "## Where it comes from\n\nDigests are SHA-256. `manifest.json` holds one for every file here.\n\n"
            f"```json\n{json.dumps(self.lineage, indent=1, sort_keys=True)}\n```"
        )
        parts.append("## License\n\nNot stated. It is for whoever publishes this model to state one, here and above.")
        return "\n\n".join(parts) + "\n"

    def _front(self) -> str:
        causal = self.auto_class == "AutoModelForCausalLM"
        front: dict[str, Any] = {
            "library_name": "transformers",
            "pipeline_tag": "text-generation" if causal else "fill-mask",
            "tags": ["stackwise", *(["custom_code"] if self.reasons else [])],
        }
        return f"---\n{yaml.safe_dump(front, sort_keys=False)}---"

    def _what(self) -> str:
        shape, model = self.shape, self.shape.stack_model(0)
        rows = {
            "class": f"`{self.architecture}`",
            "parameters": f"{self.parameters:,}, stored as {self.dtype}",
            "stacks": f"{len(shape.stacks)}, of {', '.join(str(s.blocks) for s in shape.stacks)} blocks",
            "width": str(model.d_model),
            "attention": ", ".join(sorted({s.attention.type for s in shape.stacks})),
            "feed-forward": ", ".join(sorted({s.mlp.type for s in shape.stacks})),
            "vocabulary": f"{shape.vocab_size:,} ids",
            "trained on texts of": f"{self.length:,} tokens",
        }
        table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
        return (
            f"# {self.name}\n\nA transformer that was trained stack by stack with StackWise. It "
            f"{_OBJECTIVES[self.objective]}.\n\n| | |\n|---|---|\n{table}"
        )

    def _load(self) -> str:
        trust = ", trust_remote_code=True" if self.reasons else ""
        lines = [
            f"from transformers import {self.auto_class}, AutoTokenizer",
            "",
            f'model = {self.auto_class}.from_pretrained("path/to/this/directory"{trust})',
            f'tokenizer = AutoTokenizer.from_pretrained("path/to/this/directory"{trust})',
        ]
        if self.adapters:
            lines += ["", "from peft import PeftModel", ""]
            first, *others = self.adapters
            name = first.rpartition("/")[2]
            lines.append(
                f'model = PeftModel.from_pretrained(model, "path/to/this/directory/{first}", adapter_name="{name}")'
            )
            for other in others:
                name = other.rpartition("/")[2]
                lines.append(f'model.load_adapter("path/to/this/directory/{other}", adapter_name="{name}")')
            if others:
                names = [path.rpartition("/")[2] for path in self.adapters]
                lines.append(f"model.base_model.set_adapter({names})  # they are added up")
        text = "## Load it\n\n```python\n" + "\n".join(lines) + "\n```"
        if self.adapters:
            text += "\n\nThe adapters belong to the model: its weights without them are not what was measured."
        return text

    def _code(self) -> str:
        return (
            "## It brings code along\n\nNo class of Transformers computes this model, because of "
            f"{'; '.join(self.reasons)}. The Python files in this directory do; `trust_remote_code=True` says that you "
            "have them run. They are StackWise's own modules, and import nothing of StackWise; besides PyTorch and "
            f"Transformers they need {', '.join(self.needs)}."
        )

    def _measured(self) -> str:
        assert self.metrics is not None
        rows = "\n".join(f"| {key} | {value:.4f} |" for key, value in _leaves(self.metrics))
        return f"## Measured\n\nOn held-out documents of its own corpus.\n\n| figure | value |\n|---|---|\n{rows}"


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    """The numbers of nested mappings, by dotted path."""
    found: list[tuple[str, float]] = []
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found += _leaves(value, f"{prefix}{key}.")
        elif isinstance(value, (int, float)):
            found.append((f"{prefix}{key}", float(value)))
    return found
