"""Text from racks: what tokens are chosen, left to right, by unmasking, and what is shown of it."""

import io
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stackwise.config.data import TokenizerParams
from stackwise.config.generation import GenerationParams
from stackwise.config.model import AttentionParams, MLPParams, ModelParams, TimeParams
from stackwise.data.tokenizer import build_tokenizer
from stackwise.errors import UserError
from stackwise.generation.choosing import Choice, penalized
from stackwise.generation.decoding import continue_texts
from stackwise.generation.draws import draws_of_text
from stackwise.generation.generator import Piece, TextGenerator
from stackwise.generation.packing import PackedLinear, TransposedLinear, packed
from stackwise.generation.prompts import read_prompts
from stackwise.generation.streaming import TextStream
from stackwise.generation.unmasking import Order, unmask
from stackwise.growth.init import initialize
from stackwise.model.rack import Rack, RackShape
from tests.unit.test_inference import Predictor
from workflow.screen import Screen

VOCAB = 17
MODEL = ModelParams(d_model=16, attention=AttentionParams(n_heads=2), mlp=MLPParams(hidden=24))
A = AttentionParams
VARIANTS: dict[str, dict[str, Any]] = {
    "standard": {},
    "gqa": {"attention": A(type="gqa", n_heads=4, n_kv_heads=2, qk_norm=True)},
    "mla": {"attention": A(type="mla", n_heads=2, mla_rkv=6, mla_rq=5)},
    "kernel": {"attention": A(type="kernel", n_heads=2)},
    "mlgka": {"attention": A(type="mlgka", n_heads=2, n_kv_heads=1, mla_rkv=6)},
    "yarn": {"attention": A(n_heads=2, rope_scaling="yarn", rope_factor=4.0, rope_original_len=8)},
    "moe": {"mlp": MLPParams(type="moe", hidden=8, n_experts=3, top_k=2, n_shared=1)},
    "frozen up": {"mlp": MLPParams(hidden=24, frozen_up=True)},
    "timed": {"time": TimeParams(mode="input", width=8)},
    "documents": {"document_mask": True},
    "documents, kernel": {"document_mask": True, "attention": A(type="kernel", n_heads=2)},
    "tied": {"tie_embeddings": True},
}


def new_rack(vocab: int = VOCAB, *, entries: Sequence[float] = (), **changes: Any) -> Rack:
    """With fp64 weights, so that no two numbers that differ in their rounding are a different choice."""
    model = MODEL.model_copy(update=changes)
    shape = RackShape.of(model, (1, 1), vocab)
    rack = Rack(RackShape(shape.model, shape.stacks, vocab, 16, 16, tuple(entries)))
    for name, part in rack.named_children():
        initialize(part, name=name, seed=0)
    with torch.no_grad():
        for name, weight in rack.named_parameters():
            if "embeddings" in name:
                weight.mul_(100)
            elif "modulation" in name:
                weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name))) * 0.3)
    return rack.double().eval()


def draws(n: int, seed: int = 0) -> list[np.random.Generator]:
    return [draws_of_text(seed, i) for i in range(n)]


def chi_square(counts: Any, probabilities: Any) -> float:
    counts, probabilities = np.asarray(counts, float), np.asarray(probabilities, float)
    expected = counts.sum() * probabilities
    return float(((counts - expected) ** 2 / expected).sum())


# --- choosing

GRID = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
"""Chance itself: what is chosen over all of it are the probabilities."""


def shares(choice: Choice, logits: Tensor) -> Tensor:
    """How often each token is chosen."""
    chosen = choice.choose(logits.expand(len(GRID), -1), GRID)
    return torch.bincount(chosen, minlength=len(logits)) / len(GRID)


LOGITS = torch.tensor([0.3, 2.0, -1.0, 1.9, 0.0, -0.5])


@pytest.mark.parametrize("temperature", [1.0, 0.3, 4.0])
def test_tokens_are_chosen_by_their_probabilities(temperature: float) -> None:
    torch.testing.assert_close(
        shares(Choice(temperature), LOGITS), (LOGITS / temperature).softmax(0), atol=2e-5, rtol=0
    )


def test_no_temperature_takes_the_likeliest() -> None:
    assert shares(Choice(0.0), LOGITS).tolist() == [0, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("k", [1, 2, 4, 6, 50])
def test_top_k_draws_from_the_k_likeliest(k: int) -> None:
    kept = LOGITS.sort(descending=True).values[min(k, 6) - 1] <= LOGITS
    expected = (LOGITS / 0.7).masked_fill(~kept, -torch.inf).softmax(0)
    torch.testing.assert_close(shares(Choice(0.7, top_k=k), LOGITS), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize(("p", "kept"), [(1e-6, 1), (0.35, 1), (0.45, 2), (0.75, 2), (0.85, 3), (1.0, 6)])
def test_top_p_draws_from_the_fewest_with_that_probability(p: float, kept: int) -> None:
    order = LOGITS.argsort(descending=True)
    probabilities = LOGITS.softmax(0)
    assert probabilities[order].cumsum(0)[kept - 1] >= p - 1e-6
    assert kept == 1 or probabilities[order].cumsum(0)[kept - 2] < p
    expected = torch.zeros(6)
    expected[order[:kept]] = probabilities[order[:kept]] / probabilities[order[:kept]].sum()
    torch.testing.assert_close(shares(Choice(top_p=p), LOGITS), expected, atol=2e-5, rtol=0)


def test_top_p_looks_at_what_top_k_has_left() -> None:
    assert (shares(Choice(top_k=2, top_p=0.5), LOGITS) > 0).tolist() == [False, True, False, False, False, False]


def test_the_largest_draw_chooses_a_token_that_can_be() -> None:
    last = torch.tensor([1.0 - 2**-53], dtype=torch.float64)
    logits = torch.full((1, 1000), -torch.inf)
    logits[0, :3] = 0.0
    assert Choice().choose(logits, last).item() == 2
    assert Choice(top_k=500).choose(logits, last).item() in (0, 1, 2)


def test_penalty_makes_what_has_occurred_less_likely() -> None:
    seen = torch.tensor([True, True, True, False, False, True])
    found = penalized(LOGITS[None], seen[None], 2.0)[0]
    assert found.tolist() == pytest.approx([0.15, 1.0, -2.0, 1.9, 0.0, -1.0])


# --- left to right


def continued(rack: Any, prompts: list[list[int]], new: list[int], *, seed: int = 0, **options: Any) -> list[list[int]]:
    texts: list[list[int]] = [[] for _ in prompts]

    def accept(row: int, token: int) -> bool:
        texts[row].append(token)
        return True

    settings: dict[str, Any] = {"choice": Choice(), "eos_id": 3, **options}
    continue_texts(rack, prompts, new, draws=draws(len(prompts), seed), accept=accept, **settings)
    return texts


def by_full_passes(rack: Rack, prompt: list[int], new: int, choice: Choice, row: int) -> list[int]:
    """The same without a cache and alone."""
    ids, uniforms = list(prompt), draws_of_text(0, row).random(new)
    for u in uniforms:
        tokens = torch.tensor([ids])
        segments = None
        if rack.shape.model.document_mask:
            segments = torch.tensor([[sum(t == 3 for t in ids[:i]) for i in range(len(ids))]])
        with torch.no_grad():
            logits = rack.logits(tokens, causal=True, segments=segments)[:, -1]
        ids.append(int(choice.choose(logits, torch.tensor([u]))))
    return ids[len(prompt) :]


PROMPTS = [[5, 1, 3, 9, 9, 2, 11], [4], [7, 3, 1], [7, 7, 1]]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_batch_with_a_cache_is_as_each_alone_without(variant: str) -> None:
    rack, choice, new = new_rack(**VARIANTS[variant]), Choice(0.9), [12, 9, 12, 1]
    together = continued(rack, PROMPTS, new, choice=choice)
    for row, prompt in enumerate(PROMPTS):
        assert together[row] == by_full_passes(rack, prompt, new[row], choice, row)
    assert len(set(map(tuple, together))) == 4


def test_the_seed_makes_the_text() -> None:
    rack = new_rack()
    first = continued(rack, PROMPTS, [9] * 4)
    torch.manual_seed(5)  # the global generator has no part in it
    assert continued(rack, PROMPTS, [9] * 4) == first
    assert continued(rack, PROMPTS, [9] * 4, seed=1) != first


def test_repetition_penalty_counts_prompt_and_text() -> None:
    rack, prompts = new_rack(), [[5, 1, 2], [8]]
    found = continued(rack, prompts, [9, 9], choice=Choice(0.0), repetition_penalty=1.4)
    for ids, text in zip(prompts, found, strict=True):
        for token in text:
            with torch.no_grad():
                logits = rack.logits(torch.tensor([ids]), causal=True)[0, -1]
            for old in {*ids}:
                logits[old] *= 1 / 1.4 if logits[old] > 0 else 1.4
            assert int(logits.argmax()) == token
            ids.append(token)
    assert found != continued(rack, [[5, 1, 2], [8]], [9, 9], choice=Choice(0.0))


class Chain(Predictor):
    """The next token depends on the latest one."""

    transitions = torch.tensor([[0.1, 0.6, 0.3], [0.3, 0.2, 0.5], [0.7, 0.2, 0.1]])

    def __init__(self) -> None:
        super().__init__(3)
        self.causal: list[bool] = []

    def forward(self, tokens: Tensor, *, causal: bool = False, **kwargs: Any) -> Tensor:
        self.causal.append(causal)
        return super().forward(tokens, **kwargs)

    def predict(self, tokens: Tensor) -> Tensor:
        return self.transitions.log()[tokens]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_texts_follow_the_chain(temperature: float) -> None:
    rack = Chain()
    drawn = torch.tensor(continued(rack, [[2]] * 800, [8] * 800, choice=Choice(temperature)))
    assert all(rack.causal)
    whole = torch.cat([torch.full((800, 1), 2), drawn], dim=1)
    sharpened = Chain.transitions ** (1 / temperature)
    sharpened /= sharpened.sum(1, keepdim=True)
    for state in range(3):
        counts = torch.bincount(whole[:, 1:][whole[:, :-1] == state], minlength=3)
        assert chi_square(counts, sharpened[state]) < 13.8  # 2 degrees of freedom, p = 0.001


# --- unmasking

ANCESTRAL, CONFIDENCE = Order("ancestral", 6), Order("confidence", 6)
ORDERS = {
    "ancestral": ANCESTRAL,
    "confidence": CONFIDENCE,
    "ancestral blocks": Order("ancestral", 6, block=5),
    "confidence blocks": Order("confidence", 6, block=5),
    "more steps than tokens": Order("confidence", 100),
    "one step": Order("confidence", 1),
}
MASKED = [VOCAB] * 12
TEXTS = [MASKED, [4, VOCAB, 3, VOCAB, VOCAB, 7, 7], [1, 2, 3, *[VOCAB] * 9], [1, 2, 5]]


def unmasked(rack: Any, texts: list[list[int]], order: Order = ANCESTRAL, *, seed: int = 0, **options: Any) -> Any:
    settings: dict[str, Any] = {"choice": Choice(), "eos_id": 3, **options}
    return unmask(rack, texts, order=order, draws=draws(len(texts), seed), **settings)


@pytest.mark.parametrize("name", ORDERS)
def test_what_is_given_stays_and_no_mask_does(name: str) -> None:
    found = unmasked(new_rack(), TEXTS, ORDERS[name])
    for text, given in zip(found, TEXTS, strict=True):
        assert all(t == g for t, g in zip(text, given, strict=True) if g != VOCAB)
        assert 0 <= min(text) <= max(text) < VOCAB
    assert unmasked(new_rack(), TEXTS, ORDERS[name]) == found
    assert unmasked(new_rack(), TEXTS, ORDERS[name], seed=1) != found


@pytest.mark.parametrize("name", ["ancestral", "confidence blocks"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_batch_is_as_each_alone(variant: str, name: str) -> None:
    rack, order = new_rack(**VARIANTS[variant]), ORDERS[name]
    together = unmasked(rack, TEXTS, order)
    for row, text in enumerate(TEXTS):
        alone = unmask(rack, [text], order=order, choice=Choice(), draws=[draws_of_text(0, row)], eos_id=3)
        assert alone == [together[row]]


@pytest.mark.parametrize("name", ORDERS)
def test_given_tokens_never_change_on_the_way(name: str) -> None:
    seen: dict[int, list[list[int]]] = {i: [text] for i, text in enumerate(TEXTS)}
    found = unmasked(new_rack(), TEXTS, ORDERS[name], watch=lambda row, ids: seen[row].append(ids.tolist()))
    for row, states in seen.items():
        assert states[-1] == found[row]
        for before, after in itertools.pairwise(states):
            assert sum(b != a for b, a in zip(before, after, strict=True)) >= 1
            assert all(b in (VOCAB, a) for b, a in zip(before, after, strict=True))


class Unigram(Predictor):
    """Predicts one distribution, whatever it sees."""

    probabilities = torch.tensor([0.1, 0.2, 0.3, 0.4])

    def __init__(self) -> None:
        super().__init__(4)

    def predict(self, tokens: Tensor) -> Tensor:
        return self.probabilities.log().expand(*tokens.shape, -1)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_ancestral_draws_from_the_prediction(temperature: float) -> None:
    drawn = torch.tensor(unmasked(Unigram(), [[4] * 20] * 500, choice=Choice(temperature)))
    sharpened = Unigram.probabilities ** (1 / temperature)
    counts = torch.bincount(drawn.flatten(), minlength=4)
    assert chi_square(counts, sharpened / sharpened.sum()) < 16.3  # 3 degrees of freedom, p = 0.001
    per_position = torch.stack([torch.bincount(column, minlength=4) for column in drawn.T])
    assert max(chi_square(c, sharpened / sharpened.sum()) for c in per_position) < 21.1  # p = 0.0001


def test_ancestral_reveals_at_equal_pace() -> None:
    rack, seq, steps = Unigram(), 8000, 8
    unmasked(rack, [[4] * seq], Order("ancestral", steps))
    assert len(rack.seen) == steps
    for step, state in enumerate(rack.seen):
        share = 1 - step / steps
        error = math.sqrt(share * (1 - share) / seq)
        assert abs(float((state == 4).float().mean()) - share) <= 4 * error


def test_steps_that_reveal_nothing_take_no_pass() -> None:
    rack = Unigram()
    unmasked(rack, [[4] * 5], Order("ancestral", 1000))
    assert len(rack.seen) <= 5
    rack = Unigram()
    unmasked(rack, [[4] * 5], Order("confidence", 1000))
    assert len(rack.seen) == 5
    rack = Unigram()
    unmasked(rack, [[1, 2, 3]])
    assert not rack.seen


class Pair(Predictor):
    """Exact conditionals of two tokens that depend on each other."""

    joint = torch.tensor([[0.45, 0.05], [0.1, 0.4]])

    def __init__(self) -> None:
        super().__init__(2)

    def predict(self, tokens: Tensor) -> Tensor:
        logits = torch.empty(*tokens.shape, 2)
        for position, joint in ((0, self.joint), (1, self.joint.T)):
            # rows: what stands at the other position; the last row is for the mask
            table = torch.cat([joint.T / joint.sum(0)[:, None], joint.sum(1)[None]])
            logits[:, position] = table.log()[tokens[:, 1 - position]]
        return logits


@pytest.mark.parametrize("order", [Order("ancestral", 1), Order("ancestral", 2), Order("ancestral", 2, block=1)])
def test_ancestral_has_the_right_joint_distribution(order: Order) -> None:
    """Two tokens are revealed at once, and then independently, in one of `steps` cases; never in two blocks."""
    drawn = torch.tensor(unmasked(Pair(), [[2, 2]] * 4000, order))
    counts = torch.bincount(drawn[:, 0] * 2 + drawn[:, 1], minlength=4)
    independent = torch.outer(Pair.joint.sum(1), Pair.joint.sum(0))
    at_once = 0.0 if order.block else 1 / order.steps
    expected = (1 - at_once) * Pair.joint + at_once * independent
    assert chi_square(counts, expected.flatten()) < 16.3
    if at_once < 1:
        assert chi_square(counts, independent.flatten()) > 200


class MarkovText(Predictor):
    """Exact conditionals of a text whose tokens follow a Markov chain, given any of them."""

    first = torch.tensor([0.5, 0.3, 0.2])

    def __init__(self) -> None:
        super().__init__(3)

    def predict(self, tokens: Tensor) -> Tensor:
        """Forward-backward."""
        seq = tokens.shape[1]
        known = torch.where((tokens == 3)[..., None], 1.0, torch.eye(4)[tokens][..., :3])
        forward, backward = [self.first.expand(len(tokens), -1)], [torch.ones(len(tokens), 3)]
        for i in range(1, seq):
            forward.append((forward[-1] * known[:, i - 1]) @ Chain.transitions)
            backward.insert(0, (backward[0] * known[:, seq - i]) @ Chain.transitions.T)
        joint = torch.stack(forward, 1) * torch.stack(backward, 1)
        return (joint / joint.sum(-1, keepdim=True)).log()


@pytest.mark.parametrize("order", [Order("ancestral", 32), Order("ancestral", 32, block=2)])
@pytest.mark.parametrize("given", [None, 1])
def test_ancestral_has_the_marginals_of_a_markov_chain(order: Order, given: int | None) -> None:
    """Of all positions, with nothing given, or with the token in the middle; and those of the pairs of neighbours."""
    text = [3] * 5 if given is None else [3, 3, given, 3, 3]
    drawn = torch.tensor(unmasked(MarkovText(), [text] * 1500, order))
    exact = {whole: float(MarkovText.first[whole[0]]) for whole in itertools.product(range(3), repeat=5)}
    for whole in exact:
        exact[whole] *= math.prod(float(Chain.transitions[a, b]) for a, b in itertools.pairwise(whole))
    likely = {whole: p for whole, p in exact.items() if given in (None, whole[2])}
    total = sum(likely.values())
    for i in range(5):
        marginal = torch.tensor([sum(p for w, p in likely.items() if w[i] == v) / total for v in range(3)])
        if given is not None and i == 2:
            assert (drawn[:, 2] == given).all()
        else:
            assert chi_square(torch.bincount(drawn[:, i], minlength=3), marginal) < 18.4  # p = 0.0001
    for i in range(4):
        pairs = torch.tensor(
            [
                sum(p for w, p in likely.items() if w[i : i + 2] == pair) / total
                for pair in itertools.product(range(3), repeat=2)
            ]
        )
        counts = torch.bincount(drawn[:, i] * 3 + drawn[:, i + 1], minlength=9)[pairs > 0]
        assert chi_square(counts, pairs[pairs > 0]) < 45  # 8 degrees: one step in 32 reveals both at once


class Sure(Predictor):
    """Knows every token; the surer, the further to the right, but of the first it is the surest."""

    def __init__(self) -> None:
        super().__init__(4)

    def predict(self, tokens: Tensor) -> Tensor:
        seq = tokens.shape[1]
        places = torch.arange(seq, dtype=torch.float32)
        places[0] = seq
        logits = torch.zeros(*tokens.shape, 4)
        logits[..., 1] = 30 + places  # of probability 1 - 3 exp(-30 - place): equal in fp32
        logits[..., 2] = 22 + places * 2
        return logits


def test_confidence_reveals_the_surest_first() -> None:
    order: list[list[int]] = []
    rack, text = Sure(), [4] * 6
    unmasked(rack, [text], Order("confidence", 3), choice=Choice(0.0), watch=lambda _, ids: order.append(ids.tolist()))
    sure = (rack.predict(torch.tensor([text])).log_softmax(-1).max(-1).values[0]).tolist()
    revealed = [[i for i in range(6) if now[i] != before[i]] for before, now in itertools.pairwise([text, *order])]
    assert [len(places) for places in revealed] == [2, 2, 2]
    assert min(sure[i] for i in revealed[0]) >= max(sure[i] for i in (*revealed[1], *revealed[2]))
    assert min(sure[i] for i in revealed[1]) >= max(sure[i] for i in revealed[2])


@pytest.mark.parametrize(("total", "steps"), [(10, 3), (7, 5), (5, 100), (1, 2), (9, 2)])
def test_confidence_reveals_evenly(total: int, steps: int) -> None:
    states: list[int] = [total]
    unmasked(
        Unigram(), [[4] * total], Order("confidence", steps), watch=lambda _, ids: states.append(int((ids == 4).sum()))
    )
    counts = [before - after for before, after in itertools.pairwise(states)]
    assert len(counts) == min(steps, total)
    assert sum(counts) == total
    assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("sampler", ["ancestral", "confidence"])
def test_blocks_are_done_from_left_to_right(sampler: Any) -> None:
    states: list[np.ndarray] = []
    text = [4, 4, 1, 4, 4, 4, 4, 2, 4]  # seven masked tokens: blocks of three, three and one
    rack = Unigram()
    unmasked(rack, [text], Order(sampler, 7, block=3), watch=lambda _, ids: states.append(ids == 4))
    blocks = [[0, 1, 3], [4, 5, 6], [8]]
    for masked in states:
        done = [not masked[block].any() for block in blocks]
        begun = [not masked[block].all() for block in blocks]
        assert all(done[i] or not begun[i + 1] for i in range(2))
    assert all((seen[0] == 4).sum() >= 1 for seen in rack.seen)


def test_models_are_told_the_share_that_is_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[list[float], list[float]]] = []
    forward = Rack.forward

    def watched(self: Rack, tokens: Tensor, *, times: Tensor, **others: Any) -> Tensor:
        told.append((times.tolist(), (tokens == VOCAB).double().mean(dim=1).tolist()))
        return forward(self, tokens, times=times, **others)

    monkeypatch.setattr(Rack, "forward", watched)
    unmasked(new_rack(time=TimeParams(mode="input", width=8)), [MASKED, [1, 2, 3, *MASKED[3:]]])
    assert len(told) > 3
    for times, masked in told:
        assert times == pytest.approx(masked)
    assert told[0][0] == [1.0, 0.75]


ENTRIES = (0.9, 0.4)


@pytest.mark.parametrize("name", ORDERS)
def test_texts_enter_higher_as_their_masks_become_fewer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[tuple[int, float]] = []
    forward = Rack.forward

    def watched(self: Rack, tokens: Tensor, *, entry: int = 0, times: Tensor, **others: Any) -> Tensor:
        passes.extend((entry, float(t)) for t in times)
        return forward(self, tokens, entry=entry, times=times, **others)

    whole = unmasked(new_rack(), TEXTS, ORDERS[name])
    assert unmasked(new_rack(entries=(0.9, 0.0)), TEXTS, ORDERS[name]) == whole
    monkeypatch.setattr(Rack, "forward", watched)
    assert unmasked(new_rack(), TEXTS, ORDERS[name]) == whole
    assert {entry for entry, _ in passes} == {0}
    passes.clear()
    rack = new_rack(entries=ENTRIES)
    assert unmasked(rack, TEXTS, ORDERS[name]) != whole or name == "one step"
    assert all(entry == int(share <= 0.4) for entry, share in passes)
    assert {entry for entry, _ in passes} == {0, 1} or name == "one step"


def test_text_behind_an_end_sees_nothing_before_it() -> None:
    rack = new_rack(document_mask=True)
    texts = [[a, b, 3, VOCAB, VOCAB, VOCAB] for a in (1, 9) for b in (2, 6)]
    found = [unmask(rack, [t], order=CONFIDENCE, choice=Choice(), draws=draws(1), eos_id=3)[0][3:] for t in texts]
    assert len(set(map(tuple, found))) == 1
    plain = [unmask(new_rack(), [t], order=CONFIDENCE, choice=Choice(), draws=draws(1), eos_id=3)[0] for t in texts]
    assert len({tuple(t[3:]) for t in plain}) > 1


# --- layout


@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_weights_are_the_same_map(variant: str, rows: int) -> None:
    plain, other = (new_rack(**VARIANTS[variant]).float() for _ in range(2))
    packed(other, rows)
    assert isinstance(other.head.packed, PackedLinear if rows > 1 else TransposedLinear)
    left = {name.split(".")[-1] for name, part in other.named_modules() if type(part) is torch.nn.Linear}
    assert left <= {"projection", "kv_b_proj", "hidden", "output"}
    for shape in ((1, 1), (3, 7)):
        tokens = torch.randint(0, VOCAB + 1, shape, generator=torch.Generator().manual_seed(1))
        with torch.inference_mode():
            for causal in (False, True):
                torch.testing.assert_close(
                    other.logits(tokens, causal=causal), plain.logits(tokens, causal=causal), atol=2e-4, rtol=1e-4
                )


def test_other_formats_are_left_as_they_are() -> None:
    assert packed(new_rack(), 16).head.packed is None


# --- text


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tokenizer(TokenizerParams(type="byte", vocab_size=None), lambda: iter(()))


def generator(tokenizer: Any, method: Any = "diffusion", **options: Any) -> TextGenerator:
    return TextGenerator(new_rack(257), tokenizer, method=method, **{"context": 24, **options})


def test_masks_in_prompts(tokenizer: Any) -> None:
    texts = ["ab[MASK]c[MASK:3]", "[MASK:2]", "none", "", "[MASK:0][MASK:x]"]
    ids = [prompt.ids(257) for prompt in read_prompts(texts, tokenizer)]
    assert ids[0] == [97, 98, 257, 99, 257, 257, 257]
    assert ids[1] == [257, 257]
    assert ids[2] == list(b"none")
    assert ids[3] == []
    assert ids[4] == list(b"[MASK:0][MASK:x]")  # text like any other
    assert [prompt.masked for prompt in read_prompts(texts, tokenizer)] == [True, True, False, False, False]


class Bytes:
    """A text whose ids are its bytes."""

    @staticmethod
    def decode(ids: Sequence[int]) -> str:
        return bytes(ids).decode(errors="replace")


def streamed(text: bytes, stop: Sequence[str] = (), prompt: bytes = b"") -> list[str]:
    stream = TextStream(Bytes.decode, prompt, stop)
    parts = []
    for token in text:
        parts.append(stream.add(token))
        if stream.stopped:
            break
    return [*parts, stream.end()]


def test_characters_appear_when_they_are_whole() -> None:
    text = "a\u00e9\u20ac\U0001f600b"
    parts = streamed(text.encode())
    assert "".join(parts) == text
    assert [p for p in parts if p] == list(text)
    assert streamed(b"a\xf0\x9f") == ["a", "", "", "\ufffd"]  # what does not become a character is shown at the end
    assert "".join(streamed(b"\x80\x80\x80ab" * 9)) == (b"\x80\x80\x80ab" * 9).decode(errors="replace")


def test_long_texts_stream_in_full() -> None:
    text = "".join(chr(c) for c in range(200, 900) if chr(c).isprintable())
    assert "".join(streamed(text.encode(), prompt="\u00e9".encode())) == text


@pytest.mark.parametrize(
    ("text", "stop", "found"),
    [
        ("one. two. three", [". "], "one"),
        ("aab", ["ab"], "a"),
        ("abac abad", ["abad"], "abac "),
        ("nothing", ["x"], "nothing"),
        ("ends with a", ["ab"], "ends with a"),
        ("first of both", ["both", "of"], "first "),
        ("abcabd", ["abd", "bca"], "a"),
        ("\u20ac!", ["!"], "\u20ac"),
        ("x", ["x"], ""),
    ],
)
def test_text_ends_before_what_stops_it(text: str, stop: list[str], found: str) -> None:
    parts = streamed(text.encode(), stop)
    assert "".join(parts) == found
    for stopped in stop:  # nothing of it was ever shown
        shown = list(itertools.accumulate(parts))
        assert not any(part and found != text and part.endswith(stopped) for part in shown)


@pytest.mark.parametrize("method", ["causal", "diffusion"])
def test_texts_depend_on_the_seed_and_their_place_alone(tokenizer: Any, method: Any) -> None:
    prompts = ["One", "Another text", "", "One"]
    params = GenerationParams(new_tokens=9, temperature=0.9)
    whole = generator(tokenizer, method).generate(prompts, params, seed=4)
    assert [text.prompt for text in whole] == prompts
    for size in (1, 3):
        assert generator(tokenizer, method, batch_size=size).generate(prompts, params, seed=4) == whole
    assert generator(tokenizer, method).generate(prompts[:3], params, seed=4) == whole[:3]
    assert whole[0].made != whole[3].made
    assert generator(tokenizer, method).generate(prompts, params, seed=5) != whole
    for text in whole:
        assert text.text == text.prompt + text.made
        assert bytes(b for b in text.ids if b < 256).decode(errors="replace") == text.text or 256 in text.ids


class Writer(Predictor):
    """Writes one text over and over, whatever it sees; by unmasking, each position by its place."""

    def __init__(self, text: bytes, end: int | None = None) -> None:
        super().__init__(257)
        self.text = [*text] if end is None else [*text[:end], 256, *text[end:]]

    def predict(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1]) + 1
        ids = torch.tensor(self.text)[places % len(self.text)]
        return torch.nn.functional.one_hot(ids, 257).float().expand(len(tokens), -1, -1) * 50


@pytest.mark.parametrize("method", ["causal", "diffusion"])
def test_a_text_ends_where_the_model_ends_it(tokenizer: Any, method: Any) -> None:
    made = TextGenerator(Writer(b"abcdefgh", end=5), tokenizer, method=method, context=8)  # type: ignore[arg-type]
    shift = "a" if method == "causal" else "ab"
    (text,) = made.generate([shift], GenerationParams(temperature=0.0))
    assert text.ended == "end"
    assert shift + "bcde"[len(shift) - 1 :] == text.text if method == "causal" else text.text.startswith("ab")
    assert 256 not in text.ids
    (whole,) = made.generate([shift], GenerationParams(temperature=0.0, ends=False))
    assert whole.ended == "length"
    assert len(whole.ids) == 8
    assert 256 in whole.ids


@pytest.mark.parametrize("method", ["causal", "diffusion"])
def test_a_text_ends_before_a_stop(tokenizer: Any, method: Any) -> None:
    made = TextGenerator(Writer("0123456789 \u20ac".encode()), tokenizer, method=method, context=14)  # type: ignore[arg-type]
    (text,) = made.generate(["0"], GenerationParams(temperature=0.0, stop=["78", "56"]))
    assert text.ended == "stop"
    assert text.made == ("1234" if method == "causal" else "234")
    assert text.ids[-1] == ord("6")


def test_infilling_tells_what_is_made(tokenizer: Any) -> None:
    (text,) = generator(tokenizer).generate(["The [MASK:3] of [MASK]."])
    given = [piece.text for piece in text.pieces if not piece.made]
    assert given == ["The ", " of ", "."]
    assert [piece.made for piece in text.pieces] == [False, True, False, True, False]
    assert len(text.ids) == len("The ... of ..")
    (more,) = generator(tokenizer).generate(["The [MASK:3]"], GenerationParams(new_tokens=4))
    assert len(more.ids) == 11


def test_watching_changes_nothing(tokenizer: Any) -> None:
    class Watching:
        def __init__(self) -> None:
            self.texts: dict[int, str] = {}
            self.states: list[Sequence[Piece | int]] = []

        def wrote(self, index: int, text: str) -> None:
            self.texts[index] = self.texts.get(index, "") + text

        def unmasked(self, index: int, pieces: Sequence[Piece | int]) -> None:
            self.states.append(pieces)

    params, watching = GenerationParams(new_tokens=10), Watching()
    causal = generator(tokenizer, "causal")
    assert causal.generate(["a", "bc"], params, watcher=watching) == causal.generate(["a", "bc"], params)
    assert watching.texts == {i: text.made for i, text in enumerate(causal.generate(["a", "bc"], params))}
    diffusion = generator(tokenizer)
    assert diffusion.generate(["a[MASK:4]b"], watcher=watching) == diffusion.generate(["a[MASK:4]b"])
    assert all(sum(p if isinstance(p, int) else 0 for p in state) < 4 for state in watching.states)
    assert isinstance(watching.states[-1][0], Piece)


@pytest.mark.parametrize(
    ("method", "prompt", "params", "message"),
    [
        ("causal", "a[MASK]", {}, r"prompt 1 \('a\[MASK\]'\): this model writes from left to right and cannot fill in"),
        (
            "causal",
            "x" * 20,
            {"new_tokens": 5},
            "its 20 tokens and 5 new ones are 25, .* texts of 24; ask for at most 4",
        ),
        ("diffusion", "x" * 30, {}, "its 30 tokens and 1 new ones are 31, .*; ask for a shorter prompt"),
        ("diffusion", "[MASK:25]", {}, "are 25, and the model has learned from texts of 24"),
        (
            "causal",
            "a",
            {"steps": 3},
            "steps = 3: has no effect on a model that writes from left to right; leave it out",
        ),
        ("causal", "a", {"block": 3}, "block = 3: has no effect"),
        (
            "diffusion",
            "a",
            {"repetition_penalty": 2.0},
            "repetition_penalty = 2.0: has no effect on a model that unmasks",
        ),
    ],
)
def test_what_cannot_be_is_said(tokenizer: Any, method: Any, prompt: str, params: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        generator(tokenizer, method).generate([prompt], GenerationParams(**params))


def test_without_a_context_the_length_must_be_given(tokenizer: Any) -> None:
    with pytest.raises(UserError, match="new_tokens = null: expected a number"):
        generator(tokenizer, context=None).generate(["a"])
    (text,) = generator(tokenizer, context=None).generate(["a"], GenerationParams(new_tokens=40))
    assert len(text.ids) == 41


# --- on the terminal


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def show(tokenizer: Any, out: io.StringIO, prompts: list[str], method: Any, *, live: bool = True) -> list[str]:
    screen = Screen(out, prompts=prompts, live=live)
    texts = generator(tokenizer, method).generate(prompts, GenerationParams(new_tokens=6), seed=2, watcher=screen)
    for i, text in enumerate(texts):
        screen.done(i, text)
    return [text.text for text in texts]


@pytest.mark.parametrize("live", [True, False])
@pytest.mark.parametrize("method", ["causal", "diffusion"])
def test_a_file_gets_the_text_alone(tokenizer: Any, method: Any, live: bool) -> None:
    out = io.StringIO()
    (text,) = show(tokenizer, out, ["ab"], method, live=live)
    assert out.getvalue() == text + "\n"
    out = io.StringIO()
    first, second = show(tokenizer, out, ["ab", "c"], method, live=live)
    assert out.getvalue() == f"--- 1 of 2 ---\n{first}\n--- 2 of 2 ---\n{second}\n"


def test_a_terminal_sees_the_masks_give_way(tokenizer: Any) -> None:
    out = Terminal()
    (text,) = show(tokenizer, out, ["ab"], "diffusion")
    frames = out.getvalue().split("\r")
    assert sum("░" in frame for frame in frames) >= 2
    masks = [frame.count("░") for frame in frames]
    assert masks == sorted(masks, reverse=True)
    assert out.getvalue().endswith(f"\033[1mab\033[0m{text[2:]}\n")
    plain = Terminal()
    show(tokenizer, plain, ["ab"], "diffusion", live=False)
    assert "░" not in plain.getvalue()
