"""What is predicted: masks, targets, losses."""
