"""Checkpoints of Llama and its relatives: where they are, and what architecture of ours computes the same.

Importing this imports no torch: what does not fit is found before anything runs.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stackwise.config.model import AttentionParams, MLPParams, ModelParams
from stackwise.config.params import Params
from stackwise.errors import UserError
from stackwise.growth.pretrained import CONFIG, INDEX, WEIGHTS, is_on_hub

GENERATION = "generation_config.json"
_KINDS = ("llama", "mistral", "qwen3", "deepseek_v3")
_DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
_PLAIN: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1, 1.0),
    "quantization_config": (),
}
"""Keys with the only values that our architecture computes; a key that is absent or null is one of them."""
_SCALING: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": None},
    "llama3": {
        **{"factor": None, "original_max_position_embeddings": None},
        **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
    },
    "yarn": {
        **{"factor": None, "original_max_position_embeddings": None, "beta_fast": 32.0, "beta_slow": 1.0},
        **{"truncate": True, "attention_factor": None},
    },
}
"""The keys of each rotary scaling, with the only value of those that are no parameter of ours."""
IMPORT = "stackwise import --model {source} --blocks-per-stack N"


@dataclass(frozen=True)
class Checkpoint:
    """A model on this disk."""

    source: str
    """As it was named."""
    directory: Path
    config: dict[str, Any]
    model: ModelParams
    """The architecture of ours that computes the same."""
    layers: int

    @property
    def dtype(self) -> str:
        """Of its weights, as `compute.dtype` says it."""
        found = self.config.get("dtype", self.config.get("torch_dtype"))
        return _DTYPES.get(str(found), "fp32")

    @property
    def length(self) -> int:
        """The longest text that it was made for (tokens)."""
        return int(self.config.get("max_position_embeddings", 2048))

    @property
    def generation(self) -> dict[str, Any] | None:
        """What it says of generation."""
        file = self.directory / GENERATION
        return _json(self.source, file) if file.is_file() else None

    @property
    def files(self) -> list[Path]:
        """Those that hold its weights.

        Raises:
            UserError: there are none in safetensors.
        """
        return _weights(self.source, self.directory)


def open_checkpoint(source: str) -> Checkpoint:
    """A directory that `save_pretrained` wrote, a file in it, or the name of a model in the local cache of the hub.

    Raises:
        UserError: there is none, or it computes what no architecture of ours does.
    """
    directory = _directory(source)
    config = _json(source, directory / CONFIG)
    return Checkpoint(source, directory, config, architecture_of(source, config), int(config["num_hidden_layers"]))


def files_to_watch(source: str) -> list[str]:
    """The files of a local source that decide what is imported; none of one on the hub."""
    if not Path(source).is_dir():
        return []
    directory = Path(source)
    return sorted(map(str, [directory / CONFIG, *_weights(source, directory)]))


def architecture_of(source: str, config: dict[str, Any]) -> ModelParams:
    """The architecture that a configuration describes.

    Args:
        source: of the model, for messages.
        config: what `config.json` holds.

    Raises:
        UserError: no architecture of ours computes the same; the message names the key.
    """
    kind = config.get("model_type")
    if kind not in _KINDS:
        why = ": its projections have biases" if kind == "qwen2" else ""
        raise _unlike(source, "model_type", kind, f"one of {', '.join(_KINDS)}{why}")
    for key, allowed in _PLAIN.items():
        if (value := config.get(key)) is not None and value not in allowed:
            raise _unlike(source, key, value, f"{allowed[0] if allowed else 'none'}")
    if kind == "mistral" and config.get("sliding_window", 4096) is not None:
        raise _unlike(source, "sliding_window", config.get("sliding_window", 4096), "null: every position sees all")
    windows = set(config.get("layer_types") or ()) - {"full_attention"}
    if kind == "qwen3" and (config.get("use_sliding_window") or windows):
        raise _unlike(source, "use_sliding_window", True, "false: every position sees all")
    try:
        return _model(source, kind, config)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{source}: {CONFIG} does not describe a model of type {kind} ({error}); get it again"
        ) from None


def _model(source: str, kind: str, config: dict[str, Any]) -> ModelParams:
    width, heads = config["hidden_size"], config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    attention: dict[str, Any] = {"n_heads": heads, "dropout": float(config.get("attention_dropout") or 0.0)}
    if kind == "deepseek_v3":
        attention |= _latents(source, config)
    else:
        head_dim = config.get("head_dim") or (128 if kind == "qwen3" else width // heads)
        if head_dim * heads != width:
            attention["head_dim"] = head_dim
        attention |= {"qk_norm": kind == "qwen3"}
        attention |= {"type": "standard"} if kv_heads == heads else {"type": "gqa", "n_kv_heads": kv_heads}
    return ModelParams(
        d_model=width,
        attention=AttentionParams(**attention, **_rope(source, kind, config)),
        mlp=MLPParams(hidden=config["intermediate_size"]),
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
    )


def _latents(source: str, config: dict[str, Any]) -> dict[str, Any]:
    wanted = {"rope_interleave": False, "num_key_value_heads": config["num_attention_heads"], "rms_norm_eps": 1e-6}
    for key, value in wanted.items():
        if (found := config.get(key, True if key == "rope_interleave" else value)) != value:
            raise _unlike(source, key, found, json.dumps(value))
    if config["first_k_dense_replace"] < config["num_hidden_layers"]:
        dense = f"at least num_hidden_layers ({config['num_hidden_layers']}): experts are routed another way"
        raise _unlike(source, "first_k_dense_replace", config["first_k_dense_replace"], dense)
    return {
        "type": "mla",
        "mla_rq": config["q_lora_rank"],
        "mla_rkv": config["kv_lora_rank"],
        "mla_rope_dim": config["qk_rope_head_dim"],
        "mla_nope_dim": config["qk_nope_head_dim"],
        "mla_v_dim": config["v_head_dim"],
    }


def _rope(source: str, kind: str, config: dict[str, Any]) -> dict[str, Any]:
    """Our rotary parameters, of what configurations say since Transformers 5 or said before."""
    given: dict[str, Any] = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = float(given.pop("rope_theta", None) or config.get("rope_theta") or 10000.0)
    type_ = given.pop("rope_type", None) or given.pop("type", None) or "default"
    given.pop("type", None)
    keys: dict[str, Any] = dict(_SCALING.get(type_) or {})
    if type_ not in _SCALING:
        raise _unlike(source, "rope_parameters.rope_type", type_, f"one of {', '.join(_SCALING)}")
    if type_ == "yarn" and kind == "deepseek_v3":
        keys |= {"mscale": 1.0, "mscale_all_dim": 1.0}
        given = {"mscale": None, "mscale_all_dim": None} | given
    keys.setdefault("partial_rotary_factor", 1.0)
    for key, value in given.items():
        if key not in keys:
            if value is not None:
                raise _unlike(source, f"rope_parameters.{key}", value, "none")
        elif keys[key] is not None and value != keys[key]:
            raise _unlike(source, f"rope_parameters.{key}", value, json.dumps(keys[key]))
        elif key == "attention_factor" and value is not None:
            raise _unlike(source, f"rope_parameters.{key}", value, "null")
    if type_ == "default":
        return {"rope_theta": theta}
    found = {"rope_theta": theta, "rope_scaling": type_, "rope_factor": float(given["factor"])}
    if "original_max_position_embeddings" in keys:
        original = given.get("original_max_position_embeddings") or config["max_position_embeddings"]
        found["rope_original_len"] = int(original)
    return found


# --- a start of the pipeline


def check_start(params: Params) -> None:
    """See to it that `growth.start`, if it is given, is a model of the architecture that the parameters describe.

    Raises:
        UserError: it is not, or there is none.
    """
    if params.growth.start is not None:
        open_start(params)


def open_start(params: Params) -> Checkpoint:
    """The model that growth starts with.

    Args:
        params: with model, stack.blocks, stacks and growth.start, which is given.

    Raises:
        UserError: it is not of the architecture that the parameters describe, or there is none.
    """
    start = params.growth.start
    assert start is not None
    checkpoint, stacks = open_checkpoint(start), range(params.growth.imported)
    different = [
        f"{key} = {_as_json(ours)}, the model has {_as_json(theirs)}"
        for k in stacks
        for key, ours, theirs in _differences(params.stack_model(k), checkpoint.model)
    ]
    blocks = [params.stack_params(k).blocks for k in stacks]
    if sum(blocks) != checkpoint.layers:
        cut = " + ".join(map(str, blocks))
        different.append(f"stack.blocks and growth.start_stacks make {cut} blocks, the model has {checkpoint.layers}")
    if different:
        raise UserError(
            f"growth.start = {start}: params.yaml describes another model:\n  "
            + "\n  ".join(dict.fromkeys(different))
            + f"\n`{IMPORT.format(source=start)} --dry-run` prints what to write there"
        )
    return checkpoint


def _differences(ours: ModelParams, theirs: ModelParams) -> Iterator[tuple[str, Any, Any]]:
    """Keys, with their values, in which two architectures do not compute the same."""
    left, right = _facts(ours), _facts(theirs)
    for key in left:
        if left[key] != right[key]:
            yield f"model.{key}", left[key], right[key]


def _facts(model: ModelParams) -> dict[str, Any]:
    """What an architecture computes, with nothing left to defaults."""
    attention, width = model.attention, model.attention.head_dim or model.d_model // model.attention.n_heads
    kept = attention.model_dump(exclude={"dropout"})
    if attention.type == "gqa" and attention.n_kv_heads == attention.n_heads:
        kept |= {"type": "standard", "n_kv_heads": None}
    kept["head_dim"] = None if attention.uses_latents else width
    if attention.uses_latents:
        rope_dim = attention.rope_dim(width)
        nope_dim = attention.mla_nope_dim or width - rope_dim
        kept |= {"mla_rope_dim": rope_dim, "mla_nope_dim": nope_dim, "mla_v_dim": attention.mla_v_dim or width}
    return {
        "d_model": model.d_model,
        **{f"attention.{key}": value for key, value in kept.items()},
        "mlp.type": model.mlp.type,
        "mlp.hidden": model.mlp.hidden,
        "mlp.frozen_up": model.mlp.frozen_up,
        "time.mode": "none" if model.time.mode == "depth" else model.time.mode,
        "norm_eps": model.norm_eps,
        "tie_embeddings": model.tie_embeddings,
    }


# --- files


def _directory(source: str) -> Path:
    path = Path(source)
    if path.is_file():
        path = path.parent
    if path.is_dir():
        return path
    if not is_on_hub(source):
        raise UserError(f"{source}: no such directory; give one that holds a model, or a name in the hub's local cache")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, local_files_only=True))
    except Exception as error:  # the hub fails in its own ways
        raise UserError(
            f"{source}: no directory here, and not in the hub's local cache, and nothing is downloaded; get it with "
            f"`hf download {source}`, or give a directory that holds a model"
        ) from error


def _weights(source: str, directory: Path) -> list[Path]:
    if (directory / INDEX).is_file():
        places = _json(source, directory / INDEX).get("weight_map")
        if not isinstance(places, dict):
            raise UserError(f"{source}: {INDEX} has no map of weights to files; get the model again")
        return [directory / name for name in sorted(set(places.values()))]
    if not (directory / WEIGHTS).is_file():
        raise UserError(
            f"{source}: expected {WEIGHTS}, or {INDEX} and its files; save the model with `save_pretrained` of "
            "transformers"
        )
    return [directory / WEIGHTS]


def _json(source: str, file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{source}: {file.name} is missing or not readable as JSON; give a model of transformers")
    return content


def _unlike(source: str, key: str, value: object, expected: str) -> UserError:
    return UserError(
        f"{source}: {CONFIG}: {key} = {_as_json(value)}: no architecture here computes that; expected {expected}"
    )


def _as_json(value: object) -> str:
    return json.dumps(value, default=str)
