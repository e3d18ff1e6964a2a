"""The transformer: parity with an independent implementation, positions, causality, initial weights, frozen parts."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from stackwise.config.model import AttentionParams, MLPParams, ModelParams
from stackwise.model.attention import Attention
from stackwise.model.init import EMBEDDING_STD, initialize
from stackwise.model.rack import Head, Rack, RackShape
from stackwise.model.rope import rotary_table, rotate
from stackwise.model.stack import Stack

STANDARD = ModelParams(d_model=32, attention=AttentionParams(n_heads=4), mlp=MLPParams(hidden=48))
GQA = STANDARD.model_copy(update={"attention": AttentionParams(type="gqa", n_heads=4, n_kv_heads=2)})
VOCAB = 19
BATCH, SEQ = 3, 12


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Models as small as these lose time to a second thread, most of all beside other work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(model: ModelParams = STANDARD, blocks: tuple[int, ...] = (2, 1), seed: int = 0) -> Rack:
    """A rack whose weights are all random, norms too, and large enough to make every part count."""
    rack = Rack(RackShape(model, blocks, VOCAB))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in rack.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(1 + 0.3 * noise if p.ndim == 1 else noise * p.shape[1] ** -0.5)
    return rack


def some_tokens(seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB + 1, (BATCH, SEQ), generator=torch.Generator().manual_seed(seed))


def llama_of(rack: Rack) -> Any:
    """The same model and weights in transformers. Its head has a row for the mask token; ours has none."""
    model = rack.shape.model
    blocks = [block for stack in rack.stacks for block in stack.blocks]  # type: ignore[union-attr]
    config = LlamaConfig(
        vocab_size=VOCAB + 1,
        hidden_size=model.d_model,
        intermediate_size=model.mlp.hidden,
        num_hidden_layers=len(blocks),
        num_attention_heads=model.attention.n_heads,
        num_key_value_heads=model.attention.n_kv_heads,
        rms_norm_eps=model.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": model.attention.rope_theta},
        tie_word_embeddings=model.tie_embeddings,
    )
    names = {
        "attention_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
        "attention.": "self_attn.",
    }
    weights = {"model.embed_tokens.weight": rack.embeddings.weight, "model.norm.weight": rack.head.norm.weight}
    projection = rack.embeddings.weight
    if not model.tie_embeddings:
        projection = torch.cat([rack.head.weight, torch.zeros(1, model.d_model)])
    weights["lm_head.weight"] = projection
    for i, block in enumerate(blocks):
        for name, weight in block.state_dict().items():
            for ours, theirs in names.items():
                name = name.replace(ours, theirs)
            weights[f"model.layers.{i}.{name}"] = weight
    config._attn_implementation = "eager"
    llama = LlamaForCausalLM(config)
    llama.load_state_dict({name: w.detach().clone() for name, w in weights.items()})
    return llama.eval()


# --- parity


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model", [STANDARD, GQA], ids=["standard", "gqa"])
def test_logits_are_those_of_llama(model: ModelParams, tied: bool) -> None:
    model = model.model_copy(update={"tie_embeddings": tied, "norm_eps": 1e-3})
    theta = model.attention.model_copy(update={"rope_theta": 100.0})
    rack = build(model.model_copy(update={"attention": theta}))
    llama, tokens = llama_of(rack), some_tokens()
    with torch.no_grad():
        for causal in (True, False):
            # A mask of zeros, added to the scores, lets every position see every other.
            mask = None if causal else torch.zeros(BATCH, 1, SEQ, SEQ)
            expected = llama(tokens, attention_mask=mask).logits[..., :VOCAB]
            found = rack.logits(tokens, causal=causal)
            assert found.shape == (BATCH, SEQ, VOCAB)
            assert expected.std() > 0.5
            torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_gradients_are_those_of_llama() -> None:
    rack = build(GQA)
    llama, tokens = llama_of(rack), some_tokens()
    direction = torch.randn(BATCH, SEQ, VOCAB, generator=torch.Generator().manual_seed(1))
    (rack.logits(tokens, causal=True) * direction).sum().backward()
    (llama(tokens).logits[..., :VOCAB] * direction).sum().backward()
    block: Any = rack.stacks[0]
    pairs = [
        (rack.embeddings.weight, llama.model.embed_tokens.weight),
        (block.blocks[0].attention.k_proj.weight, llama.model.layers[0].self_attn.k_proj.weight),
        (block.blocks[1].mlp.gate_proj.weight, llama.model.layers[1].mlp.gate_proj.weight),
        (rack.head.norm.weight, llama.model.norm.weight),
    ]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-5 * float(theirs.grad.abs().max()))


def test_gqa_with_a_key_for_every_head_is_standard() -> None:
    full = GQA.model_copy(update={"attention": AttentionParams(type="gqa", n_heads=4, n_kv_heads=4)})
    standard, grouped = build(STANDARD), build(full)
    grouped.load_state_dict(standard.state_dict())
    with torch.no_grad():
        assert torch.equal(standard.logits(some_tokens()), grouped.logits(some_tokens()))


def test_grouped_heads_share_keys_and_values() -> None:
    """Standard attention whose key and value heads are repeated is what GQA computes."""
    grouped, standard = Attention(GQA), Attention(STANDARD)
    width = grouped.head_dim
    with torch.no_grad():
        for name in ("q_proj", "o_proj"):
            getattr(standard, name).weight.copy_(getattr(grouped, name).weight)
        for name in ("k_proj", "v_proj"):
            heads = getattr(grouped, name).weight.view(2, width, -1)
            getattr(standard, name).weight.copy_(heads.repeat_interleave(2, dim=0).reshape(4 * width, -1))
        x = torch.randn(BATCH, SEQ, 32, generator=torch.Generator().manual_seed(2))
        torch.testing.assert_close(grouped(x, causal=True), standard(x, causal=True), rtol=0, atol=1e-6)


# --- positions and causality


def test_rope_depends_on_relative_position_only() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16, generator=generator, dtype=torch.float64)
    cos, sin = rotary_table(64, 16, 100.0, torch.device("cpu"))
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
    rotary_table.cache_clear()
    rack = build()
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
    assert rack.head.weight.data_ptr() == rack.embeddings.weight.data_ptr()
    assert "head.projection.weight" not in rack.state_dict()
    head_grad = torch.autograd.grad(rack.head(torch.randn(4, 32)).square().sum(), rack.embeddings.weight)[0]
    assert (head_grad[:VOCAB] != 0).any(dim=1).all()
    assert (head_grad[VOCAB] == 0).all()


def test_head_has_no_row_for_the_mask_token() -> None:
    rack = build()
    assert rack.embeddings.weight.shape[0] == VOCAB + 1
    assert rack.head.weight.shape[0] == VOCAB


def test_rack_shape_survives_json() -> None:
    shape = RackShape(GQA, (2, 1, 3), VOCAB)
    assert RackShape.from_json(shape.to_json()) == shape


# --- initial weights


def initialized(blocks: tuple[int, ...], *, seed: int = 0, backwards: bool = False) -> dict[str, Tensor]:
    """All initial weights of a rack, its parts drawn from the bottom to the top or the other way round."""
    torch.manual_seed(len(blocks))  # the global generator has no part in it
    rack = Rack(RackShape(STANDARD, blocks, VOCAB))
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
    directions = [w.flatten()[:64] / w.flatten()[:64].norm() for w in matrices.values()]
    likeness = torch.stack(directions) @ torch.stack(directions).T - torch.eye(len(directions))
    assert likeness.abs().max() < 0.7


def test_initial_weights_have_the_stated_size() -> None:
    model = ModelParams(d_model=128, attention=AttentionParams(n_heads=4), mlp=MLPParams(hidden=320))
    stack, embeddings, head = Stack(model, 1), nn.Embedding(300, 128), Head(model, 299)
    for name, module in (("stacks.0", stack), ("embeddings", embeddings), ("head", head)):
        initialize(module, name=name, seed=3)
    for name, weight in stack.named_parameters():
        if weight.ndim == 1:
            assert torch.equal(weight, torch.ones_like(weight))
        else:
            assert float(weight.detach().std()) == pytest.approx(weight.shape[1] ** -0.5, rel=0.05), name
    assert float(embeddings.weight.detach().std()) == pytest.approx(EMBEDDING_STD, rel=0.05)
    assert float(head.projection.weight.detach().std()) == pytest.approx(128**-0.5, rel=0.05)


# --- frozen parts


def test_frozen_up_stays_as_it_is() -> None:
    mlp = MLPParams(hidden=48, frozen_up=True)
    stack = Stack(STANDARD.model_copy(update={"mlp": mlp}), 2)
    initialize(stack, name="stacks.0", seed=0)
    before = {name: p.detach().clone() for name, p in stack.named_parameters()}
    trainable = [p for p in stack.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=0.1, weight_decay=0.5)
    for step in range(3):
        x = torch.randn(BATCH, SEQ, 32, generator=torch.Generator().manual_seed(step))
        stack(x).square().mean().backward()
        assert all((p.grad is not None) == p.requires_grad for p in stack.parameters())
        optimizer.step()
    frozen = {name for name, p in stack.named_parameters() if torch.equal(p, before[name])}
    assert frozen == {f"blocks.{i}.mlp.{w}_proj.weight" for i in range(2) for w in ("gate", "up")}


def test_frozen_up_starts_as_the_same_model() -> None:
    """Freezing is a matter of gradients: it changes no initial weight."""
    frozen_up = STANDARD.model_copy(update={"mlp": MLPParams(hidden=48, frozen_up=True)})
    free, frozen = Stack(STANDARD, 1), Stack(frozen_up, 1)
    for stack in (free, frozen):
        initialize(stack, name="stacks.0", seed=0)
    assert all(torch.equal(p, frozen.state_dict()[name]) for name, p in free.state_dict().items())
