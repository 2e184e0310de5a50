"""One place for what every test shares: threads, the order of the files, reproducible hypothesis runs."""

import os

import hypothesis
import pytest
import torch
import torch.utils._device

# Two threads in one process; one in each of pytest-xdist's workers, and in the processes that these start.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(min(2, int(os.environ.get("OMP_NUM_THREADS", 2))))
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that would reach for the network fails at once

# Deadlines measure the machine, not the code. `derandomize` makes a red run repeatable anywhere.
hypothesis.settings.register_profile(
    "qwenedit", deadline=None, max_examples=12, derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)  # fmt: skip
hypothesis.settings.load_profile("qwenedit")


FILES = [None]  # of tests, the newest last


def pytest_runtest_setup(item):
    """A file starts without modes of torch that another left behind: they change what layers hold.

    Gradients are on as well: an interrupt may come while torch turns them on again.
    """
    if item.path != FILES[-1]:
        FILES.append(item.path)
        torch.set_grad_enabled(True)
        while torch._C._len_torch_function_stack():
            torch._C._pop_torch_function_stack()
        torch.utils._device.CURRENT_DEVICE = None


@pytest.fixture(scope="module")
def edit():
    """The embedded model, one for each file."""
    import qwenedit  # not by every test run: it takes seconds

    return qwenedit.load(device="cpu", progress=False)


@pytest.fixture(scope="module")
def plus():
    """The embedded model as a multi-picture checkpoint."""
    import qwenedit
    from tests.tiny import embedded_plus

    return qwenedit.load(embedded_plus(), device="cpu", progress=False)


def pytest_addoption(parser):
    parser.addoption("--fuzz", type=int, default=0, metavar="N", help="N new random examples of each fuzzer")


def pytest_configure(config):
    if count := config.getoption("--fuzz"):
        hypothesis.settings.register_profile(
            "fuzz", hypothesis.settings.get_profile("qwenedit"),
            max_examples=count, derandomize=False, database=None,
        )  # fmt: skip
        hypothesis.settings.load_profile("fuzz")


# A worker takes a file whole. The slowest start first, so that no worker ends long after the others.
SLOW = (
    "mini/test_training.py", "pages/test_notebooks.py", "test_what_runs.py", "benchmarks/test_benchmarks.py",
    "faults/test_published.py", "memory/test_residency.py", "parity/test_vae.py", "parity/test_command.py",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    def place(item):
        path = item.path.as_posix()
        return next((number for number, name in enumerate(SLOW) if path.endswith(name)), len(SLOW))

    items.sort(key=place)
