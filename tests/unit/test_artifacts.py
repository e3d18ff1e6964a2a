"""Artifacts: published whole or not at all, verified by every reader; digests of code."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from stackwise.artifacts import code
from stackwise.artifacts.code import digest_code
from stackwise.artifacts.manifest import MANIFEST, Artifact, digest_file, digest_json, publish, read
from stackwise.errors import UserError

PARAMS = {"seed": 0, "stack": {"lr": 3e-3}}
FILES = {"weights.bin": bytes(range(256)) * 40, "tokenizer/vocabulary.json": b'{"a": 0}\n', "empty": b""}


def write(path: Path, *, kind: str = "stack", inputs: dict[str, Artifact] | None = None, steps: int = 3) -> None:
    with publish(path, kind=kind, params=PARAMS, inputs=inputs) as draft:
        for name, content in FILES.items():
            (draft.directory / name).parent.mkdir(exist_ok=True)
            (draft.directory / name).write_bytes(content)
        draft.facts |= {"steps": steps}


def tree(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


# --- publishing


def test_what_is_published_is_read(tmp_path: Path) -> None:
    write(tmp_path / "tokens", kind="tokens")
    tokens = read(tmp_path / "tokens", "tokens")
    write(tmp_path / "stacks/0", inputs={"tokens": tokens})  # makes its parent
    stack = read(tmp_path / "stacks/0", "stack")
    assert (stack.path, stack.kind, dict(stack.facts)) == (tmp_path / "stacks/0", "stack", {"steps": 3})
    assert stack.inputs == {"tokens": tokens.digest}
    assert {name: (stack.path / name).read_bytes() for name in FILES} == FILES


def test_the_manifest_holds_what_was_made_of_what(tmp_path: Path) -> None:
    write(tmp_path / "tokens", kind="tokens")
    tokens = read(tmp_path / "tokens", "tokens")
    write(tmp_path / "stack", inputs={"tokens": tokens})
    raw = (tmp_path / "stack" / MANIFEST).read_bytes()
    manifest = json.loads(raw)
    assert manifest.pop("digest") == digest_json(manifest)
    assert manifest == {
        "format": 1,
        "kind": "stack",
        "params": PARAMS,
        "inputs": {"tokens": tokens.digest},
        "facts": {"steps": 3},
        "files": {
            name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in FILES.items()
        },
    }
    assert read(tmp_path / "stack", "stack").digest == hashlib.sha256(raw).hexdigest()


def test_two_equal_runs_publish_the_same_bytes(tmp_path: Path) -> None:
    write(tmp_path / "one/stack")
    write(tmp_path / "two/stack")
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    write(tmp_path / "two/stack", steps=4)
    assert read(tmp_path / "one/stack", "stack").digest != read(tmp_path / "two/stack", "stack").digest


def test_it_is_there_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "stack"
    with publish(path, kind="stack", params={}) as draft:
        (draft.directory / "a").write_text("a")
        assert not path.exists()
        assert not (draft.directory / MANIFEST).exists()
    assert sorted(tree(tmp_path)) == ["stack/a", f"stack/{MANIFEST}"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def fail(path: Path) -> None:
        with publish(path, kind="stack", params={}) as draft:
            (draft.directory / "half").write_text("...")
            raise error

    with pytest.raises(error):
        fail(tmp_path / "stack")
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_the_old_one_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "stack"
    write(path)
    before = tree(tmp_path)

    def fail(fact: object) -> None:
        with publish(path, kind="stack", params={}) as draft:
            (draft.directory / "weights.bin").write_text("...")
            draft.facts["steps"] = fact
            assert fact, "in the block"

    with pytest.raises(AssertionError, match="in the block"):
        fail(0)
    assert tree(tmp_path) == before
    with pytest.raises(TypeError, match="JSON"):
        fail(object())  # which cannot stand in a manifest
    assert tree(tmp_path) == before


def test_a_new_one_replaces_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "stack"
    write(path)
    (path / "stray").write_text("of someone else")
    write(path, steps=5)
    assert set(tree(path)) == {*FILES, MANIFEST}
    assert read(path, "stack").facts == {"steps": 5}


def test_what_a_kill_has_left_is_removed(tmp_path: Path) -> None:
    leftover = tmp_path / ".stack.partial"
    leftover.mkdir()
    (leftover / "half").write_text("...")
    write(tmp_path / "stack")
    assert not leftover.exists()
    assert set(tree(tmp_path / "stack")) == {*FILES, MANIFEST}


# --- reading


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


DAMAGE: dict[str, Callable[[Path], None]] = {"flip": flip, "truncate": truncate, "grow": grow, "delete": Path.unlink}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("name", ["weights.bin", "tokenizer/vocabulary.json"])
def test_damage_is_found(tmp_path: Path, name: str, damage: Callable[[Path], None]) -> None:
    path = tmp_path / "stack"
    write(path)
    damage(path / name)
    with pytest.raises(UserError) as error:
        read(path, "stack")
    message = str(error.value)
    assert message.startswith(f"{path / name}: ")
    assert f"rm -r {path}" in message
    assert "dvc repro" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b'"text"', b'{"format": 1, "kind": "stack"}', b"\xff\xfe", b'{"files": 3}']
)
def test_a_damaged_manifest_is_found(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "stack"
    write(path)
    (path / MANIFEST).write_bytes(content)
    with pytest.raises(UserError, match=r"manifest\.json: damaged .*dvc repro") as error:
        read(path, "stack")
    assert "\n" not in str(error.value)


def rewrite(path: Path, **changes: object) -> None:
    """Another manifest, whose digest is right."""
    manifest = json.loads((path / MANIFEST).read_text()) | changes
    del manifest["digest"]
    (path / MANIFEST).write_text(json.dumps(manifest | {"digest": digest_json(manifest)}))


@pytest.mark.parametrize("value", [3, None, "x", {"size": 1}, [1, "x"]])
def test_a_manifest_with_strange_entries_is_found(tmp_path: Path, value: object) -> None:
    path = tmp_path / "stack"
    write(path)
    rewrite(path, files={"weights.bin": value})
    with pytest.raises(UserError, match="damaged"):
        read(path, "stack")


def test_no_flipped_bit_of_a_manifest_escapes(tmp_path: Path) -> None:
    path = tmp_path / "stack"
    write(path)
    raw = (path / MANIFEST).read_bytes()
    for i in range(len(raw)):
        (path / MANIFEST).write_bytes(raw[:i] + bytes([raw[i] ^ 1 << i % 7]) + raw[i + 1 :])
        with pytest.raises(UserError):
            read(path, "stack")


def test_an_artifact_without_a_manifest_is_none(tmp_path: Path) -> None:
    path = tmp_path / "stack"
    with pytest.raises(UserError, match=r"manifest\.json: missing, so this is no complete stack; run `dvc repro`"):
        read(path, "stack")
    write(path)
    (path / MANIFEST).unlink()
    with pytest.raises(UserError, match=r"manifest\.json: missing, so this is no complete stack; run `dvc repro`"):
        read(path, "stack")


def test_another_kind_or_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "stack"
    write(path)
    with pytest.raises(UserError, match="format 1 of kind stack, expected format 1 of kind rack"):
        read(path, "rack")
    rewrite(path, format=2)
    with pytest.raises(UserError, match="format 2 of kind stack, expected format 1"):
        read(path, "stack")


def test_digests_of_files_and_values(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert digest_file(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()
    assert digest_json({"a": 1, "b": [1.5, None]}) == digest_json({"b": [1.5, None], "a": 1})
    assert digest_json({"a": 1}) != digest_json({"a": 2})


# --- digests of code

SOURCE = '''"""A module."""

import math


def area(r: float) -> float:
    """Of a circle."""
    # pi r squared
    return math.pi * r**2
'''


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(code, "PROJECT", tmp_path)
    (tmp_path / "room").mkdir()
    path = tmp_path / "room/circle.py"
    path.write_text(SOURCE)
    return path


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("# pi r squared", "# the area"),
        ("    # pi r squared\n", ""),
        ('"""A module."""', '"""Circles,\nand nothing else."""'),
        ('    """Of a circle."""\n', ""),
        ("return math.pi * r**2", "return (\n        math.pi * r ** 2\n    )"),
        ("import math\n", "import math\n\n\n\n"),
    ],
)
def test_comments_docstrings_and_layout_do_not_count(source: Path, old: str, new: str) -> None:
    before = digest_code(["room"])
    assert old in SOURCE
    source.write_text(SOURCE.replace(old, new))
    assert digest_code(["room"]) == before


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("r**2", "r**3"),
        ("r**2", "r**2.0"),
        ("math.pi * r**2", "r**2 * math.pi"),
        ("return math", "yield math"),
        ("(r: float)", "(r: float = 1.0)"),
        ("area", "surface"),
        ("import math", "import cmath as math"),
        ("return math.pi * r**2", 'return "math.pi * r**2"'),
    ],
)
def test_code_counts(source: Path, old: str, new: str) -> None:
    before = digest_code(["room"])
    assert old in SOURCE
    source.write_text(SOURCE.replace(old, new))
    assert digest_code(["room"]) != before


def test_names_and_places_of_files_count(source: Path) -> None:
    before = digest_code(["room"])
    assert digest_code(["room/circle.py"]) == before
    (source.parent / "notes.txt").write_text("no code")
    assert digest_code(["room"]) == before
    shutil.copy(source, source.with_name("disc.py"))
    assert digest_code(["room"]) != before
    source.unlink()
    assert digest_code(["room"]) != before


def test_the_order_of_names_does_not_count(source: Path) -> None:
    (source.parent / "disc.py").write_text("A = 1\n")
    assert digest_code(["room/disc.py", "room/circle.py"]) == digest_code(["room/circle.py", "room/disc.py"])
