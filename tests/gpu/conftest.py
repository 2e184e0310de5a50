"""The tests of this folder run on an accelerator; without one each file is skipped in one line."""

from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def accelerator():
    """torch's accelerator if it is a CUDA device, whose streams and statistics these tests use; or None."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else None


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.gpu)
            if accelerator() is None:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device; `make gpu` runs it on one"))


@pytest.fixture(scope="session")
def device():
    return accelerator()


@pytest.fixture(autouse=True)
def _without_tf32():
    """float32 means float32: cuDNN would round to 10 bits of mantissa by default."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
