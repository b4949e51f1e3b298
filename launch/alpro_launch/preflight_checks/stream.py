"""Whether the shards are there, and how fast they are read and decoded as the plan asks for them."""

import os
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from alpro_launch.preflight_checks.lanes import describe_plan
from alpro_launch.preflight_checks.lines import Line
from alpro_stream.errors import SampleError, ShardError
from alpro_stream.manifest.places import is_address
from alpro_stream.shards.files import LocalFiles
from alpro_stream.shards.layout import tar_path
from alpro_stream.stream.ahead import LookAhead
from alpro_stream.stream.maker import BatchMaker, ReadBatch
from alpro_stream.stream.plan import Plan
from alpro_stream.stream.sources import Source

# Of batches that are kept to be decoded.
_KEPT_BYTES = 256 << 20
_LEAST_SHARE = 2.0
_MOST_JUDGED_STEPS = 100
_EXAMPLES = 3
# Unusable samples that prove nothing, whatever share of the few that were looked at they are.
_FEW = 3
_READ_FASTER = "put the shards on a faster disk or nearer (docs/streaming.md)"
_DECODE_FASTER = "raise stream.decode.num_workers, or decode on the GPU with stream.decode.device=mixed"


@dataclass(frozen=True, slots=True)
class Rate:
    """What a rank did in some seconds.

    Attributes:
        clips: samples.
        num_bytes: stored bytes.
        seconds: it took.
        bad: what is wrong with samples that cannot be used: a few of them.
        num_bad: how many.
        num_looked_at: different samples that these are some of.
    """

    clips: float
    num_bytes: float
    seconds: float
    bad: tuple[str, ...] = ()
    num_bad: int = 0
    num_looked_at: int = 0

    @property
    def clips_per_s(self) -> float:
        """Clips a second."""
        return self.clips / self.seconds


def missing_shards(sources: Iterable[Source], part: int, num_parts: int) -> list[str]:
    """What is wrong with the tars of local data sets: those that are not there, or of another size than described.

    Args:
        sources: opened.
        part: of the shards, every so many, which this rank looks for.
        num_parts: ranks of the machine.
    """
    wrong = []
    for source in sources:
        if is_address(source.reader.place):
            continue
        for shard in source.shards[part::num_parts]:
            path = tar_path(Path(source.reader.place), shard.name)
            try:
                num_bytes = path.stat().st_size
            except OSError as error:
                wrong.append(f"{path}: {error.strerror}")
                continue
            if num_bytes != shard.num_bytes:
                wrong.append(f"{path}: {num_bytes} bytes, dataset.json says {shard.num_bytes}")
    return wrong


def judge_data(wrong: Sequence[Sequence[str]], plan: Plan, hosts: Sequence[str]) -> list[Line]:
    """One line: the passes that the data give, or the shards that are missing."""
    found = [f"{text} (on {host})" for texts, host in zip(wrong, hosts, strict=True) for text in texts]
    if not found:
        return [Line("data", describe_plan(plan), "dataset.json and the sizes of all local shards")]
    text = f"{len(found)} shards are wrong: {'; '.join(found[:_EXAMPLES])}"
    remedy = "fetch them again, or see that this machine has the folder; `alpro inspect DATASET --verify` says all"
    return [Line("data", text, "dataset.json", "FAIL", remedy, "data")]


def forget_cached(plan: Plan, steps: Iterable[int], lanes: range, sources: Sequence[Source]) -> None:
    """Asks the system to drop the shards of these steps from its memory; those on a disk of the machine only."""
    wanted = set()
    for step in steps:
        part = plan.part(step, lanes)
        wanted |= {(part.source, int(shard)) for shard in part.refs[..., 0].flat}
    for number, shard in wanted:
        source = sources[number]
        if isinstance(source.reader.files, LocalFiles):
            with suppress(OSError):  # Whoever reads it will say so.
                descriptor = source.reader.files.open_tar(source.shards[shard])
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(descriptor)


def measure_reading(
    maker: BatchMaker, plan: Plan, steps: range, lanes: range, seconds: float
) -> tuple[Rate, list[ReadBatch]]:
    """Reads steps of the plan one after the other, for so long.

    Args:
        maker: of the run; its sources read from what no cache holds.
        plan: of the run.
        steps: that may be read; none a second time.
        lanes: of this rank.
        seconds: after which no step is begun.

    Returns:
        The rate, and the first batches. From behind an address whole shards are fetched, which serve later steps too:
        clips are then counted by bytes.

    Raises:
        ShardError: a shard cannot be read.
    """
    ahead = LookAhead(plan, lanes, maker.sources, iter(steps))
    batches: list[ReadBatch] = []
    clips = num_bytes = num_bad = 0
    bad: list[str] = []
    started = time.perf_counter()
    # A first step may need a dozen shards of a slow server.
    timer = threading.Timer(seconds, ahead.stop)
    timer.start()
    try:
        for step in steps:
            ahead.reached(step)
            batch = maker.read(plan, step, lanes)
            errors = [sample for sample in batch.samples if isinstance(sample, SampleError)]
            bad += [str(error) for error in errors[: _EXAMPLES - len(bad)]]
            clips, num_bytes, num_bad = clips + len(batch.samples), num_bytes + batch.num_bytes, num_bad + len(errors)
            if not batches or sum(one.num_bytes for one in batches) + batch.num_bytes <= _KEPT_BYTES:
                batches.append(batch)
            if time.perf_counter() - started >= seconds:
                break
    except ShardError:
        if time.perf_counter() - started < seconds:
            raise
    finally:
        timer.cancel()
    elapsed = time.perf_counter() - started
    if any(is_address(source.reader.place) for source in maker.sources):
        fetched = ahead.fetched_bytes()
        stored = {id(source.reader): source.reader.info for source in maker.sources}.values()
        clips_per_byte = sum(info.num_samples for info in stored) / sum(info.num_bytes for info in stored)
        return Rate(fetched * clips_per_byte, fetched, elapsed, tuple(bad), num_bad, clips), batches
    return Rate(clips, num_bytes, elapsed, tuple(bad), num_bad, clips), batches


def measure_decoding(maker: BatchMaker, batches: Sequence[ReadBatch], device: torch.device, seconds: float) -> Rate:
    """Decodes batches that were read, again and again, for so long; the first one is not timed, as all starts with it.

    Raises:
        AlproError: the decoder cannot be started.
    """
    bad: dict[str, None] = {}
    _decode(maker, batches[0], device)
    clips, number, started = 0, 0, time.perf_counter()
    while number == 0 or time.perf_counter() - started < seconds:
        batch = batches[number % len(batches)]
        bad |= dict.fromkeys(_decode(maker, batch, device))
        clips, number = clips + len(batch.samples), number + 1
    elapsed = time.perf_counter() - started
    looked_at = sum(len(batch.samples) for batch in batches[:number])
    return Rate(clips, 0, elapsed, tuple(bad)[:_EXAMPLES], len(bad), looked_at)


def _decode(maker: BatchMaker, batch: ReadBatch, device: torch.device) -> list[str]:
    """What is wrong with samples that were read and cannot be decoded."""
    outcomes = maker.start(batch).outcomes()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    pairs = zip(batch.samples, outcomes, strict=True)
    return [str(out) for read, out in pairs if isinstance(out, SampleError) and not isinstance(read, SampleError)]


def needed_clips_per_s(lines: Sequence[Mapping[str, Any]], global_batch: int) -> float | None:
    """What the steps of a run take when they do not wait for data, from its last metrics; None where there are none."""
    last = [line for line in lines if "step_s" in line][-_MOST_JUDGED_STEPS:]
    if not last:
        return None
    seconds: float = median(line["step_s"] * max(0.01, 1 - line.get("data_wait_percent", 0) / 100) for line in last)
    return global_batch / seconds


def judge_reading(
    found: Sequence[Rate], need: float | None, first_step: int, is_fetched: bool, max_rate: float
) -> list[Line]:
    """One line.

    Args:
        found: by rank.
        need: clips a second of the whole run; None where it is not known.
        first_step: that was read.
        is_fetched: whether from behind an address: ranks then have what others of their machine have fetched.
        max_rate: share of unusable samples that a run endures.
    """
    mb_per_s = sum(rate.num_bytes / rate.seconds for rate in found) / 1e6
    clips_per_s = sum(rate.clips_per_s for rate in found) if is_fetched else _of_slowest(found)
    cold = "through an empty cache" if is_fetched else "dropped from the page cache before"
    against = f"{_needed(need)}; from step {first_step} on, {cold}"
    text = f"{mb_per_s:.1f} MB/s, {clips_per_s:.0f} clips/s"
    return [_judged(Line("storage", text, against), found, clips_per_s, need, max_rate, _READ_FASTER)]


def judge_decoding(found: Sequence[Rate | None], need: float | None, decoder: str, max_rate: float) -> list[Line]:
    """One line, as of `judge_reading`; None is of a rank that had nothing to decode."""
    rates = [rate for rate in found if rate is not None]
    if len(rates) < len(found):
        return [Line("decoder", "not checked", "no whole batch was read in time", "warn", _READ_FASTER)]
    clips_per_s = _of_slowest(rates)
    line = Line("decoder", f"{decoder}: {clips_per_s:.0f} clips/s", _needed(need))
    return [_judged(line, rates, clips_per_s, need, max_rate, _DECODE_FASTER)]


def _of_slowest(found: Sequence[Rate]) -> float:
    """Clips a second of all ranks together, which wait for the slowest of them."""
    return len(found) * min(rate.clips_per_s for rate in found)


def _needed(need: float | None) -> str:
    return f"the run takes {need:.0f} clips/s" if need else "what the run takes is not known yet"


def _judged(
    line: Line, found: Sequence[Rate], clips_per_s: float, need: float | None, max_rate: float, remedy: str
) -> Line:
    if num_bad := sum(rate.num_bad for rate in found):
        examples = "; ".join([one for rate in found for one in rate.bad][:_EXAMPLES])
        most = max(_FEW, max_rate * sum(rate.num_looked_at for rate in found))
        return replace(
            line,
            found=f"{line.found}; {num_bad} samples are unusable: {examples}",
            verdict="FAIL" if num_bad > most else "warn",
            remedy="`alpro inspect DATASET --verify`; the run replaces some, and stops at stream.quarantine.max_rate",
            fault="data",
        )
    if need and clips_per_s < _LEAST_SHARE * need:
        return replace(line, verdict="warn", remedy=f"less than twice as many: {remedy}", fault="hardware")
    return line
