"""Text to tokens: corpus sources, tokenizers, token datasets."""
