"""A thread that makes batches ahead of the training loop, so that the loop does not wait for the disk."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Generic, Self, TypeVar

B = TypeVar("B")


class PrefetchLoader(Generic[B]):
    """Makes the batches of `steps` in a background thread and yields them in order, once.

    At most `depth` batches are ready or being made at any time, and the consumer holds one more: a
    `make_batch` that reuses buffers needs `depth + 1` of them, used in turn. A batch is the consumer's until
    it asks for the next one; work that outlasts that, such as a copy to a GPU under way, must be waited for.

    The thread starts with the iteration and ends with it, also when the consumer breaks out of the loop or
    raises. It also ends with `close`, for which the loader is a context manager.

    Attributes:
        waited: seconds that the consumer has spent waiting for batches so far.
    """

    def __init__(self, make_batch: Callable[[int], B], steps: range, depth: int = 4) -> None:
        """Prepare to load; nothing is made before the iteration starts.

        Args:
            make_batch: called in the thread with each step in turn; returns the batch of that step. To run
                beside the training loop it has to spend its time where the GIL is free, as
                `ActivationStore.read_rows` does.
            steps: the steps to load.
            depth: number of batches to keep ready, at least 1.

        Raises:
            ValueError: `depth` is not positive.
        """
        if depth < 1:
            raise ValueError(f"depth must be at least 1, not {depth}")
        self.waited = 0.0
        self._make_batch = make_batch
        self._steps = steps
        self._depth = depth
        self._ready: deque[B] = deque()
        self._error: BaseException | None = None
        self._closed = False
        self._changed = threading.Condition()  # guards all of the above
        self._thread: threading.Thread | None = None

    def __iter__(self) -> Iterator[B]:
        """Yield the batches in the order of the steps.

        Raises:
            RuntimeError: the loader was iterated before, or was closed.
            BaseException: whatever `make_batch` raised, after the batches that it made before.
        """
        with self._changed:
            if self._closed or self._thread is not None:
                raise RuntimeError("a loader can be iterated once, and not after it was closed")
            self._thread = threading.Thread(target=self._produce, name="prefetch", daemon=True)
            self._thread.start()
        try:
            for _ in self._steps:
                yield self._take()
        finally:
            self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the thread, after the batch that it is making, and let go of all batches."""
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        thread = self._thread
        # The garbage collector may end an abandoned iteration from any thread, this one included.
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _produce(self) -> None:
        try:
            for step in self._steps:
                with self._changed:
                    self._changed.wait_for(lambda: self._closed or len(self._ready) < self._depth)
                    if self._closed:
                        return
                batch = self._make_batch(step)
                with self._changed:
                    if self._closed:
                        return
                    self._ready.append(batch)
                    del batch  # or it would live on here while the next one is made
                    self._changed.notify_all()
        except BaseException as error:  # whatever it is, it belongs to the consumer
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _take(self) -> B:
        """The next batch, as soon as there is one."""
        began = time.perf_counter()
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._error is not None or self._closed)
            self.waited += time.perf_counter() - began
            if self._ready:
                self._changed.notify_all()
                return self._ready.popleft()
        if self._error is not None:
            raise self._error
        raise RuntimeError("the loader was closed during the iteration")
