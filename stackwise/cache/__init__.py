"""The activation cache: boundaries on disk."""
