"""How a rack grows: what is built, what is frozen, what is trained."""
