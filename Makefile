# Two commands do everything in a fresh clone: `make fused_model` and `make test`.
# Each makes the environment first; inside it (`. .venv/bin/activate`) the plain commands work: snakemake, dvc, mlflow.

PYTHON ?= python3
CORES ?= $(shell $(PYTHON) -c "import os; print(os.cpu_count())")
ENV := PATH="$(CURDIR)/.venv/bin:$$PATH"

.PHONY: fused_model test check docs lock

# The whole pipeline: the fused model, its fine-tuning branches, metrics and figures.
fused_model: .venv/ready
	$(ENV) snakemake --cores $(CORES) all

test: .venv/ready
	$(ENV) python -m pytest --numprocesses logical --maxprocesses 4 --dist worksteal

# Lint, format and types.
check: .venv/ready
	$(ENV) ruff check .
	$(ENV) ruff format --check .
	$(ENV) mypy
	$(ENV) snakefmt --check Snakefile
	$(ENV) python -m workflow.lint
	$(ENV) python -m workflow.stages --check
	$(ENV) python -m stackwise.config.schema --check

# The documentation, into site/; a warning, such as a link that leads nowhere, is an error.
docs: .venv/ready
	$(ENV) sphinx-build --fail-on-warning --keep-going --quiet --jobs auto docs site

.venv/ready: requirements.lock pyproject.toml
	$(PYTHON) -c "import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14) and 'error: PYTHON=$(PYTHON) is ' + sys.version.split()[0] + '; expected 3.11, 3.12 or 3.13: make PYTHON=python3.12 ...')"
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

# Newest versions within pyproject.toml's ranges (and the torch of the current lock).
lock:
	rm -rf .venv-lock
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet $$(grep ^torch== requirements.lock) ".[dev,docs]"
	{ sed -n '/^#/p' requirements.lock; .venv-lock/bin/python -m pip freeze --exclude stackwise | sed 's/+cpu$$//'; } > requirements.lock.new
	mv requirements.lock.new requirements.lock
	rm -rf .venv-lock build stackwise.egg-info
