"""lm-evaluation-harness (Gao et al. 2024) for racks: `python -m stackwise.harness`."""
