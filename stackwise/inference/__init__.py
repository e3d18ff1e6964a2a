"""Evaluation and sampling of trained racks."""
