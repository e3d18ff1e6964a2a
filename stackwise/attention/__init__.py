"""Attention variants: a file each, and an entry in `stackwise.variants`."""
