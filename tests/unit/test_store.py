"""The activation store against zarr-python, damage and killed writers; the prefetching loader."""

import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import zarr
from zarr.codecs import Crc32cCodec

from stackwise.cache import store as store_module
from stackwise.cache.loader import PrefetchLoader
from stackwise.cache.sizes import rows_per_shard
from stackwise.cache.store import ActivationStore, DamagedShard, DamagedStore, StoreLayout

LAYOUT = StoreLayout(rows=17, seq=3, d_model=5, dtype="bfloat16", shard_rows=7)
ALL_ROWS = np.arange(LAYOUT.rows)


def some_activations(layout: StoreLayout, seed: int = 0) -> np.ndarray:
    """All rows of a store; row 4 is zero, which zarr-python would not write unless told to."""
    size = layout.rows * layout.row_bytes
    raw = np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)
    activations = raw.view(layout.storage_dtype).reshape(layout.rows, layout.seq, layout.width)
    activations[4:5] = 0
    return activations


def fill(store: ActivationStore, activations: np.ndarray) -> None:
    for g in range(store.layout.shards):
        rows = store.layout.shard_range(g)
        store.write_shard(g, activations[rows.start : rows.stop])


def read(store: ActivationStore, rows: Any = ALL_ROWS, verify: bool = True) -> np.ndarray:
    layout = store.layout
    out = np.empty((len(rows), layout.seq, layout.width), layout.storage_dtype)
    store.read_rows(np.asarray(rows), out, verify)
    return out


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def temporary_files(path: Path) -> list[Path]:
    return [p for p in path.iterdir() if p.name not in ("c", "zarr.json")]


def python(code: str, *arguments: object, **options: Any) -> subprocess.Popen[str]:
    """Run code in another process that imports what this one can."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, **options)


@pytest.fixture
def written(tmp_path: Path) -> Iterator[ActivationStore]:
    with ActivationStore.create(tmp_path / "store", LAYOUT) as store:
        fill(store, some_activations(LAYOUT))
        yield store


# --- layout ---


def test_rows_per_shard() -> None:
    assert rows_per_shard(256 * 1024) == 64
    assert rows_per_shard(10, 35) == 3
    assert rows_per_shard(2**30) == 1
    with pytest.raises(ValueError, match="positive"):
        rows_per_shard(0)


def test_layout_counts() -> None:
    assert (LAYOUT.shards, LAYOUT.row_bytes) == (3, 30)
    assert [LAYOUT.shard_range(g) for g in range(3)] == [range(7), range(7, 14), range(14, 17)]
    for g in (-1, 3):
        with pytest.raises(IndexError, match=f"no shard {g}"):
            LAYOUT.shard_range(g)


def test_narrow_layouts_hold_codes_and_scales() -> None:
    """A byte for each channel; an fp16 number for 64 of them, or an fp32 number for all."""
    sizes = {64: 66, 65: 69, 5: 7, 200: 208}
    for d_model, width in sizes.items():
        layout = StoreLayout(rows=3, seq=2, d_model=d_model, dtype="int8", shard_rows=2)
        assert (layout.width, layout.row_bytes, layout.storage_dtype.name) == (width, 2 * width, "uint8")
    layout = StoreLayout(rows=3, seq=2, d_model=200, dtype="float8_e4m3fn", shard_rows=2)
    assert (layout.width, layout.row_bytes, layout.storage_dtype.name) == (204, 408, "uint8")


def test_total_bytes_is_what_lies_on_disk(written: ActivationStore) -> None:
    sizes = [written.shard_path(g).stat().st_size for g in range(LAYOUT.shards)]
    assert sum(sizes) == LAYOUT.total_bytes


@pytest.mark.parametrize(
    "wrong", [{"rows": 0}, {"seq": -1}, {"shard_rows": 1.5}, {"dtype": "float16"}, {"d_model": 2**30}]
)
def test_bad_layout(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must be|too big"):
        StoreLayout(**{"rows": 1, "seq": 1, "d_model": 1, "dtype": "float32", "shard_rows": 1, **wrong})


# --- the same bytes as zarr-python ---


@pytest.mark.parametrize(
    "layout",
    [
        LAYOUT,
        StoreLayout(rows=8, seq=3, d_model=5, dtype="float32", shard_rows=4),
        StoreLayout(rows=5, seq=4, d_model=2, dtype="float32", shard_rows=64),
        StoreLayout(rows=6, seq=1, d_model=1, dtype="bfloat16", shard_rows=1),
        StoreLayout(rows=530, seq=1, d_model=2, dtype="bfloat16", shard_rows=520),
        StoreLayout(rows=9, seq=3, d_model=70, dtype="int8", shard_rows=4),
        StoreLayout(rows=9, seq=3, d_model=70, dtype="float8_e4m3fn", shard_rows=4),
    ],
    ids=["tail", "full", "less than a shard", "single rows", "more buffers than a writev takes", "int8", "fp8"],
)
def test_byte_identical_to_zarr(layout: StoreLayout, tmp_path: Path) -> None:
    activations = some_activations(layout)
    ours = ActivationStore.create(tmp_path / "ours", layout)
    fill(ours, activations)
    assert ours.missing() == []

    theirs = zarr.create_array(
        store=str(tmp_path / "theirs"),
        shape=activations.shape,
        dtype=activations.dtype,
        chunks=(1, layout.seq, layout.width),
        shards=(layout.shard_rows, layout.seq, layout.width),
        compressors=[Crc32cCodec()],
        filters=None,
        fill_value=0,
        zarr_format=3,
        config={"write_empty_chunks": True},
        attributes=layout.attributes,
    )
    theirs[:] = activations

    for folder in ("ours", "theirs"):
        root = tmp_path / folder
        files = sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())
        assert files == [*sorted(f"c/{g}/0/0" for g in range(layout.shards)), "zarr.json"]
        for name in files:
            assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes(), name

        array: Any = zarr.open_array(str(root), mode="r")
        np.testing.assert_array_equal(array[:].view(np.uint8), activations.view(np.uint8))
        with ActivationStore.open(root) as store:
            assert store.layout == layout
            rows = np.arange(layout.rows)[::-1]
            np.testing.assert_array_equal(read(store, rows).view(np.uint8), activations[rows].view(np.uint8))


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel may write less than it was asked to, and stop anywhere in a buffer."""
    monkeypatch.setattr(os, "writev", lambda fd, buffers: os.write(fd, b"".join(buffers)[:11]))
    store = ActivationStore.create(tmp_path / "store", LAYOUT)
    fill(store, some_activations(LAYOUT))
    np.testing.assert_array_equal(read(store), some_activations(LAYOUT))


def test_zero_shard_is_written(tmp_path: Path) -> None:
    store = ActivationStore.create(tmp_path / "store", LAYOUT)
    store.write_shard(0, np.zeros((7, 3, 5), np.uint16))
    assert store.missing() == [1, 2]
    assert not read(store, range(7)).any()
    with pytest.raises(DamagedShard):
        read(store, [7])


def test_zero_rows_that_zarr_left_out_are_damage(tmp_path: Path) -> None:
    store = ActivationStore.create(tmp_path / "store", LAYOUT)
    array: Any = zarr.open_array(str(store.path), mode="r+", config={"write_empty_chunks": False})
    array[:] = some_activations(LAYOUT)
    with pytest.raises(DamagedShard, match="320 bytes instead of 354"):
        read(store, [0])


# --- reading ---


def test_rows_in_any_order_and_repeated(written: ActivationStore) -> None:
    rows = [16, 0, 7, 7, 13, 4, 16, 6]
    np.testing.assert_array_equal(read(written, rows), some_activations(LAYOUT)[rows])
    assert read(written, np.empty(0, np.int64)).shape == (0, 3, 5)


@pytest.mark.parametrize("lacking", ["_NO_WAIT", "posix_fadvise"])
def test_lacking_calls(written: ActivationStore, monkeypatch: pytest.MonkeyPatch, lacking: str) -> None:
    """macOS has neither of the two."""
    if lacking == "_NO_WAIT":
        monkeypatch.setattr(store_module, lacking, None)
    else:
        monkeypatch.delattr(os, lacking, raising=False)
    np.testing.assert_array_equal(read(written), some_activations(LAYOUT))


def test_few_files_stay_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "_OPEN_SHARDS", 3)
    layout = StoreLayout(rows=40, seq=2, d_model=2, dtype="float32", shard_rows=2)
    activations = some_activations(layout)

    def open_files() -> int:
        links = (os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd"))
        return sum(str(tmp_path) in link for link in links)

    with ActivationStore.create(tmp_path / "store", layout) as store:
        fill(store, activations)
        rows = np.random.default_rng(1).permutation(40)
        np.testing.assert_array_equal(read(store, rows).view(np.uint8), activations[rows].view(np.uint8))
        if Path("/proc/self/fd").exists():
            assert open_files() == 3
    if Path("/proc/self/fd").exists():
        assert open_files() == 0
    np.testing.assert_array_equal(read(store, [5]).view(np.uint8), activations[5:6].view(np.uint8))


def test_threads_share_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A descriptor in use is not closed and given to another file, however many are closed meanwhile."""
    monkeypatch.setattr(store_module, "_OPEN_SHARDS", 2)
    layout = StoreLayout(rows=24, seq=8, d_model=8, dtype="bfloat16", shard_rows=2)
    activations = some_activations(layout)
    store = ActivationStore.create(tmp_path / "store", layout)
    fill(store, activations)
    failures: list[object] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        try:
            for _ in range(100):
                rows = rng.integers(0, layout.rows, 6)
                np.testing.assert_array_equal(read(store, rows, verify=False), activations[rows])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_wrong_arguments(written: ActivationStore) -> None:
    out = np.empty((2, 3, 5), np.uint16)
    for outside in (17, -1):
        with pytest.raises(IndexError, match=r"not all in 0\.\.16"):
            written.read_rows(np.array([0, outside]), out)
    no_numbers: list[Any] = [np.zeros((1, 2), np.int64), np.zeros(2)]
    for rows in no_numbers:
        with pytest.raises(ValueError, match="rows must be integers"):
            written.read_rows(rows, out)
    readonly = out.copy()
    readonly.flags.writeable = False
    wrong = [out[:1], out.view(np.int16), np.asfortranarray(out), readonly]
    for buffer in wrong:
        with pytest.raises(ValueError, match="must be"):
            written.read_rows(np.array([0, 1]), buffer)
    shard = np.zeros((7, 3, 5), np.uint16)
    for array in (shard[:3], shard.astype(np.float32), np.asfortranarray(shard)):
        with pytest.raises(ValueError, match="activations must be"):
            written.write_shard(0, array)
    with pytest.raises(ValueError, match="activations must be"):
        written.write_shard(2, shard)
    for call in (written.drop_shard, written.shard_path, lambda g: written.write_shard(g, shard)):
        with pytest.raises(IndexError, match="no shard 3"):
            call(3)


# --- damage ---


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def swap_rows(path: Path) -> None:
    data = path.read_bytes()
    index = data[-116:-4]
    index = index[16:32] + index[:16] + index[32:]
    path.write_bytes(data[:-116] + index + google_crc32c.value(index).to_bytes(4, "little"))


def make_a_file_of_the_directory(path: Path) -> None:
    shutil.rmtree(path.parent)
    path.parent.write_text("")


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "row": (lambda p: flip(p, 5), "checksum of row 7 "),
    "checksum of a row": (lambda p: flip(p, 31), "checksum of row 7 "),
    "index": (lambda p: flip(p, -20), "index does not match its checksum"),
    "valid index of other rows": (swap_rows, "index does not list all rows in order"),
    "checksum of the index": (lambda p: flip(p, -1), "index does not match its checksum"),
    "truncated": (cut, "353 bytes instead of 354"),
    "empty": (lambda p: p.write_bytes(b""), "0 bytes instead of 354"),
    "grown": (lambda p: p.write_bytes(p.read_bytes() + b"x"), "355 bytes"),
    "gone": (Path.unlink, "the file is missing"),
    "directories gone": (lambda p: shutil.rmtree(p.parent.parent), "the file is missing"),
    "not a directory": (make_a_file_of_the_directory, "the file is missing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("verify", [True, False])
def test_damage_is_named_and_repaired(written: ActivationStore, damage: str, verify: bool) -> None:
    activations = some_activations(LAYOUT)
    spoil, reason = DAMAGES[damage]
    spoil(written.shard_path(1))

    if verify or not damage.endswith("row"):
        with pytest.raises(DamagedShard, match=reason) as caught:
            read(written, [0, 7, 16], verify)
        assert caught.value.shard == 1
        assert caught.value.path == written.shard_path(1)
        assert caught.value.reason in str(caught.value)
        assert isinstance(caught.value, DamagedStore)
    else:  # nobody looked
        assert (read(written, [7], verify) != activations[7]).any() == (damage == "row")
    if damage.endswith("row"):  # the rest of the shard can be read
        others = [8, 13]
        np.testing.assert_array_equal(read(written, others), activations[others])
    by_size = damage in ("truncated", "empty", "grown", "gone", "directories gone", "not a directory")
    assert written.missing() == ([1] if by_size else [])
    others = [r for r in range(17) if not 7 <= r < 14]
    np.testing.assert_array_equal(read(written, others), activations[others])

    if damage == "not a directory":
        (written.path / "c" / "1" / "0").unlink()
    written.drop_shard(1)
    written.drop_shard(1)
    assert written.missing() == [1]
    written.write_shard(1, activations[7:14])
    assert written.missing() == []
    np.testing.assert_array_equal(read(written), activations)


def test_shard_that_shrinks_under_the_reader(written: ActivationStore) -> None:
    read(written)
    os.truncate(written.shard_path(1), 40)
    with pytest.raises(DamagedShard, match="ends before row 8 does"):
        read(written, [7, 8])
    other = ActivationStore.open(written.path)  # as another process would repair it
    other.write_shard(1, some_activations(LAYOUT)[7:14])
    np.testing.assert_array_equal(read(written), some_activations(LAYOUT))


def test_a_new_shard_replaces_the_old_one_for_readers_too(written: ActivationStore) -> None:
    read(written)
    other = some_activations(LAYOUT, seed=1)
    written.write_shard(0, other[:7])
    np.testing.assert_array_equal(read(written, range(7)), other[:7])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: None,
        lambda text: b"",
        lambda text: b"garbage",
        lambda text: b"\xff\xfe",
        lambda text: b"[]",
        lambda text: b"{}",
        lambda text: text[: len(text) // 2],
        lambda text: text.replace(b'"uint16"', b'"int16"'),
        lambda text: text.replace(b'"uint16"', b'"float32"'),
        lambda text: text.replace(b'"bfloat16"', b'"float32"'),
        lambda text: text.replace(b'"little"', b'"big"'),
        lambda text: text.replace(b'"crc32c"', b'"gzip"'),
        lambda text: text.replace(b'"end"', b'"start"'),
        lambda text: text.replace(b'"/"', b'"."'),
        lambda text: text.replace(b"17", b"0"),
        lambda text: text.replace(b"17", b'"17"'),
        lambda text: text.replace(b"17,", b"17, 1,"),
        lambda text: text.replace(b'"zarr_format": 3', b'"zarr_format": 2'),
        lambda text: text.replace(b'"array"', b'"group"'),
    ],
)
def test_bad_metadata(written: ActivationStore, spoil: Callable[[bytes], bytes | None]) -> None:
    document = written.path / "zarr.json"
    text = document.read_bytes()
    spoilt = spoil(text)
    assert spoilt != text
    document.unlink()
    if spoilt is not None:
        document.write_bytes(spoilt)
    with pytest.raises(DamagedStore, match=r"zarr\.json") as caught:
        ActivationStore.open(written.path)
    assert caught.value.path == written.path
    with pytest.raises(DamagedStore):  # neither guessed nor overwritten: the shards there may be anybody's
        ActivationStore.create(written.path, LAYOUT)
    assert document.exists() == (spoilt is not None)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"d_model": 70', b'"d_model": 71'),
        (b'"d_model": 70', b'"d_model": "70"'),
        (b'"channels_per_scale": 64', b'"channels_per_scale": 32'),
        (b'"scale_dtype": "float16"', b'"scale_dtype": "float32"'),
        (b'"int8"', b'"float8_e4m3fn"'),
        (b'"int8"', b'"int4"'),
        (b'"uint8"', b'"uint16"'),
    ],
)
def test_bad_metadata_of_a_narrow_store(tmp_path: Path, old: bytes, new: bytes) -> None:
    layout = StoreLayout(rows=9, seq=3, d_model=70, dtype="int8", shard_rows=4)
    with ActivationStore.create(tmp_path / "store", layout) as store:
        assert ActivationStore.open(store.path).layout == layout
        document = store.path / "zarr.json"
        assert old in document.read_bytes()
        document.write_bytes(document.read_bytes().replace(old, new))
        with pytest.raises(DamagedStore, match=r"zarr\.json"):
            ActivationStore.open(store.path)


def test_short_names_of_codecs_are_understood(written: ActivationStore) -> None:
    """Zarr allows `"crc32c"` for `{"name": "crc32c"}`."""
    document = written.path / "zarr.json"
    text = "".join(document.read_text().split())
    document.write_text(text.replace('{"name":"crc32c"}', '"crc32c"'))
    assert '},"crc32c"]' in document.read_text()
    np.testing.assert_array_equal(read(ActivationStore.open(written.path)), some_activations(LAYOUT))


def test_errors_can_be_sent_to_another_process() -> None:
    error = pickle.loads(pickle.dumps(DamagedShard("a/b", 3, "gone")))
    assert (error.path, error.shard, error.reason, str(error)) == (
        Path("a/b"),
        3,
        "gone",
        "shard 3 (a/b): gone",
    )


# --- creating ---


def test_create_opens_what_is_there(written: ActivationStore) -> None:
    again = ActivationStore.create(written.path, LAYOUT)
    np.testing.assert_array_equal(read(again), some_activations(LAYOUT))
    other = StoreLayout(rows=17, seq=3, d_model=5, dtype="bfloat16", shard_rows=8)
    with pytest.raises(ValueError, match=r"shard_rows=7.*not.*shard_rows=8"):
        ActivationStore.create(written.path, other)


def test_create_in_an_empty_directory_but_in_no_other(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert ActivationStore.create(tmp_path / "empty", LAYOUT).missing() == [0, 1, 2]
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    for name in ("file", "full"):
        with pytest.raises(DamagedStore):
            ActivationStore.create(tmp_path / name, LAYOUT)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "file", "full"]
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["thesis.tex"]


def test_opening_reading_and_writing_need_no_zarr(written: ActivationStore) -> None:
    code = """
import sys, numpy as np
from stackwise.cache.store import ActivationStore
store = ActivationStore.create(sys.argv[1], ActivationStore.open(sys.argv[1]).layout)
out = np.empty((7, 3, 5), np.uint16)
store.read_rows(np.arange(7), out)
store.write_shard(0, out)
sys.exit("zarr" in sys.modules)
"""
    process = python(code, written.path)
    process.communicate()
    assert process.returncode == 0


def test_processes_create_and_write_together(tmp_path: Path) -> None:
    """Two of them race for the store and write every second shard each."""
    code = """
import sys, pickle, numpy as np, zarr
from stackwise.cache.store import ActivationStore
path, first = sys.argv[1], int(sys.argv[2])
layout, activations = pickle.load(open(sys.argv[3], "rb"))
print("ready", flush=True)
sys.stdin.readline()
store = ActivationStore.create(path, layout)
for g in range(first, layout.shards, 2):
    rows = layout.shard_range(g)
    store.write_shard(g, activations[rows.start:rows.stop])
    store.missing()  # must not take the other's temporary files away
"""
    layout = StoreLayout(rows=41, seq=16, d_model=32, dtype="float32", shard_rows=2)
    activations = some_activations(layout)
    (tmp_path / "data").write_bytes(pickle.dumps((layout, activations)))
    path = tmp_path / "stores" / "store"
    workers = [python(code, path, first, tmp_path / "data", stdin=subprocess.PIPE) for first in range(2)]
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()
    for worker in workers:
        worker.communicate()
        assert worker.returncode == 0
    assert [p.name for p in path.parent.iterdir()] == ["store"]
    assert temporary_files(path) == []
    with ActivationStore.open(path) as store:
        assert store.missing() == []
        np.testing.assert_array_equal(read(store, np.arange(41)).view(np.uint8), activations.view(np.uint8))


# --- writers that die ---

DYING_WRITER = """
import os, sys, time, numpy as np
from stackwise.cache import store as module
def hang(*_):
    print("hanging", flush=True)
    time.sleep(60)
point = sys.argv[2]
if point == "half written":
    writev = os.writev
    os.writev = lambda fd, buffers: (writev(fd, buffers[: len(buffers) // 2]), hang())
elif point == "not synced":
    module._sync_data = hang
elif point == "not renamed":
    os.replace = hang
elif point == "store not renamed":
    os.rename = hang
layout = module.StoreLayout(rows=17, seq=3, d_model=5, dtype="bfloat16", shard_rows=7)
store = module.ActivationStore.create(sys.argv[1], layout)
store.write_shard(1, np.ones((7, 3, 5), np.uint16))
"""


def kill(writer: subprocess.Popen[str]) -> None:
    """SIGKILL, and wait: a process that nobody has waited for still counts as alive."""
    writer.kill()
    writer.communicate()


@pytest.mark.parametrize("point", ["half written", "not synced", "not renamed"])
@pytest.mark.parametrize("existing", [False, True])
def test_killed_writer_leaves_nothing_half_done(tmp_path: Path, point: str, existing: bool) -> None:
    activations = some_activations(LAYOUT)
    store = ActivationStore.create(tmp_path / "store", LAYOUT)
    if existing:
        fill(store, activations)
    writer = python(DYING_WRITER, store.path, point)
    assert writer.stdout is not None
    assert writer.stdout.readline() == "hanging\n"

    expected = [] if existing else [0, 1, 2]
    assert store.missing() == expected
    assert len(temporary_files(store.path)) == 1  # the writer is alive and needs it
    kill(writer)
    if existing:
        np.testing.assert_array_equal(read(store), activations)
    else:
        with pytest.raises(DamagedShard, match="missing"):
            read(store, [7])
    assert store.missing() == expected
    assert temporary_files(store.path) == []

    fill(store, activations)
    np.testing.assert_array_equal(read(store), activations)


def test_killed_creator_leaves_no_store(tmp_path: Path) -> None:
    path = tmp_path / "store"
    writer = python(DYING_WRITER, path, "store not renamed")
    assert writer.stdout is not None
    assert writer.stdout.readline() == "hanging\n"
    with pytest.raises(DamagedStore):
        ActivationStore.open(path)
    kill(writer)
    assert not path.exists()
    assert len(list(tmp_path.iterdir())) == 1
    ActivationStore.create(path, LAYOUT)
    assert [p.name for p in tmp_path.iterdir()] == ["store"]


def test_temporary_files_of_other_machines_are_left_alone(written: ActivationStore) -> None:
    ours = store_module._temporary_path(written.path, "shard")
    dead = python("")
    dead.communicate()
    stale = ours.with_name(ours.name.replace(f".{os.getpid()}@", f".{dead.pid}@"))
    theirs = stale.with_name(stale.name.replace("@", "@not-"))
    for file in (ours, theirs, stale):
        file.write_bytes(b"")
    assert written.missing() == []
    assert set(temporary_files(written.path)) == {ours, theirs}


def test_failed_write_leaves_nothing(written: ActivationStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, buffers: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "writev", full)
    with pytest.raises(OSError, match="No space"):
        written.write_shard(0, np.zeros((7, 3, 5), np.uint16))
    assert temporary_files(written.path) == []
    np.testing.assert_array_equal(read(written), some_activations(LAYOUT))


def test_a_removed_store_stays_removed(written: ActivationStore) -> None:
    shutil.rmtree(written.path)
    with pytest.raises(FileNotFoundError):
        written.write_shard(0, np.zeros((7, 3, 5), np.uint16))
    assert not written.path.exists()


# --- loader ---


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


@pytest.fixture(autouse=True)
def no_thread_survives() -> Iterator[None]:
    yield
    assert prefetch_threads() == []


def until(condition: Callable[..., bool], *arguments: object) -> None:
    """Wait for another thread; gives up only where the test is lost anyway."""
    for _ in range(2000):
        if condition(*arguments):
            return
        time.sleep(0.005)
    raise AssertionError("the condition never came true")


def recorder(made: list[int]) -> Callable[[int], int]:
    """A `make_batch` that returns the step and writes it down."""

    def make(step: int) -> int:
        made.append(step)
        return step

    return make


def test_loader_keeps_the_order() -> None:
    loader = PrefetchLoader(lambda step: step * 10, range(3, 40, 2))
    assert list(loader) == [step * 10 for step in range(3, 40, 2)]
    assert loader.waited >= 0.0
    assert list(PrefetchLoader(str, range(0))) == []


def test_loader_stays_within_its_depth() -> None:
    made: list[int] = []
    for batch in PrefetchLoader(recorder(made), range(20), depth=3):
        allowed = min(20, batch + 1 + 3)
        until(lambda n: len(made) >= n, allowed)
        time.sleep(0.002)  # for more to be made, if it could
        assert made == list(range(allowed))


def test_a_ring_of_depth_plus_one_buffers_is_enough() -> None:
    depth = 3
    ring = np.zeros((depth + 1, 1000), np.int64)

    def make(step: int) -> np.ndarray:
        batch: np.ndarray = ring[step % len(ring)]
        batch[:] = step
        return batch

    for step, batch in enumerate(PrefetchLoader(make, range(300), depth)):
        if step % 10 == 0:
            time.sleep(0.001)  # lets the thread run into the consumer's buffer if it could
        assert (batch == step).all()


def test_loader_reads_a_store(written: ActivationStore) -> None:
    order = np.random.default_rng(0).permutation(LAYOUT.rows)
    batches = PrefetchLoader(lambda step: read(written, order[4 * step : 4 * step + 4]), range(5))
    np.testing.assert_array_equal(np.concatenate(list(batches)), some_activations(LAYOUT)[order])


def test_loader_hands_errors_over() -> None:
    error = DamagedShard("p", 1, "gone")

    def make(step: int) -> int:
        if step == 3:
            raise error
        return step

    got = []
    with pytest.raises(DamagedShard) as caught:  # noqa: PT012
        for batch in PrefetchLoader(make, range(9)):
            until(lambda: len(prefetch_threads()) == 0)  # the error is there before the batches are taken
            got.append(batch)
    assert caught.value is error
    assert got == [0, 1, 2]


def test_stop_iteration_in_the_thread_is_no_end_of_the_data() -> None:
    with pytest.raises(RuntimeError):
        list(PrefetchLoader(lambda step: next(iter(())), range(3)))


@pytest.mark.parametrize("way", ["break", "raise", "close", "context"])
def test_leaving_early_stops_the_thread(way: str) -> None:
    made: list[int] = []
    loader = PrefetchLoader(recorder(made), range(10**9), depth=2)
    if way == "break":
        for _ in loader:
            break
    elif way == "raise":
        with pytest.raises(ZeroDivisionError):  # noqa: PT012
            for batch in loader:
                _ = 1 // batch
    elif way == "close":
        batches = iter(loader)
        assert next(batches) == 0
        until(lambda: len(made) == 3)
        loader.close()
        loader.close()
        assert made == [0, 1, 2]
        with pytest.raises(RuntimeError, match="closed during"):
            next(batches)
    else:
        with loader:
            batches = iter(loader)
            assert next(batches) == 0
    assert prefetch_threads() == []
    assert len(made) <= 4
    with pytest.raises(RuntimeError, match="iterated once"):
        next(iter(loader))


def test_closing_wakes_a_consumer_that_waits() -> None:
    release = threading.Event()
    loader = PrefetchLoader(lambda step: release.wait(10), range(3))
    errors: list[BaseException] = []

    def consume() -> None:
        try:
            list(loader)
        except RuntimeError as error:
            errors.append(error)

    consumer = threading.Thread(target=consume)
    consumer.start()
    until(lambda: len(prefetch_threads()) == 1)
    closer = threading.Thread(target=loader.close)
    closer.start()
    until(lambda: loader._closed)
    release.set()
    closer.join(10)
    consumer.join(10)
    assert len(errors) == 1


def test_loader_that_is_never_iterated() -> None:
    with PrefetchLoader(str, range(3)):
        assert prefetch_threads() == []
    with pytest.raises(ValueError, match="depth"):
        PrefetchLoader(str, range(3), depth=0)
