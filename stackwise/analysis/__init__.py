"""What is to be seen inside a trained rack."""
