"""The prompter process: waits for crops in memory of both processes, answers with soft labels there.

Protocol, over one pipe (sequence numbers rise by one, a slot is reused only after its answer was taken):

    trainer -> service   (sequence, slot, number of samples, of frames, kind), or None to end
    service -> trainer   ("ready", pid), then ("done", sequence, seconds) or ("failed", reason)

On a GPU a request only says that the copy into the slot is on its way: this process waits for the slot's event, so
that the trainer need not wait for its own stream. An answer says that the labels are there; its seconds are theirs
alone, without that wait.
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

from alpro_stream.errors import AlproError
from alpro_stream.model.cpu_memory import keep_freed_memory
from alpro_stream.prompter.labels import Labeller
from alpro_stream.stacks import take_part

_NAMED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Buffers:
    """Memory of both processes, allocated once. S slots, B samples, T frames, M entities.

    Attributes:
        frames_SBTHWC: uint8.
        boxes_SB4: int64, in patches.
        labels_SBM: float32.
        keep_SB: bool.
        written: on a GPU an event of each slot, for the copy into it; empty elsewhere.
    """

    frames_SBTHWC: Tensor
    boxes_SB4: Tensor
    labels_SBM: Tensor
    keep_SB: Tensor
    written: tuple[torch.cuda.Event, ...] = ()

    @classmethod
    def allocate(
        cls, num_slots: int, frames_shape: tuple[int, ...], num_entities: int, device: torch.device
    ) -> "Buffers":
        """New zeroed buffers: on a CUDA device its own memory (CUDA IPC), else shared memory of the CPU.

        The kernel frees shared memory when both processes are gone: nothing has a name. What the GPU has is freed with
        the process that allocated it, the trainer.
        """
        on_gpu = device.type == "cuda"
        place, size = device if on_gpu else torch.device("cpu"), frames_shape[0]
        tensors = (
            torch.zeros(num_slots, *frames_shape, dtype=torch.uint8, device=place),
            torch.zeros(num_slots, size, 4, dtype=torch.int64, device=place),
            torch.zeros(num_slots, size, num_entities, device=place),
            torch.zeros(num_slots, size, dtype=torch.bool, device=place),
        )
        if not on_gpu:
            frames_SBTHWC, boxes_SB4, labels_SBM, keep_SB = map(_shared, tensors)
            return cls(frames_SBTHWC, boxes_SB4, labels_SBM, keep_SB)
        # Events belong to the device that is current when their handle is made.
        with torch.cuda.device(device):
            events = tuple(
                torch.cuda.Event(interprocess=True)  # type: ignore[no-untyped-call]
                for _ in range(num_slots)
            )
            for event in events:
                event.record()
        return cls(*tensors, events)

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.frames_SBTHWC.device

    def announce(self, slot: int) -> None:
        """To be called when everything that fills a slot is in the caller's stream."""
        if self.written:
            self.written[slot].record(torch.cuda.current_stream(self.device))

    def await_written(self, slot: int) -> None:
        """Returns when what was announced has been written."""
        if self.written:
            self.written[slot].synchronize()


def _shared(tensor: Tensor) -> Tensor:
    return tensor.share_memory_()  # type: ignore[no-untyped-call,no-any-return]


def serve(
    make_labeller: Callable[[], Labeller], buffers: Buffers, pipe: Connection, num_threads: int, log: Path
) -> None:
    """Main function of the process; ends when told to, when the trainer is gone, or with an error sent to it."""
    take_part()
    # Both reach all processes of a run at once (Ctrl-C, Slurm, deepspeed); the trainer saves, and then ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_trainer, name="alpro-prompter-watch", daemon=True).start()
    _redirect_output(log)
    try:
        torch.set_num_threads(num_threads)
        if buffers.device.type == "cuda":
            torch.cuda.set_device(buffers.device)  # Else this process would also take memory of the first GPU.
        labeller = make_labeller()
        if labeller.device.type == "cpu":
            keep_freed_memory()
        pipe.send(("ready", os.getpid()))
        while (request := pipe.recv()) is not None:
            sequence, slot, size, num_frames, kind = request
            buffers.await_written(slot)
            started = time.perf_counter()
            frames_BTHWC = buffers.frames_SBTHWC[slot, :size, :num_frames].to(labeller.device)
            labels = labeller(frames_BTHWC, buffers.boxes_SB4[slot, :size].to(labeller.device), kind)
            buffers.labels_SBM[slot, :size] = labels.labels_BM
            buffers.keep_SB[slot, :size] = labels.keep_B
            if buffers.device.type == "cuda":
                torch.cuda.synchronize(buffers.device)
            pipe.send(("done", sequence, time.perf_counter() - started))
    except (EOFError, ConnectionError):
        pass  # The trainer is gone, killed perhaps; there is nobody left to serve.
    except Exception as error:
        traceback.print_exc()
        with suppress(ConnectionError):
            pipe.send(("failed", str(error) if isinstance(error, AlproError) else "\n" + traceback.format_exc()))


def _end_with_trainer() -> None:
    """Ends this process with its trainer, also when it is computing and nobody reads the pipe."""
    trainer = parent_process()
    assert trainer is not None
    trainer.join()
    # CUDA IPC counts its users in a file that is named after the trainer, which would have removed it at its end.
    for file in _NAMED_MEMORY.glob(f"torch_{trainer.pid}_*"):
        file.unlink(missing_ok=True)
    os._exit(1)


def _redirect_output(log: Path) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(file, stream.fileno())
    os.close(file)
