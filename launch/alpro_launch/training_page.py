"""`alpro inspect RUN --page`: the page of a single training run, finished or not."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from alpro_launch.checkpoint_view import is_run, recent_bottleneck
from alpro_launch.page_parts import (
    entity_curves,
    loss_curves,
    num_parameters,
    optimizer_curves,
    shown_time,
    speed_curves,
    top_entities,
    totals,
    validation_curves,
    write_page,
)
from alpro_launch.page_pictures import clip_examples
from alpro_stream.config import load_config
from alpro_stream.errors import AlproError, ConfigError
from alpro_stream.model.weight_files import WEIGHTS_FILE
from alpro_stream.pages import (
    ClipExample,
    DroppedCause,
    DroppedSample,
    RunReportData,
    SavedCheckpoint,
    TrainingNumbers,
    render_run_report,
)
from alpro_stream.pages import RunConfig as ConfigText
from alpro_stream.run import RunConfig
from alpro_stream.stream.quarantine import RECORD_FOLDER, Failure, read_failures
from alpro_stream.train.checkpoint import complete_checkpoints, read_state
from alpro_stream.train.metrics import RESOLVED_CONFIG_FILE, read_metrics
from alpro_stream.train.restore import describe_prompter

PAGE_FILE = "report.html"
_NUM_CLIPS = 10
_NUM_EXAMPLES = 50
_TASKS = {
    "prompter": "Training of the prompter",
    "pretrain": "Pre-training",
    "retrieval": "Fine-tuning for retrieval",
    "question_answering": "Fine-tuning for question answering",
}


def write_training_page(run_dir: Path, path: Path | None = None) -> Path:
    """Writes the page of a run that is finished, was stopped or still goes on; it is only read.

    What the run does not have yet, or what is not there any more (its data, its prompter), is left out.

    Args:
        run_dir: directory of the run.
        path: the HTML file; by default report.html in it.

    Returns:
        The file.

    Raises:
        ConfigError: there is no run in that directory.
        OSError: the file cannot be written.
    """
    if not is_run(run_dir):
        raise ConfigError(
            f"{run_dir} is not the folder of a run, so there is no page to make of it; give the run_dir of an "
            "`alpro train`"
        )
    path = path or run_dir / PAGE_FILE
    write_page(path, render_run_report(_gather(run_dir)))
    return path


def _gather(run_dir: Path) -> RunReportData:
    lines = read_metrics(run_dir)
    checkpoints = complete_checkpoints(run_dir)
    newest = checkpoints[-1] if checkpoints else None
    state = _state(newest)
    text, config = _config(run_dir, newest)
    clips, clips_note = _clips(config, state)
    failures = read_failures(run_dir / RECORD_FOLDER)
    # Substitutes that cannot be used either come behind the planned sample, with its step and row: the first counts.
    planned = {(failure.occurrence.step, failure.occurrence.row): failure for failure in reversed(failures)}
    figures = totals(lines)
    num_planned = state.get("num_steps") or (config.train.max_steps if config else None)
    return RunReportData(
        title=f"Training run {run_dir.resolve().name}",
        summary=_summary(config, figures.num_steps, num_planned, lines),
        created=f"Made on {shown_time()}",
        numbers=TrainingNumbers(
            num_steps=figures.num_steps,
            num_planned=num_planned,
            seconds=figures.seconds,
            clips_per_s=figures.clips_per_s,
            data_wait=figures.data_wait,
            prompter_wait=figures.prompter_wait,
            mfu=figures.mfu,
            num_parameters=_num_parameters(newest),
            num_ranks=state.get("world_size"),
            num_dropped=len(planned),
        ),
        bottleneck=recent_bottleneck(lines) or "",
        losses=loss_curves(lines, "", config.stream.global_batch if config else None),
        validation=validation_curves(lines),
        speed=speed_curves(lines),
        optimizer=optimizer_curves(lines),
        entities=entity_curves(lines),
        top_entities=top_entities(lines),
        clips=clips,
        clips_note=clips_note,
        **({"pem_threshold": config.losses.pem.threshold} if config else {}),
        dropped=_dropped(list(planned.values())),
        dropped_records=str(run_dir / RECORD_FOLDER),
        checkpoints=tuple(saved for checkpoint in checkpoints if (saved := _saved(checkpoint))),
        configs=(ConfigText(name="Of the run, every default spelled out", yaml=text),) if text else (),
        versions=state.get("versions", {}),
    )


def _summary(config: RunConfig | None, step: int, num_planned: int | None, lines: Sequence[Mapping[str, Any]]) -> str:
    task = _TASKS[config.task] if config else "Training"
    if not lines:
        return f"{task}, before its first step."
    of = f" of {num_planned:,}" if num_planned else ""
    when = f"; the last one on {shown_time(lines[-1]['time'])}" if "time" in lines[-1] else ""
    return f"{task}, {step:,}{of} steps{when}."


def _state(checkpoint: Path | None) -> Mapping[str, Any]:
    """What the newest checkpoint says; a damaged one says nothing, and the rest of the page is there all the same."""
    try:
        return read_state(checkpoint) if checkpoint else {}
    except AlproError:
        return {}


def _config(run_dir: Path, checkpoint: Path | None) -> tuple[str, RunConfig | None]:
    """The resolved configuration, as text and, unless another version of the program wrote it, as values."""
    for folder in (run_dir, checkpoint):
        if folder is None or not (path := folder / RESOLVED_CONFIG_FILE).is_file():
            continue
        text = path.read_text(encoding="utf-8")
        try:
            return text, load_config(RunConfig, path)
        except AlproError:
            return text, None
    return "", None


def _clips(config: RunConfig | None, state: Mapping[str, Any]) -> tuple[tuple[ClipExample, ...] | None, str]:
    """Clips with their soft labels, or why there are none; None for a run without a prompter."""
    if config is None or config.prompter is None or not config.uses_pem:
        return None, ""
    try:
        _, _, digest = describe_prompter(config.prompter.checkpoint)
        if state and state["fingerprint"]["prompter"] != digest:
            return (), f"not shown: {config.prompter.checkpoint} is another prompter than the one of this run"
        return clip_examples(config, _NUM_CLIPS), ""
    except (AlproError, OSError) as error:
        return (), f"not shown: {error}"


def _num_parameters(checkpoint: Path | None) -> int | None:
    try:
        return num_parameters(checkpoint / WEIGHTS_FILE) if checkpoint else None
    except (OSError, SafetensorError):
        return None


def _dropped(failures: Sequence[Failure]) -> tuple[DroppedCause, ...]:
    by_cause = defaultdict(list)
    for failure in sorted(failures, key=lambda failure: failure.occurrence):
        by_cause[failure.cause].append(failure)
    return tuple(
        DroppedCause(
            cause=cause,
            count=len(found),
            examples=tuple(
                DroppedSample(
                    step=failure.occurrence.step,
                    row=failure.occurrence.row,
                    place=failure.place,
                    reason=failure.reason,
                    substitute=failure.substitute,
                )
                for failure in found[-_NUM_EXAMPLES:]
            ),
        )
        for cause, found in by_cause.items()
    )


def _saved(checkpoint: Path) -> SavedCheckpoint | None:
    """None for one that a run which still goes on has just taken away."""
    try:
        sizes = [file.stat().st_size for file in checkpoint.rglob("*") if file.is_file()]
        written = shown_time(checkpoint.stat().st_mtime)
    except FileNotFoundError:
        return None
    return SavedCheckpoint(name=checkpoint.name, written=written, num_bytes=sum(sizes))
