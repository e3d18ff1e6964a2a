"""Text from racks: left to right with a decoding cache, or by unmasking."""
