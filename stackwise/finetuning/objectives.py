"""What a branch of fine-tuning learns. Imports no torch: the plan asks too."""

from stackwise.config.objective import ObjectiveParams
from stackwise.config.params import Params


def objective_params(params: Params, name: str) -> ObjectiveParams:
    """The objective of branch `name` as pretraining has it.

    Args:
        params: with `fine_tune.<name>`, not `classification`, and with objective where that is `diffusion`.
        name: of the branch.
    """
    branch = params.fine_tune[name]
    if branch.objective == "clm":
        return ObjectiveParams(type="clm")
    if branch.objective == "mlm":
        rate = branch.mask_rate
        return ObjectiveParams(
            type="mlm",
            mask_min=rate,
            mask_max=rate,
            unit=branch.unit,
            random_share=branch.random_share,
            keep_share=branch.keep_share,
        )
    # as in pretraining, but for the inputs of mlm that show other tokens
    return params.objective.model_copy(update={"type": "diffusion", "random_share": 0.0, "keep_share": 0.0})
