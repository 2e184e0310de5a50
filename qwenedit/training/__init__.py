"""Training: the flow-matching loss."""
