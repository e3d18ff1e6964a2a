"""Tensors without numbers: a computation takes, keeps and gives back memory, and is counted, but nothing is computed.

A `Tape` stands where PyTorch and its autograd stand. Its tensors have a size and a format and no values. They live for
as long as somebody refers to them, as PyTorch's do: so code that says what the modules do tells what is in memory at
every moment of a training step.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

Kind = Literal["weights", "frozen", "optimizer", "gradients", "activations"]
"""What memory is for: weights that learn, others, the optimizer's state, gradients, and all that comes and goes."""
Device = Literal["cpu", "cuda"]
FP32 = 4
"""Bytes of a number."""
GRANULARITY: dict[Device, int] = {"cpu": 1, "cuda": 512}
"""Bytes that PyTorch's allocator counts at a time."""


@dataclass
class Flops:
    """Floating-point operations of matrix products, 2 for a multiplication and an addition, as
    `torch.utils.flop_counter` counts them."""

    forward: int = 0
    again: int = 0
    """Forward once more, for activations that were not kept."""
    to_inputs: int = 0
    """Backward: gradients of what goes into products."""
    to_weights: int = 0
    """Backward: gradients of weights."""

    @property
    def total(self) -> int:
        """All of them."""
        return self.forward + self.again + self.to_inputs + self.to_weights

    def times(self, n: int) -> "Flops":
        """Those of `n` such passes."""
        return Flops(self.forward * n, self.again * n, self.to_inputs * n, self.to_weights * n)


class Meter:
    """Bytes that are taken, and the most that ever were."""

    def __init__(self, granularity: int = 1) -> None:
        """
        Args:
            granularity: bytes that the allocator hands out at a time.
        """
        self.live: Counter[Kind] = Counter()
        self.peak: Counter[Kind] = Counter()
        """What was taken at the moment of the peak."""
        self._granularity = granularity
        self._total = self._most = 0

    def take(self, number: int, kind: Kind) -> int:
        """Take memory for so many bytes; returns what was taken."""
        number += -number % self._granularity
        self.live[kind] += number
        self._total += number
        if self._total > self._most:
            self._most = self._total
            self.peak = self.live.copy()
        return number

    def give_back(self, number: int, kind: Kind) -> None:
        """Give back what was taken."""
        self.live[kind] -= number
        self._total -= number


class Storage:
    """Memory, taken now and given back when nobody refers to it any more."""

    __slots__ = ("_meter", "_taken", "kind")

    def __init__(self, meter: Meter, number: int, kind: Kind = "activations") -> None:
        self._meter, self.kind = meter, kind
        self._taken = meter.take(number, kind)

    def become(self, kind: Kind) -> None:
        """Be counted as something else from now on."""
        self._meter.give_back(self._taken, self.kind)
        self.kind = kind
        self._meter.take(self._taken, kind)

    def __del__(self) -> None:
        self._meter.give_back(self._taken, self.kind)


class Tensor:
    """A number of elements in memory."""

    __slots__ = ("node", "size", "storage", "width")

    def __init__(self, size: int, width: int, storage: Storage, node: "Node | None" = None) -> None:
        """
        Args:
            size: elements.
            width: bytes of each.
            storage: where they are; views share it.
            node: where a gradient goes; None if none is wanted.
        """
        self.size, self.width, self.storage, self.node = size, width, storage, node


Gradients = Sequence[Tensor | None]


class Node:
    """An operation that has been recorded: what it keeps, and what its gradient does."""

    def __init__(
        self,
        inputs: "Sequence[Node | None]" = (),
        backward: Callable[[list[Tensor]], Gradients] | None = None,
        kept: Iterable[Storage] = (),
    ) -> None:
        self.inputs, self.backward, self.kept = inputs, backward, list(kept)
        self.gradients: list[Tensor] = []

    def receive(self, gradient: Tensor) -> None:
        """A gradient of the output; another is added to the first, in its place."""
        if not self.gradients:
            self.gradients.append(gradient)


class _Pieces(Node):
    """What has been split: the gradients of the pieces do not add up, they lie side by side."""

    def receive(self, gradient: Tensor) -> None:
        self.gradients.append(gradient)


class Weight(Node):
    """A weight, in memory all the time."""

    def __init__(
        self,
        meter: Meter,
        shape: tuple[int, int],
        *,
        learns: bool,
        width: int,
        stored: int | None = None,
        unpacking: int = 0,
    ) -> None:
        """
        Args:
            meter: of the memory.
            shape: rows and columns; a vector has one column.
            learns: whether it gets a gradient.
            width: bytes of a number, as products have it.
            stored: bytes that it takes in the format of a trunk; None: it is an ordinary weight.
            unpacking: bytes that are taken, besides the result, while it is brought from that format to `width`.
        """
        super().__init__()
        (self.rows, self.columns), self.learns, self.width = shape, learns, width
        plain = width * self.size
        self.is_stored, self.is_packed, self.unpacking = stored is not None, stored not in (None, plain), unpacking
        self.storage = Storage(meter, plain if stored is None else stored, "weights" if learns else "frozen")
        self.gradient: Tensor | None = None
        self.update: Callable[[], None] | None = None
        """Called as soon as the gradient is complete, which is then dropped."""
        self._expected = 0

    @property
    def size(self) -> int:
        """Elements."""
        return self.rows * self.columns

    def use(self) -> "Weight | None":
        """Where an operation sends this weight's gradient."""
        self._expected += self.learns
        return self if self.learns else None

    def receive(self, gradient: Tensor) -> None:
        """One of the gradients that it gets; the last completes it."""
        super().receive(gradient)
        self._expected -= 1
        if self._expected:
            return
        if self.gradient is None:
            self.gradient = self.gradients[0]
            self.gradient.storage.become("gradients")
        self.gradients.clear()
        if self.update is not None:
            self.update()
            self.gradient = None


class Tape:
    """Takes the place of PyTorch: makes tensors, records operations, goes back through them."""

    def __init__(self, meter: Meter, *, compute: int, device: Device = "cpu") -> None:
        """
        Args:
            meter: of the memory.
            compute: bytes of a number in matrix products; less than 4 is autocast.
            device: that computes.
        """
        self.meter, self.flops, self.device = meter, Flops(), device
        self.compute = compute
        self._recording = True
        self._nodes: list[Node] = []
        self._casts: dict[Weight, Tensor] = {}
        self._needed = 0  # operations until the last that keeps something

    def new(self, size: int, width: int) -> Tensor:
        """A tensor of `size` elements of `width` bytes."""
        return Tensor(size, width, Storage(self.meter, size * width))

    def record(
        self,
        out: Tensor,
        inputs: Sequence[Tensor | Weight],
        backward: Callable[[list[Tensor]], Gradients],
        keep: Iterable[Storage | None] = (),
        *,
        flops: int = 0,
    ) -> Tensor:
        """Note how `out` was made, if anything that it was made of wants a gradient; returns it.

        Args:
            out: the result.
            inputs: what it was made of.
            backward: the gradients of `inputs` from that of `out`; must refer to no tensor.
            keep: what stays in memory until then.
            flops: operations that it took.
        """
        if any(map(self.wants, inputs)):
            kept = [storage for storage in keep if storage is not None]
            out.node = Node([i.use() if isinstance(i, Weight) else i.node for i in inputs], backward, kept)
            self._nodes.append(out.node)
            if kept:
                self._needed = self.flops.forward
        self.flops.forward += flops
        return out

    def wants(self, x: Tensor | Weight) -> bool:
        """Whether a gradient of `x` will be asked for."""
        return self._recording and (x.learns if isinstance(x, Weight) else x.node is not None)

    @contextmanager
    def no_grad(self) -> Iterator[None]:
        """Nothing is recorded."""
        before, self._recording = self._recording, False
        try:
            yield
        finally:
            self._recording = before

    @contextmanager
    def autocast(self, compute: int) -> Iterator[None]:
        """Matrix products in numbers of other bytes."""
        before, self.compute = self.compute, compute
        try:
            yield
        finally:
            self.compute = before

    def end_autocast(self) -> None:
        """What autocast has kept of weights goes, but for what is kept for gradients."""
        self._casts.clear()

    def backward(self, out: Tensor) -> None:
        """Go back from a loss to the weights."""
        assert out.node is not None, "nothing learns"
        out.node.receive(self.new(1, FP32))
        out.node = None
        self._run()

    def _run(self) -> None:
        while self._nodes:
            node = self._nodes.pop()
            if node.gradients and node.backward is not None:
                found = node.backward(node.gradients)
                node.gradients = []
                node.kept.clear()
                for target, gradient in zip(node.inputs, found, strict=True):
                    if target is not None and gradient is not None:
                        target.receive(gradient)
                del found, gradient
            node.backward = None

    def checkpoint(self, function: Callable[[Tensor], Tensor], x: Tensor, *, learns: bool) -> Tensor:
        """`function(x)`, of which only `x` is kept: the rest is computed again on the way back.

        As `torch.utils.checkpoint` does, which stops when it has all that had been kept.

        Args:
            function: makes a tensor of a tensor, and of weights.
            x: what goes in.
            learns: whether one of the weights does.
        """
        if not self._recording or not (learns or x.node is not None):
            return function(x)
        with self.no_grad():
            out = function(x)
        entry, inside, size, width, storage = x.node, Node(), x.size, x.width, x.storage

        def backward(gradients: list[Tensor]) -> Gradients:
            outer, self._nodes = self._nodes, []
            casts, self._casts = self._casts, {}
            before = self.flops.forward
            again = function(Tensor(size, width, storage, None if entry is None else inside))
            self.flops.again += self._needed - before
            self.flops.forward = before
            self._casts = casts
            assert again.node is not None
            again.node.receive(gradients[0])
            del again
            self._run()
            self._nodes = outer
            return [inside.gradients.pop() if inside.gradients else None]

        out.node = Node([entry], backward, [x.storage])
        self._nodes.append(out.node)
        return out

    # Operations.

    def map(self, x: Tensor, keep: Literal["input", "output"] | None = None, *, steps: int = 1) -> Tensor:
        """A function of each element.

        Args:
            x: its input.
            keep: what its gradient needs.
            steps: tensors that are made on the way, each from the one before.
        """
        out = x
        for _ in range(steps):
            out = self.new(x.size, x.width)
        size, width = x.size, x.width
        kept = {"input": x.storage, "output": out.storage, None: None}[keep]
        return self.record(out, [x], lambda gradients: [self.new(size, width)], [kept])

    def copy(self, x: Tensor) -> Tensor:
        """The same in another order."""
        return self.record(self.new(x.size, x.width), [x], lambda gradients: [gradients[0]])

    def cast(self, x: Tensor, width: int) -> Tensor:
        """The same in numbers of other bytes."""
        if x.width == width:
            return x
        size, before = x.size, x.width
        return self.record(self.new(size, width), [x], lambda gradients: [self.new(size, before)])

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """`x + y`, in the wider of their formats; CPUs first bring the narrower one to it."""
        widths = x.width, y.width
        out = self.new(max(x.size, y.size), max(widths))
        same = self.new(min(x.size, y.size), out.width) if widths[0] != widths[1] and self.device == "cpu" else None
        del same

        def backward(gradients: list[Tensor]) -> Gradients:
            (gradient,) = gradients
            return [gradient if w == gradient.width else self.new(gradient.size, w) for w in widths]

        return self.record(out, [x, y], backward)

    def cat(self, pieces: Sequence[Tensor]) -> Tensor:
        """Side by side in one."""
        sizes, width = [piece.size for piece in pieces], pieces[0].width

        def backward(gradients: list[Tensor]) -> Gradients:
            return [Tensor(size, width, gradients[0].storage) for size in sizes]

        return self.record(self.new(sum(sizes), width), pieces, backward)

    def split(self, x: Tensor, *sizes: int) -> list[Tensor]:
        """Views of the pieces of `x`."""
        size, width = x.size, x.width
        pieces = [Tensor(part, width, x.storage) for part in sizes]
        if self.wants(x):
            whole = _Pieces([x.node], lambda gradients: [self.new(size, width)])
            self._nodes.append(whole)
            for piece in pieces:
                piece.node = Node([whole], lambda gradients: [gradients[0]])
                self._nodes.append(piece.node)
        return pieces

    def resize(self, x: Tensor, size: int, *, view: bool = False) -> Tensor:
        """With more or fewer elements: padded, cut, gathered, summed.

        Args:
            x: its input.
            size: elements of the result.
            view: whether the result is a part of `x`'s memory.
        """
        before, width = x.size, x.width
        out = Tensor(size, width, x.storage) if view else self.new(size, width)
        return self.record(out, [x], lambda gradients: [self.new(before, width)])

    def scale(self, x: Tensor, factor: Tensor) -> Tensor:
        """`x * factor`; a smaller factor is repeated."""
        size, width, factors = x.size, max(x.width, factor.width), factor.size
        wanted = self.wants(x), self.wants(factor)

        def backward(gradients: list[Tensor]) -> Gradients:
            inner = self.new(size, width) if wanted[0] else None
            products = self.new(size, width) if wanted[1] else None
            return [inner, products if factors == size or products is None else self.new(factors, width)]

        keep = (x.storage if wanted[1] else None, factor.storage if wanted[0] else None)
        return self.record(self.new(size, width), [x, factor], backward, keep)

    def linear(self, x: Tensor, weight: Weight, bias: Weight | None = None) -> Tensor:
        """`x W^T + b`: `[n, columns of W]` -> `[n, rows of W]`; under autocast in its format."""
        if self.compute < FP32:
            x = self.cast(x, self.compute)
        w = self._operand(weight, x.width)
        inputs = [x, w] if bias is None else [x, w, bias]
        wanted = [self.wants(i) for i in inputs]
        size, width, elements, rows = x.size, x.width, weight.size, weight.rows
        flops = 2 * size * rows

        def backward(gradients: list[Tensor]) -> Gradients:
            found: list[Tensor | None] = [None] * len(wanted)
            if wanted[0]:
                again = self._unpacked(weight, width) if weight.is_packed else None
                found[0] = self.new(size, width)
                del again
                self.flops.to_inputs += flops
            if wanted[1]:
                found[1] = self.new(elements, width)
                self.flops.to_weights += flops
            if wanted[2:] == [True]:
                found[2] = self.new(rows, FP32)
            return found

        out = self.new(size // weight.columns * rows, width)
        if weight.is_stored:  # an operation of its own, which keeps what is stored when it is done
            self.flops.forward += flops
            return self.record(out, inputs, backward, [weight.storage])
        keep = (x.storage if wanted[1] else None, w.storage if wanted[0] else None)
        return self.record(out, inputs, backward, keep, flops=flops)

    def product(self, x: Tensor, y: Tensor, batch: int, m: int, inner: int, n: int) -> Tensor:
        """`[batch, m, inner] @ [batch, inner, n]`."""
        flops = 2 * batch * m * inner * n
        sizes, width, wanted = (x.size, y.size), x.width, (self.wants(x), self.wants(y))

        def backward(gradients: list[Tensor]) -> Gradients:
            self.flops.to_inputs += flops * sum(wanted)
            return [self.new(size, width) if is_wanted else None for size, is_wanted in zip(sizes, wanted, strict=True)]

        keep = (x.storage if wanted[1] else None, y.storage if wanted[0] else None)
        return self.record(self.new(batch * m * n, width), [x, y], backward, keep, flops=flops)

    def _operand(self, weight: Weight, width: int) -> Tensor | Weight:
        """A weight as a product takes it."""
        if weight.is_packed:
            return self._unpacked(weight, width)
        if weight.width == width:
            return weight
        if weight in self._casts:
            return self._casts[weight]
        size = weight.size
        out = self.record(self.new(size, width), [weight], lambda gradients: [self.new(size, FP32)])
        if weight.learns:
            self._casts[weight] = out
        return out

    def _unpacked(self, weight: Weight, width: int) -> Tensor:
        out = self.new(weight.size, width)
        beside = self.new(weight.unpacking, 1)
        del beside
        return out
