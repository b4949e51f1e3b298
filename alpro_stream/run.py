"""A whole training run: its configuration, and `train(config)`, which builds the parts and trains."""

import copy
import fcntl
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import IO, Any, Literal, Self

import torch
from pydantic import model_validator

from alpro_stream.config import Config, differences, save_config, to_yaml, validate
from alpro_stream.errors import CheckpointError, ConfigError, TakenError
from alpro_stream.evaluate.answer_list import AnswersConfig, answer_list, check_questions
from alpro_stream.evaluate.validation import ValidationConfig, open_validation
from alpro_stream.losses.answers import AnswerObjective
from alpro_stream.losses.objective import DualObjective, ObjectiveConfig, PretrainObjective
from alpro_stream.manifest import KINDS, Kind
from alpro_stream.model.alpro import DualEncoder, ModelConfig, Task
from alpro_stream.model.checkpointing import set_checkpointing
from alpro_stream.model.cpu_memory import keep_freed_memory
from alpro_stream.model.folder import ModelDescription, write_model
from alpro_stream.model.operations import peak_per_s, step_operations
from alpro_stream.model.weights import start_from_pretrained
from alpro_stream.prompter.client import InlinePrompter, Prompter, PrompterClient, PrompterConfig
from alpro_stream.shards.entities import load_entities, merge_entities
from alpro_stream.shards.layout import ENTITIES_FILE
from alpro_stream.shards.remote_files import join
from alpro_stream.stream.batch import Batch
from alpro_stream.stream.clips import build_clip_decoder
from alpro_stream.stream.config import StreamConfig, fingerprint, make_plan
from alpro_stream.stream.cursor import Cursor, already_trained, check_fingerprint, num_steps_left
from alpro_stream.stream.gauges import Gauges
from alpro_stream.stream.maker import BatchMaker
from alpro_stream.stream.plan import Plan, lanes_of_rank
from alpro_stream.stream.quarantine import RECORD_FILE, RECORD_FOLDER, Quarantine, read_failures, read_record
from alpro_stream.stream.sources import (
    Listing,
    Source,
    Storage,
    closing_storage,
    open_sources,
    read_listings,
    shards_kept_open,
)
from alpro_stream.stream.text import Tokenizer
from alpro_stream.train.checkpoint import (
    STATE_FILE,
    check_files,
    code_version,
    complete_checkpoints,
    latest_checkpoint,
    read_state,
)
from alpro_stream.train.distributed import World, join_world
from alpro_stream.train.engine import Engine
from alpro_stream.train.metrics import RESOLVED_CONFIG_FILE
from alpro_stream.train.rehearsal import made_up_batch, rehearse
from alpro_stream.train.restore import check_weights, describe_prompter, ensure_bank, load_labeller, start_from_trained
from alpro_stream.train.trainer import Parts, TrainConfig, Trainer
from alpro_stream.train.watchdog import watching

logger = logging.getLogger(__name__)

_VERSIONS = ("alpro-stream", "torch", "deepspeed", "transformers", "timm")
# Also a save of a large model ends within it.
_LOCK_WAIT_S = 60.0


def _versions() -> dict[str, str]:
    return {name: version(name) for name in _VERSIONS}


class RunConfig(Config):
    """One training run: stage one (`task: prompter`), stage two (`task: pretrain`), or fine-tuning."""

    work_dir: str = "runs"
    """Only a name for `${work_dir}` inside the file, so that one override moves everything."""
    task: Task
    """What is trained: the dual encoder with VTC alone (`prompter`), ALPRO with four losses (`pretrain`), the same with
    VTC and VTM (`retrieval`), or with a head that chooses an answer (`question_answering`)."""
    run_dir: Path
    """Gets checkpoints, metrics and logs."""
    stream: StreamConfig
    """Data."""
    model: ModelConfig = ModelConfig()
    """Sizes and starting weights."""
    start_from: Path | None = None
    """Starting weights in place of a pretrained ViT and BERT: a run, a checkpoint, an exported model, or a released
    file of ALPRO's authors or of LAVIS. Heads that it does not have start fresh."""
    frozen: tuple[Literal["video_encoder", "text_encoder"], ...] = ()
    """Encoders that keep their starting weights, as features computed beforehand do; their dropout is configured."""
    losses: ObjectiveConfig = ObjectiveConfig()
    """Weights of the losses; stage one uses VTC alone, retrieval VTC and VTM, question answering none of them."""
    answers: AnswersConfig = AnswersConfig()
    """Answers that question answering chooses from."""
    prompter: PrompterConfig | None = None
    """The frozen prompter; needed while PEM has a weight."""
    train: TrainConfig = TrainConfig()
    """Length, optimizer, engine, checkpoints."""
    validation: ValidationConfig | None = None
    """Held-out data to look at while the run goes on."""
    accept: tuple[str, ...] = ()
    """Names of what may differ from the checkpoint that the run goes on from, as the refusal names them; what was one
    run is then two, with a seam."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.task == "pretrain" and self.losses.pem.weight and self.prompter is None:
            raise ValueError("PEM needs a prompter: set prompter.checkpoint, or losses.pem.weight=0")
        fuses_pairs = self.task in ("pretrain", "retrieval") and self.losses.vtm
        if fuses_pairs and self.stream.global_batch < 2 * self.stream.num_lanes:
            raise ValueError(
                f"stream.global_batch {self.stream.global_batch} over stream.num_lanes {self.stream.num_lanes} leaves "
                "one sample in a lane, where VTM finds no negative: use fewer lanes, or losses.vtm=0"
            )
        if self.task == "retrieval" and not (self.losses.vtc or self.losses.vtm):
            raise ValueError("retrieval is trained with VTC and VTM, and both have weight 0: there is nothing to train")
        if self.task == "question_answering" and self.stream.unit != "question":
            raise ValueError(
                f"stream.unit is {self.stream.unit}; question answering reads questions with their answers: set "
                "stream.unit=question"
            )
        return self

    @property
    def uses_pem(self) -> bool:
        """Whether soft labels are needed."""
        return self.task == "pretrain" and self.losses.pem.weight > 0

    @property
    def used_losses(self) -> ObjectiveConfig:
        """Weights of what pre-training and retrieval are trained with."""
        if self.task != "retrieval":
            return self.losses
        no_pem = self.losses.pem.model_copy(update={"weight": 0.0})
        return self.losses.model_copy(update={"mlm": 0.0, "pem": no_pem})


class FinishedRun(Config):
    """What `train` hands back.

    Attributes:
        checkpoint: the last one.
        num_steps: of the whole run.
        already_done: whether there was nothing left to do.
        was_stopped: whether it was asked to stop before its last step.
    """

    checkpoint: Path
    num_steps: int
    already_done: bool = False
    was_stopped: bool = False


def train(
    config: RunConfig,
    is_asked_to_stop: Callable[[], bool] = lambda: False,
    on_silence: Callable[[str], None] = logger.error,
    since: float | None = None,
) -> FinishedRun:
    """Trains, or goes on from the newest complete checkpoint in `run_dir`; called on every rank.

    Args:
        config: of the run.
        is_asked_to_stop: asked when the ranks have met and after each step; where it is so on any rank then, all save
            and return.
        on_silence: called from a thread, with a message, when this rank stands still; see `train.watchdog`.
        since: when this process began to wait for the others, by `time.monotonic`; None is now.

    Raises:
        AlproError: with a message for the user; see `alpro_stream.errors`.
    """
    # Ranks of other versions, or of another commit, might compute other things from the same bytes.
    versions = {**_versions(), "code": code_version(), "python": python_version()}
    run = f"the training in {config.run_dir.absolute()}"
    world = join_world(config.train.timeout_s, versions, run, since, "train.timeout_s")
    if world.device.type == "cpu":
        keep_freed_memory()
    if config.train.engine.num_threads:
        torch.set_num_threads(config.train.engine.num_threads)
    is_asked_to_stop()  # From here on, who is asked to stop saves first.
    _check_all_want_the_same(config, world)
    with ExitStack() as stack:
        with world.all_or_none():
            if world.is_first:
                stack.enter_context(_only_run_in(config.run_dir, min(_LOCK_WAIT_S, config.train.timeout_s / 2)))
        with world.all_or_none():
            logs = config.run_dir / "logs"
            stack.enter_context(watching(world.stage, config.train.timeout_s, logs, world.rank, on_silence))
        gauges = Gauges()
        world.stage.enter("the opening of the data")
        with world.all_or_none():
            storage = stack.enter_context(open_storage(config, world, gauges))
        known = world.from_first(
            lambda: read_once(config, storage), "the descriptions and exclude lists of the data sets"
        )
        with world.all_or_none():
            data = open_data(config, world, storage, known, find_prompter(config))
            for source in data.sources:
                stack.callback(source.reader.close)
            previous = _previous_checkpoint(config, world, data)
        _check_all_see_the_same(config, world, data, previous)
        num_steps = config.train.num_steps(data.plan.steps_per_epoch)
        cursor = Cursor.from_dict(read_state(previous)["cursor"]) if previous else Cursor(0)
        if late := already_trained(cursor, config.stream.skip_steps):
            raise ConfigError(
                f"stream.skip_steps={[list(steps) for steps in late]}: the run goes on with step {cursor.step}, and "
                f"has trained on these already. Remove the checkpoints behind step {min(late)[0]} of {config.run_dir} "
                "to go back before them, or leave them out of skip_steps"
            )
        if not num_steps_left(cursor.step, num_steps, config.stream.skip_steps):
            if previous is None:
                raise ConfigError(f"stream.skip_steps leaves out all {num_steps} steps of the run; leave some to train")
            return FinishedRun(checkpoint=previous, num_steps=num_steps, already_done=True)
        world.stage.enter("the building of decoder, model and prompter")
        parts = _build(config, world, data, gauges, previous, is_asked_to_stop, stack)
        lookahead = config.prompter.lookahead if config.prompter else 0
        trainer = Trainer(config.train, parts, config.stream.seed, lookahead, config.stream.skip_steps)
        if previous:
            trainer.resume(previous)
        is_done = trainer.train()
        return FinishedRun(checkpoint=latest_checkpoint(config.run_dir), num_steps=num_steps, was_stopped=not is_done)


@contextmanager
def _only_run_in(run_dir: Path, wait_s: float) -> Iterator[None]:
    """Holds the run directory; the lock ends with the process, however that ends."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / ".lock").open("w") as file:
        try:
            _wait_for_lock(file, run_dir, wait_s)
        except BlockingIOError as error:
            raise TakenError(
                f"another process is training in {run_dir}; wait for it, or set another run_dir"
            ) from error
        except OSError as error:  # Some cluster file systems have no locks.
            logger.warning("%s cannot be locked (%s): start only one run in it", run_dir, error)
        yield


def _wait_for_lock(file: IO[str], run_dir: Path, wait_s: float) -> None:
    """Ranks whose launcher was killed save before they end, and a run that is started again at once meets them."""
    deadline, said = time.monotonic() + wait_s, False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise
        if not said:
            logger.warning("another process is training in %s; waiting up to %g s for it", run_dir, wait_s)
            said = True
        time.sleep(0.2)


@dataclass(frozen=True)
class ReadOnce:
    """What the first rank reads for all: descriptions of the data sets, and the lists that heads are made for."""

    listings: tuple[Listing, ...]
    entities: list[str]
    answers: list[str]


@dataclass(frozen=True)
class RunData:
    """What is cheap to open, and decides whether the run can begin at all."""

    sources: tuple[Source, ...]
    plan: Plan
    tokenizer: Tokenizer
    entities: list[str]
    answers: list[str]
    prompter: Path | None
    prompter_digest: str | None


def open_storage(config: RunConfig, world: World, gauges: Gauges) -> AbstractContextManager[Storage]:
    """How shards are reached by a rank."""
    stream = config.stream
    # One that is closed and opened again for every batch would cost more than its frames.
    lanes = lanes_of_rank(world.rank, world.size, stream.num_lanes)
    max_open = shards_kept_open(len(lanes) * stream.window_shards, len(stream.sources))
    return closing_storage(
        stream.sources, stream.cache, stream.fetch, max_open=max_open, waiting=lambda: gauges.busy("fetch")
    )


def read_once(config: RunConfig, storage: Storage) -> ReadOnce:
    """What the first rank reads for all: thousands of ranks that ask for the same files are a burden on any storage.

    Raises:
        AlproError: data sets, entities or answers are not there, or cannot be used.
    """
    stream = config.stream
    listings = read_listings(stream.sources, stream.unit, storage)
    entities = run_entities(config.prompter, stream) if config.uses_pem and config.prompter else []
    answers = _run_answers(config, storage, listings) if config.task == "question_answering" else []
    return ReadOnce(listings, entities, answers)


def _run_answers(config: RunConfig, storage: Storage, listings: Sequence[Listing]) -> list[str]:
    stream = config.stream
    check_questions(listings, [source.path for source in stream.sources])
    sources = open_sources(stream.sources, stream.unit, storage, listings)
    try:
        return answer_list(config.answers, sources)
    finally:
        for source in sources:
            source.reader.close()


def open_data(
    config: RunConfig,
    world: World,
    storage: Storage,
    known: ReadOnce,
    prompter: tuple[Path, str] | None,
) -> RunData:
    """Opens what `read_once` and `find_prompter` gave on a rank.

    Raises:
        AlproError: the data sets, the order, the ranks and the tokenizer do not fit together.
    """
    sources = open_sources(config.stream.sources, config.stream.unit, storage, known.listings)
    plan = make_plan(config.stream, sources)
    for source, steps, left_over in zip(sources, plan.steps_per_pass, plan.left_over, strict=True):
        text = "source %s: %d %ss, %d steps a pass; left over in each pass: %d"
        logger.info(text, source.name, source.shape.num_samples, source.unit, steps, left_over)
    lanes = len(lanes_of_rank(world.rank, world.size, config.stream.num_lanes))
    if lanes % config.train.engine.num_micro_batches:
        raise ConfigError(
            f"train.engine.num_micro_batches {config.train.engine.num_micro_batches} does not divide the {lanes} lanes "
            f"of a rank ({config.stream.num_lanes} lanes over {world.size} ranks): lanes are never split"
        )
    tokenizer = Tokenizer(config.stream.text.tokenizer, config.stream.text.num_tokens)
    return RunData(sources, plan, tokenizer, known.entities, known.answers, *(prompter or (None, None)))


def find_prompter(config: RunConfig) -> tuple[Path, str] | None:
    """Folder and digest of the prompter; None without PEM. Asked once: the run of stage one may be writing newer ones.

    Raises:
        CheckpointError: there is none, or it sees other crops than this run makes.
    """
    if not config.uses_pem or config.prompter is None:
        return None
    folder, description, digest = describe_prompter(config.prompter.checkpoint)
    _check_prompter(config, description.model)
    return folder, digest


def _previous_checkpoint(config: RunConfig, world: World, data: RunData) -> Path | None:
    """The newest complete checkpoint in the run directory, which must be of the same run."""
    found = complete_checkpoints(config.run_dir)
    if not found:
        return None
    check_files(found[-1], (STATE_FILE, RECORD_FILE))
    state = read_state(found[-1])
    check_fingerprint(state["fingerprint"], _fingerprint(config, data), str(found[-1]), config.accept)
    stage = config.train.engine.zero_stage
    if stage != state["zero_stage"]:
        raise CheckpointError(
            f"{found[-1]} was written by {state['world_size']} ranks with ZeRO stage {state['zero_stage']}, this run "
            f"has {world.size} with stage {stage}: optimizer state is converted for another number of ranks, but not "
            f"for another stage; set train.engine.zero_stage={state['zero_stage']}"
        )
    return found[-1]


def _check_all_want_the_same(config: RunConfig, world: World) -> None:
    """On several machines each rank reads its own file, and gets its own overrides."""
    ours = config.model_dump(mode="json")
    theirs = world.from_first(lambda: ours, "its configuration")
    with world.all_or_none("the configurations of all ranks"):
        if found := differences(ours, theirs):
            raise ConfigError(
                f"the configuration of this rank is not that of rank 0: {'; '.join(found)} (here != there); give all "
                "machines the same file and the same overrides"
            )


def _check_all_see_the_same(config: RunConfig, world: World, data: RunData, previous: Path | None) -> None:
    """Ranks that begin at different steps, or with different data, would train nonsense without an error."""
    seen = {"fingerprint": _fingerprint(config, data), "previous": previous.name if previous else None}
    if not world.all_same(json.dumps(seen, sort_keys=True)):
        raise CheckpointError(
            f"the ranks see different data or different checkpoints in {config.run_dir}: keep both on a file system "
            "that all nodes share, or in equal copies"
        )


def _fingerprint(config: RunConfig, data: RunData) -> dict[str, Any]:
    """What must not change inside a run: its data, its model, its task, its prompter, its answers."""
    starting_weights = {"video": {"pretrained"}, "text": {"pretrained"}}
    return {
        **fingerprint(config.stream, data.sources, data.tokenizer, config.model.video.num_frames),
        "task": config.task,
        "model": config.model.model_dump(mode="json", exclude=starting_weights),
        "entities": hashlib.sha256("\n".join(data.entities).encode()).hexdigest(),
        "prompter": data.prompter_digest,
        **({"prompts": "single"} if config.prompter and config.prompter.prompts == "single" else {}),
        **({"frozen": sorted(config.frozen)} if config.frozen else {}),
        **({"answers": hashlib.sha256("\n".join(data.answers).encode()).hexdigest()} if data.answers else {}),
    }


def _quarantine(config: RunConfig, world: World, sources: Sequence[Source], previous: Path | None) -> Quarantine:
    """With what is known of unusable samples, from this run's earlier sittings and from its checkpoint."""
    folder = config.run_dir / RECORD_FOLDER
    known = [*read_record(previous / RECORD_FILE), *read_failures(folder)] if previous else []
    return Quarantine(
        config.stream.quarantine, world.rank, folder, known, {source.name: source.content for source in sources}
    )


def _build(
    config: RunConfig,
    world: World,
    data: RunData,
    gauges: Gauges,
    previous: Path | None,
    is_asked_to_stop: Callable[[], bool],
    stack: ExitStack,
) -> Parts:
    """Decoder, model, engine and prompter: what takes seconds. What must be ended goes on the stack."""
    rank_batch = config.stream.global_batch // world.size
    with world.all_or_none():
        if world.is_first:
            (config.run_dir / "logs").mkdir(parents=True, exist_ok=True)
            save_config(config, config.run_dir / RESOLVED_CONFIG_FILE)
            if world.size > 1:  # For the log of a job; alone it would fill the terminal.
                text = to_yaml(config)
                print(f"configuration, also in {config.run_dir / RESOLVED_CONFIG_FILE}:\n{text}", flush=True)
            if not previous:  # Of a sitting that came to no checkpoint, perhaps with other data.
                shutil.rmtree(config.run_dir / RECORD_FOLDER, ignore_errors=True)
            if data.prompter:
                check_weights(data.prompter)
                _bank(config, data, world)
    with world.all_or_none():
        maker = build_maker(config, world, data, _quarantine(config, world, data.sources, previous), gauges)
        stack.callback(maker.close)
        prompter = None
        if data.prompter:  # It starts while the model is built.
            bank = _bank(config, data, world)
            log = config.run_dir / "logs" / f"prompter-rank{world.rank}.log"
            prompter = start_prompter(config, world, data.prompter, bank, len(data.entities), log)
            stack.callback(prompter.close)
        torch.manual_seed(config.stream.seed)
        objective = build_objective(config, data, is_resumed=previous is not None)
        validation = None
        if config.validation:
            validation = open_validation(
                config.validation, config.stream, config.model.video, data.tokenizer, len(data.entities), world, stack
            )
    if config.train.rehearsal:
        world.stage.enter("the rehearsal")
        rehearsed = copy.deepcopy(objective)
        if config.train.engine.compile:
            rehearsed.compile_parts()
        rehearse(
            rehearsed,
            made_up_batches(config, data, world),
            len(data.entities),
            config.train.engine,
            config.train.optimizer,
            world,
        )
        del rehearsed
    world.stage.enter("the building of the engine")
    if config.train.engine.compile:
        objective.compile_parts()
    engine = Engine(objective, config.train.engine, config.train.optimizer, world, rank_batch)
    return Parts(
        run_dir=config.run_dir,
        title=config.task,
        world=world,
        plan=data.plan,
        maker=maker,
        engine=engine,
        prompter=prompter,
        fingerprint=_fingerprint(config, data),
        versions=_versions(),
        operations={kind: _operations(config, data, kind) for kind in KINDS},
        peak_per_s=_peak_per_s(config, world),
        save_extras=partial(_save_extras, config, world, engine, data),
        entities=data.entities,
        ignore_rule=config.losses.pem.ignore,
        is_asked_to_stop=is_asked_to_stop,
        validation=validation(engine, config.train.engine.num_micro_batches) if validation else None,
    )


def build_maker(config: RunConfig, world: World, data: RunData, quarantine: Quarantine, gauges: Gauges) -> BatchMaker:
    """What makes the batches of a rank, with its decoder; to be closed."""
    video = config.model.video
    max_frames = config.stream.global_batch // world.size * video.num_frames
    device_id = world.local_rank if world.device.type == "cuda" else None
    decoder = build_clip_decoder(config.stream.decode, video.image_size, max_frames, device_id, gauges)
    return BatchMaker(
        config.stream,
        data.sources,
        data.tokenizer,
        decoder,
        video.num_frames,
        video.image_size,
        video.patch_size,
        quarantine,
        gauges,
    )


def made_up_batches(config: RunConfig, data: RunData, world: World) -> list[Batch]:
    """One of each kind that the run has."""
    video, stream = config.model.video, config.stream
    return [
        made_up_batch(
            kind,
            stream.global_batch // world.size,
            stream.num_lanes // world.size,
            (video.num_frames if kind == "video" else 1, video.image_size),
            stream.text.num_tokens,
            data.tokenizer.vocab_size,
            world.rank,
        )
        for kind in KINDS
        if any(source.kind == kind for source in data.sources)
    ]


def build_objective(
    config: RunConfig, data: RunData, *, is_resumed: bool = False
) -> DualObjective | PretrainObjective | AnswerObjective:
    """The model with its losses and its starting weights, which one that is resumed does not need."""
    model = describe_model(config, data).build()
    if not is_resumed:
        start_from_pretrained(model)
    if config.start_from and not is_resumed:
        start_from_trained(model, data.tokenizer, data.entities, config.start_from, data.answers)
    for encoder in config.frozen:
        (model if isinstance(model, DualEncoder) else model.dual).get_submodule(encoder).requires_grad_(False)
    objective: DualObjective | PretrainObjective | AnswerObjective
    if isinstance(model, DualEncoder):
        objective = DualObjective(model)
    elif config.task == "question_answering":
        objective = AnswerObjective(model, data.answers)
    else:
        objective = PretrainObjective(model, config.used_losses)
    set_checkpointing(objective, config.train.engine.activation_checkpointing)
    return objective


def _bank(config: RunConfig, data: RunData, world: World) -> Path:
    """Of the prompts; built where there is none yet."""
    assert config.prompter is not None
    assert data.prompter is not None
    folder = config.run_dir / "prompter"
    return ensure_bank(data.prompter, data.entities, folder, world.device, config.prompter.prompts)


def start_prompter(
    config: RunConfig, world: World, checkpoint: Path, bank: Path, num_entities: int, log: Path
) -> Prompter:
    """The prompter of a rank; to be closed."""
    assert config.prompter is not None
    prompter = config.prompter
    make_labeller = partial(
        load_labeller, checkpoint, bank, config.losses.pem, world.device, prompter.precision, prompter.compile
    )
    if prompter.placement == "inline":
        return InlinePrompter(make_labeller())
    video = config.model.video
    return PrompterClient(
        make_labeller,
        (config.stream.global_batch // world.size, video.num_frames, video.image_size, video.image_size, 3),
        num_entities,
        prompter,
        log,
        world.rank,
        world.device,
    )


def _check_prompter(config: RunConfig, theirs: ModelConfig) -> None:
    assert config.prompter is not None
    for name in ("image_size", "patch_size", "num_frames"):
        ours, other = getattr(config.model.video, name), getattr(theirs.video, name)
        if other != ours:
            raise CheckpointError(
                f"the prompter {config.prompter.checkpoint} was trained with {name} {other}, this run has "
                f"{ours}: both see the same crops, so set model.video.{name} alike and train the prompter again"
            )


def describe_model(config: RunConfig, data: RunData) -> ModelDescription:
    """What a reader of the weights needs to know."""
    values = {
        "task": config.task,
        "model": config.model,
        "vocab_size": data.tokenizer.vocab_size,
        "num_tokens": config.stream.text.num_tokens,
        "entities": tuple(data.entities),
        "answers": tuple(data.answers),
    }
    return validate(ModelDescription, values, source="stream and model")


def _operations(config: RunConfig, data: RunData, kind: Kind) -> float:
    """Floating point operations of a sample in a step."""
    return step_operations(
        config.task,
        config.model,
        config.stream.text.num_tokens,
        vocab_size=data.tokenizer.vocab_size,
        num_entities=len(data.entities),
        num_answers=len(data.answers),
        is_image=kind == "image",
        frozen=config.frozen,
    )


def _peak_per_s(config: RunConfig, world: World) -> float | None:
    """Only known for GPUs in bf16."""
    if world.device.type != "cuda" or config.train.engine.precision != "bf16":
        return None
    return peak_per_s(torch.cuda.get_device_name(world.device))


def run_entities(config: PrompterConfig, stream: StreamConfig) -> list[str]:
    """The vocabulary of a run: from its own file, or merged from its sources' entities.json, most frequent first.

    Raises:
        ConfigError: fewer than two entities.
    """
    if config.entities:
        files = [str(config.entities if config.entities.is_file() else config.entities / ENTITIES_FILE)]
    else:
        files = [join(place, ENTITIES_FILE) for place in sorted({source.path for source in stream.sources})]
    found = [load_entities(file, stream.fetch) for file in files]
    words = [word for word, _ in merge_entities(found)][: config.num_entities]
    if len(words) < 2:
        raise ConfigError(
            f"PEM needs at least 2 entities, found {len(words)} in {', '.join(files)}; captions without "
            "nouns give none: set prompter.entities to a file of your own, or losses.pem.weight=0"
        )
    return words


def _save_extras(config: RunConfig, world: World, engine: Engine, data: RunData, directory: Path) -> None:
    parameters = engine.full_parameters()
    if world.is_first:
        prefix = "model."
        tensors = {name.removeprefix(prefix): tensor for name, tensor in parameters.items() if name.startswith(prefix)}
        write_model(directory, describe_model(config, data), tensors, data.tokenizer)
        save_config(config, directory / "config.yaml")
