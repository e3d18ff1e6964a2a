"""Building a rack stack by stack, and saying what of it learns."""

import copy
from dataclasses import dataclass, replace
from typing import Self, get_args

import torch
from torch import nn

from stackwise.config.compute import Precision
from stackwise.config.growth import BuildingMode, LoRAParams
from stackwise.errors import UserError
from stackwise.growth.assembly import Assembly, Ground, assemble, copy_blocks
from stackwise.growth.phases import Member
from stackwise.interactive.configuring import StackWiseConfig, check_choice
from stackwise.model.rack import Rack, empty_rack
from stackwise.model.stack import Stack
from stackwise.precision.formats import check_precision, quantize
from stackwise.variants import lora

CPU = torch.device("cpu")


@dataclass
class _Place:
    """A stack of the rack."""

    number: int
    """In the order in which stacks were added."""
    precision: Precision | None = None
    """The format that was asked for."""
    neighbour: int | None = None
    """The stack that it may begin as a copy of."""
    frozen: bool = False
    adapters: LoRAParams | None = None


class ProgressiveRackBuilder:
    """Builds a rack stack by stack.

    What is frozen or adapted is what is there at that moment; what is added later learns. New stacks begin as the
    config says: as a function of the seed and their number, or as a copy of their neighbour.
    """

    def __init__(
        self,
        config: StackWiseConfig,
        building_mode: BuildingMode = "append",
        *,
        rack: Rack | None = None,
        vocab_size: int | None = None,
    ) -> None:
        """
        Args:
            config: architecture, initialization, formats and adapters.
            building_mode: where new stacks go: on top, at the bottom, or below the topmost one.
            rack: one that is there already, in fp32: new stacks are added to a copy of it.
            vocab_size: V (None: that of `rack`, or `tokenizer.vocab_size`).

        Raises:
            UserError: there is no such mode, or V is not known.
        """
        check_choice("building_mode", building_mode, get_args(BuildingMode))
        self._config, self._mode, self._rack = config, building_mode, rack
        size = vocab_size or config.params.tokenizer.vocab_size if rack is None else rack.shape.vocab_size
        if size is None:
            raise UserError(
                "vocab_size = None: expected the number of the tokenizer's ids, because tokenizer.vocab_size is null; "
                "ProgressiveDataLoader.vocab_size tells it"
            )
        self._vocab_size = size
        self._places = [] if rack is None else [_Place(k) for k in range(len(rack.stacks))]
        self._embeddings_learn = self._head_learns = True

    def append_stack(self, n_blocks: int | None = None, precision: Precision | None = None) -> Self:
        """Add a stack on top.

        Args:
            n_blocks: its blocks (None: as the config says).
            precision: format of its matrices; in any but `full` they do not learn (None: `full`, and as `trunk` says
                once the stack is frozen).

        Raises:
            UserError: a value that cannot be, or a builder that does not append.
        """
        return self._add("append", len(self._places), -1, n_blocks, precision)

    def prepend_stack(self, n_blocks: int | None = None, precision: Precision | None = None) -> Self:
        """Add a stack at the bottom; otherwise as `append_stack`."""
        return self._add("prepend", 0, 0, n_blocks, precision)

    def insert_stack(self, n_blocks: int | None = None, precision: Precision | None = None) -> Self:
        """Add a stack below the topmost one; otherwise as `append_stack`."""
        return self._add("insert", max(0, len(self._places) - 1), -1, n_blocks, precision)

    def freeze_trunk(self, precision: Precision | None = None) -> Self:
        """Freeze all stacks that are there, and the embeddings. The head goes on learning.

        Args:
            precision: their format (None: that which each was added with, or as `trunk` says).

        Raises:
            UserError: there is no stack, or no such format.
        """
        for place in self._trunk("freeze_trunk", precision):
            place.frozen, place.adapters = True, None
        self._embeddings_learn = False
        return self

    def freeze_all_but_qlora(self, adapters: LoRAParams | None = None, precision: Precision | None = None) -> Self:
        """Freeze all that is there, embeddings and head too; what learns are fresh adapters on the stacks.

        Args:
            adapters: what they are (None: `adapters.trunk` of the config; if that is null, the defaults).
            precision: format of the stacks (None: that which each was added with, or as `trunk` says).

        Raises:
            UserError: there is no stack, or no such format.
        """
        for place in self._trunk("freeze_all_but_qlora", precision):
            place.frozen, place.adapters = True, adapters or self._config.params.adapters.trunk or LoRAParams()
        self._embeddings_learn = self._head_learns = False
        return self

    def build_rack(self) -> Rack:
        """The rack; what requires a gradient learns. The builder can go on, and build another.

        Raises:
            UserError: there is no stack, the machine cannot make a format, or a pretrained matrix cannot be used.
        """
        places, params = self._present("build_rack"), self._config.params
        rack = self._initial()
        for place, stack in zip(places, rack.stacks, strict=True):
            assert isinstance(stack, Stack)
            precision = place.precision or (params.trunk.precision_of(place.number) if place.frozen else "full")
            if place.frozen or precision != "full":
                check_precision(precision, CPU)
                quantize(stack, precision)
                stack.requires_grad_(False)
            if place.adapters is not None:
                lora().adapt(stack, "trunk", place.adapters, k=place.number, seed=params.seed)
                lora().train_only(stack, ["trunk"])
        for part, learns in ((rack.embeddings, self._embeddings_learn), (rack.head, self._head_learns)):
            if not learns:
                part.requires_grad_(False)
        return rack.eval()

    def _initial(self) -> Rack:
        """All parts in fp32, as they begin."""
        old = None if self._rack is None else copy.deepcopy(self._rack)
        modules: dict[int, nn.Module] = {} if old is None else dict(enumerate(old.stacks))
        shapes = {} if old is None else dict(enumerate(old.shape.stacks))
        new = sorted((place for place in self._places if place.number not in modules), key=lambda place: place.number)
        if new:
            drawn = self._drawn([place.number for place in new])
            shapes |= dict(zip((place.number for place in new), drawn.shape.stacks, strict=True))
            for place, stack in zip(new, drawn.window.stacks, strict=True):
                init = self._config.params.stack_params(place.number).init
                if init == "copy" and place.neighbour is not None:
                    copy_blocks(modules[place.neighbour], stack)  # type: ignore[arg-type]
                modules[place.number] = stack
        ends = old or drawn.window
        whole = drawn.shape if old is None else old.shape
        rack = empty_rack(replace(whole, stacks=tuple(shapes[place.number] for place in self._places), entries=()))
        assert ends.embeddings is not None
        rack.embeddings, rack.head = ends.embeddings, ends.head
        rack.stacks = nn.ModuleList(modules[place.number] for place in self._places)
        return rack

    def _drawn(self, numbers: list[int]) -> Assembly:
        """New stacks, with embeddings and head."""
        return assemble(
            self._config.params,
            [Member(number, "new") for number in numbers],
            Ground(),
            vocab_size=self._vocab_size,
            embeddings_learn=True,
            reads_tokens=True,
            device=CPU,
        )

    def _add(
        self, mode: BuildingMode, at: int, neighbour: int, n_blocks: int | None, precision: Precision | None
    ) -> Self:
        if mode != self._mode:
            raise UserError(
                f"building_mode = {self._mode}: {mode}_stack() needs {mode}; build with building_mode={mode!r}, or "
                f"call {self._mode}_stack()"
            )
        if precision is not None:
            check_choice("precision", precision, get_args(Precision))
        number = len(self._places)
        if n_blocks is not None:
            values = {f"stacks.{number}.blocks": n_blocks}
            if number >= self._config.params.n_stacks:
                values["n_stacks"] = number + 1
            self._config = self._config.override(**values)
        copies = self._places[neighbour].number if self._places else None
        self._places.insert(at, _Place(number, precision, copies))
        return self

    def _present(self, method: str) -> list[_Place]:
        if not self._places:
            raise UserError(f"{method}(): there is no stack yet; call {self._mode}_stack() first")
        return self._places

    def _trunk(self, method: str, precision: Precision | None) -> list[_Place]:
        """The stacks that are there, in a format if one is given."""
        if precision is not None:
            check_choice("precision", precision, get_args(Precision))
        for place in self._present(method):
            place.precision = precision or place.precision
        return self._places
