"""Tensors from one safetensors file to another, a piece at a time: neither file is ever in memory.

The format is an 8-byte length, a JSON header with each tensor's dtype, shape and place, then the numbers.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from stackwise.errors import UserError

DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool},
}
"""By their names in the format."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_PIECE = 2**20
"""Numbers that are in memory at a time."""


class Source(Protocol):
    """A tensor that is somewhere, or can be made."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Of its numbers."""
        ...

    def pieces(self) -> Iterator[Tensor]:
        """Its numbers in order, as vectors."""
        ...


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file."""

    file: Path
    start: int
    """Its first byte in the file."""
    shape: tuple[int, ...]
    dtype: torch.dtype

    def pieces(self) -> Iterator[Tensor]:
        """See `Source`."""
        left = prod(self.shape)
        with self.file.open("rb") as file:
            file.seek(self.start)
            while left:
                buffer = bytearray(min(left, _PIECE) * self.dtype.itemsize)
                if file.readinto(buffer) != len(buffer):
                    raise UserError(f"{self.file}: damaged (it ends within a tensor); get it again")
                piece = torch.frombuffer(buffer, dtype=self.dtype)
                left -= len(piece)
                yield piece

    def rows(self, n: int) -> "Stored":
        """The first `n` of its rows."""
        return replace(self, shape=(n, *self.shape[1:]))

    def load(self) -> Tensor:
        """All of it."""
        return torch.cat([*self.pieces()] or [torch.empty(0, dtype=self.dtype)]).view(self.shape)


@dataclass(frozen=True)
class Held:
    """A tensor in memory."""

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """See `Source`."""
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        """See `Source`."""
        return self.tensor.dtype

    def pieces(self) -> Iterator[Tensor]:
        """See `Source`."""
        yield self.tensor.detach().contiguous().view(-1)


def read_tensors(file: Path) -> dict[str, Stored]:
    """The tensors of a file, by name; of their numbers nothing is read.

    Raises:
        UserError: the file is missing, damaged, or holds numbers of another kind.
    """
    try:
        with file.open("rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if not 2 <= length <= file.stat().st_size - 8:
                raise ValueError("its header does not fit")
            header: dict[str, Any] = json.loads(f.read(length))
        header.pop("__metadata__", None)
        found = {}
        for name, entry in header.items():
            first, end = (8 + length + offset for offset in entry["data_offsets"])
            found[name] = Stored(file, first, tuple(entry["shape"]), DTYPES[entry["dtype"]])
            if end > file.stat().st_size:
                raise ValueError("it is cut off")
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    except KeyError as error:
        raise UserError(f"{file}: holds numbers of the kind {error}, expected {', '.join(DTYPES)}") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: damaged (not a safetensors file: {error}); get it again") from None
    return found


def write_tensors(file: Path, tensors: Mapping[str, Source], dtype: torch.dtype | None = None) -> int:
    """Write a file as the library of the format would: the same tensors give the same bytes.

    Args:
        file: to write.
        tensors: by name.
        dtype: what floating-point numbers are rounded to; None: they stay as they are.

    Returns:
        The bytes of all tensors.
    """

    def stored(tensor: Source) -> torch.dtype:
        return dtype if dtype is not None and tensor.dtype.is_floating_point else tensor.dtype

    order = sorted(tensors.items(), key=lambda item: (-stored(item[1]).itemsize, item[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, tensor in order:
        end = place + prod(tensor.shape) * stored(tensor).itemsize
        header[name] = {"dtype": _NAMES[stored(tensor)], "shape": list(tensor.shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for piece in _pieces(tensor for _, tensor in order):
            rounded = piece if dtype is None or not piece.is_floating_point() else piece.to(dtype)
            f.write(rounded.view(torch.uint8).numpy().data)
    return place


def _pieces(tensors: Iterable[Source]) -> Iterator[Tensor]:
    for tensor in tensors:
        yield from tensor.pieces()
