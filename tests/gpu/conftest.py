"""Tests that need a GPU; without one they are skipped, or where that says something tried on the CPU."""

import sys
from pathlib import Path

import pytest
import torch

# Helpers that write small media files and runs.
sys.path += [str(Path(__file__).parents[1] / name) for name in ("unit", "resume")]


@pytest.fixture(scope="session")
def device_id():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.cuda.current_device()


@pytest.fixture(params=["cuda", "cpu"])
def device(request):
    """The GPU; and where there is none the CPU, so that every line of the test was run before it meets a GPU."""
    if request.param == "cuda":
        request.getfixturevalue("device_id")
    elif torch.cuda.is_available():
        pytest.skip("only where there is no GPU")
    return torch.device(request.param)


@pytest.fixture
def precise():
    """The same products in all processes, whatever was set before."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)
