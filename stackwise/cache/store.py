"""The activation store: one Zarr v3 array on disk, read row by row at nearly the speed of a memory map.

A store is an array of shape `[rows, seq, d_model]`: one row is one boundary (residual stream) of one masked
sample. A chunk is one row, followed by its CRC-32C; a shard is a file of consecutive rows with an index at
its end. Nothing is compressed: residuals hardly compress, and a plain row goes from the page cache straight
into the caller's buffer. Numpy and Zarr have no bfloat16, so such rows are stored as `uint16` and the
attribute `logical_dtype` tells what the bits mean.

Formats narrower than that are stored as bytes: the array has the shape `[rows, seq, width]`, and the `width`
bytes of a position are the codes of its channels, one byte each, followed by their scales. What a channel was
is its code times its scale. The attributes tell what the codes are (`logical_dtype`: `int8` or
`float8_e4m3fn`), how many there are (`d_model`), how many share a scale (`channels_per_scale`; the last of a
position may be fewer), and what the scales are (`scale_dtype`; little endian).

`zarr.open_array(path, mode="r")` reads a store like any other array. Zarr itself only writes the metadata,
though: its own shard reader and writer are several times slower than what is below, and it returns zeros
where a shard or a row is missing. Here whatever is missing or damaged raises `DamagedShard`.

A shard appears complete or not at all: it is written under a temporary name, synced, and renamed. Several
processes may write different shards, and even the same one if they write the same bytes to it.
"""

import errno
import json
import os
import re
import shutil
import threading
import uuid
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import google_crc32c
import numpy as np
import numpy.typing as npt

from stackwise.cache.sizes import CRC_BYTES, FORMATS, StoreDtype, index_bytes

_ABSENT = 2**64 - 1  # offset and length of a chunk that a shard does not hold
_MAX_ROW_BYTES = 2**30  # one system call must be able to move a row; Linux stops just below 2 GiB
_OPEN_SHARDS = 256  # file descriptors a store keeps, well below the usual limit of 1024 a process
_READERS = 2  # threads that copy rows; the system calls and the checksums leave the GIL alone
_IOV_MAX = 1024  # buffers a single writev takes on Linux and macOS

# macOS has none of fdatasync, posix_fadvise and reads that do not wait: there a store syncs the metadata of a
# file as well, and reads rows one after the other without announcing them.
_sync_data = getattr(os, "fdatasync", os.fsync)
_NO_WAIT: int | None = getattr(os, "RWF_NOWAIT", None)


def _announce(fd: int, offset: int, length: int) -> None:
    """Let the kernel start to read these bytes from the disk, without waiting for them."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, offset, length, os.POSIX_FADV_WILLNEED)


def _read_from_memory(fd: int, buffers: Sequence[memoryview | bytearray], offset: int) -> int:
    """Read what is in memory already: number of bytes, 0 also where the system cannot do that."""
    if _NO_WAIT is None:
        return 0
    try:
        return os.preadv(fd, buffers, offset, _NO_WAIT)
    except OSError:  # nothing is, or this file system has no such call
        return 0


class DamagedStore(Exception):  # noqa: N818
    """A store cannot be used as it is: remake it.

    Attributes:
        path: the file or directory that is damaged.
        reason: what is wrong with it.
    """

    def __init__(self, path: str | os.PathLike[str], reason: str) -> None:
        super().__init__(path, reason)
        self.path = Path(path)
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class DamagedShard(DamagedStore):
    """One shard is missing or damaged: drop it and write it again; the others are not affected.

    Attributes:
        path: the shard's file.
        shard: its number.
        reason: what is wrong with it.
    """

    def __init__(self, path: str | os.PathLike[str], shard: int, reason: str) -> None:
        super().__init__(path, reason)
        self.args = (path, shard, reason)  # what unpickling calls the class with
        self.shard = shard

    def __str__(self) -> str:
        return f"shard {self.shard} ({self.path}): {self.reason}"


@dataclass(frozen=True)
class StoreLayout:
    """What fixes the bytes of a store, apart from the activations themselves.

    Attributes:
        rows: number of rows of the array.
        seq: positions of a row.
        d_model: channels of a position.
        dtype: what a channel is; see above how those lie on disk that numpy does not know.
        shard_rows: rows of a shard; the last shard may have fewer.

    Raises:
        ValueError: an attribute is out of range.
    """

    rows: int
    seq: int
    d_model: int
    dtype: StoreDtype
    shard_rows: int

    def __post_init__(self) -> None:
        for name in ("rows", "seq", "d_model", "shard_rows"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, not {value!r}")
        if self.dtype not in FORMATS:
            raise ValueError(f"dtype must be one of {', '.join(FORMATS)}, not {self.dtype!r}")
        if self.row_bytes > _MAX_ROW_BYTES:
            raise ValueError(f"a row of {self.row_bytes} bytes is too big, {_MAX_ROW_BYTES} are possible")

    @property
    def storage_dtype(self) -> np.dtype[Any]:
        """Numpy dtype of the array on disk and of the buffers that are written and read (little endian)."""
        return np.dtype(FORMATS[self.dtype].element).newbyteorder("<")

    @property
    def width(self) -> int:
        """Elements of the array for each position: its channels, or the bytes of their codes and scales."""
        return FORMATS[self.dtype].token_bytes(self.d_model) // self.storage_dtype.itemsize

    @property
    def attributes(self) -> dict[str, Any]:
        """What the metadata tells about the meaning of the elements."""
        form, attributes = FORMATS[self.dtype], {"logical_dtype": self.dtype}
        if not form.scale_bytes:
            return attributes
        shared = {"d_model": self.d_model, "channels_per_scale": form.channels_per_scale(self.d_model)}
        return {**attributes, **shared, "scale_dtype": f"float{8 * form.scale_bytes}"}

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, without its checksum."""
        return self.seq * FORMATS[self.dtype].token_bytes(self.d_model)

    @property
    def total_bytes(self) -> int:
        """Bytes of all shard files together."""
        return self.rows * (self.row_bytes + CRC_BYTES) + self.shards * self.index_bytes

    @property
    def index_bytes(self) -> int:
        """Bytes of the index at the end of every shard."""
        return index_bytes(self.shard_rows)

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.rows // self.shard_rows)

    def shard_range(self, g: int) -> range:
        """Rows of shard `g`.

        Raises:
            IndexError: there is no such shard.
        """
        if not 0 <= g < self.shards:
            raise IndexError(f"no shard {g}, there are {self.shards}")
        return range(g * self.shard_rows, min((g + 1) * self.shard_rows, self.rows))

    def shard_size(self, g: int) -> int:
        """Bytes of the file of shard `g`.

        Raises:
            IndexError: there is no such shard.
        """
        return len(self.shard_range(g)) * (self.row_bytes + CRC_BYTES) + self.index_bytes


class _OpenShard:
    """A shard file open for reading, closed when nobody uses it any more.

    Counting references leaves a file open under a thread that is still reading it, although the store itself
    has let it go already.
    """

    __slots__ = ("fd",)

    def __init__(self, path: Path) -> None:
        self.fd = -1  # __del__ runs even if open fails
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


class ActivationStore:
    """Reads and writes the rows of one store. Safe to use from several threads and processes at once.

    Attributes:
        path: directory of the Zarr array.
        layout: shape, dtype and sharding of the array.
    """

    def __init__(self, path: str | os.PathLike[str], layout: StoreLayout) -> None:
        """Take `layout` for granted; use `create` or `open` instead."""
        self.path = Path(path)
        self.layout = layout
        self._opened: OrderedDict[int, _OpenShard] = OrderedDict()  # the least recently used comes first
        self._lock = threading.Lock()  # guards _opened
        # Rows lie in order and have one size: all shards have the same index, except for a shorter last one.
        self._index = _encode_index(layout, layout.shard_rows)
        self._last_index = _encode_index(layout, len(layout.shard_range(layout.shards - 1)))

    @classmethod
    def create(cls, path: str | os.PathLike[str], layout: StoreLayout) -> Self:
        """Open the store at `path`; make it first, without shards, if there is none.

        Of several processes that create the same store at once one makes it and the others open it. The
        directory appears complete with its metadata or not at all.

        Raises:
            ValueError: there is a store at `path` with another layout.
            DamagedStore: there is something else at `path`, or a store without valid metadata.
        """
        path = Path(path)
        if not (path / "zarr.json").exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove_stale(path.parent, path.name)
            fresh = _temporary_path(path.parent, path.name)
            try:
                _make_array(fresh, layout)
                os.rename(fresh, path)
            except OSError as error:
                # Another process was faster, or there is something else: open() below finds out.
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise
            finally:
                shutil.rmtree(fresh, ignore_errors=True)
        store = cls.open(path)
        if store.layout != layout:
            raise ValueError(f"the store at {path} has {store.layout}, not {layout}")
        _remove_stale(path, "shard")
        return store

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Open an existing store. Its shards are looked at when they are read, see also `missing`.

        Raises:
            DamagedStore: the metadata is missing, is not valid, or describes an array of another kind.
        """
        document = Path(path) / "zarr.json"
        try:
            layout = _parse_metadata(json.loads(document.read_bytes()))
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise DamagedStore(path, "there is no zarr.json") from error
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise DamagedStore(path, f"zarr.json is not that of an activation store: {error!r}") from error
        return cls(path, layout)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files that are open for reading. A later read opens what it needs again."""
        with self._lock:
            self._opened.clear()

    def shard_path(self, g: int) -> Path:
        """File of shard `g`, whether it exists or not.

        Raises:
            IndexError: there is no such shard.
        """
        self.layout.shard_range(g)
        return self.path / "c" / str(g) / "0" / "0"

    def missing(self) -> list[int]:
        """Numbers of the shards whose file is absent or of the wrong size, in order.

        Looks at names and sizes only, so it is quick, and blind to flipped bits. Files that a killed writer
        left behind are removed on the way.
        """
        _remove_stale(self.path, "shard")
        return [g for g in range(self.layout.shards) if not self._has_size(g)]

    def _has_size(self, g: int) -> bool:
        try:
            return self.shard_path(g).stat().st_size == self.layout.shard_size(g)
        except (FileNotFoundError, NotADirectoryError):
            return False

    def write_shard(self, g: int, activations: npt.NDArray[Any]) -> None:
        """Write shard `g`, byte for byte as zarr-python does, over an older one if there is one.

        On return the data is on disk and the shard is visible to every reader; until then, and after a crash,
        readers see the older one or none.

        Args:
            g: number of the shard.
            activations: `[rows of the shard, seq, width]`, C-contiguous, dtype `layout.storage_dtype`
                (for bfloat16 the bits as uint16). The last shard may have fewer rows than the others.

        Raises:
            IndexError: there is no such shard.
            ValueError: shape, dtype or memory order is not the one above.
            OSError: the file cannot be written; nothing is left of it.
        """
        layout = self.layout
        _check_buffer("activations", activations, len(layout.shard_range(g)), layout)
        rows = activations.reshape(len(activations), -1).view(np.uint8)
        pieces: list[memoryview] = []
        for row in rows:
            pieces += (row.data, memoryview(_crc(row)))
        pieces.append(memoryview(self._index_of(g)))

        path = self.shard_path(g)
        # In the root of the store it is on the same file system as the shards, and easy to find if left over.
        temporary = _temporary_path(self.path, "shard")
        try:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            try:
                _write_all(fd, pieces)
                _sync_data(fd)  # before the rename, or a power cut may leave the name without the data
            finally:
                os.close(fd)
            path.parent.mkdir(parents=True, exist_ok=True)  # only now: a store that was removed stays removed
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        self._forget(g)

    def drop_shard(self, g: int) -> None:
        """Remove the file of shard `g` if there is one.

        Raises:
            IndexError: there is no such shard.
        """
        with suppress(FileNotFoundError, NotADirectoryError):
            self.shard_path(g).unlink()
        self._forget(g)

    def read_rows(self, rows: npt.NDArray[np.int64], out: npt.NDArray[Any], verify: bool = True) -> None:
        """Read rows, in any order and with repetitions, into a buffer of the caller.

        All rows are announced to the kernel first, then copied one by one into their places; the GIL is free
        meanwhile. After an error the contents of `out` are undefined.

        Args:
            rows: `[n]` integer row numbers. Sorted ones read somewhat faster from a cold disk.
            out: `[n, seq, width]`, C-contiguous and writable, dtype `layout.storage_dtype`.
            verify: compare every row with its checksum. Without it damaged *rows* go unnoticed; missing,
                truncated and badly indexed shards never do.

        Raises:
            IndexError: a row number is out of range.
            ValueError: shape, dtype or memory order is not the one above.
            DamagedShard: a row cannot be had; tells which shard and why.
            OSError: the disk fails, or files cannot be opened.
        """
        layout = self.layout
        if rows.ndim != 1 or rows.dtype.kind not in "iu":
            raise ValueError(f"rows must be integers of shape (n,), not {rows.dtype} of shape {rows.shape}")
        _check_buffer("out", out, len(rows), layout)
        if not out.flags.writeable:
            raise ValueError("out must be writable")
        if not len(rows):
            return
        if rows.min() < 0 or rows.max() >= layout.rows:
            raise IndexError(f"rows {rows.min()}..{rows.max()} are not all in 0..{layout.rows - 1}")
        slots = out.reshape(len(rows), -1).view(np.uint8)
        # Two at a time, for copying takes what one core gives; a part cannot need more open files than we keep.
        size = min(_OPEN_SHARDS // _READERS, -(-len(rows) // _READERS))
        parts = [slice(first, first + size) for first in range(0, len(rows), size)]
        reads = [_readers().submit(self._read_part, rows[part].tolist(), slots[part], verify) for part in parts]
        wait(reads)  # all, so that nothing writes into `out` any more once we are back, with an error or without
        for read in reads:
            read.result()

    def _read_part(self, rows: list[int], slots: npt.NDArray[np.uint8], verify: bool) -> None:
        """Read a few rows into `slots`, `[n, row_bytes]`.

        Rows in memory are just read, for announcing one costs a good part of the time that copying it takes.
        Once one is not, the disk is told about all that are left before it is waited for.
        """
        stride = self.layout.row_bytes + CRC_BYTES
        shard_of = [self._open_shard(row // self.layout.shard_rows) for row in rows]
        offsets = [row % self.layout.shard_rows * stride for row in rows]
        stored = bytearray(CRC_BYTES)
        waiting = False
        for i, (row, slot, shard, offset) in enumerate(zip(rows, slots, shard_of, offsets, strict=True)):
            buffers = (slot.data, stored) if verify else (slot.data,)
            wanted = stride if verify else stride - CRC_BYTES
            if not waiting and _read_from_memory(shard.fd, buffers, offset) != wanted:
                waiting = True
                for later in range(i, len(rows)):
                    _announce(shard_of[later].fd, offsets[later], stride)
            if waiting and os.preadv(shard.fd, buffers, offset) != wanted:
                raise self._damaged(row, f"the file ends before row {row} does")
            if verify and _crc(slot) != stored:
                raise self._damaged(row, f"the checksum of row {row} does not match")

    def _open_shard(self, g: int) -> _OpenShard:
        """Shard `g`, open, with its size and its index checked when it was opened."""
        with self._lock:
            shard = self._opened.get(g)
            if shard is not None:
                self._opened.move_to_end(g)
                return shard
            try:
                shard = _OpenShard(self.shard_path(g))
            except (FileNotFoundError, NotADirectoryError) as error:
                raise DamagedShard(self.shard_path(g), g, "the file is missing") from error
            self._check_shard(g, shard.fd)
            self._opened[g] = shard
            if len(self._opened) > _OPEN_SHARDS:
                self._opened.popitem(last=False)
            return shard

    def _check_shard(self, g: int, fd: int) -> None:
        size, wanted = os.fstat(fd).st_size, self.layout.shard_size(g)
        if size != wanted:
            raise DamagedShard(self.shard_path(g), g, f"the file has {size} bytes instead of {wanted}")
        index = os.pread(fd, self.layout.index_bytes, size - self.layout.index_bytes)
        if index == self._index_of(g):
            return
        valid = _crc(np.frombuffer(index[:-CRC_BYTES], np.uint8)) == index[-CRC_BYTES:]
        reason = "does not list all rows in order" if valid else "does not match its checksum"
        raise DamagedShard(self.shard_path(g), g, f"the index {reason}")

    def _index_of(self, g: int) -> bytes:
        return self._last_index if g == self.layout.shards - 1 else self._index

    def _damaged(self, row: int, reason: str) -> DamagedShard:
        """The error for the shard of a row, whose file is let go so that a repaired one will be read."""
        g = row // self.layout.shard_rows
        self._forget(g)
        return DamagedShard(self.shard_path(g), g, reason)

    def _forget(self, g: int) -> None:
        with self._lock:
            self._opened.pop(g, None)


def _crc(data: npt.NDArray[np.uint8]) -> bytes:
    """CRC-32C of a contiguous array as it is stored."""
    return int(google_crc32c.value(data)).to_bytes(CRC_BYTES, "little")


@cache
def _readers() -> ThreadPoolExecutor:
    """The threads that read rows, for all stores of the process."""
    return ThreadPoolExecutor(_READERS, thread_name_prefix="read")


def _check_buffer(name: str, array: npt.NDArray[Any], rows: int, layout: StoreLayout) -> None:
    shape = (rows, layout.seq, layout.width)
    if array.shape != shape or array.dtype != layout.storage_dtype:
        wanted = f"{layout.storage_dtype} of shape {shape}"
        raise ValueError(f"{name} must be {wanted}, not {array.dtype} of shape {array.shape}")
    if not array.flags.c_contiguous:
        raise ValueError(f"{name} must be C-contiguous")


def _encode_index(layout: StoreLayout, rows: int) -> bytes:
    """Index of a shard that holds `rows` rows, one after the other; the entries after them say "absent"."""
    stride = layout.row_bytes + CRC_BYTES
    entries = np.full((layout.shard_rows, 2), _ABSENT, dtype="<u8")
    entries[:rows, 0] = np.arange(rows, dtype=np.uint64) * np.uint64(stride)
    entries[:rows, 1] = stride
    return entries.tobytes() + _crc(entries.reshape(-1).view(np.uint8))


def _write_all(fd: int, pieces: list[memoryview]) -> None:
    """Write the pieces one after the other without copying them together: one call for a usual shard."""
    first = 0
    while first < len(pieces):
        written = os.writev(fd, pieces[first : first + _IOV_MAX])
        while first < len(pieces) and written >= len(pieces[first]):
            written -= len(pieces[first])
            first += 1
        if written:  # a full disk and calls beyond 2 GiB stop in the middle of a piece
            pieces[first] = pieces[first][written:]


def _make_array(path: Path, layout: StoreLayout) -> None:
    """Let zarr make an array without shards at `path`."""
    import zarr  # slow to import, and needed nowhere else
    from zarr.codecs import Crc32cCodec

    zarr.create_array(
        store=str(path),
        shape=(layout.rows, layout.seq, layout.width),
        chunks=(1, layout.seq, layout.width),
        shards=(layout.shard_rows, layout.seq, layout.width),
        dtype=layout.storage_dtype,
        compressors=[Crc32cCodec()],
        filters=None,
        fill_value=0,
        zarr_format=3,
        attributes=layout.attributes,
    )


def _parse_metadata(document: Any) -> StoreLayout:
    """Layout of the array that a parsed zarr.json describes.

    Raises:
        ValueError, TypeError, KeyError, IndexError, AttributeError: the array is not an activation store.
    """
    (rows, seq, width), attributes = document["shape"], document["attributes"]
    shard_rows = document["chunk_grid"]["configuration"]["chunk_shape"][0]
    layout = StoreLayout(rows, seq, attributes.get("d_model", width), attributes["logical_dtype"], shard_rows)
    checksummed = [("bytes", {"endian": "little"}), ("crc32c", {})]
    in_bytes: list[tuple[str, dict[str, str]]] = [("bytes", {}), ("crc32c", {})]  # single bytes have no order
    [(sharding, options)] = _named(document["codecs"])
    facts: dict[str, tuple[Any, Any]] = {
        "zarr_format": (document["zarr_format"], 3),
        "node_type": (document["node_type"], "array"),
        "data_type": (document["data_type"], layout.storage_dtype.name),
        "width": (width, layout.width),
        "attributes": ({name: attributes.get(name) for name in layout.attributes}, layout.attributes),
        "chunk_grid": (
            _named([document["chunk_grid"]]),
            [("regular", {"chunk_shape": [shard_rows, seq, width]})],
        ),
        "chunk_key_encoding": (_named([document["chunk_key_encoding"]]), [("default", {"separator": "/"})]),
        "codecs": (sharding, "sharding_indexed"),
        "chunk_shape": (options["chunk_shape"], [1, seq, width]),
        "codecs of a chunk": (
            _named(options["codecs"]),
            checksummed if layout.storage_dtype.itemsize > 1 else in_bytes,
        ),
        "index_codecs": (_named(options["index_codecs"]), checksummed),
        "index_location": (options.get("index_location", "end"), "end"),
        "storage_transformers": (document.get("storage_transformers", []), []),
    }
    for name, (found, wanted) in facts.items():
        if found != wanted:
            raise ValueError(f"{name} is {found}, not {wanted}")
    return layout


def _named(entries: list[Any]) -> list[tuple[str, dict[str, Any]]]:
    """Name and configuration of each entry; Zarr allows a bare name for one without configuration."""
    return [(e, {}) if isinstance(e, str) else (e["name"], e.get("configuration", {})) for e in entries]


# Temporary names say who writes, so that what a dead process left can be told from what a live one needs. The
# host is part of it because a store may lie on a file system that several machines share.


def _temporary_path(directory: Path, label: str) -> Path:
    return directory / f".{label}.{uuid.uuid4().hex}.{os.getpid()}@{os.uname().nodename}.tmp"


def _remove_stale(directory: Path, label: str) -> None:
    """Remove what dead processes of this machine left under names of `_temporary_path`."""
    host = re.escape(os.uname().nodename)
    pattern = re.compile(rf"\.{re.escape(label)}\.[0-9a-f]{{32}}\.(\d{{1,9}})@{host}\.tmp")
    for name in os.listdir(directory):
        match = pattern.fullmatch(name)
        if match and not _is_alive(int(match[1])):
            with suppress(OSError):  # somebody else may be removing it as well
                if (directory / name).is_dir():
                    shutil.rmtree(directory / name)
                else:
                    (directory / name).unlink()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # alive, and somebody else's
        return True
    return True
