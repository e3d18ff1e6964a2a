"""Low-rank adapters of stacks, by PEFT."""
