"""The prompter process: waits for crops in shared memory, answers with soft labels there.

Protocol, over one pipe (sequence numbers rise by one, a slot is reused only after its answer was taken):

    trainer -> service   (sequence, slot, number of samples, of frames, kind), or None to end
    service -> trainer   ("ready", pid), then ("done", sequence, seconds) or ("failed", traceback)
"""

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import parent_process
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor

from alpro_stream.model.cpu_memory import keep_freed_memory
from alpro_stream.prompter.labels import Labeller


@dataclass(frozen=True)
class Buffers:
    """Shared memory of both processes, allocated once. S slots, B samples, T frames, M entities."""

    frames_SBTHWC: Tensor
    boxes_SB4: Tensor
    labels_SBM: Tensor
    keep_SB: Tensor

    @classmethod
    def allocate(cls, num_slots: int, frames_shape: tuple[int, ...], num_entities: int) -> "Buffers":
        """New zeroed buffers; the kernel frees them when both processes are gone, nothing has a name."""
        size = frames_shape[0]
        return cls(
            _shared(torch.zeros(num_slots, *frames_shape, dtype=torch.uint8)),
            _shared(torch.zeros(num_slots, size, 4, dtype=torch.int64)),
            _shared(torch.zeros(num_slots, size, num_entities)),
            _shared(torch.zeros(num_slots, size, dtype=torch.bool)),
        )


def _shared(tensor: Tensor) -> Tensor:
    return tensor.share_memory_()  # type: ignore[no-untyped-call,no-any-return]


def serve(
    make_labeller: Callable[[], Labeller], buffers: Buffers, pipe: Connection, num_threads: int, log: Path
) -> None:
    """Main function of the process; ends when told to, when the trainer is gone, or with an error sent to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the trainer, which ends this process.
    threading.Thread(target=_end_with_trainer, name="alpro-prompter-watch", daemon=True).start()
    _redirect_output(log)
    try:
        torch.set_num_threads(num_threads)
        labeller = make_labeller()
        if labeller.device.type == "cpu":
            keep_freed_memory()
        pipe.send(("ready", os.getpid()))
        while (request := pipe.recv()) is not None:
            sequence, slot, size, num_frames, kind = request
            started = time.perf_counter()
            frames_BTHWC = buffers.frames_SBTHWC[slot, :size, :num_frames].to(labeller.device)
            labels = labeller(frames_BTHWC, buffers.boxes_SB4[slot, :size].to(labeller.device), kind)
            buffers.labels_SBM[slot, :size] = labels.labels_BM.cpu()
            buffers.keep_SB[slot, :size] = labels.keep_B.cpu()
            pipe.send(("done", sequence, time.perf_counter() - started))
    except (EOFError, ConnectionError):
        pass  # The trainer is gone, killed perhaps; there is nobody left to serve.
    except Exception:
        traceback.print_exc()
        with suppress(ConnectionError):
            pipe.send(("failed", traceback.format_exc()))


def _end_with_trainer() -> None:
    """Ends this process with its trainer, also when it is computing and nobody reads the pipe."""
    trainer = parent_process()
    assert trainer is not None
    trainer.join()
    os._exit(1)


def _redirect_output(log: Path) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(file, stream.fileno())
    os.close(file)
