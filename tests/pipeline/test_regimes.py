"""Every regime of growth with every format of the trunk, and with every strategy of adapters: through the pipeline
where it is allowed, to its message where it is not."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pytest

from stackwise.config.compute import Precision
from stackwise.config.params import load
from stackwise.errors import UserError
from tests.conftest import COVERED
from tests.pipeline.inprocess import SHOWING, Changes, Pipeline, project, written

COMMON: Changes = {
    "n_stacks": 2,
    "stack.steps": 2,
    "stack.init": "copy",
    "stacks": [],
    "fine_tune": {},
    "evaluate.samples": 2,
}
REGIMES: dict[str, Changes] = {
    "layerwise": {"growth.mode": "layerwise"},
    "blockwise": {"stack.blocks": 2},
    "blockwise, masks redrawn": {"growth.masks": "redraw"},
    "blockwise, not cached": {"growth.cache_activations": False},
    "fused, frozen": {"growth.mode": "fused"},
    "fused, trainable": {"growth.mode": "fused", "growth.fusion_mode": "trainable"},
    "window 1": {"n_stacks": 3, "growth.window": 1},
    "window all": {"n_stacks": 3, "growth.window": None},
    "window 1, stride 2": {"n_stacks": 3, "growth.window": 1, "growth.stride": 2},
    "window 1, unfreezing": {"n_stacks": 3, "growth.window": 1, "growth.unfreeze": 0.5},
    "insert, trainable": {"n_stacks": 3, "growth.building_mode": "insert"},
    "insert, frozen": {"n_stacks": 3, "growth.building_mode": "insert", "growth.trunk_strategy": "frozen"},
    "prepend, frozen": {"growth.building_mode": "prepend"},
    "prepend, qlora": {"growth.building_mode": "prepend", "growth.trunk_strategy": "qlora"},
    "depth as time": {
        "n_stacks": 3,
        "growth.building_mode": "prepend",
        "growth.trunk_strategy": "qlora",
        "growth.consistency": 0.5,
        "model.time": {"mode": "depth"},
    },
    "qlora, window 1": {"n_stacks": 3, "growth.trunk_strategy": "qlora", "growth.window": 1},
    "qlora, window all": {"n_stacks": 3, "growth.trunk_strategy": "qlora", "growth.window": None},
    "sweeps after growth": {"growth.sweeps": 1},
    "end to end, rackwise": {"growth.strategy": "end_to_end", "stack.init": "random"},
    "end to end, stackwise": {
        "growth.strategy": "end_to_end",
        "growth.end_to_end_scope": "stackwise",
        "growth.sweeps": 2,
        "stack.init": "random",
    },
}
_STRATEGIES: dict[str, dict[str, Any]] = {
    "simplified": {"rank": 2},
    "progressive": {"strategy": "progressive", "rank": 2, "rank_pattern": "linear", "alpha_pattern": "increasing"},
    "variable": {"strategy": "variable", "ranks": [1, 2, 3], "alphas": [2.0, 4.0, 8.0]},
}
ADAPTERS: dict[str, Changes] = {
    "none": {},
    **{f"stack {name}": {"adapters.stack": settings} for name, settings in _STRATEGIES.items()},
    **{f"trunk {name}": {"adapters.trunk": settings} for name, settings in _STRATEGIES.items()},
    "both": {"adapters.stack": _STRATEGIES["variable"], "adapters.trunk": _STRATEGIES["progressive"]},
}
VARIATIONS = (
    *("layerwise", "blockwise, masks redrawn", "window 1, stride 2", "window 1, unfreezing", "window all"),
    *("insert, frozen", "sweeps after growth", "end to end, stackwise"),
)
"""Of other regimes, which meet every format: one is enough for them, as for the other strategies of adapters."""
LEARN_ALL = ("fused, trainable", "window 1", "window all", "insert, trainable")


@dataclass(frozen=True)
class Case:
    """A combination, and a part of the message that refuses it; None if it is allowed."""

    regime: str
    precision: str
    adapters: str
    refusal: str | None

    def __str__(self) -> str:
        return f"{self.regime} / {self.precision} / {self.adapters}"

    @property
    def changes(self) -> Changes:
        """Of the base configuration."""
        precision = {"trunk.precision": self.precision}
        return {**COMMON, **REGIMES[self.regime], **precision, **ADAPTERS[self.adapters]}


def cases() -> Iterator[Case]:
    """All combinations."""
    for regime, settings in REGIMES.items():
        qlora = settings.get("growth.trunk_strategy") == "qlora"
        for adapters in ADAPTERS:
            on_trunk, on_stack = adapters.startswith(("trunk", "both")), adapters.startswith(("stack", "both"))
            refusal = None
            if on_trunk and not qlora:
                refusal = "expected null, because growth.trunk_strategy is not qlora"
            elif qlora and not on_trunk:
                refusal = "adapters.trunk = null: expected a mapping"
            elif on_stack and regime.startswith(("end", *LEARN_ALL)):
                refusal = "with this regime of growth"
            every = regime not in VARIATIONS and adapters in ("none", "stack simplified", "trunk simplified")
            for precision in get_args(Precision) if every else ("nf4",):
                yield Case(regime, precision, adapters, refusal)


ALL = list(cases())


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    with project(tmp_path_factory.mktemp("regimes")) as found:
        yield found


@pytest.mark.parametrize("case", [case for case in ALL if case.refusal is None], ids=str)
def test_allowed(case: Case, pipeline: Pipeline, record_property: Callable[[str, object], None]) -> None:
    made = pipeline.run(case.changes, leave_out=(*SHOWING, "evaluate"))
    trainings = [name for name in made if name.startswith("train_")]
    assert "fuse" in made
    record_property(COVERED, f"{case!s:<60} {len(trainings):>2} trainings")


def test_forbidden(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    for case in ALL:
        if case.refusal is not None:
            with pytest.raises(UserError) as refused:
                load(written(tmp_path / "params.yaml", case.changes))
            assert case.refusal in str(refused.value), case
            record_property(COVERED, f"{case!s:<60} refused: {case.refusal}")
