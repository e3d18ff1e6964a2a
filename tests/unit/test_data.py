"""Text to tokens: sources, cleaning, the split, tokenizers, token files."""

import json
import os
import re
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stackwise.artifacts import manifest
from stackwise.config.data import DataParams, TokenizerParams
from stackwise.data import corpus, encoding, sources, tokenizer, tokens
from stackwise.errors import UserError

LITERAL = "a [MASK] b<|endoftext|>c <|unknown|> <|mask|>[MASK]"
TOKENIZERS = {
    "bpe": TokenizerParams(type="bpe", vocab_size=400),
    "byte": TokenizerParams(type="byte", vocab_size=None),
    "char": TokenizerParams(type="char", vocab_size=None),
    "char-40": TokenizerParams(type="char", vocab_size=40),
}


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub counts as out of reach, without attempts to reach it."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def text_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of 60 documents of real English."""
    directory = tmp_path_factory.mktemp("corpus")
    params = DataParams(max_documents=60)
    texts = (f"{text}\n(naïve)" for text in sources.documents(params, 0))
    corpus.write_corpus(texts, directory, params=params, seed=0)
    return directory


def read(seed: int = 0, **params: Any) -> list[str]:
    return list(sources.documents(DataParams(**params), seed))


def files(*globs: Path | str, **params: Any) -> list[str]:
    return read(source="files", files=[str(g) for g in globs], **params)


def build(params: TokenizerParams, *documents: str) -> Any:
    return tokenizer.build_tokenizer(params, lambda: iter(documents))


def content(directory: Path) -> dict[str, bytes]:
    return {str(f.relative_to(directory)): f.read_bytes() for f in directory.rglob("*") if f.is_file()}


# --- sources


def test_python_docs_are_prose_of_modules_and_topics() -> None:
    loaded = set(sys.modules)
    texts = read()
    imported = {name for name in set(sys.modules) - loaded if not name.startswith("pydoc_data")}
    assert not imported
    assert 400 < len(texts) < 1500
    assert 1.5e6 < sum(map(len, texts)) < 4e6
    assert any(t.startswith("JSON (JavaScript Object Notation) <https://json.org>") for t in texts)
    assert any(t.startswith('The "assert" statement') for t in texts)
    assert texts[:50] == read(max_documents=50)


def test_python_docs_need_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    with pytest.raises(UserError, match=r"data\.source = python-docs: .* no standard library sources in"):
        read()


def test_docstrings_are_prose_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "a.py").write_text('"""Not to be read at all."""')
    (tmp_path / "b.py").write_text(
        '"""One two three four."""\n'
        "raise SystemExit  # it is never imported\n"
        'class A:\n    """A class\n\n       of some words."""\n    def f(self):\n        """x y z"""\n'
        'if A:\n    async def g():\n        r"""Five six \\d seven eight."""\n'
    )
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "z.py").write_text('"""The first of all modules."""')
    (tmp_path / "broken.py").write_text('"""One two three four."""\n)')
    (tmp_path / "empty.py").write_text("")
    first, second, topic = islice(sources.python_docs(), 3)
    assert first == "The first of all modules."
    assert second == "One two three four.\n\nA class\n\nof some words.\n\nFive six \\d seven eight."
    assert topic.startswith('The "assert" statement')


def test_text_files_are_documents_in_sorted_order(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "2.txt").write_bytes(b"\xef\xbb\xbfsecond\r\nline\n")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "empty.txt").write_text("")
    assert files(tmp_path / "**" / "*.txt") == ["first", "second\nline\n"]
    assert files(tmp_path / "b" / "*", tmp_path / "**" / "*.txt") == ["second\nline\n", "first"]
    assert files(tmp_path / "**" / "*.txt", max_documents=2) == ["first", "second\nline\n"]


def test_long_text_files_are_cut_at_paragraphs_or_lines(tmp_path: Path) -> None:
    limit = sources.TEXT_DOCUMENT_CHARS
    paragraphs = "".join(f"{i} word é\nand another line\n\n" for i in range(5000))
    lines = "some words in a line\n" * 3000
    for text, end in ((paragraphs, "\n\n"), (lines, "\n"), ("x" * (3 * limit), "x"), ("y" * limit, "y")):
        (tmp_path / "long.txt").write_text(text)
        pieces = files(tmp_path / "long.txt")
        assert "".join(pieces) == text
        assert len(pieces) >= len(text) // limit
        assert all(limit // 2 < len(p) <= limit for p in pieces[:-1])
        assert all(p.endswith(end) for p in pieces)


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    table = pa.Table.from_pylist(rows)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path)
    elif path.suffix == ".csv":
        pyarrow.csv.write_csv(table, path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".csv"])
def test_table_files_are_streamed(suffix: str, tmp_path: Path) -> None:
    rows = [{"id": i, "body": t} for i, t in enumerate(["first\nline, é", "NA", "", "12"])]
    write_table(tmp_path / f"a[1]{suffix}", rows)  # characters that globs know
    write_table(tmp_path / f"b{suffix}", [{"id": 9, "body": "007"}])
    texts = [row["body"] for row in rows] + ["007"]
    assert files(tmp_path / f"*{suffix}", text_column="body") == texts
    assert files(tmp_path / f"*{suffix}", text_column="body", max_documents=2) == texts[:2]


def test_rows_without_text_are_empty_documents(tmp_path: Path) -> None:
    write_table(tmp_path / "a.jsonl", [{"text": "one"}, {"text": None}, {"other": "x"}])
    (tmp_path / "b.jsonl").write_text("")
    assert files(tmp_path / "*.jsonl") == ["one", "", ""]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".csv"])
def test_broken_tables_and_wrong_columns_are_named(suffix: str, tmp_path: Path) -> None:
    good, bad = tmp_path / f"good{suffix}", tmp_path / f"bad{suffix}"
    write_table(good, [{"id": 1, "body": "some text"}])
    missing = rf"data\.text_column = text: no column of .*good{suffix}; its columns are id, body"
    with pytest.raises(UserError, match=missing):
        files(good)
    bad.write_text('{"text": "one"}\n{"te' if suffix == ".jsonl" else 'text,id\none,2,3,"')
    broken = rf"data\.files: .*bad{suffix} cannot be read as {suffix} \(.+\); repair it"
    with pytest.raises(UserError, match=broken):
        files(bad)
    if suffix != ".csv":
        number = r"data\.text_column = id: .* holds int there \('1'\), expected text"
        with pytest.raises(UserError, match=number):
            files(good, text_column="id")


def test_wrong_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("x")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(UserError, match=r"data\.files: '.*\*\.txt' matches no file"):
        files(tmp_path / "nothing" / "*.txt")
    with pytest.raises(UserError, match=r"data\.files: .*notes\.md is of an unknown type; expected \.txt, "):
        files(tmp_path / "*")
    with pytest.raises(UserError, match=r"data\.files: .*latin\.txt is not UTF-8"):
        files(tmp_path / "latin.txt")


def test_hub_data_set(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_table(tmp_path / f"{split}.jsonl", [{"text": f"{split} {i}"} for i in range(3)])
    assert read(source="hub", dataset=str(tmp_path), split="test") == ["test 0", "test 1", "test 2"]
    assert read(source="hub", dataset=str(tmp_path), split="test", max_documents=2) == ["test 0", "test 1"]
    with pytest.raises(UserError, match=r"data\.dataset = .*, data\.split = dev: cannot be read \(.*dev"):
        read(source="hub", dataset=str(tmp_path), split="dev")
    with pytest.raises(UserError, match=r"data\.dataset = .*:other, .*other"):
        read(source="hub", dataset=f"{tmp_path}:other")
    with pytest.raises(UserError, match=r"data\.text_column = body: no column of the data set .* are text"):
        read(source="hub", dataset=str(tmp_path), text_column="body")
    with pytest.raises(UserError, match=r"data\.dataset = no/such-set, .* cannot be read"):
        read(source="hub", dataset="no/such-set")


def test_dummy_text_is_drawn_from_the_seed() -> None:
    texts = read(source="dummy")
    assert len(texts) == 512
    assert len(set(texts)) == 512
    assert texts == read(source="dummy")
    assert texts[:3] == read(source="dummy", dummy_documents=3) == read(source="dummy", max_documents=3)
    assert set(texts).isdisjoint(read(seed=1, source="dummy"))
    words = re.findall(r"\w+", " ".join(texts))
    followers = [b for a, b in pairwise(words) if a == "wooden"]
    assert max(map(followers.count, set(followers))) > 0.4 * len(followers)  # it can be learned


# --- corpus


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("e\u0301", "é"),
        ("a\r\nb\rc\u2028d\x0ce", "a\nb\nc\nd\ne"),
        ("a\x00\x07b\tc\x9f\ufeff\ud800", "ab\tc"),
        ("a  \nb\u00a0\t\nc ", "a\nb\nc"),
        ("a\n\n\nb", "a\n\n\nb"),
        ("a\n\n \n\n\nb", "a\n\n\nb"),
        ("\n \n  indented\n\n", "  indented"),
        (" \t\r\n", ""),
    ],
)
def test_cleaning(raw: str, cleaned: str) -> None:
    assert corpus.clean(raw) == cleaned
    assert corpus.clean(cleaned) == cleaned


def test_cleaning_takes_time_in_proportion_to_the_text() -> None:
    assert len(corpus.clean("a" + " " * 1_000_000 + "b" + "\n" * 1_000_000 + "c")) == 1_000_006


def write(texts: list[str], directory: Path, seed: int = 0, **params: Any) -> dict[str, Any]:
    directory.mkdir(parents=True, exist_ok=True)
    return corpus.write_corpus(iter(texts), directory, params=DataParams(min_chars=4, **params), seed=seed)


def splits(directory: Path) -> dict[str, list[str]]:
    return {split: list(corpus.read_documents(directory / f"{split}.jsonl")) for split in corpus.SPLITS}


def test_corpus_drops_short_documents_and_duplicates(tmp_path: Path) -> None:
    texts = [f"document é {i}" for i in range(50)]
    facts = write(["abc", "a  \r\n\n", texts[0] + "\r\n", *texts, "document e\u0301 7", ""], tmp_path)
    found = splits(tmp_path)
    assert sorted(found["train"] + found["validation"]) == sorted(texts)
    assert (facts["dropped_short"], facts["dropped_duplicates"]) == (3, 2)
    for split in corpus.SPLITS:
        expected = {"documents": len(found[split]), "bytes": sum(len(t.encode()) for t in found[split])}
        assert facts[split] == expected
    assert sorted(f.name for f in tmp_path.iterdir()) == ["train.jsonl", "validation.jsonl"]
    assert "é" in (tmp_path / "train.jsonl").read_text(encoding="utf-8")


def test_split_of_a_document_depends_on_no_other(tmp_path: Path) -> None:
    texts = [f"document {i}" for i in range(2000)]
    write(texts, tmp_path / "all", validation_fraction=0.2)
    write(texts[::-3], tmp_path / "some", validation_fraction=0.2)
    write(texts, tmp_path / "seed", seed=1, validation_fraction=0.2)
    write(texts, tmp_path / "more", validation_fraction=0.3)
    runs = ("all", "some", "seed", "more")
    every, some, seed, more = (set(splits(tmp_path / run)["validation"]) for run in runs)
    assert 330 < len(every) < 470
    assert some == every & set(texts[::-3])
    assert 40 < len(seed & every) < 120  # a fifth of a fifth: independent
    assert every < more


def test_corpus_reports_progress(tmp_path: Path) -> None:
    seen: list[int] = []
    texts = (f"document {i}" for i in range(2500))
    corpus.write_corpus(texts, tmp_path, params=DataParams(min_chars=4), seed=0, progress=seen.append)
    assert seen == [1000, 2000, 2500]


def test_empty_splits_are_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.source = python-docs: no text is left of 2 .* 2 are shorter"):
        write(["a", "b"], tmp_path)
    with pytest.raises(UserError, match=r"data\.source = python-docs: no text is left of 0 documents"):
        write([], tmp_path)
    with pytest.raises(UserError, match=r"data\.validation_fraction = 0\.001: none .* to validation; raise"):
        write(["some text"], tmp_path, validation_fraction=0.001)
    with pytest.raises(UserError, match=r"data\.validation_fraction = 0\.999: none .* to train; lower"):
        write(["some text"], tmp_path, validation_fraction=0.999)


# --- tokenizers


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_tokenizer_gives_the_text_back(kind: str, text_corpus: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    texts = list(corpus.read_documents(text_corpus / "train.jsonl"))
    extra = [LITERAL, " two  spaces , and .\n\n\n   don't", ""]
    if kind in ("bpe", "byte"):
        extra.append("".join(map(chr, [*range(0x800), *range(0x10000, 0x10400)])) + "\ud7ff\ue000\uffff")
    built = build(TOKENIZERS[kind], *texts)
    tokenizer.save_tokenizer(built, tmp_path)
    for tok in (built, AutoTokenizer.from_pretrained(tmp_path)):
        vocabulary = tokenizer.vocabulary_of(tok)
        assert len(tok) == vocabulary.size + 1
        assert vocabulary.mask_id == vocabulary.size == tok.convert_tokens_to_ids("[MASK]")
        assert vocabulary.eos_id == tok.convert_tokens_to_ids("<|endoftext|>")
        assert vocabulary.eos_id == vocabulary.size - 1
        ids = tokenizer.encode(tok, texts + extra)
        assert max(map(max, filter(None, ids))) < vocabulary.eos_id
        for text, text_ids in zip(texts + extra, ids, strict=True):
            if kind == "char-40":
                assert len(text_ids) == len(text)
            else:
                assert tok.decode(text_ids) == text
        # a person who fills masks does want the token
        assert tok("[MASK]", add_special_tokens=False).input_ids == [vocabulary.mask_id]
        assert tok.decode([0, vocabulary.mask_id, 0]).count("[MASK]") == 1


def test_vocabulary_sizes() -> None:
    assert tokenizer.vocabulary_of(build(TOKENIZERS["byte"])) == tokens.Vocabulary(size=257, eos_id=256)
    text = "the cat sat on the mat with the hat. " * 50
    assert len(build(TokenizerParams(vocab_size=258), text)) == 259
    assert len(build(TokenizerParams(vocab_size=270), text)) == 271
    assert len(build(TokenizerParams(vocab_size=5000), text)) < 500  # no more pairs
    assert build(TOKENIZERS["byte"])("é~", add_special_tokens=False).input_ids == [*"é~".encode()]


def test_char_keeps_the_most_frequent() -> None:
    few = build(TokenizerParams(type="char", vocab_size=3), "cccc", "bbaadd")  # of a, b, d the first two
    unknown = few.unk_token_id
    assert tokenizer.encode(few, ["abcd?\n"]) == [[0, 1, 2, unknown, unknown, unknown]]
    assert tokenizer.vocabulary_of(few) == tokens.Vocabulary(size=5, eos_id=4)


def test_training_sees_train_chars() -> None:
    read_on: list[str] = []

    def documents() -> Iterator[str]:
        for text in ("aaaa", "bbzz", "cccc"):
            read_on.append(text)
            yield text

    built = tokenizer.build_tokenizer(TokenizerParams(type="char", vocab_size=None, train_chars=6), documents)
    assert sorted(built.get_vocab()) == ["<|endoftext|>", "<|unknown|>", "[MASK]", "a", "b"]
    assert read_on == ["aaaa", "bbzz"]


def pretrained(name: Path | str) -> Any:
    return build(TokenizerParams(type="pretrained", vocab_size=None, name=str(name)))


def test_pretrained_of_our_own_is_the_same(text_corpus: Path, tmp_path: Path) -> None:
    built = build(TOKENIZERS["bpe"], *corpus.read_documents(text_corpus / "train.jsonl"))
    tokenizer.save_tokenizer(built, tmp_path / "one")
    tokenizer.save_tokenizer(pretrained(tmp_path / "one"), tmp_path / "somewhere" / "else")
    assert content(tmp_path / "one") == content(tmp_path / "somewhere" / "else")


def foreign(directory: Path, words: str, **special: str) -> Any:
    """A word tokenizer as others save them, loaded."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words.split())}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrap: Callable[..., Any] = PreTrainedTokenizerFast
    wrap(tokenizer_object=backend, unk_token="[UNK]", **special).save_pretrained(directory)
    return pretrained(directory)


def test_pretrained_keeps_its_ids_and_gets_a_mask(tmp_path: Path) -> None:
    tok = foreign(tmp_path / "mask", "[UNK] [MASK] [SEP] a b", mask_token="[MASK]", sep_token="[SEP]")
    assert tokenizer.vocabulary_of(tok) == tokens.Vocabulary(size=5, eos_id=2)
    assert tok.mask_token == "<|mask|>"
    assert tokenizer.encode(tok, ["a [MASK] <|mask|> b"])[0][-1] == 4
    assert 5 not in tokenizer.encode(tok, ["a [MASK] <|mask|> b"])[0]

    tok = foreign(tmp_path / "nothing", "[UNK] a b")
    assert tokenizer.vocabulary_of(tok) == tokens.Vocabulary(size=4, eos_id=3)
    assert (tok.eos_token, tok.mask_token) == ("<|endoftext|>", "[MASK]")

    tok = foreign(tmp_path / "last", "[UNK] </s> a b <mask>", mask_token="<mask>", eos_token="</s>")
    assert tokenizer.vocabulary_of(tok) == tokens.Vocabulary(size=4, eos_id=1)


def test_pretrained_files_do_not_say_where_it_came_from(tmp_path: Path) -> None:
    for here in ("one", "other/place"):
        tok = foreign(tmp_path / here / "tok", "[UNK] a b")
        tokenizer.encode(tok, ["a b"])
        tokenizer.save_tokenizer(tok, tmp_path / here / "saved")
    assert content(tmp_path / "one" / "saved") == content(tmp_path / "other" / "place" / "saved")
    assert not any(str(tmp_path).encode() in data for data in content(tmp_path / "one" / "saved").values())


def test_pretrained_errors(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("no/such-tokenizer", tmp_path / "empty", tmp_path / "missing"):
        expected = rf"tokenizer\.name = {name}: cannot be loaded \(.+\); give a directory"
        with pytest.raises(UserError, match=expected):
            pretrained(name)
    holes = foreign(tmp_path / "fine", "[UNK] a b").backend_tokenizer.to_str().replace('"b": 2', '"b": 20')
    (tmp_path / "fine" / "tokenizer.json").write_text(holes.replace('"b":2', '"b":20'))
    with pytest.raises(UserError, match=r"tokenizer\.name = .*fine: its .* ids are not 0 to"):
        pretrained(tmp_path / "fine")
    tok = foreign(tmp_path / "spoken", "[UNK] </s> a [MASK]", mask_token="[MASK]", eos_token="</s>")
    with pytest.raises(UserError, match=r"tokenizer\.name = .*spoken: gives a text the id 3, expected .* 3"):
        encoding.write_tokens(tok, iter(["a [MASK]"]), tmp_path / "t.npy")


# --- tokens


@pytest.mark.parametrize("kind", ["bpe", "char-40"])
def test_tokens_artifact(kind: str, text_corpus: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    with manifest.publish(tmp_path / "tokens", kind=tokens.KIND, params={}) as draft:
        draft.facts = encoding.write_token_dataset(text_corpus, draft.directory, TOKENIZERS[kind])
    opened = tokens.open_tokens(manifest.read(tmp_path / "tokens", tokens.KIND), seq_len=32)
    tok = AutoTokenizer.from_pretrained(opened.tokenizer)
    assert tokenizer.vocabulary_of(tok) == opened.vocabulary
    for split in corpus.SPLITS:
        texts = list(corpus.read_documents(text_corpus / f"{split}.jsonl"))
        ids = [i for text in tokenizer.encode(tok, texts) for i in (*text, opened.vocabulary.eos_id)]
        stored = np.load(tmp_path / "tokens" / f"{split}.npy")
        assert stored.dtype == np.uint16
        assert stored.tolist() == ids
        facts = draft.facts[split]
        assert facts == {"tokens": len(ids), "bytes": sum(len(t.encode()) for t in texts)}
        dataset = getattr(opened, split)
        assert len(dataset) == len(ids) // 32
        indices = np.array([len(dataset) - 1, 0, 0])
        samples = dataset.samples(indices)
        assert type(samples) is np.ndarray
        assert samples.dtype == np.int64
        assert samples.tolist() == [ids[i * 32 : i * 32 + 32] for i in indices]
        if split == "train":
            assert opened.counts.dtype == np.int64
            assert opened.counts.tolist() == [ids.count(i) for i in range(opened.vocabulary.size)]
        else:
            assert opened.bytes_per_token == facts["bytes"] / facts["tokens"]
    vocabulary = {"vocab_size": opened.vocabulary.size, "mask_id": opened.vocabulary.mask_id}
    assert draft.facts.items() >= {**vocabulary, "eos_id": opened.vocabulary.eos_id}.items()


def test_batches_change_nothing(text_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoding.write_token_dataset(text_corpus, tmp_path, TOKENIZERS["bpe"])
    before = content(tmp_path)
    monkeypatch.setattr(encoding, "BATCH_DOCUMENTS", 3)
    seen: list[int] = []
    encoding.write_token_dataset(text_corpus, tmp_path, TOKENIZERS["bpe"], progress=seen.append)
    assert content(tmp_path) == before
    assert seen[:2] == [3, 6]
    assert seen.count(3) == 2


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    for n, dtype in ((2**16 - 1, np.uint16), (2**16, np.uint32)):  # the mask is n
        words = ["[UNK]", "</s>", *(f"w{i}" for i in range(n - 2))]
        tok = foreign(tmp_path / str(n), " ".join(words), eos_token="</s>")
        encoding.write_tokens(tok, iter([words[-1]]), tmp_path / "t.npy")
        stored = np.load(tmp_path / "t.npy")
        assert stored.dtype == dtype
        assert stored.tolist() == [n - 1, 1]


def test_files_are_the_same_in_another_process(text_corpus: Path, tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from stackwise.config.data import TokenizerParams\n"
        "from stackwise.data import encoding\n"
        "for name, params in ((a.split('=', 1)) for a in sys.argv[3:]):\n"
        "    (out := Path(sys.argv[2], name)).mkdir(parents=True)\n"
        "    params = TokenizerParams.model_validate_json(params)\n"
        "    encoding.write_token_dataset(Path(sys.argv[1]), out, params)\n"
    )
    kinds = [f"{name}={params.model_dump_json()}" for name, params in TOKENIZERS.items()]
    subprocess.run(
        [sys.executable, "-c", script, str(text_corpus), str(tmp_path / "there"), *kinds],
        env={
            **os.environ,
            "PYTHONPATH": str(Path(tokens.__file__).parents[2]),
            "PYTHONHASHSEED": "4321",
            "RAYON_NUM_THREADS": "3",
            "HF_HUB_OFFLINE": "1",
        },
        check=True,
    )
    for name, params in TOKENIZERS.items():
        (tmp_path / "here" / name).mkdir(parents=True)
        encoding.write_token_dataset(text_corpus, tmp_path / "here" / name, params)
    here = content(tmp_path / "here")
    assert len(here) == 6 * len(TOKENIZERS)
    assert here == content(tmp_path / "there")


def test_too_few_tokens_for_a_sample(tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", np.arange(10, dtype=np.uint16))
    assert len(tokens.TokenDataset(tmp_path / "t.npy", 10)) == 1
    with pytest.raises(UserError, match=r"seq_len = 11: .*t\.npy has only 10 tokens, .* lower seq_len"):
        tokens.TokenDataset(tmp_path / "t.npy", 11)


def peak_memory(work: Callable[[], object]) -> int:
    """Most bytes that Python and numpy had at once while `work` ran."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "BATCH_CHARS", 32 * 1024)
    tok = build(TOKENIZERS["byte"])
    params = DataParams(source="dummy")
    line = "all work and no play makes a dull boy\n" * 200

    def convert(n: int) -> None:
        texts = (f"{i}\n{line}" for i in range(n))  # 7.6 kB each
        corpus.write_corpus(texts, tmp_path, params=params, seed=0)
        encoding.write_tokens(tok, corpus.read_documents(tmp_path / "train.jsonl"), tmp_path / "train.npy")
        dataset = tokens.TokenDataset(tmp_path / "train.npy", 128)
        for i in range(0, len(dataset), 64):
            dataset.samples(np.arange(i, min(i + 64, len(dataset))))

    convert(20)  # what is made once
    small, large = (peak_memory(partial(convert, n)) for n in (100, 800))
    assert large < 1.2 * small
    assert large < 3e6 < 800 * len(line) / 2
