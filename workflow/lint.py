"""`snakemake --lint`, less the one thing that this project has decided otherwise: `python -m workflow.lint`."""

import re
import subprocess
import sys

DECIDED = "Specify a conda environment or container for each rule."
"""The environment is requirements.lock, the same for all stages and engines; DVC could not follow one per rule."""


def main() -> None:
    """Exit with 1 and the findings if there is any other."""
    answer = subprocess.run([sys.executable, "-m", "snakemake", "--lint"], capture_output=True, text=True)
    text = answer.stdout + answer.stderr
    titles = re.findall(r"^ +\* (.*):$", text, flags=re.MULTILINE)
    if any(title != DECIDED for title in titles) or (answer.returncode and not titles):
        sys.exit(text)
    print(f"snakemake --lint: nothing but, {len(titles)} times, {DECIDED!r}")


if __name__ == "__main__":
    main()
