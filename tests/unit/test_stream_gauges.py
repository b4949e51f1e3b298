import math
import threading
import time
from typing import get_args

import pytest

from alpro_stream.stream.gauges import Gauges, Stage, bottleneck

NOTHING = {
    "stream/fetched_mb_per_s": 0.0,
    "stream/storage_mb_per_s": 0.0,
    "stream/frames_per_s": 0.0,
    "stream/clips_per_s": 0.0,
    "stream/quarantined": 0.0,
    "stream/fallbacks": 0.0,
    "stream/queue_mb": 0.0,
    "stream/fetch_percent": 0.0,
    "stream/read_percent": 0.0,
    "stream/text_percent": 0.0,
    "stream/decode_percent": 0.0,
}


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def gauges(clock):
    return Gauges(clock)


def test_counts_are_rates_of_the_lap(gauges, clock):
    for _ in range(4):
        gauges.count("storage_bytes", 5_000_000)
        gauges.count("frames", 25)
        gauges.count("clips", 6)
    gauges.count("quarantined", 2)
    gauges.count("quarantined", 1)
    gauges.count("fallbacks", 4)
    gauges.count("fallbacks", 1)
    clock.now += 10
    expected = {
        "stream/storage_mb_per_s": 2.0,
        "stream/frames_per_s": 10.0,
        "stream/clips_per_s": 2.4,
        "stream/quarantined": 3.0,
        "stream/fallbacks": 5.0,
    }
    assert gauges.lap() == {**NOTHING, **expected}
    clock.now += 1
    assert gauges.lap() == NOTHING


def test_stages_are_busy_for_a_share_of_the_lap(gauges, clock):
    with gauges.busy("read"):
        clock.now += 2
    with gauges.busy("decode"):
        clock.now += 5
    with gauges.busy("read"):
        clock.now += 1
    clock.now += 2
    assert gauges.lap() == {**NOTHING, "stream/read_percent": 30.0, "stream/decode_percent": 50.0}
    clock.now += 4
    assert gauges.lap() == NOTHING


def test_stages_may_overlap_and_several_threads_in_one_count_once(gauges, clock):
    with gauges.busy("fetch"):
        clock.now += 1
        with gauges.busy("decode"), gauges.busy("fetch"):
            clock.now += 2
        clock.now += 1
    assert gauges.lap() == {**NOTHING, "stream/fetch_percent": 100.0, "stream/decode_percent": 50.0}


def test_what_goes_on_over_a_lap_counts_in_both_with_its_part(gauges, clock):
    clock.now += 3
    with gauges.busy("read"):
        clock.now += 1
        assert gauges.lap()["stream/read_percent"] == 25.0
        clock.now += 2
        assert gauges.lap()["stream/read_percent"] == 100.0
        clock.now += 1
    clock.now += 3
    assert gauges.lap()["stream/read_percent"] == 25.0


def test_a_stage_that_fails_is_no_longer_busy(gauges, clock):
    def fail():
        clock.now += 1
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"), gauges.busy("read"):
        fail()
    clock.now += 1
    assert gauges.lap()["stream/read_percent"] == 50.0


def test_the_largest_queue_of_the_lap_is_kept(gauges, clock):
    gauges.queue("lookahead", 3_000_000)
    gauges.queue("ready", 1_000_000)
    gauges.queue("lookahead", 500_000)
    gauges.queue("ready", 2_000_000)
    clock.now += 1
    # Both at one time: not the largest of one and the largest of the other.
    assert gauges.lap()["stream/queue_mb"] == 4.0
    clock.now += 1
    assert gauges.lap()["stream/queue_mb"] == 2.5
    gauges.queue("lookahead", 0)
    gauges.queue("ready", 0)
    gauges.lap()
    assert gauges.lap()["stream/queue_mb"] == 0.0


def test_a_lap_of_no_time_is_finite(gauges):
    gauges.count("frames", 1)
    assert all(math.isfinite(value) for value in gauges.lap().values())
    assert gauges.lap() == NOTHING


def test_many_threads_lose_nothing():
    gauges = Gauges()
    laps = []
    done = threading.Event()

    def work():
        for _ in range(300):
            for stage in get_args(Stage):
                with gauges.busy(stage):
                    gauges.count("quarantined", 1)
            gauges.queue("ready", 1_000_000)

    def watch():
        while not done.is_set():
            laps.append(gauges.lap())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    workers = [threading.Thread(target=work) for _ in range(6)]
    for thread in (watcher, *workers):
        thread.start()
    for thread in workers:
        thread.join()
    done.set()
    watcher.join()
    laps.append(gauges.lap())
    assert sum(lap["stream/quarantined"] for lap in laps) == 6 * 300 * 4
    assert max(lap[f"stream/{stage}_percent"] for lap in laps for stage in get_args(Stage)) <= 100.001
    assert max(lap["stream/queue_mb"] for lap in laps) == 1.0
    assert all(gauges.lap()[f"stream/{stage}_percent"] == 0 for stage in get_args(Stage))


def test_a_gauge_costs_microseconds():
    gauges = Gauges()

    def seconds():
        started = time.perf_counter()
        for _ in range(400):
            with gauges.busy("decode"):
                gauges.count("frames", 4)
        return (time.perf_counter() - started) / 400

    assert min(seconds() for _ in range(5)) < 200e-6


def figures(data=0.0, prompter=0.0, **stages):
    percents = {f"stream/{stage}_percent": percent for stage, percent in stages.items()}
    return {"data_wait_percent": data, "prompter_wait_percent": prompter, **percents}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (figures(0.4, 0.1, decode=97), "the model (data wait 0.4 %, prompter 0.1 %)"),
        (figures(), "the model (data wait 0.0 %, prompter 0.0 %)"),
        (figures(4.9, 4.9), "the model (data wait 4.9 %, prompter 4.9 %)"),
        ({"data_wait_percent": 1}, "the model (data wait 1.0 %, prompter 0.0 %)"),
        (
            figures(31.2, 0.1, decode=97.4, read=12),
            "decoding (the step waits 31 % of its time for data; decoding is busy 97 %, reading 12 %): "
            "raise stream.decode.num_workers (num_processes for whole videos), or decode on the GPU with "
            "stream.decode.device=mixed",
        ),
        (
            figures(5.0, 0, decode=20, read=80, text=2, fetch=0),
            "reading (the step waits 5.0 % of its time for data; reading is busy 80 %, decoding 20 %, tokenising "
            "2.0 %, fetching 0.0 %): put the shards on a faster disk, such as one of the node's own",
        ),
        (
            figures(60, 20, fetch=88, read=90, decode=30),
            "fetching (the step waits 60 % of its time for data; fetching is busy 88 %, reading 90 %, decoding 30 %): "
            "raise stream.cache.num_fetches, or move the shards nearer or to a faster network",
        ),
        (
            figures(60, 60, text=70, decode=10),
            "tokenising (the step waits 60 % of its time for data; tokenising is busy 70 %, decoding 10 %): "
            "give each rank more CPU cores, and set TOKENIZERS_PARALLELISM=true in its environment",
        ),
        (
            figures(3, 12, decode=99),
            "the prompter (the step waits 12 % of its time for soft labels, 3.0 % for data): "
            "with prompter.placement=process raise prompter.lookahead, or prompter.num_threads on a CPU",
        ),
        (
            figures(20, 0, decode=30, read=15),
            "the loader, but none of its stages (the step waits 20 % of its time for data; decoding is busy 30 %, "
            "reading is busy 15 %): batches come unevenly or CPU cores are short; raise stream.decode.prefetch, or "
            "give each rank more cores",
        ),
    ],
)
def test_the_verdict(values, expected):
    assert bottleneck(values) == f"bottleneck: {expected}"


def verdict(*args, **stages):
    """What is named."""
    return bottleneck(figures(*args, **stages)).removeprefix("bottleneck: ").partition(" (")[0]


def test_stages_that_take_turns_on_one_thread_are_judged_together():
    """None of them is busy half of the time, yet together they leave the thread no rest."""
    assert verdict(30, read=30, decode=45, text=20) == "decoding"


def test_fetching_is_to_blame_only_when_its_files_are_waited_for():
    # Most of the reading is waiting, but decoding takes longer.
    assert verdict(30, fetch=60, decode=95, read=65) == "decoding"
    assert verdict(30, fetch=65, decode=95, read=60) == "decoding"
    # Busy for less than half of the time, yet what reading waits for.
    assert verdict(30, fetch=30, decode=25, read=35) == "fetching"
    # Reading is slow by itself.
    assert verdict(30, fetch=40, decode=10, read=90) == "reading"
    assert verdict(30, decode=10, read=90) == "reading"


def test_the_longer_wait_decides():
    assert verdict(30, 31, decode=90) == "the prompter"
    assert verdict(31, 30, decode=90) == "decoding"


@pytest.mark.parametrize("unknown", [math.nan, math.inf, None])
def test_what_is_not_known_is_said_or_left_out(unknown):
    def with_unknown(values, name):
        return {key: value for key, value in {**values, name: unknown}.items() if value is not None}

    for values in ({}, with_unknown(figures(), "data_wait_percent")):
        assert bottleneck(values) == "bottleneck: not known (data_wait_percent is missing)"
    assert "model" in bottleneck(with_unknown(figures(1), "prompter_wait_percent"))
    known = with_unknown(figures(30, decode=70, read=0), "stream/read_percent")
    assert "decoding is busy 70 %)" in bottleneck(known)
    assert "its stages are not known)" in bottleneck(with_unknown(figures(30), "stream/decode_percent"))


def test_it_reads_the_figures_of_a_lap(gauges, clock):
    with gauges.busy("decode"):
        clock.now += 9
    clock.now += 1
    line = bottleneck({**gauges.lap(), "data_wait_percent": 40.0, "prompter_wait_percent": 0.0})
    assert line.startswith("bottleneck: decoding (")
    assert "\n" not in line
