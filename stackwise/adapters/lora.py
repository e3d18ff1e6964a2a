"""Low-rank adapters of a stack (Hu et al. 2021, LoRA; Dettmers et al. 2023, QLoRA).

A stack carries several at once: `stack`, which it learned while it was new and its own weights stayed as they began,
`trunk`, which it learned later, on quantized weights, under newer stacks, and `task`, which it learned when the whole
rack was fine-tuned. A projection `W` then computes
`W x + sum_i (alpha_i / rank_i) B_i A_i x`. They are PEFT's layers, put into the stack in place, and PEFT's files.
"""

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.functional import inject_adapter_in_model, set_adapter
from peft.tuners.lora import LoraLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stackwise.config.growth import Kind, LoRAParams
from stackwise.errors import UserError
from stackwise.growth.init import initialize
from stackwise.model.stack import Stack
from stackwise.precision.formats import dequantize

KINDS: tuple[Kind, ...] = ("stack", "trunk", "task")
_PREFIX = "base_model.model."
"""What PEFT's files put in front of a tensor's name in the stack."""


def adapt(stack: Stack, kind: Kind, params: LoRAParams, *, k: int, seed: int, key: str | None = None) -> None:
    """Give a stack a fresh adapter, in place. It changes no output yet, and nothing of the stack trains until
    `train_only` says what.

    B is zero. A is normal with standard deviation `d_in ** -0.5`, as all matrices of a rack: a function of its name,
    shape and seed alone.

    Args:
        stack: without an adapter of this kind; quantized or not, but not to be quantized later.
        kind: which it is.
        params: of adapters.
        k: index of the stack in the rack, for its rank, alpha and names.
        seed: of the pipeline.
        key: the parameter that `params` are, for messages (None: `adapters.<kind>`).

    Raises:
        UserError: `target_modules` names what the architecture does not have.
    """
    names = sorted({path.rpartition(".")[2] for path, _ in _projections(stack)})
    targets = names if params.target_modules is None else sorted(params.target_modules)
    unknown = [name for name in targets if name not in names]
    if unknown:
        raise UserError(
            f"{key or f'adapters.{kind}'}.target_modules = {params.target_modules}: stack {k} has no projection "
            f"{unknown[0]}; expected names of {', '.join(names)}, or null for all"
        )
    config = LoraConfig(
        r=params.rank_of(k),
        lora_alpha=params.alpha_of(k),  # type: ignore[arg-type]  # PEFT computes with any number
        lora_dropout=params.dropout,
        target_modules=targets,
    )
    _inject(stack, kind, config)
    for path, layer in _adapted(stack, kind):
        initialize(layer.lora_A[kind], name=f"stacks.{k}.{path}.lora_A.{kind}", seed=seed)
        nn.init.zeros_(layer.lora_B[kind].weight)


def train_only(stack: Stack, kinds: Collection[Kind]) -> None:
    """Let the adapters of `kinds` train and freeze all else; only they have dropout, in training mode."""
    stack.requires_grad_(False)
    for kind in kinds:
        assert kind in _configs(stack), f"the stack has no adapter {kind}"
    for kind, config in _configs(stack).items():
        for _, layer in _adapted(stack, kind):
            trains = kind in kinds
            layer.lora_A[kind].requires_grad_(trains)
            layer.lora_B[kind].requires_grad_(trains)
            if config.lora_dropout:
                layer.lora_dropout[kind].p = config.lora_dropout if trains else 0.0


def adapter_parameters(stack: Stack, kind: Kind) -> dict[str, nn.Parameter]:
    """The matrices of one adapter, by their names in `stack.named_parameters()`: `<projection>.lora_A.<kind>.weight`
    `[rank, d_in]` and `<projection>.lora_B.<kind>.weight` `[d_out, rank]`, fp32."""
    ends = tuple(f".{matrix}.{kind}.weight" for matrix in ("lora_A", "lora_B"))
    return {name: parameter for name, parameter in stack.named_parameters() if name.endswith(ends)}


def save_adapter(stack: Stack, kind: Kind, directory: Path) -> None:
    """Write an adapter in PEFT's format into `directory / kind`, from which `PeftModel.from_pretrained` reads it."""
    _configs(stack)[kind].save_pretrained(str(directory / kind))
    tensors = {
        _PREFIX + name.replace(f".{kind}.weight", ".weight"): parameter.detach()
        for name, parameter in adapter_parameters(stack, kind).items()
    }
    save_file(tensors, directory / kind / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})


def load_adapter(stack: Stack, kind: Kind, directory: Path) -> None:
    """Give a stack the adapter that lies in `directory / kind`, in place; nothing trains until `train_only` says what.

    Args:
        stack: without an adapter of this kind; quantized or not, but not to be quantized later.
        kind: which it is.
        directory: where `save_adapter` wrote it.

    Raises:
        UserError: it is missing or damaged, or of another architecture.
    """
    config, tensors = _read(directory / kind)
    expected: dict[str, list[int]] = {}
    for path, linear in _projections(stack):
        if path.rpartition(".")[2] in (config.target_modules or ()):
            expected[f"{_PREFIX}{path}.lora_A.weight"] = [config.r, linear.in_features]
            expected[f"{_PREFIX}{path}.lora_B.weight"] = [linear.out_features, config.r]
    for name in sorted(expected.keys() | tensors.keys()):
        found, wanted = list(tensors[name].shape) if name in tensors else None, expected.get(name)
        if found != wanted:
            raise UserError(
                f"{directory / kind / SAFETENSORS_WEIGHTS_NAME}: {name} is {found or 'missing'}, expected "
                f"{wanted or 'no such tensor'}: it is the adapter of another architecture or rank; run `dvc repro` or "
                "`snakemake`, which train what does not fit again"
            )
    _inject(stack, kind, config)
    with torch.no_grad():
        for name, parameter in adapter_parameters(stack, kind).items():
            parameter.copy_(tensors[_PREFIX + name.replace(f".{kind}.weight", ".weight")])


def merge(stack: Stack) -> None:
    """Add all adapters to the weights that they were trained on, in fp32, in place: a plain stack remains, and all of
    it may train.

    What was quantized is dequantized first: an adapter makes up for the errors of the weights below it, so the weights
    from before quantization are the wrong ones to add it to.
    """
    dequantize(stack)
    for path, layer in list(_adapted(stack, *KINDS)):
        linear = layer.get_base_layer()
        weight = linear.weight.detach()
        for kind in layer.active_adapters:
            if kind in layer.lora_A:
                weight = weight + layer.get_delta_weight(kind).detach()
        linear.weight = nn.Parameter(weight)
        stack.set_submodule(path, linear)
    vars(stack).pop("peft_config", None)
    stack.requires_grad_(True)


def base_weights(stack: Stack) -> dict[str, Tensor]:
    """The weights of a stack without its adapters, under the names that they have in a stack that has none."""
    adapters = (".lora_A.", ".lora_B.")
    weights = {name: w for name, w in stack.state_dict().items() if not any(part in name for part in adapters)}
    return {name.replace(".base_layer.", "."): w for name, w in weights.items()}


def kinds_of(stack: Stack) -> list[Kind]:
    """The adapters that a stack has."""
    return list(_configs(stack))


def _projections(stack: Stack) -> Iterator[tuple[str, Any]]:
    """What of a stack can have adapters, adapted or not, with its name: the linear maps of all blocks' attention and
    feed-forward networks, but not a router, whose balance is that of the weights that it was trained with."""
    for i, block in enumerate(stack.blocks):
        for part in ("attention", "mlp"):
            yield from _linear_maps(block.get_submodule(part), f"blocks.{i}.{part}")


def _linear_maps(module: nn.Module, path: str) -> Iterator[tuple[str, Any]]:
    for name, part in module.named_children():
        if not isinstance(part, nn.Linear | LoraLayer):
            yield from _linear_maps(part, f"{path}.{name}")
        elif name != "router":
            yield f"{path}.{name}", part


def _adapted(stack: Stack, *kinds: Kind) -> Iterator[tuple[str, Any]]:
    """The projections that have an adapter of any of `kinds`, with their names."""
    for path, layer in _projections(stack):
        if isinstance(layer, LoraLayer) and any(kind in layer.lora_A for kind in kinds):
            yield path, layer


def _configs(stack: Stack) -> dict[Kind, LoraConfig]:
    """Of each adapter that a stack has."""
    return vars(stack).get("peft_config", {})


def _inject(stack: Stack, kind: Kind, config: LoraConfig) -> None:
    """Put an adapter of undefined weights into a stack; all is frozen."""
    configs: dict[Kind, LoraConfig] = vars(stack).pop("peft_config", {})  # PEFT warns of any that it finds
    assert kind not in configs, f"the stack has an adapter {kind}"
    device = next(stack.parameters()).device
    # Without memory at first: PEFT would draw weights from the global generator.
    inject_adapter_in_model(config, stack, kind, low_cpu_mem_usage=True)
    for _, layer in _adapted(stack, kind):
        layer.lora_A[kind].to_empty(device=device)
        layer.lora_B[kind].to_empty(device=device)
    config.target_modules = sorted(config.target_modules or ())  # a set has no order to write it in
    configs = configs | {kind: config}
    vars(stack)["peft_config"] = configs
    set_adapter(stack, [kind for kind in KINDS if kind in configs])  # whichever came first, they are added in one order
    stack.train(stack.training)
    train_only(stack, ())


def _read(directory: Path) -> tuple[LoraConfig, dict[str, Tensor]]:
    file = directory / SAFETENSORS_WEIGHTS_NAME
    try:
        # Not by PEFT, which asks the hub for what is not there.
        config = LoraConfig(**json.loads((directory / CONFIG_NAME).read_text(encoding="utf-8")))
        return config, load_file(file)
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise UserError(
            f"{directory}: expected an adapter in PEFT's format ({CONFIG_NAME}, {file.name}), but it is missing or "
            f"damaged ({error}); run `dvc repro` or `snakemake`, which make it again"
        ) from None
