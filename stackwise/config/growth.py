"""Sections `growth` and `adapters`: how a rack grows, and what of its trunk still learns."""

from typing import Literal

from pydantic import Field

from stackwise.config.section import Section

BuildingMode = Literal["append", "prepend", "insert"]
TrunkStrategy = Literal["frozen", "qlora", "trainable"]
Kind = Literal["stack", "trunk", "task"]
"""What adapters are for: a new stack, an older one, or what a finished rack is fine-tuned for."""
Pattern = Literal["constant", "linear", "increasing", "decreasing"]


class GrowthParams(Section):
    """How the rack grows: what is cached below the stacks in memory, which these are, and what of them trains."""

    start: str | None = None
    """Directory, or name in the hub's local cache, of a Llama-family model whose blocks are the first stacks, trained
    already (null: none). `model` describes its architecture, its tokenizer comes along, and its embeddings and head."""
    start_stacks: int | None = Field(default=None, ge=1)
    """How many of the `n_stacks` stacks it is cut into (with `start`)."""
    strategy: Literal["progressive", "end_to_end"] = "progressive"
    """`progressive`: stacks are added one after another. `end_to_end`: all exist from the start."""
    end_to_end_scope: Literal["rackwise", "stackwise"] = "rackwise"
    """With `end_to_end`: all stacks train together, or one at a time, in `sweeps` over the rack."""
    mode: Literal["layerwise", "blockwise", "fused"] = "blockwise"
    """`layerwise`: stacks of one block. `blockwise`: of `stack.blocks`. `fused`: the whole trunk takes part in every
    pass, so nothing is cached and masks are fresh in each."""
    fusion_mode: Literal["frozen", "trainable"] = "frozen"
    """With `fused`: whether the trunk learns (gradual growth)."""
    building_mode: BuildingMode = "append"
    """Where a new stack goes: on top, at the bottom, or below the topmost one."""
    trunk_strategy: TrunkStrategy | None = None
    """What learns of the older stacks that are in memory: nothing, adapters on quantized weights (`qlora`), or all
    weights (null: `trainable` with `insert`, with a `window` and with `fusion_mode: trainable`; else `frozen`)."""
    window: int | None = Field(default=0, ge=0)
    """How many older stacks are in memory below a new one and learn (`append`; null: all)."""
    stride: int = Field(default=1, ge=1)
    """How many stacks are added at a time (`append`); they train together, with the settings of the highest."""
    sweeps: int = Field(default=0, ge=0)
    """How many times all stacks are trained once more, each in turn, bottom to top, the others frozen."""
    cache_activations: bool | None = None
    """Whether what the frozen stacks below make of the data is cached on disk, or computed again in every step, one
    stack in memory at a time (null: cached wherever it can be)."""
    masks: Literal["reuse", "redraw"] = "reuse"
    """Whether all stacks see the same mask variants, or each draws its own, with its boundary computed from the tokens
    through all stacks below."""
    unfreeze: float = Field(default=0.0, ge=0, lt=1)
    """Share of a training's steps over which the older stacks that learn are unfrozen, the topmost first (0: all learn
    from the first step)."""
    consistency: float = Field(default=0.0, ge=0)
    """Weight of the distance between what a new stack puts out and what the stacks above it were trained on
    (`prepend`)."""

    @property
    def trunk(self) -> TrunkStrategy:
        """`trunk_strategy`, or what the other keys make of null."""
        if self.trunk_strategy is not None:
            return self.trunk_strategy
        fused = self.mode == "fused" and self.fusion_mode == "trainable"
        return "trainable" if fused or self.window != 0 or self.building_mode == "insert" else "frozen"

    @property
    def has_trunk(self) -> bool:
        """Whether there are stacks that do not learn while others do."""
        if self.strategy == "end_to_end":
            return self.end_to_end_scope == "stackwise"
        every = self.window is None or self.mode == "fused"
        return self.trunk != "trainable" or not every or bool(self.sweeps)

    @property
    def imported(self) -> int:
        """How many stacks, the first ones, come from `start`."""
        return self.start_stacks or 0 if self.start else 0

    def copied_by(self, k: int) -> int | None:
        """The stack that stack `k` may begin as a copy of: a trained neighbour; None if there is none."""
        imported = self.imported
        if self.strategy == "end_to_end" or k < (imported or self.stride):
            return None
        if self.building_mode == "insert":
            return max(0, imported - 1)
        if self.building_mode == "prepend" and k == imported:
            return 0
        return k - (k - imported) % self.stride - 1

    def problems(self) -> list[tuple[str, str]]:
        """Regimes that contradict themselves."""
        if self.strategy == "end_to_end":
            return self._end_to_end_problems()
        found = self._ineffective("strategy: progressive", "end_to_end_scope")
        if self.mode == "fused":
            found += self._ineffective("mode: fused", "building_mode", "window", "masks")
            if self.trunk_strategy not in (None, self.fusion_mode):
                message = f"expected {self.fusion_mode} or null, because fusion_mode is {self.fusion_mode}"
                found.append(("trunk_strategy", message))
            if self.cache_activations:
                message = "expected false or null: with mode fused the whole trunk takes part in every pass"
                found.append(("cache_activations", message))
        else:
            found += self._ineffective(f"mode: {self.mode}", "fusion_mode")
        if self.building_mode != "append":
            found += self._ineffective(f"building_mode: {self.building_mode}", "window", "stride")
        if self.building_mode == "prepend":
            if self.trunk_strategy == "trainable":
                message = "expected frozen or qlora with building_mode prepend; to train all, append with window: null"
                found.append(("trunk_strategy", message))
            if self.cache_activations:
                found.append(
                    ("cache_activations", "expected false or null: below a stack that is prepended is nothing to cache")
                )
        elif self.consistency:
            found.append(("consistency", "has no effect without building_mode: prepend: leave it out"))
        if self.building_mode == "insert" and self.trunk_strategy == "qlora":
            found.append(("trunk_strategy", "expected frozen, trainable or null with building_mode insert"))
        if self.building_mode == "append" and self.mode != "fused":
            if self.window != 0 and self.trunk_strategy == "frozen":
                message = "expected 0, because trunk_strategy is frozen: what does not learn is not kept in the window"
                found.append(("window", message))
            if self.window == 0 and self.trunk_strategy in ("qlora", "trainable"):
                message = (
                    f"expected a number of stacks, or null for all, because trunk_strategy is {self.trunk_strategy}"
                )
                found.append(("window", message))
        if self.window is None and self.cache_activations:
            message = "expected false or null: with window null every stack still learns, so no boundary can be cached"
            found.append(("cache_activations", message))
        if self.unfreeze and self.trunk == "frozen":
            found.append(("unfreeze", "has no effect while no older stack learns: leave it out"))
        if self.sweeps and self.trunk == "qlora":
            found.append(("sweeps", "expected 0 with trunk_strategy qlora, which leaves the stacks quantized"))
        return found

    def _end_to_end_problems(self) -> list[tuple[str, str]]:
        keys = ("mode", "fusion_mode", "building_mode", "trunk_strategy", "window", "stride", "unfreeze", "consistency")
        found = self._ineffective("strategy: end_to_end", *keys)
        if self.end_to_end_scope == "rackwise":
            found += self._ineffective("end_to_end_scope: rackwise", "sweeps", "cache_activations", "masks")
        elif not self.sweeps:
            found.append(("sweeps", "expected at least 1, because end_to_end_scope stackwise trains in sweeps"))
        return found

    def _ineffective(self, because: str, *keys: str) -> list[tuple[str, str]]:
        """Keys that say something where they mean nothing."""
        return [(key, f"has no effect with {because}: leave it out") for key in self.changed(keys)]


class LoRAParams(Section):
    """Low-rank adapters (Hu et al. 2021) of one kind."""

    strategy: Literal["simplified", "progressive", "variable"] = "simplified"
    """`simplified`: all stacks alike. `progressive`: rank and alpha follow patterns over the stacks. `variable`: each
    stack has its own."""
    rank: int = Field(default=8, ge=1)
    """Rank of the adapters of the first stack."""
    alpha: float = Field(default=16.0, gt=0)
    """The update is scaled by alpha / rank; of the first stack."""
    rank_pattern: Pattern = "constant"
    """Rank of stack k (`progressive`): `constant`; `linear`: rank * (k + 1); `increasing`: doubled with each stack;
    `decreasing`: halved with each stack, at least 1."""
    alpha_pattern: Pattern = "constant"
    """Alpha of stack k, likewise; `decreasing` halves it without end."""
    max_rank: int | None = Field(default=None, ge=1)
    """Upper limit of what `rank_pattern` gives (null: none)."""
    ranks: list[int] = Field(default=[])
    """Rank of each stack (`variable`)."""
    alphas: list[float] = Field(default=[])
    """Alpha of each stack (`variable`; empty: `alpha` for all)."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of an adapter's inputs dropped while training."""
    lr: float | None = Field(default=None, gt=0)
    """Peak learning rate of the adapters (null: that of what else trains)."""
    target_modules: list[str] | None = None
    """Names of the projections that get adapters, such as `q_proj` or `down_proj` (null: all)."""

    def rank_of(self, k: int) -> int:
        """The rank of stack `k`'s adapters."""
        if self.strategy == "variable":
            return self.ranks[k]
        rank = round(_follow(self.rank_pattern, self.rank, k))
        return max(1, rank if self.max_rank is None else min(rank, self.max_rank))

    def alpha_of(self, k: int) -> float:
        """The alpha of stack `k`'s adapters."""
        if self.strategy == "variable":
            own: float | None = self.alphas[k] if k < len(self.alphas) else None  # a view has None for none
            return self.alpha if own is None else own
        return _follow(self.alpha_pattern, self.alpha, k)

    def problems(self) -> list[tuple[str, str]]:
        """Keys of another strategy, and values out of range."""
        used = {"progressive": ("rank_pattern", "alpha_pattern", "max_rank"), "variable": ("ranks", "alphas")}
        found = [
            (key, f"has no effect with strategy {self.strategy}: leave it out")
            for strategy, keys in used.items()
            for key in (self.changed(keys) if strategy != self.strategy else ())
        ]
        if any(rank < 1 for rank in self.ranks):
            found.append(("ranks", "expected whole numbers of at least 1"))
        if any(alpha <= 0 for alpha in self.alphas):
            found.append(("alphas", "expected numbers above 0"))
        if self.target_modules == []:
            found.append(("target_modules", "expected at least one name, or null for all projections"))
        return found


class AdaptersParams(Section):
    """Adapters by PEFT. An adapter that is null does not exist."""

    stack: LoRAParams | None = None
    """Of each new stack but the first: it learns nothing else, its own weights stay as they began."""
    trunk: LoRAParams | None = None
    """Of the quantized older stacks, with `growth.trunk_strategy: qlora`."""
    merge: bool = True
    """Whether the fused rack has its adapters merged into its weights; if not, they lie beside them in PEFT's format
    and are merged when it is loaded."""


def _follow(pattern: Pattern, first: float, k: int) -> float:
    """The value of stack `k`."""
    match pattern:
        case "constant":
            return first
        case "linear":
            return first * (k + 1)
        case "increasing":
            return first * 2.0**k
        case "decreasing":
            return first * 2.0**-k
