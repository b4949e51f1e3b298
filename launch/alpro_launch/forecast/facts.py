"""What a forecast knows of a run's data and sizes: from the data sets where they are there, else from options."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from alpro_launch.forecast.work import Sizes
from alpro_stream.errors import AlproError, ConfigError, FetchError, ShardError
from alpro_stream.evaluate.words import load_words
from alpro_stream.manifest import Kind
from alpro_stream.manifest.places import is_address
from alpro_stream.model.alpro import ModelConfig
from alpro_stream.model.folder import read_description
from alpro_stream.run import RunConfig, find_prompter, run_entities
from alpro_stream.stream.config import make_plan
from alpro_stream.stream.sources import Source, closing_storage, open_sources
from alpro_stream.stream.text import Tokenizer

_BERT, _BERT_WORDS = "bert-base-uncased", 30522
_LOOKED_AT = 64


@dataclass(frozen=True, slots=True)
class Data:
    """What is read.

    Attributes:
        steps_per_epoch: None where the data sets are not known.
        kinds: of the steps, as shares.
        clip_bytes: that a step reads of a sample, on average; None where that is not known.
        stores_videos: whether samples are whole videos, and not frames.
    """

    steps_per_epoch: float | None
    kinds: Mapping[Kind, float]
    clip_bytes: float | None
    stores_videos: bool = False


@dataclass(frozen=True, slots=True)
class Facts:
    """Of a run, beside its configuration.

    Attributes:
        sizes: of its model.
        data: that it reads.
        notes: what is not known, and was taken instead.
    """

    sizes: Sizes
    data: Data
    notes: Sequence[str] = field(default_factory=tuple)


def read_facts(
    config: RunConfig,
    samples: int | None = None,
    clip_bytes: float | None = None,
    measured_clip_bytes: float | None = None,
) -> Facts:
    """Looks at the data sets, the tokenizer and the prompter of a run, as far as they are here.

    Args:
        config: of the run.
        samples: of an epoch, in place of what the data sets have.
        clip_bytes: that a step reads of a sample, in place of what the data sets have.
        measured_clip_bytes: that other data had, where these data sets are not here.

    Raises:
        AlproError: data sets that are there, and do not fit the run; fewer samples than a batch has.
    """
    notes: list[str] = []
    sizes = _sizes(config, notes)
    data = _data(config, samples is not None, notes)
    if samples is not None:
        if samples < config.stream.global_batch:
            raise ConfigError(
                f"--samples {samples}: fewer than stream.global_batch {config.stream.global_batch}, so an epoch would "
                "have no step"
            )
        data = Data(samples / config.stream.global_batch, data.kinds, data.clip_bytes, data.stores_videos)
    if clip_bytes is None and data.clip_bytes is None and measured_clip_bytes is not None:
        clip_bytes = measured_clip_bytes
        notes.append(f"a clip has {clip_bytes / 1e3:.3g} kB, as the data that were measured (--clip-bytes)")
    if clip_bytes is not None:
        data = Data(data.steps_per_epoch, data.kinds, clip_bytes, data.stores_videos)
    if data.steps_per_epoch is None:
        notes.append("the samples of an epoch are not known: --samples N says how many")
    if data.clip_bytes is None:
        notes.append("the bytes of a clip are not known, and so not the rate that storage needs: --clip-bytes N")
    return Facts(sizes, data, tuple(notes))


def _sizes(config: RunConfig, notes: list[str]) -> Sizes:
    vocab_size = _vocab_size(config.stream.text.tokenizer, notes)
    num_answers = 0
    if config.task == "question_answering":
        answers = config.answers
        num_answers = len(load_words(answers.file)) if answers.file and answers.file.is_file() else answers.num
    if not config.uses_pem or config.prompter is None:
        return Sizes(vocab_size, 0, num_answers)
    try:
        num_entities = len(run_entities(config.prompter, config.stream))
    except AlproError:
        num_entities = config.prompter.num_entities
        notes.append(f"the entities are not there: {num_entities} are taken (prompter.num_entities)")
    return Sizes(vocab_size, num_entities, num_answers, _prompter(config, notes))


def _prompter(config: RunConfig, notes: list[str]) -> ModelConfig:
    try:
        found = find_prompter(config)
        assert found is not None
        return read_description(found[0]).model
    except AlproError:
        notes.append("the prompter is not there: one of the size of the model is taken")
        return config.model


def _vocab_size(tokenizer: str, notes: list[str]) -> int:
    if tokenizer == _BERT:  # The hub need not be asked.
        return _BERT_WORDS
    try:
        return Tokenizer(tokenizer, 3).vocab_size
    except AlproError:
        notes.append(f"the tokenizer {tokenizer} is not there: {_BERT_WORDS} words are taken, as {_BERT} has")
        return _BERT_WORDS


def _data(config: RunConfig, is_sample: bool, notes: list[str]) -> Data:
    """What lies behind the sources; of a sample of the data, which may be less than a batch, shares and bytes count."""
    stream = config.stream
    if is_sample:
        stream = stream.model_copy(update={"global_batch": 2, "num_lanes": 1})
    try:
        with closing_storage(stream.sources, stream.cache, stream.fetch) as storage:
            sources = open_sources(stream.sources, stream.unit, storage)
            try:
                plan = make_plan(stream, sources)
                kinds = _together((source.kind, share) for source, share in zip(sources, plan.shares, strict=True))
                num_frames = config.model.video.num_frames
                read = [part * bytes_of_clip(one, num_frames) for one, part in zip(sources, plan.shares, strict=True)]
                return Data(plan.steps_per_epoch, kinds, sum(read), any(one.stores_videos for one in sources))
            finally:
                for source in sources:
                    source.reader.close()
    except (ShardError, FetchError) as error:
        notes.append(f"the data are not there ({str(error).splitlines()[0]})")
    weights = [source.weight if stream.mix == "weights" else 1.0 for source in stream.sources]
    kinds = _together(
        (source.kind or "video", weight / sum(weights)) for source, weight in zip(stream.sources, weights, strict=True)
    )
    if len(kinds) > 1 and stream.mix == "sizes":
        notes.append(f"each of the {len(weights)} sources has as many steps, which stream.mix=sizes would not give it")
    return Data(None, kinds, None)


def _together(parts: Iterable[tuple[Kind, float]]) -> dict[Kind, float]:
    """The sum of each kind."""
    kinds: dict[Kind, float] = {}
    for kind, share in parts:
        kinds[kind] = kinds.get(kind, 0.0) + share
    return kinds


def bytes_of_clip(source: Source, num_frames: int) -> float:
    """Bytes that a step reads of a sample, on average: the frames it takes, or all that lies behind an address.

    Args:
        source: opened; some samples of its first shard are looked at.
        num_frames: that a step takes.
    """
    whole = sum(shard.num_bytes for shard in source.shards) / sum(shard.num_samples for shard in source.shards)
    if source.stores_videos or is_address(source.reader.place):
        return whole
    shard = source.shards[0]
    total, slots = 0.0, range(0, shard.num_samples, max(1, shard.num_samples // _LOOKED_AT))
    for slot in slots:
        sizes = [member.size for member in source.reader.media_members(shard.name, slot)]
        total += sum(sizes) / len(sizes) * min(num_frames, len(sizes)) if sizes else 0.0
    return total / len(slots)
