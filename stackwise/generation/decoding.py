"""Left to right: one token after the other, each from all before it, with a decoding cache."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from stackwise.generation.choosing import Choice, penalized
from stackwise.model.context import segments_of_documents
from stackwise.model.rack import Rack

_PADDING = -1
"""The segment in front of a text."""


@torch.inference_mode()
def continue_texts(
    rack: Rack,
    prompts: Sequence[Sequence[int]],
    new_tokens: Sequence[int],
    *,
    choice: Choice,
    draws: Sequence[np.random.Generator],
    accept: Callable[[int, int], bool],
    eos_id: int,
    repetition_penalty: float = 1.0,
) -> None:
    """Continue some texts together, each as it would be alone.

    The prompts pass through the rack at once, shorter ones padded in front; then every pass takes the latest token of
    each text. A pass over the padding is wasted, so texts of like lengths go best together.

    Args:
        rack: a model with causal attention, in evaluation mode.
        prompts: ids of each, at least one.
        new_tokens: how many to add at most, to each.
        choice: how tokens are chosen.
        draws: the chance in each text; a number is drawn for every token.
        accept: is told the number of a text and its next token, and says whether it goes on.
        eos_id: the end of a text, for racks with a document mask.
        repetition_penalty: see `penalized`; tokens of the prompt have occurred too.
    """
    device, n = rack.embeddings.mask.device, len(prompts)
    longest = max(map(len, prompts))
    capacity = longest + max(new_tokens)
    pads = torch.tensor([longest - len(prompt) for prompt in prompts], device=device)
    tokens = torch.tensor([[eos_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    padding = pads if bool(pads.any()) else None
    segments = _Segments(tokens, pads, eos_id if rack.shape.model.document_mask else None, capacity)
    uniforms = np.stack([own.random(max(new_tokens)) for own in draws], axis=1)  # [new, n]
    seen = None
    if repetition_penalty != 1.0:
        seen = torch.zeros(n, rack.shape.vocab_size, dtype=torch.bool, device=device)
        for row, prompt in enumerate(prompts):
            seen[row, torch.tensor(prompt, device=device)] = True

    cache = rack.new_cache(n, capacity)
    going = [count > 0 for count in new_tokens]
    for step in range(max(new_tokens)):
        x = rack(tokens, causal=True, cache=cache, padding=padding, segments=segments.until(longest + step))
        logits = rack.head(x[:, -1])
        if seen is not None:
            logits = penalized(logits, seen, repetition_penalty)
        chosen = choice.choose(logits, torch.from_numpy(uniforms[step]).to(device))
        for row, token in enumerate(chosen.tolist()):
            going[row] = going[row] and accept(row, token) and step + 1 < new_tokens[row]
        if not any(going):
            return
        tokens = chosen[:, None]
        segments.add(tokens)
        if seen is not None:
            seen.scatter_(1, tokens, True)


class _Segments:
    """The segments of texts that grow; none, if all see all that is before them."""

    def __init__(self, tokens: Tensor, pads: Tensor, eos_id: int | None, capacity: int) -> None:
        """
        Args:
            tokens: `[n, seq]`, padded in front.
            pads: positions of padding `[n]`.
            eos_id: ends a segment; None if there is but one in a text.
            capacity: the most positions.
        """
        self._eos_id = eos_id
        self._segments: Tensor | None = None
        self._length = tokens.shape[1]
        if eos_id is None and not bool(pads.any()):
            return
        outside = torch.arange(self._length, device=tokens.device) < pads[:, None]
        own = torch.zeros_like(tokens)
        self._latest = own[:, -1]
        if eos_id is not None:
            own = segments_of_documents(tokens.masked_fill(outside, -1), eos_id)
            self._latest = own[:, -1] + (tokens[:, -1] == eos_id)
        self._segments = tokens.new_zeros(len(tokens), capacity)
        self._segments[:, : self._length] = own.masked_fill(outside, _PADDING)

    def add(self, tokens: Tensor) -> None:
        """The next token of each text `[n, 1]`."""
        if self._segments is not None:
            self._segments[:, self._length] = self._latest
            if self._eos_id is not None:
                self._latest = self._latest + (tokens[:, 0] == self._eos_id)
        self._length += 1

    def until(self, end: int) -> Tensor | None:
        """Those of the first `end` positions `[n, end]`."""
        return None if self._segments is None else self._segments[:, :end]
