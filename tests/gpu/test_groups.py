"""Process groups of GPUs: when NCCL gives up."""

from datetime import timedelta

import torch
import torch.distributed as dist

from alpro_stream.train.distributed import join_world


def test_nccl_gives_up_after_the_named_error(device_id, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOCAL_RANK", str(device_id))
    assert not dist.is_initialized()
    try:
        join_world(timeout_s=100)
        for group in (dist.group.WORLD, dist.new_group([0])):
            backend = group._get_backend(torch.device("cuda"))
            assert backend.options._timeout == timedelta(seconds=130)
    finally:
        dist.destroy_process_group()
