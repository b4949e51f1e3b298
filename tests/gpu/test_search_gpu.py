"""Indexes made and searched on a GPU: as on the CPU, but for rounding."""

import pytest
import torch
from search_files import embed_config, make_root

from alpro_stream.evaluate.embed_index import embed_index
from alpro_stream.evaluate.index import Index
from alpro_stream.evaluate.search import open_searcher


@pytest.mark.parametrize("device", ["cpu", "mixed"])
def test_an_index_of_a_gpu_is_that_of_a_cpu(device_id, tmp_path, device):
    made = make_root(tmp_path)
    config = embed_config(made, out=made / "by_gpu", decode={"device": device, "num_workers": 0})
    embed_index(config, 0, 1, torch.device("cuda", device_id))
    by_gpu, by_cpu = (torch.cat(Index(made / name).features) for name in ("by_gpu", "index"))
    # Decoded by nvJPEG, pixels differ a little too.
    assert torch.allclose(by_gpu, by_cpu, atol=1e-3 if device == "cpu" else 2e-2)


def test_the_best_are_put_in_order_on_the_gpu(device_id, tmp_path):
    made = make_root(tmp_path)
    searcher = open_searcher(made / "index", made / "model", needs_match=True)
    hits = searcher.search("a red dog moves", 5, rerank=8)
    searcher.close()
    assert [hit.match for hit in hits] == sorted((hit.match for hit in hits), reverse=True)
