"""Records of what ran, and MLflow, which follows them."""
