"""Growing a rack: new stacks, fusing, the quantized trunk, boundaries and their stores."""

import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from stackwise.artifacts import manifest
from stackwise.artifacts.manifest import Artifact
from stackwise.cache import boundary as boundary_module
from stackwise.cache import budget
from stackwise.cache.batches import BoundaryBatches
from stackwise.cache.boundary import Boundaries, BoundaryReader, Link, Source, check_identity
from stackwise.cache.store import ActivationStore
from stackwise.config.compute import Precision
from stackwise.config.model import AttentionParams, MLPParams, ModelParams
from stackwise.config.objective import ObjectiveParams
from stackwise.config.params import Params, view
from stackwise.config.training import StackParams
from stackwise.data.order import SampleOrder
from stackwise.data.tokens import Tokens, open_tokens
from stackwise.errors import UserError
from stackwise.growth.assembly import Assembly
from stackwise.growth.batches import TokenBatches
from stackwise.growth.fusing import fuse
from stackwise.growth.init import initialize
from stackwise.growth.racks import load_rack, save_rack
from stackwise.growth.stacks import TrainedStack, Training
from stackwise.growth.window import Batch, Window
from stackwise.model import rope
from stackwise.model.context import Context
from stackwise.model.rack import Rack, RackShape
from stackwise.objectives.masks import draw_masks
from stackwise.objectives.targets import MaskDiffusionObjective, masked_targets
from stackwise.precision import formats
from stackwise.precision.dtypes import DTYPES, autocast
from stackwise.precision.trunk import TrunkStack
from tests.unit.growing import CPU, params_with, published, quantized, window_of

VOCAB, EOS, SEQ, SAMPLES = 29, 28, 64, 100
MODEL = ModelParams(d_model=64, attention=AttentionParams(n_heads=4), mlp=MLPParams(hidden=96))
TIED = MODEL.model_copy(update={"tie_embeddings": True})
ONE = StackParams(blocks=1)


def window_above(
    trainings: Sequence[Training], *, model: ModelParams = MODEL, params: StackParams = ONE, vocab_size: int = VOCAB
) -> Assembly:
    """The next stack, above those that are trained."""
    k = len(trainings)
    return window_of(
        params_with(model=model, stack=params),
        f"{k}=new",
        trainings,
        vocab_size=vocab_size,
        copies=k - 1 if k else None,
        embeddings_learn=not k,
        reads_tokens=not k,
    )


def some_batch(window: Window, index: int) -> Batch:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCAB, (3, SEQ))
    mask = rng.random((3, SEQ)) < 0.5
    if index == 0:
        inputs = torch.from_numpy(np.where(mask, VOCAB, tokens))
    else:
        inputs = torch.from_numpy(rng.standard_normal((3, SEQ, 64)).astype(np.float32))
    return Batch(inputs, masked_targets(tokens, mask, np.ones(3)))


def trained(window: Window, index: int) -> set[str]:
    """Train for two steps; returns the names of the weights that this has changed."""
    before = {name: p.detach().clone() for name, p in window.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in window.parameters() if p.requires_grad], lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        window.loss(some_batch(window, index), device=CPU, causal=False).backward()
        optimizer.step()
    return {name for name, p in window.named_parameters() if not torch.equal(p, before[name])}


def grown(directory: Path, n: int, *, model: ModelParams = MODEL, params: StackParams = ONE) -> list[Training]:
    """The trainings of a rack of `n` stacks."""
    trainings: list[Training] = []
    for k in range(n):
        assembly = window_above(trainings, model=model, params=params)
        trained(assembly.window, k)
        trainings.append(published(directory / f"stack-{k}", assembly, trainings))
    return trainings


def newest(trainings: Sequence[Training]) -> list[TrainedStack]:
    """The stack that each training has added."""
    return [training.stack(k) for k, training in enumerate(trainings)]


def fused(trainings: Sequence[Training]) -> Rack:
    return fuse(trainings, range(len(trainings)), {})


@pytest.fixture(scope="module")
def trainings(tmp_path_factory: pytest.TempPathFactory) -> list[Training]:
    return grown(tmp_path_factory.mktemp("stacks"), 3)


@pytest.fixture(scope="module")
def tied_trainings(tmp_path_factory: pytest.TempPathFactory) -> list[Training]:
    return grown(tmp_path_factory.mktemp("tied"), 3, model=TIED)


def some_tokens() -> Tensor:
    return torch.randint(0, VOCAB + 1, (3, SEQ), generator=torch.Generator().manual_seed(0))


def logits(rack: Rack) -> Tensor:
    with torch.no_grad():
        found: Tensor = rack.logits(some_tokens())
    return found


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- new stacks


def test_copy_starts_from_the_stack_below(trainings: list[Training]) -> None:
    window = window_above(trainings[:1], params=StackParams(blocks=1, init="copy")).window
    assert equal(window.stacks[0].state_dict(), trainings[0].stack(0).load_stack().state_dict())


def test_random_starts_from_its_own_draws(trainings: list[Training]) -> None:
    params = StackParams(blocks=1, init="random")
    window = window_above(trainings[:1], params=params).window
    again = window_above(trainings[:1], params=params).window
    assert equal(window.state_dict(), again.state_dict())
    fresh = window_above([], params=params).window.stacks[0].state_dict()
    for name, weight in window.stacks[0].state_dict().items():
        assert torch.equal(weight, fresh[name]) == (weight.ndim == 1), name


@pytest.mark.parametrize("model", [MODEL, TIED], ids=["untied", "tied"])
def test_zero_preserves_the_function_exactly(
    model: ModelParams, trainings: list[Training], tied_trainings: list[Training], tmp_path: Path
) -> None:
    below = (tied_trainings if model.tie_embeddings else trainings)[:2]
    assembly = window_above(below, model=model, params=StackParams(blocks=3, init="zero"))
    above = published(tmp_path / "zero", assembly, below)
    assert torch.equal(logits(fused([*below, above])), logits(fused(below)))
    changed = trained(assembly.window, 2)  # it is no dead end: everything in it trains
    assert {name for name, p in assembly.window.named_parameters() if p.requires_grad} == changed


def test_zero_makes_the_first_stack_the_identity() -> None:
    window = window_above([], params=StackParams(blocks=2, init="zero")).window
    assert window.embeddings is not None
    with torch.no_grad():
        tokens = some_tokens()
        assert torch.equal(window(tokens, Context()), window.embeddings(tokens))


def test_copy_of_the_first_stack_is_random() -> None:
    """There is nothing to copy."""
    copy, random = (
        window_above([], params=params).window for params in (StackParams(init="copy"), StackParams(init="random"))
    )
    assert equal(copy.state_dict(), random.state_dict())


@pytest.mark.parametrize(("from_blocks", "to_blocks"), [(2, 5), (3, 1), (2, 2)])
def test_copy_into_another_number_of_blocks(tmp_path: Path, from_blocks: int, to_blocks: int) -> None:
    below = grown(tmp_path, 1, params=StackParams(blocks=from_blocks))
    assembly = window_above(below, params=StackParams(blocks=to_blocks, init="copy"))
    source: Any = below[0].stack(0).load_stack().blocks
    target: Any = assembly.window.stacks[0]
    assert len(target.blocks) == to_blocks
    for i, block in enumerate(target.blocks):
        assert equal(block.state_dict(), source[i % from_blocks].state_dict())
    rack = fused([*below, published(tmp_path / "above", assembly, below)])
    assert [stack.blocks for stack in rack.shape.stacks] == [from_blocks, to_blocks]
    assert [len(stack.blocks) for stack in rack.stacks] == [from_blocks, to_blocks]  # type: ignore[arg-type]


def test_head_is_carried_over_and_trains(trainings: list[Training]) -> None:
    for init in ("copy", "zero", "random"):
        window = window_above(trainings[:1], params=StackParams(blocks=1, init=init)).window
        assert equal(window.head.state_dict(), trainings[0].load_head(None).state_dict())
    assert {"head.norm.weight", "head.projection.weight"} <= trained(window, 1)


def test_embeddings_train_with_the_first_stack_only(trainings: list[Training]) -> None:
    first, second = window_above([]).window, window_above(trainings[:1]).window
    assert {"embeddings.table", "embeddings.mask"} <= trained(first, 0)
    assert second.embeddings is None
    assert (trainings[0].artifact.path / "embeddings.safetensors").exists()
    assert not (trainings[1].artifact.path / "embeddings.safetensors").exists()


def test_tied_head_is_frozen_after_the_first_stack(tied_trainings: list[Training]) -> None:
    first = window_above([], model=TIED).window
    assert {"embeddings.table", "head.norm.weight"} <= trained(first, 0)
    assert first.head.weight.requires_grad
    third = window_above(tied_trainings[:2], model=TIED).window
    assert third.embeddings is not None
    assert equal(third.embeddings.state_dict(), tied_trainings[0].load_embeddings().state_dict())
    changed = trained(third, 2)
    assert "head.norm.weight" in changed  # only the norm trains
    assert not any("embeddings" in name for name in changed)
    assert third.head.weight.data_ptr() == third.embeddings.table.data_ptr()


def test_frozen_up_is_carried_along(tmp_path: Path) -> None:
    model = MODEL.model_copy(update={"mlp": MLPParams(hidden=96, frozen_up=True)})
    both = grown(tmp_path, 2, model=model)
    a, b = (s.load_stack().state_dict() for s in newest(both))
    same = {name for name in a if torch.equal(a[name], b[name])}
    assert same == {"blocks.0.mlp.gate_proj.seed", "blocks.0.mlp.up_proj.seed"}
    lower, upper = (stack.blocks[0].mlp.up_proj.value for stack in fused(both).stacks)  # type: ignore[index, union-attr]
    assert torch.equal(lower, upper)
    assert torch.equal(lower, both[0].stack(0).load_stack().blocks[0].mlp.up_proj.value)  # type: ignore[union-attr, arg-type]


def test_new_stack_refuses_what_it_cannot_stand_on(trainings: list[Training]) -> None:
    wider = MODEL.model_copy(update={"d_model": 128})
    another = r"stack-0: is of another architecture or vocabulary; run `dvc repro` or `snakemake`, which train what"
    with pytest.raises(UserError, match=another):
        window_above(trainings[:1], model=wider, params=StackParams(blocks=1, init="random"))
    with pytest.raises(UserError, match=another):
        window_above(trainings[:1], vocab_size=VOCAB + 1)
    with pytest.raises(UserError, match=r"stack 0: none of the trainings given holds its weights; run `dvc repro`"):
        window_above(trainings[1:2])


# --- racks


@pytest.mark.parametrize("model", [MODEL, TIED], ids=["untied", "tied"])
def test_fused_rack_is_its_stacks_one_after_the_other(
    model: ModelParams, trainings: list[Training], tied_trainings: list[Training]
) -> None:
    parts = tied_trainings if model.tie_embeddings else trainings
    rack = fused(parts)
    embeddings = parts[0].load_embeddings()
    with torch.no_grad():
        x = embeddings(some_tokens())
        for stack in newest(parts):
            x = stack.load_stack()(x)
        expected = parts[-1].load_head(embeddings)(x)
    assert torch.equal(logits(rack), expected)
    assert rack.shape == RackShape.of(model, (1, 1, 1), VOCAB)
    tied = rack.head.weight.data_ptr() == rack.embeddings.table.data_ptr()
    assert tied == model.tie_embeddings
    assert all(p.requires_grad for p in rack.parameters())  # in joint fine-tuning everything trains, tied or not
    assert trained(Window.of(rack), 0) == {name for name, _ in Window.of(rack).named_parameters()}


def test_fused_stacks_lie_in_the_order_that_is_asked_for(trainings: list[Training]) -> None:
    rack = fuse(trainings, [2, 0, 1], {})
    for place, k in enumerate([2, 0, 1]):
        assert equal(rack.stacks[place].state_dict(), trainings[k].stack(k).load_stack().state_dict())


def test_fuse_refuses_what_does_not_belong_together(trainings: list[Training], tmp_path: Path) -> None:
    a, b, c = trainings
    for parts in ([b, a, c], [a, c], [a, a]):
        with pytest.raises(UserError, match=r"stack-\d: did not go on from the training in .*stack-\d; run `dvc"):
            fused(parts)
    other = window_above([])
    trained(other.window, 0)
    trained(other.window, 0)
    stranger = published(tmp_path / "stranger", other)
    with pytest.raises(UserError, match=r"stack-1: did not go on from the training in .*stranger; run"):
        fused([stranger, b])
    model = MODEL.model_copy(update={"norm_eps": 1e-5})
    with pytest.raises(UserError, match="another: is of another architecture or vocabulary; run"):
        fused([published(tmp_path / "another", window_above([], model=model)), b])
    with pytest.raises(UserError, match="stack 2: none of the trainings given holds its weights; run"):
        fuse([a, b], [0, 1, 2], {})
    with pytest.raises(UserError, match="embeddings: none of the trainings given holds them; run"):
        fuse([b, c], [1, 2], {})


@pytest.mark.parametrize("model", [MODEL, TIED], ids=["untied", "tied"])
def test_rack_survives_the_disk(
    model: ModelParams, trainings: list[Training], tied_trainings: list[Training], tmp_path: Path
) -> None:
    rack = fused(tied_trainings if model.tie_embeddings else trainings)
    rack.stacks[1].blocks[0].mlp.gate_proj.requires_grad_(False)  # type: ignore[index, union-attr]
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "t.json").write_text("{}")
    (tmp_path / "rack").mkdir()
    save_rack(tmp_path / "rack", rack, tmp_path / "tokenizer")
    loaded = load_rack(tmp_path / "rack")
    assert torch.equal(logits(loaded), logits(rack))
    assert loaded.shape == rack.shape
    assert equal(loaded.state_dict(), rack.state_dict())
    assert (tmp_path / "rack" / "tokenizer" / "t.json").exists()
    with safe_open(tmp_path / "rack" / "model.safetensors", framework="pt") as f:
        assert ("head.projection.weight" in set(f.keys())) == (not model.tie_embeddings)
    assert trained(Window.of(loaded), 0) == {name for name, _ in Window.of(loaded).named_parameters()}


def test_loaded_rack_keeps_frozen_up_frozen(tmp_path: Path) -> None:
    model = MODEL.model_copy(update={"mlp": MLPParams(hidden=96, frozen_up=True)})
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "rack").mkdir()
    rack = Rack(RackShape.of(model, (1,), VOCAB))
    initialize(rack, name="rack", seed=0)
    save_rack(tmp_path / "rack", rack, tmp_path / "tokenizer")
    loaded = load_rack(tmp_path / "rack")
    assert not any("gate_proj" in name or "up_proj" in name for name, _ in loaded.named_parameters())
    assert torch.equal(logits(loaded), logits(rack))


# --- the quantized trunk


@pytest.mark.parametrize(
    ("precision", "low", "high"), [("bfloat16", 1e-3, 2.5e-3), ("half", 1e-4, 3.2e-4), ("full", 0.0, 0.0)]
)
def test_quantizing_rounds_matrices_and_nothing_else(
    trainings: list[Training], tmp_path: Path, precision: Precision, low: float, high: float
) -> None:
    """Rounding to p bits of significand leaves a relative error between 2^-(p+2) and 2^-(p+1)."""
    dtype = {"bfloat16": torch.bfloat16, "half": torch.float16, "full": torch.float32}[precision]
    first = trainings[0].stack(0)
    trunk = quantized(first, tmp_path / "trunk", precision)
    assert low <= trunk.artifact.facts["relative_error"] <= high
    whole = {**first.load_stack().state_dict(), "embeddings": first.load_embeddings().table.detach()}
    stack = trunk.load_stack("fp32", CPU)
    formats.dequantize(stack)
    rounded = {**stack.state_dict(), "embeddings": trunk.load_embeddings(CPU).table.detach()}
    assert whole.keys() == rounded.keys()
    changed = total = 0.0
    for name, weight in whole.items():
        expected = weight if weight.ndim == 1 else weight.to(dtype).float()
        assert torch.equal(rounded[name], expected), name
        changed += float((expected.double() - weight.double()).square().sum())
        total += float(weight.double().square().sum())
    assert trunk.artifact.facts["relative_error"] == pytest.approx((changed / total) ** 0.5, rel=1e-3)
    assert trunk.artifact.facts["index"] == 0
    assert trunk.shape == trainings[0].shape


def test_trunk_is_frozen_and_in_the_format_that_computes(trainings: list[Training], tmp_path: Path) -> None:
    """Unless that has more bits: then its own is decoded for each product."""
    trunk = quantized(trainings[1].stack(1), tmp_path / "trunk", "bfloat16")
    assert not (trunk.artifact.path / "embeddings.safetensors").exists()
    for compute in ("fp32", "bf16", "fp16"):
        stack = trunk.load_stack(compute, CPU)
        assert not stack.training
        for p in stack.parameters():
            assert not p.requires_grad
            matrix = torch.float16 if compute == "fp16" else torch.bfloat16
            assert p.dtype == (matrix if p.ndim == 2 else torch.float32)


# --- boundaries


def params_of(directory: Path, **changes: Any) -> Params:
    """What the stage cache_activations may read, whatever is masked."""
    tree: dict[str, Any] = {name: {} for name in Params.model_fields}
    tree |= {"seed": 0, "seq_len": SEQ, "n_stacks": 3, "stacks": []}
    tree["objective"] = {"variants": 3}
    tree["compute"] = {"device": "cpu", "threads": 1}
    tree["activations"] = {"directory": str(directory), "shard_mb": 1}
    for path, value in changes.items():
        section, _, key = path.partition("__")
        if key:
            tree[section][key] = value
        else:
            tree[section] = value
    keys = ("seed", "seq_len", "objective", "compute", "trunk", "growth", "n_stacks", "stack", "stacks")
    return view(Params.model_validate(tree), keys)


@pytest.fixture(scope="module")
def tokens_artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return tokens_at(tmp_path_factory.mktemp("tokens") / "tokens", seed=0)


def tokens_at(path: Path, *, seed: int) -> Artifact:
    rng = np.random.default_rng(seed)
    with manifest.publish(path, kind="tokens", params={}) as draft:
        for split in ("train", "validation"):
            np.save(draft.directory / f"{split}.npy", rng.integers(0, VOCAB, SAMPLES * SEQ + 5).astype(np.uint16))
        np.save(draft.directory / "counts.npy", np.ones(VOCAB, np.int64))
        draft.facts |= {"vocab_size": VOCAB, "eos_id": 0, "validation": {"bytes": 2, "tokens": 1}}
    return manifest.read(path, "tokens")


@pytest.fixture(scope="module")
def tokens(tokens_artifact: Artifact) -> Tokens:
    return open_tokens(tokens_artifact, SEQ)


@pytest.fixture(scope="module")
def trunk(trainings: list[Training], tmp_path_factory: pytest.TempPathFactory) -> list[TrunkStack]:
    directory = tmp_path_factory.mktemp("trunk")
    return [quantized(stack, directory / str(k), "bfloat16") for k, stack in enumerate(newest(trainings))]


class Place:
    """Where boundaries of one trunk and one set of tokens are made, under changing parameters."""

    def __init__(self, directory: Path, artifact: Artifact, tokens: Tokens, trunk: list[TrunkStack]) -> None:
        self.directory, self.artifact, self.tokens, self.trunk = directory, artifact, tokens, trunk
        self.progress: list[tuple[int, int]] = []

    def source(self, k: int, **changes: Any) -> Source:
        params, chain = params_of(self.directory, **changes), [Link(i, i) for i in range(1, k + 1)]
        return Source(params, self.artifact, self.tokens.train, VOCAB, EOS, self.trunk, chain)

    def identity(self, k: int, **changes: Any) -> dict[str, Any]:
        return self.source(k, **changes).identity(Link(k, k))

    def boundaries(self, k: int, **changes: Any) -> Boundaries:
        return Boundaries(
            self.source(k, **changes), device=CPU, progress=lambda done, wanted: self.progress.append((done, wanted))
        )

    def rows(self, k: int, **changes: Any) -> Tensor:
        with self.boundaries(k, **changes).open() as reader:
            return all_rows(reader)

    def store(self, k: int, **changes: Any) -> Path:
        return self.directory / self.identity(k, **changes)["key"]

    def bytes_on_disk(self) -> int:
        return sum(f.stat().st_size for f in self.directory.rglob("*") if f.is_file())


@pytest.fixture
def place(tmp_path: Path, tokens_artifact: Artifact, tokens: Tokens, trunk: list[TrunkStack]) -> Place:
    return Place(tmp_path / "activations", tokens_artifact, tokens, trunk)


def all_rows(reader: BoundaryReader) -> Tensor:
    return reader.read(np.arange(SAMPLES * 3))


def shards_of(store: Path) -> list[Path]:
    return sorted(store.glob("c/*/0/0"), key=lambda p: int(p.parts[-3]))


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("compute", "stored"), [("fp32", "bf16"), ("fp32", "fp32"), ("bf16", "bf16"), ("bf16", "fp32")]
)
def test_boundary_is_what_the_quantized_trunk_makes_of_the_masked_tokens(
    place: Place, tokens: Tokens, trunk: list[TrunkStack], compute: str, stored: str
) -> None:
    """Bit for bit, with the rounding to the store's format at every boundary on the way."""
    found = place.rows(3, compute__dtype=compute, trunk__activations=stored)
    samples, variants = np.tile(np.arange(SAMPLES), 3), np.repeat(np.arange(3), SAMPLES)
    _, mask = draw_masks(ObjectiveParams(variants=3), seed=0, samples=samples, variants=variants, seq=SEQ)
    masked = torch.from_numpy(np.where(mask, VOCAB, tokens.train.samples(samples)))
    embeddings = trunk[0].load_embeddings(CPU)
    expected = []
    for part in masked.split(32):  # rows are computed 32 at a time; other sizes may round differently
        with torch.no_grad(), autocast(CPU, compute):
            x = embeddings(part)
            for stack in trunk:
                x = stack.load_stack(compute, CPU)(x).to(DTYPES[stored]).float()
        expected.append(x)
    assert found.dtype == DTYPES[stored]
    assert torch.equal(found.float(), torch.cat(expected))
    assert found.float().std() > 0.1


def test_boundary_from_a_store_is_the_one_from_tokens(place: Place) -> None:
    first, second = place.rows(1), place.rows(2)
    for k in (1, 2):
        shutil.rmtree(place.store(k))
    assert torch.equal(place.rows(2), second)  # made from tokens, through a new store of boundary 1
    assert torch.equal(place.rows(1), first)
    shutil.rmtree(place.store(2))
    place.progress.clear()
    assert torch.equal(place.rows(2), second)
    assert place.progress[-1] == (300, 300)
    assert len({wanted for _, wanted in place.progress}) == 1  # boundary 1 was at hand


def test_only_what_is_missing_is_made(place: Place) -> None:
    second = place.rows(2)
    shards = shards_of(place.store(2))
    assert len(shards) == 3
    written = [s.stat().st_mtime_ns for s in shards]
    shards[1].unlink()
    shutil.rmtree(place.store(1))
    place.progress.clear()
    assert torch.equal(place.rows(2), second)
    assert place.progress[-1] == (128, 128)
    assert len(shards_of(place.store(1))) == 1  # of boundary 1 just the rows that were needed
    assert [s.stat().st_mtime_ns == at for s, at in zip(shards, written, strict=True)] == [True, False, True]
    place.progress.clear()
    place.rows(2)
    assert place.progress == []


@pytest.mark.parametrize("shard_mb", [2, 16])
def test_size_of_shards_changes_no_row(place: Place, shard_mb: int) -> None:
    small, deep = place.rows(1), place.rows(2)
    assert len(shards_of(place.store(1))) == 3
    assert torch.equal(place.rows(2, activations__shard_mb=shard_mb), deep)
    assert torch.equal(place.rows(1, activations__shard_mb=shard_mb), small)
    assert len(shards_of(place.store(1))) < 3


@pytest.mark.parametrize(("seq", "d_model", "batch"), [(60, 64, 32), (1000, 192, 16), (4096, 1024, 1), (3, 4, 32)])
def test_shards_hold_whole_batches(place: Place, seq: int, d_model: int, batch: int) -> None:
    """Then a row is computed among the same others whatever the size of a shard: its bits may depend on that."""
    for shard_mb in (1, 2, 3, 100):
        identity = {**place.identity(1), "rows": 10_000, "seq": seq, "d_model": d_model}
        layout = place.boundaries(1, activations__shard_mb=shard_mb)._layout(identity)
        assert layout.shard_rows % batch == 0
        row_bytes = seq * d_model * 2
        assert layout.shard_rows == batch or layout.shard_rows * row_bytes <= shard_mb * 2**20


def test_training_goes_on_over_a_boundary_made_in_the_same_process(
    place: Place, trainings: list[Training], tokens: Tokens
) -> None:
    """What was computed under inference mode, tables of positions too, must not get in the way of gradients."""
    rope._table.cache_clear()
    objective = MaskDiffusionObjective(ObjectiveParams(variants=3), 0, VOCAB)
    base = TokenBatches(tokens.train, SampleOrder(SAMPLES, seed=0, stream="s"), objective, 4, 1)
    with place.boundaries(1).open() as reader:
        window = window_above(trainings[:1]).window
        (batch,) = BoundaryBatches(base, reader, 3)(0)
        window.loss(batch, device=CPU, causal=False).backward()
    assert all(p.grad is not None for p in window.parameters())


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "index"])
@pytest.mark.parametrize("k", [1, 2])
def test_damaged_shards_are_remade_while_reading(place: Place, damage: str, k: int) -> None:
    rows = place.rows(k)
    with place.boundaries(k).open() as reader:
        order = np.random.default_rng(0).permutation(300)
        for shard in shards_of(place.store(k)):  # all of them, so that one batch meets several
            if damage == "flip":
                flip(shard, 1000)
            elif damage == "truncate":
                os.truncate(shard, 5000)
            elif damage == "index":
                flip(shard, shard.stat().st_size - 10)
            else:
                shard.unlink()
        assert torch.equal(reader.read(order), rows[order])
    assert torch.equal(place.rows(k), rows)


def test_more_damaged_shards_than_attempts(place: Place) -> None:
    """Each is remade once, however many a batch meets; they are float32 here, so that there are five."""
    options = {"trunk__activations": "fp32"}
    rows = place.rows(1, **options)
    shards = shards_of(place.store(1, **options))
    assert len(shards) == 5
    with place.boundaries(1, **options).open() as reader:
        for shard in shards:
            flip(shard, 1000)
        assert torch.equal(all_rows(reader), rows)


def test_damage_below_is_repaired_on_the_way_up(place: Place) -> None:
    second = place.rows(2)
    flip(shards_of(place.store(1))[0], 1000)
    shutil.rmtree(place.store(2))
    assert torch.equal(place.rows(2), second)


def test_unreadable_store_is_made_again(place: Place) -> None:
    rows = place.rows(1)
    (place.store(1) / "zarr.json").write_text("{")
    assert torch.equal(place.rows(1), rows)
    shutil.rmtree(place.store(1))
    place.store(1).mkdir()
    assert torch.equal(place.rows(1), rows)


def test_a_disk_that_damages_what_it_is_given_is_named(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.rows(1)
    write = ActivationStore.write_shard

    def broken(self: ActivationStore, g: int, activations: np.ndarray) -> None:
        write(self, g, activations)
        flip(self.shard_path(g), 1000)

    monkeypatch.setattr(ActivationStore, "write_shard", broken)
    with place.boundaries(1).open() as reader:
        flip(shards_of(place.store(1))[1], 1000)
        with pytest.raises(UserError, match=r"c/1/0/0: damaged again after it was remade .*; check the disk"):
            all_rows(reader)


# --- the byte budget

STORE = 300 * (SEQ * 64 * 2 + 4) + 3 * (128 * 16 + 4)
"""Bytes of the shards of one boundary."""


def budgeted(stores: float) -> dict[str, float]:
    """Room for so many stores; their metadata take a little as well."""
    return {"activations__budget_gb": (stores * STORE + 20_000) / 1e9}


def used_at(place: Place, seed: int, moment: int) -> None:
    """Use a boundary of the given seed, at an exact moment of time."""
    place.rows(1, seed=seed, **budgeted(3))
    lock = budget._lock_file(place.store(1, seed=seed))
    os.utime(lock, (moment, moment))


def there(place: Place, seeds: range) -> list[int]:
    return [seed for seed in seeds if place.store(1, seed=seed).exists()]


def test_least_recently_used_stores_go_first(place: Place) -> None:
    for moment, seed in enumerate((0, 1, 2, 0)):
        used_at(place, seed, moment + 1000)
    assert there(place, range(4)) == [0, 1, 2]
    assert 3 * STORE < place.bytes_on_disk() < 3 * STORE + 20_000
    used_at(place, 3, 2000)
    assert there(place, range(4)) == [0, 2, 3]
    used_at(place, 0, 2001)
    used_at(place, 1, 2002)
    assert there(place, range(4)) == [0, 1, 3]


def test_stores_in_use_are_not_evicted(place: Place) -> None:
    rows = place.rows(1, **budgeted(2))
    with place.boundaries(1, **budgeted(2)).open() as reader:
        place.rows(1, seed=1, **budgeted(2))
        os.utime(budget._lock_file(place.store(1)), (0, 0))  # the one in use is the least recently used
        place.rows(1, seed=2, **budgeted(2))
        assert there(place, range(3)) == [0, 2]
        assert torch.equal(all_rows(reader), rows)
        message = r"activations\.budget_gb = 0\.00248.*with those in use, needs 0\.00493; raise it, lower"
        with pytest.raises(UserError, match=message):
            place.rows(1, seed=3, **budgeted(1))
    assert len(shards_of(place.store(1))) == 3
    assert shards_of(place.store(1, seed=3)) == []
    place.rows(1, seed=3, **budgeted(1))
    assert there(place, range(4)) == [3]


def test_a_store_larger_than_the_budget_is_refused(place: Place) -> None:
    with pytest.raises(UserError, match=r"params\.yaml: activations\.budget_gb"):
        place.rows(1, **budgeted(0.5))
    assert shards_of(place.store(1)) == []


def test_the_budget_holds_on_the_way_up(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Boundary 3 from tokens: never more than two stores at once, for each is made from the one below it."""
    most = 0
    write = ActivationStore.write_shard

    def watched(self: ActivationStore, g: int, activations: np.ndarray) -> None:
        nonlocal most
        write(self, g, activations)
        most = max(most, place.bytes_on_disk())

    monkeypatch.setattr(ActivationStore, "write_shard", watched)
    rows = place.rows(3)
    assert most > 3 * STORE
    shutil.rmtree(place.directory)
    most = 0
    assert torch.equal(place.rows(3, **budgeted(2)), rows)
    assert most <= 2 * STORE + 20_000
    shutil.rmtree(place.directory)
    with pytest.raises(UserError, match=r"needs 0\.00493"):
        place.rows(2, **budgeted(1.5))


def test_a_store_about_to_be_used_is_not_evicted(tmp_path: Path) -> None:
    """A process opens the lock file, is overtaken by an eviction, and only then locks it: its lock still counts."""
    store, other = tmp_path / "a", tmp_path / "b"
    for directory in (store, other):
        directory.mkdir()
        (directory / "data").write_bytes(bytes(1000))
    with budget._lock_file(store).open("a") as overtaken:
        budget.make_room(other, 1000, 1500)
        assert not store.exists()
        fcntl.flock(overtaken, fcntl.LOCK_SH)
        store.mkdir()
        (store / "data").write_bytes(bytes(1000))
        with pytest.raises(UserError, match="with those in use"):
            budget.make_room(other, 1000, 1500)
        assert store.exists()


# --- identity


def key(place: Place, k: int = 2, **changes: Any) -> str:
    found: str = place.identity(k, **changes)["key"]
    return found


DETERMINANTS: dict[str, Any] = {
    "seed": 1,
    "seq_len": 32,
    "objective__mask_min": 0.2,
    "objective__mask_max": 0.8,
    "objective__distribution": "cosine",
    "objective__count": "exact",
    "objective__variants": 2,
    "objective__type": "clm",
    "objective__num_time_steps": 4,
    "objective__time_step_fractions": [0.1, 0.2, 0.3, 0.9],
    "objective__schedule": "linear",
    "objective__schedule_over": "training",
    "objective__schedule_stacks": 5,
    "objective__unit": "word",
    "objective__pool_size": 3,
    "objective__random_share": 0.1,
    "objective__keep_share": 0.1,
    "objective__causal": True,
    "compute__device": "auto",
    "compute__dtype": "bf16",
    "compute__threads": 2,
    "compute__deterministic": False,
    "trunk__activations": "fp32",
    "trunk__compute": "bf16",
}
WITH: dict[str, dict[str, Any]] = {
    "objective__time_step_fractions": {"objective__num_time_steps": 4},
    "objective__schedule_over": {"objective__schedule": "linear"},
    "objective__schedule_stacks": {"objective__schedule": "linear"},
    "objective__pool_size": {"objective__masks": "pool", "objective__pool_size": 2},
    "objective__random_share": {"objective__type": "mlm"},
    "objective__keep_share": {"objective__type": "mlm"},
    "objective__causal": {"objective__type": "custom"},
}
"""What else is set, before and after."""
WITHOUT_EFFECT: dict[str, Any] = {
    "objective__weighting": "nelbo",
    "objective__embedding_weight": 0.5,
    "objective__masks": "fixed",  # what is cached is fixed in any case
    "compute__compile": True,
    "compute__branch_threads": 2,
    "compute__activation_checkpointing": True,
    "trunk__precision": "half",  # known by the trunk's digests, as the next
    "trunk__precisions": ["nf4"],
    "activations__directory": "elsewhere",
    "activations__budget_gb": 1.0,
    "activations__shard_mb": 3,
    "activations__prefetch": 1,
    "activations__store_all_time_steps": False,
    "activations__time_step_cache_size": 2,
    "activations__trunk": "resident",
}


@pytest.mark.parametrize("name", DETERMINANTS)
def test_identity_changes_with_what_determines_the_rows(place: Place, name: str) -> None:
    base = WITH.get(name, {})
    assert key(place, **{**base, name: DETERMINANTS[name]}) != key(place, **base)


@pytest.mark.parametrize("name", WITHOUT_EFFECT)
def test_identity_does_not_change_with_anything_else(place: Place, name: str) -> None:
    assert place.identity(2, **{name: WITHOUT_EFFECT[name]}) == place.identity(2)


def test_every_parameter_is_a_determinant_or_not() -> None:
    for section in ("objective", "compute", "trunk", "activations"):
        names = {f"{section}__{field}" for field in type(getattr(params_of(Path()), section)).model_fields}
        assert names <= DETERMINANTS.keys() | WITHOUT_EFFECT.keys()


def test_identity_changes_with_trunk_tokens_place_and_code(
    place: Place, trainings: list[Training], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = key(place)
    assert key(place, 1) != now
    assert key(place, 3) != now
    upper, lower = list(place.trunk), list(place.trunk)
    upper[2] = quantized(trainings[2].stack(2), tmp_path / "upper", "half")
    lower[0] = quantized(trainings[0].stack(0), tmp_path / "lower", "half")
    assert key(Place(place.directory, place.artifact, place.tokens, upper)) == now  # boundary 2 does not know stack 2
    assert key(Place(place.directory, place.artifact, place.tokens, lower)) != now
    other = tokens_at(tmp_path / "tokens", seed=1)
    assert key(Place(place.directory, other, place.tokens, place.trunk)) != now
    monkeypatch.setattr(boundary_module, "digest_code", lambda names: "edited")
    assert key(place) != now


def boundary_artifact(place: Place, path: Path, k: int, **changes: Any) -> Artifact:
    with manifest.publish(path, kind="boundary", params={}) as draft:
        draft.facts |= place.identity(k, **changes)
    return manifest.read(path, "boundary")


def test_another_trunk_is_refused(place: Place, trainings: list[Training], tmp_path: Path) -> None:
    artifact = boundary_artifact(place, tmp_path / "boundary", 2)
    check_identity(artifact, place.source(2))
    check_identity(artifact, place.source(2, objective__weighting="nelbo"))
    strange = [quantized(trainings[0].stack(0), tmp_path / "lower", "half"), *place.trunk[1:]]
    with pytest.raises(UserError, match=r"boundary: is a boundary of another trunk, .*run `dvc repro`"):
        check_identity(artifact, Place(place.directory, place.artifact, place.tokens, strange).source(2))
    with pytest.raises(UserError, match="another trunk, tokens, parameters or code"):
        check_identity(artifact, place.source(2, seed=1))


# --- batches above a boundary


@pytest.fixture
def batches(place: Place, tokens: Tokens, tmp_path: Path) -> Iterator[BoundaryBatches]:
    """Over a trunk that is the identity: its boundary is the embedding of what the trunk has seen."""
    window = window_above([], params=StackParams(blocks=1, init="zero"))
    training = published(tmp_path / "identity", window)
    identity = [quantized(training.stack(0), tmp_path / "identity-trunk", "bfloat16")]
    place = Place(place.directory, place.artifact, tokens, identity)
    objective = MaskDiffusionObjective(ObjectiveParams(variants=3), 0, VOCAB)
    base = TokenBatches(tokens.train, SampleOrder(SAMPLES, seed=0, stream="s"), objective, 32, 2)
    with place.boundaries(1).open() as reader:
        yield BoundaryBatches(base, reader, 3)


def test_targets_are_what_the_trunk_did_not_see(batches: BoundaryBatches, tmp_path: Path) -> None:
    """In every pass: variants are revisited in turn, with the masks that made the activations."""
    made = Training(manifest.read(tmp_path / "identity", "stack")).load_embeddings()
    embeddings = torch.cat([made.table, made.mask]).detach().bfloat16()
    order = batches.base.order
    for step in (0, 3, 7, 12):  # in passes 0, 0 and 1, 2, 3 and 4
        samples, epochs = order.at(step * 32, 32)
        parts = batches(step)
        assert [len(p.inputs) for p in parts] == [16, 16]
        for i, part in enumerate(parts):
            here = slice(16 * i, 16 * i + 16)
            text = torch.from_numpy(batches.base.tokens.samples(samples[here]))
            hidden = (part.inputs == embeddings[VOCAB]).all(dim=-1)
            assert torch.equal(part.inputs[~hidden], embeddings[text[~hidden]])
            assert torch.equal(part.targets.rows, hidden.flatten().nonzero()[:, 0])
            assert torch.equal(part.targets.tokens, text[hidden])
            _, mask = draw_masks(
                ObjectiveParams(variants=3), seed=0, samples=samples[here], variants=epochs[here] % 3, seq=SEQ
            )
            assert np.array_equal(hidden.numpy(), mask)


def test_boundary_batches_are_a_function_of_the_step(batches: BoundaryBatches) -> None:
    ahead = {step: batches(step) for step in range(6)}
    for step in reversed(range(6)):
        for a, b in zip(ahead[step], batches(step), strict=True):
            assert torch.equal(a.inputs, b.inputs)
            assert torch.equal(a.targets.rows, b.targets.rows)


def test_checksums_are_verified_until_every_row_was_read(
    batches: BoundaryBatches, monkeypatch: pytest.MonkeyPatch
) -> None:
    verified: dict[int, bool] = {}
    read = BoundaryReader.read

    def watched(self: BoundaryReader, rows: np.ndarray, *, verify: bool = True) -> Tensor:
        for row in rows.tolist():
            verified[row] = verified.get(row, False) or verify
        return read(self, rows, verify=verify)

    monkeypatch.setattr(BoundaryReader, "read", watched)
    passes = -(-3 * SAMPLES // 32)
    for step in range(passes):
        batches(step)
    assert len(verified) == 3 * SAMPLES
    assert all(verified.values())
    verified.clear()
    for step in range(passes, 2 * passes):
        batches(step)
    assert not any(verified.values())
