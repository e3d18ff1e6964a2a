"""The tokenizer of a rack beside its model in Transformers: whole for a model that sees masks, for one that does not
without the mask token."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_CONFIG, _BACKEND, _SPECIAL = "tokenizer_config.json", "tokenizer.json", "special_tokens_map.json"
_UNLIMITED = 10**20
"""From here on `model_max_length` says nothing."""


@dataclass(frozen=True)
class SpecialTokens:
    """Ids that the model's configuration names."""

    bos: int | None
    eos: int | None
    pad: int | None
    mask: int | None


def write_tokenizer(source: Path, directory: Path, *, mask_id: int, masked: bool, length: int | None) -> SpecialTokens:
    """Copy a tokenizer. The end of a text, which stands between documents, begins one too and pads, unless the
    tokenizer has tokens of its own for that.

    Args:
        source: where the rack keeps it.
        directory: where its files go.
        mask_id: V.
        masked: whether the mask token stays.
        length: tokens of a text that the model was trained on; None: the tokenizer's files are left as they are, but
            for the mask token.
    """
    shutil.copytree(source, directory, dirs_exist_ok=True)
    config = _read(directory / _CONFIG)
    backend = _read(directory / _BACKEND)
    if not masked:
        _without_mask(config, backend, mask_id)
        if (directory / _SPECIAL).is_file():
            special = _read(directory / _SPECIAL)
            special.pop("mask_token", None)
            _write(directory / _SPECIAL, special)
    if length is not None:
        for token in ("bos_token", "pad_token"):
            if config.get(token) is None:
                config[token] = config["eos_token"]
        if config.get("model_max_length", _UNLIMITED) >= _UNLIMITED:
            config["model_max_length"] = length
    _write(directory / _CONFIG, config)
    if backend:
        _write(directory / _BACKEND, backend)
    ids = {token["content"]: token["id"] for token in backend.get("added_tokens", ())}
    vocabulary = backend.get("model", {}).get("vocab", {})
    ids = (vocabulary if isinstance(vocabulary, dict) else {}) | ids
    bos, eos, pad, mask = (ids.get(_text(config.get(f"{name}_token"))) for name in ("bos", "eos", "pad", "mask"))
    return SpecialTokens(bos, eos, pad, mask)


def _without_mask(config: dict[str, Any], backend: dict[str, Any], mask_id: int) -> None:
    """Take the token of the last id out of both files."""
    text = _text(config.pop("mask_token", None))
    config.get("added_tokens_decoder", {}).pop(str(mask_id), None)
    if backend:
        backend["added_tokens"] = [token for token in backend["added_tokens"] if token["id"] != mask_id]
        vocabulary = backend["model"].get("vocab")
        if isinstance(vocabulary, dict) and vocabulary.get(text) == mask_id:
            del vocabulary[text]


def _text(token: Any) -> str:
    """Of a special token, which some files describe at length."""
    return str(token["content"] if isinstance(token, dict) else token)


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _write(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
