"""The process of one piece: does its parts one after the other, whatever becomes of each, and notes it in a journal.

``python -m benchmarks.gpu_pieces.piece NAME --device cuda|cpu [--quick] --journal FILE``, where NAME is that of a
module beside this one. Its function ``parts(setting)`` gives the names of the parts with what measures each.
"""

import argparse
import gc
import importlib
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from alpro_stream.errors import AlproError
from benchmarks.gpu_pieces.journal import Journal
from benchmarks.harness import Row


class LeftOutError(Exception):
    """A part cannot be measured here, and nothing is wrong; the message says what is missing."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What all pieces are told.

    Attributes:
        device: to measure on.
        is_quick: toy sizes and few repetitions, to see that every line runs.
    """

    device: torch.device
    is_quick: bool

    @property
    def is_cuda(self) -> bool:
        """Whether it is a GPU."""
        return self.device.type == "cuda"

    @property
    def precision(self) -> Literal["bf16", "fp32"]:
        """bf16 on a GPU; many CPUs only imitate it, tens of times slower than they multiply in fp32."""
        return "bf16" if self.is_cuda else "fp32"

    def repetitions(self, wanted: int) -> int:
        """How often something is measured."""
        return 1 if self.is_quick else wanted


Parts = Mapping[str, Callable[[], Sequence[Row]]]
"""By name, in order, what measures a part."""


def do(parts: Parts, journal: Journal) -> None:
    """Does those parts that the journal does not know.

    Raises:
        torch.AcceleratorError: the GPU cannot be used by this process any more.
    """
    known = {outcome.name for outcome in journal.read().outcomes}
    journal.announce(list(parts))
    for name, measure in parts.items():
        if name in known:
            continue
        journal.begin(name)
        try:
            rows = [row.as_json() for row in measure()]
        except (LeftOutError, ModuleNotFoundError) as error:
            journal.end(name, "left out", _missing(error))
        except AlproError as error:
            journal.end(name, "left out" if "is not installed" in str(error) else "failed", str(error))
        except torch.OutOfMemoryError as error:
            journal.end(name, "left out", f"does not fit into the GPU's memory: {error}")
            traceback.clear_frames(error.__traceback__)
        except Exception as error:
            journal.end(name, "failed", f"{type(error).__name__}: {error}")
            traceback.clear_frames(error.__traceback__)  # They hold tensors of the GPU.
        else:
            journal.end(name, "done", rows=rows)
        if torch.cuda.is_available():
            gc.collect()
            torch.cuda.synchronize()  # After some errors nothing works any more: the process is then started again.
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def peak_gib(device: torch.device) -> dict[str, float]:
    """Most memory of tensors since the part began, for the details of a row; nothing on a CPU."""
    return {"peak GiB": torch.cuda.max_memory_allocated(device) / 2**30} if device.type == "cuda" else {}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--journal", type=Path, required=True)
    arguments = parser.parse_args(argv)
    journal = Journal(arguments.journal)
    setting = Setting(torch.device("cuda", 0) if arguments.device == "cuda" else torch.device("cpu"), arguments.quick)
    try:
        parts = importlib.import_module(f"benchmarks.gpu_pieces.{arguments.name}").parts(setting)
    except (LeftOutError, ModuleNotFoundError) as error:
        journal.announce([arguments.name])
        journal.end(arguments.name, "left out", _missing(error))
        return
    do(parts, journal)


def _missing(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"needs {error.name}, which is not installed"
    return str(error)


if __name__ == "__main__":
    main()
