"""The transformer: heads, positions, causality, segments, time, initial weights, frozen parts."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stackwise.attention.dense import DenseAttention
from stackwise.config.model import AttentionParams, MLPParams, ModelParams, TimeParams
from stackwise.growth.init import EMBEDDING_STD, initialize
from stackwise.model.context import Context, segments_of_documents
from stackwise.model.embeddings import Embeddings
from stackwise.model.rack import Head, Rack, RackShape, StackShape
from stackwise.model.rope import Rope, rotary_table, rotate
from stackwise.model.stack import Stack
from stackwise.model.time import TimeEmbedding

STANDARD = ModelParams(d_model=32, attention=AttentionParams(n_heads=4), mlp=MLPParams(hidden=48))
GQA = STANDARD.model_copy(update={"attention": AttentionParams(type="gqa", n_heads=4, n_kv_heads=2)})
VOCAB = 19
BATCH, SEQ = 3, 12


def build(model: ModelParams = STANDARD, blocks: tuple[int, ...] = (2, 1), seed: int = 0) -> Rack:
    """A rack whose weights are all random, norms too, and large enough to make every part count."""
    rack = Rack(RackShape.of(model, blocks, VOCAB))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in rack.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(1 + 0.3 * noise if p.ndim == 1 else noise * p.shape[1] ** -0.5)
    return rack


def some_tokens(seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB + 1, (BATCH, SEQ), generator=torch.Generator().manual_seed(seed))


# --- grouped heads


def test_gqa_with_a_key_for_every_head_is_standard() -> None:
    full = GQA.model_copy(update={"attention": AttentionParams(type="gqa", n_heads=4, n_kv_heads=4)})
    standard, grouped = build(STANDARD), build(full)
    grouped.load_state_dict(standard.state_dict())
    with torch.no_grad():
        assert torch.equal(standard.logits(some_tokens()), grouped.logits(some_tokens()))


def test_grouped_heads_share_keys_and_values() -> None:
    """Standard attention whose key and value heads are repeated is what GQA computes."""
    grouped, standard = DenseAttention(GQA), DenseAttention(STANDARD)
    width = grouped.head_dim
    with torch.no_grad():
        for name in ("q_proj", "o_proj"):
            getattr(standard, name).weight.copy_(getattr(grouped, name).weight)
        for name in ("k_proj", "v_proj"):
            heads = getattr(grouped, name).weight.view(2, width, -1)
            getattr(standard, name).weight.copy_(heads.repeat_interleave(2, dim=0).reshape(4 * width, -1))
        x = torch.randn(BATCH, SEQ, 32, generator=torch.Generator().manual_seed(2))
        torch.testing.assert_close(
            grouped(x, Context(causal=True)), standard(x, Context(causal=True)), rtol=0, atol=1e-6
        )


# --- positions and causality


def test_rope_depends_on_relative_position_only() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16, generator=generator, dtype=torch.float64)
    cos, sin = rotary_table(0, 64, 16, Rope(theta=100.0), torch.device("cpu"))
    turned_q = rotate(q.expand(1, 1, 64, 16), cos, sin)
    turned_k = rotate(k.expand(1, 1, 64, 16), cos, sin)
    scores = (turned_q @ turned_k.transpose(-1, -2))[0, 0]
    for distance in range(-63, 64):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-5)
    assert scores[0].std() > 0.1  # but on that it does depend
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm(dim=-1).expand(1, 1, 64), rtol=0, atol=1e-5)


@pytest.mark.parametrize("model", [STANDARD, GQA], ids=["standard", "gqa"])
def test_causal_positions_do_not_see_the_future(model: ModelParams) -> None:
    rack, tokens = build(model), some_tokens()
    with torch.no_grad():
        before = rack.logits(tokens, causal=True)
        both_ways = rack.logits(tokens)
        for position in range(SEQ):
            changed = tokens.clone()
            changed[:, position] = (changed[:, position] + 1) % VOCAB
            after = rack.logits(changed, causal=True)
            assert torch.equal(after[:, :position], before[:, :position])
            assert (after[:, position:] != before[:, position:]).any(dim=-1).all()
            # the same weights see both ways when they are allowed to
            assert (rack.logits(changed) != both_ways).any(dim=-1).all()


def test_rope_table_made_while_evaluating_serves_training() -> None:
    """A boundary is remade under inference mode in the process that then trains on it."""
    theta = AttentionParams(n_heads=4, rope_theta=123.0)  # of which no table has been made yet
    rack = build(STANDARD.model_copy(update={"attention": theta}))
    with torch.inference_mode():
        evaluated = rack.logits(some_tokens())
    trained = rack.logits(some_tokens())
    trained.sum().backward()
    assert torch.equal(trained, evaluated)


# --- head


def test_tied_head_is_the_embedding_without_the_mask_token() -> None:
    rack = build(STANDARD.model_copy(update={"tie_embeddings": True}))
    assert set(dict(rack.head.named_parameters())) == {"norm.weight"}
    assert rack.head.weight.shape == (VOCAB, 32)
    assert rack.head.weight.data_ptr() == rack.embeddings.table.data_ptr()
    assert "head.projection.weight" not in rack.state_dict()
    rack.head(torch.randn(4, 32)).square().sum().backward()
    assert rack.embeddings.table.grad is not None
    assert (rack.embeddings.table.grad != 0).any(dim=1).all()
    assert rack.embeddings.mask.grad is None


def test_head_has_no_row_for_the_mask_token() -> None:
    rack = build()
    assert rack.embeddings.table.shape == (VOCAB, 32)
    assert rack.embeddings.mask.shape == (1, 32)
    assert rack.head.weight.shape[0] == VOCAB


def test_rack_shape_survives_json() -> None:
    shape = RackShape.of(GQA, (2, 1, 3), VOCAB)
    assert RackShape.from_json(shape.to_json()) == shape


# --- initial weights


def initialized(blocks: tuple[int, ...], *, seed: int = 0, backwards: bool = False) -> dict[str, Tensor]:
    """All initial weights of a rack, its parts drawn from the bottom to the top or the other way round."""
    torch.manual_seed(len(blocks))  # the global generator has no part in it
    rack = Rack(RackShape.of(STANDARD, blocks, VOCAB))
    parts: list[tuple[str, nn.Module]] = [("embeddings", rack.embeddings)]
    parts += [(f"stacks.{k}", stack) for k, stack in enumerate(rack.stacks)]
    parts.append(("head", rack.head))
    for name, part in reversed(parts) if backwards else parts:
        initialize(part, name=name, seed=seed)
    return rack.state_dict()


def test_initial_weights_depend_on_seed_name_and_shape_alone() -> None:
    two, four = initialized((2, 2)), initialized((2, 2, 2, 2), backwards=True)
    assert all(torch.equal(four[name], weight) for name, weight in two.items())
    more_blocks = initialized((3, 2))
    assert all(torch.equal(more_blocks[name], weight) for name, weight in two.items())


def test_initial_weights_differ_between_seeds_and_names() -> None:
    here, elsewhere = initialized((2, 2)), initialized((2, 2), seed=1)
    matrices = {name: weight for name, weight in here.items() if weight.ndim > 1}
    assert all(not torch.equal(elsewhere[name], weight) for name, weight in matrices.items())
    drawn = {weight.flatten()[:8].numpy().tobytes() for weight in matrices.values()}
    # scaled alike or not, no two matrices hold the same draws
    assert len(drawn) == len(matrices)
    directions = [w.flatten()[:32] / w.flatten()[:32].norm() for w in matrices.values()]
    likeness = torch.stack(directions) @ torch.stack(directions).T - torch.eye(len(directions))
    assert likeness.abs().max() < 0.8


def test_initial_weights_have_the_stated_size() -> None:
    model = ModelParams(d_model=128, attention=AttentionParams(n_heads=4), mlp=MLPParams(hidden=320))
    stack, embeddings, head = Stack(model, 1), Embeddings(299, 128), Head(model, 299)
    for name, module in (("stacks.0", stack), ("embeddings", embeddings), ("head", head)):
        initialize(module, name=name, seed=3)
    for name, weight in stack.named_parameters():
        if weight.ndim == 1:
            assert torch.equal(weight, torch.ones_like(weight))
        else:
            assert float(weight.detach().std()) == pytest.approx(weight.shape[1] ** -0.5, rel=0.05), name
    assert float(embeddings.table.detach().std()) == pytest.approx(EMBEDDING_STD, rel=0.05)
    assert float(head.projection.weight.detach().std()) == pytest.approx(128**-0.5, rel=0.05)


# --- frozen parts

FROZEN_UP = STANDARD.model_copy(update={"mlp": MLPParams(hidden=48, frozen_up=True)})


def test_frozen_up_stays_as_it_is() -> None:
    """The frozen features are no parameters, get no gradient, and only their seed is stored."""
    stack = Stack(FROZEN_UP, 2)
    initialize(stack, name="stacks.0", seed=0)
    features = {name: b.clone() for name, b in stack.named_buffers() if name.endswith("value")}
    assert set(features) == {f"blocks.{i}.mlp.{w}_proj.value" for i in range(2) for w in ("gate", "up")}
    before = {name: p.detach().clone() for name, p in stack.named_parameters()}
    assert not any("gate" in name or "up_proj" in name for name in before)
    optimizer = torch.optim.AdamW(stack.parameters(), lr=0.1, weight_decay=0.5)
    for step in range(3):
        x = torch.randn(BATCH, SEQ, 32, generator=torch.Generator().manual_seed(step))
        stack(x).square().mean().backward()
        optimizer.step()
    assert not any(torch.equal(p, before[name]) for name, p in stack.named_parameters())
    assert all(torch.equal(b, features[name]) for name, b in stack.named_buffers() if name in features)
    stored = {name: w for name, w in stack.state_dict().items() if "gate" in name or "up_proj" in name}
    assert all(name.endswith("seed") and w.shape == () for name, w in stored.items())
    assert len(stored) == 4


def test_frozen_features_come_back_from_their_seed() -> None:
    stack, twin = Stack(FROZEN_UP, 2), Stack(FROZEN_UP, 2)
    initialize(stack, name="stacks.0", seed=0)
    twin.load_state_dict(stack.state_dict())
    with torch.device("meta"):
        lazy = Stack(FROZEN_UP, 2)
    lazy.load_state_dict(stack.state_dict(), assign=True)
    x = torch.randn(BATCH, SEQ, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(twin(x), stack(x))
    assert torch.equal(lazy(x), stack(x))
    other = Stack(FROZEN_UP, 2)
    initialize(other, name="stacks.1", seed=0)
    theirs, ours = (dict(s.named_buffers())["blocks.0.mlp.up_proj.value"] for s in (other, stack))
    assert not torch.equal(theirs, ours)


# --- time

TIMED = STANDARD.model_copy(update={"time": TimeParams(mode="input", width=8)})


def test_time_starts_without_influence_and_then_has_some() -> None:
    """AdaLN-zero: gates are closed at first, so that a block is the identity."""
    rack = Rack(RackShape.of(TIMED, (2, 1), VOCAB))
    for name, part in (("embeddings", rack.embeddings), ("stacks.0", rack.stacks), ("head", rack.head)):
        initialize(part, name=name, seed=0)
    tokens, times = some_tokens(), torch.tensor([0.2, 0.5, 0.9])
    assert torch.equal(rack(tokens, times=times), rack.embeddings(tokens))
    rack = build(TIMED)
    here = rack(tokens, times=times)
    there = rack(tokens, times=torch.tensor([0.2, 0.6, 0.9]))
    assert torch.equal(here[[0, 2]], there[[0, 2]])
    assert not torch.equal(here[1], there[1])
    assert torch.equal(rack(tokens), rack(tokens, times=torch.zeros(BATCH)))  # text without masks


def test_modulation_is_shift_scale_and_gate() -> None:
    """A block by hand, from the formulas of AdaLN."""
    stack: Any = build(TIMED).stacks[0]
    block = stack.blocks[0]
    x, time = torch.randn(BATCH, SEQ, 32), torch.randn(BATCH, 8)
    linear = torch.nn.functional.silu(time) @ block.modulation.weight.T + block.modulation.bias
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = linear.view(BATCH, 6, 1, 32).unbind(1)
    mid = x + gate * block.attention(shift + (1 + scale) * block.attention_norm(x), Context())
    expected = mid + mlp_gate * block.mlp(mlp_shift + (1 + mlp_scale) * block.mlp_norm(mid))
    torch.testing.assert_close(block(x, time=time), expected)


@pytest.mark.parametrize("embedding", ["sinusoidal", "learned"])
def test_bins_of_time(embedding: str) -> None:
    """Times of one bin are the same, those of others are not."""
    params = TimeParams.model_validate({"mode": "input", "width": 8, "bins": 4, "embedding": embedding})
    embed = TimeEmbedding(params)
    found = embed(torch.tensor([0.0, 0.01, 0.25, 0.26, 0.5, 0.51, 0.75, 0.76, 1.0]))
    bins = torch.tensor([0, 0, 0, 1, 1, 2, 2, 3, 3])
    same = (found[:, None] == found[None]).all(-1)
    assert torch.equal(same, bins[:, None] == bins[None])


def test_sinusoids_tell_close_times_apart() -> None:
    embed = TimeEmbedding(TimeParams(mode="input", width=64))
    times = torch.linspace(0.05, 1, 20)
    embedded = embed._sinusoids(times)
    likeness = embedded @ embedded.T / 32
    torch.testing.assert_close(likeness.diagonal(), torch.ones(20))
    assert (likeness - torch.eye(20)).abs().max() < 0.9


# --- segments

SEGMENTS = torch.tensor([[0] * 5 + [1] * 7, [0] * 12, [0] * 3 + [1] * 4 + [2] * 5])


def test_documents_end_with_their_end_token() -> None:
    tokens = torch.tensor([[3, 9, 1, 1, 9, 9, 2]])
    assert segments_of_documents(tokens, 9).tolist() == [[0, 0, 1, 1, 1, 2, 3]]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("model", [STANDARD, GQA], ids=["standard", "gqa"])
def test_documents_do_not_see_each_other(model: ModelParams, causal: bool) -> None:
    rack, tokens = build(model), some_tokens()
    with torch.no_grad():
        before = rack.logits(tokens, causal=causal, segments=SEGMENTS)
        alone = rack.logits(tokens[:1, :5], causal=causal)
        torch.testing.assert_close(before[:1, :5], alone, rtol=0, atol=1e-5)
        for position in range(SEQ):
            changed = tokens.clone()
            changed[:, position] = (changed[:, position] + 1) % VOCAB
            differs = (rack.logits(changed, causal=causal, segments=SEGMENTS) != before).any(dim=-1)
            sees = SEGMENTS[:, position : position + 1] == SEGMENTS
            if causal:
                sees = sees & (torch.arange(SEQ) >= position)
            assert torch.equal(differs, sees)


# --- other architectures in one rack


def test_stacks_may_differ() -> None:
    shape = RackShape.of(STANDARD, (1, 1), VOCAB)
    other = StackShape(1, GQA.attention, MLPParams(hidden=24))
    rack = Rack(replace(shape, stacks=(shape.stacks[0], other)))
    sizes = {name: tuple(p.shape) for name, p in rack.named_parameters()}
    assert sizes["stacks.0.blocks.0.attention.k_proj.weight"] == (32, 32)
    assert sizes["stacks.1.blocks.0.attention.k_proj.weight"] == (16, 32)
    assert sizes["stacks.1.blocks.0.mlp.up_proj.weight"] == (24, 32)
    assert RackShape.from_json(rack.shape.to_json()) == rack.shape
