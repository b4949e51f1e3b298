"""`alpro forecast`: from a run's configuration and machines to what it will take."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field
from rich.console import Console

from alpro_launch.forecast.bottleneck import bottleneck
from alpro_launch.forecast.devices import HERE, find_device
from alpro_launch.forecast.facts import Facts, read_facts
from alpro_launch.forecast.machine import Machine, gpu_machine, measured_machine
from alpro_launch.forecast.measured import Measured, read_measured
from alpro_launch.forecast.report import Forecast, as_json, show
from alpro_launch.forecast.scaling import scaling
from alpro_launch.forecast.step import Layout, StepForecast, forecast_step, layout_of
from alpro_launch.forecast.work import work_of
from alpro_launch.preflight_checks.disk import checkpoint_bytes
from alpro_stream.config import Config, load_config, read_config, validate
from alpro_stream.errors import ConfigError
from alpro_stream.run import RunConfig

_LEAST_WIDTH = 110


class ForecastOptions(Config):
    """What is asked, beside the configuration of the run."""

    gpu: str
    """Of the table (`alpro_launch.forecast.devices`), or `here` for the machine that was measured."""
    nodes: int = Field(default=1, ge=1, le=10**6)
    """Machines."""
    gpus: int = Field(default=1, ge=1, le=10**4)
    """GPUs (or ranks) of a machine."""
    measured: tuple[Path, ...] = ()
    """Results of benchmarks, in place of the table's figures."""
    samples: int | None = Field(default=None, ge=1, le=10**15)
    """Of an epoch, where the data sets are not here."""
    clip_bytes: float | None = Field(default=None, ge=1, le=1e15)
    """That a step reads of a sample, where the data sets are not here."""
    storage_mb_per_s: float | None = Field(default=None, ge=1e-6, le=1e12)
    """That the storage gives to all nodes together."""
    share_of_peak: float | None = Field(default=None, ge=1e-6, le=1)
    """Of the peak, that the executed operations of a whole step reach; in place of what is measured or assumed."""
    network_gb_per_s: float | None = Field(default=None, ge=1e-6, le=1e6)
    """Of a node's network by its name, one direction, in place of the table's."""
    link_gb_per_s: float | None = Field(default=None, ge=1e-6, le=1e6)
    """Of a GPU to the others of its node, one direction, in place of the table's."""


def run_forecast(path: str, overrides: Sequence[str], arguments: argparse.Namespace) -> int:
    """Prints the forecast of a run; returns the exit status.

    Raises:
        AlproError: a configuration, an option or a file of results that says why it cannot be used.
    """
    given = {name: getattr(arguments, name) for name in ForecastOptions.model_fields}
    options = validate(ForecastOptions, given, source="alpro forecast")
    forecast = make_forecast(load_run(path, overrides), options)
    console = Console()
    if not console.is_terminal:  # Piped output has no width of its own.
        console.width = max(console.width, _LEAST_WIDTH)
    show(forecast, console)
    if arguments.json:
        text = json.dumps(as_json(forecast), indent=1, ensure_ascii=False, allow_nan=False)
        Path(arguments.json).write_text(text + "\n", encoding="utf-8")
    return 0


def load_run(path: str, overrides: Sequence[str]) -> RunConfig:
    """The configuration of a training run.

    Raises:
        ConfigError: it is one of something else, or not valid.
    """
    missing = {"task", "stream"} - read_config(path, overrides).keys()
    if missing:
        raise ConfigError(
            f"{path} is no configuration of a training run (it has no {' and no '.join(sorted(missing))}); forecast "
            "one of configs/prompter, configs/pretrain or configs/finetune"
        )
    return load_config(RunConfig, path, overrides)


def make_forecast(config: RunConfig, options: ForecastOptions) -> Forecast:
    """What a run takes.

    Raises:
        AlproError: it cannot be trained so, or a file of results cannot be used.
    """
    device = None if options.gpu.lower() == HERE else find_device(options.gpu)
    layout = layout_of(config, options.nodes, options.gpus)
    measured = read_measured(options.measured)
    facts = read_facts(config, options.samples, options.clip_bytes, measured.clip_bytes)
    if device is None and (options.share_of_peak or options.network_gb_per_s or options.link_gb_per_s):
        raise ConfigError(
            f"--share-of-peak, --network-gb-per-s and --link-gb-per-s are of a GPU of the table, not of --gpu {HERE}"
        )

    def machine_of(cut: Layout) -> Machine:
        if device is None:
            return measured_machine(config, measured, min(cut.num_ranks, cut.ranks_per_node), facts.data)
        return gpu_machine(
            device,
            config,
            measured,
            facts.data,
            cut.micro_batch,
            share=options.share_of_peak,
            network_per_s=options.network_gb_per_s and options.network_gb_per_s * 1e9,
            link_per_s=options.link_gb_per_s and options.link_gb_per_s * 1e9,
        )

    machine, work = machine_of(layout), work_of(config, facts.sizes, facts.data.kinds)
    storage_per_s = options.storage_mb_per_s and options.storage_mb_per_s * 1e6

    def forecast(cut: Layout) -> StepForecast:
        return forecast_step(config, facts, work, machine_of(cut), cut, storage_per_s)

    step = forecast(layout)
    can_exchange = machine.links is not None
    strong, weak = (
        scaling(layout, config.stream.num_lanes, kind, forecast) if can_exchange else [] for kind in ("strong", "weak")
    )
    num_steps = _num_steps(config, facts)
    return Forecast(
        machine=machine,
        facts=facts,
        step=step,
        num_steps=num_steps,
        checkpoints_s=_checkpoints_s(config, machine, work.parameters, num_steps),
        sentence=bottleneck(step, config, facts.data.stores_videos),
        strong=strong,
        weak=weak,
        notes=[*machine.assumed, *facts.notes],
        taken=_taken(measured, device is None, options.share_of_peak is not None),
        decodes_on_gpu=config.stream.decode.device == "mixed",
    )


def _taken(measured: Measured, is_here: bool, is_share_given: bool) -> list[str]:
    """What measured figures the forecast uses: rates of a machine's parts take the place of those of its whole step."""
    unused = {"step", "end_to_end"} if is_here and measured.parts else {"step"} if is_share_given else set()
    return [f"{text}: not used" if name in unused else text for name, text in measured.taken]


def _num_steps(config: RunConfig, facts: Facts) -> int | None:
    if config.train.max_steps is not None:
        return config.train.max_steps
    steps = facts.data.steps_per_epoch
    return None if steps is None else config.train.num_steps(steps)


def _checkpoints_s(config: RunConfig, machine: Machine, parameters: int, num_steps: int | None) -> float | None:
    if machine.save_per_s is None or num_steps is None:
        return None
    saves = -(-num_steps // config.train.checkpoint_every)
    return saves * checkpoint_bytes(parameters, config.train.engine.zero_stage) / machine.save_per_s
