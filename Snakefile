# Snakemake schedules; DVC decides, by content, what is out of date, runs each stage's command and records it.
#
#     snakemake --cores 8 fused_model      the fused rack, measured after every stack
#     snakemake --cores 8                  everything: fine-tuning branches, metrics, report figures
#     snakemake --report report.html       the report, from what is there
#
# The stages stand in workflow/stages.py; their parameters in params.yaml.
import sys
from pathlib import Path

sys.path.insert(0, workflow.basedir)
from stackwise.config.params import load
from stackwise.errors import UserError
from workflow.resources import resources
from workflow.stages import table
from workflow.sync import sync

try:
    if config:
        raise UserError(
            f"--config {' '.join(config)}: change params.yaml instead, which DVC watches too"
        )
    PARAMS = load("params.yaml")
    STAGES = table(PARAMS)
    RESOURCES = resources(PARAMS, STAGES)
    if workflow.is_main_process:  # not again in the jobs that a cluster runs
        sync(STAGES)
except UserError as error:
    sys.exit(f"error: {error}")

STAGE = {stage.name: stage for stage in STAGES}
MAKER = {
    path: stage
    for stage in STAGES
    for path in (*stage.outputs, *stage.metrics, *stage.plots)
}


def receipts(*names):
    return [STAGE[name].receipt for name in names if name in STAGE]


INSIDE = ("similarity", "boundaries", "lens", "lens_text", "attention", "maps")
REPORTING = any(word.split("=")[0] == "--report" for word in sys.argv)


report: "workflow/report/workflow.rst"


localrules:
    all,
    fused_model,


if REPORTING:
    # Times differ between two equal runs, so no artifact holds them: this figure is drawn when a report is asked for.
    from workflow.costs import latest_costs
    from workflow.figures import stage_costs

    stage_costs(latest_costs(STAGES), Path(".stackwise/costs.svg"))

    rule figures:
        input:
            ancient(receipts("report", "analyse")),
        output:
            report(
                "artifacts/report/losses.svg",
                caption="workflow/report/losses.rst",
                category="Training",
            ),
            report(
                "artifacts/report/depth.svg",
                caption="workflow/report/depth.rst",
                category="Quality",
            ),
            report(
                "artifacts/report/masked_nll.svg",
                caption="workflow/report/masked_nll.rst",
                category="Quality",
            ),
            report(
                "artifacts/report/exits.svg",
                caption="workflow/report/exits.rst",
                category="Quality",
            ),
            [
                report(
                    "artifacts/report/choices.svg",
                    caption="workflow/report/choices.rst",
                    category="Quality",
                )
            ][: int(bool(PARAMS.evaluate.choices))],
            [
                report(
                    "artifacts/report/sample_quality.svg",
                    caption="workflow/report/sample_quality.rst",
                    category="Samples",
                )
            ][: int("score_samples" in STAGE)],
            [
                report(
                    f"artifacts/analysis/{name}.svg",
                    caption=f"workflow/report/{name}.rst",
                    category="Inside",
                )
                for name in INSIDE
            ],
            report(
                "artifacts/report/samples.html",
                caption="workflow/report/samples.rst",
                category="Samples",
            ),
            report(
                ".stackwise/costs.svg",
                caption="workflow/report/costs.rst",
                category="Costs",
            ),


rule all:
    input:
        receipts(*STAGE),
        rules.figures.output if REPORTING else [],


rule fused_model:
    input:
        receipts("check_params", "fuse", "tune_jointly", "evaluate_fused"),
        receipts(*(name for name in STAGE if "trainings" in STAGE[name].arguments)),


for stage in STAGES:

    rule:
        name:
            stage.name
        input:
            # Always ancient: whether a stage is current is never judged by modification times.
            receipts=[
                ancient(MAKER[path].receipt) for path in stage.inputs if path in MAKER
            ],
            sources=[ancient(path) for path in stage.dependencies if path not in MAKER],
        output:
            touch(stage.receipt),
        log:
            f"logs/{stage.name}.log",
        benchmark:
            f"logs/benchmarks/{stage.name}.tsv"
        threads: stage.threads
        resources:
            **RESOURCES[stage.name],
        params:
            stage=stage.name,
        shell:
            "python -m dvc --wait-for-lock repro --quiet --single-item {params.stage}"
