"""Feed-forward networks: a file each, and an entry in `stackwise.model.variants`."""
