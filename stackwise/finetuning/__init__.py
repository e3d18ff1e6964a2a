"""What the fused rack is adapted to: branches on the corpus or on own data, with adapters or without, classifiers."""
