"""Where each millisecond of a step goes: the demo's pre-training, with loader thread and prompter process at work.

The rows from `step` to `rest` are the trainer's; the parts add up to the step. The rows `beside: ...` run at the same
time and cost the trainer only what it waits, and the cores they share with it; of the loader they are what its thread
spends or waits, and its workers decode meanwhile, so a stage may be shorter than its limit. Rows are means.

Limits, measured in the same sitting: a plain matrix product for `forward`, `backward` and `labels` (their floating
point operations at its rate); a copy in memory for `update` (AdamW reads four numbers of each parameter and writes
three); for `decode` libjpeg-turbo on bytes in memory, in as many threads as the loader has workers; for `read` the same
members by `pread` and nothing else; for `text` the `tokenizers` library on as many captions. Below the table the parts
are drawn, with one sentence on what to change; `--chart FILE` writes them as an SVG.

`data wait at base size` is the share of a step of the published model in which it waits for the same stream.
"""

import argparse
import os
import statistics
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice
from pathlib import Path

import simplejpeg
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer

from alpro_stream.config import load_config
from alpro_stream.errors import ConfigError
from alpro_stream.losses.objective import (
    GlobalCounts,
    GlobalFeatures,
    PretrainObjective,
    SoftLabels,
    count_local,
    same_pairs,
)
from alpro_stream.model.alpro import AlproModel, Heads, ModelConfig
from alpro_stream.model.operations import count_parameters
from alpro_stream.run import RunConfig, run_entities, train
from alpro_stream.shards.layout import tar_path
from alpro_stream.stream.batch import Batch
from alpro_stream.stream.maker import BatchMaker
from alpro_stream.stream.sources import open_sources
from alpro_stream.stream.text import Tokenizer
from alpro_stream.train.checkpoint import complete_checkpoints
from alpro_stream.train.engine import Engine
from alpro_stream.train.metrics import read_metrics
from alpro_stream.train.restore import ensure_bank, load_labeller
from benchmarks.charts import bar_chart, bar_lines
from benchmarks.harness import Measurement, Row, Target, main
from benchmarks.step import SMALL
from benchmarks.step_parts import advice, bars
from benchmarks.timing import Stopwatch, copy_rate, matrix_product_rate, repeat

CONFIG = "configs/demo/pretrain.yaml"
WARMUP_STEPS = 5


def rows(arguments: argparse.Namespace) -> list[Row]:
    """Trains some steps of the demo and takes them apart."""
    num_steps = WARMUP_STEPS + (20 if arguments.quick else 150)
    with tempfile.TemporaryDirectory(prefix="alpro-bench-") as folder:
        overrides = [f"run_dir={folder}", f"train.max_steps={num_steps}", "train.checkpoint_every=1000000"]
        overrides += ["train.rehearsal=false"]  # Its step would be taken for the first one.
        config = load_config(RunConfig, CONFIG, [*overrides, *arguments.overrides])
        _check(config, num_steps)
        with Stopwatch() as watch:
            watch.on(Engine, "__call__", "forward")
            watch.on(Engine, "backward", "backward")
            watch.on(Engine, "step", "update")
            watch.on(BatchMaker, "finish", "batch", keep=True)
            train(config)
        lines = read_metrics(Path(folder))
    steps = [line["step_s"] for line in lines]
    waits = {
        what: [step * line[f"{what}_wait_percent"] / 100 for step, line in zip(steps, lines, strict=True)]
        for what in ("data", "prompter")
    }
    parts = {name: _per_step(watch.seconds[name], num_steps) for name in ("forward", "backward", "update")}
    known = [sum(values) for values in zip(*parts.values(), *waits.values(), strict=True)]
    rest = [step - part for step, part in zip(steps, known, strict=True)]
    batch: Batch = watch.kept["batch"][-1]
    limits = Limits(config, batch)
    stages = {
        name: [step * line[f"stream/{name}_percent"] / 100 for step, line in zip(steps, lines, strict=True)]
        for name in ("read", "decode", "text")
    }
    shown = [
        _row("step", steps, limits.forward_s + limits.backward_s, "matrix product"),
        _row("forward", parts["forward"], limits.forward_s, "matrix product"),
        _row("backward", parts["backward"], limits.backward_s, "matrix product"),
        _row("update", parts["update"], limits.update_s, "memory copy"),
        _row("data wait", waits["data"]),
        _row("prompter wait", waits["prompter"]),
        _row("rest", rest),
        _row("beside: read", stages["read"], limits.read_s, "pread"),
        _row("beside: decode", stages["decode"], limits.decode_s, "raw libjpeg-turbo"),
        _row("beside: text", stages["text"], limits.text_s, "tokenizers"),
        # By themselves, with all threads.
        _row("beside: labels", limits.labels, limits.labels_s, "matrix product"),
    ]
    size = config.stream.global_batch
    rate = Measurement(tuple(size / step for step in steps[WARMUP_STEPS:]))
    fastest = size / (limits.forward_s + limits.backward_s)
    throughput = Row.of("throughput", rate, "clips/s", fastest, limit_of="matrix product")
    return [*shown, throughput, base_size_row(arguments)]


def conclude(arguments: argparse.Namespace, found: Sequence[Row]) -> None:
    """Draws the parts, writes the chart if asked to, and says what to change."""
    values = {row.name: row.value for row in found}
    limits = {row.name: row.limit for row in found if row.limit is not None}
    print("\nwhere a step goes (light: beyond the limit)")
    print("\n".join(bar_lines(bars(values, limits), "ms")))
    print(f"\n{advice(values, limits)}")
    if arguments.chart:
        title = f"A step of the demo's pre-training, {values['step']:.0f} ms"
        arguments.chart.parent.mkdir(parents=True, exist_ok=True)
        arguments.chart.write_text(bar_chart(title, bars(values, limits), "ms", "the limit"), encoding="utf-8")


def base_size_row(arguments: argparse.Namespace) -> Row:
    """The published model on the demo's clips, without PEM: its prompter would have to be trained at this size."""
    num_steps = 2 if arguments.quick else 5
    with tempfile.TemporaryDirectory(prefix="alpro-bench-") as folder:
        overrides = [f"run_dir={folder}", f"train.max_steps={num_steps}", "train.checkpoint_every=1000000"]
        overrides += ["stream.global_batch=4", "start_from=null", "losses.pem.weight=0", "train.rehearsal=false"]
        demo = load_config(RunConfig, CONFIG, [*overrides, *arguments.overrides])
        train(demo.model_copy(update={"model": SMALL if arguments.quick else ModelConfig(), "prompter": None}))
        # The first step waits for everything to start.
        shares = [line["data_wait_percent"] / 100 for line in read_metrics(Path(folder))[1:]]
    return Row.of("data wait at base size", Measurement(tuple(shares)), "of the step", target=Target(at_most=0.01))


class Limits:
    """What the same work takes by the raw means; and the labels by themselves."""

    def __init__(self, config: RunConfig, batch: Batch) -> None:
        assert config.prompter is not None
        rate = matrix_product_rate()
        forward, backward, num_parameters = objective_costs(config, batch)
        self.forward_s, self.backward_s = forward / rate, backward / rate
        # Seven numbers of four bytes pass; of a copy each byte passes twice.
        copied = 7 * 4 * num_parameters // 2
        self.update_s = copied / copy_rate(copied)
        device = torch.device("cpu")
        entities = run_entities(config.prompter, config.stream)
        folder = config.run_dir / "prompter"
        bank = ensure_bank(config.prompter.checkpoint, entities, folder, device, config.prompter.prompts)
        labeller = load_labeller(config.prompter.checkpoint, bank, config.losses.pem, device)
        with FlopCounterMode(display=False) as counter:
            labeller(batch.frames_BTHWC, batch.boxes_B4, batch.kind)
        self.labels_s = counter.get_total_flops() / rate
        self.labels = repeat(lambda: labeller(batch.frames_BTHWC, batch.boxes_B4, batch.kind), 12)
        self.read_s, self.decode_s = media_seconds(config, len(batch), batch.frames_BTHWC.shape[1])
        self.text_s = text_seconds(config, batch.captions)


def objective_costs(config: RunConfig, batch: Batch) -> tuple[float, float, int]:
    """Floating point operations of one step, forward and backward, counted by torch; and the model's parameters."""
    tokenizer = Tokenizer(config.stream.text.tokenizer, config.stream.text.num_tokens)
    num_entities = 100
    model = AlproModel(config.model, tokenizer.vocab_size, Heads.of("pretrain", num_entities))
    objective = PretrainObjective(model, config.losses)
    labels = SoftLabels(torch.full((len(batch), num_entities), 1 / num_entities), torch.ones(len(batch)).bool())
    ignore_GG = same_pairs(batch.video_id_B, batch.text_id_B)
    counts = GlobalCounts(*count_local(batch, labels))
    with FlopCounterMode(display=False) as counter:
        terms = objective(
            batch, lambda video, text: GlobalFeatures(video, text, ignore_GG, batch.valid_B, 0), 1, counts, labels
        )
        forward = counter.get_total_flops()
        terms.total.backward()
        backward = counter.get_total_flops() - forward
    return forward, backward, count_parameters(model)["total"]


def media_seconds(config: RunConfig, num_clips: int, num_frames: int) -> tuple[float, float]:
    """Seconds in which the stored frames of a batch are read, and then decoded whole, in a thread a worker."""
    (source, *_) = open_sources(config.stream.sources)
    try:
        shard = source.shards[0]
        slots = islice(cycle(range(shard.num_samples)), num_clips)
        members = [member for slot in slots for member in source.reader.frame_members(shard.name, slot)[:num_frames]]
        descriptor = os.open(tar_path(Path(config.stream.sources[0].path), shard.name), os.O_RDONLY)
        try:

            def read() -> list[bytes]:
                return [os.pread(descriptor, member.size, member.offset) for member in members]

            jpegs, read_s = read(), statistics.median(repeat(read, 12))
        finally:
            os.close(descriptor)
    finally:
        source.reader.close()
    with ThreadPoolExecutor(max(1, config.stream.decode.num_workers)) as pool:
        return read_s, statistics.median(repeat(lambda: [*pool.map(simplejpeg.decode_jpeg, jpegs)], 12))


def text_seconds(config: RunConfig, captions: Sequence[str]) -> float:
    """Seconds in which the tokenizers library makes ids of the captions of a batch."""
    encode = AutoTokenizer.from_pretrained(config.stream.text.tokenizer).backend_tokenizer.encode_batch
    return statistics.median(repeat(lambda: encode(list(captions)), 12))


def _per_step(calls: Sequence[float], num_steps: int) -> list[float]:
    each, left = divmod(len(calls), num_steps)
    assert not left, f"{len(calls)} calls in {num_steps} steps: some belong to none of them"
    return [sum(calls[step * each : (step + 1) * each]) for step in range(num_steps)]


def _row(name: str, seconds: Sequence[float], limit_s: float | None = None, limit_of: str = "") -> Row:
    """The mean: only means of parts add up to that of the step, and a wait that is rare and long is in it."""
    milliseconds = Measurement(tuple(1000 * value for value in seconds[WARMUP_STEPS:]))
    return Row(
        name=name,
        value=statistics.mean(milliseconds.samples),
        unit="ms",
        spread=milliseconds.spread,
        limit=None if limit_s is None else 1000 * limit_s,
        limit_of=limit_of,
    )


def _check(config: RunConfig, num_steps: int) -> None:
    """Refuses what cannot be taken apart."""
    if config.prompter is None or not config.uses_pem:
        raise ConfigError("the benchmark takes a step with PEM apart: leave prompter and losses.pem.weight as they are")
    if config.train.log_every != 1 or config.train.max_steps != num_steps:
        raise ConfigError("every step is looked at: leave train.log_every and train.max_steps as they are")
    if not complete_checkpoints(config.prompter.checkpoint):
        raise ConfigError("the benchmark trains on what the demo made; run `make demo` first")


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=f"overrides for {CONFIG}")
    parser.add_argument("--chart", type=Path, metavar="FILE", help="write the parts of a step as an SVG")


if __name__ == "__main__":
    main("end_to_end", rows, add_arguments=_arguments, conclude=conclude)
