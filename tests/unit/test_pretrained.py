"""Embeddings and heads of other models: what is read, what trains, what is refused, and the tokenizer taken along."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from stackwise.config.data import TokenizerParams
from stackwise.config.model import AttentionParams, MLPParams, ModelParams, PretrainedParams
from stackwise.config.params import Params, load, view
from stackwise.data.tokenizer import build_tokenizer, encode, vocabulary_of
from stackwise.errors import UserError
from stackwise.growth.assembly import Assembly
from stackwise.growth.fusing import fuse
from stackwise.growth.pretrained import find_matrix, vocabulary_widths
from stackwise.growth.racks import load_rack, save_rack
from stackwise.growth.window import Batch, Window
from stackwise.model.rack import Rack, RackShape
from stackwise.objectives.targets import masked_targets
from tests.bad_params import GOOD
from tests.unit.growing import CPU, params_with, published, quantized, window_of
from workflow.stages import Stage, table

WIDTH, ROWS, VOCAB, SEQ = 12, 40, 29, 6
"""Of the source its width and rows; ids of its tokenizer; tokens of a sample."""
TEXTS = ["the cat sat on the mat", "a mat, a cat"]


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub counts as out of reach, without attempts to reach it."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def saved(directory: Path, *, tied: bool = False, shard_size: str = "5GB") -> Path:
    """A Llama model with its tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=ROWS,
        hidden_size=WIDTH,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    model: Any = LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(directory, max_shard_size=shard_size)
    save_source_tokenizer(directory)
    return directory


def save_source_tokenizer(directory: Path) -> None:
    """28 letters and signs, an end of text: V = 29, fewer than the rows of the model."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyz ,"
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, []))
    wrap: Any = PreTrainedTokenizerFast
    wrap(tokenizer_object=backend, eos_token="</s>").save_pretrained(directory)


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("source") / "untied")


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("source") / "tied", tied=True)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = saved(tmp_path_factory.mktemp("source") / "sharded", shard_size="2KB")
    assert len(list(directory.glob("*.safetensors"))) > 2
    return directory


def model_of(**settings: Any) -> ModelParams:
    base = ModelParams(d_model=WIDTH, attention=AttentionParams(n_heads=2), mlp=MLPParams(hidden=16))
    return base.model_copy(update=settings)


def first_of(model: ModelParams) -> Assembly:
    """The first stack, above the ends of the rack."""
    return window_of(params_with(model=model), "0=new", vocab_size=VOCAB, embeddings_learn=True)


def embeddings_of(source: Path, tensor: str = "embed_tokens", *, head: bool = False) -> Tensor:
    name = {"embed_tokens": "model.embed_tokens.weight", "lm_head": "lm_head.weight"}[tensor]
    window = first_of(model_of(**{"head" if head else "embeddings": settings(source, tensor=tensor)})).window
    assert window.embeddings is not None
    taken = window.head.projection.weight if head else window.embeddings.table
    files = [load_file(f) for f in source.glob("*.safetensors")]
    found = [weights[name] for weights in files if name in weights]
    if found:
        assert torch.equal(taken.detach(), found[0][:VOCAB].float())
    return taken.detach()


def settings(source: Path | str, **others: Any) -> PretrainedParams:
    return PretrainedParams(source=str(source), **others)


def trained(window: Window, *, boundary: bool = False) -> set[str]:
    """Train for three steps; returns the names of the weights that this has changed."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCAB, (2, SEQ))
    mask = np.arange(2 * SEQ).reshape(2, SEQ) % 2 == 0
    inputs = torch.from_numpy(np.where(mask, VOCAB, tokens))
    if boundary:
        inputs = torch.from_numpy(rng.standard_normal((2, SEQ, window.head.norm.weight.shape[0])).astype(np.float32))
    before = {name: p.detach().clone() for name, p in window.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in window.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        window.loss(Batch(inputs, masked_targets(tokens, mask, np.ones(2))), device=CPU, causal=False).backward()
        optimizer.step()
    return {name for name, p in window.named_parameters() if not torch.equal(p, before[name])}


# --- what is read


def test_rows_are_those_of_the_source(untied: Path) -> None:
    both = {tensor: embeddings_of(untied, tensor) for tensor in ("embed_tokens", "lm_head")}
    heads = {tensor: embeddings_of(untied, tensor, head=True) for tensor in ("embed_tokens", "lm_head")}
    assert not torch.equal(both["embed_tokens"], both["lm_head"])
    for tensor in both:
        assert both[tensor].shape == (VOCAB, WIDTH)
        assert torch.equal(both[tensor], heads[tensor])


def test_rows_are_what_transformers_loads(untied: Path) -> None:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(untied)
    assert torch.equal(embeddings_of(untied), model.get_input_embeddings().weight[:VOCAB].float())
    assert torch.equal(embeddings_of(untied, "lm_head"), model.get_output_embeddings().weight[:VOCAB].float())


def test_a_tied_head_is_the_input_embedding(tied: Path, untied: Path, tmp_path: Path) -> None:
    assert "lm_head.weight" not in load_file(tied / "model.safetensors")
    assert torch.equal(embeddings_of(tied, "lm_head", head=True), embeddings_of(tied))
    weights = load_file(untied / "model.safetensors")
    del weights["lm_head.weight"]
    shutil.copy(untied / "config.json", tmp_path)
    save_file(weights, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    with pytest.raises(UserError, match=r"model\.head\.tensor = lm_head: expected one matrix in .* it holds none"):
        find_matrix("model.head", settings(tmp_path, tensor="lm_head"))


def test_a_sharded_source_is_the_same(sharded: Path, untied: Path) -> None:
    for tensor in ("embed_tokens", "lm_head"):
        assert torch.equal(embeddings_of(sharded, tensor), embeddings_of(untied, tensor))


@pytest.mark.parametrize("name", ["transformer.wte.weight", "wte.weight", "bert.embeddings.word_embeddings.weight"])
def test_names_of_other_families(tmp_path: Path, name: str) -> None:
    rows = torch.randn(ROWS, WIDTH)
    save_file({name: rows, "position.wpe.weight": torch.randn(5, WIDTH)}, tmp_path / "model.safetensors")
    for tensor in ("embed_tokens", "lm_head"):
        assert torch.equal(embeddings_of(tmp_path, tensor), rows[:VOCAB])


def test_only_what_is_needed_comes_from_the_hub(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted: list[str] = []

    def snapshot_download(repo_id: str, allow_patterns: list[str]) -> str:
        assert repo_id == "some/model"
        wanted.extend(allow_patterns)
        for name in allow_patterns:
            shutil.copy(sharded / name, tmp_path)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    matrix = find_matrix("model.head", settings("some/model", tensor="lm_head"))
    assert torch.equal(matrix.read(VOCAB), embeddings_of(sharded, "lm_head"))
    assert wanted == ["config.json", "model.safetensors.index.json", matrix.file.name]


def test_the_mask_row_is_the_mean_and_trains(untied: Path) -> None:
    for train in (True, False):
        window = first_of(model_of(embeddings=settings(untied, train=train))).window
        assert window.embeddings is not None
        mask, table_ = window.embeddings.mask, window.embeddings.table
        assert torch.allclose(mask[0], table_.mean(dim=0), atol=1e-7)
        shown = window.embeddings(torch.tensor([[0, VOCAB, VOCAB - 1]]))[0]
        assert torch.equal(shown, torch.stack((table_[0], mask[0], table_[-1])))
        assert "embeddings.mask" in trained(window)


# --- what trains


@pytest.mark.parametrize("part", ["embeddings", "head"])
def test_frozen_stays_while_trained_changes(untied: Path, part: str) -> None:
    name = {"embeddings": "embeddings.table", "head": "head.projection.weight"}[part]
    frozen, free = (first_of(model_of(**{part: settings(untied, train=train)})).window for train in (False, True))
    before = dict(frozen.named_parameters())[name].detach().clone().numpy().tobytes()
    everything = set(dict(free.named_parameters()))
    assert trained(free) == everything
    assert trained(frozen) == everything - {name}
    assert dict(frozen.named_parameters())[name].detach().numpy().tobytes() == before


@pytest.mark.parametrize("train", [True, False])
def test_adapters_between_widths(untied: Path, train: bool) -> None:
    both = {name: settings(untied, train=train, adapter_hidden=10) for name in ("embeddings", "head")}
    window = first_of(model_of(d_model=16, **both)).window
    weights = {name: tuple(p.shape) for name, p in window.named_parameters() if not name.startswith("stacks")}
    assert weights == {
        "embeddings.table": (VOCAB, WIDTH),
        "embeddings.mask": (1, WIDTH),
        "embeddings.adapter.hidden.weight": (10, WIDTH),
        "embeddings.adapter.output.weight": (16, 10),
        "head.norm.weight": (16,),
        "head.projection.weight": (VOCAB, WIDTH),
        "head.adapter.hidden.weight": (10, 16),
        "head.adapter.output.weight": (WIDTH, 10),
    }
    frozen = set() if train else {"embeddings.table", "head.projection.weight"}
    assert set(dict(window.named_parameters())) - trained(window) == frozen


def test_a_tied_source(untied: Path) -> None:
    for train in (True, False):
        window = first_of(model_of(embeddings=settings(untied, train=train), tie_embeddings=True)).window
        assert window.embeddings is not None
        assert window.head.weight is window.embeddings.table
        assert torch.equal(window.head.weight, embeddings_of(untied))
        assert ("embeddings.table" in trained(window)) == train


# --- through the pipeline


@pytest.mark.parametrize("tie", [True, False])
def test_round_trip(untied: Path, tmp_path: Path, tie: bool) -> None:
    """A rack of two stacks, frozen table and head with adapters (or tied without): trunk, fused, saved, loaded."""
    if tie:
        model = model_of(embeddings=settings(untied, train=False), tie_embeddings=True)
    else:
        model = model_of(
            d_model=16,
            embeddings=settings(untied, train=False, adapter_hidden=10),
            head=settings(untied, tensor="lm_head", train=False, adapter_hidden=20),
        )
    source = tmp_path / "source"  # it may be gone once the first stack is trained
    shutil.copytree(untied, source)
    renamed = {
        name: getattr(model, name).model_copy(update={"source": str(source)})
        for name in ("embeddings", "head")
        if getattr(model, name).source
    }
    model = model.model_copy(update=renamed)
    assembly = first_of(model)
    trained(assembly.window)
    first = published(tmp_path / "0", assembly)
    assert first.shape == RackShape.of(model, [1], VOCAB, **vocabulary_widths(model))
    shutil.rmtree(source)
    assembly = window_of(params_with(model=model), "1=new", [first], vocab_size=VOCAB, copies=0, reads_tokens=False)
    assert assembly.shape == first.shape
    changed = trained(assembly.window, boundary=True)
    assert not any(name.startswith("embeddings") for name in changed)
    assert ("head.adapter.hidden.weight" in changed) == (not tie)
    second = published(tmp_path / "1", assembly, [first])

    rack = fuse([first, second], [0, 1], {})
    frozen = {"embeddings.table"} | (set() if tie else {"head.projection.weight"})
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "rack").mkdir()
    save_rack(tmp_path / "rack", rack, tmp_path / "tokenizer")
    loaded = load_rack(tmp_path / "rack")
    tokens = torch.tensor([[0, VOCAB, 5, VOCAB - 1]])
    with torch.no_grad():
        assert torch.equal(loaded.logits(tokens), rack.logits(tokens))
    for r in (rack, loaded):
        assert {name for name, p in r.named_parameters() if not p.requires_grad} == frozen
        assert torch.equal(r.embeddings.table, embeddings_of(untied))
        if not tie:
            assert torch.equal(r.head.weight, embeddings_of(untied, "lm_head"))
    assert set(dict(loaded.named_parameters())) - trained(Window.of(loaded)) == frozen  # joint fine-tuning

    trunk = quantized(first.stack(0), tmp_path / "trunk", "bfloat16").load_embeddings(CPU)
    assert torch.equal(trunk.table, rack.embeddings.table)  # a table of bf16 loses nothing
    with torch.no_grad():
        assert torch.allclose(trunk(tokens), rack.embeddings(tokens), atol=2e-2)
        assert not torch.equal(trunk(tokens), torch.zeros_like(trunk(tokens)))


# --- what is refused


def test_widths_that_differ_need_an_adapter(untied: Path) -> None:
    with pytest.raises(UserError) as error:
        vocabulary_widths(model_of(d_model=16, embeddings=settings(untied)))
    for part in (
        "model.embeddings.adapter_hidden = null",
        "width 12",
        "model.d_model is 16",
        "or set model.d_model to",
    ):
        assert part in str(error.value)
    with pytest.raises(UserError, match=r"model\.head\.adapter_hidden = 8: .* needs no adapter; set it to null"):
        vocabulary_widths(model_of(head=settings(untied, adapter_hidden=8)))


def test_too_few_rows(untied: Path) -> None:
    matrix = find_matrix("model.head", settings(untied))
    assert len(matrix.read(ROWS)) == ROWS
    with pytest.raises(UserError, match=r"model\.head\.source = .*untied: .* has 40 rows, the tokenizer has 41 ids"):
        matrix.read(ROWS + 1)


def refusal(source: Path | str, tensor: str = "embed_tokens") -> str:
    with pytest.raises(UserError) as error:
        find_matrix("model.embeddings", settings(source, tensor=tensor))
    return str(error.value)


def test_bad_sources(tmp_path: Path, sharded: Path) -> None:
    assert "no such directory" in refusal(tmp_path / "nothing")
    assert "expected model.safetensors, or model.safetensors.index.json" in refusal(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    assert "only pytorch_model.bin, which is not read" in refusal(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"x")
    assert "model.safetensors is missing or damaged" in refusal(tmp_path)
    save_file({"model.embed_tokens.weight": torch.zeros(4, 4, dtype=torch.int8)}, tmp_path / "model.safetensors")
    assert "holds I8 [4, 4], expected a matrix" in refusal(tmp_path)
    two = {f"{side}.embed_tokens.weight": torch.zeros(4, 4) for side in ("encoder", "decoder")}
    save_file(two, tmp_path / "model.safetensors")
    assert "it holds several: decoder.embed_tokens.weight, encoder.embed_tokens.weight" in refusal(tmp_path)
    save_file({"unembed_tokens.weight": torch.zeros(4, 4)}, tmp_path / "model.safetensors")
    assert "it holds none" in refusal(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{")
    assert "not readable as JSON" in refusal(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    assert "no map of weights to files" in refusal(tmp_path)
    broken = shutil.copytree(sharded, tmp_path / "broken")
    matrix = find_matrix("model.embeddings", settings(broken))
    matrix.file.unlink()
    assert f"{matrix.file.name} is missing or damaged" in refusal(broken)
    save_file({"other": torch.zeros(1)}, matrix.file)
    assert "lacks model.embed_tokens.weight, which its index says" in refusal(broken)


def test_a_hub_name_that_cannot_be_had() -> None:
    said = refusal("no/such-model")
    assert said.startswith(
        "model.embeddings.source = no/such-model: no directory here, and cannot be had from the hub ("
    )
    assert said.endswith("a directory that holds a model, or a hub name and a network")
    assert "\n" not in said


# --- the parameters


def params_of(tmp_path: Path, **changes: Any) -> Params:
    tree = yaml.safe_load(GOOD)
    tree["tokenizer"] = {"type": "pretrained", "vocab_size": None} | changes.pop("tokenizer", {})
    tree["model"] |= {"d_model": WIDTH} | changes
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(tree))
    return load(tmp_path / "params.yaml")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another type": (
        {"embeddings": {"source": "a/b"}, "tokenizer": {"type": "byte"}},
        r"tokenizer\.type = byte: expected pretrained, with tokenizer\.name null, because the rows of model\.embed",
    ),
    "another name": (
        {"head": {"source": "a/b"}, "tokenizer": {"name": "gpt2"}},
        r"tokenizer\.name = gpt2: expected null, because the rows of model\.head\.source \(a/b\)",
    ),
    "two sources": (
        {"embeddings": {"source": "a/b"}, "head": {"source": "c/d"}},
        r"model\.head\.source = c/d: expected a/b as in model\.embeddings\.source",
    ),
    "no source and no name": ({}, r"tokenizer\.name = null: expected a directory or a hub name"),
    "tied to another head": (
        {"embeddings": {"source": "a/b"}, "head": {"source": "a/b"}, "tie_embeddings": True},
        r"model\.head\.source = a/b: has no effect with model\.tie_embeddings true",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_parameters_that_do_not_fit(tmp_path: Path, name: str) -> None:
    changes, says = REFUSED[name]
    with pytest.raises(UserError, match=says) as error:
        params_of(tmp_path, **changes)
    assert "problems" not in str(error.value)


def test_parameters_that_fit(tmp_path: Path) -> None:
    assert params_of(tmp_path, head={"source": "a/b"}).tokenizer.takes_along
    assert not params_of(tmp_path, head={"source": "a/b"}, tokenizer={"name": "a/b"}).tokenizer.takes_along


def stage_of(params: Params, name: str) -> Stage:
    return next(stage for stage in table(params) if stage.name == name)


def test_stages_watch_the_source(untied: Path, tmp_path: Path) -> None:
    local = params_of(tmp_path, embeddings={"source": str(untied)})
    file = str(untied / "model.safetensors")
    for name in ("check_params", "train_stack_0"):
        assert file in stage_of(local, name).inputs
    assert file not in (*stage_of(local, "train_stack_1").inputs, *stage_of(local, "tokenize").inputs)
    assert str(untied / "tokenizer.json") in stage_of(local, "tokenize").inputs
    assert {"model.embeddings.source", "model.head.source"} <= set(stage_of(local, "tokenize").params)
    hub = params_of(tmp_path, embeddings={"source": "some/model"})
    assert stage_of(hub, "train_stack_0").inputs == ("artifacts/tokens",)
    plain = params_of(tmp_path, tokenizer={"type": "byte"})
    assert stage_of(plain, "tokenize").params == ("tokenizer",)


def test_widths_are_checked_before_anything_runs(untied: Path, tmp_path: Path) -> None:
    params = params_of(tmp_path, d_model=16, embeddings={"source": str(untied)})
    with pytest.raises(UserError, match=r"model\.embeddings\.adapter_hidden = null"):
        table(params)


def test_the_check_imports_no_torch() -> None:
    code = "import sys, stackwise.growth.pretrained, workflow.stages; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).resolve().parents[2]).returncode == 0


# --- the tokenizer


def test_the_tokenizer_is_taken_along(untied: Path) -> None:
    from transformers import AutoTokenizer

    params = TokenizerParams(type="pretrained", vocab_size=None, name=str(untied))
    ours, theirs = build_tokenizer(params, lambda: iter(())), AutoTokenizer.from_pretrained(untied)
    assert encode(ours, TEXTS) == [theirs(text, add_special_tokens=False).input_ids for text in TEXTS]
    assert vocabulary_of(ours).size == VOCAB
    assert vocabulary_of(ours).eos_id == theirs.eos_token_id
    rows = embeddings_of(untied)
    assert len(rows) == VOCAB < ROWS


def test_the_stage_takes_it_along(untied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script of the stage `tokenize` itself, with nothing but what the stage declares."""
    monkeypatch.setattr(sys, "path", sys.path.copy())  # which scripts change
    from workflow.scripts import tokenize_corpus

    params = params_of(tmp_path, embeddings={"source": str(untied)})
    found = tokenize_corpus.tokenizer_params(view(params, stage_of(params, "tokenize").params))
    assert found.name == str(untied)
    named = params_of(tmp_path, tokenizer={"name": "gpt2"})
    assert tokenize_corpus.tokenizer_params(view(named, stage_of(named, "tokenize").params)).name == "gpt2"


def test_rack_of_any_widths_runs() -> None:
    shape = RackShape.of(model_of(d_model=16, head=settings("a/b", adapter_hidden=4)), [1], VOCAB, head_width=WIDTH)
    rack = Rack(shape)
    assert RackShape.from_json(json.loads(json.dumps(shape.to_json()))) == shape
    assert rack.head.weight.shape == (VOCAB, WIDTH)
