"""Evaluation on a GPU gives the scores of the CPU."""

import numpy as np
import pytest
import torch
from retrieval_files import evaluation, write_checkpoint, write_split

from alpro_stream.evaluate.retrieval import evaluate
from alpro_stream.train.distributed import World

CAPTIONS = [["a red dog moves", "the dog"], ["a green cat moves"], ["a blue car"], ["a tree"], ["a red boat"]]


@pytest.mark.parametrize("changes", [{}, {"mode": "rerank", "top_k": 2}, {"num_clips": 2, "aggregation": "lse"}])
def test_scores_are_those_of_the_cpu(device_id, tmp_path, changes):
    write_split(tmp_path / "split", CAPTIONS)
    write_checkpoint(tmp_path / "model")
    found = []
    for device in (torch.device("cpu"), torch.device("cuda", device_id)):
        out = tmp_path / device.type
        evaluate(evaluation(tmp_path, tmp_path / "split", out=out, **changes), World(0, 0, 1, device))
        with np.load(out / "scores.npz") as arrays:
            found.append(dict(arrays))
    for name in found[0]:
        if found[0][name].dtype.kind == "f":
            np.testing.assert_allclose(found[1][name], found[0][name], rtol=0, atol=1e-4)
