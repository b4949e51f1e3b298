import functools
import json
import math
import operator
import time

import pytest

from alpro_sharding.statistics import LOCAL, NOT_STATED, OTHERS, Statistics
from alpro_stream.shards import SampleMetadata


def sample(kind="video", captions=("a dog runs",), **source):
    source = {
        "media": "clips/a.mp4",
        "width": 640,
        "height": 360,
        "codec": "h264",
        "duration_s": 12.0,
        "num_frames": 300,
        "start_s": None,
        "end_s": None,
        "sha256": "ab" * 32,
        **source,
    }
    return SampleMetadata("k", "i", captions, (), kind, (), source)


def total(*statistics):
    return functools.reduce(operator.add, statistics, Statistics())


def bins(statistics, title):
    """Counts by lower edge, of the bins that are not empty."""
    (found,) = [(edges, counts) for name, _, edges, counts in statistics.histograms() if name == title]
    return {edge: count for edge, count in zip(found[0], found[1], strict=False) if count}


def test_a_sample_is_in_one_bin_of_each():
    found = Statistics.of_sample(sample(captions=("a dog", "a dog runs on the beach")), 36)
    assert bins(found, "Duration") == {10: 1}
    assert bins(found, "Shorter side of the source") == {360: 1}
    assert bins(found, "Frames stored") == {32: 1}
    assert bins(found, "Caption length") == {0: 1, 5: 1}
    assert (found.codecs, found.licenses, found.places) == ({"h264": 1}, {NOT_STATED: 1}, {LOCAL: 1})


def test_edges_belong_to_the_bin_above_and_nothing_is_lost():
    durations = [0.0, 0.999, 1.0, 60.0, 599.9, 600.0, 1e9]
    found = total(*(Statistics.of_sample(sample(duration_s=duration), 0) for duration in durations))
    assert bins(found, "Duration") == {0: 2, 1: 1, 60: 1, 300: 1, 600: 2}
    assert bins(found, "Frames stored") == {0: 7}


def test_images_and_unknown_durations_have_none():
    found = total(
        Statistics.of_sample(sample("image", duration_s=None, codec="jpeg"), 1),
        Statistics.of_sample(sample("image", duration_s=0.04, codec="gif"), 1),
        Statistics.of_sample(sample(duration_s=None), 5),
    )
    assert bins(found, "Duration") == {}
    assert bins(found, "Frames stored") == {1: 2, 4: 1}
    assert found.codecs == {"jpeg": 1, "gif": 1, "h264": 1}


def test_histograms_have_an_edge_more_than_bins_and_an_open_end():
    for _, unit, edges, counts in Statistics().histograms():
        assert unit
        assert len(edges) == len(counts) + 1
        assert list(edges) == sorted(set(edges))
        assert edges[-1] == math.inf


@pytest.mark.parametrize(
    ("media", "place"),
    [
        ("a/b.mp4", LOCAL),
        ("/data/b.mp4", LOCAL),
        ("https://Media.example.org/x/b.mp4?q=1", "https://media.example.org"),
        ("http://user:secret@example.org:8080/b.mp4", "http://example.org:8080"),
        ("s3://bucket/b.mp4", "s3://bucket"),
        ("https://[broken/b.mp4", "https://[broken"),
    ],
)
def test_places_are_scheme_and_host_without_passwords(media, place):
    assert Statistics.of_sample(sample(media=media), 1).places == {place: 1}


def test_statistics_add_up_in_any_order_and_change_nothing():
    parts = [
        Statistics.of_sample(sample(license="CC BY 4.0"), 3),
        Statistics.of_sample(sample(license="CC BY 4.0", codec="av1"), 70),
        Statistics.of_sample(sample(media="s3://bucket/a", license=""), 3),
    ]
    found = total(*parts)
    assert found == total(*reversed(parts)) == parts[0] + (parts[1] + parts[2])
    assert found.licenses == {"CC BY 4.0": 2, NOT_STATED: 1}
    assert found.codecs == {"h264": 2, "av1": 1}
    assert parts[0].licenses == {"CC BY 4.0": 1}
    assert Statistics() == Statistics.from_json(Statistics().to_json())


def test_json_gives_the_same_statistics_back():
    found = total(Statistics.of_sample(sample(codec="vp9"), 3), Statistics.of_sample(sample(license="ü"), 3))
    text = json.dumps(found.to_json())
    assert Statistics.from_json(json.loads(text)) == found
    assert list(found.to_json()["codecs"]) == ["h264", "vp9"]


def test_statistics_with_other_bins_are_refused():
    values = Statistics().to_json()
    values["sides"].append(0)
    with pytest.raises(ValueError, match="11 bins, expected 10"):
        Statistics.from_json(values)


def test_a_million_hosts_do_not_fill_the_memory():
    found = Statistics()
    for number in range(1500):
        found = found + Statistics.of_sample(sample(media=f"https://host{number}.org/a.mp4"), 1)
    found = found + Statistics.of_sample(sample(media="https://host3.org/b.mp4"), 1)
    assert len(found.places) == 1001
    assert found.places["https://host3.org"] == 2
    assert found.places[OTHERS] == 500
    assert found.places.total() == 1501


def test_gathering_takes_little_of_the_time_of_a_clip():
    found, metadata = Statistics(), sample(captions=("a dog runs on the beach",) * 20)
    start = time.process_time()
    for _ in range(500):
        found = found + Statistics.of_sample(metadata, 30)
    assert (time.process_time() - start) / 500 < 0.001
