"""Workers: what becomes of frames when processes end, hang, or are given more than one call; and their memory."""

import gc
import os
import threading
import time
from contextlib import closing, suppress

import numpy as np
import psutil
import pytest
import torch
from stream_jpegs import jpeg, waves

from alpro_stream.errors import AlproError
from alpro_stream.stream.decode import DecodeConfig, FrameError, FrameRequest, build_decoder
from alpro_stream.stream.reused import ReusedMemory
from alpro_stream.stream.turbo import TurboDecoder
from alpro_stream.stream.view import View
from alpro_stream.stream.worker_process import decode_answer, encode_answer
from alpro_stream.stream.workers import TurboWorkers

SIZE = 48
# No resize: for that a process loads torch, which takes longer than the deadlines here.
WINDOW = (0.1, 0.0, 48 / 60, 48 / 50)
FAULTY = View(WINDOW, operations=(("no operation", 0.0),))
REQUESTS = [
    FrameRequest(jpeg(waves(60, 50, number)), 60, 50, View(WINDOW, flip=number % 2 == 0)) for number in range(12)
]


@pytest.fixture(scope="module")
def expected():
    with closing(TurboDecoder(1)) as decoder:
        return decode(decoder, REQUESTS)


@pytest.fixture
def workers():
    with closing(TurboWorkers(2, 60.0)) as decoder:
        yield decoder


def room_for(decoder, requests):
    return decoder.empty((len(requests), SIZE, SIZE, 3)).fill_(7)


def decode(decoder, requests):
    out = room_for(decoder, requests)
    assert decoder.decode(requests, out, range(len(requests))) == {}
    return out.numpy()


def processes():
    """Those that run."""
    found = []
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):  # a zombie is none either
            if "alpro_stream.stream.worker_process" in child.cmdline():
                found.append(child)
    return found


def test_calls_are_finished_in_any_order(workers, expected):
    """The substitute of a sample is decoded while the next batch is."""
    rooms = [room_for(workers, REQUESTS) for _ in range(4)]
    calls = [workers.start(REQUESTS, room, range(len(REQUESTS))) for room in rooms]
    for number in (2, 0, 3, 1):
        assert calls[number]() == {}
        np.testing.assert_array_equal(rooms[number], expected)


def test_rows_go_where_they_belong_and_nowhere_else(workers, expected):
    room = workers.empty((20, SIZE, SIZE, 3)).fill_(7)
    rows = [1, 4, 5, 11, 19]
    assert workers.decode(REQUESTS[:5], room[:], rows) == {}
    np.testing.assert_array_equal(room.numpy()[rows], expected[:5])
    others = sorted(set(range(20)) - set(rows))
    assert (room.numpy()[others] == 7).all()


def test_memory_of_others_is_refused(workers):
    room = workers.empty((4, SIZE, SIZE, 3))
    for other in (torch.empty(2, SIZE, SIZE, 3, dtype=torch.uint8), room[::2]):
        with pytest.raises(ValueError, match="memory of its decoder's `empty`"):
            workers.start(REQUESTS[:2], other, range(2))


def test_processes_that_were_killed_between_calls_are_replaced(workers, expected):
    np.testing.assert_array_equal(decode(workers, REQUESTS), expected)
    for process in (killed := processes()):
        process.kill()
        process.wait(30)
    assert len(killed) == 2
    np.testing.assert_array_equal(decode(workers, REQUESTS), expected)
    assert len(processes()) == 2


@pytest.mark.parametrize("is_killed", [True, False])
def test_processes_that_end_or_hang_with_calls_in_hand_are_replaced(expected, is_killed):
    with closing(TurboWorkers(2, 60.0 if is_killed else 1.0)) as workers:
        decode(workers, REQUESTS)
        for process in processes():
            process.suspend()
        rooms = [room_for(workers, REQUESTS) for _ in range(3)]
        calls = [workers.start(REQUESTS, room, range(len(REQUESTS))) for room in rooms]
        if is_killed:
            for process in processes():
                process.kill()
        for call, room in zip(calls, rooms, strict=True):
            assert call() == {}
            np.testing.assert_array_equal(room, expected)


def test_one_frame_that_ends_its_process_costs_itself_alone(expected):
    """Here one whose view has no such operation, on which the process fails as it would on a bug of a library."""
    with closing(TurboWorkers(1, 2.0)) as workers:
        hard = FrameRequest(REQUESTS[0].jpeg, 60, 50, FAULTY)
        requests = [*REQUESTS[:5], hard, *REQUESTS[5:]]
        room = room_for(workers, requests)
        errors = workers.decode(requests, room, range(len(requests)))
        assert errors == {5: FrameError("crash", "the process that decodes it ended with status 1, twice")}
        np.testing.assert_array_equal(np.delete(room.numpy(), 5, 0), expected)
        np.testing.assert_array_equal(decode(workers, REQUESTS), expected)


class Hanging(View):
    """A view that keeps a process for ever, as a decoder with a fault might."""

    def __reduce__(self):
        return time.sleep, (600,)


@pytest.mark.parametrize(("view", "cause"), [(FAULTY, "crash"), (Hanging(WINDOW), "deadline")])
@pytest.mark.timeout(120)
def test_a_large_share_with_a_frame_that_ends_or_stops_its_process_holds_nobody_up(expected, view, cause):
    """More single frames than the connection holds messages."""
    bad = FrameRequest(REQUESTS[0].jpeg, 60, 50, view)
    requests = [REQUESTS[number % 12] for number in range(800)]
    requests[400] = bad
    with closing(TurboWorkers(1, 2.0)) as workers:
        room = room_for(workers, requests)
        errors = workers.decode(requests, room, range(800))
    assert {number: error.cause for number, error in errors.items()} == {400: cause}
    for number in [*range(400), *range(401, 800)]:
        assert np.array_equal(room[number].numpy(), expected[number % 12]), number


@pytest.mark.timeout(120)
def test_a_process_that_is_stopped_never_blocks_who_gives_it_work(workers, expected):
    decode(workers, REQUESTS)
    for process in (stopped := processes()):
        process.suspend()
    many = [REQUESTS[number % 12] for number in range(2400)]
    rooms = [room_for(workers, many) for _ in range(3)]
    calls = [workers.start(many, room, range(2400)) for room in rooms]
    for process in stopped:
        process.resume()
    for call, room in zip(calls, rooms, strict=True):
        assert call() == {}
        np.testing.assert_array_equal(room[-12:].numpy(), expected)


def test_loading_what_resizing_takes_is_no_matter_of_the_deadline():
    requests = [FrameRequest(one.jpeg, 60, 50, View()) for one in REQUESTS]
    with closing(TurboDecoder(1)) as threads:
        seen = decode(threads, requests)
    with closing(TurboWorkers(1, 0.5)) as workers:
        np.testing.assert_array_equal(decode(workers, requests), seen)
        np.testing.assert_array_equal(decode(workers, requests), seen)


def test_memory_of_a_call_that_nobody_waits_for_is_not_given_to_others_while_it_is_written(workers):
    decode(workers, REQUESTS)
    for process in (stopped := processes()):
        process.suspend()
    room = room_for(workers, REQUESTS)
    taken = workers._memory.place_of(room)[0]
    workers.start(REQUESTS, room, range(12))
    del room
    gc.collect()
    others = [workers.empty((12, SIZE, SIZE, 3)).fill_(7) for _ in range(3)]
    assert taken not in [workers._memory.place_of(other)[0] for other in others]
    for process in stopped:
        process.resume()
    decode(workers, REQUESTS)
    assert all((other == 7).all() for other in others)


def test_what_nobody_waits_for_is_not_done_by_the_next_process(workers, expected):
    for _ in range(5):
        thread = threading.Thread(target=lambda: workers.start(REQUESTS, room_for(workers, REQUESTS), range(12)))
        thread.start()
        thread.join()
    for process in processes():
        process.kill()
        process.wait(30)
    np.testing.assert_array_equal(decode(workers, REQUESTS), expected)
    assert all(not worker._given for worker in workers._workers)


def test_a_closed_decoder_says_so():
    workers = TurboWorkers(1, 60.0)
    room = room_for(workers, REQUESTS)
    call = workers.start(REQUESTS, room, range(12))
    workers.close()
    with pytest.raises(AlproError, match="their decoder is closed"):
        call()
    with pytest.raises(RuntimeError, match="closed"):
        workers.empty((1, SIZE, SIZE, 3))


def test_processes_that_cannot_start_are_an_error_that_says_so(monkeypatch):
    monkeypatch.setattr("alpro_stream.stream.workers._MODULE", "alpro_stream.no_such_module")
    with closing(TurboWorkers(1, 60.0)) as workers, pytest.raises(AlproError, match="could not be started"):
        workers.decode(REQUESTS[:1], room_for(workers, REQUESTS[:1]), range(1))


def test_processes_end_with_the_decoder_and_with_the_thread_that_called(expected):
    workers = TurboWorkers(2, 60.0)
    thread = threading.Thread(target=decode, args=(workers, REQUESTS))
    thread.start()
    thread.join()
    wait_for_no_process()
    np.testing.assert_array_equal(decode(workers, REQUESTS), expected)  # another thread's call starts others
    workers.close()
    workers.close()
    assert processes() == []


def wait_for_no_process():
    deadline = time.monotonic() + 30
    while processes():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_decoder_that_is_closed_with_calls_in_hand_leaves_no_process():
    workers = TurboWorkers(2, 60.0)
    decode(workers, REQUESTS)
    for process in processes():
        process.suspend()
    workers.start(REQUESTS, room_for(workers, REQUESTS), range(len(REQUESTS)))
    workers.close()
    assert processes() == []


def test_what_a_process_says_is_not_trusted():
    assert decode_answer(encode_answer(3, {1: "a", 7: "b"})) == (3, {1: "a", 7: "b"})
    for data in (
        b"",
        b"{}",
        b"[1]",
        b'["1", []]',
        b'[1, [["2", "x"]]]',
        b"[true, []]",
        b"[" * 200000,
        b"5",
        b"[1, [[2, 3]]]",
        b"[1, [[2]]]",
        b"\xff",
    ):
        with pytest.raises(ValueError):  # noqa: PT011 - of JSON or ours
            decode_answer(data)


def test_what_decodes_is_what_the_settings_say():
    for changes, kind in [
        ({}, TurboWorkers),
        ({"workers": "threads"}, TurboDecoder),
        ({"num_workers": 0}, TurboDecoder),
    ]:
        with closing(build_decoder(DecodeConfig.model_validate(changes), SIZE, 4, None)) as decoder:
            assert type(decoder) is kind


# Memory


@pytest.fixture(params=[True, False])
def memory(request):
    with closing(ReusedMemory(shared=request.param)) as memory:
        yield memory


def test_memory_is_used_again_when_the_last_view_of_it_is_gone(memory):
    tensor = memory.empty((4, 10, 10, 3))
    place = memory.place_of(tensor)
    view = tensor[1:3].flatten(0, 1).numpy()[3]
    del tensor
    gc.collect()
    other = memory.empty((4, 10, 10, 3))
    assert memory.place_of(other) != place
    other.fill_(1)
    view[...] = 2
    assert (other == 1).all()
    del view
    gc.collect()
    again = memory.empty((3, 10, 10, 3))
    assert memory.place_of(again) == place


def test_memory_does_not_grow_with_the_number_of_batches():
    memory = ReusedMemory(shared=True)
    sizes = {
        os.fstat(memory.descriptor).st_size
        for number in range(50)
        if memory.empty((900 + number, 100)).fill_(1).numel()
    }
    assert len(sizes) == 1


def test_memory_of_different_tensors_is_apart(memory):
    tensors = [memory.empty((number + 1, 1000)).fill_(number) for number in range(200)]
    for number, tensor in enumerate(tensors):
        assert (tensor == number).all()
    del tensors
    memory.empty((0,))


def test_tensors_outlive_their_memory():
    memory = ReusedMemory(shared=True)
    tensor = memory.empty((5, 5)).fill_(3)
    memory.close()
    memory.close()
    assert (tensor == 3).all()
