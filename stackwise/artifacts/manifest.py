"""Artifacts: a directory with a `manifest.json`, written last, published by one rename, verified by every reader.

The manifest holds what was made of what: digests of the files, the resolved parameters, the digests of the inputs.
It holds nothing that differs between two equal runs, so its own digest is the artifact's identity. It ends up holding a
digest of its content too, so that damage to itself is found.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stackwise.errors import UserError

FORMAT = 1
MANIFEST = "manifest.json"
REMEDY = "run `dvc repro` or `snakemake`, which remake it"


@dataclass(frozen=True)
class Artifact:
    """A verified artifact."""

    path: Path
    kind: str
    digest: str
    """SHA-256 of the manifest, which names the digests of all files (hex)."""
    facts: Mapping[str, Any]
    """What the stage has written down about its result: shapes, counts, the model's architecture."""
    inputs: Mapping[str, str]
    """Digest of each artifact that this one was made from, by role."""


@dataclass
class Draft:
    """An artifact that is being written."""

    directory: Path
    """Where its files go; renamed to the artifact's path when complete."""
    facts: dict[str, Any] = field(default_factory=dict)


@contextmanager
def publish(
    path: Path, *, kind: str, params: Mapping[str, Any], inputs: Mapping[str, Artifact] | None = None
) -> Iterator[Draft]:
    """Write an artifact: yields a `Draft`, publishes it when the block ends, leaves nothing when it fails.

    Args:
        path: where the artifact appears, whole, at the end; what stood there before is replaced.
        kind: what it is; readers check it.
        params: the resolved parameters that it depends on (JSON values).
        inputs: the artifacts that it was made from, by role.
    """
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    partial.mkdir(parents=True)
    draft = Draft(partial)
    try:
        yield draft
        manifest = {
            "format": FORMAT,
            "kind": kind,
            "params": params,
            "inputs": {role: artifact.digest for role, artifact in (inputs or {}).items()},
            "facts": draft.facts,
            "files": {
                str(f.relative_to(partial)): {"size": f.stat().st_size, "sha256": digest_file(f)}
                for f in sorted(partial.rglob("*"))
                if f.is_file()
            },
        }
        manifest = json.loads(json.dumps(manifest))  # as its readers see it
        manifest["digest"] = digest_json(manifest)
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
        for file in filter(Path.is_file, partial.rglob("*")):
            with file.open("rb") as f:
                os.fsync(f.fileno())
        if path.exists():
            shutil.rmtree(path)
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def read(path: Path, kind: str, *, remedy: str | None = None) -> Artifact:
    """Open an artifact and verify every byte of it.

    Args:
        path: its directory.
        kind: what it must be.
        remedy: what to do if it cannot be used, for the message (None: what remakes it in a pipeline).

    Raises:
        UserError: it is missing, incomplete, damaged, of another kind or of another format version.
    """
    manifest_path = path / MANIFEST
    absent = remedy or REMEDY
    # Damage that leaves a file's size and time as they were escapes DVC, so it has to go first.
    remedy = remedy or f"run `rm -r {path}`, then `dvc repro` or `snakemake`, which remake it"
    try:
        raw = manifest_path.read_bytes()
        manifest = json.loads(raw)
        intact = manifest.pop("digest") == digest_json(manifest)
        found = (manifest["format"], manifest["kind"])
        files = {path / name: (entry["size"], entry["sha256"]) for name, entry in manifest["files"].items()}
        artifact = Artifact(path, kind, hashlib.sha256(raw).hexdigest(), manifest["facts"], manifest["inputs"])
    except FileNotFoundError:
        raise UserError(f"{manifest_path}: missing, so this is no complete {kind}; {absent}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{manifest_path}: damaged (not a manifest); {remedy}") from None
    if not intact:
        raise UserError(f"{manifest_path}: damaged (its content does not match its own digest); {remedy}")
    if found != (FORMAT, kind):
        expected = f"format {FORMAT} of kind {kind}"
        raise UserError(f"{manifest_path}: format {found[0]} of kind {found[1]}, expected {expected}; {absent}")
    for file, (size, digest) in files.items():
        try:
            actual = file.stat().st_size
            if actual != size:
                raise UserError(f"{file}: damaged ({actual} bytes, its manifest says {size}); {remedy}")
            if digest_file(file) != digest:
                raise UserError(f"{file}: damaged (its content does not match its manifest); {remedy}")
        except OSError as error:
            raise UserError(f"{file}: missing or unreadable ({error.strerror}); {remedy}") from None
    return artifact


def digest_file(path: Path) -> str:
    """SHA-256 of a file (hex)."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def digest_json(value: Any) -> str:
    """SHA-256 of a JSON value in canonical form (hex)."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
