"""What a training has in memory: modules without numbers, and the sizes of its batches."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from stackwise.config.compute import Precision
from stackwise.config.model import ModelParams
from stackwise.plan import weights
from stackwise.plan.tape import FP32, Device, Meter, Weight
from stackwise.precision.sizes import matrix_bytes, matrix_precision

Compute = Literal["fp32", "bf16", "fp16"]
WIDTHS: dict[str, int] = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Bytes of a number in the formats that compute."""
_ROUNDED = ("full", "half", "bfloat16")
"""The formats that round each number by itself."""


@dataclass(frozen=True)
class Sizes:
    """Of what goes through a rack at once."""

    batch: int
    seq: int
    rows: int
    """Tokens that the loss asks for."""
    causal: bool = False
    segments: bool = False
    """Whether attention stays within documents."""

    @property
    def tokens(self) -> int:
        """Of the batch."""
        return self.batch * self.seq


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters on a stack."""

    rank: int
    targets: frozenset[str] | None = None
    """Names of projections (None: all)."""
    dropout: bool = False
    """Whether their inputs are dropped out."""
    learns: bool = True


@dataclass(frozen=True)
class Vocabulary:
    """Sizes of the ends of a rack."""

    model: ModelParams
    """Its architecture."""
    size: int
    """V."""
    embedding_width: int
    """Of the table of the embeddings: `d_model`, or that of the model it comes from."""
    head_width: int
    """Of the projection to the vocabulary: likewise."""


@dataclass(frozen=True)
class StackPlan:
    """A stack, and what becomes of it in a training."""

    model: ModelParams
    """Its architecture."""
    blocks: int
    learns: bool = False
    """Whether its own weights do."""
    precision: Precision | None = None
    """The format of a trunk in which they are; None: fp32, as they are trained."""
    adapters: tuple[LoRA, ...] = ()

    @property
    def trains(self) -> bool:
        """Whether anything of it learns; if not, it computes as in use, without dropout."""
        return self.learns or any(adapters.learns for adapters in self.adapters)


@dataclass(frozen=True)
class Projection:
    """A linear map, with the adapters on it."""

    weight: Weight
    bias: Weight | None = None
    adapters: tuple[tuple[Weight, Weight, bool], ...] = ()
    """A, B, and whether what goes into A is dropped out."""

    def __iter__(self) -> Iterator[Weight]:
        yield self.weight
        if self.bias is not None:
            yield self.bias
        for a, b, _ in self.adapters:
            yield from (a, b)


@dataclass(frozen=True)
class Block:
    """A block."""

    model: ModelParams
    projections: Mapping[str, Sequence[Projection]]
    """By their names in `stackwise.plan.weights`, one for each expert."""
    norms: Mapping[str, Weight]
    features: Weight | None
    """Random frequencies of a kernel."""

    def projection(self, leaf: str) -> Projection:
        """The one whose name ends so."""
        return next(ps[0] for name, ps in self.projections.items() if name.rpartition(".")[2] == leaf)

    def __iter__(self) -> Iterator[Weight]:
        for projections in self.projections.values():
            for projection in projections:
                yield from projection
        yield from self.norms.values()


@dataclass(frozen=True)
class Stack:
    """A stack."""

    blocks: Sequence[Block]
    time: Mapping[str, Projection]
    """Of the embedding of the mask rate; empty if there is none."""
    trains: bool
    """Whether it is in training mode."""

    def __iter__(self) -> Iterator[Weight]:
        for block in self.blocks:
            yield from block
        for projection in self.time.values():
            yield from projection


@dataclass(frozen=True)
class Embeddings:
    """The embeddings."""

    table: Weight
    mask: Weight
    adapter: tuple[Projection, ...]
    """Two linear maps, or none."""

    def __iter__(self) -> Iterator[Weight]:
        yield from (self.table, self.mask)
        for projection in self.adapter:
            yield from projection


@dataclass(frozen=True)
class Head:
    """The head."""

    norm: Weight
    projection: Weight
    adapter: tuple[Projection, ...]

    def __iter__(self) -> Iterator[Weight]:
        yield from (self.norm, self.projection)
        for projection in self.adapter:
            yield from projection


class Builder:
    """Puts modules into memory."""

    def __init__(self, meter: Meter, device: Device) -> None:
        self._meter, self._device = meter, device

    def stack(self, plan: StackPlan, compute: Compute, rounded: Compute | None = None) -> Stack:
        """A stack.

        Args:
            plan: what it is.
            compute: the format of its products.
            rounded: the format that its weights of 16 and 32 bits are rounded to, if it is of a trunk (None:
                `compute`).
        """
        rounded = rounded or compute
        own = weights.block_weights(plan.model)
        blocks = [
            Block(
                plan.model,
                {m.name: [self._projection(plan, m, compute, rounded) for _ in range(m.count)] for m in own.matrices},
                {name: self._vector(width, learns=plan.learns) for name, width in own.norms.items()},
                self._vector(own.features, learns=False) if own.features else None,
            )
            for _ in range(plan.blocks)
        ]
        time = weights.time_weights(plan.model)
        return Stack(blocks, {m.name: self._projection(plan, m, compute, rounded) for m in time.matrices}, plan.trains)

    def embeddings(self, vocabulary: Vocabulary, *, learns: bool) -> Embeddings:
        """The embeddings; of a table that does not train the mask's row and the adapter learn in its place.

        Args:
            vocabulary: sizes.
            learns: whether they learn in this training.
        """
        model = vocabulary.model
        part = weights.embeddings_weights(model, vocabulary.size, vocabulary.embedding_width)
        table, mask, *adapter = part.matrices
        return Embeddings(
            self._matrix(table, learns=learns and model.embeddings.train),
            self._matrix(mask, learns=learns),
            tuple(Projection(self._matrix(matrix, learns=learns)) for matrix in adapter),
        )

    def head(self, vocabulary: Vocabulary, embeddings: Embeddings | None, *, learns: bool = True) -> Head:
        """The head. It learns, but for a projection that does not train or is tied to embeddings that do not learn.

        Args:
            vocabulary: sizes.
            embeddings: to which it may be tied.
            learns: whether it learns at all.
        """
        model = vocabulary.model
        part = weights.head_weights(model, vocabulary.size, vocabulary.head_width)
        own = {matrix.name: matrix for matrix in part.matrices}
        if model.tie_embeddings:
            assert embeddings is not None, "a head that is tied wants embeddings"
            projection = embeddings.table
        else:
            projection = self._matrix(own.pop("projection"), learns=learns and model.head.train)
        adapter = tuple(Projection(self._matrix(matrix, learns=learns)) for matrix in own.values())
        return Head(self._vector(model.d_model, learns=learns), projection, adapter)

    def classification_head(self, model: ModelParams, classes: int) -> Head:
        """The head of a classifier, which learns.

        Args:
            model: the architecture.
            classes: how many it tells apart.
        """
        projection = weights.Matrix("projection", classes, model.d_model)
        return Head(self._vector(model.d_model, learns=True), self._matrix(projection, learns=True), ())

    def _projection(self, plan: StackPlan, matrix: weights.Matrix, compute: Compute, rounded: Compute) -> Projection:
        bias = self._vector(matrix.rows, learns=plan.learns) if matrix.bias else None
        adapters = []
        for lora in plan.adapters:
            if matrix.projects and (lora.targets is None or matrix.leaf in lora.targets):
                a, b = (self._matrix(part, learns=lora.learns) for part in weights.lora_matrices(matrix, lora.rank))
                adapters.append((a, b, lora.dropout and lora.learns))
        return Projection(self._weight(plan, matrix, compute, rounded), bias, tuple(adapters))

    def _weight(self, plan: StackPlan, matrix: weights.Matrix, compute: Compute, rounded: Compute) -> Weight:
        shape, width = (matrix.rows, matrix.columns), WIDTHS[compute]
        if plan.precision is None or matrix.is_table:
            return self._matrix(matrix, learns=plan.learns)
        if matrix.drawn:
            return Weight(self._meter, shape, learns=False, width=WIDTHS[rounded])
        precision = matrix_precision(matrix.name, held(plan.precision, rounded))
        if precision == "full":
            return self._matrix(matrix, learns=False)
        return Weight(
            self._meter,
            shape,
            learns=False,
            width=width,
            stored=matrix_bytes(*shape, precision),
            unpacking=round(_unpacking(precision, width, self._device) * matrix.rows * matrix.columns),
        )

    def _matrix(self, matrix: weights.Matrix, *, learns: bool) -> Weight:
        shape = matrix.rows, matrix.columns
        return Weight(self._meter, shape, learns=learns and not matrix.drawn, width=FP32)

    def _vector(self, size: int, *, learns: bool) -> Weight:
        return Weight(self._meter, (size, 1), learns=learns, width=FP32)


def held(precision: Precision, compute: Compute) -> Precision:
    """The format in memory of a stack that is stored in `precision`: what only rounds is rounded to what computes,
    unless that has more bits (`stackwise.precision.trunk.TrunkStack.load_stack`)."""
    to: dict[Compute, Precision] = {"bf16": "bfloat16", "fp16": "half"}
    return to.get(compute, precision) if precision in _ROUNDED else precision


def _unpacking(precision: Precision, width: int, device: Device) -> float:
    """Bytes that each number takes, besides the result, while a matrix is decoded: as an index, and in fp32 together
    with its scaled value where a CPU scales narrow numbers by fp32."""
    index = {"fp8": 4.0, "nvfp4": 2.25, "nf4": 1 / 16, "fp4": 1 / 16}.get(precision, 0.0)
    scales = 0.25 if precision == "nvfp4" else 0.0
    scaled = 8.0 + scales if device == "cpu" and width < FP32 and precision in ("int8", "fp8", "nvfp4") else 0.0
    return max(index, scaled)
