import os
import subprocess
import sys

import numpy as np
import pytest

from alpro_sharding.duplicates import SampleHashes, captions_hash, find_repeats, media_hash

SHA = "ab" * 32


def shard(*rows):
    hashes = SampleHashes()
    for media, captions in rows:
        hashes.add(media, captions)
    return hashes


def random_shards(generator, sizes, num_values):
    for size in sizes:
        values = generator.integers(0, num_values, (size, 2), dtype=np.uint64)
        yield SampleHashes.from_bytes(values.astype("<u8").tobytes())


def slowly(values):
    """(later, first) by a dictionary."""
    first = {}
    return [(number, first[value]) for number, value in enumerate(values) if first.setdefault(value, number) != number]


def test_media_hashes_tell_bytes_and_segments_apart():
    hashes = [
        media_hash(SHA, None, None),
        media_hash("cd" * 32, None, None),
        media_hash(SHA, 1.0, None),
        media_hash(SHA, None, 1.0),
        media_hash(SHA, 1.0, 2.0),
        media_hash(SHA, 1.0, 2.5),
        media_hash(SHA, 0.0, None),
    ]
    assert len(set(hashes)) == len(hashes)
    assert media_hash(SHA.upper(), 1, 2) == media_hash(SHA, 1.0, 2.0)
    assert all(0 <= value < 2**64 for value in hashes)


def test_hashes_are_the_same_in_every_version():
    assert media_hash(SHA, None, 2.5) == 16094246380518696432
    assert captions_hash(["A dog", "b"]) == 5751220545009575939


def test_caption_hashes_do_not_mind_order_case_and_white_space():
    assert captions_hash(["A  Dog ", "straße"]) == captions_hash(("STRASSE", "a dog", "a dog"))
    assert captions_hash(["a dog"]) != captions_hash(["a dog", "b"])
    assert captions_hash(["a b"]) != captions_hash(["ab"])
    assert captions_hash(["a", "b"]) != captions_hash(["a b"])


def test_hashes_are_stored_little_endian():
    hashes = shard((1, 2), (2**64 - 1, 256))
    data = hashes.to_bytes()
    assert data == bytes([1, *[0] * 7, 2, *[0] * 7, *[255] * 8, 0, 1, *[0] * 6])
    again = SampleHashes.from_bytes(data)
    assert len(again) == 2
    assert again.to_bytes() == data
    again.add(3, 4)
    assert again.columns().tolist() == [[1, 2], [2**64 - 1, 256], [3, 4]]
    assert SampleHashes.from_bytes(b"").columns().shape == (0, 2)
    with pytest.raises(ValueError, match="cut off"):
        SampleHashes.from_bytes(data[:-1])


def test_the_first_in_order_stays():
    big = 2**64 - 1
    shards = [shard((big, 1), (5, 2)), shard(), shard((5, 3), (big, 1)), shard((5, 1))]
    repeats = find_repeats(iter(shards))
    assert list(repeats.media) == [(2, 1), (3, 0), (4, 1)]
    assert list(repeats.captions) == [(3, 0), (4, 0)]
    assert (len(repeats.media), len(repeats.captions)) == (3, 2)


@pytest.mark.parametrize("shards", [[], [shard()], [shard((0, 0))], [shard((0, 1), (1, 0))]])
def test_nothing_repeats(shards):
    repeats = find_repeats(shards)
    assert list(repeats.media) == list(repeats.captions) == []


@pytest.mark.parametrize("num_values", [1, 2, 1000, 200_000, 2**63])
def test_repeats_are_those_of_a_dictionary(num_values):
    # Over 65536 samples, so that more than one block is looked at.
    shards = list(random_shards(np.random.default_rng(7), [70_000, 1, 0, 30_000, 50_000], num_values))
    repeats = find_repeats(shards)
    values = np.concatenate([found.columns() for found in shards])
    assert list(repeats.media) == slowly(values[:, 0].tolist())
    assert list(repeats.captions) == slowly(values[:, 1].tolist())


@pytest.mark.parametrize("num_values", [1, 500_000, 2**63])
def test_memory_is_32_bytes_a_sample_whatever_repeats(num_values):
    script = """
import re, sys
from pathlib import Path
import numpy as np
from alpro_sharding.duplicates import SampleHashes, find_repeats
num_samples, num_values = int(sys.argv[1]), int(sys.argv[2])
def peak_bytes():  # of this process alone; what getrusage says goes on from the parent's peak
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
def shards(num_samples):
    generator = np.random.default_rng(0)
    for _ in range(num_samples // 1000):
        yield SampleHashes.from_bytes(generator.integers(0, num_values, (1000, 2), dtype=np.uint64).tobytes())
find_repeats(shards(100_000))
before = peak_bytes()
repeats = find_repeats(shards(num_samples))
after = peak_bytes()
print((after - before) / num_samples, len(repeats.media))
"""
    run = subprocess.run(
        [sys.executable, "-c", script, str(2_000_000), str(num_values)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    bytes_a_sample, num_repeated = run.stdout.split()
    assert float(bytes_a_sample) <= 32
    assert (int(num_repeated) > 0) == (num_values < 2**63)
