"""Small splits with questions and answers of one's own, for question answering."""

from dataclasses import replace

from alpro_stream.manifest import QA
from alpro_stream.shards.layout import DatasetInfo, save_dataset_info
from alpro_stream.shards.sample import Sample
from alpro_stream.shards.writer import ShardWriter
from alpro_stream.testing.shards import caption_of, sample


def about(number):
    """Two questions about sample `number`, which its picture answers."""
    _, colour, noun, _ = caption_of(number).split()
    return [("what moves", noun), ("what colour is it", colour)]


def write_questions(folder, shards, captions=("a thing moves",), kind="video"):
    """A split whose shards hold samples with these pairs of question and answer.

    Args:
        folder: of the split.
        shards: for each shard the pairs of each of its samples.
        captions: of every sample.
        kind: of the samples.
    """
    folder.mkdir(parents=True, exist_ok=True)
    infos, number = [], 0
    for shard, samples in enumerate(shards):
        with ShardWriter(folder, f"{kind}-{shard:06d}", kind) as writer:
            for pairs in samples:
                made = sample(number, kind, 6 if kind == "video" else 1, 64)
                qa = tuple(QA(*pair) for pair in pairs)
                writer.add(Sample(replace(made.metadata, captions=tuple(captions), qa=qa), made.frames))
                number += 1
            infos.append(writer.close())
    save_dataset_info(folder, DatasetInfo.of_shards(folder.name, {"payload": "frames", "frames": {"size": 64}}, infos))
    return folder


def write_answerable(folder, sizes=(6, 6, 6, 6)):
    """A split of videos with two questions each, in shards of these sizes."""
    numbers = iter(range(sum(sizes)))
    return write_questions(folder, [[about(next(numbers)) for _ in range(size)] for size in sizes])
