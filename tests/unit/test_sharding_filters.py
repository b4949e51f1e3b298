import numpy as np
import pytest

from alpro_sharding.filters import FilterConfig, refuse_frames, refuse_source, usable_captions
from alpro_stream.config import validate
from alpro_stream.errors import ConfigError
from alpro_stream.media import SourceInfo


def source(width=640, height=360, duration_s=10.0):
    return SourceInfo(width, height, "h264", duration_s, 250)


def frame(red, green, blue):
    return np.full((6, 8, 3), (red, green, blue), np.uint8)


BLACK, GREY = frame(0, 0, 0), frame(100, 100, 100)


def test_everything_passes_by_default():
    config = FilterConfig()
    assert set(config.model_dump().values()) == {None}
    assert refuse_source(source(1, 100_000, 0.0), "video", config) is None
    assert refuse_frames([BLACK, BLACK], config) is None
    assert usable_captions(("", "%%%", "a" * 10_000), config) == (("", "%%%", "a" * 10_000), None)


@pytest.mark.parametrize(
    ("options", "found", "reason"),
    [
        ({"min_duration_s": 10}, {}, None),
        ({"max_duration_s": 10}, {}, None),
        ({"min_duration_s": 10.5}, {}, "duration: 10 s, wanted at least 10.5 s"),
        ({"max_duration_s": 9.5}, {}, "duration: 10 s, wanted at most 9.5 s"),
        ({"min_duration_s": 2}, {"duration_s": None}, None),
        ({"min_duration_s": 2}, {"duration_s": 0.0}, "duration: 0 s, wanted at least 2 s"),
        ({"min_side": 360}, {}, None),
        ({"min_side": 361}, {}, "shorter side: 360 pixels, wanted at least 361 pixels"),
        ({"min_side": 361}, {"width": 360, "height": 640}, "shorter side: 360 pixels, wanted at least 361 pixels"),
        ({"max_side": 640}, {}, None),
        ({"max_side": 639}, {}, "longer side: 640 pixels, wanted at most 639 pixels"),
        ({"max_side": 639}, {"width": 360, "height": 640}, "longer side: 640 pixels, wanted at most 639 pixels"),
        ({"min_aspect_ratio": 1}, {}, None),
        ({"min_aspect_ratio": 1}, {"width": 300, "height": 400}, "aspect ratio: 0.75, wanted at least 1"),
        ({"max_aspect_ratio": 2}, {"width": 500, "height": 200}, "aspect ratio: 2.5, wanted at most 2"),
        ({"max_aspect_ratio": 1.7}, {}, "aspect ratio: 1.77778, wanted at most 1.7"),
    ],
)
def test_sources_are_left_out_for_duration_size_and_shape(options, found, reason):
    assert refuse_source(source(**found), "video", FilterConfig(**options)) == reason


def test_images_have_no_duration_and_a_size():
    config = FilterConfig(min_duration_s=5, min_side=500)
    assert refuse_source(source(600, 600, 0.04), "image", config) is None
    assert refuse_source(source(600, 400, None), "image", config).startswith("shorter side:")


@pytest.mark.parametrize(
    ("options", "captions", "usable", "reason"),
    [
        ({"min_caption_words": 2}, ("a dog", "dog", " big  dog "), ("a dog", " big  dog "), None),
        ({"min_caption_words": 3}, ("dog", "a dog"), (), "caption words: 1 words, wanted at least 3 words"),
        ({"max_caption_words": 2}, ("a dog", "a big dog"), ("a dog",), None),
        ({"max_caption_words": 2}, ("a big dog",), (), "caption words: 3 words, wanted at most 2 words"),
        ({"max_caption_chars": 5}, ("a dog", "a frog"), ("a dog",), None),
        ({"max_caption_chars": 5}, ("a frog",), (), "caption length: 6 characters, wanted at most 5 characters"),
        ({"min_letters": 0.8}, ("ab c#", "ab ##"), ("ab c#",), None),
        ({"min_letters": 0.8}, ("ab ##",), (), "caption letters: 0.6 of the characters, wanted at least 0.8"),
        ({"min_letters": 1}, ("नमस्ते दुनिया", "日本語", "été"), ("नमस्ते दुनिया", "日本語", "été"), None),
        ({"min_letters": 0}, ("",), ("",), None),
        ({}, (), (), "caption: there is none"),
    ],
)
def test_captions_that_do_not_pass_are_dropped(options, captions, usable, reason):
    found, why = usable_captions(captions, FilterConfig(**options))
    assert found == usable
    assert why is None if reason is None else why.startswith(reason)


def test_black_clips_have_no_bright_frame():
    config = FilterConfig(drop_black=10)
    assert refuse_frames([BLACK, frame(9, 9, 9)], config) == "black: luma 9 of the brightest frame, wanted at least 10"
    assert refuse_frames([BLACK, frame(10, 11, 10)], config) is None
    assert refuse_frames([BLACK], config).startswith("black:")
    # Blue is darker than green to the eye.
    assert refuse_frames([frame(0, 0, 80)], config).startswith("black: luma 9.12")
    assert refuse_frames([frame(0, 80, 0)], config) is None


def test_static_clips_hardly_change():
    config = FilterConfig(drop_static=2)
    assert refuse_frames([GREY, GREY, GREY], config) == "static: frames change by 0, wanted at least 2"
    assert refuse_frames([GREY], config) is None
    darker, lighter = frame(98, 98, 98), frame(102, 102, 102)
    assert refuse_frames([GREY, darker], config) is None
    assert refuse_frames([GREY, lighter], config) is None
    assert refuse_frames([GREY, GREY, darker], config).startswith("static: frames change by 1,")
    assert refuse_frames([GREY, GREY, lighter], config).startswith("static: frames change by 1,")
    # Neighbours count, not the first and the last frame.
    assert refuse_frames([GREY, frame(200, 0, 7), GREY], config) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_duration_s": 5, "max_duration_s": 2}, "min_duration_s=5.0 is more than max_duration_s=2.0"),
        ({"min_aspect_ratio": 2, "max_aspect_ratio": 1}, "min_aspect_ratio=2.0 is more than max_aspect_ratio=1.0"),
        ({"min_caption_words": 9, "max_caption_words": 3}, "min_caption_words=9 is more than max_caption_words=3"),
        ({"min_side": 500, "max_side": 400}, "min_side=500 is more than max_side=400"),
        ({"min_letters": 80}, "min_letters"),
        ({"min_duration_s": -1}, "min_duration_s"),
        ({"min_duration_s": float("nan")}, "min_duration_s"),
        ({"drop_static": 300}, "drop_static"),
        ({"min_duration": 1}, "did you mean 'min_duration_s'"),
    ],
)
def test_filters_that_cannot_be_meant_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        validate(FilterConfig, options, "filters")


def test_limits_that_meet_are_allowed():
    config = FilterConfig(min_duration_s=2, max_duration_s=2, min_side=4, max_side=4)
    assert refuse_source(source(4, 4, 2.0), "video", config) is None
