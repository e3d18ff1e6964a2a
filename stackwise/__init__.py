"""StackWise: pretrain transformers stack by stack."""
