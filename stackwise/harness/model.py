"""Racks as a model type of lm-evaluation-harness: causal ones by likelihood, diffusion ones by their bound."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lm_eval.models  # noqa: F401  the harness knows its own types only if they are there before ours
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from stackwise.config.compute import ComputeParams
from stackwise.config.generation import GenerationParams
from stackwise.data.tokenizer import encode
from stackwise.data.tokens import Vocabulary
from stackwise.errors import UserError
from stackwise.generation.generator import TextGenerator
from stackwise.inference.scoring import BoundScorer, CausalScorer, Ids, Question, Scorer, question
from stackwise.training.device import choose

_NEW_TOKENS = 256
"""Of a text, where a task does not say."""


@register_model("stackwise")
class RackLM(LM):  # type: ignore[misc]
    """A fused or fine-tuned rack of the pipeline."""

    def __init__(
        self,
        model: str,
        *,
        batch_size: int | str = 16,
        device: str = "auto",
        draws: int = 32,
        seed: int = 0,
        max_length: int | None = None,
        greedy: bool = False,
        dtype: str = "fp32",
        **sampling: Any,
    ) -> None:
        """
        Args:
            model: directory of the artifact, such as `artifacts/fused`.
            batch_size: texts at a time.
            device: computes; `auto`: what there is.
            draws: masks under which a diffusion model reads a text.
            seed: of these masks, and of texts that are written.
            max_length: the most tokens of a text with its context (None: as the model has learned).
            greedy: whether to find out if a diffusion model would write a text by itself (`is_greedy`, which `acc` of
                multiple-choice tasks does not ask for): as many more passes as the text has tokens.
            dtype: of matrix products.
            sampling: how texts are written (`GenerationParams`): `steps`, `sampler`, `block` and so on.

        Raises:
            UserError: there is no such model, or a value is wrong.
        """
        super().__init__()
        sampling.pop("max_batch_size", None)  # the harness gives it to every type; sizes are not searched for here
        if unknown := sampling.keys() - GenerationParams.model_fields.keys():
            raise UserError(f"--model_args {sorted(unknown)[0]}: no such argument of the model type stackwise")
        if not str(batch_size).isdecimal() or not int(batch_size):
            raise UserError(f"--batch_size {batch_size}: expected a number of at least 1")
        if not Path(model).is_dir():
            raise UserError(f"--model_args model={model}: no such directory; expected a rack, such as artifacts/fused")
        kind = (device or "auto").partition(":")[0]
        if kind == "cuda" and not torch.cuda.is_available():  # the harness' default, on every machine
            kind = "auto"
        self._device = choose(ComputeParams(device=kind), where="--device")  # type: ignore[arg-type]
        self._writer = TextGenerator.open(model, context=max_length, device=self._device)
        self._tokenizer, self._sampling, self._seed = self._writer.tokenizer, sampling, seed
        self._length = self._writer.context
        eos_id: int = self._tokenizer.eos_token_id
        self._vocabulary, self._batch_size = Vocabulary(self._writer.mask_id, eos_id), int(batch_size)
        shared: dict[str, Any] = {"dtype": dtype, "batch_size": self._batch_size, "seq_len": self._length}
        self._causal = self._writer.method == "causal"
        parts = (self._writer.rack, self._vocabulary, self._device)
        self._scorer: Scorer
        if self._causal:
            self._scorer = CausalScorer(*parts, **shared)
        else:
            self._scorer = BoundScorer(*parts, seed=seed, draws=draws, greedy=greedy, **shared)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of each continuation after its context, and whether the model would write it."""
        asked = [self._question(*request.args) for request in requests]
        found = [(score.nats, score.greedy) for score in self._scorer.score(asked)]
        for request, answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, answer)
        return found

    def _question(self, context: str, continuation: str) -> Question:
        """As the harness has it for its own types: spaces at the end of a context belong to the continuation."""
        kept = context.rstrip()
        return question(self._tokenizer, kept, context[len(kept) :] + continuation)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Of each text as a whole, in windows as long as the model can read. For causal models they are those of the
        harness; a diffusion model reads one after the other, each without what stands before it."""
        found = []
        for request in requests:
            (text,) = request.args
            (ids,) = encode(self._tokenizer, [text])
            value = sum(score.nats for score in self._scorer.score(self._windows(ids)))
            found.append(value)
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return found

    def _windows(self, ids: Ids) -> list[Question]:
        length = self._length or max(1, len(ids))
        if not self._causal:
            return [Question((), ids[i : i + length]) for i in range(0, len(ids), length)]
        eos_id = self._vocabulary.eos_id
        windows = get_rolling_token_windows(ids, prefix_token=eos_id, max_seq_len=length, context_len=1)
        return [Question(*make_disjoint_window(window)) for window in windows]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context, up to a text that ends it; with the likeliest tokens unless a task
        asks for a temperature."""
        found = []
        for i, request in enumerate(requests):
            context, asked = request.args
            params = self._params(asked)
            assert params.new_tokens is not None
            prompt = self._end_of(context, params.new_tokens)
            (text,) = self._writer.generate([prompt], params, seed=self._seed + i)
            found.append(text.made)
            self.cache_hook.add_partial("generate_until", request.args, text.made)
        return found

    def _params(self, asked: dict[str, Any]) -> GenerationParams:
        """What a task asks for, beneath what was said of the model."""
        until = asked.get("until") or []
        sampled = asked.get("do_sample", asked.get("temperature", 0) > 0)
        wanted = min(asked.get("max_gen_toks", _NEW_TOKENS), (self._length or _NEW_TOKENS + 1) - 1)
        given = {
            "new_tokens": wanted,
            "stop": [until] if isinstance(until, str) else [stop for stop in until if stop],
            "temperature": float(asked.get("temperature", 1.0)) if sampled else 0.0,
            **({"top_p": asked["top_p"]} if sampled and "top_p" in asked else {}),
            **({"top_k": asked["top_k"]} if sampled and asked.get("top_k") else {}),
        }
        return GenerationParams(**given | self._sampling)

    def _end_of(self, context: str, new_tokens: int) -> str:
        """As much of the end of a context as leaves room for what is to be written."""
        if self._length is None:
            return context
        (ids,) = encode(self._tokenizer, [context])
        room = self._length - new_tokens
        return context if len(ids) <= room else self._shortened(ids, room)

    def _shortened(self, ids: Sequence[int], room: int) -> str:
        for cut in range(room, 0, -1):  # a text that is cut within a word may have more tokens than it had there
            text = str(self._tokenizer.decode(list(ids[-cut:])))
            if len(encode(self._tokenizer, [text])[0]) <= room:
                return text
        return ""
