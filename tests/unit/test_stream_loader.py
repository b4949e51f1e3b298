import os
import shutil
import threading

import pytest
import torch
from stream_parts import (
    NUM_FRAMES,
    assert_batches_equal,
    loader_threads,
    open_loader,
    open_maker,
    read_all,
    stream_config,
)

from alpro_stream.errors import DataError, PlanError, ShardError
from alpro_stream.shards import reader
from alpro_stream.shards.index import ShardIndex
from alpro_stream.stream.frames import choose_frames
from alpro_stream.stream.seeds import Draws
from alpro_stream.testing.shards import write_dataset, write_tokenizer


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two steps of videos and one of images in a pass, with something left over of both."""
    root = tmp_path_factory.mktemp("stream")
    write_dataset(root / "train", video_shards=[5, 7, 1, 6], image_shards=[4, 6], num_frames=9)
    write_tokenizer(root / "tokenizer")
    return root


@pytest.fixture(scope="module")
def parts(root):
    return open_maker(stream_config(root))


@pytest.fixture(scope="module")
def seven_steps(parts):
    """More than two passes, made one after the other without a loader."""
    maker, plan = parts
    return [maker.make(plan, step, range(4)) for step in range(7)]


@pytest.fixture(autouse=True)
def _no_thread_is_left_behind():
    yield
    assert loader_threads() == []


def test_steps_of_videos_and_steps_of_images(parts, seven_steps):
    _, plan = parts
    assert plan.steps_per_pass == (2, 1)
    assert [batch.kind for batch in seven_steps[:3]].count("image") == 1
    assert [batch.step for batch in seven_steps] == list(range(7))
    for batch in seven_steps:
        assert all(key.startswith(f"{batch.kind}-") for key in batch.keys)
    videos = [batch for batch in seven_steps if batch.kind == "video"]
    assert len({key for batch in videos[:2] for key in batch.keys}) == 16


@pytest.mark.parametrize("prefetch", [1, 3])
@pytest.mark.parametrize("world_size", [1, 2])
def test_the_same_global_batches_for_any_ranks_and_prefetch(root, seven_steps, world_size, prefetch):
    config = stream_config(root, decode={"num_threads": 1, "prefetch": prefetch})
    ranks = [read_all(*open_maker(config), range(7), rank, world_size) for rank in range(world_size)]
    assert [len(batches) for batches in ranks] == [7] * world_size
    for step, whole in enumerate(seven_steps):
        for rank, part in enumerate(whole.micro_batches(world_size)):
            assert_batches_equal(ranks[rank][step], part)


@pytest.mark.parametrize("step", [1, 3, 4, 7])
def test_a_resumed_stream_goes_on_as_if_nothing_had_been(root, seven_steps, step):
    """Steps 2 and 5 end passes; what the first loader prepared ahead is dropped and made again."""
    maker, plan = open_maker(stream_config(root))
    loader = open_loader(maker, plan, range(7))
    taken = [batch for _, batch in zip(range(step), loader, strict=False)]
    loader.close()
    taken += read_all(*open_maker(stream_config(root)), range(step, 7))
    assert len(taken) == 7
    for found, expected in zip(taken, seven_steps, strict=True):
        assert_batches_equal(found, expected)


def test_resumed_with_other_ranks(root, seven_steps):
    maker, plan = open_maker(stream_config(root))
    ranks = [read_all(maker, plan, range(3, 7), rank, 4) for rank in range(4)]
    for step, whole in enumerate(seven_steps[3:]):
        keys = tuple(key for batches in ranks for key in batches[step].keys)
        assert keys == whole.keys
        assert torch.equal(torch.cat([batches[step].frames_BTHWC for batches in ranks]), whole.frames_BTHWC)


def test_ranks_that_do_not_divide_the_lanes_start_no_thread(parts):
    with pytest.raises(PlanError, match="3 ranks do not divide the 4 lanes"):
        open_loader(*parts, range(7), world_size=3)


def member_of(directory, shard, slot, frame):
    return ShardIndex.load(directory / f"{shard}.idx").frame_members(slot)[frame]


def test_only_the_chosen_frames_are_read(root, seven_steps, monkeypatch):
    config = stream_config(root)
    maker, plan = open_maker(config)
    expected = 0
    for key, (shard, slot) in zip(seven_steps[0].keys, plan[0].refs.reshape(-1, 2).tolist(), strict=True):
        index = ShardIndex.load(root / "train" / f"video-{shard:06d}.idx")
        assert index.key(slot) == key
        chosen = choose_frames(9, NUM_FRAMES, "headtail", Draws("frames", config.seed, "video", 0, key))
        expected += sum(index.frame_members(slot)[frame].size for frame in chosen)
        metadata = [member.size for member in index.members(slot) if member.extension == "json"]
        expected += sum(metadata)
    sizes = []

    def counted(descriptor, size, offset, pread=os.pread):
        data = pread(descriptor, size, offset)
        sizes.append(len(data))
        return data

    monkeypatch.setattr(reader.os, "pread", counted)
    maker.make(plan, 0, range(4))
    assert sum(sizes) == expected


@pytest.fixture
def damaged(root, tmp_path):
    """A copy of the data set whose video-000001:3 has zeros in the second half of all its frames."""
    shutil.copytree(root, tmp_path / "copy")
    directory = tmp_path / "copy" / "train"
    with (directory / "video-000001.tar").open("r+b") as file:
        for frame in range(9):
            member = member_of(directory, "video-000001", 3, frame)
            file.seek(member.offset + member.size // 2)
            file.write(bytes(member.size - member.size // 2))
    return tmp_path / "copy"


def videos_only(root, **changes):
    return stream_config(root, sources=[{"path": root / "train", "kind": "video"}], **changes)


def test_a_damaged_frame_is_named_to_the_consumer_after_the_batches_before_it(damaged):
    maker, plan = open_maker(videos_only(damaged))
    (bad, *_) = [step for step in range(20) if [1, 3] in plan[step].refs.reshape(-1, 2).tolist()]
    loader = open_loader(maker, plan, range(bad + 5))
    taken = []
    try:
        with pytest.raises(DataError, match=r"^video-000001:3 video-00008: a stored frame cannot be decoded \(\w"):
            taken.extend(loader)
        assert len(taken) < bad + 5
        with pytest.raises(DataError, match=r"^video-000001:3 "):
            next(iter(loader))
    finally:
        loader.close()
    # The decoder is whole again: other steps come as ever.
    good = next(step for step in range(bad + 1, bad + 9) if [1, 3] not in plan[step].refs.reshape(-1, 2).tolist())
    assert len(maker.make(plan, good, range(4)).keys) == 8


def test_a_tar_that_was_cut_off_is_an_error_of_the_consumer(damaged):
    path = damaged / "train" / "video-000001.tar"
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(ShardError, match=r"^video-000001:\d+ video-\d+: cannot read"):
        read_all(*open_maker(videos_only(damaged)), range(20))


class Observed:
    """A decoder that says when it was called, and may be held up."""

    def __init__(self, decoder):
        self._decoder = decoder
        self.num_calls = 0
        self.called = threading.Semaphore(0)
        self.go_on = threading.Event()
        self.go_on.set()

    def decode(self, requests):
        self.num_calls += 1
        self.called.release()
        self.go_on.wait(60)
        return self._decoder.decode(requests)


def wait_for_calls(decoder, count):
    for _ in range(count):
        assert decoder.called.acquire(timeout=60)


def wait_until_full(decoder, count):
    """Waits for so many calls; that no other one follows can only be watched for a while."""
    wait_for_calls(decoder, count)
    assert not decoder.called.acquire(timeout=0.5)


@pytest.mark.parametrize("prefetch", [1, 3])
def test_at_most_prefetch_batches_are_made_ahead(root, prefetch):
    config = stream_config(root, decode={"num_threads": 1, "prefetch": prefetch})
    maker, plan = open_maker(config, wrap=Observed)
    loader = open_loader(maker, plan, range(8))
    wait_until_full(maker.decoder, prefetch)
    assert len([batch for _, batch in zip(range(2), loader, strict=False)]) == 2
    wait_until_full(maker.decoder, 2)
    assert [batch.step for batch in loader] == list(range(2, 8))
    assert maker.decoder.num_calls == 8
    loader.close()


@pytest.mark.timeout(60)
def test_close_while_all_is_prepared_ends_the_thread(root):
    maker, plan = open_maker(stream_config(root, decode={"num_threads": 1, "prefetch": 2}), wrap=Observed)
    loader = open_loader(maker, plan, range(1000))
    wait_until_full(maker.decoder, 2)
    loader.close()
    assert loader_threads() == []
    assert list(loader) == []
    assert maker.decoder.num_calls == 2
    loader.close()


@pytest.mark.timeout(60)
def test_close_while_a_batch_is_being_made(root):
    maker, plan = open_maker(stream_config(root), wrap=Observed)
    maker.decoder.go_on.clear()
    loader = open_loader(maker, plan, range(1000))
    wait_for_calls(maker.decoder, 1)
    closing = threading.Thread(target=loader.close)
    closing.start()
    maker.decoder.go_on.set()
    closing.join(60)
    assert loader_threads() == []
    assert list(loader) == []


@pytest.mark.timeout(60)
def test_iterating_again_after_the_end_does_not_wait(parts):
    loader = open_loader(*parts, range(2))
    assert len(list(loader)) == 2
    assert list(loader) == []
    loader.close()
    assert read_all(*parts, range(3, 3)) == []
