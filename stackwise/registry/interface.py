"""What a registered model takes and gives. Light: the process that registers models imports no torch."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from stackwise.config.generation import GenerationParams

if TYPE_CHECKING:
    import pandas as pd
    from mlflow.models import ModelSignature

MODELS = ("rack",)
"""Kinds of artifacts that are registered."""
RACK = "rack"
"""Directory of the artifact within a registered model."""
PROMPT = "prompt"
TUNABLE = ("new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "sampler", "steps", "block")
"""Those of `GenerationParams` that a request may set."""


def signature() -> "ModelSignature":
    """What goes in and what comes out."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    types = {int: DataType.long, float: DataType.double, str: DataType.string}
    defaults = GenerationParams()
    params = [ParamSpec("seed", DataType.long, 0)]
    for key in TUNABLE:
        value = getattr(defaults, key)
        # What is null by default is a count, but for the share `top_p`.
        kind = types[type(value)] if value is not None else DataType.double if key == "top_p" else DataType.long
        params.append(ParamSpec(key, kind, value))
    return ModelSignature(
        inputs=Schema([ColSpec(DataType.string, PROMPT)]),
        outputs=Schema(
            [ColSpec(DataType.string, "text"), ColSpec(DataType.string, "made"), ColSpec(DataType.double, "score")]
        ),
        params=ParamSchema(params),
    )


def example(facts: Mapping[str, Any]) -> "pd.DataFrame":
    """Prompts that a model can answer, by what its manifest says of it."""
    import pandas as pd

    return pd.DataFrame({PROMPT: ["The list" if facts["causal"] else "The [MASK:4] of the list"]})
