"""Does it learn: from generated clips through sharding, starting weights and training to retrieval, as users run it.

The full rows take an hour (`alpro ablate configs/ablate/losses.yaml`); here is what a test can wait for.
"""

import json

import pytest

from alpro_launch.cli import main

_CLIPS = "num_clips={train: 1500, validation: 64}"


def _alpro(*arguments):
    assert main(list(arguments)) == 0


def _prepare(root, *corpus):
    places = (f"work_dir={root}",)
    _alpro("corpus", "configs/ablate/corpus.yaml", *places, *corpus)
    _alpro("shard", "configs/ablate/shard.yaml", *places, "samples_per_shard=150")
    return places


def _figure(root, name, *path):
    value = json.loads((root / name / "result.json").read_text())["metrics"]
    for key in path:
        value = value[key]
    return value


def test_contrastive_learning_beats_chance_by_far(tmp_path):
    """Held-out pairs of noun and colour among 64 clips: chance is 1.6 %, and a few steps on few clips reach many times
    that."""
    places = _prepare(tmp_path, _CLIPS, "num_nouns=8")
    _alpro("starting-weights", "configs/ablate/start.yaml", *places, "pictures.max_steps=250", "captions.max_steps=1")
    _alpro("train", "configs/ablate/dual.yaml", *places, f"row_dir={tmp_path}", "train.max_steps=120")
    _alpro("evaluate", "configs/ablate/dual_retrieval.yaml", *places, f"row_dir={tmp_path}")
    assert _figure(tmp_path, "retrieval-validation", "vtc", "text_to_video", "recall_at_1") > 12


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_three_losses_retrieve_clips_never_described_like_that(tmp_path):
    """The row MLM+VTM+VTC as it stands in configs/ablate/losses.yaml."""
    places = _prepare(tmp_path, "num_clips={train: 8000, validation: 256}")
    row = f"row_dir={tmp_path}"
    _alpro("starting-weights", "configs/ablate/start.yaml", *places)
    _alpro("train", "configs/ablate/pretrain.yaml", *places, row, "losses.pem.weight=0")
    _alpro("evaluate", "configs/ablate/retrieval.yaml", *places, row)
    _alpro("evaluate", "configs/ablate/masked_nouns.yaml", *places, row)
    assert _figure(tmp_path, "retrieval-validation", "vtm", "text_to_video", "recall_at_1") > 60
    assert _figure(tmp_path, "retrieval-validation", "vtc", "text_to_video", "recall_at_1") > 75
    assert _figure(tmp_path, "masked-nouns-validation", "accuracy") > 30
