"""The training loop: fetch, label, differentiate, step, commit; resume from the last commit."""

import logging
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import Field
from torch import Tensor

from alpro_stream.config import Config
from alpro_stream.errors import AlproError, DivergenceError
from alpro_stream.losses.objective import SoftLabels
from alpro_stream.losses.pem import IgnoreRule
from alpro_stream.prompter.client import Prompter
from alpro_stream.prompter.figures import label_sums, most_frequent, top_counts, with_figures
from alpro_stream.stream.batch import Batch
from alpro_stream.stream.cursor import Cursor, StepRange, steps_left
from alpro_stream.stream.gauges import bottleneck
from alpro_stream.stream.loader import Loader
from alpro_stream.stream.maker import BatchMaker
from alpro_stream.stream.plan import Plan
from alpro_stream.stream.quarantine import RECORD_FILE, RECORD_FOLDER, describe, read_failures, summary
from alpro_stream.train.checkpoint import publish, read_state, write_state
from alpro_stream.train.clock import StepClock
from alpro_stream.train.distributed import World
from alpro_stream.train.divergence import DivergenceConfig, LossWatch, Verdict
from alpro_stream.train.engine import Engine, EngineConfig, OptimizerConfig
from alpro_stream.train.metrics import MetricsWriter, ProgressLine, WandbConfig, read_metrics
from alpro_stream.train.schedule import learning_rate
from alpro_stream.train.step import Step

logger = logging.getLogger(__name__)

_NUM_TOP_ENTITIES = 5
# Steps whose figures the last word on the bottleneck is about.
_JUDGED_STEPS = 100
# Of an earlier sitting, some of which may be from behind its last checkpoint.
_RECALLED_LINES = 5000


class TrainConfig(Config):
    """Length of the run, optimizer, engine, and what is written when."""

    epochs: float = Field(default=10.0, gt=0, le=10**6)
    """Passes through the sources; 10 as published."""
    max_steps: int | None = Field(default=None, ge=1, le=10**8)
    """Steps of the run, in place of `epochs`."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW and its schedule."""
    engine: EngineConfig = EngineConfig()
    """DeepSpeed ZeRO, precision, micro-batches."""
    checkpoint_every: int = Field(default=1000, ge=1)
    """Steps between checkpoints; the last step always has one."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Newest checkpoints that are kept."""
    log_every: int = Field(default=1, ge=1)
    """Steps between lines of metrics."""
    timeout_s: float = Field(default=600.0, gt=0, le=7 * 86_400)
    """Longest wait of a rank for the others, and longest time at one stage of the run: data, labels, step, validation,
    checkpoint, and those of the start."""
    wandb: WandbConfig | None = None
    """Send the metrics to Weights & Biases too; null does not."""
    rehearsal: bool = True
    """Make a step on made-up batches of each kind first, in an engine that is thrown away: what does not fit into the
    memory or cannot be compiled is found before anything is waited for."""
    divergence: DivergenceConfig = DivergenceConfig()
    """What is done when a loss is not a number, or jumps."""

    def num_steps(self, steps_per_epoch: float) -> int:
        """Steps of the run."""
        return self.max_steps or max(1, round(self.epochs * steps_per_epoch))


class Validation(Protocol):
    """Looks at the model while it is trained.

    Attributes:
        every: steps between two looks.
    """

    every: int

    def __call__(self) -> dict[str, float]:
        """Figures by name, the same on every rank; called on all ranks between two steps, and changes nothing."""
        ...


@dataclass(frozen=True)
class Parts:
    """Everything a run is made of, built by `alpro_stream.run`.

    Attributes:
        run_dir: gets checkpoints and metrics.
        title: for the progress line.
        world: the ranks.
        plan: the order.
        maker: batches.
        engine: model and optimizer.
        prompter: soft labels; None without PEM.
        fingerprint: of the data.
        versions: of the packages, for state.json.
        operations: floating point operations of a sample, by kind; see `alpro_stream.model.operations`.
        peak_per_s: operations a second that the device can do at best; None where that is not known.
        save_extras: writes model, tokenizer and config beside the engine's state (all ranks).
        entities: names of the soft labels; empty without PEM.
        ignore_rule: what PEM ignores.
        is_asked_to_stop: whether this process is to save and end.
        validation: looks at the model now and then; None for never.
    """

    run_dir: Path
    title: str
    world: World
    plan: Plan
    maker: BatchMaker
    engine: Engine
    prompter: Prompter | None
    fingerprint: dict[str, Any]
    versions: dict[str, str]
    operations: Mapping[str, float]
    peak_per_s: float | None
    save_extras: Callable[[Path], None]
    entities: Sequence[str] = ()
    ignore_rule: IgnoreRule = "sample"
    is_asked_to_stop: Callable[[], bool] = lambda: False
    validation: Validation | None = None


@dataclass(frozen=True, slots=True)
class _Due:
    """What is done after a step, the same on all ranks."""

    save: bool
    log: bool
    validate: bool
    stop: bool


class Trainer:
    """Trains until the last step; its own state is the cursor, which moves when the optimizer has made a step."""

    def __init__(
        self, config: TrainConfig, parts: Parts, seed: int, lookahead: int, skip_steps: Sequence[StepRange] = ()
    ) -> None:
        self._config = config
        self._parts = parts
        self._step = Step(parts.engine, parts.world, config.engine.num_micro_batches, seed)
        self._watch = LossWatch(config.divergence)
        self._lookahead = lookahead
        self._top_counts: Tensor | None = None
        # The last step whose values were looked at.
        self._checked = 0
        self._skip_steps = skip_steps
        self.num_steps = config.num_steps(parts.plan.steps_per_epoch)
        self.cursor = Cursor(0)

    def resume(self, checkpoint: Path) -> None:
        """Goes on from a complete checkpoint of the same run, with the same ZeRO stage.

        Raises:
            AlproError: its files cannot be loaded, on this rank or on another.
        """
        state = read_state(checkpoint)
        if state["num_steps"] != self.num_steps:
            logger.warning(
                "the run had %d steps and has %d now: from here its learning rate follows the new length",
                state["num_steps"],
                self.num_steps,
            )
        world, run_dir = self._parts.world, self._parts.run_dir
        world.stage.enter(f"the loading of {checkpoint.name}")
        self._parts.engine.load(checkpoint)
        self.cursor = Cursor.from_dict(state["cursor"])
        lines = world.from_first(lambda: read_metrics(run_dir)[-_RECALLED_LINES:], "the metrics so far")
        self._watch.recall(line for line in lines if line["step"] <= self.cursor.step)

    def train(self) -> bool:
        """Runs the steps that are left; the last one is always saved.

        Returns:
            Whether all are made; else a rank was asked to stop, and the last step is saved.

        Raises:
            AlproError: a batch or its labels cannot be made, on this rank or on another; or a loss diverged.
        """
        parts, optimizer = self._parts, self._config.optimizer
        with ExitStack() as stack:
            metrics = None
            with parts.world.all_or_none():
                if parts.world.is_first:
                    writer = MetricsWriter(parts.run_dir, self.cursor.step, self._config.wandb)
                    metrics = stack.enter_context(closing(writer))
            progress = ProgressLine(parts.title, self.num_steps, self.cursor.step, shown=parts.world.is_first)
            stack.enter_context(closing(progress))
            first_step = self._checked = self.cursor.step
            (last_step,) = deque(self._steps_left(), maxlen=1) or (None,)
            loader = stack.enter_context(closing(self._loader()))
            clock = StepClock()
            judged: deque[dict[str, float]] = deque(maxlen=_JUDGED_STEPS)
            for batch, labels in self._batches(loader, clock):
                rate = learning_rate(batch.step + 1, self.num_steps, optimizer.learning_rate, optimizer.warmup_ratio)
                shares = self._train_step(batch, labels, rate)
                before, self.cursor = self.cursor.step, self.cursor.after(batch.step)
                timing = clock.lap(parts.plan.num_lanes * parts.plan.lane_batch)
                timing |= self._utilisation(batch, timing["step_s"]) | {"learning_rate": rate}
                due = self._what_is_due(before, batch.step == last_step)
                if due.log:
                    timing |= loader.figures()
                    # The first step of a sitting waits for everything to start.
                    judged.extend([timing] if batch.step > first_step else [])
                if due.log or due.save:
                    self._look(due, batch, shares, timing, metrics, progress)
                if due.save or due.validate:
                    clock.restart()
                if due.stop:
                    return batch.step == last_step
            if judged:
                progress.say(bottleneck(mean_figures(judged)))
            if parts.world.is_first and (failures := read_failures(parts.run_dir / RECORD_FOLDER)):
                progress.say(describe(failures, parts.run_dir / RECORD_FOLDER))
        return True

    def _what_is_due(self, before: int, is_last: bool) -> "_Due":
        """After a step; asked on all ranks."""
        config, validation, step = self._config, self._parts.validation, self.cursor.step
        is_stopped = self._parts.world.any(self._parts.is_asked_to_stop())
        is_validated = validation is not None and (is_last or _is_due(validation.every, before, step))
        return _Due(
            save=is_last or is_stopped or _is_due(config.checkpoint_every, before, step),
            log=is_last or is_validated or _is_due(config.log_every, before, step),
            validate=is_validated and not is_stopped,  # who asks a run to stop does not wait for long
            stop=is_stopped,
        )

    def _look(
        self,
        due: "_Due",
        batch: Batch,
        shares: Mapping[str, Tensor],
        timing: Mapping[str, float],
        metrics: MetricsWriter | None,
        progress: ProgressLine,
    ) -> None:
        """Validates, logs, judges and saves a step: what was saved has its line, and what is lost has none."""
        world, step = self._parts.world, self.cursor.step
        values = with_figures(self._global_values(shares))
        values["gradient_norm"] = self._parts.engine.gradient_norm()
        verdict, fault = self._watch.judge(values), None
        line: dict[str, float | str] = {"source": batch.source, **self._top_entities(), **values, **timing}
        if due.validate and self._parts.validation and not verdict:
            world.stage.enter(f"the validation after step {step}")
            try:
                line |= self._parts.validation()
            except AlproError as error:  # The same on all ranks, and no reason to lose the steps since the last save.
                fault = error
        if due.log:
            progress.show(step, values, timing)
            with world.all_or_none("rank 0 and the metrics it writes"):
                if metrics:
                    metrics.write(step, line)
        if verdict:
            self._act(verdict, progress)
        self._checked = step
        if due.save:
            self._save()
        if fault:
            raise fault

    def _utilisation(self, batch: Batch, step_s: float) -> dict[str, float]:
        """Operations a second of each rank, and their share of what the device can do (MFU)."""
        per_s = len(batch) * self._parts.operations[batch.kind] / step_s
        peak = self._parts.peak_per_s
        return {"tflops": per_s / 1e12} | ({"mfu_percent": 100 * per_s / peak} if peak else {})

    def _steps_left(self) -> Iterator[int]:
        return steps_left(self.cursor.step, self.num_steps, self._skip_steps)

    def _loader(self) -> Loader:
        world = self._parts.world
        return Loader(
            self._parts.maker,
            self._parts.plan,
            rank=world.rank,
            world_size=world.size,
            first_step=self.cursor.step,
            last_step=self.num_steps,
            skip_steps=self._skip_steps,
        )

    def _batches(self, loader: Loader, clock: StepClock) -> Iterator[tuple[Batch, SoftLabels | None]]:
        """Batches in order with their labels, each handed to the prompter `lookahead` steps before it is yielded."""
        world, prompter, batches = self._parts.world, self._parts.prompter, iter(loader)
        waiting: deque[Batch] = deque()
        ahead = self._lookahead if prompter else 0
        while True:
            labels = None
            # A rank without its batch or its labels must not leave the others waiting in the step's collectives.
            with world.all_or_none():
                world.stage.enter(f"the data of step {self.cursor.step + 1}")
                with clock.waiting_for("data"):
                    while len(waiting) <= ahead and (batch := next(batches, None)) is not None:
                        waiting.append(batch.to(world.device))
                        if prompter:
                            prompter.submit(waiting[-1])
                    self._parts.maker.gauges.queue("lookahead", sum(batch.num_bytes for batch in waiting))
                world.stage.enter(f"the labels of step {self.cursor.step + 1}")
                with clock.waiting_for("prompter"):
                    if prompter and waiting:
                        labels = prompter.collect(waiting[0])
            if not waiting:
                return
            yield waiting.popleft(), labels

    def _train_step(self, batch: Batch, labels: SoftLabels | None, rate: float) -> dict[str, Tensor]:
        """Makes the step; returns this rank's share of each global value."""
        self._parts.world.stage.enter(f"step {self.cursor.step + 1}")
        with self._parts.world.waiting("the step of all ranks", at_work=True):
            values = self._step.train(batch, labels, rate)
        values["quarantined"] = torch.tensor(float(batch.num_quarantined), device=self._parts.world.device)
        if labels:
            values |= label_sums(labels, batch.valid_B, self._parts.ignore_rule)
            self._top_counts = top_counts(labels, batch.valid_B)
        return values

    def _top_entities(self) -> dict[str, str]:
        """The most frequent largest labels of the step, over all ranks; asked on all of them."""
        if self._top_counts is None:
            return {}
        counts = self._parts.world.sum(self._top_counts)
        found = most_frequent(counts.tolist(), self._parts.entities, _NUM_TOP_ENTITIES)
        return {"pem/top_entities": ", ".join(f"{name} {100 * share:.0f} %" for name, share in found)}

    def _global_values(self, shares: Mapping[str, Tensor]) -> dict[str, float]:
        """The sums over the ranks, the same on every rank."""
        sums = self._parts.world.sum(torch.stack(list(shares.values())))
        return dict(zip(shares, sums.tolist(), strict=True))

    def _act(self, verdict: Verdict, progress: ProgressLine) -> None:
        """Stops before weights that are of no use take the place of good checkpoints."""
        step = self.cursor.step
        if verdict.action == "warn":
            progress.say(f"step {step}: {verdict.wrong}")
            return
        raise DivergenceError(
            f"step {step} cannot be used: {verdict.wrong}; nothing of it is saved. Lower "
            "train.optimizer.learning_rate, or look for what is wrong in the data of this step, and start again; "
            f"stream.skip_steps=[[{self._checked},{step}]] goes on without what was made since it was last looked at"
        )

    def _save(self) -> None:
        parts = self._parts
        parts.world.stage.enter(f"the checkpoint of step {self.cursor.step}")
        state = {
            "cursor": self.cursor.to_dict(),
            "num_steps": self.num_steps,
            "fingerprint": parts.fingerprint,
            "zero_stage": self._config.engine.zero_stage,
            "world_size": parts.world.size,
            "versions": parts.versions,
        }

        def write_state_of_run(directory: Path) -> None:
            if parts.world.is_first:
                # What lies beyond the cursor was only prepared, and will be met again.
                past = [f for f in read_failures(parts.run_dir / RECORD_FOLDER) if f.occurrence.step < self.cursor.step]
                lines = "".join(f"{failure.to_json()}\n" for failure in past)
                (directory / RECORD_FILE).write_text(lines, encoding="utf-8")
                write_state(directory, {**state, "quarantine": summary(past)})

        writers = (parts.engine.save, parts.save_extras, write_state_of_run)
        publish(parts.run_dir, self.cursor.step, parts.world, writers, self._config.keep_checkpoints)


def _is_due(every: int, before: int, step: int) -> bool:
    """Whether something is, after a step; skipped steps may be those at which it was due."""
    return step // every > before // every


def mean_figures(figures: Collection[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each figure, over those that have it."""
    names = {name for one in figures for name in one}
    values = {name: [one[name] for one in figures if name in one] for name in names}
    return {name: sum(found) / len(found) for name, found in values.items()}
