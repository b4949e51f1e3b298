"""The setting of the C library, seen from outside: page faults of a process that allocates the same blocks again."""

import subprocess
import sys

import pytest

# Of the round with the fewest faults: where the blocks of the first rounds come to lie is the C library's choice, and
# one of them may have to grow the heap once more.
ALLOCATES = """
import resource, sys, torch
from alpro_stream.model.cpu_memory import keep_freed_memory
if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit(77)
faults = []
for _ in range(9):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(1 << 24) for _ in range(4)]
    del blocks
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults))
"""


def faults(setting):
    done = subprocess.run([sys.executable, "-c", ALLOCATES, setting], capture_output=True, text=True, check=False)
    if done.returncode == 77:
        pytest.skip("this C library has no mallopt")
    return int(done.stdout)


def test_large_blocks_are_used_again_without_page_faults():
    assert faults("keep") < faults("default") / 10
