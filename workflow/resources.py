"""What stages need, for Snakemake's scheduler: the figures of the plan. They have no influence on results."""

import os
from collections.abc import Iterable

from stackwise.config.params import Params
from workflow.plan import PROCESS, costs, known_corpus
from workflow.stages import Stage

_SLACK = 1.35
"""Resident memory of a process on a CPU over what its tensors take: measured up to this, for what lies idle in pieces
between them."""
_USUAL_VOCABULARY = 50_000
"""Before the tokenizer is there."""
_COMPUTING = (
    *("cache_activations", "train_stack", "tune_jointly", "fine_tune", "fine_tune_classifier"),
    *("evaluate", "evaluate_classifier", "sample"),
)
_READING = {"analyse": 2, "answer_choices": 1, "score_samples": 1}
"""Scripts that read whole racks, and how many at once."""


def resources(params: Params, stages: Iterable[Stage]) -> dict[str, dict[str, int]]:
    """mem_mb of every stage, gpu of those that compute, disk_mb of those that cache; by name of the stage."""
    gpu = _gpu(params)
    corpus = known_corpus(params, usual_vocabulary=_USUAL_VOCABULARY)
    planned = {cost.name: cost for cost in costs(params, corpus, "cuda" if gpu else "cpu")}
    found = {}
    for stage in stages:
        cost = planned.get(stage.name)
        memory = 2 * PROCESS if cost is None else cost.host + (0 if gpu else _SLACK * cost.device)
        if racks := _READING.get(stage.script):
            one = planned["evaluate_fused"]
            memory = PROCESS + racks * (one.host - PROCESS + (0 if gpu else _SLACK * one.device))
        found[stage.name] = {"mem_mb": round(memory / 1e6)}
        if stage.script in (*_COMPUTING, *_READING):
            found[stage.name]["gpu"] = gpu
        if stage.script == "cache_activations":
            found[stage.name]["disk_mb"] = round(1000 * params.activations.budget_gb)
    return found


def _gpu(params: Params) -> int:
    """GPUs that a computing stage takes: one where CUDA is asked for, or found with `auto`."""
    device = params.compute.device
    return int(device == "cuda" or (device == "auto" and os.path.exists("/proc/driver/nvidia/version")))
