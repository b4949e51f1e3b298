"""The options of `alpro forecast`; imports nothing heavy, as every command reads them."""

import argparse
from pathlib import Path


def add_forecast_flags(parser: argparse.ArgumentParser) -> None:
    """Those of `alpro forecast`."""
    parser.add_argument("--gpu", required=True, metavar="NAME", help="kind of GPU, such as a100; here: as measured")
    parser.add_argument("--nodes", type=int, default=1, help="machines (default 1)")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs of a machine (default 1)")
    what = "results of benchmarks on such a machine, in place of the table's figures"
    parser.add_argument("--measured", type=Path, nargs="+", action="extend", default=[], metavar="FILE", help=what)
    parser.add_argument("--samples", type=int, help="of an epoch, where the data sets are not here")
    parser.add_argument("--clip-bytes", type=float, help="that a step reads of a sample, where they are not here")
    parser.add_argument("--storage-mb-per-s", type=float, help="that storage gives to all nodes together")
    parser.add_argument("--share-of-peak", type=float, help="of a GPU, that a whole step reaches, such as 0.4")
    parser.add_argument("--network-gb-per-s", type=float, help="of a node's network by its name: 50 of 400 Gbit/s")
    parser.add_argument("--link-gb-per-s", type=float, help="of a GPU to the others of its node, one direction")
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
