"""Artifacts: directories with a manifest, published whole and verified when read."""
