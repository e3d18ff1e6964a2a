"""What MLflow loads when a registered model is asked: `mlflow models predict`, `mlflow models serve`, `load_model`.

MLflow calls `_load_pyfunc`. A registered model brings its weights, its tokenizer and this project's code along, so
nothing else of the project has to be there.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from stackwise.artifacts.manifest import Artifact, read
from stackwise.config.generation import GenerationParams
from stackwise.generation.generator import Generation, TextGenerator
from stackwise.generation.prompts import read_prompts
from stackwise.growth.racks import KIND
from stackwise.model.context import segments_of_documents
from stackwise.registry.interface import PROMPT, RACK

if TYPE_CHECKING:
    import pandas as pd


class ServedRack:
    """A rack that answers prompts."""

    def __init__(self, artifact: Artifact) -> None:
        # A rack that has learned targets of its own does not say whether they are text: whoever asks it knows.
        method = ("causal" if artifact.facts["causal"] else "diffusion") if _is_custom(artifact) else None
        self._generator = TextGenerator.of(artifact, method=method)  # type: ignore[arg-type]

    def predict(self, model_input: "pd.DataFrame", params: dict[str, Any] | None = None) -> "pd.DataFrame":
        """A text for each prompt.

        Args:
            model_input: column `prompt`; `[MASK]` in it, or `[MASK:8]` for eight, is filled in by racks that unmask.
            params: `seed`, and those of `interface.TUNABLE`.

        Returns:
            Columns `text` (all of it), `made` (what the model has made of it) and `score` (see `score`).

        Raises:
            UserError: a prompt or a parameter does not fit the model.
        """
        import pandas as pd

        given = {key: value for key, value in (params or {}).items() if value is not None}
        seed = int(given.pop("seed", 0))
        made = self._generator.generate(list(model_input[PROMPT]), GenerationParams.model_validate(given), seed=seed)
        rows = [{"text": g.text, "made": g.made, "score": score(self._generator, g)} for g in made]
        return pd.DataFrame(rows)


@torch.inference_mode()
def score(generator: TextGenerator, text: Generation) -> float:
    """Mean log-probability of the tokens that a model has made (nats; 0 if there are none).

    From left to right each is judged by what stands before it. By unmasking all are judged by what was given, in one
    pass over the text in which all of them are masked; so it is no bound on the likelihood of the text.
    """
    rack, tokenizer = generator.rack, generator.tokenizer
    (prompt,) = read_prompts([text.prompt], tokenizer)
    eos_id: int = tokenizer.eos_token_id
    given, ids = prompt.ids(generator.mask_id), list(text.ids)
    if generator.method == "causal":
        start = len(given) or 1
        ids = ids if given else [eos_id, *ids]
        made, seen = np.arange(start, len(ids)), ids
        judges = made - 1
    else:
        seen = given + [generator.mask_id] * (len(ids) - len(given))
        made = judges = np.flatnonzero(np.array(seen) == generator.mask_id)
    if not len(made):
        return 0.0
    tokens = torch.tensor([seen], device=rack.embeddings.mask.device)
    segments = segments_of_documents(tokens, eos_id) if rack.shape.model.document_mask else None
    if generator.method == "causal":
        x = rack(tokens, causal=True, segments=segments)
    else:
        share = len(made) / len(seen)
        times = torch.tensor([share], device=tokens.device)
        x = rack(tokens, times=times, segments=segments, entry=rack.shape.entry(share))
    log_probabilities = rack.head(x[0, torch.from_numpy(judges)]).float().log_softmax(dim=-1).cpu()
    own = torch.tensor(ids)[torch.from_numpy(made)]
    return float(log_probabilities.gather(1, own[:, None]).double().mean())


def _is_custom(artifact: Artifact) -> bool:
    return artifact.facts["objective"] == "custom"


def _load_pyfunc(path: str) -> ServedRack:
    """MLflow's entry point: the model in the directory of a registered one, every byte of it verified."""
    return ServedRack(read(Path(path) / RACK, KIND))
