"""Batches in order from threads that are bounded, can be ended at any time, and leave nothing behind."""

import multiprocessing
import os
import shutil
import signal
import threading
import time
from contextlib import contextmanager
from dataclasses import replace

import psutil
import pytest
import torch
from stream_parts import (
    NUM_FRAMES,
    assert_batches_equal,
    loader_threads,
    open_maker,
    stored_as,
    stream_config,
    write_clips,
)

from alpro_stream.errors import PlanError, ShardError
from alpro_stream.shards import reader
from alpro_stream.shards.index import ShardIndex
from alpro_stream.stream import loader as loader_module
from alpro_stream.stream.beside import Beside
from alpro_stream.stream.clips import build_clip_decoder
from alpro_stream.stream.decode import DecodeConfig
from alpro_stream.stream.frames import choose_frames
from alpro_stream.stream.gauges import Gauges
from alpro_stream.stream.loader import Loader
from alpro_stream.stream.maker import BatchMaker
from alpro_stream.stream.quarantine import QuarantineError
from alpro_stream.stream.seeds import Draws
from alpro_stream.testing.shards import picture, write_dataset, write_tokenizer

LANES = range(4)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two steps of videos and one of images in a pass, with something left over of both."""
    root = tmp_path_factory.mktemp("stream")
    write_dataset(root / "train", video_shards=[5, 7, 1, 6], image_shards=[4, 6], num_frames=9)
    write_tokenizer(root / "tokenizer")
    return root


@pytest.fixture(scope="module")
def parts(root):
    """One maker for all tests."""
    maker, plan = open_maker(stream_config(root))
    yield maker, plan
    maker.close()


@pytest.fixture(scope="module")
def seven_steps(parts):
    """More than two passes, made one after the other without a loader."""
    maker, plan = parts
    return [maker.make(plan, step, LANES) for step in range(7)]


@pytest.fixture(autouse=True)
def _no_thread_is_left_behind(seven_steps):
    yield
    assert loader_threads() == []


def decoding(maker, **decode):
    """The same with other settings, and a decoder of its own."""
    changed, gauges = DecodeConfig.model_validate({"num_workers": 1, "num_processes": 1, **decode}), Gauges()
    decoder = build_clip_decoder(changed, maker.image_size, 8 * maker.num_frames, None, gauges)
    return replace(maker, config=maker.config.model_copy(update={"decode": changed}), decoder=decoder, gauges=gauges)


def open_loader(maker, plan, steps, rank=0, world_size=1, skip_steps=()):
    return Loader(
        maker,
        plan,
        rank=rank,
        world_size=world_size,
        first_step=steps.start,
        last_step=steps.stop,
        skip_steps=skip_steps,
    )


def read_all(maker, plan, steps, *place, **options):
    loader = open_loader(maker, plan, steps, *place, **options)
    try:
        return list(loader)
    finally:
        loader.close()


def test_steps_of_videos_and_steps_of_images(parts, seven_steps):
    _, plan = parts
    assert plan.steps_per_pass == (2, 1)
    assert [batch.kind for batch in seven_steps[:3]].count("image") == 1
    assert [batch.step for batch in seven_steps] == list(range(7))
    for batch in seven_steps:
        assert all(key.startswith(f"{batch.kind}-") for key in batch.keys)
    videos = [batch for batch in seven_steps if batch.kind == "video"]
    assert len({key for batch in videos[:2] for key in batch.keys}) == 16


@pytest.mark.parametrize("decode", [{"num_workers": 0}, {"prefetch": 1}, {"prefetch": 3}, {"queue_mb": 1}])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_same_global_batches_for_any_ranks_threads_and_queues(parts, seven_steps, world_size, decode):
    maker, plan = parts
    ranks = [read_all(decoding(maker, **decode), plan, range(7), rank, world_size) for rank in range(world_size)]
    assert [len(batches) for batches in ranks] == [7] * world_size
    for step, whole in enumerate(seven_steps):
        for rank, part in enumerate(whole.micro_batches(world_size)):
            assert_batches_equal(ranks[rank][step], part)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_gpu_works_beside_the_step_and_is_waited_for_before_a_batch_is_handed_over(parts, monkeypatch, num_workers):
    noted = []

    def note(what):
        noted.append((what, threading.current_thread().name == "alpro-loader"))

    class Noting(Beside):
        @contextmanager
        def entered(self):
            note("entered")
            yield
            note("left")

        def wait(self):
            note("waited")

        def lend(self, tensor):
            note("lent")

    class NotingMaker(BatchMaker):
        def finish(self, plan, started):
            note("made")
            return super().finish(plan, started)

    monkeypatch.setattr(loader_module, "Beside", Noting)
    maker = NotingMaker(**vars(decoding(parts[0], num_workers=num_workers, prefetch=1)))
    loader = open_loader(maker, parts[1], range(3))
    assert len(list(loader)) == 3
    loader.close()
    by_the_loader = num_workers > 0
    assert [one for one in noted if one[0] == "lent"] == [("lent", False)] * 3
    order = ["entered", *["made", "waited"] * 3, "left"] if by_the_loader else ["entered", "made", "left", "waited"] * 3
    assert [one for one in noted if one[0] != "lent"] == [(what, by_the_loader) for what in order]


@pytest.mark.parametrize(
    "stops",
    [
        (1,),
        (2,),  # passes of the videos end after steps 2 and 5, of the images after 1, 4 and 7
        (3,),
        (7,),
        (0, 0, 3, 3),  # straight after a restore
        (1, 4, 6),
        (1, 2, 3, 4, 5, 6, 7),
    ],
)
@pytest.mark.parametrize("num_workers", [0, 1, 4])
def test_a_resumed_stream_goes_on_as_if_nothing_had_been(parts, seven_steps, stops, num_workers):
    """What each loader prepared ahead is dropped and made again by the next."""
    maker, plan = parts
    taken = []
    for first, stop in zip((0, *stops), (*stops, 7), strict=True):
        loader = open_loader(decoding(maker, num_workers=num_workers), plan, range(first, 7))
        assert len(loader) == 7 - first
        batches = iter(loader)
        taken += [next(batches) for _ in range(first, stop)]
        loader.close()
    assert len(taken) == 7
    for found, expected in zip(taken, seven_steps, strict=True):
        assert_batches_equal(found, expected)


def test_four_ranks_then_two_then_four(parts, seven_steps):
    maker, plan = parts
    for world_size, steps in ((4, range(3)), (2, range(3, 5)), (4, range(5, 7))):
        ranks = [read_all(maker, plan, steps, rank, world_size) for rank in range(world_size)]
        for index, whole in enumerate(seven_steps[steps.start : steps.stop]):
            for batches, part in zip(ranks, whole.micro_batches(world_size), strict=True):
                assert_batches_equal(batches[index], part)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_ranks_that_do_not_divide_the_lanes_start_no_thread(parts, num_workers):
    maker, plan = parts
    with pytest.raises(PlanError, match=r"3 ranks do not divide the 4 lanes .*: 1, 2, 4 "):
        open_loader(decoding(maker, num_workers=num_workers), plan, range(7), world_size=3)


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(
    ("skip_steps", "left"),
    [
        ((), [0, 1, 2, 3, 4, 5, 6]),
        (((2, 4),), [0, 1, 4, 5, 6]),
        (((0, 2),), [2, 3, 4, 5, 6]),
        (((5, 7),), [0, 1, 2, 3, 4]),
        (((5, 90),), [0, 1, 2, 3, 4]),
        (((4, 6), (1, 3), (2, 5)), [0, 6]),
        (((2, 3), (3, 4)), [0, 1, 4, 5, 6]),
        (((0, 7),), []),
    ],
)
def test_its_length_is_exact_equal_on_all_ranks_and_counts_down(parts, seven_steps, skip_steps, left, num_workers):
    maker, plan = parts
    for rank in range(2):
        loader = open_loader(decoding(maker, num_workers=num_workers), plan, range(7), rank, 2, skip_steps)
        assert len(loader) == len(left)
        for number, batch in enumerate(loader, 1):
            assert len(loader) == len(left) - number
            assert_batches_equal(batch, seven_steps[left[number - 1]].micro_batches(2)[rank])
        assert len(loader) == 0
        loader.close()


def test_only_the_chosen_frames_are_read(root, parts, seven_steps, monkeypatch):
    maker, plan = parts
    config = maker.config
    expected = 0
    for key, (shard, slot) in zip(seven_steps[0].keys, plan[0].refs.reshape(-1, 2).tolist(), strict=True):
        index = ShardIndex.load(root / "train" / f"video-{shard:06d}.idx")
        assert index.key(slot) == key
        chosen = choose_frames(9, NUM_FRAMES, "headtail", Draws("frames", config.seed, "video", 0, key))
        members = [index.frame_members(slot)[frame] for frame in chosen]
        members += [member for member in index.members(slot) if member.extension == "json"]
        # Each with the header before it, which shows that the index fits the tar.
        expected += sum(512 + member.size for member in members)
    sizes = []

    def counted(descriptor, size, offset, pread=os.pread):
        data = pread(descriptor, size, offset)
        sizes.append(len(data))
        return data

    monkeypatch.setattr(reader.os, "pread", counted)
    maker.make(plan, 0, LANES)
    assert sum(sizes) == expected


@pytest.fixture
def damaged(root, tmp_path):
    shutil.copytree(root, tmp_path / "copy")
    return tmp_path / "copy"


def videos_only(root, **changes):
    return stream_config(root, sources=[{"path": root / "train", "kind": "video"}], **changes)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_missing_tar_is_an_error_of_the_consumer_after_the_batches_before_it(damaged, num_workers):
    (damaged / "train" / "video-000002.tar").unlink()
    maker, plan = open_maker(videos_only(damaged, window_shards=1, decode={"num_workers": num_workers}))
    bad = next(step for step in range(20) if 2 in plan[step].refs[..., 0])
    loader = open_loader(maker, plan, range(bad + 5))
    taken = []
    try:
        with pytest.raises(ShardError, match=r"^video-000002:0 video-\d+: cannot read"):
            taken.extend(loader)
        assert [batch.step for batch in taken] == list(range(bad))
    finally:
        loader.close()
        maker.close()
    assert list(loader) == []


def test_too_many_unusable_samples_are_an_error_of_the_consumer(damaged):
    path = damaged / "train" / "video-000001.tar"
    os.truncate(path, path.stat().st_size // 3)
    maker, plan = open_maker(videos_only(damaged, quarantine={"max_rate": 0.001}))
    loader = open_loader(maker, plan, range(20))
    try:
        with pytest.raises(QuarantineError, match=r"cannot be used \(truncated"):
            list(loader)
        # It is said to whoever asks, not once.
        with pytest.raises(QuarantineError, match="cannot be used"):
            next(iter(loader))
    finally:
        loader.close()
        maker.close()


class Observed:
    """A clip decoder that says when it was called, may be held up, and may give a clip more rows of pixels."""

    def __init__(self, decoder, enlarged=1):
        self._decoder, self._enlarged = decoder, enlarged
        self.device = decoder.device
        self.num_calls = 0
        self.called = threading.Semaphore(0)
        self.go_on = threading.Event()
        self.go_on.set()

    def empty(self, num_clips, num_frames):
        return self._decoder.empty(num_clips, num_frames).repeat(1, 1, self._enlarged, self._enlarged, 1)

    def finished(self, pixels):
        return self._decoder.finished(pixels)

    def start(self, clips, out_BTHWC):
        return lambda: self._decode(clips, out_BTHWC)

    def _decode(self, clips, out_BTHWC):
        self.num_calls += 1
        self.called.release()
        self.go_on.wait(60)
        side = out_BTHWC.shape[2] // self._enlarged
        room = self._decoder.empty(*out_BTHWC.shape[:2])
        errors = self._decoder.decode(clips, room)
        out_BTHWC[:, :, :side, :side] = room
        return errors


def observed(maker, enlarged=1, **decode):
    return replace(decoding(maker, **decode), decoder=Observed(maker.decoder, enlarged))


def wait_for_calls(decoder, count):
    for _ in range(count):
        assert decoder.called.acquire(timeout=60)


def wait_until_full(decoder, count):
    """Waits for so many calls; that no other one follows can only be watched for a while."""
    wait_for_calls(decoder, count)
    assert not decoder.called.acquire(timeout=0.4)


@pytest.mark.parametrize("prefetch", [1, 3])
def test_at_most_prefetch_batches_are_made_ahead(parts, prefetch):
    maker, plan = parts
    maker = observed(maker, prefetch=prefetch)
    loader = open_loader(maker, plan, range(8))
    wait_until_full(maker.decoder, prefetch)
    assert len([batch for _, batch in zip(range(2), loader, strict=False)]) == 2
    wait_until_full(maker.decoder, 2)
    assert [batch.step for batch in loader] == list(range(2, 8))
    assert maker.decoder.num_calls == 8
    loader.close()


@pytest.mark.parametrize(("queue_mb", "num_waiting"), [(1, 1), (3, 2)])
def test_queues_are_bounded_in_bytes_and_let_one_batch_through(parts, queue_mb, num_waiting):
    """Batches of 1.2 MB: none fits 1 MiB, two fit 3 MiB."""
    maker, plan = parts
    maker = observed(maker, enlarged=4, prefetch=8, queue_mb=queue_mb)
    steps = [step for step in range(30) if plan.place(step)[0] == 0]
    skipped = tuple((step, step + 1) for step in range(30) if step not in steps)
    loader = open_loader(maker, plan, range(30), skip_steps=skipped)
    wait_until_full(maker.decoder, num_waiting)
    assert [batch.step for batch in loader] == steps
    figures = loader.figures()
    loader.close()
    # With what is stored of the batches that wait to be decoded, some kilobytes.
    assert num_waiting * 1.2 < figures["stream/queue_mb"] < max(queue_mb * 1.049, 1.3) + 0.4


class HeldReading(BatchMaker):
    """A maker that stops in the middle of reading."""

    reading, go_on = threading.Event(), threading.Event()

    def read(self, plan, step, lanes):
        self.reading.set()
        self.go_on.wait(60)
        return super().read(plan, step, lanes)


def test_without_threads_a_batch_is_made_when_it_is_asked_for(parts):
    maker, plan = parts
    maker = observed(maker, num_workers=0)
    before = set(threading.enumerate())
    loader = open_loader(maker, plan, range(5))
    assert maker.decoder.num_calls == 0
    for number, batch in enumerate(loader, 1):
        assert batch.step == number - 1
        assert maker.decoder.num_calls == number
        assert not set(threading.enumerate()) - before
        if number == 3:
            break
    loader.close()
    assert list(loader) == []
    assert maker.decoder.num_calls == 3


@pytest.mark.timeout(60)
def test_close_while_all_is_prepared_ends_the_threads(parts):
    maker, plan = parts
    maker = observed(maker, prefetch=2)
    loader = open_loader(maker, plan, range(1000))
    wait_until_full(maker.decoder, 2)
    assert sorted(thread.name for thread in loader_threads()) == ["alpro-loader"]
    loader.close()
    assert loader_threads() == []
    assert list(loader) == []
    assert maker.decoder.num_calls == 2
    loader.close()


def close_beside(loader):
    closing = threading.Thread(target=loader.close)
    closing.start()
    deadline = time.monotonic() + 60
    while not loader._ready.is_closed:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return closing


@pytest.mark.timeout(60)
def test_close_while_a_batch_is_being_decoded(parts):
    maker, plan = parts
    maker = observed(maker)
    maker.decoder.go_on.clear()
    loader = open_loader(maker, plan, range(1000))
    wait_for_calls(maker.decoder, 1)
    closing = close_beside(loader)
    maker.decoder.go_on.set()
    closing.join(60)
    assert loader_threads() == []
    assert list(loader) == []
    assert maker.decoder.num_calls == 1


@pytest.mark.timeout(60)
def test_close_while_a_batch_is_being_read(parts):
    maker, plan = parts
    held = HeldReading(**vars(observed(maker)))
    loader = open_loader(held, plan, range(1000))
    assert held.reading.wait(60)
    closing = close_beside(loader)
    assert closing.is_alive()
    held.go_on.set()
    closing.join(60)
    assert loader_threads() == []
    assert list(loader) == []
    assert held.decoder.num_calls == 0


@pytest.mark.timeout(60)
def test_close_while_the_step_waits_for_a_batch(parts):
    """Another thread closes the loader: whoever waits for a batch is told that none comes."""
    maker, plan = parts
    maker = observed(maker)
    maker.decoder.go_on.clear()
    loader = open_loader(maker, plan, range(1000))
    taken = []
    step = threading.Thread(target=lambda: taken.extend(loader))
    step.start()
    wait_for_calls(maker.decoder, 1)
    closing = close_beside(loader)
    step.join(10)
    assert not step.is_alive()
    assert taken == []
    maker.decoder.go_on.set()
    closing.join(60)


@pytest.mark.timeout(60)
def test_iterating_again_after_the_end_does_not_wait(parts):
    loader = open_loader(*parts, range(2))
    assert len(list(loader)) == 2
    assert list(loader) == []
    loader.close()
    assert read_all(*parts, range(3, 3)) == []


def load_and_wait(root, told):
    maker, plan = open_maker(stream_config(root))
    loader = open_loader(maker, plan, range(1000))
    next(iter(loader))
    told.send([child.pid for child in psutil.Process().children(recursive=True)])
    signal.pause()


def test_a_killed_process_leaves_no_process_behind(root, tmp_path):
    # Progressive frames, which are decoded in a process.
    write_clips(tmp_path / "train", [9, 9], lambda number: [stored_as(picture(number, 0, 32), progressive=True)])
    (tmp_path / "tokenizer").symlink_to(root / "tokenizer")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["alpro_stream.run"])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=load_and_wait, args=(tmp_path, theirs))
    process.start()
    theirs.close()
    children = [psutil.Process(pid) for pid in ours.recv()]
    assert any("isolated_process" in " ".join(child.cmdline()) for child in children)
    process.kill()
    process.join()
    _, alive = psutil.wait_procs(children, timeout=60)
    assert alive == []


def test_the_tensors_of_a_batch_are_its_own(parts, seven_steps):
    """A decoder that reused its memory would change batches that wait in the queue."""
    maker, plan = parts
    batches = read_all(decoding(maker, prefetch=3), plan, range(7))
    before = [batch.frames_BTHWC.clone() for batch in batches]
    read_all(decoding(maker), plan, range(3))
    assert all(torch.equal(batch.frames_BTHWC, pixels) for batch, pixels in zip(batches, before, strict=True))
