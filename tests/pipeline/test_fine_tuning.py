"""Fine-tuning through the pipeline: on small labelled files that these tests make."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stackwise.api import FineTuner, ProgressiveTrainer, StackWiseConfig, TextClassifier, UserError
from stackwise.artifacts.manifest import read
from stackwise.finetuning.classifier import KIND as CLASSIFIER
from stackwise.growth.racks import KIND as RACK
from stackwise.growth.racks import load_rack
from stackwise.growth.validation import Validation
from tests.pipeline.inprocess import BASE, SHOWING, Changes, Pipeline, changed, contents, project

COLOURS = ["red", "blue", "green", "grey", "pink"]
THINGS = ["cat", "dog", "cup", "hat", "sun"]
LITTLE: dict[str, Any] = {"steps": 3, "batch_size": 4}
SHOWN = (*SHOWING, "analyse")
WITHOUT = (*SHOWN, "evaluate")


def write(name: str, rows: list[dict[str, Any]]) -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def own_data() -> None:
    """Texts that have the word `red` or not; words that are a colour or a thing; sums of two digits."""
    draw = random.Random(0)
    texts, sentences = [], []
    for _ in range(240):
        words = [draw.choice(COLOURS[1:] + THINGS) for _ in range(3)]
        if draw.random() < 0.5:
            words[draw.randrange(3)] = "red"
        own = {"text": " ".join(words), "reversed": " ".join(words[::-1])}
        texts.append(own | {"label": "red" in words, "other": words[0] in COLOURS})
        words = [draw.choice(COLOURS + THINGS) for _ in range(3)]
        labels = ["colour" if word in COLOURS else "thing" for word in words]
        sentences.append({"words": words, "labels": [None if draw.random() < 0.1 else label for label in labels]})
    write("texts.jsonl", texts)
    write("words.jsonl", sentences)
    write("sums.jsonl", [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(10) for b in range(10)])


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    with project(tmp_path_factory.mktemp("tuning")) as found:
        own_data()
        yield found


def metrics(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(f"metrics/{name}.json").read_text())
    return found


TEXTS = {"format": "sequence_labels", "files": ["texts.jsonl"], "validation_fraction": 0.25}
WORDS = {"format": "token_labels", "files": ["words.jsonl"], "validation_fraction": 0.25}
SUMS = {"format": "completion", "files": ["sums.jsonl"], "validation_fraction": 0.2}
LEARNING: dict[str, Any] = {"objective": "classification", "steps": 80, "batch_size": 16, "lr": 5.0e-3}


def test_classifiers_learn_a_rule_that_the_model_does_not_know_before(pipeline: Pipeline) -> None:
    """Accuracy above 0.9 on held-out rows; after one step at a rate that changes nothing it is near the majority's."""
    untrained = LEARNING | {"steps": 1, "lr": 1.0e-12}
    lora = {"method": "lora", "lora": {"rank": 8, "lr": 2.0e-2}}
    pipeline.run(
        {
            "seq_len": 32,
            "fine_tune": {
                "red": LEARNING | {"data": TEXTS},
                "red-untrained": untrained | {"data": TEXTS},
                "colours": LEARNING | {"data": WORDS},
                "colours-lora": LEARNING | lora | {"data": WORDS},
                "colours-untrained": untrained | {"data": WORDS},
            },
        },
        leave_out=WITHOUT,
    )
    for name in ("red", "colours", "colours-lora"):
        learned = metrics(name)["classification"]
        before = metrics(f"{name.split('-')[0]}-untrained")["classification"]
        assert learned["accuracy"] > 0.9, name
        assert learned["accuracy_low"] > before["accuracy_high"]
        assert learned["f1_macro"] > 0.9
        assert before["accuracy"] < 0.7
        assert learned["majority"] == before["majority"]
        assert learned["majority"]["accuracy"] < 0.7
    said = TextClassifier("artifacts/finetuned/red").classify(["blue red cat", "blue dog cat"])
    assert [max(own, key=own.__getitem__) for own in said] == ["true", "false"]
    tagger = TextClassifier("artifacts/finetuned/colours")
    assert tagger.labels == ("colour", "thing")
    assert tagger.tag([["red", "cat"], ["dog"]]) == [["colour", "thing"], ["thing"]]
    with pytest.raises(UserError, match="labels words: use tag"):
        tagger.classify(["red cat"])
    with pytest.raises(UserError, match="format 1 of kind rack, expected format 1 of kind classifier"):
        TextClassifier("artifacts/fused")


@pytest.mark.parametrize("objective", ["clm", "mlm", "diffusion"])
def test_completions_become_likelier(objective: str, pipeline: Pipeline) -> None:
    branch = {"objective": objective, "steps": 60, "batch_size": 8, "lr": 1.0e-2, "data": SUMS}
    few = {"evaluate": {"samples": 64, "draws": 4, "mask_rates": [0.5]}}
    pipeline.run({"fine_tune": {"long": branch, "short": branch | {"steps": 1}}, **few})
    long, short = metrics("long")["own"], metrics("short")["own"]
    assert long["nats_per_token"] < 0.7 * short["nats_per_token"]
    assert long["nats_per_token"] < long["unigram"]["nats_per_token"]
    assert metrics("long").keys() > {"own", "unigram"}  # and the corpus, as before
    assert ("accuracy" in long) == (objective == "clm")


def test_own_text_is_measured_as_the_corpus_is(pipeline: Pipeline) -> None:
    data = {"files": ["texts.jsonl"], "validation_fraction": 0.25}
    branch = LITTLE | {"objective": "diffusion", "data": data}
    pipeline.run({"fine_tune": {"own": branch}})
    found = metrics("own")
    assert found["own"].keys() == {"nelbo", "masked", "unigram"} == found.keys() - {"own", "depths"}
    assert found["own"]["nelbo"] != found["nelbo"]


# --- branches beside one another

BRANCHES: dict[str, Any] = {
    "clm": {"objective": "clm", **LITTLE},
    "sums": {"objective": "clm", "method": "lora", "merge": False, "data": SUMS, **LITTLE},
    "red": {"objective": "classification", "data": TEXTS, **LITTLE},
}


def test_branches_come_and_go_and_change_places_and_no_other_trains_again(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    from workflow import inprocess

    pipeline.run({"fine_tune": BRANCHES}, leave_out=SHOWN)
    ran: list[str] = []
    call = inprocess.call

    def noted(command: str) -> None:
        ran.append(command)
        call(command)

    monkeypatch.setattr(inprocess, "call", noted)
    reordered = {name: BRANCHES[name] for name in ("red", "clm", "sums")}
    pipeline.run({"fine_tune": reordered}, leave_out=SHOWN)
    pipeline.run({"fine_tune": {"clm": BRANCHES["clm"], "red": BRANCHES["red"]}}, leave_out=SHOWN)
    pipeline.run({"fine_tune": BRANCHES}, leave_out=SHOWN)
    checks = [command for command in ran if "check_params" not in command]
    assert checks == []
    pipeline.run({"fine_tune": {"first": {"objective": "mlm", **LITTLE}, **BRANCHES}}, leave_out=SHOWN)
    new = [command for command in ran if "check_params" not in command]
    assert len(new) == 2
    assert all("first" in command for command in new)


@pytest.mark.parametrize(
    ("changes", "stages"),
    [
        ({"fine_tune.sums.lr": 2.0e-3}, "fine_tune_sums evaluate_sums"),
        ({"fine_tune.sums.lora": {"rank": 2}}, "fine_tune_sums evaluate_sums"),
        ({"fine_tune.sums.lora": {"lr": 0.1}}, "fine_tune_sums evaluate_sums"),
        ({"fine_tune.sums.lora": {"alpha": 2.0}}, "fine_tune_sums evaluate_sums"),
        ({"fine_tune.sums.lora": {"dropout": 0.5}}, "fine_tune_sums evaluate_sums"),
        ({"fine_tune.sums.lora": {"target_modules": ["q_proj"]}}, "fine_tune_sums evaluate_sums"),
        ({"fine_tune.sums.method": "qlora"}, "fine_tune_sums evaluate_sums"),
        ({"fine_tune.sums.merge": True}, "fine_tune_sums"),  # what is made of it is the same
        ({"fine_tune.sums.objective": "mlm"}, "fine_tune_sums evaluate_sums"),
        ({"fine_tune.sums.objective": "mlm", "fine_tune.sums.unit": "word"}, "fine_tune_sums evaluate_sums"),
        ({"fine_tune.sums.steps": 2}, "fine_tune_sums evaluate_sums"),
        ({"fine_tune.sums.batch_size": 2}, "fine_tune_sums evaluate_sums"),
        ({"fine_tune.sums.data.validation_fraction": 0.5}, "prepare_sums fine_tune_sums evaluate_sums"),
        ({"fine_tune.sums.data.max_rows": 60}, "prepare_sums fine_tune_sums evaluate_sums"),
        ({"fine_tune.sums.data.completion_column": "prompt"}, "prepare_sums fine_tune_sums evaluate_sums"),
        ({"fine_tune.sums.data.prompt_column": "completion"}, "prepare_sums fine_tune_sums evaluate_sums"),
        ({"fine_tune.sums.data.validation_files": ["sums.jsonl"], "fine_tune.sums.data.validation_fraction": 0.1},
         "prepare_sums fine_tune_sums evaluate_sums"),
        ({"fine_tune.red.data.labels": ["true", "false"]}, "prepare_red fine_tune_red evaluate_red"),
        ({"fine_tune.red.data.label_column": "other"}, "prepare_red fine_tune_red evaluate_red"),
        ({"fine_tune.red.data.text_column": "reversed"}, "prepare_red fine_tune_red evaluate_red"),
        ({"fine_tune.red.lr": 0.5}, "fine_tune_red evaluate_red"),
        ({"fine_tune.clm.lr": 2.0e-3}, "fine_tune_clm evaluate_clm"),
    ],
    ids=str,
)  # fmt: skip
def test_a_parameter_of_a_branch_changes_that_branch(changes: Changes, stages: str, pipeline: Pipeline) -> None:
    before = pipeline.run({"fine_tune": BRANCHES}, leave_out=SHOWN)
    after = pipeline.run({"fine_tune": BRANCHES, **changes}, leave_out=SHOWN)
    assert {name for name in after if after[name] != before[name]} == set(stages.split())


QLORA: dict[str, Any] = {"objective": "clm", "method": "qlora", "merge": False, "data": SUMS, **LITTLE}


@pytest.mark.parametrize("precision", ["half", "int8", "fp8", "fp4", "nvfp4"])
def test_every_format_below_adapters_is_another(precision: str, pipeline: Pipeline) -> None:
    before = pipeline.run({"fine_tune": {"q": QLORA}}, leave_out=WITHOUT)
    after = pipeline.run({"fine_tune": {"q": QLORA | {"precision": precision}}}, leave_out=WITHOUT)
    assert {name for name in after if after[name] != before[name]} == {"fine_tune_q"}


def test_an_unmerged_rack_has_the_base_and_peft_adapters(pipeline: Pipeline) -> None:
    pipeline.run({"fine_tune": BRANCHES})
    tuned, fused = Path("artifacts/finetuned/sums"), Path("artifacts/fused")
    assert (tuned / "model.safetensors").read_bytes() == (fused / "model.safetensors").read_bytes()
    config = json.loads((tuned / "adapters/0/task/adapter_config.json").read_text())
    assert (config["peft_type"], config["r"]) == ("LORA", 8)
    merged = load_rack(tuned).state_dict()
    plain = load_rack(fused).state_dict()
    changed_weights = {name for name, weight in merged.items() if not weight.equal(plain[name])}
    assert changed_weights
    assert all("_proj" in name for name in changed_weights)


def test_branches_write_texts_and_stand_in_the_report_but_a_classifier_writes_none(pipeline: Pipeline) -> None:
    pipeline.run({"fine_tune": BRANCHES, "export.models": ["sums"]}, leave_out=())
    assert sorted(path.name for path in Path("artifacts/samples").iterdir()) == ["clm", "fused", "sums"]
    assert "sums" in Path("artifacts/report/samples.html").read_text()
    assert Path("artifacts/exported/sums/config.json").exists()
    told = json.loads(Path("metrics/summary.json").read_text())
    assert told["red"] == {
        f"classification_{key}": metrics("red")["classification"][key] for key in ("accuracy", "f1_macro")
    }
    assert told["sums"]["own_bits_per_byte"] == metrics("sums")["own"]["bits_per_byte"]


# --- early stopping and resuming

STOPPING: Changes = {
    "optimizer.schedule": "constant",
    "fine_tune": {
        "sums": {
            "objective": "clm", "steps": 24, "batch_size": 4, "lr": 0.1,
            "stop_every": 2, "patience": 2, "stop_samples": 8, "data": SUMS,
        },
        "red": {
            "objective": "classification", "method": "lora", "steps": 24, "batch_size": 4, "lr": 0.3,
            "stop_every": 2, "patience": 2, "stop_samples": 8, "data": TEXTS,
        },
    },
}  # fmt: skip


def facts(branch: str) -> dict[str, Any]:
    found = read(Path(f"artifacts/finetuned/{branch}"), CLASSIFIER if branch == "red" else RACK).facts
    return {key: found.get(key) for key in ("steps", "best_step")}


@pytest.mark.parametrize("branch", ["sums", "red"])
def test_the_best_is_kept(branch: str, pipeline: Pipeline) -> None:
    pipeline.run(STOPPING, leave_out=WITHOUT)
    stopped, weights = facts(branch), contents(Path(f"artifacts/finetuned/{branch}"))
    best = stopped["best_step"]
    assert 0 < best <= stopped["steps"] == min(24, best + 4) < 24
    until = {f"fine_tune.{branch}.steps": best, f"fine_tune.{branch}.patience": 100}
    pipeline.run({**STOPPING, **until}, leave_out=WITHOUT)
    assert contents(Path(f"artifacts/finetuned/{branch}")) == weights


@pytest.mark.parametrize("branch", ["sums", "red"])
def test_a_branch_that_is_killed_ends_in_the_same_bytes(
    branch: str, pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only = {**STOPPING, "fine_tune": {branch: STOPPING["fine_tune"][branch]}}
    pipeline.run(only, leave_out=WITHOUT)
    manifest = Path(f"artifacts/finetuned/{branch}/manifest.json")
    expected, last, calls = manifest.read_bytes(), facts(branch)["steps"] // 2, []
    validate = Validation.loss

    def killed(self: Validation) -> float:
        calls.append(validate(self))
        if len(calls) == last:
            raise KeyboardInterrupt
        return calls[-1]

    with project(tmp_path) as twin:
        own_data()
        with monkeypatch.context() as patch:
            patch.setattr(Validation, "loss", killed)
            with pytest.raises(UserError, match="interrupted"):
                twin.run({**only, "checkpoint.every": 3}, leave_out=WITHOUT)
        assert len(list(Path(".stackwise/checkpoints").iterdir())) == 1
        twin.run({**only, "checkpoint.every": 3}, leave_out=WITHOUT)
        assert manifest.read_bytes() == expected
        assert not list(Path(".stackwise/checkpoints").iterdir())


# --- from Python


def test_from_python_the_same_bytes(pipeline: Pipeline) -> None:
    pipeline.run({"fine_tune": BRANCHES})
    trainer = ProgressiveTrainer(StackWiseConfig.from_dict(changed(BASE, {"fine_tune": BRANCHES})))
    trainer.train_rack("own")
    tuner = FineTuner(trainer)
    for branch in BRANCHES:
        tuner.fine_tune(branch, "own")
        for kind in ("prepared", "finetuned"):
            place = Path(f"artifacts/{kind}/{branch}")
            if place.exists():
                there = contents("runs/own" / place)
                assert there == contents(place)
    for branch, name in (("sums", "own"), ("red", "classification")):
        assert tuner.evaluate(branch, "own") == metrics(branch)[name]
    with pytest.raises(UserError, match=r"branch = other: no such branch of fine-tuning; the config has clm, sums"):
        tuner.fine_tune("other", "own")
    with pytest.raises(UserError, match=r"fine_tune\.clm\.data: expected completions or labels"):
        tuner.evaluate("clm", "own")
