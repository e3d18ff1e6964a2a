"""Own data of fine-tuning branches: from rows to token files."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stackwise.artifacts.manifest import Artifact, publish, read
from stackwise.config.data import TokenizerParams
from stackwise.config.tuning import OwnDataParams
from stackwise.data.encoding import write_token_dataset
from stackwise.data.examples import write_examples
from stackwise.data.tokens import KIND, Tokens, open_tokens
from stackwise.errors import UserError

SEQ = 16
EOS = 256  # of the byte tokenizer
KEY = "fine_tune.own.data"


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Those of a corpus, with the byte tokenizer: id b is the byte b."""
    root = tmp_path_factory.mktemp("corpus")
    for split in ("train", "validation"):
        (root / f"{split}.jsonl").write_text('{"text": "some text to begin with"}\n')
    with publish(root / "tokens", kind=KIND, params={}) as draft:
        draft.facts |= write_token_dataset(root, draft.directory, TokenizerParams(type="byte", vocab_size=None))
    return read(root / "tokens", KIND)


@pytest.fixture
def prepared(tmp_path: Path, tokens: Artifact, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Artifact]:
    monkeypatch.chdir(tmp_path)

    def prepare(rows: list[Any] | None = None, *, seed: int = 0, seq_len: int = SEQ, **settings: Any) -> Artifact:
        if rows is not None:
            Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        params = OwnDataParams(**{"files": ["rows.jsonl"]} | settings)
        with publish(Path("prepared"), kind=KIND, params={}) as draft:
            draft.facts |= write_examples(
                params, tokens, draft.directory, seq_len=seq_len if params.packed else None, seed=seed, key=KEY
            )
        return read(Path("prepared"), KIND)

    return prepare


def rows_of(opened: Tokens, split: str = "train") -> list[tuple[str, list[int]]]:
    """What the packed samples hold, row by row: the text of the ids (`$` for the end of a text) and the labels."""
    data, found = getattr(opened, split), []
    every = np.arange(len(data))
    for ids, labels, segments in zip(data.samples(every), data.labels(every), data.segments(every), strict=True):
        filling = segments[-1] if (labels[segments == segments[-1]] == -100).all() else -1
        for number in np.unique(segments[segments != filling]):
            own = segments == number
            text = "".join("$" if i == EOS else chr(i) for i in ids[own])
            found.append((text, labels[own].tolist()))
    return found


def completions(n: int) -> list[dict[str, str]]:
    return [{"prompt": f"q{i:02}", "completion": f"a{i}"} for i in range(n)]


def test_of_a_completion_its_tokens_and_the_end_have_a_label_and_no_other(
    prepared: Callable[..., Artifact],
) -> None:
    artifact = prepared(completions(40), format="completion", validation_fraction=0.25)
    opened = open_tokens(artifact, SEQ)
    every = [row for split in ("train", "validation") for row in rows_of(opened, split)]
    assert sorted(text for text, _ in every) == sorted(f"q{i:02}a{i}$" for i in range(40))
    for text, labels in every:
        answer = [ord(c) for c in text[3:-1]]
        assert labels == [-100] * 3 + [*answer, EOS]
    facts = artifact.facts
    assert facts["train"]["rows"] + facts["validation"]["rows"] == 40
    assert facts["train"]["tokens"] == sum(len(text) - 3 for text, _ in rows_of(opened))
    assert facts["train"]["bytes"] == facts["train"]["tokens"] - facts["train"]["rows"]
    assert opened.counts[EOS] == facts["train"]["rows"]


def test_rows_stay_whole_and_in_order(prepared: Callable[..., Artifact]) -> None:
    opened = open_tokens(prepared(completions(30), format="completion"), SEQ)
    texts = [text for text, _ in rows_of(opened)]
    assert texts == sorted(texts)
    segments = opened.train.segments(np.arange(len(opened.train)))
    assert (np.diff(segments, axis=1) >= 0).all()
    ids = opened.train.samples(np.arange(len(opened.train)))
    assert segments.max() >= 2  # several rows to a sample
    assert (ids[opened.train.labels(np.arange(len(ids))) == -100] != 0).all()


def test_too_long_a_row_loses_the_beginning_of_its_prompt_and_then_its_end(prepared: Callable[..., Artifact]) -> None:
    rows = [
        {"prompt": "abcdefghijklmnopqrstuvwxyz", "completion": "ANSWER"},
        {"prompt": "short", "completion": "ABCDEFGHIJKLMNOPQRSTUVWXYZ"},
        {"prompt": "", "completion": "alone"},
        {"prompt": "nothing follows", "completion": ""},
    ]
    artifact = prepared(rows * 2, format="completion", validation_files=["rows.jsonl"])
    found = rows_of(open_tokens(artifact, SEQ))
    assert [text for text, _ in found[:3]] == ["rstuvwxyzANSWER$", "ABCDEFGHIJKLMNOP", "alone$"]
    assert artifact.facts["train"]["truncated"] == 4
    assert artifact.facts["train"]["bytes"] == 2 * (6 + 16 + 5)
    assert -100 not in found[2][1]


def test_the_split_is_a_function_of_the_row_and_the_seed(prepared: Callable[..., Artifact]) -> None:
    def held_out(rows: list[dict[str, str]], **settings: Any) -> set[str]:
        opened = open_tokens(prepared(rows, format="completion", validation_fraction=0.3, **settings), SEQ)
        train, validation = ({text for text, _ in rows_of(opened, split)} for split in ("train", "validation"))
        assert not train & validation
        return validation

    rows = completions(60)
    first = held_out(rows)
    assert 8 <= len(first) <= 28
    assert held_out(rows[::-1]) == held_out(rows * 2) == first
    assert held_out(rows, seed=1) != first


def test_a_label_of_a_word_stands_at_its_first_token(prepared: Callable[..., Artifact]) -> None:
    rows = [
        {"words": ["big", "dog", "runs"], "labels": ["ADJ", "NOUN", None]},
        {"words": ["cats", "and", "many", "more"], "labels": ["NOUN", -100, "ADJ", "NOUN"]},
    ]
    artifact = prepared(rows, format="token_labels", validation_files=["rows.jsonl"])
    assert artifact.facts["labels"] == ["ADJ", "NOUN"]
    (one, labels), (two, others) = rows_of(open_tokens(artifact, SEQ))
    assert (one, two) == ("big dog runs$", "cats and many m$")  # the second is too long
    assert {i: label for i, label in enumerate(labels) if label >= 0} == {0: 0, 3: 1}
    assert {i: label for i, label in enumerate(others) if label >= 0} == {0: 1, 8: 0, 13: 1}
    assert open_tokens(artifact, SEQ).counts.tolist() == [2, 3]


@pytest.mark.parametrize(
    ("values", "names"),
    [([10, 9, 2], ["2", "9", "10"]), ([True, False], ["false", "true"]), (["b", "a"], ["a", "b"])],
)
def test_the_label_of_a_text_stands_at_its_end(
    values: list[Any], names: list[str], prepared: Callable[..., Artifact]
) -> None:
    rows = [{"text": f"text {i}", "label": values[i % len(values)]} for i in range(12)]
    artifact = prepared(rows, format="sequence_labels", validation_files=["rows.jsonl"])
    assert artifact.facts["labels"] == names
    for i, (text, labels) in enumerate(rows_of(open_tokens(artifact, SEQ))):
        name = str(values[i % len(values)]).lower()
        assert text == f"text {i}$"
        assert labels == [-100] * (len(text) - 1) + [names.index(name)]


def test_labels_may_be_listed(prepared: Callable[..., Artifact]) -> None:
    rows = [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(40)]
    artifact = prepared(rows, format="sequence_labels", labels=["b", "a", "never"])
    assert artifact.facts["labels"] == ["b", "a", "never"]
    opened = open_tokens(artifact, SEQ)
    assert all(labels[-1] == (int(text[5:-1]) + 1) % 2 for text, labels in rows_of(opened))


def test_text_is_as_the_corpus_has_it(prepared: Callable[..., Artifact]) -> None:
    Path("a.txt").write_text("one  \r\ntext\n")
    rows = [{"text": f"text {i}"} for i in range(30)]
    artifact = prepared(rows, files=["a.txt", "rows.jsonl"], validation_fraction=0.3)
    opened = open_tokens(artifact, 4)
    assert not opened.train.packed
    parts = (np.load(artifact.path / f"{split}.npy").tolist() for split in ("train", "validation"))
    texts = ["".join(map(chr, ids)).split(chr(EOS)) for ids in parts]
    assert sorted(t for part in texts for t in part if t) == sorted(["one\ntext", *(f"text {i}" for i in range(30))])


def test_every_type_of_file_gives_the_same(prepared: Callable[..., Artifact]) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"prompt": f"{i}", "completion": "NA" if i % 2 else f"0{i}"} for i in range(30)]
    first = prepared(rows, format="completion").facts
    with open("rows.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(rows)
    parquet.write_table(pyarrow.Table.from_pylist(rows), "rows.parquet")
    for name in ("rows.csv", "rows.parquet"):
        assert prepared(format="completion", files=[name]).facts == first


def test_another_length_of_samples_is_refused(prepared: Callable[..., Artifact]) -> None:
    artifact = prepared(completions(40), format="completion")
    with pytest.raises(UserError, match="seq_len = 8: prepared holds rows packed into samples of 16 tokens"):
        open_tokens(artifact, 8)


ROW = {"prompt": "p", "completion": "c"}
LABELLED = {"words": ["a", "b"], "labels": ["X", "Y"]}
BAD: list[tuple[list[Any], dict[str, Any], str]] = [
    ([], {"format": "completion"}, f"{KEY}: no row that is not empty was found in rows.jsonl for train"),
    ([{"prompt": "p", "completion": ""}], {"format": "completion"}, "no row that is not empty was found"),
    (
        [ROW],
        {"format": "completion", "validation_fraction": 0.001},
        f"{KEY}.validation_fraction = 0.001: no row of rows.jsonl fell to validation; raise the fraction",
    ),
    (
        [{"question": "p", "completion": "c"}],
        {"format": "completion"},
        f"{KEY}.prompt_column = prompt: no column of row 0 of rows.jsonl; its columns are question, completion",
    ),
    (
        [ROW, {"prompt": "p", "completion": None}, {"prompt": "p", "completion": "x"}],
        {"format": "completion", "completion_column": "answer"},
        f"{KEY}.completion_column = answer: no column of row 0 of rows.jsonl",
    ),
    (
        [{"prompt": 3, "completion": "c"}],
        {"format": "completion"},
        f"{KEY}.prompt_column = prompt: row 0 of rows.jsonl holds '3' there, expected text",
    ),
    (
        [LABELLED | {"labels": ["X"]}],
        {"format": "token_labels"},
        f"{KEY}.labels_column = labels: row 0 of rows.jsonl has 1 labels for 2 words, expected one each",
    ),
    ([LABELLED | {"words": "a b"}], {"format": "token_labels"}, "holds 'a b' there, expected a list"),
    ([LABELLED | {"words": ["a", ""]}], {"format": "token_labels"}, "expected texts, none empty"),
    ([LABELLED | {"labels": [0.5, 1.5]}], {"format": "token_labels"}, "holds '0.5', expected a text, an integer"),
    (
        [LABELLED | {"labels": ["X", "X"]}] * 3,
        {"format": "token_labels", "validation_files": ["rows.jsonl"]},
        f"{KEY}: the training rows have 1 labels (X), expected two at least",
    ),
    (
        [LABELLED],
        {"format": "token_labels", "labels": ["X", "Z"], "validation_files": ["rows.jsonl"]},
        f"{KEY}: a row has the label Y, expected one of X, Z (those of {KEY}.labels); correct the row",
    ),
    (
        [{"text": "a", "label": None}],
        {"format": "sequence_labels"},
        f"{KEY}.label_column = label: row 0 of rows.jsonl has no label there; give it one or leave the row out",
    ),
    ([ROW], {"format": "completion", "files": ["none/*.jsonl"]}, f"{KEY}.files: 'none/*.jsonl' matches no file"),
    (
        [ROW],
        {"format": "completion", "files": ["notes.txt"]},
        f"{KEY}.files: notes.txt has no columns; expected",
    ),
    (
        [ROW],
        {"format": "completion", "validation_files": ["x.tsv"]},
        f"{KEY}.validation_files: x.tsv is of an unknown type",
    ),
    ([ROW], {"format": "completion", "files": ["bad.jsonl"]}, f"{KEY}.files: bad.jsonl cannot be read as .jsonl"),
]


@pytest.mark.parametrize(("rows", "settings", "message"), BAD, ids=[message for *_, message in BAD])
def test_what_cannot_be_used_is_said(
    rows: list[Any], settings: dict[str, Any], message: str, prepared: Callable[..., Artifact]
) -> None:
    Path("notes.txt").write_text("a text")
    Path("x.tsv").write_text("a\tb")
    Path("bad.jsonl").write_text('{"prompt": "p", "compl')
    with pytest.raises(UserError) as error:
        prepared(rows, **settings)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not Path("prepared").exists()  # nothing is left half-written


def test_a_label_that_only_held_out_rows_have_is_said(prepared: Callable[..., Artifact]) -> None:
    Path("held.jsonl").write_text('{"text": "t", "label": "c"}\n')
    rows = [{"text": f"t{i}", "label": "ab"[i % 2]} for i in range(4)]
    with pytest.raises(UserError, match=r"the label c, expected one of a, b \(those of the training rows"):
        prepared(rows, format="sequence_labels", validation_files=["held.jsonl"])
