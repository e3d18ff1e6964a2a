"""What DVC compares: few figures, under names that say what they are."""

import json
from pathlib import Path

import yaml

from stackwise.config.params import load
from workflow.stages import DEPTH_CURVE, SUMMARY, dvc_yaml, table
from workflow.summary import summary

ROOT = Path(__file__).resolve().parents[2]


def test_summary_has_the_main_figures_and_the_baseline() -> None:
    nelbo = {"bits_per_byte": 2.5, "nats_per_token": 3.0, "standard_error_bits_per_byte": 0.1}
    fused = {"nelbo": nelbo, "masked": {"0.5": {"bits_per_byte": 9.0}}, "unigram": {"bits_per_byte": 4.0}}
    clm = {"next_token": {**nelbo, "accuracy": 0.25}, "unigram": {"bits_per_byte": 4.0}}
    found = summary({"fused": fused, "clm": clm})
    assert found == {
        "fused": {"nelbo_bits_per_byte": 2.5},
        "clm": {"next_token_bits_per_byte": 2.5, "next_token_accuracy": 0.25},
        "unigram": {"bits_per_byte": 4.0},
    }
    assert json.loads(json.dumps(found)) == found


def test_dvc_compares_metrics_and_its_plots_have_axes() -> None:
    stages = yaml.safe_load(dvc_yaml(table(load(ROOT / "params.yaml"))))["stages"]
    metrics = [metric for stage in stages.values() for metric in stage.get("metrics", ())]
    assert {SUMMARY: {"cache": False}} in metrics
    assert {"metrics/fused.json": {"cache": False}} in metrics
    plots = {
        path: shown for stage in stages.values() for plot in stage.get("plots", ()) for path, shown in plot.items()
    }
    assert plots[DEPTH_CURVE]["y"] == "bits_per_byte"
    losses = [shown for path, shown in plots.items() if path.startswith("metrics/loss/")]
    assert losses
    assert all((shown["x"], shown["y"]) == ("step", "loss") and shown["x_label"] for shown in losses)
    # DVC puts no stage back out of its run-cache that has a plain output without a cache.
    assert all(isinstance(out, str) for stage in stages.values() for out in stage.get("outs", ()))
