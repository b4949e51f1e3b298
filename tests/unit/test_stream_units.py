"""What a pass counts: every clip, caption or question exactly once, whatever is excluded, empty or has none."""

import hashlib
import tarfile
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from stream_parts import open_maker, stream_config

from alpro_stream.errors import PlanError, SampleError, ShardError
from alpro_stream.manifest import QA
from alpro_stream.shards.index import format_index
from alpro_stream.shards.layout import DatasetInfo, ShardInfo, index_path, save_dataset_info, tar_path
from alpro_stream.shards.writer import ShardWriter
from alpro_stream.stream.config import fingerprint
from alpro_stream.stream.sources import open_sources
from alpro_stream.stream.text import Tokenizer
from alpro_stream.stream.units import clip_units, text_units
from alpro_stream.testing.shards import sample, write_tokenizer

LANES = range(4)
# Captions and questions of the samples of each shard: one shard without a sample, one without a question.
SHARDS = (
    ((1, 0), (3, 2), (2, 0), (1, 5)),
    (),
    ((2, 0), (1, 0), (1, 0)),
    ((1, 1), (1, 0), (4, 3), (1, 1), (2, 2), (1, 4), (1, 0)),
    ((5, 6),),
    ((1, 2), (2, 2), (1, 1), (1, 0), (3, 1)),
)
COUNTS = {f"video-{n:05d}": pair for n, pair in enumerate(pair for shard in SHARDS for pair in shard)}
EXCLUDED = ("video-00001", "video-00014", "video-00002")
NUM_TEXTS = {
    "clip": [1] * len(COUNTS),
    "caption": [c for c, _ in COUNTS.values()],
    "question": [q for _, q in COUNTS.values()],
}


def texts_of(key, unit):
    if unit == "clip":
        return [key]
    return [f"{unit} {number} of {key}" for number in range(COUNTS[key][unit == "question"])]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Shards in which every text is another one."""
    root = tmp_path_factory.mktemp("units")
    directory = root / "train"
    directory.mkdir()
    keys, infos = iter(COUNTS), []
    for number, shard in enumerate(SHARDS):
        name = f"video-{number:06d}"
        infos.append(_write(directory, name, [next(keys) for _ in shard]) if shard else _write_empty(directory, name))
    options = {"payload": "frames", "frames": {"size": 32}}
    save_dataset_info(directory, DatasetInfo.of_shards("train", options, infos))
    write_tokenizer(root / "tokenizer")
    return root


def _write(directory, name, keys):
    with ShardWriter(directory, name, "video") as writer:
        for key in keys:
            plain = sample(int(key[-5:]), "video", 2, 32)
            questions = tuple(QA(text, f"answer to {text}") for text in texts_of(key, "question"))
            metadata = replace(plain.metadata, captions=tuple(texts_of(key, "caption")), qa=questions)
            writer.add(replace(plain, metadata=metadata))
        return writer.close()


def _write_empty(directory, name):
    with tarfile.open(tar_path(directory, name), "w"):
        pass
    index = format_index([])
    index_path(directory, name).write_bytes(index)
    data = tar_path(directory, name).read_bytes()
    return ShardInfo(
        name=name,
        kind="video",
        num_samples=0,
        num_captions=0,
        num_questions=0,
        num_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        index_sha256=hashlib.sha256(index).hexdigest(),
    )


def excluding(root, folder, keys=EXCLUDED):
    path = folder / "exclude.txt"
    path.write_text("# copies\n" + "".join(f"{key}  # seen before\n" for key in keys))
    return [{"path": root / "train", "exclude": path}]


def texts_of_passes(maker, plan, unit, num_passes):
    """Of each pass, what its steps gave and what was left over; nothing is decoded for it."""
    passes = []
    (steps,), (left_over,) = plan.steps_per_pass, plan.left_over
    for first in range(0, num_passes * steps, steps):
        samples = [one for step in range(first, first + steps) for one in maker.read(plan, step, LANES).samples]
        rest = [maker._read(plan[first], 0, *ref) for ref in plan.substitutes(first, 0, 0).tolist()]
        assert len(rest) == left_over
        passes.append([[one.metadata.key if unit == "clip" else one.text for one in part] for part in (samples, rest)])
    return passes


@pytest.mark.parametrize("excluded", [(), EXCLUDED])
@pytest.mark.parametrize("unit", ["clip", "caption", "question"])
def test_a_pass_holds_every_unit_exactly_once(root, tmp_path, unit, excluded):
    changes = {"sources": excluding(root, tmp_path)} if excluded else {}
    maker, plan = open_maker(stream_config(root, unit=unit, **changes))
    expected = Counter(text for key in COUNTS if key not in excluded for text in texts_of(key, unit))
    assert plan.sources[0].num_samples == expected.total()
    passes = texts_of_passes(maker, plan, unit, 3)
    for taken, left_over in passes:
        assert Counter(taken + left_over) == expected
        assert len(left_over) < 8
    # In another order each time, with others left over.
    assert len({tuple(taken) for taken, _ in passes}) == 3


@pytest.mark.parametrize("unit", ["clip", "caption", "question"])
def test_what_is_excluded_is_in_no_batch(root, tmp_path, unit):
    maker, plan = open_maker(stream_config(root, unit=unit, sources=excluding(root, tmp_path)))
    (steps,) = plan.steps_per_pass
    for step in range(2 * steps):
        assert not set(EXCLUDED) & set(maker.make(plan, step, LANES).keys)
    maker.close()


@pytest.mark.parametrize("unit", ["caption", "question"])
def test_texts_come_with_their_clip_and_answer_and_one_clip_twice_is_known(root, unit):
    maker, plan = open_maker(stream_config(root, unit=unit))
    num_repeated = 0
    for step in range(2 * plan.steps_per_pass[0]):
        batch = maker.make(plan, step, LANES)
        for key, text, answer in zip(batch.keys, batch.captions, batch.answers, strict=True):
            assert text in texts_of(key, unit)
            assert answer == (f"answer to {text}" if unit == "question" else "")
        keys = np.array(batch.keys)
        same = keys[:, None] == keys[None]
        assert np.array_equal((batch.video_id_B[:, None] == batch.video_id_B[None]).numpy(), same)
        num_repeated += 8 - len(set(batch.keys))
        ids, _ = maker.tokenizer(batch.captions)
        assert np.array_equal(batch.ids_BL, ids)
    assert num_repeated > 0
    maker.close()


def test_one_clip_in_several_units_of_a_pass_is_seen_differently(root):
    maker, plan = open_maker(stream_config(root, unit="caption"))
    found = [one for step in range(plan.steps_per_pass[0]) for one in maker.read(plan, step, LANES).samples]
    most = Counter(one.metadata.key for one in found).most_common(1)[0][0]
    windows = {one.clip.view.window for one in found if one.metadata.key == most}
    assert len(windows) > 1


def fingerprint_of(root, **changes):
    config = stream_config(root, **changes)
    sources = open_sources(config.sources, config.unit)
    return fingerprint(config, sources, Tokenizer(config.text.tokenizer, 12), 4)


def test_the_fingerprint_holds_the_unit_and_what_is_excluded(root, tmp_path):
    plain = fingerprint_of(root)
    found = [plain, *(fingerprint_of(root, unit=unit) for unit in ("caption", "question"))]
    found.append(fingerprint_of(root, sources=excluding(root, tmp_path)))
    excluded = found[-1]["sources"]["0"]["exclude"]
    assert len(excluded) == 64
    assert plain["sources"]["0"]["exclude"] is None
    # The keys count, not their order, the comments or the place of the list.
    moved = tmp_path / "moved.txt"
    moved.write_text("\n".join(reversed(EXCLUDED)))
    assert fingerprint_of(root, sources=[{"path": root / "train", "exclude": moved}]) == found[-1]
    found.append(fingerprint_of(root, sources=excluding(root, tmp_path, EXCLUDED[:2])))
    assert all(one != other for number, one in enumerate(found) for other in found[:number])


def test_keys_that_are_nowhere_exclude_nothing(root, tmp_path):
    sources = excluding(root, tmp_path, ("nobody", "video-00003", "video-000"))
    maker, plan = open_maker(stream_config(root, sources=sources))
    assert plan.sources[0].num_samples == len(COUNTS) - 1
    ((taken, left_over),) = texts_of_passes(maker, plan, "clip", 1)
    assert {*taken, *left_over} == COUNTS.keys() - {"video-00003"}


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"video-00001\nvideo-00002 video-00003\n", r"line 2 of the exclude list is 'video-00002 video-00003'"),
        (b"\xff\xfe\x00", "cannot be read as an exclude list: .*utf-8"),
        (None, "cannot be read as an exclude list: .*exclude.txt"),
    ],
)
def test_a_list_that_cannot_be_read_is_named(root, tmp_path, contents, message):
    path = tmp_path / "exclude.txt"
    if contents is not None:
        path.write_bytes(contents)
    with pytest.raises(ShardError, match=message) as caught:
        open_maker(stream_config(root, sources=[{"path": root / "train", "exclude": path}]))
    assert str(caught.value).startswith(f"{path} ")


def test_a_list_that_leaves_too_little_is_refused(root, tmp_path):
    with pytest.raises(PlanError, match="source 'video' has 1 samples, less than one global batch of 8"):
        open_maker(stream_config(root, sources=excluding(root, tmp_path, list(COUNTS)[1:])))


def test_a_data_set_without_questions_has_none_to_pass_through(root, tmp_path):
    info = _write(tmp_path, "video-000000", ["video-00004", "video-00005"])
    save_dataset_info(tmp_path, DatasetInfo.of_shards("x", {"frames": {"size": 32}}, [info]))
    with pytest.raises(PlanError, match="source 'video' has 0"):
        open_maker(stream_config(root, sources=[{"path": tmp_path}], unit="question"))


def test_a_text_that_is_not_stored_is_an_unusable_sample(root):
    maker, plan = open_maker(stream_config(root, unit="question"))
    (source,) = maker.sources
    object.__setattr__(source, "locate", lambda shard, unit: (0, 0))
    assert isinstance(maker._read(plan[0], 0, 0, 0), SampleError)


@given(num_samples=st.integers(0, 12), data=st.data())
def test_clip_units_are_the_slots_that_are_not_excluded(num_samples, data):
    excluded = data.draw(st.sets(st.integers(0, num_samples - 1))) if num_samples else set()
    assert clip_units(num_samples, excluded).tolist() == [s for s in range(num_samples) if s not in excluded]


@given(counts=st.lists(st.integers(0, 4), max_size=12), data=st.data())
def test_text_units_are_the_texts_in_order(counts, data):
    excluded = data.draw(st.sets(st.integers(0, len(counts) - 1))) if counts else set()
    given_counts = np.array(counts, dtype=np.int64)
    found = text_units(given_counts, excluded)
    expected = [[s, n] for s, count in enumerate(counts) if s not in excluded for n in range(count)]
    assert found.shape == (len(expected), 2)
    assert found.tolist() == expected
    assert given_counts.tolist() == counts
