"""The transformer: Block, Stack, Rack and what they are made of."""
