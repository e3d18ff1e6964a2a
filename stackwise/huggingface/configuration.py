"""The configuration of a rack in Transformers. It ships with the models that need it."""

from typing import Any

from transformers import PretrainedConfig


class StackWiseConfig(PretrainedConfig):
    """What `config.json` says of a rack."""

    model_type = "stackwise"

    def __init__(self, rack: dict[str, Any] | None = None, vocab_size: int = 0, **others: Any) -> None:
        """
        Args:
            rack: its shape, as `RackShape.to_json` writes it.
            vocab_size: ids that may go in: V for a causal model, V + 1 with the mask token.
            others: of every configuration.
        """
        self.rack = rack or {}
        self.vocab_size = vocab_size
        model, stacks = self.rack.get("model", {}), self.rack.get("stacks", [])
        self.hidden_size = model.get("d_model", 0)
        self.num_hidden_layers = sum(stack["blocks"] for stack in stacks)
        super().__init__(**others)
