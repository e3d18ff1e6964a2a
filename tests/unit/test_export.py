"""Exported racks: the same numbers and the same texts under Transformers, where StackWise is not."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

from stackwise.artifacts.manifest import read
from stackwise.config.growth import LoRAParams
from stackwise.config.model import AttentionParams
from stackwise.errors import UserError
from stackwise.growth.init import initialize
from stackwise.growth.racks import load_rack
from stackwise.huggingface.exporting import KIND
from stackwise.huggingface.tensors import read_tensors, write_tensors
from stackwise.model.rack import Rack, StackShape
from tests.unit.exporting import (
    LENGTH,
    NATIVE,
    OWN,
    VOCAB,
    build,
    exported,
    greedy,
    model_of,
    saved,
    some_tokens,
)
from workflow import command

TOLERANCE: dict[str, Any] = {"rtol": 0.0, "atol": 1e-5}
PROMPT, NEW = 7, 20


@pytest.fixture(autouse=True)
def _own_modules_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers copies the code that it loads; not into the user's directory."""
    modules = str(tmp_path_factory.getbasetemp() / "modules")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", modules)


def load(directory: Path, kind: str = "CausalLM", *, trust: bool = False) -> Any:
    """A model in which every weight was found, and no other."""
    auto: Any = getattr(transformers, f"AutoModelFor{kind}")
    model, loading = auto.from_pretrained(directory, trust_remote_code=trust, output_loading_info=True, dtype="auto")
    assert not any(loading.values()), loading
    return model.eval()


def logits_of(model: Any, tokens: Tensor, **arguments: Any) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model(tokens, **arguments).logits
    return logits


def check_causal(rack: Rack, model: Any, *, padded: bool = True) -> None:
    """The same logits, and the same text; if `padded`, also with padding on the left."""
    tokens = some_tokens()
    with torch.inference_mode():
        ours = rack.logits(tokens, causal=True)
    torch.testing.assert_close(logits_of(model, tokens), ours, **TOLERANCE)
    assert ours.std() > 0.5
    options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    prompt = tokens[:, :PROMPT]
    assert torch.equal(model.generate(prompt, **options), greedy(rack, prompt, NEW))
    if not padded:
        return
    short = prompt[:1, 3:]
    both = torch.cat([torch.zeros_like(prompt[:1, :3]), short], dim=1)
    found = model.generate(both, attention_mask=torch.tensor([[0] * 3 + [1] * 4]), **options)
    assert torch.equal(found[:, 3:], greedy(rack, short, NEW))


@pytest.mark.parametrize("name", NATIVE)
def test_a_causal_rack_is_a_model_of_transformers(name: str, tmp_path: Path) -> None:
    expected, params = NATIVE[name]
    rack = build(params)
    done = exported(saved(rack, tmp_path), tmp_path / "out")
    assert (done.architecture, done.reasons) == (expected, ())
    assert not list((tmp_path / "out").glob("*.py"))
    model = load(tmp_path / "out")
    assert type(model).__name__ == expected
    assert model.config.vocab_size == VOCAB
    check_causal(rack, model)


@pytest.mark.parametrize("name", OWN)
def test_another_causal_rack_brings_its_code(name: str, tmp_path: Path) -> None:
    reason, params = OWN[name]
    rack = build(params)
    done = exported(saved(rack, tmp_path), tmp_path / "out")
    assert any(reason in found for found in done.reasons)
    model = load(tmp_path / "out", trust=True)
    assert type(model).__name__ == "StackWiseForCausalLM"
    check_causal(rack, model, padded=params.attention.type not in ("kernel", "mlgka"))


@pytest.mark.parametrize("name", ["gqa-tied-llama3", "mla", "kernel", "timed", "moe-frozen"])
def test_a_bidirectional_rack_is_a_masked_lm(name: str, tmp_path: Path) -> None:
    _, params = (NATIVE | OWN)[name]
    rack = build(params)
    exported(saved(rack, tmp_path, objective="diffusion"), tmp_path / "out")
    model = load(tmp_path / "out", "MaskedLM", trust=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert model.config.vocab_size == len(tokenizer) == VOCAB + 1
    assert model.config.mask_token_id == tokenizer.mask_token_id == VOCAB
    tokens = some_tokens(VOCAB + 1)
    tokens[:, ::3] = VOCAB
    times = (tokens == VOCAB).float().mean(dim=1)
    with torch.inference_mode():
        ours = rack.logits(tokens, times=times)
    found = logits_of(model, tokens)
    torch.testing.assert_close(found[..., :VOCAB], ours, **TOLERANCE)
    assert (found[..., VOCAB] == torch.finfo(torch.float32).min).all()
    # Padding is not seen, and is no part of what the mask rate is a share of.
    padded = torch.nn.functional.pad(tokens, (0, 3))
    attended = torch.nn.functional.pad(torch.ones_like(tokens), (0, 3))
    found = logits_of(model, padded, attention_mask=attended)
    torch.testing.assert_close(found[:, :-3, :VOCAB], ours, **TOLERANCE)
    labels = torch.where(tokens == VOCAB, 5, -100)
    loss = model(tokens, labels=labels).loss
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(ours.flatten(0, 1), labels.flatten()))


def test_stacks_of_different_architectures_bring_their_code(tmp_path: Path) -> None:
    params = model_of({})
    rack = build(params)
    other = StackShape(1, AttentionParams(n_heads=2), params.mlp)
    mixed = Rack(replace(rack.shape, stacks=(*rack.shape.stacks, other)))
    initialize(mixed, name="mixed", seed=0)
    mixed.load_state_dict(rack.state_dict(), strict=False)
    done = exported(saved(mixed.eval(), tmp_path), tmp_path / "out")
    assert "stacks of different architectures" in done.reasons[0]
    model = load(tmp_path / "out", trust=True)
    check_causal(mixed, model)


IMPORTED_NOWHERE = """
import importlib.abc, json, sys, warnings
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("stackwise", "workflow"):
            raise ImportError(name)
sys.meta_path.insert(0, Absent())
try:
    import stackwise
except ImportError:
    pass
else:
    sys.exit("stackwise can be imported")
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
native, own, masked = sys.argv[1:]
found = {}
for name, place in (("native", native), ("own", own)):
    tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=name == "own")
    speak = pipeline("text-generation", place, trust_remote_code=name == "own")
    text = speak("To be", max_new_tokens=12, do_sample=False, return_full_text=False)[0]["generated_text"]
    found[name] = [type(speak.model).__name__, text, [tokenizer.eos_token_id, tokenizer.mask_token_id], len(tokenizer)]
fill = pipeline("fill-mask", masked, trust_remote_code=True)
found["masked"] = [type(fill.model).__name__, [guess["token"] for guess in fill("To [MASK] or")]]
print(json.dumps(found))
"""


def test_where_stackwise_cannot_be_imported(tmp_path: Path) -> None:
    """Texts by Transformers' pipelines are those of the racks."""
    racks, places = {}, []
    for name, objective in (("gqa-tied-llama3", "clm"), ("kernel", "clm"), ("mla", "diffusion")):
        (tmp_path / name).mkdir()
        racks[name] = build((NATIVE | OWN)[name][1])
        exported(saved(racks[name], tmp_path / name, objective=objective), tmp_path / name / "out")
        places.append(str(tmp_path / name / "out"))
    (tmp_path / "elsewhere").mkdir()
    done = subprocess.run(
        [sys.executable, "-I", "-c", IMPORTED_NOWHERE, *places],
        cwd=tmp_path / "elsewhere",
        env={"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    prompt = torch.tensor([[*b"To be"]])
    for kind, name, architecture in (
        ("native", "gqa-tied-llama3", "LlamaForCausalLM"),
        ("own", "kernel", "StackWiseForCausalLM"),
    ):
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name / "out", trust_remote_code=True)
        ids = greedy(racks[name], prompt, 12)[0, 5:].tolist()
        ids = ids[: ids.index(256)] if 256 in ids else ids
        assert found[kind] == [architecture, tokenizer.decode(ids), [256, None], VOCAB]
    masked = torch.tensor([[*b"To ", VOCAB, *b" or"]])
    with torch.inference_mode():
        best = racks["mla"].logits(masked)[0, 3].topk(5).indices.tolist()
    assert found["masked"] == ["StackWiseForMaskedLM", best]


@pytest.mark.parametrize("name", ["gqa-tied-llama3", "kernel", "mla"])
def test_adapters_stay_adapters(name: str, tmp_path: Path) -> None:
    """Of two kinds, with ranks that differ from stack to stack: Transformers and PEFT compute what the rack does. PEFT
    does not know adapters of DeepSeek-V3's dense networks: there the rack brings its code."""
    from peft import PeftModel

    from stackwise.adapters.lora import adapt

    rack = build((NATIVE | OWN)[name][1])
    settings = LoRAParams(rank=2, rank_pattern="linear", alpha_pattern="increasing", strategy="progressive")
    targets = LoRAParams(rank=3, target_modules=["o_proj"])
    for k, stack in enumerate(rack.stacks):
        adapt(stack, "stack", settings, k=k, seed=0)  # type: ignore[arg-type]
        adapt(stack, "trunk", targets, k=k, seed=0)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for path, p in rack.named_parameters():
            if ".lora_B." in path:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    artifact = saved(rack, tmp_path)
    merged = load_rack(artifact.path).eval()
    done = exported(artifact, tmp_path / "out")
    assert done.adapters == ("adapters/stack", "adapters/trunk")
    base = load(tmp_path / "out", trust=True)
    model: Any = PeftModel.from_pretrained(base, tmp_path / "out/adapters/stack", adapter_name="stack")
    model.load_adapter(tmp_path / "out/adapters/trunk", adapter_name="trunk")
    model.base_model.set_adapter(["stack", "trunk"])
    tokens = some_tokens()
    with torch.inference_mode():
        ours = merged.logits(tokens, causal=True)
        unadapted = logits_of(load(tmp_path / "out", trust=True), tokens)
    # Merged or beside each other, sums are rounded in another order.
    torch.testing.assert_close(logits_of(model.eval(), tokens), ours, rtol=0.0, atol=1e-4)
    assert (unadapted - ours).abs().max() > 0.1


def test_files_that_go_along(tmp_path: Path) -> None:
    """Tokenizer, generation, card."""
    artifact = saved(build(NATIVE["standard"][1]), tmp_path)
    metrics = {"next_token": {"bits_per_byte": 1.25}}
    exported(artifact, tmp_path / "out", metrics=metrics, commit="0123abc")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (256, 256, 256)
    assert tokenizer.mask_token is None
    assert len(tokenizer) == VOCAB
    assert tokenizer.model_max_length == LENGTH
    assert max(tokenizer("[MASK] h\u00e9").input_ids) < VOCAB
    model = load(tmp_path / "out")
    assert model.generation_config.eos_token_id == model.generation_config.bos_token_id == 256
    assert model.config.max_position_embeddings == LENGTH
    card = (tmp_path / "out/README.md").read_text()
    for part in (artifact.digest, "0123abc", "| next_token.bits_per_byte | 1.2500 |", "License", "LlamaForCausalLM"):
        assert part in card
    assert "trust_remote_code" not in card


def test_the_card_says_that_code_is_run(tmp_path: Path) -> None:
    exported(saved(build(OWN["kernel"][1]), tmp_path), tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    assert "custom_code" in card
    assert "trust_remote_code=True" in card
    assert "model.attention.type kernel" in card
    for file in (tmp_path / "out").glob("*.py"):
        assert "from stackwise." not in file.read_text()


@pytest.mark.parametrize(("dtype", "expected"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_weights_in_another_format(dtype: str, expected: torch.dtype, tmp_path: Path) -> None:
    rack = build(NATIVE["standard"][1])
    exported(saved(rack, tmp_path), tmp_path / "out", dtype=dtype)
    model = load(tmp_path / "out")
    assert model.dtype == expected
    assert torch.equal(model.lm_head.weight, rack.head.weight.to(expected))


def test_equal_racks_give_equal_bytes(tmp_path: Path) -> None:
    artifact = saved(build(OWN["moe-frozen"][1]), tmp_path)
    for name in "ab":
        exported(artifact, tmp_path / name)
    a, b = ({f.name: f.read_bytes() for f in (tmp_path / x).iterdir()} for x in "ab")
    assert a == b


def test_files_of_tensors_are_those_of_the_library(tmp_path: Path) -> None:
    """Any order, shapes with nothing in them, several formats."""
    tensors = {
        "b": torch.randn(3, 5),
        "a": torch.arange(7),
        "c.d": torch.randn(2, 2).bfloat16(),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(3.0),
    }
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    write_tensors(tmp_path / "ours.safetensors", read_tensors(tmp_path / "theirs.safetensors"))
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
    write_tensors(tmp_path / "half.safetensors", read_tensors(tmp_path / "theirs.safetensors"), torch.float16)
    half = load_file(tmp_path / "half.safetensors")
    assert torch.equal(half["b"], tensors["b"].half())
    assert torch.equal(half["a"], tensors["a"])


# --- the command


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["stackwise", *map(str, arguments)])
    command.main()


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It takes the pipeline's metrics along, and replaces nothing unasked."""
    (tmp_path / "artifacts").mkdir()
    artifact = saved(build(OWN["kernel"][1]), tmp_path)
    fused = artifact.path.rename(tmp_path / "artifacts/fused")
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics/fused.json").write_text('{"next_token": {"bits_per_byte": 1.5}}')
    out = tmp_path / "out"
    call(monkeypatch, "export", "--format", "hf", "--model", fused, "--out", out)
    said = capsys.readouterr().out
    assert "trust_remote_code=True" in said
    assert "model.attention.type kernel" in said
    assert "| next_token.bits_per_byte | 1.5000 |" in (out / "README.md").read_text()
    read(out, KIND)
    before = {f.name: f.read_bytes() for f in out.iterdir()}
    with pytest.raises(SystemExit, match="is not empty; give another directory, or --force"):
        call(monkeypatch, "export", "--model", fused, "--out", out, "--dtype", "bf16")
    assert {f.name: f.read_bytes() for f in out.iterdir()} == before
    call(monkeypatch, "export", "--model", fused, "--out", out, "--dtype", "bf16", "--force")
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


def test_what_is_no_rack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="missing, so this is no complete rack"):
        call(monkeypatch, "export", "--model", tmp_path, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    artifact = saved(build(NATIVE["standard"][1]), tmp_path)
    with pytest.raises(SystemExit, match=r"nowhere\.json: missing or damaged"):
        call(monkeypatch, *("export", "--model", artifact.path, "--out", tmp_path / "out", "--metrics", "nowhere.json"))
    assert not (tmp_path / "out").exists()


def test_a_damaged_file_of_tensors(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.randn(4, 4)}, file)
    whole = file.read_bytes()
    for content in (b"", b"12345678{", whole[:-5], b"\xff" * 40):
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"model\.safetensors: damaged"):
            read_tensors(file)
