"""How likely racks find texts, and what they choose."""

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stackwise.config.evaluation import EvaluateParams
from stackwise.data.choices import Choice, read_choices
from stackwise.data.tokens import Vocabulary
from stackwise.errors import UserError
from stackwise.inference.choices import accuracy, choose
from stackwise.inference.evaluation import Evaluator
from stackwise.inference.intervals import mean, proportion, ratio
from stackwise.inference.samples import token_entropy, weighed
from stackwise.inference.scoring import BoundScorer, CausalScorer, Question, Scorer, question
from tests.unit.small import CPU, SEQ, VOCAB, new_rack, tokens_of

WORDS = Vocabulary(VOCAB, 0)


def text(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(1, VOCAB, n).tolist()


# --- likelihood


def test_causal_likelihood_is_that_of_the_logits() -> None:
    rack, prompt, own = new_rack(), text(5), text(4, 1)
    logits = rack.logits(torch.tensor([[*prompt, *own]]), causal=True)[0].log_softmax(-1).detach()
    expected = sum(float(logits[4 + i, token]) for i, token in enumerate(own))
    # padded beside another
    longer = Question(text(9), text(2))
    found, _ = CausalScorer(rack, WORDS, CPU).score([Question(prompt, own), longer])
    assert found.nats == pytest.approx(expected, rel=1e-5)
    assert not found.greedy
    best = int(logits[4].argmax())
    assert CausalScorer(rack, WORDS, CPU).score([Question(prompt, [best])])[0].greedy


def test_an_empty_prompt_is_the_end_of_another_text() -> None:
    rack, own = new_rack(), text(6)
    empty, ended = CausalScorer(rack, WORDS, CPU).score([Question([], own), Question([0], own)])
    assert empty == ended


@pytest.mark.parametrize("scorer", [CausalScorer(new_rack(), WORDS, CPU, seq_len=8), None], ids=["causal", "bound"])
def test_of_a_long_prompt_the_end_counts(scorer: Scorer | None) -> None:
    kept = 6 if scorer else 5  # a causal model does not read the last token
    scorer = scorer or BoundScorer(new_rack(), WORDS, CPU, seed=0, seq_len=8)
    prompt = text(20)
    long, short = scorer.score([Question(prompt, text(3, 1)), Question(prompt[-kept:], text(3, 1))])
    assert long.nats == pytest.approx(short.nats, rel=1e-5)
    with pytest.raises(UserError, match="has 10 tokens"):
        scorer.score([Question([], text(10))])


def test_the_causal_scores_of_all_texts_are_probabilities() -> None:
    rack = new_rack(4)
    every = [Question([1, 2], own) for own in itertools.product(range(4), repeat=2)]
    found = CausalScorer(rack, Vocabulary(4, 0), CPU).score(every)
    assert sum(math.exp(score.nats) for score in found) == pytest.approx(1, rel=1e-5)


# --- bound


def exact_bound(rack: Any, prompt: Sequence[int], own: Sequence[int], vocab: int) -> float:
    """The expectation over orders in which the tokens are written, one after the other: the any-order form."""
    total = 0.0
    orders = list(itertools.permutations(range(len(own))))
    for order in orders:
        shown = [vocab] * len(own)
        for at in order:
            tokens = torch.tensor([[*prompt, *shown]])
            t = torch.tensor([shown.count(vocab) / tokens.shape[1]])
            logits = rack.logits(tokens, times=t)[0, len(prompt) + at].log_softmax(-1).detach()
            total += float(logits[own[at]])
            shown[at] = own[at]
    return total / len(orders)


def test_the_bound_of_a_short_text_is_exact() -> None:
    """It is the mean over all orders of writing it (Ou et al. 2024, theorem 2): 7 masks stand for 6 orders."""
    rack, prompt, own = new_rack(), text(4), text(3, 1)
    (found,) = BoundScorer(rack, WORDS, CPU, seed=0, draws=7).score([Question(prompt, own)])
    assert found.nats == pytest.approx(exact_bound(rack, prompt, own, VOCAB), rel=1e-5)


def test_drawn_masks_come_near_the_exact_bound() -> None:
    rack, prompt, own = new_rack(), text(4), text(6, 1)
    (exact,) = BoundScorer(rack, WORDS, CPU, seed=0, draws=63).score([Question(prompt, own)])
    errors = []
    for draws in (16, 62):
        found = [
            BoundScorer(rack, WORDS, CPU, seed=seed, draws=draws).score([Question(prompt, own)])[0].nats
            for seed in range(12)
        ]
        errors.append(np.std(found))
        assert abs(np.mean(found) - exact.nats) < 4 * np.std(found) / math.sqrt(12) + 1e-3
    assert errors[1] < errors[0]


def test_no_bound_of_an_honest_model_is_above_the_likelihood() -> None:
    """The exponentials of the bounds of all texts sum to at most 1, as those of likelihoods sum to 1."""
    rack = new_rack(4)
    every = [Question([1, 2], own) for own in itertools.product(range(4), repeat=3)]
    found = BoundScorer(rack, Vocabulary(4, 0), CPU, seed=0).score(every)
    assert 0.5 < sum(math.exp(score.nats) for score in found) <= 1 + 1e-5


def test_without_a_prompt_it_is_the_bound_of_the_evaluation(tmp_path: Path) -> None:
    rack, own = new_rack(), np.random.default_rng(0).integers(0, VOCAB, (1, SEQ))
    tokens = tokens_of(tmp_path, own)
    at = Evaluator(tokens, EvaluateParams(draws=600, batch_size=300), seed=0, device=CPU, dtype="fp32")
    expected = at.diffusion(rack)["nelbo"]["nats_per_token"]
    (found,) = BoundScorer(rack, WORDS, CPU, seed=1, draws=600, batch_size=300).score([Question([], own[0].tolist())])
    assert -found.nats / SEQ == pytest.approx(expected, rel=0.02)


def test_padding_and_batches_change_nothing() -> None:
    rack = new_rack()
    asked = [Question(text(n), text(m, 1)) for n, m in ((0, 7), (3, 2), (9, 1))]
    together = BoundScorer(rack, WORDS, CPU, seed=0, draws=8).score(asked)
    for own, score in zip(asked, together, strict=True):
        (alone,) = BoundScorer(rack, WORDS, CPU, seed=0, draws=8, batch_size=1).score([own])
        assert alone.nats == pytest.approx(score.nats, rel=1e-5)


def test_greedy_is_what_unmasking_the_surest_first_writes() -> None:
    rack, prompt = new_rack(), text(5)
    shown = [VOCAB] * 3
    while VOCAB in shown:
        logits = rack.logits(torch.tensor([[*prompt, *shown]]))[0, 5:].softmax(-1)
        logits[[i for i, token in enumerate(shown) if token != VOCAB]] = -1
        at, token = divmod(int(logits.argmax()), VOCAB)
        shown[at] = token
    wrong = [*shown[:2], (shown[2] + 1) % VOCAB]
    scorer = BoundScorer(rack, WORDS, CPU, seed=0, greedy=True)
    assert [s.greedy for s in scorer.score([Question(prompt, shown), Question(prompt, wrong)])] == [True, False]


# --- choices


class Letters:
    """A tokenizer: an id for each letter, but `ab` is one token."""

    def __call__(self, texts: list[str], **_: Any) -> Any:
        return SimpleNamespace(input_ids=[list(map(self.id, text.replace("ab", "A"))) for text in texts])

    def id(self, letter: str) -> int:
        return 9 if letter == "A" else 1 + "xcdab".index(letter)


def test_a_token_in_which_prompt_and_text_merge_belongs_to_the_text() -> None:
    assert question(Letters(), "xc", "d") == Question([1, 2], [3])
    assert question(Letters(), "xa", "bd") == Question([1], [9, 3])
    assert question(Letters(), "", "cd") == Question([], [2, 3])


class Length:
    """Finds every token as likely as all others."""

    def score(self, questions: Sequence[Question]) -> list[Any]:
        from stackwise.inference.scoring import Score

        return [Score(-1.0 * len(q.text), False) for q in questions]


def test_accuracy_by_hand() -> None:
    rows = [Choice("x", ("c", "cd"), 0), Choice("x", ("cc", "d"), 0), Choice("x", ("ab", "cd"), 0)]
    nats = choose(rows, Length(), Letters())
    assert nats == [[-1, -2], [-2, -1], [-1, -2]]
    found = accuracy(rows, nats)
    assert found["accuracy"] == pytest.approx(2 / 3)
    # a byte of "ab", which is one token, costs half of any other; elsewhere bytes are equal and the first is taken
    assert found["accuracy_per_byte"] == 1.0
    assert found["margin"] == pytest.approx(1 / 3)
    assert found["chance"] == 0.5
    assert found["accuracy_low"] < 2 / 3 < found["accuracy_high"] < 1


@pytest.mark.parametrize("kind", ["causal", "bound"])
def test_a_model_that_knows_chooses_right(kind: str) -> None:
    """A toy that has learned that every token is followed by its successor."""

    class Successor(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head: Any = torch.nn.Linear(VOCAB, VOCAB, bias=False)
            self.head.weight = torch.nn.Parameter(torch.eye(VOCAB))
            self.head.features = torch.nn.Identity()

        def forward(self, tokens: Tensor, *, causal: bool = False, **_: Any) -> Tensor:
            before = tokens if causal else tokens.roll(1, 1)
            known = torch.nn.functional.one_hot((before + 1) % VOCAB, VOCAB) * 20.0
            return torch.where((before == VOCAB)[..., None], torch.zeros(VOCAB), known)

    class Numbers:
        def __call__(self, texts: list[str], **_: Any) -> Any:
            return SimpleNamespace(input_ids=[[int(part) for part in text.split()] for text in texts])

    rows = [Choice(f"{i} {i + 1}", (f" {i + 2} {i + 3}", f" {i + 3} {i + 2}"), 0) for i in range(1, 9)]
    rows += [Choice(row.prompt, row.choices[::-1], 1) for row in rows]
    rack: Any = Successor()
    scorer: Scorer = CausalScorer(rack, WORDS, CPU) if kind == "causal" else BoundScorer(rack, WORDS, CPU, seed=0)
    found = accuracy(rows, choose(rows, scorer, Numbers()))
    assert found["accuracy"] == found["accuracy_high"] == 1.0
    assert found["accuracy_low"] > found["chance"]
    assert found["margin"] > 1


GOOD_ROW = {"prompt": "a", "choices": ["b", "c"], "answer": 1}


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("{", "line 2: not JSON"),
        ("[]", "line 2: '[]'"),
        ({"prompt": "a", "choices": ["b", "c"]}, "line 2: no answer"),
        ({**GOOD_ROW, "prompt": 1}, "prompt = 1: expected a text"),
        ({**GOOD_ROW, "choices": ["b"]}, "at least two"),
        ({**GOOD_ROW, "choices": ["b", ""]}, "none of them empty"),
        ({**GOOD_ROW, "choices": ["b", "b"]}, "twice"),
        ({**GOOD_ROW, "answer": 2}, "answer = 2: expected a number from 0 to 1"),
        ({**GOOD_ROW, "answer": "d"}, "answer = 'd'"),
        ({**GOOD_ROW, "answer": True}, "answer = True"),
    ],
)
def test_bad_rows_are_refused_by_line(row: object, says: str, tmp_path: Path) -> None:
    file = tmp_path / "choices.jsonl"
    file.write_text(json.dumps(GOOD_ROW) + "\n" + (row if isinstance(row, str) else json.dumps(row)) + "\n")
    with pytest.raises(UserError) as refused:
        read_choices(file)
    assert str(file) in str(refused.value)
    assert says in str(refused.value)


def test_bad_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_choices(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="no rows"):
        read_choices(tmp_path / "empty.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="UTF-8"):
        read_choices(tmp_path / "binary.jsonl")


def test_an_answer_may_be_the_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({**GOOD_ROW, "answer": "c"}) + "\n\n")
    assert read_choices(tmp_path / "a.jsonl") == [Choice("a", ("b", "c"), 1)]


# --- intervals


def test_intervals_by_hand() -> None:
    found = mean(np.array([1.0, 2.0, 3.0]))
    half = 4.30265273 / math.sqrt(3)  # Student's t with 2 degrees of freedom
    assert (found.value, found.low, found.high) == pytest.approx((2, 2 - half, 2 + half))
    weighted = ratio(np.array([1.0, 3.0]), np.array([2.0, 4.0]))
    assert weighted.value == pytest.approx(4 / 6)
    wilson = proportion(8, 10)
    assert (wilson.low, wilson.high) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    assert proportion(0, 5).low == 0.0
    assert proportion(5, 5).high == 1.0
    assert proportion(5, 5).low > 0.5


# --- samples


def test_perplexity_of_known_text_is_its_nll(tmp_path: Path) -> None:
    rack, samples = new_rack(), np.random.default_rng(0).integers(1, VOCAB, (5, SEQ))
    found = weighed(samples.tolist(), [[] for _ in samples], CausalScorer(rack, WORDS, CPU))
    behind_an_end = np.concatenate((np.zeros((5, 1), int), samples), axis=1)
    tokens = tokens_of(tmp_path, behind_an_end)
    expected = Evaluator(tokens, EvaluateParams(), seed=0, device=CPU, dtype="fp32").next_token(rack)
    for end in ("", "_low", "_high"):
        assert found["nats_per_token" + end] == pytest.approx(expected["nats_per_token" + end], rel=1e-5)
        assert found["perplexity" + end] == pytest.approx(math.exp(expected["nats_per_token" + end]), rel=1e-5)


def test_of_a_sample_only_what_was_made_is_scored() -> None:
    rack, prompt, own = new_rack(), text(4), text(5, 1)
    scorer = CausalScorer(rack, WORDS, CPU)
    found = weighed([own], [prompt], scorer)
    (score,) = scorer.score([Question(prompt, own)])
    assert found["nats_per_token"] == pytest.approx(-score.nats / 5)


def test_token_entropy_by_hand() -> None:
    assert token_entropy([7, 7, 7]) == 0
    assert token_entropy([1, 2, 3, 4]) == pytest.approx(2)
    assert token_entropy([1, 1, 2, 3]) == pytest.approx(1.5)
