"""Texts from a rack and its tokenizer: what the command, the stages and notebooks go through."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch

from stackwise.artifacts.manifest import Artifact, read
from stackwise.config.generation import CAUSAL_ONLY, UNMASKING_ONLY, GenerationParams
from stackwise.errors import UserError
from stackwise.generation.choosing import Choice
from stackwise.generation.decoding import continue_texts
from stackwise.generation.draws import draws_of_text
from stackwise.generation.packing import packed
from stackwise.generation.prompts import Given, Prompt, read_prompts
from stackwise.generation.streaming import TextStream
from stackwise.generation.unmasking import Ids, Order, unmask
from stackwise.growth.racks import KIND, TOKENIZER, load_rack
from stackwise.model.rack import Rack

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Method = Literal["causal", "diffusion"]
_METHODS: dict[str, Method] = {"clm": "causal", "diffusion": "diffusion", "mlm": "diffusion"}
"""How text comes from a model that has learned an objective."""
BATCH_SIZE = 16


@dataclass(frozen=True)
class Piece:
    """Text that was given, or that the model has made."""

    text: str
    made: bool


@dataclass(frozen=True)
class Generation:
    """A prompt and what a model has made of it."""

    prompt: str
    pieces: tuple[Piece, ...]
    """The whole text in order."""
    ids: tuple[int, ...]
    """Of the whole text; with the tokens that hold a text at which it stopped, without an end of the text."""
    ended: Literal["length", "end", "stop"]
    """Why it ends: it is as long as it may be, the model ended it, or a text came at which to stop."""

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(piece.text for piece in self.pieces)

    @property
    def made(self) -> str:
        """What the model has made: the continuation, or all that it has filled in."""
        return "".join(piece.text for piece in self.pieces if piece.made)


class Watcher(Protocol):
    """Is told how texts come about, by their numbers."""

    def wrote(self, index: int, text: str) -> None:
        """From left to right: more text."""
        ...

    def unmasked(self, index: int, pieces: Sequence[Piece | int]) -> None:
        """By unmasking: the text so far; a number stands for so many masked tokens."""
        ...


class TextGenerator:
    """A model that makes text."""

    def __init__(
        self,
        rack: Rack,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        method: Method,
        context: int | None = None,
        batch_size: int = BATCH_SIZE,
    ) -> None:
        """
        Args:
            rack: the model, put into evaluation mode.
            tokenizer: its tokenizer.
            method: `causal`, from left to right, or `diffusion`, by unmasking.
            context: the most tokens of a text (None: no limit, and `new_tokens` must be given).
            batch_size: texts at a time.
        """
        self.rack = rack.eval()
        self.tokenizer = tokenizer
        self.method: Method = method
        self.context = context
        self.batch_size = batch_size

    @classmethod
    def open(
        cls,
        directory: str | Path,
        *,
        method: Method | None = None,
        context: int | None = None,
        device: str | torch.device = "cpu",
        batch_size: int = BATCH_SIZE,
    ) -> "TextGenerator":
        """A fused or fine-tuned rack of the pipeline, every byte of it verified.

        Args:
            directory: the artifact, such as `artifacts/fused`.
            method: how to make text (None: as the model has learned it).
            context: the most tokens of a text (None: as long as the samples that it has learned from).
            device: computes.
            batch_size: texts at a time. On a CPU the weights are laid out for so many.

        Raises:
            UserError: there is no such artifact, or it cannot make text in this way.
        """
        path = Path(directory)
        if not path.is_dir():
            raise UserError(f"{path}: no such directory; expected a rack, such as artifacts/fused")
        return cls.of(read(path, KIND), method=method, context=context, device=device, batch_size=batch_size)

    @classmethod
    def of(
        cls,
        artifact: Artifact,
        *,
        method: Method | None = None,
        context: int | None = None,
        device: str | torch.device = "cpu",
        batch_size: int = BATCH_SIZE,
    ) -> "TextGenerator":
        """The same of a rack that has been verified.

        Raises:
            UserError: it cannot make text in this way.
        """
        found, path = method_of(artifact, method), artifact.path
        from transformers import AutoTokenizer  # takes a second or two

        tokenizer = AutoTokenizer.from_pretrained(path / TOKENIZER)
        # A decoding step is a position of each text, a step of unmasking all of them.
        rack = packed(load_rack(path).to(device), batch_size * (1 if found == "causal" else artifact.facts["seq_len"]))
        return cls(rack, tokenizer, method=found, context=context or artifact.facts["seq_len"], batch_size=batch_size)

    @property
    def mask_id(self) -> int:
        """The token that is to be filled in."""
        return self.rack.shape.vocab_size

    def generate(
        self,
        prompts: Sequence[str],
        params: GenerationParams | None = None,
        *,
        seed: int = 0,
        watcher: Watcher | None = None,
    ) -> list[Generation]:
        """A text for each prompt; give one several times for several texts. See `stream`.

        Raises:
            UserError: a prompt or a parameter does not fit the model.
        """
        return list(self.stream(prompts, params, seed=seed, watcher=watcher))

    def stream(
        self,
        prompts: Sequence[str],
        params: GenerationParams | None = None,
        *,
        seed: int = 0,
        watcher: Watcher | None = None,
    ) -> Iterator[Generation]:
        """The texts in order, as soon as their batch is done.

        The chance in a text comes from the seed and its place in `prompts`, so that neither the other prompts nor the
        size of a batch change it.

        Args:
            prompts: texts; `[MASK]` in them, or `[MASK:8]` for eight, is filled in by models that unmask.
            params: how.
            seed: of the chance.
            watcher: is told how they come about.

        Raises:
            UserError: a prompt or a parameter does not fit the model.
        """
        params = params or GenerationParams()
        check_params(params, self.method)
        asked = read_prompts(list(prompts), self.tokenizer)
        counts = [self._new_tokens(i, prompt, params) for i, prompt in enumerate(asked)]
        make = self._continue if self.method == "causal" else self._unmask
        for start in range(0, len(asked), self.batch_size):
            part = slice(start, start + self.batch_size)
            yield from make(start, asked[part], counts[part], params, seed, watcher)

    def _new_tokens(self, i: int, prompt: Prompt, params: GenerationParams) -> int:
        """How many to add to a prompt."""
        where = f"prompt {i + 1} ({_short(prompt.text)})"
        if prompt.masked and self.method == "causal":
            raise UserError(
                f"{where}: this model writes from left to right and cannot fill in a [MASK]; leave it out, or take a "
                "model that unmasks, such as artifacts/fused"
            )
        given = len(prompt.ids(0))
        if self.method == "causal":
            given = max(given, 1)  # an empty one begins behind an end of a text
        limit, wanted = self.context, params.new_tokens
        if wanted is None:
            if prompt.masked:
                wanted = 0
            elif limit is None:
                raise UserError("new_tokens = null: expected a number, because this generator has no context to fill")
            else:
                wanted = max(limit - given, 1)
        if limit is not None and given + wanted > limit:
            room = f"at most {limit - given} new ones" if given < limit else "a shorter prompt"
            raise UserError(
                f"{where}: its {given} tokens and {wanted} new ones are {given + wanted}, and the model has "
                f"learned from texts of {limit}; ask for {room}, or for a longer context, in which it may do worse"
            )
        return wanted

    def _continue(
        self,
        first: int,
        prompts: list[Prompt],
        counts: list[int],
        params: GenerationParams,
        seed: int,
        watcher: Watcher | None,
    ) -> list[Generation]:
        eos_id: int = self.tokenizer.eos_token_id
        given = [prompt.ids(self.mask_id) for prompt in prompts]
        # Who waits for no text sees none before the end.
        seen = bool(params.stop) or watcher is not None
        streams = [TextStream(self._decode, ids, params.stop) for ids in given]
        ids: list[list[int]] = [[] for _ in prompts]
        texts, ended = [""] * len(prompts), ["length"] * len(prompts)

        def say(row: int, text: str) -> None:
            texts[row] += text
            if watcher is not None and text:
                watcher.wrote(first + row, text)

        def accept(row: int, token: int) -> bool:
            if token == eos_id and params.ends:
                ended[row] = "end"
                return False
            ids[row].append(token)
            if seen:
                say(row, streams[row].add(token))
                if streams[row].stopped:
                    ended[row] = "stop"
            return not streams[row].stopped

        continue_texts(
            self.rack,
            [own or [eos_id] for own in given],
            counts,
            choice=Choice.of(params),
            draws=[draws_of_text(seed, first + row) for row in range(len(prompts))],
            accept=accept,
            eos_id=eos_id,
            repetition_penalty=params.repetition_penalty,
        )
        for row, stream in enumerate(streams):
            if seen:
                say(row, stream.end())
            else:
                texts[row] = self._behind(given[row], ids[row])
        return [
            Generation(prompt.text, _pieces((prompt.text, False), (text, True)), (*own, *new), end)  # type: ignore[arg-type]
            for prompt, own, new, text, end in zip(prompts, given, ids, texts, ended, strict=True)
        ]

    def _unmask(
        self,
        first: int,
        prompts: list[Prompt],
        counts: list[int],
        params: GenerationParams,
        seed: int,
        watcher: Watcher | None,
    ) -> list[Generation]:
        eos_id: int = self.tokenizer.eos_token_id
        mask_id = self.mask_id

        def watch(row: int, ids: Ids) -> None:
            assert watcher is not None
            watcher.unmasked(first + row, self._so_far(prompts[row], ids.tolist()))

        filled = unmask(
            self.rack,
            [prompt.ids(mask_id) + [mask_id] * count for prompt, count in zip(prompts, counts, strict=True)],
            order=Order.of(params),
            choice=Choice.of(params),
            draws=[draws_of_text(seed, first + row) for row in range(len(prompts))],
            eos_id=eos_id,
            watch=watch if watcher is not None else None,
        )
        return [self._cut(prompt, ids, params, eos_id) for prompt, ids in zip(prompts, filled, strict=True)]

    def _cut(self, prompt: Prompt, ids: list[int], params: GenerationParams, eos_id: int) -> Generation:
        """An unmasked text up to where it ends, which may be only in what was added to the prompt."""
        length = len(prompt.ids(self.mask_id))
        added, ended = ids[length:], "length"
        if params.ends and eos_id in added:
            added, ended = added[: added.index(eos_id)], "end"
        stream, text = TextStream(self._decode, ids[:length], params.stop), ""
        for n, token in enumerate(added):
            text += stream.add(token)
            if stream.stopped:
                added, ended = added[: n + 1], "stop"
                break
        text += stream.end()
        filled = self._so_far(prompt, ids[:length])
        pieces = [(piece.text, piece.made) for piece in filled if isinstance(piece, Piece)]
        return Generation(prompt.text, _pieces(*pieces, (text, True)), (*ids[:length], *added), ended)  # type: ignore[arg-type]

    def _so_far(self, prompt: Prompt, ids: list[int]) -> list[Piece | int]:
        """A text of which some tokens may be masked."""
        found: list[Piece | int] = []
        place, given = 0, (part.text for part in prompt.parts if isinstance(part, Given))
        spans = [(len(part.ids), False) if isinstance(part, Given) else (part, True) for part in prompt.parts]
        if (added := len(ids) - sum(n for n, _ in spans)) > 0:
            spans.append((added, True))
        for length, made in spans:
            end = place + length
            if not made:
                found.append(Piece(next(given), made=False))
            while made and place < end:
                masked = ids[place] == self.mask_id
                last = next((i for i in range(place, end) if (ids[i] == self.mask_id) != masked), end)
                before = [token for token in ids[:place] if token != self.mask_id]
                found.append(last - place if masked else Piece(self._behind(before, ids[place:last]), made=True))
                place = last
            place = end
        return found

    def _behind(self, before: Sequence[int], ids: Sequence[int]) -> str:
        """The text of some ids as it is written behind others."""
        few = list(before[-8:])
        return self._decode([*few, *ids])[len(self._decode(few)) :]

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


def method_of(artifact: Artifact, wanted: Method | None = None) -> Method:
    """How a rack makes text.

    Args:
        artifact: the rack.
        wanted: how it should (None: as it has learned it).

    Raises:
        UserError: it cannot, or does not say what it has learned.
    """
    learned: Any = artifact.facts.get("objective")
    if learned == "custom":
        if wanted is None:
            raise UserError(
                f"{artifact.path}: has learned targets of its own (objective.type custom), which need not be text; say "
                f"--method {'causal' if artifact.facts['causal'] else 'diffusion'} if they are"
            )
        able: Method = "causal" if artifact.facts["causal"] else "diffusion"
    elif learned in _METHODS:
        able = _METHODS[learned]
    else:
        what = learned or "something that its manifest does not name; make it again with this version"
        raise UserError(f"{artifact.path}: cannot make text: it has learned {what}")
    if wanted not in (None, able):
        does = {"causal": "writes from left to right", "diffusion": "unmasks"}
        raise UserError(
            f"{artifact.path}: has learned {learned} and {does[able]}; method {wanted} needs a model that "
            f"{does[wanted]}, such as artifacts/{'finetuned/clm' if wanted == 'causal' else 'fused'}"
        )
    return able


def check_params(params: GenerationParams, method: Method) -> None:
    """See to it that no parameter is given that would change nothing.

    Raises:
        UserError: one is.
    """
    others = UNMASKING_ONLY if method == "causal" else CAUSAL_ONLY
    what = "writes from left to right" if method == "causal" else "unmasks"
    for key in params.model_fields_set & {*others}:
        if key in params.changed(others):
            raise UserError(f"{key} = {getattr(params, key)}: has no effect on a model that {what}; leave it out")


def _pieces(*pieces: tuple[str, bool]) -> tuple[Piece, ...]:
    """Those that are not empty, neighbours of one kind joined."""
    found: list[Piece] = []
    for text, made in pieces:
        if found and found[-1].made == made:
            text = found.pop().text + text
        if text:
            found.append(Piece(text, made))
    return tuple(found)


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")
