"""Checkpoints and other files of weights: where they are, what they hold, and how they become modules."""
