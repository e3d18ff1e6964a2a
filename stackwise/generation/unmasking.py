"""Unmasking: a text whose masked tokens are revealed step by step, each step from all that is known by then."""

from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stackwise.config.generation import GenerationParams
from stackwise.generation.choosing import Choice
from stackwise.model.context import segments_of_documents
from stackwise.model.rack import Rack

_LOGITS = 2**26
"""The most logits that are in memory at once."""
Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Order:
    """Which masked tokens are revealed when.

    - `ancestral` (Sahoo et al. 2024, MDLM, algorithm 2, with the linear schedule): the time runs from 1 to 0 in equal
      steps; in a step from t to s every masked token is revealed with probability (t - s) / t, whatever the model says.
    - `confidence` (Chang et al. 2022, MaskGIT; Nie et al. 2025, LLaDA): every step reveals as many tokens, those to
      which the model gives the highest probability.

    With `block` the masked tokens are cut into blocks from left to right, and a block is begun when the one before it
    is done (semi-autoregressive, as in LLaDA: those behind it stay masked and are seen as such). The steps are shared
    out among the blocks by their sizes, at least one each.
    """

    sampler: Literal["ancestral", "confidence"] = "ancestral"
    steps: int = 64
    block: int | None = None

    @classmethod
    def of(cls, params: GenerationParams) -> "Order":
        """What the parameters describe."""
        return cls(params.sampler, params.steps, params.block)


@dataclass(frozen=True)
class _Question:
    """What a text asks of the model: a token for some of its positions."""

    places: Ids
    """`[m]`."""
    uniforms: NDArray[np.float64]
    """`[m]`: see `Choice.choose`."""


_Answer = tuple[Ids, NDArray[np.float32]]
"""The tokens chosen `[m]`, and their log-probabilities `[m]`."""


@torch.inference_mode()
def unmask(
    rack: Rack,
    texts: Sequence[Sequence[int]],
    *,
    order: Order,
    choice: Choice,
    draws: Sequence[np.random.Generator],
    eos_id: int,
    watch: Callable[[int, Ids], None] | None = None,
) -> list[list[int]]:
    """Reveal the masked tokens of some texts together, each as it would be alone; all others stay what they are.

    The model is told the share of a text's tokens that is masked, if it asks for a time. Where depth is time
    (`RackShape.entries`) a text enters the higher the fewer of its tokens are masked, and passes by the stacks that
    have learned more noise. A step that reveals nothing takes no pass: there are at most as many as masked tokens.

    Args:
        rack: a model with bidirectional attention, in evaluation mode.
        texts: ids of each; those to be revealed are the mask's, V.
        order: which of them when.
        choice: how tokens are chosen.
        draws: the chance in each text.
        eos_id: the end of a text, which cuts segments in racks with a document mask.
        watch: is told the number of a text and its ids after each step that has revealed some; it must not change them.

    Returns:
        The ids of each text, none of them masked.
    """
    mask_id = rack.shape.vocab_size
    state = [np.array(text, dtype=np.int64) for text in texts]
    asking = {}
    for i, (text, own) in enumerate(zip(state, draws, strict=True)):
        asking[i] = _reveal(text, np.flatnonzero(text == mask_id), order, own)
    questions = {i: question for i, asks in asking.items() if (question := next(asks, None)) is not None}
    while questions:
        answers = _answer(rack, state, questions, choice, eos_id)
        after = {}
        for i, answer in answers.items():
            with suppress(StopIteration):  # it is done
                after[i] = asking[i].send(answer)
            if watch is not None:
                watch(i, state[i])
        questions = after
    return [text.tolist() for text in state]


def _reveal(text: Ids, masked: Ids, order: Order, draws: np.random.Generator) -> Generator[_Question, _Answer, None]:
    """Reveal the positions `masked` of a text in place."""
    size = order.block or len(masked)
    ends = [*range(size, len(masked), size), len(masked)] if len(masked) else []
    start = 0
    for end in ends:
        # Shared out so that all blocks together take `order.steps`, if there are not more blocks than steps.
        until, before = (round(order.steps * place / len(masked)) for place in (end, start))
        by = _by_chance if order.sampler == "ancestral" else _by_confidence
        yield from by(text, masked[start:end], max(1, until - before), draws)
        start = end


def _by_chance(text: Ids, left: Ids, steps: int, draws: np.random.Generator) -> Generator[_Question, _Answer, None]:
    for step in range(steps):
        now = draws.random(len(left)) < 1 / (steps - step)
        if now.any():
            places, left = left[now], left[~now]
            text[places], _ = yield _Question(places, draws.random(len(places)))


def _by_confidence(text: Ids, left: Ids, steps: int, draws: np.random.Generator) -> Generator[_Question, _Answer, None]:
    total = len(left)
    steps = min(steps, total)
    for step in range(steps):
        tokens, confidence = yield _Question(left, draws.random(len(left)))
        # Of equally sure ones the first; what is left after each step falls evenly.
        ranks = np.argsort(-confidence, kind="stable")
        count = len(left) - (total - total * (step + 1) // steps)
        now = np.zeros(len(left), dtype=bool)
        now[ranks[:count]] = True
        text[left[now]], left = tokens[now], left[~now]


def _answer(
    rack: Rack, state: list[Ids], questions: dict[int, _Question], choice: Choice, eos_id: int
) -> dict[int, _Answer]:
    """One pass of the texts that ask, or one for each depth at which they enter."""
    mask_id, found = rack.shape.vocab_size, {}
    shares = {i: float((state[i] == mask_id).mean()) for i in questions}
    entries = {i: rack.shape.entry(share) for i, share in shares.items()}
    for entry in sorted(set(entries.values())):
        rows = [i for i in questions if entries[i] == entry]
        x = _features(rack, [state[i] for i in rows], [shares[i] for i in rows], entry, eos_id)
        lengths = [len(questions[i].places) for i in rows]
        owners = torch.arange(len(rows)).repeat_interleave(torch.tensor(lengths))
        places = torch.from_numpy(np.concatenate([questions[i].places for i in rows]))
        uniforms = torch.from_numpy(np.concatenate([questions[i].uniforms for i in rows]))
        tokens, sure = _choose(rack, x[owners.to(x.device), places.to(x.device)], uniforms, choice)
        for i, own, confidence in zip(rows, tokens.split(lengths), sure.split(lengths), strict=True):
            found[i] = (own.numpy(), confidence.numpy())
    return found


def _features(rack: Rack, texts: list[Ids], shares: list[float], entry: int, eos_id: int) -> Tensor:
    """The residual stream below the head `[n, longest, d_model]`."""
    device = rack.embeddings.mask.device
    lengths = torch.tensor([len(text) for text in texts])
    longest = int(lengths.max())
    tokens = torch.from_numpy(np.stack([np.pad(text, (0, longest - len(text))) for text in texts]))
    segments = None
    if rack.shape.model.document_mask:
        segments = segments_of_documents(tokens, eos_id)
    if int(lengths.min()) < longest:  # behind a short text is padding, a segment of its own
        segments = torch.zeros_like(tokens) if segments is None else segments
        segments[torch.arange(longest) >= lengths[:, None]] = -1
    return rack(
        tokens.to(device),
        times=torch.tensor(shares, device=device),
        segments=None if segments is None else segments.to(device),
        entry=entry,
    )


def _choose(rack: Rack, x: Tensor, uniforms: Tensor, choice: Choice) -> tuple[Tensor, Tensor]:
    """Tokens for some positions `[m, d_model]` and their log-probabilities as the model has them, `[m]` each, on the
    CPU."""
    tokens, sure = [], []
    size = max(1, _LOGITS // rack.shape.vocab_size)
    for part, drawn in zip(x.split(size), uniforms.split(size), strict=True):
        logits = rack.head(part)
        chosen = choice.choose(logits, drawn.to(logits.device))
        tokens.append(chosen.cpu())
        own = logits.gather(1, chosen[:, None])[:, 0].float()
        sure.append((own - logits.float().logsumexp(dim=-1)).cpu())
    return torch.cat(tokens), torch.cat(sure)
