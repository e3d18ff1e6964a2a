"""How many weights the parts of a rack have, and in which shapes.

Names and shapes are those of the modules in `stackwise.model`, `stackwise.attention` and `stackwise.mlp`.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace

from stackwise.config.compute import Precision
from stackwise.config.model import ModelParams
from stackwise.precision.sizes import matrix_bytes, matrix_precision

_SEED = 8
"""Bytes of a seed."""


@dataclass(frozen=True)
class Matrix:
    """A two-dimensional weight, or several alike."""

    name: str
    """Of its module within the block (within the stack, the embeddings, the head)."""
    rows: int
    """Width of what comes out."""
    columns: int
    """Width of what goes in."""
    count: int = 1
    """How many of this shape a block has: experts."""
    bias: bool = False
    """Whether a vector `[rows]` is added."""
    drawn: bool = False
    """Whether it is random and stored as a seed (`stackwise.model.frozen`)."""

    @property
    def size(self) -> int:
        """Numbers of all of them, without biases."""
        return self.rows * self.columns * self.count

    @property
    def leaf(self) -> str:
        """The last part of its name, by which adapters find it."""
        return self.name.rpartition(".")[2]

    @property
    def projects(self) -> bool:
        """Whether it is a projection of an attention or a feed-forward network: what can have adapters."""
        *path, leaf = self.name.split(".")
        return not self.drawn and leaf != "router" and ("attention" in path or "mlp" in path)

    @property
    def is_table(self) -> bool:
        """Whether its rows are looked up, not multiplied."""
        return self.leaf == "table"


@dataclass(frozen=True)
class Part:
    """The weights of a part of a rack."""

    matrices: tuple[Matrix, ...]
    """All that has two dimensions."""
    norms: Mapping[str, int] = field(default_factory=dict)
    """Width of each norm."""
    features: int = 0
    """Numbers in random frequencies of kernels."""
    seeds: int = 0
    """Random tensors of which the seed is stored."""

    @property
    def vectors(self) -> int:
        """Numbers in norms and biases, which keep fp32 in every format."""
        return sum(self.norms.values()) + sum(m.rows * m.count for m in self.matrices if m.bias)

    @property
    def learnable(self) -> int:
        """Weights: what is stored, and trains unless it is frozen."""
        return sum(m.size for m in self.matrices if not m.drawn) + self.vectors

    @property
    def drawn(self) -> int:
        """Numbers that are in memory and neither train nor are stored."""
        return sum(m.size for m in self.matrices if m.drawn) + self.features

    def stored_bytes(self, precision: Precision) -> int:
        """What is written of it in a format: weights, and a seed for each random tensor."""
        return (
            4 * self.vectors
            + _SEED * self.seeds
            + sum(
                m.count * matrix_bytes(m.rows, m.columns, "full" if m.is_table else matrix_precision(m.name, precision))
                for m in self.matrices
                if not m.drawn
            )
        )


@dataclass(frozen=True)
class Heads:
    """Sizes of an attention, as its modules derive them from the parameters."""

    queries: int
    """Heads of queries."""
    keys: int
    """Heads of keys and values."""
    width: int
    """Of a query and of a key."""
    v_width: int
    """Of a value."""
    rope: int
    """Of the rotated part of a query and of a key."""
    features: int
    """Of a query and of a key, where a kernel mixes; else 0."""
    random: bool
    """Whether they are made with random frequencies."""

    @classmethod
    def of(cls, model: ModelParams) -> "Heads":
        """Those of a block."""
        a = model.attention
        head = a.head_dim or model.d_model // a.n_heads
        width, v_width, rope = head, head, head
        if a.uses_latents:
            rope = a.rope_dim(head)
            width, v_width = (a.mla_nope_dim or head - rope) + rope, a.mla_v_dim or head
        by_kernel = a.type in ("kernel", "mlgka")
        random = by_kernel and a.kernel != "linear"
        features = (a.features or 2 * width if random else width) if by_kernel else 0
        keys = a.n_kv_heads if a.n_kv_heads and a.type != "mla" else a.n_heads
        return cls(a.n_heads, keys, width, v_width, rope, features, random)


def stack_weights(model: ModelParams, blocks: int) -> Part:
    """Those of a stack.

    Args:
        model: its architecture.
        blocks: their number.
    """
    block, time = block_weights(model), time_weights(model)
    paths = [f"blocks.{i}." for i in range(blocks)]
    return Part(
        tuple(replace(matrix, name=path + matrix.name) for path in paths for matrix in block.matrices) + time.matrices,
        {path + name: width for path in paths for name, width in block.norms.items()},
        block.features * blocks,
        block.seeds * blocks,
    )


def block_weights(model: ModelParams) -> Part:
    """Those of one block."""
    matrices, heads = (*_attention(model), *_mlp(model), *_modulation(model)), Heads.of(model)
    norms = {"attention_norm": model.d_model, "mlp_norm": model.d_model, **_attention_norms(model, heads)}
    features = heads.keys * (heads.features // 2) * heads.width if heads.random else 0
    return Part(matrices, norms, features, sum(m.count for m in matrices if m.drawn) + heads.random)


def time_weights(model: ModelParams) -> Part:
    """Those of a stack's embedding of the mask rate (`model.time.mode: input`)."""
    time = model.time
    if time.mode != "input":
        return Part(())
    matrices = tuple(Matrix(f"time.{name}", time.width, time.width, bias=True) for name in ("hidden", "output"))
    if time.embedding == "learned":
        matrices = (Matrix("time.table", time.bins or 1, time.width), *matrices)
    return Part(matrices)


def embeddings_weights(model: ModelParams, vocab_size: int, width: int) -> Part:
    """Those of the input embeddings.

    Args:
        model: the architecture.
        vocab_size: V.
        width: of the table: `d_model`, or that of the model it comes from.
    """
    table = (Matrix("table", vocab_size, width), Matrix("mask", 1, width))
    return Part((*table, *_adapter(width, model.embeddings.adapter_hidden, model.d_model)))


def head_weights(model: ModelParams, vocab_size: int, width: int) -> Part:
    """Those of the final norm and the projection; a tied projection is counted with the embeddings.

    Args:
        model: the architecture.
        vocab_size: V.
        width: of the projection: `d_model`, or that of the model it comes from.
    """
    matrices = _adapter(model.d_model, model.head.adapter_hidden, width)
    if not model.tie_embeddings:
        matrices += (Matrix("projection", vocab_size, width),)
    return Part(matrices, {"norm": model.d_model})


def lora_weights(part: Part, rank: int, targets: Collection[str] | None) -> Part:
    """Those of low-rank adapters: `A` `[rank, columns]` and `B` `[rows, rank]` of every matrix that has one.

    Args:
        part: weights of a stack or a block.
        rank: of the adapters.
        targets: names of projections such as `q_proj` (None: all).
    """
    adapted = [m for m in part.matrices if m.projects and (targets is None or m.leaf in targets)]
    return Part(tuple(matrix for m in adapted for matrix in lora_matrices(m, rank)))


def lora_matrices(matrix: Matrix, rank: int) -> tuple[Matrix, Matrix]:
    """A and B of one projection (or of several alike)."""
    return (
        Matrix(f"{matrix.name}.lora_A", rank, matrix.columns, matrix.count),
        Matrix(f"{matrix.name}.lora_B", matrix.rows, rank, matrix.count),
    )


def _attention(model: ModelParams) -> Iterator[Matrix]:
    d, a, heads = model.d_model, model.attention, Heads.of(model)
    queries = heads.queries * heads.width
    if a.uses_latents:
        assert a.mla_rkv is not None, "the validation of params.yaml asks for it"
        if a.mla_rq is None:
            yield Matrix("attention.projections.q_proj", queries, d)
        else:
            yield Matrix("attention.projections.q_a_proj", a.mla_rq, d)
            yield Matrix("attention.projections.q_b_proj", queries, a.mla_rq)
        yield Matrix("attention.projections.kv_a_proj", a.mla_rkv + heads.rope, d)
        nope = heads.width - heads.rope
        yield Matrix("attention.projections.kv_b_proj", heads.keys * (nope + heads.v_width), a.mla_rkv)
    else:
        yield Matrix("attention.q_proj", queries, d)
        yield Matrix("attention.k_proj", heads.keys * heads.width, d)
        yield Matrix("attention.v_proj", heads.keys * heads.v_width, d)
    yield Matrix("attention.o_proj", d, heads.queries * heads.v_width)


def _attention_norms(model: ModelParams, heads: Heads) -> dict[str, int]:
    a = model.attention
    if a.uses_latents:
        found = {"attention.projections.q_a_norm": a.mla_rq, "attention.projections.kv_a_norm": a.mla_rkv}
        return {name: width for name, width in found.items() if width is not None}
    return {f"attention.{name}_norm": heads.width for name in ("q", "k") if a.qk_norm}


def _mlp(model: ModelParams) -> Iterator[Matrix]:
    d, mlp = model.d_model, model.mlp
    if mlp.type == "moe":
        yield Matrix("mlp.router", mlp.n_experts, d)
        networks = {"mlp.experts": mlp.n_experts, "mlp.shared": mlp.n_shared}
    else:
        networks = {"mlp": 1}
    for name, count in networks.items():
        if count:
            yield Matrix(f"{name}.gate_proj", mlp.hidden, d, count, drawn=mlp.frozen_up)
            yield Matrix(f"{name}.up_proj", mlp.hidden, d, count, drawn=mlp.frozen_up)
            yield Matrix(f"{name}.down_proj", d, mlp.hidden, count)


def _modulation(model: ModelParams) -> Iterator[Matrix]:
    if model.time.mode == "input":
        yield Matrix("modulation", 6 * model.d_model, model.time.width, bias=True)


def _adapter(d_in: int, hidden: int | None, d_out: int) -> tuple[Matrix, ...]:
    if hidden is None:
        return ()
    return Matrix("adapter.hidden", hidden, d_in), Matrix("adapter.output", d_out, hidden)
