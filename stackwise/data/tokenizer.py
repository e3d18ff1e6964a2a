"""Tokenizers, all behind the interface of `transformers`.

A tokenizer of V ids gives a text the ids 0 to V-1; one of them ends a document. The mask token has the id V,
the last, and no text gives it: special tokens that stand in a text literally are ordinary text to `encode`.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stackwise.config.data import TokenizerParams
from stackwise.data.tokens import Vocabulary
from stackwise.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

END_OF_TEXT = "<|endoftext|>"
MASK = "[MASK]"
OTHER_MASK = "<|mask|>"
"""The mask token of a pretrained tokenizer in which `MASK` means something already."""
UNKNOWN = "<|unknown|>"


def build_tokenizer(params: TokenizerParams, train_documents: Callable[[], Iterator[str]]) -> "PreTrainedTokenizerBase":
    """The tokenizer that the parameters describe.

    - `bpe`: byte-level BPE; V is `vocab_size`, or less if the corpus has no more pairs that occur twice.
    - `byte`: id b is the byte b, 256 ends a text.
    - `char`: the `vocab_size` most frequent characters (of equally frequent ones the first in Unicode), then
      the unknown character, then the end of a text: V is `vocab_size` + 2 if the corpus has as many.
    - `pretrained`: the tokenizer as it is; the end of a text is its end-of-text token, else its separator,
      else a new token. Its own mask token is the mask if it has the last id, else a new one is.

    Args:
        params: the section `tokenizer`.
        train_documents: starts a new pass over the training documents; `bpe` and `char` see its first
            `train_chars` characters.

    Raises:
        UserError: a pretrained tokenizer cannot be loaded or used.
    """
    from transformers import PreTrainedTokenizerFast

    if params.type == "pretrained":
        assert params.name is not None
        return _pretrained(params.name)
    texts = _first_chars(train_documents(), params.train_chars)
    special = {"eos_token": END_OF_TEXT, "mask_token": MASK}
    if params.type == "bpe":
        assert params.vocab_size is not None
        backend = _bpe(params.vocab_size, texts)
    elif params.type == "char":
        backend = _characters(params.vocab_size, texts)
        special["unk_token"] = UNKNOWN
    else:
        backend = _bytes()
    backend.add_special_tokens([END_OF_TEXT, MASK])  # the last two ids, in this order
    wrap: Callable[..., PreTrainedTokenizerBase] = PreTrainedTokenizerFast  # has no types of its own
    return wrap(tokenizer_object=backend, clean_up_tokenization_spaces=False, **special)


def _first_chars(documents: Iterator[str], limit: int) -> Iterator[str]:
    for text in documents:
        yield text[:limit]
        limit -= len(text)
        if limit <= 0:
            return


def _bpe(vocab_size: int, documents: Iterator[str]) -> "Tokenizer":
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,  # without the end of a text
        min_frequency=2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(documents, trainer)
    return backend


def _bytes() -> "Tokenizer":
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    # ByteLevel shows a byte as the Latin-1 character of its number if that is visible, else as one above
    visible = {b for b in range(256) if chr(b).isprintable() and chr(b) != " "}
    hidden = (b for b in range(256) if b not in visible)
    letters = {b: chr(b) for b in visible} | {b: chr(256 + n) for n, b in enumerate(hidden)}
    backend = Tokenizer(models.BPE({letters[b]: b for b in range(256)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _characters(most: int | None, documents: Iterator[str]) -> "Tokenizer":
    from tokenizers import Tokenizer, decoders, models

    counts: Counter[str] = Counter()
    for text in documents:
        counts.update(text)
    kept = sorted(counts, key=lambda c: (-counts[c], c))[:most]
    vocabulary = {character: i for i, character in enumerate([*sorted(kept), UNKNOWN])}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token=UNKNOWN))  # without merges: single characters
    backend.decoder = decoders.Fuse()
    return backend


def _pretrained(name: str) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # files, network and the hub fail in their own ways
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"tokenizer.name = {name}: cannot be loaded ({reason}); give a directory in which "
            "`save_pretrained` has put a tokenizer, or a hub name and a network"
        ) from error
    if tokenizer.eos_token_id is None:
        tokenizer.add_special_tokens({"eos_token": tokenizer.sep_token or END_OF_TEXT})
    if tokenizer.mask_token_id != len(tokenizer) - 1:
        taken = MASK in tokenizer.get_vocab()
        tokenizer.add_special_tokens({"mask_token": OTHER_MASK if taken else MASK})
    ids = set(tokenizer.get_vocab().values())
    if tokenizer.mask_token_id != len(ids) - 1 or max(ids) != len(ids) - 1 or len(tokenizer) != len(ids):
        raise UserError(
            f"tokenizer.name = {name}: its {len(ids)} ids are not 0 to {len(ids) - 1}, or the last cannot be "
            "a mask token; use another tokenizer or train one (tokenizer.type: bpe)"
        )
    return tokenizer


def vocabulary_of(tokenizer: "PreTrainedTokenizerBase") -> Vocabulary:
    """What a model has to know of a tokenizer that `build_tokenizer` has made."""
    return Vocabulary(size=tokenizer.mask_token_id, eos_id=tokenizer.eos_token_id)


def encode(tokenizer: "PreTrainedTokenizerBase", texts: list[str]) -> list[list[int]]:
    """The ids of texts, with nothing added; special tokens that stand in them literally are ordinary text."""
    ids: list[list[int]] = tokenizer(
        texts,
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    ).input_ids
    return ids


def save_tokenizer(tokenizer: "PreTrainedTokenizerBase", directory: Path) -> None:
    """Save a tokenizer for `AutoTokenizer.from_pretrained(directory)`, which then needs no network.

    The files depend on nothing but the tokenizer: not on the place that it was loaded from.
    """
    tokenizer.save_pretrained(directory)
    file = directory / "tokenizer_config.json"
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    for key in ("is_local", "local_files_only", "name_or_path"):
        config.pop(key, None)
    if config["tokenizer_class"] == "TokenizersBackend":  # the name since transformers 5, which knows both
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    file.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
