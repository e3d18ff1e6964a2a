"""Racks for Transformers and models of Transformers for racks."""
