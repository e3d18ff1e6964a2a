"""The pipeline: the table of stages, their scripts, and what ties Snakemake and DVC together."""
