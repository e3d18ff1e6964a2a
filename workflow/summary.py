"""What `dvc metrics diff` and `dvc exp show` tell of a pipeline: the main figures of each model."""

from collections.abc import Mapping
from typing import Any

FIGURES = ("bits_per_byte", "accuracy", "f1_macro")


def summary(metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """The main figures of some models beside the baseline.

    Args:
        metrics: of each model, as `evaluate` has written them, by its name.

    Returns:
        By the name of the model, such as `{"fused": {"nelbo_bits_per_byte": 2.7}}`.
    """
    found = {name: _main(own) for name, own in metrics.items()}
    baselines = (own["unigram"] for own in metrics.values() if "unigram" in own)
    return {**found, "unigram": {"bits_per_byte": next(baselines)["bits_per_byte"]}}


def _main(metrics: Mapping[str, Any]) -> dict[str, float]:
    parts = {key: own for key, own in metrics.items() if key != "unigram" and isinstance(own, Mapping)}
    # of own text as of the corpus
    parts |= {
        f"own_{key}": own for key, own in parts.get("own", {}).items() if key != "unigram" and isinstance(own, Mapping)
    }
    return {f"{key}_{figure}": own[figure] for key, own in parts.items() for figure in FIGURES if figure in own}
