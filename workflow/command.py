"""The command `stackwise`: questions that a person asks at the terminal."""

import argparse
import sys

from stackwise.errors import UserError
from workflow import evaluate, export, generate, importing, plan


def main() -> None:
    """The command line. Exits with 1 and one message where a person can put things right."""
    parser = argparse.ArgumentParser(prog="stackwise", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    planning = commands.add_parser("plan", help="what the pipeline will take: weights, memory, cache, operations, time")
    plan.declare(planning)
    planning.set_defaults(run=plan.run)
    generating = commands.add_parser("generate", help="text from a trained model")
    generate.declare(generating)
    generating.set_defaults(run=generate.run)
    exporting = commands.add_parser("export", help="a rack as a model that Transformers loads")
    export.declare(exporting)
    exporting.set_defaults(run=export.run)
    bringing = commands.add_parser("import", help="a model of Transformers as a rack")
    importing.declare(bringing)
    bringing.set_defaults(run=importing.run)
    evaluating = commands.add_parser("evaluate", help="what a trained model is worth: held-out text, own text, quizzes")
    evaluate.declare(evaluating)
    evaluating.set_defaults(run=evaluate.run)
    arguments = parser.parse_args()
    try:
        arguments.run(arguments)
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
