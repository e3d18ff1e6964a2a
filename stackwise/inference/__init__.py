"""Evaluation of trained racks."""
