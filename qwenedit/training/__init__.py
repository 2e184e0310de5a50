"""Training: the loss of the system that the pipeline ties together."""
