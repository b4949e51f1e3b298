"""Small splits with captions of one's own, and untrained models of every task, for evaluation."""

from dataclasses import replace

import torch

from alpro_stream.config import validate
from alpro_stream.evaluate.retrieval import RetrievalConfig
from alpro_stream.manifest import QA
from alpro_stream.model.folder import ModelDescription, write_model
from alpro_stream.shards.layout import DatasetInfo, save_dataset_info
from alpro_stream.shards.sample import Sample
from alpro_stream.shards.writer import ShardWriter
from alpro_stream.stream.text import Tokenizer
from alpro_stream.testing.configs import TINY_MODEL
from alpro_stream.testing.shards import sample, write_tokenizer


def write_split(folder, captions, kind="video", name="000000"):
    """A split whose sample number i has the i-th captions; those that end in a question mark are its questions."""
    folder.mkdir(parents=True, exist_ok=True)
    with ShardWriter(folder, f"{kind}-{name}", kind) as writer:
        for number, own in enumerate(captions):
            made = sample(number, kind, 6 if kind == "video" else 1, 64)
            questions = tuple(QA(text, "yes") for text in own if text.endswith("?"))
            writer.add(Sample(replace(made.metadata, captions=tuple(own), qa=questions), made.frames))
        info = writer.close()
    save_dataset_info(folder, DatasetInfo.of_shards(folder.name, {"payload": "frames", "frames": {"size": 64}}, [info]))
    return folder


def write_checkpoint(folder, task="retrieval", seed=0):
    """An exported model with random weights, which tell the frames of a clip apart."""
    tokenizer = Tokenizer(str(write_tokenizer(folder.parent / "tokenizer")), 12)
    lists = {"answers": ("yes", "no")} if task == "question_answering" else {}
    values = {"task": task, "model": TINY_MODEL, "vocab_size": tokenizer.vocab_size, "num_tokens": 12, **lists}
    description = validate(ModelDescription, values, source="test")
    torch.manual_seed(seed)
    model = description.build()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.get_parameter("raw_temperature" if task == "prompter" else "dual.raw_temperature").data.fill_(0.07)
    write_model(folder, description, model.state_dict(), tokenizer)
    return folder


def evaluation(root, split, **changes):
    """The configuration of an evaluation of the model in ``root/model``."""
    values = {
        "checkpoint": root / "model",
        "sources": [{"path": split}],
        "out": root / "out",
        "batch_size": 4,
        "decode": {"num_workers": 0},
        **changes,
    }
    return validate(RetrievalConfig, values, source="test")
