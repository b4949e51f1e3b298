"""What end-to-end tests share; the makers of media files and the test servers are those of the unit tests."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "unit"))


@pytest.fixture(scope="module")
def local_ray():
    """A Ray in which the tests of a file run their jobs: starting it takes longer than they do."""
    ray = pytest.importorskip("ray")
    ray.init(address="local", num_cpus=2, num_gpus=0, include_dashboard=False, object_store_memory=80 << 20)
    yield
    ray.shutdown()
