"""Whole runs that take seconds: a small corpus and plain configuration trees."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alpro_stream.testing.shards import write_dataset, write_tokenizer

TINY_MODEL: dict[str, Any] = {
    "video": {"image_size": 48, "patch_size": 16, "width": 32, "depth": 2, "num_heads": 4, "num_frames": 2},
    "text": {"width": 32, "num_layers": 1, "num_multimodal_layers": 1, "num_heads": 4, "intermediate_size": 64},
    "projection_size": 16,
}


def write_corpus(directory: Path) -> Path:
    """Writes 24 videos, 9 images and a tokenizer that knows their captions; returns the directory."""
    write_dataset(directory / "train", video_shards=(5, 9, 1, 9), image_shards=(9,), size=64)
    write_tokenizer(directory / "tokenizer")
    return directory


def tiny_run(corpus: Path, run_dir: Path, changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A run of stage one on the corpus, as a plain tree.

    Args:
        corpus: what `write_corpus` returned.
        run_dir: directory of the run.
        changes: values by dotted key, such as ``{"train.max_steps": 3}``.
    """
    sources = [{"path": str(corpus / "train"), "kind": kind} for kind in ("video", "image")]
    tree: dict[str, Any] = {
        "task": "prompter",
        "run_dir": str(run_dir),
        "stream": {
            "sources": sources,
            "global_batch": 8,
            "num_lanes": 4,
            "text": {"tokenizer": str(corpus / "tokenizer"), "num_tokens": 12},
            "decode": {"num_workers": 1},
        },
        "model": copy.deepcopy(TINY_MODEL),
        "train": {
            "max_steps": 6,
            "checkpoint_every": 3,
            "optimizer": {"learning_rate": 1e-3},
            "timeout_s": 60,
            "rehearsal": False,
        },
    }
    for key, value in (changes or {}).items():
        *parents, last = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree
