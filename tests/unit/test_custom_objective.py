"""Targets of one's own: from a column of a dataset to the loss and to the figures on held-out documents."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stackwise.artifacts import manifest
from stackwise.config.data import DataParams, TokenizerParams
from stackwise.config.evaluation import EvaluateParams
from stackwise.config.model import ModelParams
from stackwise.data.corpus import read_labelled_documents, write_labelled_corpus
from stackwise.data.encoding import write_labelled_dataset
from stackwise.data.order import SampleOrder
from stackwise.data.sources import labelled_documents
from stackwise.data.tokens import Tokens, open_tokens
from stackwise.errors import UserError
from stackwise.growth.batches import TokenBatches
from stackwise.inference.evaluation import Evaluator
from stackwise.model.rack import RackShape
from stackwise.objectives.targets import CustomObjective

BYTES = TokenizerParams(type="byte", vocab_size=None)
EOS, MASK, SEQ = 256, 257, 8


def rows(n: int = 60) -> list[dict[str, list[int]]]:
    """Documents in which every third id is to be predicted from the mask token in its place."""
    rng, found = np.random.default_rng(0), []
    for length in rng.integers(4, 20, n).tolist():
        ids, labels = rng.integers(0, 256, length).tolist(), [-100] * length
        for i in range(0, length, 3):
            ids[i], labels[i] = MASK, ids[i]
        found.append({"x": ids, "y": labels})
    return found


def params_for(file: Path, **params: Any) -> DataParams:
    columns = {"ids_column": "x", "labels_column": "y", **params}
    return DataParams(source="files", files=[str(file)], validation_fraction=0.3, **columns)


def write_rows(file: Path, documents: list[dict[str, Any]]) -> Path:
    if file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in documents))
    else:
        import pyarrow as pa
        import pyarrow.parquet

        pyarrow.parquet.write_table(pa.Table.from_pylist(documents), file)
    return file


def tokens_of(directory: Path, documents: list[dict[str, Any]], tokenizer: TokenizerParams = BYTES) -> Tokens:
    """From a file to an open tokens artifact, as the stages make it."""
    params = params_for(write_rows(directory / "data.jsonl", documents))
    (directory / "corpus").mkdir()
    write_labelled_corpus(labelled_documents(params), directory / "corpus", params=params, seed=0)
    with manifest.publish(directory / "tokens", kind="tokens", params={}) as draft:
        draft.facts |= write_labelled_dataset(directory / "corpus", draft.directory, tokenizer)
    return open_tokens(manifest.read(directory / "tokens", "tokens"), SEQ)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    return tokens_of(tmp_path_factory.mktemp("data"), rows())


# --- data


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_files_give_ids_and_labels(tmp_path: Path, suffix: str) -> None:
    params = params_for(write_rows(tmp_path / f"data{suffix}", rows()))
    expected = [(row["x"], row["y"]) for row in rows()]
    assert list(labelled_documents(params)) == expected
    assert list(labelled_documents(params.model_copy(update={"max_documents": 7}))) == expected[:7]


def test_corpus_is_split_and_free_of_duplicates(tmp_path: Path) -> None:
    documents = rows()
    params = params_for(write_rows(tmp_path / "data.jsonl", [*documents, *documents[:5], {"x": [], "y": []}]))
    facts = write_labelled_corpus(labelled_documents(params), tmp_path, params=params, seed=0)
    assert (facts["labelled"], facts["dropped_duplicates"], facts["dropped_short"]) == (True, 5, 1)
    read = [
        document for name in ("train", "validation") for document in read_labelled_documents(tmp_path / f"{name}.jsonl")
    ]
    assert sorted(read) == sorted((row["x"], row["y"]) for row in documents)
    assert facts["validation"]["documents"] > 5


def test_token_files_hold_ids_and_labels_side_by_side(tokens: Tokens) -> None:
    split = tokens.train
    ids, labels = split.samples(np.arange(len(split))).reshape(-1), split.labels(np.arange(len(split))).reshape(-1)
    expected = {(tuple(row["x"]), tuple(row["y"])) for row in rows()}
    ends = np.flatnonzero(ids == EOS)
    assert (labels[ends] == -100).all()
    for start, end in zip([0, *(ends + 1)], ends, strict=False):
        assert (tuple(ids[start:end]), tuple(labels[start:end])) in expected
    known = np.load(tokens.tokenizer.with_name("train_labels.npy"))
    assert tokens.counts.tolist() == np.bincount(known[known >= 0], minlength=257).tolist()
    assert tokens.counts.sum() > 50
    assert tokens.bytes_per_token > 0.3


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"x": [1, 258], "y": [-100, 2]}, "the id 258, expected 0 to 257, which is the mask's"),
        ({"x": [1, -1], "y": [-100, 2]}, "the id -1, expected 0 to 257"),
        ({"x": [1, 2], "y": [-100, 257]}, "the label 257, expected 0 to 256, or -100 for none"),
        ({"x": [1, 2], "y": [-1, 3]}, "the label -1, expected 0 to 256, or -100"),
    ],
)
def test_ids_that_the_tokenizer_does_not_have_are_refused(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(
        UserError, match=rf"document \d+ of the (train|validation) split, which begins with \[1.*{message}"
    ):
        tokens_of(tmp_path, [*rows(), row])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"x": [1, 2], "y": [2]}, r"document 60 of .*data\.jsonl has 1 labels for 2 ids, expected one each"),
        ({"x": "some text", "y": [2]}, r"document 60 of .* holds 'some text' in column x, expected a list of integers"),
        ({"x": [1.5], "y": [2]}, r"holds '\[1\.5\]' in column x"),
    ],
)
def test_rows_that_are_none_are_refused(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    file = tmp_path / "data.jsonl"
    write_rows(file, [row])
    lone = message.replace("document 60", "document 0")
    with pytest.raises(UserError, match=lone):
        list(labelled_documents(params_for(file)))


def test_columns_and_files_that_are_none_are_refused(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "data.jsonl", rows())
    with pytest.raises(UserError, match=r"document 0 of .*data\.jsonl has no column z; its columns are x, y"):
        list(labelled_documents(params_for(file, labels_column="z")))
    (tmp_path / "data.txt").write_text("text")
    with pytest.raises(UserError, match=r"data\.txt cannot hold lists of ids; expected \.jsonl or \.parquet"):
        list(labelled_documents(params_for(tmp_path / "data.txt")))
    empty = params_for(write_rows(tmp_path / "empty.jsonl", [{"x": [], "y": []}]))
    with pytest.raises(UserError, match=r"data\.ids_column = x: all 1 documents are empty"):
        write_labelled_corpus(labelled_documents(empty), tmp_path, params=empty, seed=0)


def test_parameters_fit_each_other() -> None:
    def problems(**params: Any) -> list[str]:
        return [key for key, _ in DataParams(**params).problems()]

    files = {"source": "files", "files": ["x.jsonl"]}
    both = {"ids_column": "x", "labels_column": "y"}
    assert problems(**files, **both) == []
    assert problems(**files, ids_column="x") == ["labels_column"]
    assert problems(**files, labels_column="y") == ["ids_column"]
    assert problems(**both) == ["ids_column"]
    assert problems(**files, **both, min_chars=5, text_column="t") == ["text_column", "min_chars"]


# --- training


@pytest.mark.parametrize("causal", [False, True])
def test_batches_ask_for_the_labels(tokens: Tokens, causal: bool) -> None:
    objective = CustomObjective(tokens.train, causal)
    order = SampleOrder(len(tokens.train), seed=0, stream="s")
    (batch,) = TokenBatches(tokens.train, order, objective, 6, 1)(0)
    samples, _ = order.at(0, 6)
    labels = tokens.train.labels(samples)
    assert objective.causal == causal
    assert np.array_equal(batch.inputs.numpy(), tokens.train.samples(samples))
    assert (batch.inputs == MASK).any()
    assert batch.targets.rows.tolist() == np.flatnonzero(labels != -100).tolist()
    assert batch.targets.tokens.tolist() == labels[labels != -100].tolist()
    assert (batch.targets.weights == 1).all()
    assert batch.targets.batch_tokens == 6 * SEQ
    assert batch.times is not None
    assert (batch.times == 0).all()


# --- held-out documents


class Known(nn.Module):
    """Predicts one distribution, whatever it sees."""

    def __init__(self, probabilities: np.ndarray) -> None:
        super().__init__()
        self.shape = RackShape.of(ModelParams(), [1], len(probabilities))
        self.head = nn.Module()
        self.head.features = lambda x: x  # type: ignore[assignment]
        self.head.weight = nn.Parameter(torch.from_numpy(np.log(probabilities)).float()[:, None])
        self.causal: list[bool] = []

    def forward(self, tokens: Tensor, *, causal: bool, **_: Any) -> Tensor:
        self.causal.append(causal)
        return torch.ones(*tokens.shape, 1)


def test_evaluation_scores_the_labels(tokens: Tokens) -> None:
    probabilities = np.random.default_rng(2).dirichlet(np.ones(257) * 5)
    at = Evaluator(tokens, EvaluateParams(batch_size=3), seed=0, device=torch.device("cpu"), dtype="fp32")
    rack = Known(probabilities)
    found = at.labelled(rack, causal=True)  # type: ignore[arg-type]
    labels = tokens.validation.labels(np.arange(len(tokens.validation)))
    of_samples = [own[own >= 0] for own in labels if (own >= 0).any()]
    nats = np.array([-np.log(probabilities[own]).mean() for own in of_samples])
    assert found["nats_per_token"] == pytest.approx(nats.mean(), rel=1e-5)
    assert found["accuracy"] == pytest.approx((np.concatenate(of_samples) == probabilities.argmax()).mean())
    assert found["bits_per_byte"] == pytest.approx(nats.mean() / math.log(2) / tokens.bytes_per_token, rel=1e-5)
    assert all(rack.causal)
    smoothed = (tokens.counts + 1) / (tokens.counts + 1).sum()
    expected = np.mean([-np.log(smoothed[own]).mean() for own in of_samples])
    assert at.unigram(labelled=True)["nats_per_token"] == pytest.approx(expected)


def test_documents_without_labels_are_no_custom_targets(tmp_path: Path) -> None:
    unlabelled = [{"x": row["x"], "y": [-100] * len(row["x"])} for row in rows()]
    tokens = tokens_of(tmp_path, unlabelled)
    at = Evaluator(tokens, EvaluateParams(), seed=0, device=torch.device("cpu"), dtype="fp32")
    with pytest.raises(UserError, match="none of the held-out samples that are measured has a label"):
        at.labelled(Known(np.full(257, 1 / 257)), causal=False)  # type: ignore[arg-type]
