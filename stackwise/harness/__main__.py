"""The command line of lm-evaluation-harness, which then knows the model type `stackwise`.

python -m stackwise.harness run --model stackwise --model_args model=artifacts/fused --tasks mine --include_path tasks
"""

import sys
from importlib.util import find_spec

from stackwise.errors import UserError


def main() -> None:
    """Exits with 1 and one message where a person can put things right."""
    if find_spec("lm_eval") is None:
        sys.exit("error: lm-evaluation-harness is not installed; pip install 'stackwise[harness]'")
    from lm_eval.__main__ import cli_evaluate

    import stackwise.harness.model  # noqa: F401  registers the type

    try:
        cli_evaluate()
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
