"""Low-rank adapters: what they start as, what of them trains, their files, and merging."""

import json
import socket
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from stackwise.adapters.lora import (
    adapt,
    adapter_parameters,
    load_adapter,
    merge,
    save_adapter,
    train_only,
)
from stackwise.config.compute import Precision
from stackwise.config.growth import Kind, LoRAParams
from stackwise.config.model import AttentionParams, MLPParams, ModelParams, TimeParams
from stackwise.errors import UserError
from stackwise.growth.init import initialize
from stackwise.model.context import Context
from stackwise.model.stack import Stack
from stackwise.precision.formats import quantize

KINDS: tuple[Kind, ...] = ("stack", "trunk")
"""What a stack has while its rack grows."""
MODEL = ModelParams(d_model=64, attention=AttentionParams(n_heads=4), mlp=MLPParams(hidden=128))
LATENT = AttentionParams(type="mla", n_heads=4, mla_rq=16, mla_rkv=16)
DENSE_NAMES = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
LATENT_NAMES = ["down_proj", "gate_proj", "kv_a_proj", "kv_b_proj", "o_proj", "q_a_proj", "q_b_proj", "up_proj"]
ARCHITECTURES = {
    "standard": (MODEL, DENSE_NAMES),
    "latent": (MODEL.model_copy(update={"attention": LATENT}), LATENT_NAMES),
    "kernel": (MODEL.model_copy(update={"attention": AttentionParams(type="kernel", n_heads=4)}), DENSE_NAMES),
    "experts": (MODEL.model_copy(update={"mlp": MLPParams(type="moe", hidden=64, n_shared=1)}), DENSE_NAMES),
    "timed": (MODEL.model_copy(update={"time": TimeParams(mode="input")}), DENSE_NAMES),
    "frozen_up": (
        MODEL.model_copy(update={"mlp": MLPParams(hidden=128, frozen_up=True)}),
        ["down_proj", "k_proj", "o_proj", "q_proj", "v_proj"],
    ),
}
FORMATS: tuple[Precision, ...] = ("full", "nf4", "int8", "fp8")
ROUNDING = 1e-5
"""Largest difference of outputs of size 1 that fp32 makes by adding in another order."""


def new_stack(model: ModelParams = MODEL, precision: Precision = "full") -> Stack:
    """A stack of two blocks, its modulations open."""
    stack = Stack(model, 2)
    initialize(stack, name="stacks.1", seed=0)
    for block in stack.blocks:
        if isinstance(block.modulation, nn.Linear):
            nn.init.constant_(block.modulation.bias, 0.5)
    quantize(stack, precision)
    return stack


def new_adapted(*kinds: Kind, precision: Precision = "full", model: ModelParams = MODEL, **params: Any) -> Stack:
    """A stack with adapters as if they had learned: B is not zero."""
    stack = new_stack(model, precision)
    for kind in kinds:
        adapt(stack, kind, LoRAParams(**params), k=1, seed=0)
        learn(stack, kind)
    return stack


def learn(stack: Stack, kind: Kind) -> None:
    generator = torch.Generator().manual_seed(KINDS.index(kind))
    for name, parameter in adapter_parameters(stack, kind).items():
        if ".lora_B." in name:
            parameter.data.normal_(std=0.02, generator=generator)


def inputs() -> Tensor:
    return torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(9))


def outputs(stack: Callable[..., Any]) -> Tensor:
    """What a stack or PEFT's model makes of `inputs`, without gradients."""
    with torch.no_grad():
        return stack(inputs(), Context(times=torch.tensor([0.3, 0.8])))


def weights(stack: Stack) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in stack.state_dict().items() if isinstance(value, Tensor)}


@pytest.mark.parametrize(
    ("params", "ranks", "alphas"),
    [
        (LoRAParams(rank=3, alpha=5.0), [3, 3, 3, 3], [5.0, 5.0, 5.0, 5.0]),
        (LoRAParams(strategy="progressive", rank=4, alpha=6.0), [4, 4, 4, 4], [6.0, 6.0, 6.0, 6.0]),
        (
            LoRAParams(strategy="progressive", rank=2, rank_pattern="linear", alpha_pattern="decreasing"),
            [2, 4, 6, 8],
            [16.0, 8.0, 4.0, 2.0],
        ),
        (
            LoRAParams(strategy="progressive", rank=2, rank_pattern="increasing", max_rank=9, alpha_pattern="linear"),
            [2, 4, 8, 9],
            [16.0, 32.0, 48.0, 64.0],
        ),
        (
            LoRAParams(strategy="progressive", rank=5, rank_pattern="decreasing", alpha_pattern="increasing"),
            [5, 2, 1, 1],
            [16.0, 32.0, 64.0, 128.0],
        ),
        (LoRAParams(strategy="variable", ranks=[4, 1, 7, 2]), [4, 1, 7, 2], [16.0, 16.0, 16.0, 16.0]),
        (
            LoRAParams(strategy="variable", ranks=[1, 1, 2, 3], alphas=[1.0, 2.5, 4.0, 8.0]),
            [1, 1, 2, 3],
            [1.0, 2.5, 4.0, 8.0],
        ),
    ],
)
def test_every_stack_gets_the_rank_and_alpha_that_the_params_say(
    params: LoRAParams, ranks: list[int], alphas: list[float], tmp_path: Path
) -> None:
    for k in range(4):
        stack = Stack(MODEL, 1)
        adapt(stack, "trunk", params, k=k, seed=0)
        matrices = adapter_parameters(stack, "trunk")
        assert len(matrices) == 2 * len(DENSE_NAMES)
        assert all(m.shape[0 if ".lora_A." in name else 1] == ranks[k] for name, m in matrices.items())
        layer: Any = stack.get_submodule("blocks.0.mlp.down_proj")
        assert layer.scaling["trunk"] == alphas[k] / ranks[k]
        save_adapter(stack, "trunk", tmp_path)
        config = json.loads((tmp_path / "trunk/adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"]) == (ranks[k], alphas[k])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_all_projections_get_adapters_and_nothing_else(name: str) -> None:
    model, names = ARCHITECTURES[name]
    stack = new_stack(model)
    wanted = {
        path
        for path, part in stack.named_modules()
        if type(part) is nn.Linear and not path.startswith("time.") and not path.endswith(".router")
    }
    assert {path.rpartition(".")[2] for path in wanted} == set(names)
    adapt(stack, "trunk", LoRAParams(rank=2), k=1, seed=0)
    assert {path.split(".lora_")[0] for path in adapter_parameters(stack, "trunk")} == wanted


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_fresh_adapter_changes_no_bit(name: str) -> None:
    model, _ = ARCHITECTURES[name]
    stack = new_stack(model).train()
    before = outputs(stack)
    adapt(stack, "stack", LoRAParams(dropout=0.5), k=1, seed=0)
    adapt(stack, "trunk", LoRAParams(rank=2), k=1, seed=0)
    train_only(stack, KINDS)
    assert torch.equal(outputs(stack), before)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(outputs(stack), outputs(new_stack(model)))


@pytest.mark.parametrize("precision", FORMATS[1:])
def test_a_fresh_adapter_changes_no_bit_of_a_quantized_stack(precision: Precision) -> None:
    stack = new_stack(precision=precision)
    before = outputs(stack)
    assert not torch.equal(before, outputs(new_stack()))
    adapt(stack, "trunk", LoRAParams(), k=1, seed=0)
    assert torch.equal(outputs(stack), before)


def test_fresh_weights_are_a_function_of_seed_and_name_alone() -> None:
    def drawn(*kinds: Kind, k: int = 1, seed: int = 0) -> Tensor:
        stack = Stack(MODEL, 1)
        for kind in kinds:
            adapt(stack, kind, LoRAParams(rank=16), k=k, seed=seed)
        return adapter_parameters(stack, kinds[-1])["blocks.0.mlp.down_proj.lora_A." + kinds[-1] + ".weight"]

    state = torch.get_rng_state()
    first = drawn("trunk")
    stack = Stack(MODEL, 1)  # draws from the global generator itself
    state = torch.get_rng_state()
    adapt(stack, "stack", LoRAParams(), k=0, seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, drawn("stack", "trunk"))
    for other in (drawn("stack"), drawn("trunk", k=2), drawn("trunk", seed=1)):
        assert not torch.equal(first, other)
    assert float(first.std()) == pytest.approx(128**-0.5, rel=0.05)


def test_named_projections_alone_get_adapters() -> None:
    stack = new_stack()
    adapt(stack, "stack", LoRAParams(target_modules=["v_proj", "down_proj"]), k=1, seed=0)
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in adapter_parameters(stack, "stack")} == {
        "v_proj",
        "down_proj",
    }


@pytest.mark.parametrize(
    ("architecture", "unknown"), [("standard", "q_a_proj"), ("experts", "router"), ("frozen_up", "up_proj")]
)
def test_a_name_that_the_architecture_lacks_is_refused(architecture: str, unknown: str) -> None:
    model, names = ARCHITECTURES[architecture]
    with pytest.raises(UserError) as error:
        adapt(new_stack(model), "trunk", LoRAParams(target_modules=["o_proj", unknown]), k=3, seed=0)
    assert str(error.value) == (
        f"adapters.trunk.target_modules = ['o_proj', '{unknown}']: stack 3 has no projection {unknown}; expected names "
        f"of {', '.join(names)}, or null for all"
    )


@pytest.mark.parametrize("precision", FORMATS)
def test_both_adapters_add_up(precision: Precision) -> None:
    stack = new_adapted("stack", precision=precision, rank=4, target_modules=["q_proj"])
    adapt(stack, "trunk", LoRAParams(rank=2, alpha=1.0), k=1, seed=0)
    learn(stack, "trunk")
    layer: Any = stack.get_submodule("blocks.0.attention.q_proj")
    x, a, b = inputs(), layer.lora_A, layer.lora_B
    with torch.no_grad():
        parts = [layer.base_layer(x), 4.0 * b.stack(a.stack(x)), 0.5 * b.trunk(a.trunk(x))]
        torch.testing.assert_close(layer(x), sum(parts), rtol=0, atol=ROUNDING)
    assert min(float(part.abs().max()) for part in parts) > 0.05


@pytest.mark.parametrize("precision", FORMATS)
@pytest.mark.parametrize("trained", [(), ("stack",), ("trunk",), ("trunk", "stack")])
def test_what_does_not_train_keeps_every_byte(trained: tuple[Kind, ...], precision: Precision) -> None:
    stack = new_adapted("stack", "trunk", precision=precision)
    before = weights(stack)
    for parameter in stack.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    train_only(stack, trained)
    expected = {name for kind in trained for name in adapter_parameters(stack, kind)}
    trainable = {name: p for name, p in stack.named_parameters() if p.requires_grad}
    assert set(trainable) == expected
    x = inputs().requires_grad_()
    stack(x).square().mean().backward()
    assert x.grad is not None
    assert {name for name, p in stack.named_parameters() if p.grad is not None} == expected
    if trained:
        torch.optim.AdamW(trainable.values(), lr=0.01).step()
    after = weights(stack)
    assert after.keys() == before.keys()
    assert {name for name, value in after.items() if not torch.equal(value, before[name])} == expected


def test_adapters_have_names_of_their_own_for_checkpoints() -> None:
    stack = new_adapted("stack", "trunk", target_modules=["q_proj"])
    assert list(adapter_parameters(stack, "trunk")) == [
        f"blocks.{i}.attention.q_proj.lora_{matrix}.trunk.weight" for i in range(2) for matrix in "AB"
    ]
    assert {p.dtype for p in adapter_parameters(stack, "trunk").values()} == {torch.float32}


def test_only_adapters_that_train_have_dropout_and_only_in_training_mode() -> None:
    stack = new_stack()
    adapt(stack, "stack", LoRAParams(dropout=0.5), k=1, seed=0)
    adapt(stack.eval(), "trunk", LoRAParams(dropout=0.25), k=1, seed=0)
    learn(stack, "stack")
    learn(stack, "trunk")
    train_only(stack, KINDS)
    plain = outputs(stack)
    assert torch.equal(outputs(stack), plain)
    stack.train()
    assert not torch.equal(outputs(stack), plain)
    layer: Any = stack.get_submodule("blocks.0.mlp.down_proj")
    train_only(stack, ["trunk"])
    assert (layer.lora_dropout.stack.p, layer.lora_dropout.trunk.p) == (0.0, 0.25)
    assert not torch.equal(outputs(stack), plain)
    train_only(stack, [])
    assert torch.equal(outputs(stack), plain)
    train_only(stack, ["stack"])
    assert (layer.lora_dropout.stack.p, layer.lora_dropout.trunk.p) == (0.5, 0.0)


def test_an_adapted_latent_attention_decodes_as_it_reads() -> None:
    model, _ = ARCHITECTURES["latent"]
    stack = new_adapted("stack", model=model).eval()
    x = inputs()
    cache = stack.new_cache(2, 16, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        steps = [stack(x[:, i : i + 1], cache=cache) for i in range(16)]
        torch.testing.assert_close(torch.cat(steps, 1), stack(x, Context(causal=True)), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("precision", FORMATS)
def test_peft_reads_what_was_saved_offline_and_without_a_warning(
    precision: Precision, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("nothing here may ask the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stack = new_adapted("stack", "trunk", precision=precision, rank=3, dropout=0.5).eval()
        for kind in KINDS:
            save_adapter(stack, kind, tmp_path)
            alone = new_adapted(kind, precision=precision, rank=3).eval()
            model = PeftModel.from_pretrained(new_stack(precision=precision), str(tmp_path / kind))
            assert torch.equal(outputs(model.eval()), outputs(alone))
        both: Any = PeftModel.from_pretrained(new_stack(precision=precision), str(tmp_path / "stack"), "stack")
        both.load_adapter(str(tmp_path / "trunk"), "trunk")
        both.base_model.set_adapter(list(KINDS))
        assert torch.equal(outputs(both.eval()), outputs(stack))


def test_a_saved_adapter_has_the_same_bytes_each_time(tmp_path: Path) -> None:
    for place in ("a", "b"):
        save_adapter(new_adapted("stack", "trunk"), "trunk", tmp_path / place)
    load_adapter(reloaded := new_stack(), "trunk", tmp_path / "a")
    save_adapter(reloaded, "trunk", tmp_path / "c")
    files = ["adapter_config.json", "adapter_model.safetensors"]
    assert sorted(file.name for file in (tmp_path / "a/trunk").iterdir()) == files
    for name in files:
        assert len({(tmp_path / place / "trunk" / name).read_bytes() for place in "abc"}) == 1
    config = json.loads((tmp_path / "a/trunk/adapter_config.json").read_text())
    assert config["target_modules"] == DENSE_NAMES
    assert config["base_model_name_or_path"] is config["auto_mapping"] is config["revision"] is None
    assert str(tmp_path) not in json.dumps(config)


@pytest.mark.parametrize("precision", FORMATS)
def test_loaded_adapters_are_those_that_were_saved_in_whatever_order(precision: Precision, tmp_path: Path) -> None:
    stack = new_adapted("stack", "trunk", precision=precision, dropout=0.5).eval()
    for kind in KINDS:
        save_adapter(stack, kind, tmp_path)
    for order in (KINDS, KINDS[::-1]):
        again = new_stack(precision=precision).eval()
        for kind in order:
            load_adapter(again, kind, tmp_path)
        assert torch.equal(outputs(again), outputs(stack))
        assert not any(p.requires_grad for p in again.parameters())
        train_only(again.train(), ["trunk"])
        assert not torch.equal(outputs(again), outputs(stack))  # dropout came back with it
        merge(again)
        merge(merged := new_adapted("stack", "trunk", precision=precision))
        assert all(torch.equal(weight, merged.state_dict()[name]) for name, weight in again.state_dict().items())


def test_the_adapter_of_another_stack_is_refused(tmp_path: Path) -> None:
    save_adapter(new_adapted("stack", rank=4), "stack", tmp_path)
    file = tmp_path / "stack/adapter_model.safetensors"
    wide = MODEL.model_copy(update={"mlp": MLPParams(hidden=96)})
    for model, blocks, complaint in (
        (wide, 2, "blocks.0.mlp.down_proj.lora_A.weight is [4, 128], expected [4, 96]"),
        (MODEL, 3, "blocks.2.attention.k_proj.lora_A.weight is missing, expected [4, 64]"),
        (MODEL, 1, "blocks.1.attention.k_proj.lora_A.weight is [4, 64], expected no such tensor"),
        (ARCHITECTURES["latent"][0], 2, "blocks.0.attention.k_proj.lora_A.weight is [4, 64], expected no such tensor"),
    ):
        stack = Stack(model, blocks)
        names = list(stack.state_dict())
        with pytest.raises(UserError) as error:
            load_adapter(stack, "stack", tmp_path)
        assert str(error.value).startswith(f"{file}: base_model.model.{complaint}: it is the adapter of another")
        assert list(stack.state_dict()) == names
    config = file.with_name("adapter_config.json")
    config.write_text(config.read_text().replace('"r": 4', '"r": 8'))
    with pytest.raises(UserError, match=r"k_proj.lora_A.weight is \[4, 64\], expected \[8, 64\]"):
        load_adapter(new_stack(), "stack", tmp_path)


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"{", b'{"peft_type": "LORA", "from": "later"}'])
def test_missing_and_damaged_files_are_named(file: str, content: bytes | None, tmp_path: Path) -> None:
    save_adapter(new_adapted("stack"), "stack", tmp_path)
    path = tmp_path / "stack" / file
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(UserError) as error:
        load_adapter(new_stack(), "stack", tmp_path)
    assert str(error.value).startswith(f"{tmp_path / 'stack'}: expected an adapter in PEFT's format")
    assert "`dvc repro` or `snakemake`" in str(error.value)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_merging_leaves_a_plain_stack(name: str) -> None:
    model, _ = ARCHITECTURES[name]
    stack = new_adapted("stack", "trunk", model=model)
    unmerged = outputs(stack)
    assert float((unmerged - outputs(new_stack(model))).abs().max()) > 0.1
    merge(stack)
    fresh = new_stack(model)
    assert [(n, type(m)) for n, m in stack.named_modules()] == [(n, type(m)) for n, m in fresh.named_modules()]
    assert {n: (w.shape, w.dtype) for n, w in stack.state_dict().items()} == {
        n: (w.shape, w.dtype) for n, w in fresh.state_dict().items()
    }
    assert all(p.requires_grad for p in stack.parameters())
    torch.testing.assert_close(outputs(stack), unmerged, rtol=0, atol=ROUNDING)
    merged = outputs(stack)
    adapt(stack, "stack", LoRAParams(), k=1, seed=0)
    merge(stack)
    assert torch.equal(outputs(stack), merged)


def test_an_adapter_belongs_to_the_weights_that_it_was_trained_on() -> None:
    """It has learned what quantization took away. The weights from before have that already."""
    wanted = outputs(new_stack())

    def error(stack: Stack) -> float:
        return float((outputs(stack) - wanted).square().mean())

    stack = new_stack(precision="nf4")
    quantized = error(stack)
    adapt(stack, "trunk", LoRAParams(rank=16), k=1, seed=0)
    train_only(stack, ["trunk"])
    optimizer = torch.optim.AdamW(adapter_parameters(stack, "trunk").values(), lr=2e-3)
    for _ in range(40):
        optimizer.zero_grad()
        (stack(inputs(), Context()) - wanted).square().mean().backward()
        optimizer.step()
    trained = error(stack)
    assert trained < 0.2 * quantized

    elsewhere = new_stack()
    adapt(elsewhere, "trunk", LoRAParams(rank=16), k=1, seed=0)
    for name, parameter in adapter_parameters(stack, "trunk").items():
        elsewhere.get_parameter(name).data.copy_(parameter)
    merge(elsewhere)
    unmerged = outputs(stack)
    merge(stack)
    torch.testing.assert_close(outputs(stack), unmerged, rtol=0, atol=ROUNDING)
    assert error(elsewhere) > 3 * error(stack)


@pytest.mark.parametrize("precision", get_args(Precision))
def test_adapters_on_weights_of_any_format_can_be_merged(precision: Precision) -> None:
    stack = new_adapted("stack", "trunk", precision=precision)
    assert {p.dtype for kind in KINDS for p in adapter_parameters(stack, kind).values()} == {torch.float32}
    unmerged = outputs(stack)
    merge(stack)
    assert {type(part) for part in stack.modules()} == {type(part) for part in new_stack().modules()}
    torch.testing.assert_close(outputs(stack), unmerged, rtol=0, atol=ROUNDING)
