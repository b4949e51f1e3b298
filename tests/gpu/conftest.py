"""Tests that need a GPU; they are skipped where there is none."""

import sys
from pathlib import Path

import pytest
import torch

# Helpers that write small media files.
sys.path.append(str(Path(__file__).parents[1] / "unit"))


@pytest.fixture(scope="session")
def device_id():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.cuda.current_device()
