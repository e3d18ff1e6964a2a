"""The byte budget of the activation stores: the least recently used go first, those in use never."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from stackwise.errors import UserError

_LOCK = ".lock"


@contextmanager
def in_use(store: Path) -> Iterator[None]:
    """Mark a store as used now, and keep it from eviction until the block ends."""
    store.parent.mkdir(parents=True, exist_ok=True)
    with _lock_file(store).open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        os.utime(lock.fileno())
        yield


def make_room(store: Path, size: int, budget: int) -> None:
    """Evict other stores of the same directory until `store` fits.

    Args:
        store: the store that is about to be written.
        size: bytes that it will have when it is whole.
        budget: most bytes of all stores.

    Raises:
        UserError: it cannot fit, because it is too large or too much is in use.
    """
    found = store.parent.iterdir() if store.parent.is_dir() else ()
    # A store that is being created has a temporary name, which begins with a point.
    others = [d for d in found if d.is_dir() and d != store and not d.name.startswith(".")]
    sizes = {d: _size(d) for d in others}
    excess = size + sum(sizes.values()) - budget
    for other in sorted(others, key=_last_use):
        if excess <= 0:
            return
        with _lock_file(other).open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            shutil.rmtree(other, ignore_errors=True)
            excess -= sizes[other]
            # The lock file stays: somebody who has opened it, but not locked it yet, would lock what nobody else sees.
    if excess > 0:
        needed = (excess + budget) / 1e9
        raise UserError(
            f"params.yaml: activations.budget_gb = {budget / 1e9:g}: the boundary that is being cached, with those "
            f"in use, needs {needed:.3g}; raise it, lower objective.variants, or set activations.store_all_time_steps "
            "to false"
        )


def _lock_file(store: Path) -> Path:
    return store.with_name(store.name + _LOCK)


def _last_use(store: Path) -> float:
    try:
        return _lock_file(store).stat().st_mtime
    except OSError:
        return 0.0


def _size(directory: Path) -> int:
    """Bytes of its files; those that another process removes or renames meanwhile do not count."""
    size = 0
    for parent, _, names in os.walk(directory):
        for name in names:
            with suppress(OSError):
                size += os.stat(os.path.join(parent, name)).st_size
    return size
