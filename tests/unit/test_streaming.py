"""The streamed trunk: the same numbers as the activation cache, with one stack in memory at a time."""

import os
import weakref
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from stackwise.artifacts import manifest
from stackwise.cache.boundary import Boundaries, Link, Source
from stackwise.cache.narrow import decode, encode
from stackwise.cache.sizes import DTYPES as STORE_DTYPES
from stackwise.cache.streaming import StreamedTrunk
from stackwise.config.model import AttentionParams, MLPParams, ModelParams, TimeParams
from stackwise.config.params import Params
from stackwise.data.tokens import open_tokens
from stackwise.growth.init import initialize
from stackwise.growth.stacks import EMBEDDINGS, Training, stack_file
from stackwise.growth.window import Batch, Window
from stackwise.model.context import Context
from stackwise.model.rack import Head, RackShape, StackShape
from stackwise.model.stack import Stack
from stackwise.model.time import Modulation
from stackwise.objectives.targets import masked_targets
from stackwise.precision.dtypes import autocast
from stackwise.precision.trunk import TrunkStack, quantize_stack

CPU = torch.device("cpu")
VOCAB, EOS, SEQ, SAMPLES, VARIANTS = 29, 0, 48, 32, 2
MODEL = ModelParams(d_model=80, document_mask=True, time=TimeParams(mode="input", width=8))
"""80 channels: in int8 the second group of scales is a short one."""
DENSE = MLPParams(hidden=96)
STACKS = (
    StackShape(1, AttentionParams(n_heads=4, dropout=0.5), DENSE),
    StackShape(2, AttentionParams(type="gqa", n_heads=4, n_kv_heads=2), DENSE),
    StackShape(1, AttentionParams(type="mla", n_heads=4, mla_rq=16, mla_rkv=24), DENSE),
    StackShape(1, AttentionParams(type="kernel", n_heads=4), MLPParams(hidden=96, frozen_up=True)),
    StackShape(1, AttentionParams(type="mlgka", n_heads=4, n_kv_heads=2, mla_rkv=24), DENSE),
    StackShape(1, AttentionParams(n_heads=4), MLPParams(type="moe", hidden=64, n_experts=2, n_shared=1)),
)
"""Every type of attention and of feed-forward network."""
STORES = tuple(STORE_DTYPES)


@dataclass
class Place:
    """A trunk of all `STACKS` over random documents."""

    directory: Path
    trunk: list[TrunkStack]

    def source(self, cache: Path, compute: str, activations: str) -> Source:
        tree: dict[str, Any] = {name: {} for name in Params.model_fields}
        tree |= {"seed": 0, "seq_len": SEQ, "n_stacks": len(STACKS) + 1, "stacks": []}
        tree |= {"objective": {"variants": VARIANTS}, "activations": {"directory": str(cache)}}
        tree |= {"compute": {"device": "cpu", "threads": 1}, "trunk": {"activations": activations, "compute": compute}}
        artifact = manifest.read(self.directory / "tokens", "tokens")
        train = open_tokens(artifact, SEQ).train
        depth = len(self.trunk)
        return Source(Params.model_validate(tree), artifact, train, VOCAB, EOS, self.trunk, [Link(depth, depth)])

    def streamed(self, *, compute: str = "bf16", activations: str = "bf16", resident: bool = False) -> StreamedTrunk:
        return StreamedTrunk(self.trunk, compute=compute, activations=activations, device=CPU, resident=resident)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    directory = tmp_path_factory.mktemp("place")
    rng = np.random.default_rng(0)
    with manifest.publish(directory / "tokens", kind="tokens", params={}) as draft:
        for split in ("train", "validation"):
            np.save(draft.directory / f"{split}.npy", rng.integers(0, VOCAB, SAMPLES * SEQ).astype(np.uint16))
        np.save(draft.directory / "counts.npy", np.ones(VOCAB, np.int64))
        draft.facts |= {"vocab_size": VOCAB, "eos_id": EOS, "validation": {"bytes": 2, "tokens": 1}}
    shape = replace(RackShape.of(MODEL, [1], VOCAB), stacks=STACKS)
    with manifest.publish(directory / "training", kind="stack", params={}) as draft:
        embeddings = shape.build_embeddings()
        initialize(embeddings, name="embeddings", seed=0)
        save_file(embeddings.state_dict(), draft.directory / EMBEDDINGS)
        for k in range(len(STACKS)):
            save_file(drawn(shape, k).state_dict(), draft.directory / stack_file(k))
        draft.facts |= {"stacks": [*range(len(STACKS))], "adapters": {}, "embeddings": True, "shape": shape.to_json()}
    training = Training(manifest.read(directory / "training", "stack"))
    trunk = []
    for k in range(len(STACKS)):
        with manifest.publish(directory / f"trunk-{k}", kind="trunk", params={}) as draft:
            draft.facts |= quantize_stack(training.stack(k), draft.directory, "bfloat16")
        trunk.append(TrunkStack(manifest.read(directory / f"trunk-{k}", "trunk")))
    return Place(directory, trunk)


def drawn(shape: RackShape, k: int) -> Stack:
    stack = shape.build_stack(k)
    initialize(stack, name=f"stacks.{k}", seed=0)
    for part in stack.modules():
        if isinstance(part, Modulation):  # they begin at zero
            torch.nn.init.normal_(part.weight, std=0.1, generator=torch.Generator().manual_seed(k))
    return stack


def some_tokens(samples: int = 3) -> Tensor:
    return torch.randint(0, VOCAB + 1, (samples, SEQ), generator=torch.Generator().manual_seed(0))


def some_context(samples: int = 3) -> Context:
    return Context(times=torch.linspace(0.2, 0.8, samples))


@pytest.mark.parametrize("activations", STORES)
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_a_streamed_trunk_gives_the_bits_of_the_cache(
    place: Place, tmp_path: Path, compute: str, activations: str
) -> None:
    """In batches of eight in another order, where the cache was made of 32 rows at a time."""
    source = place.source(tmp_path, compute, activations)
    boundaries = Boundaries(source, device=CPU)
    trunk = place.streamed(compute=compute, activations=activations)
    rows = np.random.default_rng(1).permutation(SAMPLES * VARIANTS)[:24]
    with boundaries.open() as reader:
        for part in np.split(rows, 3):
            task, _ = boundaries._task(source.chain[-1], part)
            found = trunk(torch.from_numpy(task.inputs), boundaries._context(source.chain[-1], part))
            assert torch.equal(found, reader.read(part).float())
            assert found.dtype == torch.float32
            assert found.std() > 0.1


def test_training_on_a_streamed_trunk_is_training_on_its_boundary(place: Place) -> None:
    """Loss and gradients, under the window's own autocast."""
    tokens, times = some_tokens(), torch.linspace(0.2, 0.8, 3)
    targets = masked_targets(tokens.clamp(max=VOCAB - 1).numpy(), np.ones((3, SEQ), bool), np.ones(3))
    stack, head = drawn(replace(RackShape.of(MODEL, [1], VOCAB), stacks=STACKS), 0), Head(MODEL, VOCAB)
    initialize(head, name="head", seed=0)
    boundary = place.streamed()(tokens, Context(times=times))
    found = []
    for window, inputs in (
        (Window([stack], head, trunk=place.streamed()), tokens),
        (Window([stack], head), boundary.bfloat16()),
    ):
        torch.manual_seed(0)  # of the dropout
        with autocast(CPU, "bf16"):
            loss = window.loss(Batch(inputs, targets, times), device=CPU, causal=False)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in window.parameters() if p.grad is not None)])
        window.zero_grad(set_to_none=True)
    assert len(found[0]) == len(found[1]) > 10
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize("outside", ["fp32", "bf16"])
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_it_computes_stack_by_stack_in_its_own_format(place: Place, compute: str, outside: str, resident: bool) -> None:
    trunk = place.streamed(compute=compute, activations="int8", resident=resident)
    with torch.no_grad(), autocast(CPU, compute):
        x = place.trunk[0].load_embeddings(CPU)(some_tokens())
        for stack in place.trunk:
            stored = encode(stack.load_stack(compute, CPU)(x, some_context()), "int8")
            x = decode(stored, "int8", MODEL.d_model).float()
    for _ in range(2):
        with autocast(CPU, outside):
            assert torch.equal(trunk(some_tokens(), some_context()), x)


def test_a_boundary_enters_above_the_embeddings(place: Place) -> None:
    embedded = place.trunk[0].load_embeddings(CPU)(some_tokens())
    trunk = place.streamed()
    assert torch.equal(trunk(embedded, some_context()), trunk(some_tokens(), some_context()))


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Stack]]:
    """Every stack that was loaded, if it still is there."""
    found: list[weakref.ref[Stack]] = []
    load = TrunkStack.load_stack

    def watched(self: TrunkStack, *args: Any) -> Stack:
        stack = load(self, *args)
        found.append(weakref.ref(stack))
        return stack

    monkeypatch.setattr(TrunkStack, "load_stack", watched)
    return found


def test_one_stack_is_in_memory_at_a_time(place: Place, loaded: list[weakref.ref[Stack]]) -> None:
    most = 0

    def count(module: Any, *_: Any) -> None:
        nonlocal most
        most = max(most, sum(ref() is not None for ref in loaded))

    trunk = place.streamed()
    hook = torch.nn.modules.module.register_module_forward_pre_hook(count)
    try:
        for _ in range(2):
            trunk(some_tokens(), some_context())
    finally:
        hook.remove()
    assert most == 1
    assert len(loaded) == 2 * len(STACKS)
    assert not any(ref() is not None for ref in loaded)


def test_a_resident_trunk_is_read_once(place: Place, loaded: list[weakref.ref[Stack]]) -> None:
    trunk = place.streamed(resident=True)
    for _ in range(2):
        trunk(some_tokens(), some_context())
    assert len(loaded) == len(STACKS)
    assert all(ref() is not None for ref in loaded)


def test_what_it_gives_can_be_learned_on_and_learns_nothing_itself(place: Place) -> None:
    embedded = place.trunk[0].load_embeddings(CPU)(some_tokens())
    x = place.streamed()(embedded.requires_grad_(), some_context())
    assert not x.requires_grad
    assert not x.is_inference()
    weight = torch.ones(MODEL.d_model, requires_grad=True)
    (x * weight).square().sum().backward()
    assert weight.grad is not None


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system takes no advice")
@pytest.mark.parametrize("resident", [False, True])
def test_the_next_stack_is_announced(place: Place, monkeypatch: pytest.MonkeyPatch, resident: bool) -> None:
    """Before a stack is computed, the files of the next; before the last, those that the next step begins with."""
    announced: list[str] = []

    def advise(fd: int, offset: int, length: int, advice: int) -> None:
        assert (offset, length, advice) == (0, 0, os.POSIX_FADV_WILLNEED)
        announced.append(Path(os.readlink(f"/proc/self/fd/{fd}")).parent.name)

    monkeypatch.setattr(os, "posix_fadvise", advise)
    trunk = place.streamed(resident=resident)
    trunk(some_tokens(), some_context())
    expected = [f"trunk-{k}" for k in (*range(1, len(STACKS)), 0, 0)]  # the lowest has two files
    assert announced == ([] if resident else expected)
