"""Pipelines that begin with a model of Transformers, and end with one."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from stackwise.artifacts.manifest import read
from stackwise.config.params import load
from stackwise.errors import UserError
from stackwise.growth.racks import KIND, load_rack
from stackwise.interactive.configuring import StackWiseConfig
from stackwise.interactive.growing import ProgressiveTrainer
from tests.pipeline.inprocess import SHOWING, Changes, Pipeline, project, written
from tests.unit.test_import import LETTERS
from tests.unit.test_import import saved as saved_model
from workflow import command
from workflow.stages import table

LAYERS = 2
START: dict[str, Any] = {
    "tokenizer": {"type": "pretrained", "vocab_size": None},
    "model.attention": {"type": "gqa", "n_heads": 2, "n_kv_heads": 1},
    "growth.start": "model",
    "growth.start_stacks": 1,
    "stack.blocks": 1,
    "stacks": [{"blocks": LAYERS}, {}],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(LETTERS),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.2,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory, model: Any) -> Iterator[Pipeline]:
    root = tmp_path_factory.mktemp("start")
    saved_model(root / "model", model)
    with project(root) as found:
        yield found


def test_an_imported_model_is_fused_as_it_is(pipeline: Pipeline, model: Any) -> None:
    """Nothing is trained: the rack is the model. Fine-tuned for next tokens it goes back to Transformers."""
    changes = {**START, "n_stacks": 1, "stacks": [{"blocks": LAYERS}], "export.models": ["clm"]}
    made = pipeline.run(changes, leave_out=())
    assert not [name for name in made if name.startswith("train_")]
    assert {"import", "evaluate_imported", "fuse", "fine_tune_clm", "export_clm"} <= made.keys()
    rack = load_rack(pipeline.root / "artifacts/fused")
    tokens = torch.arange(20)[None]
    with torch.inference_mode():
        torch.testing.assert_close(rack.eval().logits(tokens, causal=True), model(tokens).logits, rtol=0.0, atol=1e-5)
        tuned = load_rack(pipeline.root / "artifacts/finetuned/clm").eval().logits(tokens, causal=True)
        again: Any = LlamaForCausalLM.from_pretrained(pipeline.root / "artifacts/exported/clm").eval()
        torch.testing.assert_close(again(tokens).logits, tuned, rtol=0.0, atol=1e-5)
    assert (tuned - model(tokens).logits).abs().max() > 1e-3
    card = (pipeline.root / "artifacts/exported/clm/README.md").read_text()
    measured = json.loads((pipeline.root / "metrics/clm.json").read_text())["next_token"]["bits_per_byte"]
    assert f"| next_token.bits_per_byte | {measured:.4f} |" in card


WAYS: dict[str, Changes] = {
    "append": {},
    "append-copy-quantized": {"trunk.precision": "nf4", "stack.blocks": 2, "stack.init": "copy"},
    "window": {"growth.window": 1},
    "fused": {"growth.mode": "fused"},
    "prepend": {"growth.building_mode": "prepend"},
    "insert": {"growth.building_mode": "insert", "growth.trunk_strategy": "frozen"},
    "qlora": {"growth.window": 1, "growth.trunk_strategy": "qlora", "adapters.trunk": {"rank": 2}},
    "end-to-end": {"growth.strategy": "end_to_end"},
    "sweeps": {"growth.sweeps": 1},
}


@pytest.mark.parametrize("way", WAYS)
def test_an_imported_model_grows(way: str, pipeline: Pipeline) -> None:
    """Stack 1 trains with the imported one as its trunk, or with it."""
    made = pipeline.run({**START, **WAYS[way]}, leave_out=(*SHOWING, "fine_tune", "export_rack"))
    trained = [name for name in made if name.startswith("train_")]
    assert trained
    rack = read(pipeline.root / "artifacts/fused", KIND)
    assert len(load_rack(rack.path).stacks) == 2
    theirs = load_file(pipeline.root / "model/model.safetensors")
    weights = load_file(rack.path / "model.safetensors")
    place = 1 if WAYS[way].get("growth.building_mode") in ("prepend", "insert") else 0
    kept = torch.equal(
        weights[f"stacks.{place}.blocks.0.mlp.down_proj.weight"], theirs["model.layers.0.mlp.down_proj.weight"]
    )
    assert kept == (way in ("append", "append-copy-quantized", "fused", "prepend", "insert"))


def test_it_grows_without_an_engine_too(pipeline: Pipeline) -> None:
    pipeline.run(START, leave_out=(*SHOWING, "fine_tune"))
    expected = (pipeline.root / "artifacts/fused/model.safetensors").read_bytes()
    trainer = ProgressiveTrainer(StackWiseConfig.from_yaml(), "runs")
    trainer.train_rack("one")
    assert (pipeline.root / "runs/one/artifacts/fused/model.safetensors").read_bytes() == expected
    with pytest.raises(UserError, match=r"expected one of \(1, 0\)"):
        trainer.data_loader("one", stack=0)


def test_the_plan_knows_what_is_not_trained(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written(pipeline.root / "params.yaml", START)
    monkeypatch.setattr("sys.argv", ["stackwise", "plan", "--vocab-size", str(len(LETTERS))])
    command.main()
    said = capsys.readouterr().out
    steps, batch, seq = 4, 4, 16
    assert f"{steps * batch * seq:,} tokens are trained on" in said
    assert "\nimport " in said
    assert "train_stack_0" not in said


def test_another_checkpoint_makes_all_anew(pipeline: Pipeline, model: Any) -> None:
    """What is imported depends on the files, and growing further imports nothing again."""
    few = {**START, "evaluate.samples": 2}
    before = pipeline.run(few, leave_out=(*SHOWING, "fine_tune"))
    more = pipeline.run({**few, "n_stacks": 3}, leave_out=(*SHOWING, "fine_tune"))
    assert more["import"] == before["import"]
    assert more["train_stack_1"] == before["train_stack_1"]
    stage = next(stage for stage in table(load("params.yaml")) if stage.name == "import")
    assert {"model/config.json", "model/model.safetensors"} <= set(stage.inputs)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model.mlp.hidden": 32}, "model.mlp.hidden = 32, the model has 24"),
        ({"model.norm_eps": 1e-5, "model.attention.n_heads": 4}, "model.norm_eps = 1e-05, the model has 1e-06"),
        ({"stacks": [{}, {}]}, "make 1 blocks, the model has 2"),
        ({"growth.start": "nowhere/at/all"}, "nowhere/at/all: no such directory"),
    ],
)
def test_a_start_that_does_not_fit_stops_everything(change: Changes, says: str, pipeline: Pipeline) -> None:
    with pytest.raises(UserError, match=says):
        pipeline.run({**START, **change})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"growth.start_stacks": None}, "growth.start_stacks = null: expected a number of stacks"),
        ({"growth.start_stacks": 3}, r"growth.start_stacks = 3: expected at most n_stacks \(2\)"),
        ({"growth.start": None, "tokenizer": {"type": "byte", "vocab_size": None}}, "no effect without growth.start"),
        ({"model.time.mode": "input"}, "model.time.mode = input: cannot be input with growth.start"),
        ({"stacks": [{"blocks": 2, "lr": 0.1}, {}]}, "stacks.0.lr = 0.1: has no effect: stack 0 comes from"),
        ({"tokenizer": {"type": "byte", "vocab_size": None}}, "tokenizer.type = byte: expected pretrained"),
        ({"model.embeddings.source": "model"}, "model.embeddings.source = model: has no effect with growth.start"),
        ({"n_stacks": 1, "stacks": [{}], "joint.share": 0.5}, "joint.share = 0.5: expected 0"),
        ({"export.models": ["clm", "nothing"]}, "expected names of models: fused, clm, mlm"),
        ({"export.models": ["clm", "clm"]}, "expected each name once"),
    ],
)
def test_parameters_that_cannot_be(change: Changes, says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        load(written(tmp_path / "params.yaml", {**START, **change}))
