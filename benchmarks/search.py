"""How long a search over 100,000 features of the published size takes: `python benchmarks/search.py`.

Limits, in the same sitting: for the nearest rows the product of the features in memory with a vector; for the encoder,
which reads all its weights for one short text, as many bytes at the rate of that product; for the whole both together.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import nn

from alpro_stream.evaluate.embed_config import EmbedConfig
from alpro_stream.evaluate.index import Index
from alpro_stream.evaluate.index_files import IndexDescription, IndexRow, Part, part_path, write_description
from alpro_stream.evaluate.nearest import nearest
from alpro_stream.evaluate.search import Searcher, embed_query
from alpro_stream.model.alpro import DualEncoder, ModelConfig
from alpro_stream.model.folder import LoadedModel, ModelDescription
from alpro_stream.shards.storage import file_digest
from alpro_stream.stream.text import Tokenizer
from alpro_stream.testing.shards import write_tokenizer
from benchmarks.harness import Row, Target, main, measure

_NUM_CLIPS, _PER_SHARD = 100_000, 1000
_TOP = 10
_QUERIES = ("a red dog moves", "a blue boat moves", "a photo of the house", "one green tree", "a portrait of a cat")


def rows(arguments: argparse.Namespace) -> list[Row]:
    """A search as a user asks for it, and its parts, in turn."""
    with tempfile.TemporaryDirectory(prefix="alpro-bench-") as folder:
        return _measure(Path(folder), 5 if arguments.quick else 31)


def _measure(folder: Path, repetitions: int) -> list[Row]:
    model = _model(folder)
    whole, half = (random_index(folder / dtype, dtype) for dtype in ("float32", "float16"))
    searcher, half_searcher = Searcher(whole, model), Searcher(half, model)
    in_memory = torch.cat(whole.features)
    query_E = embed_query(model, _QUERIES[0]).feature_CE[0]
    variants: dict[str, Callable[[str], object]] = {
        "100,000 clips": lambda query: searcher.search(query, _TOP),
        "100,000 clips, float16": lambda query: half_searcher.search(query, _TOP),
        "of which the text encoder": lambda query: embed_query(model, query),
        "of which the nearest rows": lambda query: nearest(whole.features, query_E, _TOP),
        "a matrix times a vector, in memory": lambda query: torch.mv(in_memory, query_E),
    }
    if find_spec("faiss"):
        by_faiss = Searcher(whole, model, use_faiss=True)
        variants["100,000 clips, FAISS"] = lambda query: by_faiss.search(query, _TOP)
    found = measure({name: partial(_ms, work) for name, work in variants.items()}, repetitions, warmup=2)
    goal = Target(at_most=50)
    product = found["a matrix times a vector, in memory"].median
    layers = model.model.get_submodule("text_encoder.layers")
    weights = product * num_weights(layers) / in_memory.numel()
    limits = {
        "of which the text encoder": (weights, "weights, read at that rate"),
        "of which the nearest rows": (product, "matrix times vector"),
    }
    # Half as wide features are half the bytes.
    for name in found:
        if name.startswith("100,000"):
            limits[name] = (weights + product / (2 if "float16" in name else 1), "the two below, together")
    return [
        Row.of(
            name,
            found[name],
            "ms",
            limits[name][0] if name in limits else None,
            goal if name.startswith("100,000") else None,
            limit_of=limits[name][1] if name in limits else "",
        )
        for name in variants
    ]


def num_weights(module: nn.Module) -> int:
    """Of all parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def _ms(work: Callable[[str], object]) -> float:
    """Mean over several queries, as no two are as long."""
    start = time.perf_counter()
    for query in _QUERIES:
        work(query)
    return (time.perf_counter() - start) * 1e3 / len(_QUERIES)


def _model(folder: Path) -> LoadedModel:
    """Encoders of the published size, untrained: they take as long."""
    tokenizer = Tokenizer(str(write_tokenizer(folder / "tokenizer")), 30)
    config = ModelConfig()
    description = ModelDescription(
        task="prompter", model=config, vocab_size=tokenizer.vocab_size, num_tokens=tokenizer.num_tokens
    )
    return LoadedModel(description, DualEncoder(config, tokenizer.vocab_size).eval(), tokenizer)


def random_index(folder: Path, dtype: str = "float32") -> Index:
    """100,000 random features of unit length and the published size, with a caption each."""
    generator = np.random.default_rng(0)
    (folder / "parts").mkdir(parents=True)
    dimension = ModelConfig().projection_size
    config = EmbedConfig.model_validate(
        {"checkpoint": folder, "sources": [{"path": str(folder)}], "out": folder, "dtype": dtype}
    )
    description = IndexDescription(
        checkpoint=folder,
        weights_sha256="",
        data={},
        dimension=dimension,
        num_frames=4,
        image_size=224,
        versions={},
        config=config,
    )
    parts = []
    for number in range(_NUM_CLIPS // _PER_SHARD):
        features = generator.normal(size=(_PER_SHARD, dimension))
        features /= np.linalg.norm(features, axis=1, keepdims=True)
        np.save(part_path(folder, number, "npy"), features.astype(dtype))
        shard = f"video-{number:06d}"
        caption = "a dog runs along a beach while the sun goes down"
        row = [IndexRow("video", shard, slot, f"{number}-{slot}", (caption,), "dog.mp4") for slot in range(_PER_SHARD)]
        part_path(folder, number, "jsonl").write_text("".join(each.to_json() + "\n" for each in row))
        digests = [file_digest(part_path(folder, number, suffix)) for suffix in ("npy", "jsonl")]
        parts.append(
            Part(
                identity_sha256=description.identity_sha256(),
                source="video",
                shard=shard,
                num_clips=_PER_SHARD,
                left_out=(),
                features_sha256=digests[0],
                rows_sha256=digests[1],
            )
        )
    write_description(folder, description.model_copy(update={"parts": tuple(parts)}))
    return Index(folder)


if __name__ == "__main__":
    main("search", rows)
