"""lm-evaluation-harness on a local task: racks by the type `stackwise`, their export by `hf`."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stackwise.artifacts.manifest import publish, read
from stackwise.config.data import TokenizerParams
from stackwise.data.tokenizer import build_tokenizer, encode, save_tokenizer
from stackwise.data.tokens import Vocabulary
from stackwise.errors import UserError
from stackwise.growth.racks import KIND, facts_of, save_rack
from stackwise.huggingface.exporting import export_rack
from stackwise.inference.scoring import BoundScorer, CausalScorer, Question, question
from stackwise.model.rack import Rack
from tests.unit.small import CPU, new_rack

BYTES = 257
SEQ = 48
QUESTIONS = [
    {"prompt": "The list is ", "choices": ["empty", "full of it"], "answer": 0},
    {"prompt": "Call the ", "choices": ["xy", "function", "a"], "answer": 1},
    {"prompt": "", "choices": ["begin", "end."], "answer": 1},
]
PAGE = (Path(__file__).resolve().parents[2] / "docs/evaluation.md").read_text()
OF_PAGE = next(text for text in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL) if text.startswith("task: mine"))
TASKS = {
    "read": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
""",
    "write": """
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{text}}"
generation_kwargs: {until: ["."], max_gen_toks: 6}
metric_list: [{metric: exact_match}]
""",
}


def rack_of_bytes() -> Rack:
    return new_rack(BYTES)


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks, a causal rack, a diffusion rack, and the causal one as a Llama."""
    root = tmp_path_factory.mktemp("harness")
    tokenizer = build_tokenizer(TokenizerParams(type="byte", vocab_size=None), lambda: iter(()))
    save_tokenizer(tokenizer, root / "tokenizer")
    for name, causal in (("causal", True), ("diffusion", False)):
        with publish(root / name, kind=KIND, params={}) as draft:
            rack = rack_of_bytes()
            save_rack(draft.directory, rack, root / "tokenizer")
            draft.facts |= facts_of(rack, objective="clm" if causal else name, causal=causal, seq_len=SEQ)
    (root / "llama").mkdir()
    assert export_rack(read(root / "causal", KIND), root / "llama", name="tiny").architecture == "LlamaForCausalLM"
    rows = [{**row, "text": "A long text is read in windows. " * 4} for row in QUESTIONS]
    (root / "data").mkdir()
    (root / "data/quiz.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "tasks").mkdir()
    (root / "tasks/mine.yaml").write_text(OF_PAGE)
    for name, text in TASKS.items():
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: data/quiz.jsonl}}}}\n"
        (root / f"tasks/{name}.yaml").write_text(f"{head}test_split: test\ntarget_delimiter: ''{text}")
    return root


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setenv("TQDM_DISABLE", "1")


def harness(room: Path, out: Path, monkeypatch: pytest.MonkeyPatch, model: str, *arguments: str) -> dict[str, Any]:
    """Results by task of the command line, which is run in this process."""
    from stackwise.harness.__main__ import main

    command = ["run", "--model", model, *arguments, "--include_path", str(room / "tasks"), "--output_path", str(out)]
    monkeypatch.chdir(room)
    monkeypatch.setattr("sys.argv", ["stackwise.harness", *command])
    main()
    (file,) = out.rglob("results_*.json")
    results: dict[str, Any] = json.loads(file.read_text())["results"]
    return results


def test_a_causal_rack_and_its_export_answer_alike(room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = ("--tasks", "mine,read,write", "--device", "cpu")
    ours = harness(room, tmp_path / "a", monkeypatch, "stackwise", "--model_args", f"model={room}/causal", *tasks)
    theirs = harness(
        room, tmp_path / "b", monkeypatch, "hf", "--model_args", f"pretrained={room}/llama,dtype=float32", *tasks
    )
    assert ours["mine"]["acc,none"] == theirs["mine"]["acc,none"]
    assert ours["mine"]["acc_norm,none"] == theirs["mine"]["acc_norm,none"]
    assert ours["read"]["bits_per_byte,none"] == pytest.approx(theirs["read"]["bits_per_byte,none"], rel=1e-4)
    # and it is what our own scorer says
    scorer = CausalScorer(rack_of_bytes(), Vocabulary(BYTES, BYTES - 1), CPU)
    (ids,) = encode(tokenizer_of(room), ["A long text is read in windows. " * 4])
    nats = 0.0
    for i in range(0, len(ids), SEQ):
        context = ids[max(0, i - 1) : i] if i + SEQ <= len(ids) else ids[len(ids) - SEQ - 1 : i]
        nats -= scorer.score([Question(context, ids[i : i + SEQ])])[0].nats
    assert ours["read"]["bits_per_byte,none"] == pytest.approx(nats / np.log(2) / len(ids), rel=1e-5)


def spaced(tokenizer: Any, prompt: str, text: str) -> Question:
    """The harness counts spaces at the end of a prompt to the text."""
    return question(tokenizer, prompt.rstrip(), " " * (len(prompt) - len(prompt.rstrip())) + text)


def tokenizer_of(room: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(room / "tokenizer")


def test_a_diffusion_rack_answers_by_its_bound(room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = harness(
        room,
        tmp_path,
        monkeypatch,
        "stackwise",
        *("--model_args", f"model={room}/diffusion,draws=4,steps=3,sampler=confidence"),
        *("--tasks", "mine,read,write", "--batch_size", "5"),
    )
    scorer = BoundScorer(rack_of_bytes(), Vocabulary(BYTES, BYTES - 1), CPU, seed=0, draws=4)
    tokenizer, right = tokenizer_of(room), 0
    for row in QUESTIONS:
        own: Any = row["choices"]
        scores = [s.nats for s in scorer.score([spaced(tokenizer, str(row["prompt"]), text) for text in own])]
        right += int(np.argmax(scores)) == row["answer"]
    assert found["mine"]["acc,none"] == pytest.approx(right / len(QUESTIONS))
    (ids,) = encode(tokenizer, ["A long text is read in windows. " * 4])
    nats = -sum(s.nats for s in scorer.score([Question((), ids[i : i + SEQ]) for i in range(0, len(ids), SEQ)]))
    assert found["read"]["bits_per_byte,none"] == pytest.approx(nats / np.log(2) / len(ids), rel=1e-5)
    assert 0 <= found["write"]["exact_match,none"] <= 1


def test_it_writes_up_to_a_stop_and_within_its_length(room: Path) -> None:
    from lm_eval.api.instance import Instance

    from stackwise.harness.model import RackLM

    def asked(context: str, **arguments: Any) -> Instance:
        return Instance("generate_until", {}, (context, arguments), 0)

    for name in ("causal", "diffusion"):
        sampling: dict[str, Any] = {"steps": 4} if name == "diffusion" else {}
        model = RackLM(str(room / name), **sampling)
        long, short = model.generate_until([asked("x" * 200, max_gen_toks=5), asked("", until=["e"])])
        assert len(long.encode()) <= 5 * 4
        assert "e" not in short
        assert model.generate_until([asked("ab", max_gen_toks=8)]) == model.generate_until(
            [asked("ab", max_gen_toks=8)]
        )


def test_wrong_arguments_are_refused(room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, says in (
        (f"model={room}/none", "no such directory"),
        (f"model={room}/causal,stepz=3", "stepz: no such argument"),
    ):
        with pytest.raises((SystemExit, UserError)) as refused:
            harness(room, tmp_path, monkeypatch, "stackwise", "--model_args", arguments, "--tasks", "mine")
        assert says in str(refused.value)
    assert torch.is_grad_enabled()
