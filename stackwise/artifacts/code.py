"""Digests of source code, for what is kept outside the engines' sight: checkpoints and activation stores."""

import ast
import hashlib
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
"""The directory that holds the packages `stackwise` and `workflow`."""


def digest_code(names: Iterable[str]) -> str:
    """SHA-256 of what Python sources do (hex).

    Comments, layout and docstrings do not count, so that editing them discards no checkpoint and no cached boundary.

    Args:
        names: files or directories, relative to `PROJECT`.
    """
    hasher = hashlib.sha256()
    for path in sorted(set(_python_files(names))):
        hasher.update(str(path.relative_to(PROJECT)).encode() + _digest_source(path.read_bytes()))
    return hasher.hexdigest()


@cache
def _digest_source(source: bytes) -> bytes:
    """SHA-256 of what one source does. A process asks for the same sources several times, and each takes a while."""
    hasher = hashlib.sha256()
    for token in _walk(ast.parse(source)):
        hasher.update(token.encode() + b"\0")
    return hasher.digest()


def _python_files(names: Iterable[str]) -> Iterator[Path]:
    for name in names:
        path = PROJECT / name
        yield from path.rglob("*.py") if path.is_dir() else [path]


def _walk(node: object) -> Iterator[str]:
    """A flat form of a syntax tree that is the same for all supported Python versions."""
    if isinstance(node, ast.AST):
        yield type(node).__name__
        for name, value in ast.iter_fields(node):
            if name == "body" and isinstance(value, list):
                value = [v for v in value if not _is_docstring(v)]
            if value is not None and value != []:
                yield name
                yield from _walk(value)
        yield ")"
    elif isinstance(node, list):
        for item in node:
            yield from _walk(item)
    else:
        yield repr(node)


def _is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
