"""Checkpoints of Llama and its relatives as racks: their logits, and their bytes again."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from stackwise.artifacts.manifest import publish, read
from stackwise.errors import UserError
from stackwise.growth.racks import KIND, TOKENIZER, load_rack
from stackwise.huggingface.checkpoint import architecture_of, open_checkpoint
from stackwise.huggingface.importing import import_rack
from tests.unit.exporting import exported, greedy
from workflow import command

LETTERS = [*"abcdefghijklmnopqrstuvwxyz .,", "<unk>", "<eos>"]
VOCAB, LAYERS = len(LETTERS), 3
COMMON: dict[str, Any] = {
    **{"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2},
    **{"bos_token_id": None, "eos_token_id": VOCAB - 1},
}
LATENTS: dict[str, Any] = {
    "kv_lora_rank": 12,
    "q_lora_rank": 10,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 5,
}
LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0},
    **{"high_freq_factor": 4.0, "original_max_position_embeddings": 16},
}


def saved(directory: Path, model: Any, *, letters: list[str] = LETTERS, dtype: torch.dtype = torch.float32) -> Path:
    """A model with its tokenizer, as `save_pretrained` writes them."""
    model.to(dtype).save_pretrained(directory)
    backend = Tokenizer(models.WordLevel({c: i for i, c in enumerate(letters)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer: Any = PreTrainedTokenizerFast
    tokenizer(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>").save_pretrained(directory)
    return directory


def new_model(name: str) -> Any:
    torch.manual_seed(0)
    match name:
        case "llama":
            return LlamaForCausalLM(LlamaConfig(**COMMON))
        case "llama-tied-scaled":
            return LlamaForCausalLM(LlamaConfig(**COMMON, tie_word_embeddings=True, rope_parameters=LLAMA3))
        case "mistral":
            return MistralForCausalLM(MistralConfig(**COMMON, sliding_window=None))
        case "qwen3":
            return Qwen3ForCausalLM(Qwen3Config(**COMMON, head_dim=12, rms_norm_eps=1e-5))
        case _:
            dense: dict[str, Any] = {"first_k_dense_replace": LAYERS, "rope_interleave": False, "num_mtp_layers": 0}
            config = COMMON | {"num_key_value_heads": 4}
            return DeepseekV3ForCausalLM(DeepseekV3Config(**config, **LATENTS, **dense))


def imported(source: Path, directory: Path, *, blocks: tuple[int, ...] = (2, 1)) -> Any:
    """The artifact of the rack."""
    with publish(directory, kind=KIND, params={}) as draft:
        draft.facts |= import_rack(open_checkpoint(str(source)), draft.directory, blocks=blocks, tokenizer=str(source))
    return read(directory, KIND)


@pytest.mark.parametrize("name", ["llama", "llama-tied-scaled", "mistral", "qwen3", "deepseek"])
def test_there_and_back(name: str, tmp_path: Path) -> None:
    """The logits and texts of the model; and an export of the rack is the model again, byte for byte."""
    model = new_model(name).eval()
    source = saved(tmp_path / "model", model)
    artifact = imported(source, tmp_path / "rack")
    rack = load_rack(artifact.path).eval()
    assert [stack.blocks for stack in rack.shape.stacks] == [2, 1]
    tokens = torch.randint(0, VOCAB, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        theirs = model(tokens).logits
        torch.testing.assert_close(rack.logits(tokens, causal=True), theirs, rtol=0.0, atol=1e-5)
    assert theirs.std() > 0.3
    text = model.generate(tokens[:, :4], max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(greedy(rack, tokens[:, :4], 12), text)
    exported(artifact, tmp_path / "out")
    for file in ("model.safetensors", "config.json", "generation_config.json"):
        ours, its = ((place / file).read_bytes() for place in (tmp_path / "out", source))
        assert ours == its if file.endswith("tensors") else json.loads(ours) == json.loads(its)


def test_shards_in_half_precision(tmp_path: Path) -> None:
    model = new_model("llama").bfloat16()
    source = saved(tmp_path / "model", model, dtype=torch.bfloat16)
    whole = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").unlink()
    model.save_pretrained(source, max_shard_size="10KB")
    assert len(list(source.glob("*.safetensors"))) > 2
    artifact = imported(source, tmp_path / "rack")
    rack = load_rack(artifact.path)
    assert torch.equal(rack.head.weight, model.lm_head.weight.float())
    exported(artifact, tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").read_bytes() == whole


def test_the_mask_token_is_new(tmp_path: Path) -> None:
    """Its row begins as the mean of all; the tokenizer has it as its last id."""
    from transformers import AutoTokenizer

    model = new_model("llama")
    rack_path = imported(saved(tmp_path / "model", model), tmp_path / "rack").path
    assert AutoTokenizer.from_pretrained(rack_path / TOKENIZER).mask_token_id == VOCAB
    rows = model.model.embed_tokens.weight
    torch.testing.assert_close(load_rack(rack_path).embeddings.mask[0], rows.mean(dim=0))


def test_rows_beyond_the_tokenizer_are_left_out(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**COMMON | {"vocab_size": 64})).eval()
    artifact = imported(saved(tmp_path / "model", model), tmp_path / "rack")
    tokens = torch.arange(20)[None]
    with torch.inference_mode():
        ours, theirs = load_rack(artifact.path).eval().logits(tokens, causal=True), model(tokens).logits
    torch.testing.assert_close(ours, theirs[..., :VOCAB], rtol=0.0, atol=1e-5)
    exported(artifact, tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == VOCAB


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "qwen2"}, 'model_type = "qwen2": .* biases'),
    ({"model_type": "gpt2"}, 'model_type = "gpt2"'),
    ({"hidden_act": "gelu"}, 'hidden_act = "gelu": .* expected silu'),
    ({"attention_bias": True}, "attention_bias = true: .* expected False"),
    ({"mlp_bias": True}, "mlp_bias = true"),
    ({"quantization_config": {"bits": 4}}, "quantization_config = .* expected none"),
    ({"model_type": "mistral", "sliding_window": 4096}, "sliding_window = 4096"),
    ({"model_type": "qwen3", "use_sliding_window": True}, "use_sliding_window = true"),
    ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, 'rope_parameters.rope_type = "dynamic"'),
    (
        {"rope_parameters": {**LLAMA3, "low_freq_factor": 2.0}},
        r"rope_parameters.low_freq_factor = 2.0: .* expected 1.0",
    ),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
    (
        {"model_type": "deepseek_v3", **LATENTS, "first_k_dense_replace": 1, "rope_interleave": False},
        "num_key_value_heads = 2",
    ),
    ({"model_type": "deepseek_v3"}, "rope_interleave = true: .* expected false"),
    (
        {
            **{"model_type": "deepseek_v3", "num_key_value_heads": 4, "rope_interleave": False},
            "first_k_dense_replace": 1,
        },
        "first_k_dense_replace = 1: .* experts",
    ),
    ({"hidden_size": None}, "does not describe a model of type llama"),
]


@pytest.mark.parametrize(("change", "says"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_what_computes_something_else_is_refused_by_name(change: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        architecture_of("somewhere", {"model_type": "llama", **COMMON} | change)


def test_rotary_parameters_as_they_used_to_be() -> None:
    """Before Transformers 5 they stood elsewhere."""
    old = {"model_type": "llama", **COMMON, "rope_theta": 500.0}
    scaling = {**LLAMA3, "type": "llama3"}
    del scaling["rope_theta"]
    assert architecture_of("", old | {"rope_scaling": scaling}) == architecture_of(
        "", {"model_type": "llama", **COMMON, "rope_parameters": LLAMA3}
    )


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no/such/place: no such directory"):
        open_checkpoint("no/such/place")
    with pytest.raises(UserError, match=r"config\.json is missing"):
        open_checkpoint(str(tmp_path))
    source = saved(tmp_path / "model", new_model("llama"))
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"expected model\.safetensors"):
        imported(source, tmp_path / "rack")
    assert not (tmp_path / "rack").exists()


def test_a_checkpoint_that_is_not_what_it_says(tmp_path: Path) -> None:
    source = saved(tmp_path / "model", new_model("llama"), letters=[*LETTERS[:-2], *"ABCDEF", "<unk>", "<eos>"])
    with pytest.raises(UserError, match=r"embed_tokens.weight is \[31, 32\], expected \[37, 32\].* more ids"):
        imported(source, tmp_path / "rack")
    source = saved(tmp_path / "model", new_model("llama"))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"model_type": "qwen3", "head_dim": 8}))
    with pytest.raises(UserError, match=r"holds no model\.layers\.0\.self_attn\.q_norm\.weight"):
        imported(source, tmp_path / "rack")
    (source / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    with pytest.raises(UserError, match=r"holds model\.layers\.2\..*, which no architecture here has"):
        imported(source, tmp_path / "rack", blocks=(2,))


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It cuts the blocks, and says how to go on."""
    source = saved(tmp_path / "model", new_model("llama"))

    def call(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["stackwise", "import", "--model", *map(str, arguments)])
        command.main()
        return capsys.readouterr().out

    said = call(source, "--blocks-per-stack", 2, "--out", tmp_path / "rack")
    assert "2 stacks" in said
    tree = yaml.safe_load(said[said.index("tokenizer:") :])
    assert tree["growth"] == {"start": str(source), "start_stacks": 2}
    assert (tree["stack"], tree["stacks"]) == ({"blocks": 2}, [{}, {"blocks": 1}])
    assert tree["model"]["attention"] == {"type": "gqa", "n_kv_heads": 2}  # what is no default
    assert call(source / "model.safetensors", "--blocks-per-stack", 2, "--dry-run").startswith("To go on")
    with pytest.raises(SystemExit, match="--blocks-per-stack 4: expected 1 to 3"):
        call(source, "--blocks-per-stack", 4, "--out", tmp_path / "other")
    with pytest.raises(SystemExit, match="is not empty"):
        call(source, "--blocks-per-stack", 1, "--out", tmp_path / "rack")
    with pytest.raises(SystemExit, match="or --dry-run"):
        call(source, "--blocks-per-stack", 1)
