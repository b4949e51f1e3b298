"""A small corpus, an untrained model and their index, for tests of searching."""

import torch

from alpro_stream.evaluate.embed_config import EmbedConfig
from alpro_stream.evaluate.embed_index import embed_index
from alpro_stream.model.alpro import ModelConfig, build_model
from alpro_stream.model.folder import ModelDescription, write_model
from alpro_stream.stream.text import Tokenizer
from alpro_stream.testing.configs import TINY_MODEL, write_corpus

NUM_CLIPS, NUM_SHARDS = 33, 5
NUM_TOKENS = 12


def write_tiny_model(folder, corpus, task="retrieval", seed=0):
    """A model of random numbers that is large enough to tell clips apart."""
    torch.manual_seed(seed)
    tokenizer = Tokenizer(str(corpus / "tokenizer"), NUM_TOKENS)
    lists = {"answers": ("yes", "no")} if task == "question_answering" else {}
    description = ModelDescription(
        task=task,
        model=ModelConfig.model_validate(TINY_MODEL),
        vocab_size=tokenizer.vocab_size,
        num_tokens=NUM_TOKENS,
        **lists,
    )
    model = build_model(task, description.model, description.vocab_size, 0, len(description.answers))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    write_model(folder, description, model.state_dict(), tokenizer)
    return folder


def make_root(root):
    """Corpus, model and index below a folder."""
    write_corpus(root / "corpus")
    write_tiny_model(root / "model", root / "corpus")
    embed(root)
    return root


def embed_config(root, **changes):
    values = {
        "checkpoint": root / "model",
        "sources": [{"path": str(root / "corpus/train")}],
        "out": root / "index",
        "batch_size": 4,
        "decode": {"num_workers": 0},
    }
    return EmbedConfig.model_validate({**values, **changes})


def embed(root, rank=0, num_ranks=1, **changes):
    return embed_index(embed_config(root, **changes), rank, num_ranks, torch.device("cpu"))
