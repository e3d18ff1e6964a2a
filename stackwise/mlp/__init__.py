"""Feed-forward networks: a file each, and an entry in `stackwise.variants`."""
