"""The Python in docs/architecture.md and docs/python.md runs, and what the pages say of costs and names is so."""

import re
import shutil
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

import stackwise.api
from stackwise.config.model import AttentionParams, MLPParams, ModelParams, PretrainedParams, TimeParams
from stackwise.config.objective import ObjectiveParams
from stackwise.config.section import Section
from stackwise.model.parts import build_attention, build_mlp
from stackwise.model.stack import Block, Stack

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/architecture.md").read_text()


def run_python(path: str) -> dict[str, Any]:
    """Run all blocks of a page in one namespace, which is returned."""
    page = (ROOT / path).read_text()
    names: dict[str, Any] = {"__name__": path}
    for block in re.finditer(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        line = page.count("\n", 0, block.start(1))
        torch.manual_seed(0)
        exec(compile("\n" * line + block[1], path, "exec"), names)
    return names


def test_the_python_of_the_architecture_runs() -> None:
    """Then the tests that it defines."""
    tests = [value for name, value in run_python("docs/architecture.md").items() if name.startswith("test_")]
    assert tests
    for test in tests:
        test()


def test_the_python_of_notebooks_runs(tmp_path: Path) -> None:
    """All that `stackwise.api` names is in it."""
    shutil.copy(ROOT / "params.yaml", tmp_path)
    deterministic = torch.are_deterministic_algorithms_enabled()
    with chdir(tmp_path):
        names = run_python("docs/python.md")
    torch.use_deterministic_algorithms(deterministic)
    assert set(stackwise.api.__all__) <= names.keys()


def test_every_choice_is_on_the_page() -> None:
    choices: list[tuple[type[Section], str]] = [
        (AttentionParams, "type"),
        (AttentionParams, "kernel"),
        (AttentionParams, "rope_scaling"),
        (MLPParams, "type"),
        (TimeParams, "mode"),
        (TimeParams, "mapping"),
        (PretrainedParams, "tensor"),
        (ObjectiveParams, "type"),
        (ObjectiveParams, "masks"),
    ]
    for section, key in choices:
        annotation = section.model_fields[key].annotation
        values = [v for part in (annotation, *get_args(annotation)) for v in get_args(part) if isinstance(v, str)]
        assert values
        for value in values:
            assert value == "none" or f"`{value}`" in PAGE or f": {value}`" in PAGE, (
                f"{section.__name__}.{key}: {value}"
            )


def test_every_key_of_the_model_is_on_the_page() -> None:
    without = {"norm_eps"}
    for section in (ModelParams, AttentionParams, MLPParams, TimeParams, PretrainedParams):
        for key in section.model_fields.keys() - without:
            assert re.search(rf"[`.\s{{]{key}\b", PAGE), f"{section.__name__}.{key}"


def test_every_file_that_is_named_exists() -> None:
    named = set(re.findall(r"`((?:stackwise|tests)/[\w/]+\.py)`", PAGE)) - {"stackwise/attention/average.py"}
    assert len(named) > 5
    missing = {name for name in named if not (ROOT / name).exists()}
    assert not missing


# --- costs, with the symbols of the page

d, h, g, w, F, rq, c, r, n, v = 24, 4, 2, 8, 10, 5, 7, 4, 3, 6
LATENT: dict[str, Any] = {"mla_rkv": c, "mla_rope_dim": r, "mla_nope_dim": n, "mla_v_dim": v}
ATTENTIONS: dict[str, tuple[dict[str, Any], int, Callable[[int], int]]] = {
    "standard": ({}, 4 * d * h * w, lambda seq: 4 * 2 * h * w * seq),
    "gqa": ({"n_kv_heads": g}, 2 * d * h * w + 2 * d * g * w, lambda seq: 4 * 2 * g * w * seq),
    "mla": (
        {**LATENT, "mla_rq": rq},
        d * rq + rq * h * (n + r) + d * (c + r) + c * h * (n + v) + h * v * d,
        lambda seq: 4 * (c + r) * seq,
    ),
    "kernel": (
        {"n_kv_heads": g, "features": F},
        2 * d * h * w + 2 * d * g * w,
        lambda _: 4 * g * F * (w + 1),
    ),
    "mlgka": (
        {**LATENT, "mla_rq": rq, "n_kv_heads": g, "features": F},
        d * rq + rq * h * (n + r) + d * (c + r) + c * g * (n + v) + h * v * d,
        lambda _: 4 * g * F * (v + 1),
    ),
}


def matrices(module: torch.nn.Module) -> int:
    """Trainable weights without those of norms."""
    return sum(p.numel() for p in module.parameters() if p.ndim > 1)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_costs_of_attention(name: str) -> None:
    keys, weights, cache_bytes = ATTENTIONS[name]
    attention = AttentionParams(type=name, n_heads=h, head_dim=w, **keys)  # type: ignore[arg-type]
    built: Any = build_attention(ModelParams(d_model=d, attention=attention))
    assert matrices(built) == weights
    for seq in (16, 32):
        counters = 8 if name in ("kernel", "mlgka") else 0  # one int64 for each sample
        found = built.new_cache(1, seq, torch.device("cpu"), torch.float32).bytes()
        assert found == cache_bytes(seq) + counters


def test_costs_of_feed_forward_networks() -> None:
    E, shared, hidden = 4, 1, 10
    dense, frozen, moe = (
        matrices(build_mlp(ModelParams(d_model=d, mlp=mlp)))
        for mlp in (
            MLPParams(hidden=hidden),
            MLPParams(hidden=hidden, frozen_up=True),
            MLPParams(type="moe", hidden=hidden, n_experts=E, n_shared=shared),
        )
    )
    assert (dense, frozen, moe) == (3 * d * hidden, d * hidden, d * E + 3 * d * hidden * (E + shared))


def test_costs_of_time() -> None:
    time = TimeParams(mode="input", width=6, embedding="learned", bins=5)
    plain, timed = (ModelParams(d_model=d, time=t) for t in (TimeParams(), time))
    sizes = [sum(p.numel() for p in Block(model).parameters()) for model in (plain, timed)]
    assert sizes[1] - sizes[0] == 6 * d * (6 + 1)
    stacks = [sum(p.numel() for p in Stack(model, 1).parameters()) for model in (plain, timed)]
    assert stacks[1] - stacks[0] == 6 * d * (6 + 1) + 2 * 6 * (6 + 1) + 5 * 6
