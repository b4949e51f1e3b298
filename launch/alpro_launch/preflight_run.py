"""What `alpro preflight` looks at, in the order of its table; the parts of a run are opened as the run opens them."""

import os
import secrets
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from alpro_launch.preflight_checks.clock import judge_offsets, measure_offset
from alpro_launch.preflight_checks.disk import Disk, checkpoint_bytes, judge_disk, look_at, token_path, write_token
from alpro_launch.preflight_checks.lanes import judge_lanes
from alpro_launch.preflight_checks.lines import Line
from alpro_launch.preflight_checks.links import judge_links, measure_links
from alpro_launch.preflight_checks.memory import Use, children_bytes, gpu_bytes, judge_gpus, judge_machines
from alpro_launch.preflight_checks.model import (
    Beside,
    Labelled,
    judge_labels,
    measure_labels,
    measure_memory,
    num_parameters,
    shared_bytes,
)
from alpro_launch.preflight_checks.node import judge_nodes, look_at_node
from alpro_launch.preflight_checks.places import Place, nodes_of
from alpro_launch.preflight_checks.runner import Runner
from alpro_launch.preflight_checks.stream import (
    Rate,
    forget_cached,
    judge_data,
    judge_decoding,
    judge_reading,
    measure_decoding,
    measure_reading,
    missing_shards,
    needed_clips_per_s,
)
from alpro_launch.preflight_checks.versions import judge_versions, measure_versions
from alpro_launch.preflight_checks.written import Written
from alpro_stream.manifest.places import is_address
from alpro_stream.model.cpu_memory import keep_freed_memory
from alpro_stream.run import RunConfig, RunData, build_maker, open_data, open_storage, read_once
from alpro_stream.stream.decode import decoder_name
from alpro_stream.stream.gauges import Gauges
from alpro_stream.stream.maker import BatchMaker, ReadBatch
from alpro_stream.stream.plan import lanes_of_rank
from alpro_stream.stream.quarantine import Quarantine
from alpro_stream.stream.sources import shards_kept_open
from alpro_stream.train.distributed import World
from alpro_stream.train.metrics import read_metrics

_READ_S, _DECODE_S = 4.0, 3.0
# Of the plan, from the middle of an epoch on: what a run that was just stopped has read last is seldom among them.
_MOST_STEPS = 200


class Preflight:
    """The checks of a run; every method is called on all ranks.

    Args:
        config: of the run.
        world: the ranks.
        seconds: for everything together.
        stack: gets the end of what may still write when a check is late.
        written: gets what is written.
        since: when they begin, by `time.monotonic`; None is now.

    Attributes:
        hosts: of the ranks.
        lines: what was found so far.
        is_done: whether that is all.
    """

    is_done = False

    def __init__(
        self,
        config: RunConfig,
        world: World,
        seconds: float,
        stack: ExitStack,
        written: Written,
        since: float | None = None,
    ) -> None:
        self._world, self._stack, self._written, self._parts = world, stack, written, ExitStack()
        places = _places(world)
        self.hosts = [place.host for place in places]
        self._nodes = nodes_of(places)
        self._own_node = next(ranks for ranks in self._nodes if world.rank in ranks)
        self._token = world.from_first(lambda: secrets.token_hex(4), "the name of what is written")
        self._config = self._with_empty_cache(config)
        self._runner = Runner(world, self.hosts, seconds, since)
        self.lines = self._runner.lines
        self._rank_batch = config.stream.global_batch // world.size
        # What checks leave for those behind them.
        self._data: RunData | None = None
        self._need: float | None = None
        self._maker: BatchMaker | None = None
        self._batches: list[ReadBatch] = []
        self._gpu_before = self._decoder_bytes = self._decoder_gpu_bytes = 0
        self._labelled: Labelled | None = None

    def run(self) -> None:
        """Makes all checks.

        Raises:
            RankError: a rank is gone or does not answer.
        """
        world, runner, hosts = self._world, self._runner, self.hosts
        if world.device.type == "cpu":
            keep_freed_memory()
        if self._config.train.engine.num_threads:
            torch.set_num_threads(self._config.train.engine.num_threads)
        runner.run("versions", 10, measure_versions, lambda found: judge_versions(found, hosts))
        leaders = [ranks[0] for ranks in self._nodes]
        measure = partial(measure_offset, world, leaders)
        runner.run("clocks", 10, measure, lambda found: judge_offsets(found, hosts), together=True)
        if world.size > 1:
            master = os.environ.get("MASTER_ADDR", "127.0.0.1")
            measure_all = partial(measure_links, world, self._nodes, master)
            runner.run("links", 20, measure_all, lambda found: judge_links(found, len(self._nodes)), together=True)
        self._check_stream()
        self._check_model()
        self._check_run_dir()
        self._check_nodes()
        self.is_done = True
        if not runner.was_late:  # What is still at work could not be closed.
            self._parts.close()

    def wait_for_all(self) -> None:
        """Until all ranks are here.

        Raises:
            RankError: a rank is gone or does not answer.
        """
        self._runner.wait_for_all()

    def _check_stream(self) -> None:
        config, runner = self._config, self._runner
        stream = config.stream
        lines = judge_lanes(self._world.size, stream.num_lanes, config.train.engine.num_micro_batches)
        runner.lines += lines
        if lines[0].verdict == "FAIL":
            for check in ("data", "storage", "decoder"):
                runner.leave_out(check, "so many ranks cannot train the run")
            return
        if not runner.run("data", 20, self._open, self._judge_data, together=True):
            for check in ("storage", "decoder"):
                runner.leave_out(check, "the data cannot be opened")
            return
        if not runner.run("decoder", 20, self._build_maker, lambda found: ()):
            runner.leave_out("storage", "the decoder cannot be made")
            return
        if not runner.run("storage", 20, self._read, self._judge_reading):
            runner.leave_out("decoder", "no samples could be read")
            return
        runner.run("decoder", 20, self._decode, self._judge_decoding)

    def _check_model(self) -> None:
        runner, config = self._runner, self._config
        if self._data is None:
            runner.leave_out("memory", "the data are not open")
            return
        if config.uses_pem:
            step_s = config.stream.global_batch / self._need if self._need else None
            runner.run("prompter", 40, self._label, lambda found: judge_labels(found, self._rank_batch, step_s))
        runner.run("memory", 60, self._rehearse, self._judge_memory, together=True, late="warn")

    def _check_run_dir(self) -> None:
        config = self._config
        judge = partial(judge_disk, hosts=self.hosts, run_dir=config.run_dir, num_kept=config.train.keep_checkpoints)
        self._runner.run("run_dir", 15, self._look_at_run_dir, judge)

    def _check_nodes(self) -> None:
        stream = self._config.stream
        lanes = max(1, stream.num_lanes // self._world.size)
        num_files = len(stream.sources) * shards_kept_open(lanes * stream.window_shards, len(stream.sources))
        judge = partial(
            judge_nodes,
            nodes=self._nodes,
            hosts=self.hosts,
            shm_bytes=shared_bytes(self._config, self._world),
            num_files=num_files,
            num_workers=stream.decode.num_workers,
        )
        self._runner.run("node", 10, look_at_node, judge)

    def _with_empty_cache(self, config: RunConfig) -> RunConfig:
        """With a cache of remote shards that is empty, and on the same disk."""
        cache = config.stream.cache
        folder = cache.folder.with_name(f"{cache.folder.name}-preflight-{self._token}")
        self._written.add(folder)
        cache = cache.model_copy(update={"folder": folder})
        return config.model_copy(update={"stream": config.stream.model_copy(update={"cache": cache})})

    def _open(self) -> list[str]:
        """Opens the data; gives what is wrong with the shards that this rank looks for."""
        config, world = self._config, self._world
        gauges = Gauges()
        with world.all_or_none():
            storage = self._stack.enter_context(open_storage(config, world, gauges))
        known = world.from_first(lambda: read_once(config, storage), "the descriptions of the data sets")
        self._need = world.from_first(
            lambda: needed_clips_per_s(read_metrics(config.run_dir), config.stream.global_batch), "the last metrics"
        )
        with world.all_or_none():
            self._data = data = open_data(config, world, storage, known, None)
            for source in data.sources:
                self._parts.callback(source.reader.close)
        return missing_shards(data.sources, self._own_node.index(world.rank), len(self._own_node))

    def _judge_data(self, found: list[list[str]]) -> list[Line]:
        assert self._data is not None
        return judge_data(found, self._data.plan, self.hosts)

    def _build_maker(self) -> None:
        assert self._data is not None
        config, world = self._config, self._world
        self._gpu_before, _ = gpu_bytes(world.device)
        quarantine = Quarantine(config.stream.quarantine, world.rank)
        self._maker = build_maker(config, world, self._data, quarantine, Gauges())
        self._parts.callback(self._maker.close)

    def _read(self) -> Rate:
        assert self._data is not None
        assert self._maker is not None
        plan, steps = self._data.plan, self._steps()
        lanes = lanes_of_rank(self._world.rank, self._world.size, plan.num_lanes)
        forget_cached(plan, steps, lanes, self._data.sources)
        rate, self._batches = measure_reading(self._maker, plan, steps, lanes, _READ_S)
        return rate

    def _steps(self) -> range:
        assert self._data is not None
        plan = self._data.plan
        first = plan.steps_per_epoch // 2
        return range(first, first + min(plan.steps_per_epoch, _MOST_STEPS))

    def _judge_reading(self, found: list[Rate]) -> list[Line]:
        stream = self._config.stream
        is_fetched = any(is_address(source.path) for source in stream.sources)
        return judge_reading(found, self._need, self._steps().start, is_fetched, stream.quarantine.max_rate)

    def _decode(self) -> Rate | None:
        assert self._maker is not None
        if not self._batches:
            return None
        before = children_bytes()
        rate = measure_decoding(self._maker, self._batches, self._world.device, _DECODE_S)
        self._batches = []
        self._decoder_bytes = max(0, children_bytes() - before)
        self._decoder_gpu_bytes = max(0, gpu_bytes(self._world.device)[0] - self._gpu_before)
        return rate

    def _judge_decoding(self, found: list[Rate | None]) -> list[Line]:
        stream = self._config.stream
        return judge_decoding(found, self._need, decoder_name(stream.decode), stream.quarantine.max_rate)

    def _label(self) -> Labelled:
        assert self._data is not None
        folder = Path(tempfile.mkdtemp(prefix="alpro-preflight-"))
        self._written.add(folder)
        self._labelled = measure_labels(self._config, self._world, self._data, folder, self._parts)
        return self._labelled

    def _rehearse(self) -> tuple[Use, Use | None]:
        assert self._data is not None
        beside = Beside(self._labelled, self._decoder_bytes, self._decoder_gpu_bytes, self._gpu_before)
        return measure_memory(self._config, self._world, self._data, beside)

    def _judge_memory(self, found: list[tuple[Use, Use | None]]) -> list[Line]:
        machines = judge_machines([use for use, _ in found], self._nodes, self.hosts)
        return [*machines, *judge_gpus([use for _, use in found], self.hosts)]

    def _look_at_run_dir(self) -> Disk:
        run_dir = self._config.run_dir
        if self._world.is_first:
            self._written.add(token_path(run_dir, self._token))
            write_token(run_dir, self._token)
        size = None
        if self._data is not None:
            size = checkpoint_bytes(num_parameters(self._config, self._data), self._config.train.engine.zero_stage)
        return look_at(run_dir, self._token, size)


def _places(world: World) -> list[Place]:
    places: list[Any] = [Place.here()] * world.size
    if world.size > 1:
        with world.waiting("the names of the machines of all ranks"):
            dist.all_gather_object(places, places[0], group=world.control)
    return places
