"""The flags of `alpro shard` and ``python -m sharding``; light, so that `alpro` starts quickly."""

import argparse


def add_shard_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that stand beside the configuration file and its overrides."""
    parser.add_argument(
        "--estimate", action="store_true", help="try some rows and say what the whole corpus will cost; writes nothing"
    )
    parser.add_argument("--rows", type=int, default=200, help="rows of each kind that --estimate tries (default 200)")
    parser.add_argument("--retry-failed", action="store_true", help="also try rows again that gave no sample")
