import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alpro_stream.manifest import IDS_DTYPE, ManifestRow, RejectedRow, refuse_repeated, survey

NONE = np.empty(0, IDS_DTYPE)
ROW = ManifestRow("a", "m.mp4", ("c",), (), None, None, "train", "video", 1)


def rows_of(ids):
    return [replace(ROW, id=row_id, line=line) for line, row_id in enumerate(ids, 1)]


def usable(rows):
    return [(row.id, row.line) for row in rows if isinstance(row, ManifestRow)]


@given(st.lists(st.text(alphabet="ab/é", max_size=2), max_size=30), st.lists(st.text(alphabet="ab/é", max_size=2)))
def test_of_rows_with_one_id_the_first_stands(ids, earlier_ids):
    rows = rows_of(ids)
    found = survey(rows)
    earlier = survey(rows_of(earlier_ids)).ids
    assert found.num_rows == len(ids)
    assert len(found.ids) == len(ids)
    assert len(found.repeated) == len({row_id for row_id in ids if ids.count(row_id) > 1})
    result = list(refuse_repeated(rows, found.repeated, [earlier]))
    first_of = {row_id: ids.index(row_id) + 1 for row_id in ids}
    assert usable(result) == [(i, line) for i, line in first_of.items() if i not in earlier_ids]
    for row in result:
        if isinstance(row, RejectedRow):
            duplicate = f"duplicate id {row.id!r}: first used on line {first_of[row.id]}"
            there = f"id {row.id!r} is in this shard set already, from an earlier manifest"
            assert row.reason == (there if row.id in earlier_ids else duplicate)


def test_rejected_rows_pass_and_count_and_their_ids_do_not():
    rejected = RejectedRow(2, "a", "no caption")
    rows = [*rows_of(["a"]), rejected]
    found = survey(rows)
    assert (found.num_rows, len(found.ids), len(found.repeated)) == (2, 1, 0)
    assert list(refuse_repeated(rows, found.repeated)) == rows


def test_ids_are_sorted_and_come_back_from_a_file(tmp_path):
    # Enough that some digests end or begin with a zero, which numpy's texts do not show.
    ids = [f"id {number}" for number in range(3000)]
    found = survey(rows_of(ids))
    data = found.ids.tobytes()
    pieces = [data[start : start + 16] for start in range(0, len(data), 16)]
    assert pieces == sorted(set(pieces))
    assert any(piece.endswith(b"\0") for piece in pieces)
    (tmp_path / "000.ids").write_bytes(data)
    earlier = [np.memmap(tmp_path / "000.ids", dtype=IDS_DTYPE, mode="r")]
    later = rows_of([*ids[::3], "new", "newer"])
    assert usable(refuse_repeated(later, NONE, earlier)) == [("new", 1001), ("newer", 1002)]
    for times in (2, 3):
        rows = rows_of(ids * times)
        repeated = survey(rows).repeated
        assert repeated.dtype == IDS_DTYPE
        assert repeated.tobytes() == data
        assert usable(refuse_repeated(rows, repeated)) == usable(rows_of(ids))


def test_the_digest_tells_any_difference():
    changed = [
        replace(ROW, id="b"),
        replace(ROW, media="n.mp4"),
        replace(ROW, captions=("c", "d")),
        replace(ROW, captions=("c d",)),
        replace(ROW, qa=(("q", "a"),)),
        replace(ROW, start_s=0.0),
        replace(ROW, end_s=1.0),
        replace(ROW, split="val"),
        replace(ROW, kind="image"),
        replace(ROW, line=2),
        replace(ROW, byte_range=(0, 1)),
        replace(ROW, license="CC0"),
        RejectedRow(1, "a", "reason"),
        RejectedRow(1, None, "reason"),
        RejectedRow(1, "a", "another"),
        RejectedRow(2, "a", "reason"),
    ]
    digests = [survey([row]).digest for row in [ROW, *changed]]
    assert len(set(digests)) == len(digests)
    assert survey([ROW]).digest == digests[0]
    assert survey([ROW, changed[0]]).digest != survey([changed[0], ROW]).digest


def test_nothing_at_all():
    found = survey([])
    assert (found.num_rows, len(found.ids), len(found.repeated)) == (0, 0, 0)
    assert usable(refuse_repeated(rows_of(["a"]), NONE, [found.ids])) == [("a", 1)]


PROGRAM = """
import pathlib
import sys
from alpro_stream.manifest import ManifestRow, refuse_repeated, survey

NUM_ROWS, NUM_IDS = map(int, sys.argv[1:])

def rows(count):
    for line in range(1, count + 1):
        yield ManifestRow(f"clip-{line % NUM_IDS}", "m.mp4", ("c",), (), None, None, "train", "video", line)

def peak():
    # Not ru_maxrss, which a process inherits from the one that started it.
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024

def first_ones(count):
    found = survey(rows(count))
    assert len(found.ids) == count
    return sum(isinstance(row, ManifestRow) for row in refuse_repeated(rows(count), found.repeated))

first_ones(1000)
before = peak()
print(first_ones(NUM_ROWS), peak() - before)
"""


@pytest.mark.parametrize(("num_ids", "most"), [(400_000, 24), (200_000, 32), (1, 24)])
def test_many_rows_take_little_memory(num_ids, most):
    """At any point of the survey and of what comes after it, in bytes a row."""
    command = [sys.executable, "-c", PROGRAM, "400000", str(num_ids)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    num_usable, num_bytes = map(int, done.stdout.split())
    assert num_usable == num_ids
    # Below 16, the heap had room from before: the lower bound only says that the measurement sees the rows at all.
    assert 8 < num_bytes / 400_000 < most
