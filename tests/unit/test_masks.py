"""Mask rates, whole words, masks that stay, corruption, and what they become in boundaries and windows."""

import hashlib
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn

from stackwise.artifacts import manifest
from stackwise.artifacts.manifest import Artifact
from stackwise.cache import boundary as boundary_module
from stackwise.cache import sizes
from stackwise.cache.batches import BoundaryBatches
from stackwise.cache.boundary import Boundaries, Link, Source
from stackwise.config.data import TokenizerParams
from stackwise.config.evaluation import EvaluateParams
from stackwise.config.model import AttentionParams, MLPParams, ModelParams, TimeParams
from stackwise.config.objective import ObjectiveParams
from stackwise.config.params import Params, load
from stackwise.data import tokenizer
from stackwise.data.encoding import word_starts
from stackwise.data.order import SampleOrder, groups_of
from stackwise.data.tokens import TokenDataset, Tokens, Vocabulary, open_tokens
from stackwise.errors import UserError
from stackwise.growth.batches import TokenBatches
from stackwise.growth.depth import fraction_of_stack
from stackwise.growth.init import initialize
from stackwise.growth.stack_objectives import objective_of_stack, order_of_stack
from stackwise.growth.stacks import Training
from stackwise.growth.window import Batch
from stackwise.inference.evaluation import Evaluator
from stackwise.model.context import Context
from stackwise.model.embeddings import Embeddings
from stackwise.model.rack import RackShape
from stackwise.objectives.fixed import FixedMaskAssigner
from stackwise.objectives.loss import embedding_loss
from stackwise.objectives.masks import MaskRates, draw_masks
from stackwise.objectives.schedules import MaskScheduler, TimeStepMasking
from stackwise.objectives.targets import CausalObjective, MaskDiffusionObjective, masked_targets
from stackwise.objectives.words import Words
from stackwise.precision.trunk import TrunkStack
from tests.bad_params import GOOD
from tests.unit.growing import CPU, params_with, published, quantized, window_of

VOCAB, SEQ, SAMPLES, EOS = 29, 16, 37, 0
MODEL = ModelParams(d_model=16, attention=AttentionParams(n_heads=2), mlp=MLPParams(hidden=24))
STARTS = np.arange(VOCAB) % 3 == 0


def pairs(n: int, variants: int) -> tuple[np.ndarray, np.ndarray]:
    """Every variant of each of `n` samples."""
    samples, variant = np.divmod(np.arange(n * variants), variants)
    return samples, variant


def some_tokens(n: int, seq: int = SEQ) -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCAB, (n, seq))


# --- schedules and time steps


def test_schedules_follow_their_formulas() -> None:
    progress = np.linspace(0, 1, 11)
    expected = {
        "constant": np.full(11, 0.8),
        "linear": 0.2 + 0.6 * progress,
        "exponential": 0.2 * 4**progress,
        "cosine": 0.5 - 0.3 * np.cos(np.pi * progress),
    }
    for name, values in expected.items():
        scheduler = MaskScheduler(name, 0.2, 0.8)  # type: ignore[arg-type]
        assert [scheduler.fraction(p) for p in progress.tolist()] == pytest.approx(values, rel=1e-12)
    for p in (-0.1, 1.1):
        with pytest.raises(ValueError, match="progress must be in"):
            MaskScheduler("linear", 0.2, 0.8).fraction(p)


def test_time_steps_have_the_fractions_that_are_given() -> None:
    bounds: Any = {"minimum": 0.1, "maximum": 0.9}
    assert TimeStepMasking(5, **bounds).fractions == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9])
    assert TimeStepMasking(3, [0.5, 0.2, 1.0], **bounds).fractions.tolist() == [0.5, 0.2, 1.0]
    some = TimeStepMasking(6, {"4": 0.8, "1": 0.2}, **bounds)
    assert some.fractions == pytest.approx([0.2, 0.2, 0.4, 0.6, 0.8, 0.8])
    assert [some.step_at(u) for u in (0.0, 0.16, 0.17, 0.999)] == [0, 0, 1, 5]
    assert some.fraction(2) == pytest.approx(0.4)
    for wrong in ([0.5], {"6": 0.5}):
        with pytest.raises(ValueError, match=r"for 6 steps|from 0 to 5"):
            TimeStepMasking(6, wrong, **bounds)


@pytest.mark.parametrize("fractions", [[0.3, 0.9, 0.1, 0.5], {"0": 0.2, "3": 0.8}])
def test_masks_of_time_steps(fractions: Any) -> None:
    """Each step has the same share of the (sample, variant) pairs, and its masks have its fraction."""
    params = ObjectiveParams(num_time_steps=4, time_step_fractions=fractions, variants=4)
    rates, masks = draw_masks(params, seed=1, samples=pairs(500, 4)[0], variants=pairs(500, 4)[1], seq=40)
    expected = TimeStepMasking(4, fractions, minimum=0.15, maximum=0.9).fractions
    assert sorted(set(rates.tolist())) == pytest.approx(sorted(expected))
    for fraction in expected:
        own = np.isclose(rates, fraction)
        assert own.sum() == 500  # M variants are stratified over as many steps
        assert abs(masks[own].mean() - fraction) < 4 * math.sqrt(fraction * (1 - fraction) / (500 * 40))


def test_default_masks_never_change() -> None:
    """Their bytes, as they were when the first models were trained."""
    digest = hashlib.sha256()
    for params in (ObjectiveParams(), ObjectiveParams(distribution="cosine", count="exact", variants=3, mask_min=0.2)):
        rates, masks = draw_masks(params, seed=5, samples=np.arange(40), variants=np.arange(40) % 7, seq=24)
        digest.update(rates.tobytes() + masks.tobytes())
    assert digest.hexdigest() == "5963d69e90d5af56b16f254e5bc9e4a8f3e43f86739c29c8d6e75e49619a2a23"


# --- the same everywhere


EVERY_KIND: dict[str, dict[str, Any]] = {
    "fixed": {"masks": "fixed", "variants": 3},
    "pool": {"masks": "pool", "pool_size": 20},
    "words": {"unit": "word", "count": "exact"},
    "steps": {"num_time_steps": 3, "time_step_fractions": {"0": 0.1, "2": 0.8}},
    "corrupted": {"type": "mlm", "random_share": 0.1, "keep_share": 0.1},
}


def digest_of_every_kind() -> str:
    """Of tasks of every kind of masks."""
    digest, tokens = hashlib.sha256(), some_tokens(20)
    for kind in EVERY_KIND.values():
        objective = MaskDiffusionObjective(ObjectiveParams(**kind), 5, VOCAB, words=Words(STARTS, EOS))
        task = objective(tokens, np.arange(20), np.arange(20) % 7)
        digest.update(task.inputs.tobytes() + task.times.tobytes() + task.targets.rows.numpy().tobytes())
    return digest.hexdigest()


def test_tasks_are_the_same_in_another_process() -> None:
    code = (
        "import numpy as np; np.random.seed(1); from tests.unit import test_masks as t; print(t.digest_of_every_kind())"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path]), "PYTHONHASHSEED": "1"}
    there = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert there.stdout.strip() == digest_of_every_kind()


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_a_task_depends_on_nothing_else_in_its_batch(kind: str) -> None:
    params, tokens = ObjectiveParams(**EVERY_KIND[kind]), some_tokens(20)
    samples, variants = np.arange(20) * 3, np.arange(20) % 5

    def inputs(chosen: np.ndarray) -> np.ndarray:
        objective = MaskDiffusionObjective(params, 5, VOCAB, words=Words(STARTS, EOS))
        return objective(tokens[chosen], samples[chosen], variants[chosen]).inputs

    together, order = inputs(np.arange(20)), np.random.default_rng(1).permutation(20)
    assert np.array_equal(inputs(order), together[order])
    assert np.array_equal(inputs(np.array([7])), together[7:8])


# --- masks that stay


def test_fixed_masks_are_those_of_the_first_passes_again() -> None:
    params = ObjectiveParams(masks="fixed", variants=3)
    assigner = FixedMaskAssigner(params, seed=2, seq=SEQ)
    samples, passes = pairs(30, 9)
    rates, masks = assigner(samples, passes)
    fresh_rates, fresh = draw_masks(params, seed=2, samples=samples, variants=passes % 3, seq=SEQ)
    assert np.array_equal(masks, fresh)
    assert np.array_equal(rates, fresh_rates)
    assert assigner.index.shape[1] == 3
    assert np.array_equal(assigner.patterns[assigner.index[samples, passes % 3]], masks)
    objective = MaskDiffusionObjective(params, 2, VOCAB)
    tokens = some_tokens(30)[samples]
    assert np.array_equal(objective(tokens, samples, passes).inputs == VOCAB, fresh)
    corrupted = params.model_copy(update={"type": "mlm", "random_share": 0.5})
    inputs = [MaskDiffusionObjective(corrupted, 2, VOCAB)(tokens, samples, p).inputs for p in (passes, passes + 3)]
    assert np.array_equal(inputs[0], inputs[1])  # what stands in place of the tokens comes again, too
    fresh_objective = MaskDiffusionObjective(ObjectiveParams(variants=3), 2, VOCAB)
    assert not np.array_equal(fresh_objective(tokens, samples, passes).inputs == VOCAB, fresh)


def test_identical_patterns_are_stored_once() -> None:
    """Three tokens have only eight masks."""
    assigner = FixedMaskAssigner(ObjectiveParams(masks="fixed"), seed=2, seq=3)
    _, masks = assigner(*pairs(100, 4))
    assert len(np.unique(masks, axis=0)) == len(assigner.patterns) <= 8
    assert len(np.unique(assigner.patterns, axis=0)) == len(assigner.patterns)


def test_pool_masks_come_from_the_pool_at_the_rates_that_are_due() -> None:
    params = ObjectiveParams(masks="pool", pool_size=32, variants=4)
    assigner = FixedMaskAssigner(params, seed=2, seq=64)
    before = assigner.patterns
    assert len(before) == 32
    samples, variants = pairs(200, 4)
    rates, masks = assigner(samples, variants)
    assert np.array_equal(assigner.patterns, before)  # nothing was added to the pool
    assert {m.tobytes() for m in masks} == {m.tobytes() for m in before}
    drawn = MaskRates(params, 2)(samples, variants)
    assert np.abs(rates - drawn).max() < 0.75 / 32 + 1e-9
    assert np.abs(masks.mean(axis=1) - rates).max() < 0.25
    assert len(np.unique(assigner.index[:, 0])) > 20  # samples differ
    small = FixedMaskAssigner(ObjectiveParams(masks="pool", pool_size=100), seed=2, seq=3)
    assert len(small.patterns) <= 8


def test_a_pool_of_one_fraction() -> None:
    """Where a stack owns its mask rate, its pool has that rate."""
    params = ObjectiveParams(masks="pool", pool_size=50, count="exact")
    assigner = FixedMaskAssigner(params, seed=2, seq=SEQ, rates=MaskRates(params, 2, fraction=0.25))
    rates, masks = assigner(*pairs(100, 4))
    assert (rates == 0.25).all()
    assert (masks.sum(axis=1) == 4).all()
    assert len(np.unique(assigner.index)) > 30


# --- corruption and words


def test_bert_corruption_has_its_shares() -> None:
    """80 / 10 / 10 of 60,000 masked tokens within four standard errors (Devlin et al. 2019)."""
    vocab = 1000
    params = ObjectiveParams(type="mlm", mask_min=0.3, mask_max=0.3, random_share=0.1, keep_share=0.1)
    tokens = np.random.default_rng(0).integers(0, vocab, (2000, 100))
    samples, variants = np.arange(2000), np.zeros(2000, int)
    task = MaskDiffusionObjective(params, 3, vocab)(tokens, samples, variants)
    mask = np.isin(np.arange(tokens.size), task.targets.rows.numpy()).reshape(tokens.shape)
    assert np.array_equal(mask, draw_masks(params, seed=3, samples=samples, variants=variants, seq=100)[1])
    assert task.targets.tokens.tolist() == tokens[mask].tolist()  # all are predicted
    assert np.array_equal(task.inputs[~mask], tokens[~mask])
    seen, truth, n = task.inputs[mask], tokens[mask], int(mask.sum())
    hidden, kept = seen == vocab, seen == truth
    error = 4 * math.sqrt(0.1 * 0.9 / n)
    assert abs(hidden.mean() - 0.8) < 2 * error
    assert abs(kept.mean() - 0.1 - 0.1 / vocab) < error  # a random token may be the right one
    others = seen[~hidden & ~kept]
    assert abs(len(others) / n - 0.1) < error
    assert abs(others.mean() - (vocab - 1) / 2) < 4 * vocab / math.sqrt(12 * len(others))
    assert others.min() < 5
    assert others.max() > vocab - 6


def lengths_of(words: np.ndarray) -> list[int]:
    return np.bincount(words).tolist()


def test_words_begin_where_the_table_says_and_after_a_text() -> None:
    starts = np.array([True, True, False, False])  # 0 ends a text
    tokens = np.array([[2, 3, 1, 2, 0, 2, 2, 1], [1, 0, 1, 3, 3, 2, 0, 3]])
    words = Words(starts, 0).of(tokens)
    assert words.tolist() == [[0, 0, 1, 1, 2, 3, 3, 4], [0, 1, 2, 2, 2, 2, 3, 4]]


@pytest.mark.parametrize("count", ["bernoulli", "exact"])
@pytest.mark.parametrize("masks", ["fresh", "fixed"])
def test_whole_words_are_never_split(count: Any, masks: Any) -> None:
    params = ObjectiveParams(unit="word", count=count, masks=masks, mask_min=0.4, mask_max=0.4)
    words, tokens = Words(STARTS, EOS), some_tokens(600, 48)
    task = MaskDiffusionObjective(params, 1, VOCAB, words=words)(tokens, np.arange(600), np.zeros(600, int))
    hidden = task.inputs == VOCAB
    for mask, own in zip(hidden, words.of(tokens), strict=True):
        shares = np.bincount(own, weights=mask) / np.bincount(own)
        assert set(shares.tolist()) <= {0.0, 1.0}
        if count == "exact":  # as near as whole words come: within half the longest
            assert abs(mask.sum() - round(0.4 * 48)) <= max(lengths_of(own)) / 2
    assert hidden.mean() == pytest.approx(0.4, abs=0.02)
    plain = MaskDiffusionObjective(params.model_copy(update={"unit": "token"}), 1, VOCAB)
    assert not np.array_equal(plain(tokens, np.arange(600), np.zeros(600, int)).inputs == VOCAB, hidden)


@pytest.mark.parametrize("kind", ["bpe", "byte", "char"])
def test_table_of_word_starts(kind: Any) -> None:
    text = "The naïve reader's 12 books, read (slowly) — in 2024.\n\nNew\tline. The reader reads the naïve books."
    params = TokenizerParams(type=kind, vocab_size=290 if kind == "bpe" else None)
    tokens = tokenizer.build_tokenizer(params, lambda: iter([text] * 4))
    starts, vocabulary = word_starts(tokens), tokenizer.vocabulary_of(tokens)
    assert starts.shape == (vocabulary.size,)
    assert starts[vocabulary.eos_id]
    (ids,) = tokenizer.encode(tokens, [text])
    words = Words(starts, vocabulary.eos_id).of(np.array([ids]))[0]
    found = [str(tokens.decode(np.array(ids)[words == w].tolist())) for w in range(words[-1] + 1)]
    assert "".join(found) == text
    assert {"The", " naïve", " reader", "'s", " 12", " books", ",", " in", " 2024", " reads"} <= set(found)


def test_pieces_marked_as_continuations_begin_no_word() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["[UNK]", "read", "##ing", "##er", ",", "a", "[SEP]", "[MASK]"]
    backend = Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    wrapped: Any = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[SEP]", mask_token="[MASK]")
    assert word_starts(wrapped).tolist() == [True, True, False, False, True, True, True]


# --- curriculum and groups


def test_places_are_the_inverse_of_the_order() -> None:
    for group in (1, 5):
        order = SampleOrder(SAMPLES, seed=1, stream="s", group=group)
        samples, epochs = order.at(0, 4 * order.n)
        assert order.place_of(samples, epochs).tolist() == list(range(4 * order.n))


def test_samples_of_a_group_stay_together() -> None:
    groups = {tuple(sorted(g)) for g in groups_of(SAMPLES, 5, seed=1).tolist()}
    first, other = (SampleOrder(SAMPLES, seed=1, stream=s, group=5) for s in ("a", "b"))
    for order in (first, other):
        assert order.n == 35  # two are left over
        for epoch in range(3):
            samples, _ = order.at(epoch * 35, 35)
            assert {tuple(sorted(part)) for part in samples.reshape(7, 5).tolist()} == groups
    assert not np.array_equal(first.at(0, 35)[0], other.at(0, 35)[0])
    with pytest.raises(UserError, match=r"model\.time\.sampling = batch: a batch has 38 samples"):
        groups_of(SAMPLES, 38, seed=1)


# --- stacks


def params_of(directory: Path, **sections: Any) -> Params:
    tree: dict[str, Any] = {
        "compute": {"device": "cpu", "threads": 1},
        "trunk": {"activations": "fp32"},
        "stack": {"blocks": 1, "steps": 30, "batch_size": 5},
        "activations": {"directory": str(directory), "shard_mb": 1},
    }
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values} if isinstance(values, dict) else values
    return params_with(**tree)


def test_fractions_by_depth() -> None:
    def fractions(n: int = 3, **sections: Any) -> list[float | None]:
        params = params_of(Path(), **{"n_stacks": 3, **sections})
        return [fraction_of_stack(params, k, params.model.time) for k in range(n)]

    bounds = {"mask_min": 0.1, "mask_max": 0.9}
    assert fractions() == [None] * 3
    assert fractions(objective={**bounds, "schedule": "linear"}) == pytest.approx([0.1, 0.5, 0.9])
    assert fractions(objective={**bounds, "schedule": "exponential"}) == pytest.approx([0.1, 0.3, 0.9])
    assert fractions(objective={**bounds, "schedule": "constant"}) == pytest.approx([0.9] * 3)
    assert fractions(objective={**bounds, "schedule": "linear", "schedule_stacks": 5}) == pytest.approx([0.1, 0.3, 0.5])
    assert fractions(objective={**bounds, "schedule": "linear", "schedule_over": "training"}) == [None] * 3
    depth = {"mode": "depth"}
    assert fractions(objective=bounds, model={"time": depth}) == pytest.approx([0.9, 0.5, 0.1])
    falling = {"time": {**depth, "mapping": "exponential"}}
    assert fractions(objective=bounds, model=falling) == pytest.approx([0.9, 0.3, 0.1])
    own = {"time": {**depth, "mapping": "custom", "time_per_stack": [0.2, 0.7, 0.4]}}
    assert fractions(model=own) == [0.2, 0.7, 0.4]
    assert fractions(1, n_stacks=1, objective={**bounds, "schedule": "linear"}) == [0.1]


class Place:
    """A trunk of three stacks over random tokens."""

    def __init__(self, directory: Path, model: ModelParams) -> None:
        rng = np.random.default_rng(0)
        with manifest.publish(directory / "tokens", kind="tokens", params={}) as draft:
            for split in ("train", "validation"):
                np.save(draft.directory / f"{split}.npy", rng.integers(0, VOCAB, SAMPLES * SEQ).astype(np.uint16))
            np.save(draft.directory / "counts.npy", np.ones(VOCAB, np.int64))
            draft.facts |= {"vocab_size": VOCAB, "eos_id": EOS, "validation": {"bytes": 2, "tokens": 1}}
        self.artifact: Artifact = manifest.read(directory / "tokens", "tokens")
        self.tokens: Tokens = open_tokens(self.artifact, SEQ)
        self.trunk: list[TrunkStack] = []
        self.trainings: list[Training] = []
        params = params_with(model=model, stack={"blocks": 1, "init": "random"})
        for k in range(3):
            assembly = window_of(
                params, f"{k}=new", self.trainings, vocab_size=VOCAB, embeddings_learn=not k, reads_tokens=not k
            )
            with torch.no_grad():
                for parameter in assembly.window.parameters():  # so that times and residuals matter
                    parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(k)))
            self.trainings.append(published(directory / f"stack-{k}", assembly, self.trainings))
            self.trunk.append(quantized(self.trainings[-1].stack(k), directory / f"trunk-{k}", "full"))

    def source(self, params: Params, k: int) -> Source:
        chain = [Link(i, i) for i in range(1, k + 1)]
        return Source(params, self.artifact, self.tokens.train, VOCAB, EOS, self.trunk, chain, Words(STARTS, EOS))


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Place]:
    times: dict[str, dict[str, Any]] = {
        "none": {},
        "batch": {"sampling": "batch"},
        "depth": {"mode": "depth"},
        "input": {"mode": "input", "width": 8},
        "custom": {"mode": "depth", "mapping": "custom", "time_per_stack": [0.9, 0.5, 0.5, 0.2]},
    }
    directory = tmp_path_factory.mktemp("places")
    return {
        name: Place(directory / name, MODEL.model_copy(update={"time": TimeParams(**time)}))
        for name, time in times.items()
    }


def by_hand(place: Place, inputs: np.ndarray, k: int, *, causal: bool, times: np.ndarray) -> Tensor:
    """Boundary `k` of some inputs, through the stacks one after another."""
    context = Context(causal=causal, times=torch.from_numpy(times.astype(np.float32)))
    with torch.no_grad():
        x: Tensor = place.trunk[0].load_embeddings(CPU)(torch.from_numpy(inputs))
        for stack in place.trunk[:k]:
            x = stack.load_stack("fp32", CPU)(x, context)
    return x


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "drawn": ("none", {}),
    "fixed": ("none", {"masks": "fixed"}),
    "pool": ("none", {"masks": "pool", "pool_size": 12}),
    "words": ("none", {"unit": "word"}),
    "corrupted": ("none", {"type": "mlm", "random_share": 0.3, "keep_share": 0.2}),
    "causal": ("none", {"type": "clm"}),
    "a share for each depth": ("none", {"schedule": "linear"}),
    "a share for each step": ("none", {"schedule": "cosine", "schedule_over": "training"}),
    "time is depth": ("depth", {}),
    "times of one's own": ("custom", {}),
    "time is an input": ("input", {"schedule": "linear"}),
    "one time for a batch": ("batch", {}),
}


def setting(places: dict[str, Place], name: str, directory: Path, **stack: Any) -> tuple[Place, Params]:
    place_name, objective = CASES[name]
    place = places[place_name]
    time = place.trunk[0].shape.model.time.model_dump()
    params = params_of(directory, objective={"variants": 2, **objective}, model={"time": time}, stack=stack)
    return place, params


@pytest.mark.parametrize("name", CASES)
def test_targets_and_activations_belong_together(places: dict[str, Place], name: str, tmp_path: Path) -> None:
    """What a window above a boundary is asked for is what the stacks below it did not see, under the same masks."""
    place, params = setting(places, name, tmp_path)
    time, k, train = params.model.time, 2, place.tokens.train
    objective = objective_of_stack(params, k, time, tokens=train, mask_id=VOCAB, words=Words(STARTS, EOS))
    order = order_of_stack(params, k, time, len(train))
    base = TokenBatches(train, order, objective, 5, 1)
    with Boundaries(place.source(params, k), device=CPU).open() as reader:
        batches = BoundaryBatches(base, reader, objective.variants)
        for step in (0, 1, 8, 14, 29, 40):
            (batch,) = batches(step)
            samples, passes = order.at(step * 5, 5)
            variants = passes % objective.variants
            task = objective(train.samples(samples), samples, variants)
            assert batch.times is not None
            assert np.array_equal(batch.times.numpy(), task.times.astype(np.float32))
            assert torch.equal(batch.targets.rows, task.targets.rows)
            truth = by_hand(place, task.inputs, k, causal=objective.causal, times=task.times)
            torch.testing.assert_close(batch.inputs, truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["a share for each depth", "times of one's own"])
def test_a_streamed_boundary_has_the_bits_of_a_chain(
    places: dict[str, Place], name: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streamed in one group of shards, streamed shard by shard, and through stores of the boundaries below."""
    monkeypatch.setattr(sizes, "_BATCH_ROWS", 8)
    monkeypatch.setattr(sizes, "rows_per_shard", lambda *_: 8)
    place, params = setting(places, name, tmp_path)
    params = params.model_copy(update={"trunk": params.trunk.model_copy(update={"activations": dtype})})

    def rows(directory: str) -> Tensor:
        settings = params.activations.model_copy(update={"directory": str(tmp_path / directory)})
        source = place.source(params.model_copy(update={"activations": settings}), 3)
        with Boundaries(source, device=CPU).open() as reader:
            return reader.read(np.arange(2 * SAMPLES))

    source = place.source(params, 3)
    assert source.continues(1) == (name == "times of one's own")  # stacks 1 and 2 share theirs
    assert not source.continues(2)
    streamed = rows("streamed")
    assert len(list((tmp_path / "streamed").iterdir())) <= 2  # a store and its lock
    monkeypatch.setattr(boundary_module, "_GROUP_BYTES", 1)
    assert torch.equal(rows("by shards"), streamed)
    objective = source.objective(Link(3, 3))
    monkeypatch.setattr(Source, "objective", lambda self, link: objective)
    assert source.continues(2)
    assert torch.equal(rows("chained"), streamed)


def test_a_boundary_is_known_by_what_its_masks_depend_on(
    places: dict[str, Place], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(boundary_module, "digest_code", lambda _: "the same code")

    def key(k: int, model: str = "none", objective: dict[str, Any] | None = None, **sections: Any) -> str:
        place = places[model]
        own = {"variants": 2, **(objective or {})}
        return str(place.source(params_of(tmp_path, objective=own, **sections), k).identity(Link(k, k))["key"])

    training = {"schedule": "linear", "schedule_over": "training"}
    short = {**training, "variants": 1}
    same = [
        (key(2), key(2, objective={"masks": "fixed"})),  # a store holds the same masks
        (key(2), key(2, objective={"embedding_weight": 1.0, "weighting": "nelbo"})),
        (key(2), key(2, stack={"steps": 7, "batch_size": 3})),
        (key(2, objective={"schedule": "constant"}), key(2, objective={"schedule": "constant", "mask_min": 0.01})),
        (key(2, "depth"), key(2, "depth", n_stacks=9, objective={"schedule_stacks": 4})),
        (key(2, "custom"), key(2, "custom", n_stacks=3)),
        (key(2, "batch"), key(2, "batch", stack={"steps": 7})),
        # One variant of 37 samples takes 8 steps: the rest of the steps has no influence.
        (key(2, objective=short), key(2, objective=short, stack={"steps": 9})),
    ]
    for one, other in same:
        assert one == other
    different = [
        key(2),
        key(2, objective={"schedule": "linear"}),
        key(2, objective={"schedule": "linear", "schedule_stacks": 9}),
        key(2, objective=training),
        key(2, objective=training, stack={"steps": 7}),
        key(2, objective=training, stack={"batch_size": 3}),
        key(2, objective={"masks": "pool", "pool_size": 8}),
        key(2, objective={"masks": "pool", "pool_size": 9}),
        key(2, objective={"unit": "word"}),
        key(2, objective={"type": "mlm", "random_share": 0.1}),
        key(2, objective={"type": "mlm", "keep_share": 0.1}),
        key(2, objective={"type": "clm"}),
        key(2, objective={"type": "custom"}),
        key(2, objective={"num_time_steps": 4}),
        key(2, objective={"num_time_steps": 4, "time_step_fractions": [0.1, 0.2, 0.3, 0.4]}),
        key(2, "batch"),
        key(2, "batch", stack={"batch_size": 3}),
    ]
    assert len(set(different)) == len(different)


def test_a_curriculum_goes_from_easy_to_hard(places: dict[str, Place], tmp_path: Path) -> None:
    """Each step masks what the schedule says of it, in windows that read tokens and in those above a boundary."""
    place, params = setting(places, "a share for each step", tmp_path, steps=12)
    train = place.tokens.train
    for k in (0, 1):
        objective = objective_of_stack(params, k, params.model.time, tokens=train, mask_id=VOCAB)
        base = TokenBatches(train, order_of_stack(params, k, params.model.time, len(train)), objective, 5, 1)
        times = np.stack([_times(base(step)[0]) for step in range(12)])
        way = (1 - np.cos(np.pi * np.arange(12) / 11)) / 2
        np.testing.assert_allclose(times, np.tile(0.15 + 0.75 * way, (5, 1)).T, rtol=1e-6)
    # Two variants of 37 samples are 15 steps: a longer training revisits them as they are.
    longer = params.model_copy(update={"stack": params.stack.model_copy(update={"steps": 100})})
    objective = objective_of_stack(longer, 1, params.model.time, tokens=train, mask_id=VOCAB)
    order = order_of_stack(longer, 1, params.model.time, len(train))
    samples, passes = order.at(14 * 5, 4)
    rates = objective(train.samples(samples), samples, passes).times
    assert rates == pytest.approx([0.9] * 4)


def _times(batch: Batch) -> np.ndarray:
    assert batch.times is not None
    return batch.times.numpy()


def test_a_batch_shares_its_time(places: dict[str, Place], tmp_path: Path) -> None:
    place, params = setting(places, "one time for a batch", tmp_path)
    train, time = place.tokens.train, params.model.time
    objective = objective_of_stack(params, 0, time, tokens=train, mask_id=VOCAB)
    base = TokenBatches(train, order_of_stack(params, 0, time, len(train)), objective, 5, 1)
    batches = [base(step)[0] for step in range(21)]
    times = np.stack([_times(batch) for batch in batches])
    assert (times == times[:, :1]).all()
    assert len(np.unique(times)) == 21  # another in each batch and pass
    masks = [batch.inputs == VOCAB for batch in batches]
    assert all(len(torch.unique(mask, dim=0)) > 1 for mask in masks)  # though not the same masks
    alone = TokenBatches(
        train,
        SampleOrder(len(train), seed=0, stream="stacks.0"),
        MaskDiffusionObjective(params.objective, 0, VOCAB),
        5,
        1,
    )
    assert len(np.unique(_times(alone(0)[0]))) == 5


CHANGES: dict[str, dict[str, Any]] = {
    "mask_min": {"mask_min": 0.3},
    "schedule": {"schedule": "linear"},
    "schedule_over": {"schedule": "linear", "schedule_over": "training"},
    "schedule_stacks": {"schedule": "linear", "schedule_stacks": 9},
    "num_time_steps": {"num_time_steps": 5},
    "time_step_fractions": {"num_time_steps": 5, "time_step_fractions": {"0": 0.5, "4": 0.6}},
    "masks": {"masks": "fixed"},
    "pool_size": {"masks": "pool", "pool_size": 9},
    "unit": {"unit": "word"},
    "random_share": {"type": "mlm", "random_share": 0.5},
    "keep_share": {"type": "mlm", "keep_share": 0.5},
    "embedding_weight": {"embedding_weight": 0.5},
    "weighting": {"weighting": "nelbo"},
    "type": {"type": "clm"},
}


def test_every_key_changes_what_a_step_sees(places: dict[str, Place], tmp_path: Path) -> None:
    """In the third pass of stack 1, where masks that are fixed come again."""

    def seen(objective: dict[str, Any]) -> tuple[bytes, ...]:
        params = params_of(tmp_path, objective={"variants": 2, **objective})
        train, time = places["none"].tokens.train, params.model.time
        own = objective_of_stack(params, 1, time, tokens=train, mask_id=VOCAB, words=Words(STARTS, EOS))
        (batch,) = TokenBatches(train, order_of_stack(params, 1, time, len(train)), own, 5, 1)(16)
        targets = batch.targets
        parts = (batch.inputs, targets.rows, targets.tokens, targets.weights, torch.tensor(targets.embedding_weight))
        return tuple(part.numpy().tobytes() for part in parts)

    found = {name: seen(objective) for name, objective in CHANGES.items()}
    assert seen({}) not in found.values()
    assert len(set(found.values())) == len(found)
    known = {*CHANGES, "mask_max", "distribution", "count", "variants", "causal"}  # tested elsewhere
    assert known == set(ObjectiveParams.model_fields)


DEPTH: dict[str, Any] = {"model.time": {"mode": "depth"}}
BATCH: dict[str, Any] = {"model.time": {"sampling": "batch"}}
BAD: list[tuple[dict[str, Any], str]] = [
    ({"objective.type": "mlm", "objective.weighting": "nelbo"}, "objective.weighting = nelbo: has no effect with"),
    ({"objective.type": "clm", "objective.weighting": "nelbo"}, "objective.weighting = nelbo: has no effect with"),
    ({"objective.type": "clm", "objective.unit": "word"}, "objective.unit = word: has no effect with"),
    ({"objective.type": "clm", "objective.embedding_weight": 1.0}, "objective.embedding_weight = 1.0: has no effect"),
    ({"objective.type": "clm", "model.time": {"mode": "input"}}, "model.time.mode = input: expected none"),
    ({"objective.type": "clm", **BATCH}, "model.time.sampling = batch: has no effect with objective.type clm"),
    ({"objective.causal": True}, "objective.causal = true: has no effect with objective.type diffusion"),
    ({"objective.random_share": 0.1}, "objective.random_share = 0.1: has no effect with objective.type diffusion"),
    ({"objective.type": "mlm", "objective.random_share": 0.6, "objective.keep_share": 0.5}, "expected at most 0.4"),
    (
        {"fine_tune.mlm": {"objective": "mlm", "random_share": 0.6, "keep_share": 0.5}},
        "fine_tune.mlm.keep_share = 0.5: expected at most 0.4",
    ),
    ({"objective.schedule_over": "training"}, "objective.schedule_over = training: has no effect without"),
    ({"objective.schedule": "linear", "objective.distribution": "cosine"}, "objective.distribution = cosine: has no"),
    ({"objective.schedule": "linear", "objective.num_time_steps": 4}, "objective.num_time_steps = 4: has no effect"),
    ({"objective.schedule_stacks": 4}, "objective.schedule_stacks = 4: has no effect where no mask rate goes by depth"),
    ({"objective.schedule": "linear", "objective.schedule_stacks": 1}, "expected at least n_stacks (2)"),
    ({"objective.schedule": "linear", **DEPTH}, "objective.schedule = linear: cannot be with model.time.mode depth"),
    ({"objective.schedule": "linear", **BATCH}, "model.time.sampling = batch: has no effect with objective.schedule"),
    ({"objective.masks": "pool", "objective.pool_size": 4, **BATCH}, "model.time.sampling = batch: cannot be batch"),
    ({"stacks": [{"batch_size": 8}], **BATCH}, "stacks.0.batch_size = 8: expected that of stack (4)"),
    (
        {"model.time": {"mode": "depth", "mapping": "custom", "time_per_stack": [0.5]}},
        "model.time.time_per_stack = [0.5]: expected a t for each of the n_stacks (2) stacks",
    ),
    ({"objective.masks": "pool"}, "objective.pool_size = null: expected a number"),
    ({"objective.pool_size": 4}, "objective.pool_size = 4: has no effect with objective.masks fresh"),
    ({"objective.masks": "pool", "objective.pool_size": 4, "objective.unit": "word"}, "objective.unit = word: cannot"),
    (
        {
            **{"objective.masks": "pool", "objective.pool_size": 4},
            **{"objective.schedule": "linear", "objective.schedule_over": "training"},
        },
        "objective.schedule_over = training: cannot be training with objective.masks pool",
    ),
    ({"objective.time_step_fractions": [0.5]}, "objective.time_step_fractions = [0.5]: has no effect without"),
    (
        {"objective.num_time_steps": 2, "objective.time_step_fractions": [0.5]},
        "objective.time_step_fractions = [0.5]: expected 2 fractions",
    ),
    (
        {"objective.num_time_steps": 2, "objective.time_step_fractions": {0: 0.5, 2: 0.6}},
        "objective.time_step_fractions = {'0': 0.5, '2': 0.6}: expected steps from 0 to 1",
    ),
    (
        {"objective.num_time_steps": 2, "objective.time_step_fractions": {0: 0.5, 1: 1.5}},
        "expected a list; each item: a number in (0, 1], or a mapping; each value: a number in (0, 1]",
    ),
    (
        {"objective.num_time_steps": 1, "objective.time_step_fractions": [0.5], "objective.mask_min": 0.3},
        "objective.mask_min = 0.3: has no effect with objective.time_step_fractions",
    ),
    ({"objective.type": "custom", "fine_tune": {}}, "data.ids_column = null: expected the name of a column"),
    (
        {"data": {"source": "files", "files": ["x.jsonl"], "ids_column": "x", "labels_column": "y"}},
        "data.ids_column = x: expected the name of a column if objective.type is custom, else null",
    ),
    (
        {
            "data": {"source": "files", "files": ["x.jsonl"], "ids_column": "x", "labels_column": "y"},
            "objective.type": "custom",
        },
        "fine_tune.clm = {batch_size: 4, lr: 0.001, objective: clm, steps: 8}: expected no such branch",
    ),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[message for _, message in BAD])
def test_what_cannot_be_is_said_once(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    tree = yaml.safe_load(GOOD)
    for path, value in changes.items():
        section, _, key = path.partition(".")
        if key:
            tree[section][key] = value
        else:
            tree[section] = value
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError) as error:
        load(tmp_path / "params.yaml")
    assert message in str(error.value)
    assert "\n" not in str(error.value)  # one problem, one message


# --- the other objectives


def test_causal_objective_leaves_out_the_last_position() -> None:
    tokens = some_tokens(4)
    task = CausalObjective()(tokens, np.arange(4), np.zeros(4, int))
    positions = task.targets.rows.numpy() % SEQ
    assert sorted(set(positions.tolist())) == list(range(SEQ - 1))
    assert task.targets.tokens.tolist() == tokens[:, 1:].reshape(-1).tolist()
    assert np.array_equal(task.inputs, tokens)
    assert (task.times == 0).all()


def test_embedding_term() -> None:
    """Its value by hand, and its gradient along a small step; the embeddings learn nothing from it."""
    embeddings = Embeddings(VOCAB, 16)
    initialize(embeddings, name="embeddings", seed=0)
    tokens, mask = some_tokens(3), np.random.default_rng(1).random((3, SEQ)) < 0.4
    targets = masked_targets(tokens, mask, np.array([1.0, 2.0, 4.0]))
    targets.embedding_weight = 0.7
    x = torch.randn(3, SEQ, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def expected(x: Tensor) -> float:
        h, e = x.detach().double(), embeddings.table.detach().double()[torch.from_numpy(tokens)]
        h, e = (part / part.square().mean(-1, keepdim=True).sqrt() for part in (h, e))
        of_rows = (h - e).square().sum(-1) / 16 * torch.tensor([1.0, 2.0, 4.0])[:, None] * torch.from_numpy(mask)
        return 0.7 * float(of_rows.sum()) / (3 * SEQ)

    found = embedding_loss(embeddings, x, targets)
    assert found.item() == pytest.approx(expected(x), rel=1e-4)
    found.backward()
    assert x.grad is not None
    assert embeddings.table.grad is None
    direction = x.grad / x.grad.norm()
    slope = (expected(x + 1e-4 * direction) - expected(x - 1e-4 * direction)) / 2e-4
    assert slope == pytest.approx(float(x.grad.norm()), rel=1e-3)
    assert (x.grad[~torch.from_numpy(mask)] == 0).all()


def test_embedding_term_joins_the_loss_of_a_window(places: dict[str, Place]) -> None:
    """Above the first stack, too, whose embeddings the window then holds, frozen."""
    trainings = places["none"].trainings[:2]
    params = params_with(model=MODEL, objective={"embedding_weight": 0.5})
    window = window_of(params, "2=new", trainings, vocab_size=VOCAB, copies=1, reads_tokens=False).window
    assert window.embeddings is not None
    assert torch.equal(window.embeddings.table, trainings[0].load_embeddings().table)
    assert not any(p.requires_grad for p in window.embeddings.parameters())
    tokens, mask = some_tokens(3), np.random.default_rng(1).random((3, SEQ)) < 0.4
    batch = Batch(torch.randn(3, SEQ, 16), masked_targets(tokens, mask, np.ones(3)))
    plain = window.loss(batch, device=CPU, causal=False)
    batch.targets.embedding_weight = 0.5
    with torch.no_grad():
        own = embedding_loss(window.embeddings, window(batch.inputs, Context()), batch.targets)
    assert own > 0.1
    torch.testing.assert_close(window.loss(batch, device=CPU, causal=False), plain + own)


# --- the bound


class Known(nn.Module):
    """Predicts one distribution, whatever it sees."""

    def __init__(self, probabilities: np.ndarray) -> None:
        super().__init__()
        self.shape = RackShape.of(MODEL, [1], len(probabilities))
        self.head = nn.Module()
        self.head.features = lambda x: x  # type: ignore[assignment]
        self.head.weight = nn.Parameter(torch.from_numpy(np.log(probabilities)).float()[:, None])
        self.times: list[Tensor] = []
        self.masked: list[Tensor] = []

    def forward(self, tokens: Tensor, *, times: Tensor, **_: Any) -> Tensor:
        self.times.append(times)
        self.masked.append((tokens == self.shape.vocab_size).float().mean(dim=1))
        return torch.ones(*tokens.shape, 1)


def measured(directory: Path, probabilities: np.ndarray, text: np.ndarray) -> tuple[dict[str, Any], Known]:
    directory.mkdir(exist_ok=True)
    np.save(directory / "tokens.npy", text.reshape(-1).astype(np.uint16))
    split = TokenDataset(directory / "tokens.npy", text.shape[1])
    tokens = Tokens(
        split, split, Vocabulary(len(probabilities), 0), np.ones(len(probabilities), np.int64), 1.0, directory
    )
    rack = Known(probabilities)
    at = Evaluator(tokens, EvaluateParams(samples=len(text), draws=2), seed=0, device=CPU, dtype="fp32")
    return at.diffusion(rack)["nelbo"], rack  # type: ignore[arg-type]


def test_bound_of_a_uniform_predictor_is_the_logarithm_of_the_vocabulary(tmp_path: Path) -> None:
    bound, rack = measured(tmp_path, np.full(VOCAB, 1 / VOCAB), some_tokens(20))
    assert bound["nats_per_token"] == pytest.approx(math.log(VOCAB), rel=1e-6)
    assert bound["bits_per_byte_high"] == pytest.approx(bound["bits_per_byte"], abs=1e-7)
    assert torch.equal(torch.cat(rack.times), torch.cat(rack.masked))  # it is told the share that is masked


def test_bound_of_the_true_distribution_is_its_entropy(tmp_path: Path) -> None:
    """Independent tokens: no model can be better, and this one is as good. Within three standard errors."""
    probabilities = np.random.default_rng(3).dirichlet(np.ones(VOCAB))
    text = np.random.default_rng(4).choice(VOCAB, (400, SEQ), p=probabilities)
    bound, _ = measured(tmp_path, probabilities, text)
    entropy = -(probabilities * np.log(probabilities)).sum()
    error = 1.5 * (bound["nats_per_token_high"] - bound["nats_per_token"])
    assert 0 < error < 0.15
    assert abs(bound["nats_per_token"] - entropy) < error
