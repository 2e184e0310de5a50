"""One place for what every test shares: at most two threads, reproducible hypothesis runs."""

import os

import hypothesis
import torch

torch.set_num_threads(min(2, int(os.environ.get("OMP_NUM_THREADS", 2))))
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that would reach for the network fails at once

# Deadlines measure the machine, not the code. `derandomize` makes a red run repeatable anywhere.
hypothesis.settings.register_profile(
    "qwenedit", deadline=None, max_examples=12, derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)  # fmt: skip
hypothesis.settings.load_profile("qwenedit")
