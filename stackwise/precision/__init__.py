"""Numeric formats of weights and of computation."""
