"""Chains of boundaries, their narrow formats, and mask variants that are not all on disk at once."""

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from safetensors.torch import save_file
from torch import Tensor

from stackwise.artifacts import manifest
from stackwise.artifacts.manifest import Artifact
from stackwise.cache import sizes
from stackwise.cache.batches import BoundaryBatches
from stackwise.cache.boundary import Boundaries, BoundaryReader, Link, Source, check_identity
from stackwise.cache.loader import PrefetchLoader
from stackwise.cache.narrow import decode, encode
from stackwise.cache.sizes import DTYPES, FORMATS, boundary_bytes, boundary_shard_rows, row_bytes
from stackwise.cache.store import ActivationStore, StoreLayout
from stackwise.config.model import AttentionParams, MLPParams, ModelParams
from stackwise.config.params import Params
from stackwise.data.tokens import Tokens, open_tokens
from stackwise.errors import UserError
from stackwise.growth.batches import TokenBatches
from stackwise.growth.init import initialize
from stackwise.growth.stack_objectives import objective_of_stack, order_of_stack
from stackwise.growth.stacks import EMBEDDINGS, Training, stack_file
from stackwise.growth.window import Batch
from stackwise.model.context import Context
from stackwise.model.rack import RackShape
from stackwise.precision.trunk import TrunkStack, quantize_stack

CPU = torch.device("cpu")
VOCAB, EOS, SEQ, SAMPLES, VARIANTS, DEPTH = 29, 0, 6, 20, 4, 4
ROWS = SAMPLES * VARIANTS
MODEL = ModelParams(d_model=80, attention=AttentionParams(n_heads=2), mlp=MLPParams(hidden=32))
"""80 channels: in int8 the second group of scales is a short one."""
SHARD_ROWS = 8
"""Each mask variant begins in the middle of a shard, and ends there."""
NARROW = ("int8", "fp8")
ALL = tuple(DTYPES)
EVERY_ROW = np.arange(ROWS)


class Place:
    """A trunk of four stacks over random tokens."""

    def __init__(self, directory: Path) -> None:
        rng = np.random.default_rng(0)
        with manifest.publish(directory / "tokens", kind="tokens", params={}) as draft:
            for split in ("train", "validation"):
                np.save(draft.directory / f"{split}.npy", rng.integers(0, VOCAB, SAMPLES * SEQ).astype(np.uint16))
            np.save(draft.directory / "counts.npy", np.ones(VOCAB, np.int64))
            draft.facts |= {"vocab_size": VOCAB, "eos_id": EOS, "validation": {"bytes": 2, "tokens": 1}}
        self.artifact: Artifact = manifest.read(directory / "tokens", "tokens")
        self.tokens: Tokens = open_tokens(self.artifact, SEQ)
        shape = RackShape.of(MODEL, [1] * DEPTH, VOCAB)
        with manifest.publish(directory / "training", kind="stack", params={}) as draft:
            embeddings = shape.build_embeddings()
            initialize(embeddings, name="embeddings", seed=0)
            save_file(embeddings.state_dict(), draft.directory / EMBEDDINGS)
            for k in range(DEPTH):
                stack = shape.build_stack(k)
                initialize(stack, name=f"stacks.{k}", seed=0)
                save_file(stack.state_dict(), draft.directory / stack_file(k))
            draft.facts |= {"stacks": list(range(DEPTH)), "adapters": {}, "embeddings": True, "shape": shape.to_json()}
        training = Training(manifest.read(directory / "training", "stack"))
        self.trunk: list[TrunkStack] = []
        for k in range(DEPTH):
            with manifest.publish(directory / f"trunk-{k}", kind="trunk", params={}) as draft:
                draft.facts |= quantize_stack(training.stack(k), draft.directory, "bfloat16")
            self.trunk.append(TrunkStack(manifest.read(directory / f"trunk-{k}", "trunk")))

    def source(self, params: Params, *chain: Link) -> Source:
        return Source(params, self.artifact, self.tokens.train, VOCAB, EOS, self.trunk, chain)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("place"))


@pytest.fixture
def place(trained: Place, monkeypatch: pytest.MonkeyPatch) -> Place:
    """Where rows are computed four at a time, and eight are a shard."""
    monkeypatch.setattr(sizes, "_BATCH_ROWS", 4)
    monkeypatch.setattr(sizes, "rows_per_shard", lambda *_: SHARD_ROWS)
    return trained


def params_of(directory: Path, store: str = "bf16", **sections: dict[str, Any]) -> Params:
    tree: dict[str, Any] = {name: {} for name in Params.model_fields}
    tree |= {"seed": 0, "seq_len": SEQ, "n_stacks": DEPTH + 2, "stacks": [], "objective": {"variants": VARIANTS}}
    tree |= {"compute": {"device": "cpu", "threads": 1}, "trunk": {"activations": store}}
    tree |= {"stack": {"blocks": 1, "batch_size": 6}, "activations": {"directory": str(directory)}}
    for name, values in sections.items():
        tree[name] = {**tree[name], **values}
    return Params.model_validate(tree)


def rows_of(source: Source, rows: np.ndarray = EVERY_ROW) -> Tensor:
    with Boundaries(source, device=CPU).open() as reader:
        return reader.read(rows)


def store_of(source: Source) -> Path:
    key: str = source.identity(source.chain[-1])["key"]
    return Path(source.params.activations.directory) / key


def shards_on_disk(store: Path) -> set[int]:
    return {int(path.parts[-3]) for path in store.glob("c/*/0/0")}


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


# --- chains


def test_links_are_read_from_text() -> None:
    assert Link.parse("3:5") == Link(3, 5)
    assert Link.parse("1:2:4") == Link(depth=1, stack=2, sweep=4)
    for wrong in ("", "3", "1:2:3:4", "a:b"):
        with pytest.raises((ValueError, TypeError)):
            Link.parse(wrong)


@pytest.mark.parametrize("depths", [(), (0,), (2, 2), (3, 1), (1, DEPTH + 1)])
def test_a_chain_rises_within_its_trunk(place: Place, tmp_path: Path, depths: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"a chain of depths .* does not rise, or not within 4 stacks"):
        place.source(params_of(tmp_path), *(Link(depth, depth) for depth in depths))


@pytest.mark.parametrize(
    ("activations", "compute"), [*((name, "fp32") for name in ALL), ("bf16", "bf16"), ("int8", "bf16")]
)
def test_a_boundary_has_the_same_bits_whatever_it_is_made_from(
    place: Place, tmp_path: Path, activations: str, compute: str
) -> None:
    """Through links of several stacks, through one of each stack, and from the tokens; and they are the right ones."""
    steps: list[list[int]] = [[4], [1, 3, 4], [1, 2, 3, 4], [2, 4]]
    found = []
    for i, depths in enumerate(steps):
        params = params_of(tmp_path / str(i), activations, compute={"dtype": compute})
        source = place.source(params, *(Link(depth, depth + i) for depth in depths))
        assert [source.continues(j) for j in range(len(depths))] == [False] + [True] * (len(depths) - 1)
        found.append(rows_of(source))
        assert len(list((tmp_path / str(i)).glob("*/zarr.json"))) == len(depths)  # each link has become a store
    for other in found[1:]:
        assert torch.equal(other, found[0])

    objective, autocast = source.objective(Link(4, 4)), torch.autocast("cpu", torch.bfloat16, compute == "bf16")
    variants, samples = np.divmod(EVERY_ROW, SAMPLES)
    inputs = objective(place.tokens.train.samples(samples), samples, variants).inputs
    expected, dtype = [], DTYPES[activations]
    for part in torch.from_numpy(inputs).split(4):
        with torch.no_grad(), autocast:
            x = place.trunk[0].load_embeddings(CPU)(part)
            for stack in place.trunk:
                made = stack.load_stack(compute, CPU)(x.float(), Context())
                x = decode(encode(made, dtype), dtype, MODEL.d_model)
        expected.append(x)
    assert torch.equal(found[0], torch.cat(expected))
    assert found[0].dtype == (torch.float32 if activations == "fp32" else torch.bfloat16)
    assert found[0].float().std() > 0.1


def test_several_stacks_at_a_time_and_shard_by_shard(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = (Link(1, 1), Link(4, 4))
    at_once = rows_of(place.source(params_of(tmp_path / "a", "int8"), *chain))
    monkeypatch.setattr("stackwise.cache.boundary._GROUP_BYTES", 1)
    assert torch.equal(rows_of(place.source(params_of(tmp_path / "b", "int8"), *chain)), at_once)


def test_masks_of_ones_own_are_made_from_the_tokens(place: Place, tmp_path: Path) -> None:
    """Redrawn for each boundary; where two are made with the same masks all the same, one continues the other."""
    redrawn = params_of(tmp_path / "a", growth={"masks": "redraw"})
    source = place.source(redrawn, Link(1, 1), Link(3, 3))
    assert not source.continues(1)
    from_tokens = rows_of(source)
    assert [path.name for path in (tmp_path / "a").iterdir() if path.is_dir()] == [store_of(source).name]

    elsewhere = params_of(tmp_path / "b", growth={"masks": "redraw"})
    same_masks = place.source(elsewhere, Link(1, 3), Link(3, 3))
    assert same_masks.continues(1)
    assert store_of(same_masks).name == store_of(source).name
    assert torch.equal(rows_of(same_masks), from_tokens)
    assert len(list((tmp_path / "b").glob("*/zarr.json"))) == 2
    assert not torch.equal(rows_of(place.source(redrawn, Link(3, 4))), from_tokens)


def test_only_what_determines_the_bytes_names_a_store(place: Place, tmp_path: Path) -> None:
    def key(link: Link, *before: Link, store: str = "bf16", **sections: Any) -> str:
        return store_of(place.source(params_of(tmp_path, store, **sections), *before, link)).name

    redrawn: dict[str, Any] = {"growth": {"masks": "redraw"}}
    same = [key(Link(2, 2)), key(Link(2, 5)), key(Link(2, 2, sweep=3)), key(Link(2, 2), Link(1, 1))]
    same += [key(Link(2, 2), compute={"dtype": "fp32"}, trunk={"compute": "fp32"})]
    same += [key(Link(2, 2), compute={"dtype": "bf16"}, trunk={"compute": "fp32"})]
    assert len(set(same)) == 1
    different = [key(Link(depth, 2), store=store) for depth in (1, 2, 3) for store in ALL]
    different += [key(link, **redrawn) for link in (Link(2, 2), Link(2, 5), Link(2, 2, sweep=1), Link(2, 2, sweep=2))]
    different += [key(Link(2, 2), trunk={"compute": "bf16"})]
    assert len(set(different)) == len(different)
    assert key(Link(2, 2), compute={"dtype": "bf16"}) == different[-1]


def test_the_trunk_may_compute_in_a_format_of_its_own(place: Place, tmp_path: Path) -> None:
    own = params_of(tmp_path / "a", "fp32", trunk={"compute": "bf16"})
    both = params_of(tmp_path / "b", "fp32", compute={"dtype": "bf16"})
    neither = params_of(tmp_path / "c", "fp32")
    found = [rows_of(place.source(params, Link(2, 2))) for params in (own, both, neither)]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("activations", ALL)
@pytest.mark.parametrize("damage", ["flip", "remove", "below too"])
def test_damaged_shards_are_remade_through_the_chain(
    place: Place, tmp_path: Path, activations: str, damage: str
) -> None:
    source = place.source(params_of(tmp_path, activations), Link(1, 1), Link(3, 4))
    below = place.source(source.params, Link(1, 1))
    right = rows_of(source)
    made = (tmp_path / store_of(below).name / "c/2/0/0").read_bytes()
    with Boundaries(source, device=CPU).open() as reader:
        for g in (2, 5):
            path = store_of(source) / f"c/{g}/0/0"
            if damage == "remove":
                path.unlink()
            else:
                flip(path, 100)
        if damage == "below too":
            flip(store_of(below) / "c/2/0/0", 100)
            (store_of(below) / "c/5/0/0").unlink()
        assert torch.equal(reader.read(EVERY_ROW[::-1].copy()), right.flip(0))
    assert (store_of(below) / "c/2/0/0").read_bytes() == made
    shutil.rmtree(tmp_path)
    assert torch.equal(rows_of(source), right)


# --- the artifact


@pytest.mark.parametrize(
    ("activations", "low", "high"), [("fp32", 0, 0), ("bf16", 1e-3, 2e-3), ("int8", 4e-3, 9e-3), ("fp8", 0.015, 0.03)]
)
def test_the_artifact_tells_what_the_format_costs(
    place: Place, tmp_path: Path, activations: str, low: float, high: float
) -> None:
    source = place.source(params_of(tmp_path / "a", activations), Link(1, 1), Link(3, 3))
    facts = Boundaries(source, device=CPU).facts()
    assert low <= facts["relative_error"] <= high
    with Boundaries(source, device=CPU).open():
        assert Boundaries(source, device=CPU).facts() == facts
    few = params_of(tmp_path / "b", activations, activations={"store_all_time_steps": False})
    elsewhere = place.source(few, Link(3, 5))
    assert Boundaries(elsewhere, device=CPU).facts() == facts

    with manifest.publish(tmp_path / "boundary", kind="boundary", params={}) as draft:
        draft.facts |= facts
    artifact = manifest.read(tmp_path / "boundary", "boundary")
    check_identity(artifact, source)
    check_identity(artifact, elsewhere)
    for other in (Link(2, 2), Link(4, 3)):
        with pytest.raises(UserError, match="boundary: is a boundary of another trunk, tokens, parameters or code"):
            check_identity(artifact, place.source(source.params, other))


def test_the_error_is_that_of_the_last_rounding(place: Place, tmp_path: Path) -> None:
    """By hand, over the rows that are computed first: what the stack makes of the boundary below, before and after."""
    source = place.source(params_of(tmp_path, "int8"), Link(1, 1), Link(2, 2))
    rows = np.arange(4)
    below, stored = rows_of(place.source(source.params, Link(1, 1)), rows), rows_of(source, rows)
    with torch.no_grad():
        exact = place.trunk[1].load_stack("fp32", CPU)(below.float(), Context()).double()
    error = float((stored.double() - exact).norm() / exact.norm())
    assert Boundaries(source, device=CPU).facts()["relative_error"] == pytest.approx(error, rel=1e-4)


# --- narrow formats


def some_residuals(d_model: int, *, outliers: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(d_model)
    x = torch.randn((5, 7, d_model), generator=generator) * torch.rand(d_model, generator=generator).mul(3).exp()
    if outliers:
        x[..., 3] *= 100
    x[1, 2] = 0.0
    x[2, 3] *= 1e-6
    return x


@pytest.mark.parametrize("d_model", [16, 64, 80, 192])
@pytest.mark.parametrize("outliers", [False, True])
def test_int8_is_within_half_a_step_of_its_group(d_model: int, outliers: bool) -> None:
    x = some_residuals(d_model, outliers=outliers)
    stored = encode(x, "int8")
    assert stored.shape == (5, 7, d_model + 2 * -(-d_model // 64))
    error = (decode(stored, "int8", d_model).double() - x.double()).abs()
    for first in range(0, d_model, 64):
        group = slice(first, min(first + 64, d_model))
        step = x[..., group].abs().amax(dim=-1, keepdim=True).double() / 127
        # The step is rounded to fp16, which below 2^-14 has a fixed distance of 2^-24; the product to bf16.
        bound = step * 0.5 * (1 + 2**-10) + 127 * 2.0**-25 + x[..., group].double().abs() * 2**-8
        assert (error[..., group] <= bound).all()
    assert (stored[1, 2] == 0).all()  # what is zero has zeros for codes, and for scales


@pytest.mark.parametrize("d_model", [16, 80])
@pytest.mark.parametrize("outliers", [False, True])
def test_fp8_keeps_four_significant_bits(d_model: int, outliers: bool) -> None:
    x = some_residuals(d_model, outliers=outliers)
    stored = encode(x, "float8_e4m3fn")
    assert stored.shape == (5, 7, d_model + 4)
    error = (decode(stored, "float8_e4m3fn", d_model).double() - x.double()).abs()
    step = x.abs().amax(dim=-1, keepdim=True).double() / 448
    assert (error <= x.double().abs() * (2**-4 + 2**-8) + step * 2**-10).all()
    assert (stored[1, 2] == 0).all()


def test_every_fp8_code_means_what_torch_says() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[codes & 0x7F != 0x7F]  # all numbers, without the two that are none
    scale = torch.tensor([0.75]).view(torch.uint8).expand(len(codes), 4)
    found = decode(torch.cat([codes[:, None], scale], dim=1), "float8_e4m3fn", 1)[:, 0]
    assert torch.equal(found, (codes.view(torch.float8_e4m3fn).float() * 0.75).bfloat16())


@pytest.mark.parametrize("activations", NARROW)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_a_narrow_format_cannot_hold_is_said(activations: str, bad: float) -> None:
    x = some_residuals(80)
    x[3, 1, 70] = bad
    with pytest.raises(UserError, match=rf"trunk\.activations = {activations}: .* not finite or too large .* bf16"):
        encode(x, DTYPES[activations])
    if activations == "int8":
        with pytest.raises(UserError, match="too large"):
            encode(torch.full((1, 1, 64), 1e7), "int8")


@pytest.mark.parametrize("activations", NARROW)
def test_a_narrow_store_explains_itself(place: Place, tmp_path: Path, activations: str) -> None:
    """With what its attributes say, whoever reads the array with zarr alone finds the same activations."""
    source = place.source(params_of(tmp_path, activations), Link(2, 2))
    rows = rows_of(source)
    array: Any = zarr.open_array(str(store_of(source)), mode="r")
    facts, stored = dict(array.attrs), array[:]
    assert stored.dtype == np.uint8
    d_model = facts["d_model"]
    assert d_model == 80
    codes, scales = stored[..., :d_model], stored[..., d_model:].copy().view(facts["scale_dtype"])
    values = torch.from_numpy(codes.copy()).view(getattr(torch, facts["logical_dtype"])).float().numpy()
    whole = values * np.repeat(scales.astype(np.float32), facts["channels_per_scale"], axis=-1)[..., :d_model]
    assert torch.equal(torch.from_numpy(whole).bfloat16(), rows)
    assert stored.shape[1:] == (SEQ, row_bytes(SEQ, d_model, activations) // SEQ)


# --- sizes


@pytest.mark.parametrize("activations", ALL)
@pytest.mark.parametrize("shard_mb", [1, 2])
def test_the_bytes_of_a_boundary_are_known_beforehand(tmp_path: Path, activations: str, shard_mb: int) -> None:
    rows, seq, d_model = 150, 96, 80
    shard_rows = boundary_shard_rows(seq, d_model, activations, shard_mb)
    layout = StoreLayout(rows, seq, d_model, DTYPES[activations], shard_rows)
    with ActivationStore.create(tmp_path / "store", layout) as store:
        for g in range(layout.shards):
            shape = (len(layout.shard_range(g)), seq, layout.width)
            store.write_shard(g, np.zeros(shape, layout.storage_dtype))
        on_disk = sum(path.stat().st_size for path in (store.path / "c").rglob("*") if path.is_file())
        assert (store.path / "zarr.json").stat().st_size < 2000
    assert layout.shards > 1 or activations in NARROW
    assert boundary_bytes(rows, seq, d_model, activations, shard_mb) == on_disk == layout.total_bytes
    assert row_bytes(seq, d_model, activations) == layout.row_bytes
    assert layout.row_bytes == seq * {"fp32": 320, "bf16": 160, "int8": 84, "fp8": 84}[activations]


def test_sizes_are_known_without_torch_and_zarr() -> None:
    code = "import sys, stackwise.cache.sizes; sys.exit(bool({'torch', 'zarr', 'numpy'} & set(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0


def test_a_row_is_computed_among_the_same_others_in_every_format() -> None:
    assert {name: form.code_bytes for name, form in FORMATS.items()}.keys() == set(DTYPES.values())
    for seq, d_model in ((3, 5), (1000, 192), (4096, 1024)):
        batch = sizes.rows_per_batch(seq, d_model)
        assert all(boundary_shard_rows(seq, d_model, name, 16) % batch == 0 for name in ALL)


# --- mask variants that are not all there


class Watched:
    """Notes which shards of a store are on disk, after every shard that is written."""

    def __init__(self, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.store, self.seen, self.written = store, [shards_on_disk(store)], 0
        write = ActivationStore.write_shard

        def watched(own: ActivationStore, g: int, activations: np.ndarray) -> None:
            write(own, g, activations)
            self.written += own.path == store
            self.seen.append(shards_on_disk(store))

        monkeypatch.setattr(ActivationStore, "write_shard", watched)

    def most(self) -> int:
        return max(map(len, self.seen))


def limited(directory: Path, at_once: int | None, **more: Any) -> Params:
    few = {} if at_once is None else {"store_all_time_steps": False, "time_step_cache_size": at_once}
    return params_of(directory, activations={**few, **more})


def batches_of(place: Place, params: Params, reader: BoundaryReader) -> BoundaryBatches:
    """Of stack 2, six samples each: every fourth batch begins in one pass and ends in the next."""
    objective = objective_of_stack(params, 2, MODEL.time, tokens=place.tokens.train, mask_id=VOCAB)
    order = order_of_stack(params, 2, MODEL.time, SAMPLES)
    return BoundaryBatches(TokenBatches(place.tokens.train, order, objective, 6, 2), reader, VARIANTS)


def equal(a: list[Batch], b: list[Batch]) -> bool:
    return all(
        torch.equal(x.inputs, y.inputs) and torch.equal(x.targets.rows, y.targets.rows)
        for x, y in zip(a, b, strict=True)
    )


def shards_of_variants(*variants: int) -> set[int]:
    return {row // SHARD_ROWS for v in variants for row in range(v * SAMPLES, (v + 1) * SAMPLES)}


STEPS = 2 * VARIANTS * SAMPLES // 6
"""Two passes over all variants."""


@pytest.fixture
def all_at_once(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BoundaryBatches]:
    """Batches over a store that has everything."""
    params = params_of(tmp_path_factory.mktemp("whole"))
    with Boundaries(place.source(params, Link(2, 2)), device=CPU).open() as reader:
        yield batches_of(place, params, reader)


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_few_variants_at_once_give_the_same_batches(
    place: Place, all_at_once: BoundaryBatches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    """Read by the thread that makes batches ahead of training; never is more on disk than may be."""
    params = limited(tmp_path, at_once)
    source = place.source(params, Link(1, 1), Link(2, 2))
    watched = Watched(store_of(source), monkeypatch)
    with Boundaries(source, device=CPU).open() as reader:
        assert shards_on_disk(store_of(source)) == shards_of_variants(*range(at_once))
        batches = batches_of(place, params, reader)
        with PrefetchLoader(batches, range(STEPS), depth=2) as loader:
            for step, batch in enumerate(loader):
                assert equal(batch, all_at_once(step))
    most = max(len(shards_of_variants(*((v + i) % VARIANTS for i in range(at_once)))) for v in range(VARIANTS))
    assert watched.most() == most < ROWS // SHARD_ROWS
    size = boundary_bytes(ROWS, SEQ, MODEL.d_model, "bf16", 16, variants=VARIANTS, at_once=at_once)
    held = shards_on_disk(store_of(source))
    assert sum((store_of(source) / f"c/{g}/0/0").stat().st_size for g in held) == len(held) * size // most
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [store_of(source).name]


def test_as_many_as_there_are_is_no_limit(place: Place, tmp_path: Path) -> None:
    for at_once in (VARIANTS, VARIANTS + 3):
        source = place.source(limited(tmp_path / str(at_once), at_once), Link(2, 2))
        with Boundaries(source, device=CPU).open():
            assert len(shards_on_disk(store_of(source))) == ROWS // SHARD_ROWS


def test_variants_that_are_there_stay_until_another_is_wanted(
    place: Place, all_at_once: BoundaryBatches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training that was interrupted goes on where it was, and makes nothing again for it."""
    params = limited(tmp_path, 2)
    source = place.source(params, Link(2, 2))
    with Boundaries(source, device=CPU).open() as reader:
        batches_of(place, params, reader)(8)  # within the third pass
    assert shards_on_disk(store_of(source)) == shards_of_variants(1, 2)
    watched = Watched(store_of(source), monkeypatch)
    with Boundaries(source, device=CPU).open() as reader:
        assert equal(batches_of(place, params, reader)(8), all_at_once(8))
        assert watched.written == 0
        reader.read(np.array([3 * SAMPLES]))
        assert shards_on_disk(store_of(source)) == shards_of_variants(2, 3)

    (store_of(source) / "c/6/0/0").unlink()  # as if it had been killed while it made variant 2
    with Boundaries(source, device=CPU).open() as reader:
        assert shards_on_disk(store_of(source)) == shards_of_variants(0, 3)
        assert equal(batches_of(place, params, reader)(8), all_at_once(8))
    unlimited = place.source(params_of(tmp_path), Link(2, 2))
    with Boundaries(unlimited, device=CPU).open() as reader:
        assert equal(batches_of(place, params, reader)(5), all_at_once(5))
    assert len(shards_on_disk(store_of(source))) == ROWS // SHARD_ROWS
    with Boundaries(source, device=CPU).open():
        assert shards_on_disk(store_of(source)) == shards_of_variants(0, 1)


def test_the_least_recently_wanted_variant_goes(place: Place, tmp_path: Path) -> None:
    source = place.source(limited(tmp_path, 2), Link(2, 2))
    with Boundaries(source, device=CPU).open() as reader:
        for wanted, held in ((1, {0, 1}), (0, {0, 1}), (2, {0, 2}), (2, {0, 2}), (3, {2, 3})):
            reader.read(np.array([wanted * SAMPLES + 10]))
            assert shards_on_disk(store_of(source)) == shards_of_variants(*held)


def test_threads_that_want_different_variants_get_them(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = rows_of(place.source(params_of(tmp_path / "whole"), Link(2, 2)))
    source = place.source(limited(tmp_path / "limited", 1), Link(2, 2))
    failures: list[BaseException] = []
    watched = Watched(store_of(source), monkeypatch)
    with Boundaries(source, device=CPU).open() as reader:

        def work(seed: int) -> None:
            rng = np.random.default_rng(seed)
            try:
                for _ in range(6):
                    rows = np.sort(rng.integers(0, ROWS, 4))
                    assert torch.equal(reader.read(rows), whole[rows])
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == []
    assert watched.most() == 3  # as many as the rows of any variant take


def test_a_variant_that_is_at_hand_below_is_used(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies below is neither made nor dropped for it: its variants come and go with its own training."""
    below = place.source(limited(tmp_path, 1), Link(1, 1))
    source = place.source(limited(tmp_path, 1), Link(1, 1), Link(2, 2))
    whole = rows_of(place.source(params_of(tmp_path / "whole"), Link(2, 2)))
    with Boundaries(below, device=CPU).open():
        pass
    loaded: list[int] = []
    load = TrunkStack.load_stack

    def watched(self: TrunkStack, *arguments: Any) -> Any:
        loaded.append(self.index)
        return load(self, *arguments)

    monkeypatch.setattr(TrunkStack, "load_stack", watched)
    with Boundaries(source, device=CPU).open() as reader:
        assert loaded == [1]
        for v in (1, 0):
            rows = np.arange(v * SAMPLES, (v + 1) * SAMPLES)
            assert torch.equal(reader.read(rows), whole[rows])
            assert shards_on_disk(store_of(below)) == shards_of_variants(0)
    assert loaded == [1, 0, 1, 1]


def test_variants_that_come_and_go_are_always_verified(place: Place, tmp_path: Path) -> None:
    source = place.source(limited(tmp_path, 1), Link(2, 2))
    with Boundaries(source, device=CPU).open() as reader:
        right = reader.read(np.arange(8), verify=False)
        flip(store_of(source) / "c/0/0/0", 100)
        assert torch.equal(reader.read(np.arange(8), verify=False), right)


def test_a_shard_that_another_process_drops_is_made_once_more(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that visits the variants of the same store at another pace."""
    source = place.source(limited(tmp_path, 1), Link(2, 2))
    right = rows_of(source, np.arange(8))
    path, drops = store_of(source) / "c/0/0/0", 3
    write = ActivationStore.write_shard

    def dropped(self: ActivationStore, g: int, activations: np.ndarray) -> None:
        nonlocal drops
        write(self, g, activations)
        if drops:
            drops -= 1
            path.unlink()

    monkeypatch.setattr(ActivationStore, "write_shard", dropped)
    with Boundaries(source, device=CPU).open() as reader:
        path.unlink()
        ActivationStore.open(store_of(source)).drop_shard(0)
        assert torch.equal(reader.read(np.arange(8)), right)
    assert drops == 0


def test_the_budget_counts_what_is_there_at_once(place: Place, tmp_path: Path) -> None:
    size = boundary_bytes(ROWS, SEQ, MODEL.d_model, "bf16", 16, variants=VARIANTS, at_once=1)
    assert size < boundary_bytes(ROWS, SEQ, MODEL.d_model, "bf16", 16) / 3
    budget = {"budget_gb": size / 1e9}
    params = limited(tmp_path, 1, **budget)
    with Boundaries(place.source(params, Link(2, 2)), device=CPU).open() as reader:
        for v in range(VARIANTS):
            reader.read(np.array([v * SAMPLES]))
    message = r"activations\.budget_gb = .* lower objective\.variants, or set activations\.store_all_time_steps"
    for at_once in (2, None):
        with (
            pytest.raises(UserError, match=message),
            Boundaries(place.source(limited(tmp_path / "other", at_once, **budget), Link(2, 2)), device=CPU).open(),
        ):
            pass
