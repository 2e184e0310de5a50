"""Where weights are while a run needs them, and what fits."""
