"""`alpro embed`, and the entry of its ranks."""

import logging
import os
import sys
from collections.abc import Sequence

from alpro_launch.local_ranks import rank_environments
from alpro_launch.processes import how_ended, run_all
from alpro_launch.rank_entry import run_rank
from alpro_launch.topology import find_topology
from alpro_stream.config import load_config
from alpro_stream.exit_status import HARDWARE


def run_embed(path: str, overrides: Sequence[str], num_ranks: int) -> int:
    """Starts the ranks of this machine, and waits until they have ended; returns the exit status."""
    ended = run_all([sys.executable, "-m", "alpro_launch.embed", path, *overrides], rank_environments(num_ranks))
    if ended.status >= 0:
        return ended.status
    print(f"{how_ended(ended)}; the same command makes what is missing", file=sys.stderr)
    return HARDWARE


def main(argv: Sequence[str]) -> int:
    """Embeds the shards of one rank; returns the exit status."""
    # The launcher of deepspeed passes the rank first; it is in the environment too.
    arguments = [argument for argument in argv if not argument.startswith("--local_rank")]
    if not arguments or arguments[0].startswith("-"):
        print("usage: python -m alpro_launch.embed CONFIG [key=value ...]", file=sys.stderr)
        return 2
    return run_rank(
        lambda: _embed(arguments[0], arguments[1:]),
        lambda: print("interrupted; the same command makes what is missing", file=sys.stderr, flush=True),
    )


def _embed(path: str, overrides: Sequence[str]) -> int:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    from alpro_stream.evaluate.embed_config import EmbedConfig
    from alpro_stream.evaluate.embed_index import embed_index
    from alpro_stream.evaluate.index_files import INDEX_FILE

    config = load_config(EmbedConfig, path, overrides)
    topology = find_topology(os.environ)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("alpro_stream").setLevel(logging.INFO)
    if torch.cuda.is_available():
        device = torch.device("cuda", topology.local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    index = embed_index(config, topology.rank, topology.num_ranks, device)
    if index is not None and index.parts is not None:
        num_clips = sum(part.num_clips for part in index.parts)
        num_left_out = sum(len(part.left_out) for part in index.parts)
        print(f"{num_clips} clips, {index.dimension} numbers each; {num_left_out} left out")
        print(f"written: {config.out / INDEX_FILE}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
