"""Stored frames by libjpeg-turbo: Pillow's pixels, whatever is decoded beside them, in threads or processes."""

import random
import threading
from contextlib import closing
from functools import partial

import numpy as np
import pytest
from PIL import Image
from stream_jpegs import jpeg, pixels_of, waves

from alpro_stream.stream.decode import FrameRequest
from alpro_stream.stream.turbo import TurboDecoder
from alpro_stream.stream.view import View, show
from alpro_stream.stream.workers import TurboWorkers

SIZE = 48
ERASED = 77
VIEWS = (
    View(),
    View((0.125, 0.25, 0.5, 0.5), flip=True),
    View((0.1, 0.2, 0.7, 0.6), "bicubic", operations=(("rotate", 15.0), ("sharpness", 1.36))),
)


@pytest.fixture(scope="module", params=["threads", "processes"])
def decoder(request):
    with closing(TurboDecoder(2) if request.param == "threads" else TurboWorkers(2, 60.0)) as decoder:
        yield decoder


def request(data, view=None):
    width, height = pixels_of(data).shape[1::-1]
    return FrameRequest(data, width, height, view or View())


def decode(decoder, requests, size=SIZE):
    out = decoder.empty((len(requests), size, size, 3)).fill_(ERASED)
    return decoder.decode(requests, out, range(len(requests))), out.numpy()


def seen(data, view, size=SIZE):
    out = np.empty((size, size, 3), np.uint8)
    show(pixels_of(data), view, out)
    return out


@pytest.mark.parametrize("chroma", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("size", [(64, 64), (101, 67), (33, 40), (17, 3), (1, 1)])
def test_what_is_seen_are_pillows_pixels(decoder, size, chroma):
    data = jpeg(waves(*size), subsampling=chroma)
    for view in VIEWS:
        errors, (found,) = decode(decoder, [request(data, view)])
        assert errors == {}
        np.testing.assert_array_equal(found, seen(data, view))


@pytest.mark.parametrize("flip", [False, True])
def test_a_crop_without_a_resize_is_bit_by_bit_that_of_the_stored_frame(decoder, flip):
    data = jpeg(waves(64, 60), subsampling="4:2:0")
    (window,) = ((8 / 64, 5 / 60, 48 / 64, 48 / 60),)
    _, (found,) = decode(decoder, [request(data, View(window, flip=flip))])
    cut = pixels_of(data)[5:53, 8:56]
    np.testing.assert_array_equal(found, cut[:, ::-1] if flip else cut)


@pytest.mark.parametrize("view", [View(), View(flip=True)])
def test_a_whole_frame_of_the_size_that_is_wanted_is_the_stored_one(decoder, view):
    data = jpeg(waves(SIZE, SIZE), subsampling="4:2:0")
    _, (found,) = decode(decoder, [request(data, view)])
    np.testing.assert_array_equal(found, pixels_of(data)[:, ::-1] if view.flip else pixels_of(data))


@pytest.mark.parametrize("options", [{}, {"restart_marker_blocks": 2}, {"optimize": True}, {"exif": Image.Exif()}])
def test_whatever_baseline_encoders_write(decoder, options):
    data = jpeg(waves(64, 64), **options)
    _, (found,) = decode(decoder, [request(data)])
    np.testing.assert_array_equal(found, seen(data, View()))


def test_grey_frames_become_rgb_and_rgb_ones_stay(decoder):
    for data in (jpeg(waves(64, 64).convert("L")), jpeg(waves(64, 64), keep_rgb=True)):
        errors, (found,) = decode(decoder, [request(data)])
        assert errors == {}
        np.testing.assert_array_equal(found, seen(data, View()))


@pytest.fixture(scope="module")
def mixed():
    """Frames of several shapes, a third of them of the size that is wanted."""
    shapes = [(64, 64), (SIZE, SIZE), (90, 50)]
    return [request(jpeg(waves(*shapes[i % 3], i), subsampling=i % 3), VIEWS[i % 2]) for i in range(12)]


BUILDERS = [
    *(pytest.param(partial(TurboDecoder, count), id=f"{count} threads") for count in (0, 1, 2, 4)),
    *(pytest.param(partial(TurboWorkers, count, 60.0), id=f"{count} processes") for count in (1, 3)),
]


@pytest.mark.parametrize("build", BUILDERS)
def test_any_number_of_workers_any_company_and_any_order_give_the_same_pixels(mixed, build):
    expected = [seen(one.jpeg, one.view) for one in mixed]
    assert len({pixels.tobytes() for pixels in expected}) == len(mixed)
    rng = random.Random(0)
    with closing(build()) as decoder:
        for _ in range(5):
            numbers = rng.sample(range(len(mixed)), rng.randint(1, len(mixed)))
            errors, found = decode(decoder, [mixed[number] for number in numbers])
            assert errors == {}
            np.testing.assert_array_equal(found, np.stack([expected[number] for number in numbers]))


def test_no_requests_are_no_work(decoder):
    assert decode(decoder, [])[0] == {}


def test_rows_between_those_asked_for_are_left_alone(decoder, mixed):
    rows = [1, 2, 6, 9]
    room = decoder.empty((11, SIZE, SIZE, 3)).fill_(ERASED)
    assert decoder.decode(mixed[:4], room, rows) == {}
    for row, pixels in enumerate(room.numpy()):
        if row in rows:
            one = mixed[rows.index(row)]
            np.testing.assert_array_equal(pixels, seen(one.jpeg, one.view))
        else:
            assert (pixels == ERASED).all()


def test_a_part_of_a_batch_is_written_in_place(decoder, mixed):
    batch = decoder.empty((4, 3, SIZE, SIZE, 3)).fill_(ERASED)
    assert decoder.decode(mixed[:3], batch[2:3].flatten(0, 1), range(3)) == {}
    np.testing.assert_array_equal(batch[2], np.stack([seen(one.jpeg, one.view) for one in mixed[:3]]))
    assert (batch[[0, 1, 3]] == ERASED).all()


def damaged(data):
    """The frame with damage behind its header that other decoders paint over, and with none left; by name."""
    scan = data.index(b"\xff\xda") + 14
    middle = (scan + len(data)) // 2
    return {
        "nothing is stored": data[:scan] + b"\xff\xd9",
        "its end is missing": data[:middle] + b"\xff\xd9",
        "it ends in the middle": data[:middle] + b"\xff\xd9" + data[middle + 2 :],
        "something is between": data[:-2] + bytes(50) + b"\xff\xd9",
        "noise": data[:scan] + np.random.default_rng(0).bytes(len(data) - scan - 2) + b"\xff\xd9",
        "no picture": b"text, not a picture" * 20,
        "empty": b"",
        "another": data[:2] + b"\xff\xd9",
    }


@pytest.mark.parametrize("build", BUILDERS)
def test_damage_is_refused_by_number_and_the_others_are_there(mixed, build):
    bad = damaged(mixed[0].jpeg)
    requests = list(mixed[:11])
    places = {1 + place + place // 3: data for place, data in enumerate(bad.values())}
    for place, data in places.items():
        requests.insert(place, FrameRequest(data, 64, 64, View()))
    with closing(build()) as decoder:
        errors, found = decode(decoder, requests)
        assert decode(decoder, requests)[0] == errors  # the same words, whoever it was
    assert errors.keys() == places.keys()
    assert all(errors.values())
    for number, one in enumerate(requests):
        if number not in places:
            np.testing.assert_array_equal(found[number], seen(one.jpeg, one.view))


def test_closing_ends_its_threads_and_may_be_done_twice(mixed):
    def own():
        return [one for one in threading.enumerate() if one.name.startswith("alpro-turbo")]

    before = own()
    decoder = TurboDecoder(3)
    decode(decoder, mixed)
    assert 0 < len(set(own()) - set(before)) <= 2
    decoder.close()
    decoder.close()
    assert own() == before
    alone = TurboDecoder(1)
    decode(alone, mixed)
    assert own() == before
    alone.close()
