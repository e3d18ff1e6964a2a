"""Multiple choice without training: which of some texts does a rack find likeliest after a prompt?"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from stackwise.data.choices import Choice
from stackwise.inference.intervals import mean, proportion
from stackwise.inference.scoring import Scorer, question

Metrics = dict[str, Any]


def choose(rows: Sequence[Choice], scorer: Scorer, tokenizer: Any) -> list[list[float]]:
    """How likely each choice of each row is (nats; of a diffusion model a lower bound)."""
    asked = [question(tokenizer, row.prompt, text) for row in rows for text in row.choices]
    scores = iter(scorer.score(asked))
    return [[next(scores).nats for _ in row.choices] for row in rows]


def accuracy(rows: Sequence[Choice], nats: Sequence[Sequence[float]]) -> Metrics:
    """What share of the answers is right, with Wilson's 95 % intervals, beside chance.

    `accuracy` takes the likeliest choice, `accuracy_per_byte` the likeliest by UTF-8 byte, which does not prefer short
    ones (`acc` and `acc_norm` of lm-evaluation-harness). `margin` is by how many nats the right choice is likelier than
    the best wrong one, on average.

    Args:
        rows: the questions.
        nats: what `choose` has found.
    """
    plain = normed = 0
    margins = []
    for row, own in zip(rows, nats, strict=True):
        by_byte = [value / len(text.encode()) for value, text in zip(own, row.choices, strict=True)]
        plain += _best(own) == row.answer
        normed += _best(by_byte) == row.answer
        margins.append(own[row.answer] - max(value for i, value in enumerate(own) if i != row.answer))
    return {
        **proportion(plain, len(rows)).named("accuracy"),
        **proportion(normed, len(rows)).named("accuracy_per_byte"),
        **mean(np.array(margins)).named("margin"),
        "chance": sum(1 / len(row.choices) for row in rows) / len(rows),
        "rows": len(rows),
    }


def _best(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)
