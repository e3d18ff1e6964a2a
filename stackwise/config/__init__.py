"""`params.yaml` as typed, validated objects, and each stage's own view of it."""
