"""What a training takes before it runs: weights, operations, memory, time. From the parameters alone, without torch."""
