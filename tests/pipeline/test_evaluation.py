"""What the pipeline measures: depths, questions, samples, and what is inside, through the stages' own scripts."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stackwise.artifacts.code import PROJECT
from stackwise.errors import UserError
from tests.pipeline.inprocess import BASE, Changes, Pipeline, project

QUIZ = [{"prompt": "a ", "choices": ["b", "cc"], "answer": i % 2} for i in range(6)]
ASKED: Changes = {"evaluate.choices": [{"file": "quiz.jsonl", "draws": 3}], "samples.number": 3}
FIGURES = {f"{name}.svg" for name in ("similarity", "boundaries", "lens", "lens_text", "attention", "maps")}
ONLY_CLM = {"clm": BASE["fine_tune"]["clm"]}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    root = tmp_path_factory.mktemp("evaluation")
    (root / "quiz.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUIZ))
    with project(root) as found:
        yield found


def metrics(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(f"metrics/{name}.json").read_text())
    return found


def figures(tree: dict[str, Any], name: str) -> Iterator[dict[str, Any]]:
    """All mappings within `tree` that have a figure of this name."""
    for value in tree.values():
        if isinstance(value, dict):
            yield from figures(value, name)
    if name in tree:
        yield tree


def test_everything_is_measured(pipeline: Pipeline) -> None:
    pipeline.run(ASKED, leave_out=())
    fused, clm = metrics("fused"), metrics("clm")
    for found, figure in ((fused, "nelbo"), (clm, "next_token")):
        assert list(found["depths"]) == ["0", "1", "2"]
        assert found["depths"]["2"][figure] == found[figure]
        operations = [depth["operations_per_token"] for depth in found["depths"].values()]
        assert 0 < operations[0] < operations[1] < operations[2]
    stack = metrics("stack_1")
    assert stack["nelbo"] == fused["nelbo"]
    for found in (fused, clm, stack, metrics("samples"), metrics("choices/fused"), metrics("choices/clm")):
        for name in ("bits_per_byte", "accuracy", "perplexity", "token_entropy"):
            for own in figures(found, name):
                assert own[f"{name}_low"] <= own[name] <= own[f"{name}_high"]
    assert metrics("samples").keys() == {"held_out", "fused", "clm", "mlm"}
    assert {own["texts"] for own in metrics("samples").values()} == {3}
    assert metrics("choices/mlm")["quiz"]["chance"] == 0.5
    assert metrics("choices/mlm")["quiz"]["rows"] == 6
    report = {path.name for path in Path("artifacts/report").iterdir()}
    assert report >= {"exits.svg", "choices.svg", "sample_quality.svg", "masked_nll.svg"}


def test_the_inside_is_that_of_both_models(pipeline: Pipeline) -> None:
    pipeline.run(ASKED, leave_out=())
    found = metrics("analysis")
    assert found.keys() == {"bidirectional, 50% masked", "causal", "attention", "unigram"}
    for way in ("bidirectional, 50% masked", "causal"):
        assert list(found[way]) == ["0", "1", "2"]
        assert all(1 <= point["effective_rank"] <= 16 for point in found[way].values())
    assert found["attention"].keys() == {"bidirectional", "causal"}
    assert (
        found["attention"]["causal"]["uniform"]["entropy"] < found["attention"]["bidirectional"]["uniform"]["entropy"]
    )
    assert [row["boundary"] for row in json.loads(Path("metrics/boundaries.json").read_text())] == [0, 1, 2]
    room = Path("artifacts/analysis")
    assert {path.name for path in room.glob("*.svg")} == FIGURES
    lens = json.loads((room / "lens_text.json").read_text())["bidirectional, 50% masked"]
    assert len(lens["inputs"]) == len(lens["guesses"][0]) == 8
    assert [token == "[MASK]" for token in lens["inputs"]] == [wanted is not None for wanted in lens["wanted"]]
    for own in json.loads((room / "maps.json").read_text()).values():
        assert len(own) == 1
        assert all(sum(row) <= 1.001 for row in own[0]["weights"])


def test_made_again_it_is_the_same_bytes(pipeline: Pipeline) -> None:
    before = pipeline.run(ASKED, leave_out=())
    for entry in Path(".memory").iterdir():  # of these stages alone
        if any((entry / path).exists() for path in ("artifacts/analysis", "artifacts/report", "metrics/choices")):
            for file in sorted(entry.rglob("*"), reverse=True):
                file.rmdir() if file.is_dir() else file.unlink()
            entry.rmdir()
    assert pipeline.run(ASKED, leave_out=()) == before


@pytest.mark.parametrize(
    ("changes", "kept", "missing"),
    [
        ({"objective": {"type": "clm"}, "fine_tune": {}}, {"causal"}, {"bidirectional, 50% masked"}),
        ({"fine_tune": {}}, {"bidirectional, 50% masked"}, {"causal"}),
        ({"model.attention.type": "kernel", "fine_tune": ONLY_CLM}, {"causal"}, set()),
        ({"model.attention": {"type": "mla", "n_heads": 2, "mla_rkv": 8}, "fine_tune": ONLY_CLM}, {"causal"}, set()),
    ],
    ids=["causal from the start", "no causal model", "kernels", "latents"],
)
def test_any_rack_can_be_looked_into(changes: Changes, kept: set[str], missing: set[str], pipeline: Pipeline) -> None:
    stages = pipeline.run({**changes, "samples.number": 1}, leave_out=())
    assert kept <= metrics("analysis").keys()
    assert not missing & metrics("analysis").keys()
    assert {path.name for path in Path("artifacts/analysis").glob("*.svg")} == FIGURES
    assert ("score_samples" in stages) == ("causal" in metrics("analysis"))


def test_another_scorer_scores_otherwise(pipeline: Pipeline) -> None:
    causal: Changes = {"objective": {"type": "clm"}, "fine_tune": ONLY_CLM}
    first, own, other = (
        pipeline.run({**causal, **more}, leave_out=("report",))
        for more in ({}, {"evaluate.scorer": "fused"}, {"evaluate.scorer": "clm"})
    )
    assert first == own
    assert {name for name in own if own[name] != other[name]} == {"score_samples"}


@pytest.mark.parametrize(
    ("line", "says"), [(None, "cannot be read"), ("{}", "no prompt"), ('{"prompt": 3', "not JSON")]
)
def test_a_bad_file_stops_everything(line: str | None, says: str, pipeline: Pipeline) -> None:
    file = Path("bad.jsonl")
    file.unlink(missing_ok=True)
    if line is not None:
        file.write_text(line)
    with pytest.raises(UserError, match=says) as refused:
        pipeline.run({"evaluate.choices": [{"file": "bad.jsonl"}]})
    assert "bad.jsonl" in str(refused.value)
    assert "check_params" in str(refused.value) or line is None


def test_the_command_tells_the_same(pipeline: Pipeline, capsys: pytest.CaptureFixture[str]) -> None:
    import argparse

    from workflow import evaluate

    pipeline.run(ASKED, leave_out=())
    Path("own.txt").write_text("some words, again and again. " * 3)

    def asked(*arguments: str) -> str:
        parser = argparse.ArgumentParser()
        evaluate.declare(parser)
        evaluate.run(parser.parse_args([*arguments, "--device", "cpu"]))
        return capsys.readouterr().out

    told = json.loads(asked("--model", "artifacts/finetuned/clm", "--file", "quiz.jsonl", "own.txt", "--json"))
    assert told["quiz.jsonl, 6 questions"] == pytest.approx(metrics("choices/clm")["quiz"])
    assert told["own.txt"]["next_token"]["bits_per_byte"] > 0
    held_out = json.loads(asked("--model", "artifacts/fused", "--samples", "4", "--draws", "1", "--json"))
    assert next(iter(held_out.values()))["nelbo"] == pytest.approx(metrics("fused")["nelbo"])
    text = asked("--model", "artifacts/fused", "--file", "quiz.jsonl")
    assert "chance" in text
    assert "50.0%" in text
    for arguments, says in (
        (("--model", "none"), "no such directory"),
        (("--model", "artifacts/fused", "--file", "quiz.csv"), "expected a text"),
        (("--model", "artifacts/fused", "--samples", "0"), "--samples 0"),
        (("--model", "artifacts/fused", "--file", "none.txt"), "cannot be read"),
    ):
        with pytest.raises(UserError, match=says):
            asked(*arguments)


@pytest.mark.parametrize("page", ["evaluation", "understanding"])
def test_the_python_of_the_pages_runs(page: str, pipeline: Pipeline, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline.run(ASKED, leave_out=())
    text = (PROJECT / f"docs/{page}.md").read_text()
    for block in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        exec(compile(block, page, "exec"), {})
    assert "[" in capsys.readouterr().out
