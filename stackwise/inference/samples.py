"""What sampled text is worth: how surprised another model is by it, and how varied it is. Neither means much alone."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from stackwise.inference.intervals import mean, ratio
from stackwise.inference.scoring import Ids, Question, Scorer

Metrics = dict[str, Any]


def weighed(texts: Sequence[Ids], prompts: Sequence[Ids], scorer: Scorer) -> Metrics:
    """Generative perplexity and token entropy of texts, each with its 95 % interval over the texts.

    The perplexity is `exp` of the scorer's mean NLL of a token (Dieleman et al. 2022; Lou et al. 2024). Text that
    repeats itself has a low one, so the entropy of the tokens within a text stands beside it (Zheng et al. 2024): text
    is as good as held-out text only where both are near to those of held-out text.

    Args:
        texts: token ids of what was made, each of at least one.
        prompts: what each was made for, which the scorer sees and does not score.
        scorer: a causal model that has not made them.
    """
    scores = scorer.score([Question(prompt, text) for prompt, text in zip(prompts, texts, strict=True)])
    lengths = np.array([float(len(text)) for text in texts])
    nats = ratio(np.array([-score.nats for score in scores]), lengths)
    return {
        **nats.named("nats_per_token"),
        **nats.exponential().named("perplexity"),
        **mean(np.array([token_entropy(text) for text in texts])).named("token_entropy"),
        "texts": len(texts),
    }


def token_entropy(text: Ids) -> float:
    """Of how often each token occurs in a text, in bits: log2(n) for n different tokens, 0 for a single one repeated.

    It grows with the length of the text: compare texts of the same length.
    """
    counts = np.unique(np.asarray(text), return_counts=True)[1]
    shares = counts / counts.sum()
    return float(-(shares * np.log2(shares)).sum()) + 0.0  # of a single token 0, not -0
