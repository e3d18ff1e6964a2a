"""Regimes of growth as lists of phases: what is cached below, what is in the window, what of it learns."""

import pytest

from stackwise.config.growth import GrowthParams
from stackwise.growth.phases import Phase, chain, phases

ROLES = {"new": "n", "lora": "l", "weights": "w", "adapters": "a", "frozen": "f", "initial": "i"}


def drawn(phase: Phase) -> str:
    """A phase in a line: `below | window`, `=` for a cached trunk and `~` for one that is streamed; `e` where the
    embeddings learn. A version is the stack with the phases that trained its weights and its adapters."""
    below = " ".join(f"{v.stack}@{v.weights}" + ("" if v.adapters is None else f"+{v.adapters}") for v in phase.below)
    window = " ".join(f"{m.stack}{ROLES[m.role]}" for m in phase.window)
    ground = "e" * phase.embeddings_learn if not below else f"{below} {'=' if phase.cached else '~'}"
    return f"{ground} | {window}".strip()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ["e | 0n", "0@0 = | 1n", "0@0 1@1 = | 2n"]),
        ({"cache_activations": False}, ["e | 0n", "0@0 ~ | 1n", "0@0 1@1 ~ | 2n"]),
        ({"mode": "fused"}, ["e | 0n", "0@0 ~ | 1n", "0@0 1@1 ~ | 2n"]),
        ({"mode": "fused", "fusion_mode": "trainable"}, ["e | 0n", "e | 0w 1n", "e | 0w 1w 2n"]),
        ({"window": None}, ["e | 0n", "e | 0w 1n", "e | 0w 1w 2n"]),
        ({"window": 1}, ["e | 0n", "e | 0w 1n", "0@1 = | 1w 2n"]),
        ({"window": 1, "trunk_strategy": "qlora"}, ["e | 0n", "| 0a 1n", "0@0+1 = | 1a 2n"]),
        ({"window": None, "trunk_strategy": "qlora"}, ["e | 0n", "| 0a 1n", "| 0a 1a 2n"]),
        ({"building_mode": "insert"}, ["e | 0n", "e | 1n 0w", "1@1 = | 2n 0w"]),
        ({"building_mode": "insert", "trunk_strategy": "frozen"}, ["e | 0n", "e | 1n 0f", "1@1 = | 2n 0f"]),
        ({"building_mode": "prepend"}, ["e | 0n", "| 1n 0f", "| 2n 1f 0f"]),
        ({"building_mode": "prepend", "trunk_strategy": "qlora"}, ["e | 0n", "| 1n 0a", "| 2n 1a 0a"]),
        ({"stride": 2, "window": 1}, ["e | 0n 1n", "0@0 = | 1w 2n"]),
        ({"strategy": "end_to_end"}, ["e | 0n 1n 2n"]),
        (
            {"strategy": "end_to_end", "end_to_end_scope": "stackwise", "sweeps": 2},
            ["e | 0n 1i 2i", "0@0 = | 1n 2i", "0@0 1@1 = | 2n", "e | 0w 1f 2f", "0@3 = | 1w 2f", "0@3 1@4 = | 2w"],
        ),
        (
            {"sweeps": 1},
            ["e | 0n", "0@0 = | 1n", "0@0 1@1 = | 2n", "e | 0w 1f 2f", "0@3 = | 1w 2f", "0@3 1@4 = | 2w"],
        ),
    ],
    ids=str,
)
def test_regime(settings: dict[str, object], expected: list[str]) -> None:
    growth = GrowthParams.model_validate(settings)
    assert not growth.problems()
    assert [drawn(phase) for phase in phases(growth, 3)] == expected


@pytest.mark.parametrize(
    "settings",
    [{}, {"window": 1}, {"window": None}, {"building_mode": "insert"}, {"building_mode": "prepend"}, {"stride": 2}],
    ids=str,
)
def test_more_stacks_leave_earlier_phases_as_they_are(settings: dict[str, object]) -> None:
    growth = GrowthParams.model_validate(settings)
    assert phases(growth, 6)[:2] == phases(growth, 4)[:2]
    assert [p.label for p in phases(growth, 6)][: len(phases(growth, 4))] == [p.label for p in phases(growth, 4)]


def test_no_window_is_blockwise_and_the_whole_window_is_gradual_growth() -> None:
    assert phases(GrowthParams(window=0), 4) == phases(GrowthParams(), 4)
    gradual = phases(GrowthParams(mode="fused", fusion_mode="trainable"), 4)
    assert phases(GrowthParams(window=None), 4) == gradual
    assert phases(GrowthParams(window=4), 4) == gradual


def test_lora_is_for_stacks_that_have_something_to_begin_from() -> None:
    assert [drawn(p) for p in phases(GrowthParams(), 3, lora=True)] == ["e | 0n", "0@0 = | 1l", "0@0 1@1 = | 2l"]


def test_boundaries_of_the_same_frozen_stacks_form_a_chain() -> None:
    def depths(growth: GrowthParams, n: int) -> list[list[int]]:
        every = phases(growth, n)
        return [[len(p.below) for p in chain(every, phase)] for phase in every if phase.cached]

    assert depths(GrowthParams(), 4) == [[1], [1, 2], [1, 2, 3]]
    assert depths(GrowthParams(window=1), 4) == [[1], [1, 2]]
    assert depths(GrowthParams(stride=2, window=0), 6) == [[2], [2, 4]]
    # a sweep changes the stacks below: its chain begins anew
    assert depths(GrowthParams(sweeps=1), 3) == [[1], [1, 2], [1], [1, 2]]
