"""One run over several processes: which process does what, and how its weights are split."""
