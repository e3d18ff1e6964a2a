"""The command `stackwise`: questions that a person asks at the terminal."""

import argparse
import sys

from stackwise.errors import UserError
from workflow import plan


def main() -> None:
    """The command line. Exits with 1 and one message where a person can put things right."""
    parser = argparse.ArgumentParser(prog="stackwise", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    planning = commands.add_parser("plan", help="what the pipeline will take: weights, memory, cache, operations, time")
    plan.declare(planning)
    planning.set_defaults(run=plan.run)
    arguments = parser.parse_args()
    try:
        arguments.run(arguments)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
