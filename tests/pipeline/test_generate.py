"""`stackwise generate` with models that the pipeline has made."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline.inprocess import Pipeline, project
from workflow import command

CLM, FUSED = "artifacts/finetuned/clm", "artifacts/fused"
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    with project(tmp_path_factory.mktemp("generate")) as found:
        found.run({"objective.mask_max": 1.0}, leave_out=("evaluate", "sample", "score_samples", "report"))
        yield found


@pytest.fixture
def call(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Exit code, standard output and error of the command."""

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["stackwise", "generate", *words])
        code: Any = 0
        try:
            command.main()
        except SystemExit as stop:
            code = stop.code
        said = capsys.readouterr()
        text = f"{code}\n" if isinstance(code, str) else ""  # as Python does when it ends with a text
        return (1 if text else int(code or 0)), said.out, said.err + text

    return run


def test_left_to_right(call: Call) -> None:
    code, out, _ = call("--model", CLM, "--prompt", "The ", "--new-tokens", "8", "--no-end")
    assert code == 0
    assert out.startswith("The ")
    assert call("--model", CLM, "--prompt", "The ", "--new-tokens", "8", "--no-end", "--no-live")[1] == out
    assert call("--model", CLM, "--prompt", "The ", "--new-tokens", "8", "--no-end", "--seed", "1")[1] != out
    one, two = (call("--model", CLM, "--prompt", "The ", "--temperature", "0", "--seed", s)[1] for s in "12")
    assert one == two


def test_unmasking_and_infilling(call: Call) -> None:
    for more in ([], ["--sampler", "confidence"], ["--block", "3"], ["--sampler", "confidence", "--steps", "2"]):
        code, out, _ = call("--model", FUSED, "--prompt", "a [MASK:4] b [MASK]", "--json", *more)
        (found,) = map(json.loads, out.splitlines())
        assert code == 0
        assert [p["text"] for p in found["pieces"] if not p["made"]] == ["a ", " b "]
        assert len(found["ids"]) == 10


def test_several_texts(call: Call, pipeline: Pipeline) -> None:
    lines, objects = pipeline.root / "prompts.txt", pipeline.root / "prompts.jsonl"
    lines.write_text("One\n\nTwo two\n")
    objects.write_text('{"prompt": "Three\\nlines"}\n')
    options = ("--model", CLM, "--new-tokens", "4", "--samples", "2")
    code, out, _ = call(*options, "--prompt", "Zero", "--file", str(lines), "--json")
    texts = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [text["prompt"] for text in texts] == ["Zero", "Zero", "One", "One", "Two two", "Two two"]
    assert texts[0]["text"] != texts[1]["text"]
    assert call(*options, "--prompt", "Zero", "--file", str(lines), "--json", "--batch-size", "1")[1] == out
    assert call(*options, "--prompt", "Zero", "--file", str(lines))[1].startswith("--- 1 of 6 ---\nZero")
    assert [
        json.loads(line)["prompt"] for line in call(*options, "--file", str(objects), "--json")[1].splitlines()
    ] == ["Three\nlines"] * 2


def test_every_kind_of_model(call: Call) -> None:
    for model, method in ((CLM, "causal"), ("artifacts/finetuned/mlm", "diffusion"), (FUSED, "diffusion")):
        assert call("--model", model)[0] == 0
        assert call("--model", model, "--method", method)[1] == call("--model", model)[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "nowhere"], "nowhere: no such directory; expected a rack, such as artifacts/fused"),
        (["--model", "artifacts/tokens"], "kind tokens, expected format 1 of kind rack"),
        (["--model", CLM, "--prompt", "a[MASK]"], "prompt 1 ('a[MASK]'): this model writes from left to right"),
        (["--model", CLM, "--method", "diffusion"], "has learned clm and writes from left to right; method diffusion"),
        (["--model", FUSED, "--method", "causal"], "such as artifacts/finetuned/clm"),
        (
            ["--model", FUSED, "--prompt", "x" * 17],
            "its 17 tokens and 1 new ones are 18, and the model has learned from",
        ),
        (["--model", CLM, "--prompt", "x" * 9, "--new-tokens", "8"], "texts of 16; ask for at most 7 new ones"),
        (["--model", CLM, "--steps", "3"], "steps = 3: has no effect on a model that writes from left to right"),
        (["--model", FUSED, "--top-p", "1.5", "--steps", "0"], "--top-p 1.5: expected a number in (0, 1]\n"),
        (["--model", FUSED, "--top-p", "1.5", "--steps", "0"], "--steps 0: expected an integer of at least 1"),
        (["--model", FUSED, "--stop", ""], "--stop: expected texts of at least one character"),
        (["--model", FUSED, "--file", "nope"], "--file nope: no such file"),
        (
            ["--model", FUSED, "--file", "params.yaml", "--samples", "0"],
            "--samples 0: expected an integer of at least 1",
        ),
        (["--model", FUSED, "--seed", "-1"], "--seed -1: expected an integer from 0 to 2^32 - 1"),
        (["--model", FUSED, "--device", "mps"], "--device mps: not found on this machine"),
    ],
)
def test_what_cannot_be_is_said_in_one_message(call: Call, words: list[str], message: str) -> None:
    code, out, said = call(*words)
    assert code == 1
    assert not out
    assert message in said
    assert said.startswith("error: ")


def test_a_longer_context_on_request(call: Call) -> None:
    code, out, _ = call("--model", CLM, "--prompt", "x" * 17, "--context", "30", "--no-end", "--json")
    assert code == 0
    assert len(json.loads(out)["ids"]) == 30


def test_files_of_prompts_that_are_none(call: Call, pipeline: Pipeline) -> None:
    empty, bad = pipeline.root / "empty.txt", pipeline.root / "bad.jsonl"
    empty.write_text("\n")
    bad.write_text('{"prompt": "a"}\n{"text": 1}\n')
    assert "has no prompts; expected one a line" in call("--model", CLM, "--file", str(empty))[2]
    assert 'prompt 2: expected an object such as {"prompt": "Once"}' in call("--model", CLM, "--file", str(bad))[2]


def test_a_damaged_model_is_found(call: Call, pipeline: Pipeline) -> None:
    weights = Path(CLM) / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        assert "model.safetensors: damaged" in call("--model", CLM)[2]
    finally:
        weights.write_bytes(whole)
