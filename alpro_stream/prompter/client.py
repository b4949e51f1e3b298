"""The trainer's side: hands batches over ahead of the step, takes the soft labels when PEM needs them."""

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from multiprocessing import connection, get_context
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from pydantic import Field

from alpro_stream.config import Config
from alpro_stream.errors import PrompterError
from alpro_stream.losses.objective import SoftLabels
from alpro_stream.prompter.labels import Labeller, Precision
from alpro_stream.prompter.prompts import Prompting
from alpro_stream.prompter.service import Buffers, serve
from alpro_stream.stream.batch import Batch

_CPU = torch.device("cpu")


class PrompterConfig(Config):
    """The frozen prompter of a pre-training run."""

    checkpoint: Path
    """Run or checkpoint of stage one."""
    num_entities: int = Field(default=1000, ge=2)
    """M: the most frequent nouns of the sources; fewer when they have fewer."""
    entities: Path | None = None
    """A file of entities to use in place of the sources' own."""
    prompts: Prompting = "ensemble"
    """Sentences of an entity: `ensemble` averages the twelve published ones, `single` takes one."""
    placement: Literal["process", "inline"] = "process"
    """A process beside each rank, or in the trainer itself (the same labels, no overlap)."""
    lookahead: int = Field(default=1, ge=1, le=64)
    """Batches handed over ahead of the step that needs them."""
    num_threads: int = Field(default=1, ge=1, le=1024)
    """torch's threads of the process."""
    precision: Precision = "fp32"
    """bf16 computes the encoder under autocast, for GPUs; similarities and labels are float32 in any case."""
    compile: bool = False
    """torch.compile of the encoder; the first answer of each kind of source then takes a minute or more, for which
    `deadline_s` must leave time."""
    deadline_s: float = Field(default=120.0, gt=0, le=86_400)
    """Longest wait for one answer, or for the start."""


class Prompter(Protocol):
    """What the trainer uses; batches are collected in the order in which they were submitted."""

    def submit(self, batch: Batch) -> None:
        """Begins the labels of a batch."""

    def collect(self, batch: Batch) -> SoftLabels:
        """The labels of the oldest batch submitted, which must be this one."""

    def close(self) -> None:
        """Ends what was started."""


class InlinePrompter:
    """Computes the labels when they are collected, in this process."""

    def __init__(self, labeller: Labeller) -> None:
        self._labeller = labeller

    def submit(self, batch: Batch) -> None:
        """See `Prompter`; nothing to do ahead."""

    def collect(self, batch: Batch) -> SoftLabels:
        """See `Prompter`."""
        return self._labeller(batch.frames_BTHWC, batch.boxes_B4, batch.kind)

    def close(self) -> None:
        """See `Prompter`."""


class _Pending(NamedTuple):
    """A batch that was handed over and not collected."""

    sequence: int
    slot: int
    step: int


class PrompterClient:
    """Starts the process and talks to it.

    Args:
        make_labeller: builds the labeller in the process; picklable.
        frames_shape: (B, T, H, W, C) of this rank's largest batches, those of videos.
        num_entities: M.
        config: lookahead, threads and deadline.
        log: file for what the process prints, added to what is there.
        rank: of this trainer, for messages.
        device: of the batches; those of a CUDA device stay on it, others pass through shared memory.

    Attributes:
        labels_s: seconds that the process spent on the labels collected last, once it had their batch; 0 before.
    """

    def __init__(
        self,
        make_labeller: Callable[[], Labeller],
        frames_shape: tuple[int, ...],
        num_entities: int,
        config: PrompterConfig,
        log: Path,
        rank: int,
        device: torch.device = _CPU,
    ) -> None:
        self._buffers = Buffers.allocate(config.lookahead + 1, frames_shape, num_entities, device)
        self.labels_s = 0.0
        self._deadline_s, self._log, self._rank = config.deadline_s, log, rank
        self._pending: deque[_Pending] = deque()
        self._submitted = 0
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as file:
            file.write(f"--- started {datetime.now().astimezone().isoformat(timespec='seconds')}\n")
            self._log_start = file.tell()
        # spawn, not fork: the trainer has threads and perhaps a CUDA context.
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=serve,
            args=(make_labeller, self._buffers, theirs, config.num_threads, log),
            name=f"alpro-prompter-{rank}",
            daemon=True,
        )
        self._process.start()
        theirs.close()
        self._ready = False

    @property
    def pid(self) -> int:
        """Process id of the prompter."""
        assert self._process.pid is not None
        return self._process.pid

    def submit(self, batch: Batch) -> None:
        """Copies the batch into a free slot of the buffers and tells the process; does not wait for a GPU.

        Raises:
            PrompterError: the process is gone, or more batches are pending than the lookahead allows.
        """
        num_slots = len(self._buffers.frames_SBTHWC)
        if len(self._pending) == num_slots:
            raise PrompterError(f"{num_slots} batches are pending; collect one before submitting another")
        self._submitted += 1
        slot = self._submitted % num_slots
        num_frames = batch.frames_BTHWC.shape[1]  # One of an image.
        self._buffers.frames_SBTHWC[slot, : len(batch), :num_frames] = batch.frames_BTHWC
        self._buffers.boxes_SB4[slot, : len(batch)] = batch.boxes_B4
        self._buffers.announce(slot)
        self._pending.append(_Pending(self._submitted, slot, batch.step))
        try:
            self._pipe.send((self._submitted, slot, len(batch), num_frames, batch.kind))
        except OSError as error:
            raise self._death(f"the batch of step {batch.step} was handed over") from error

    def collect(self, batch: Batch) -> SoftLabels:
        """Waits for the answer to the oldest pending batch.

        Raises:
            PrompterError: the process died, failed, or did not answer within the deadline; or the oldest batch is
                another one.
        """
        if not self._pending or self._pending[0].step != batch.step:
            oldest = f"the oldest one is of step {self._pending[0].step}" if self._pending else "none is pending"
            raise PrompterError(f"the labels of step {batch.step} were asked for, and {oldest}")
        pending = self._pending.popleft()
        occasion = f"the labels of step {batch.step} were awaited"
        if not self._ready:
            self._expect(("ready", self.pid), f"its start and {occasion}")
            self._ready = True
        self.labels_s = self._expect(("done", pending.sequence), occasion)[2]
        device, size = batch.frames_BTHWC.device, len(batch)
        return SoftLabels(
            self._buffers.labels_SBM[pending.slot, :size].clone().to(device),
            self._buffers.keep_SB[pending.slot, :size].clone().to(device),
        )

    def close(self) -> None:
        """Asks the process to end; kills it if it does not."""
        with suppress(OSError):  # Already gone.
            self._pipe.send(None)
        self._process.join(timeout=5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._pipe.close()

    def _expect(self, expected: tuple[str, int], occasion: str) -> tuple[Any, ...]:
        """Waits for the next message, which must begin like this, and returns it."""
        # The sentinel too: the pipe stays open when the process has left children of its own behind.
        if not connection.wait([self._pipe, self._process.sentinel], timeout=self._deadline_s):
            raise PrompterError(
                f"the prompter of {self._who()} gave no answer for {self._deadline_s:g} s when {occasion}; raise "
                "prompter.deadline_s if it is only slow" + self._log_tail()
            )
        if not self._pipe.poll():
            raise self._death(occasion)
        try:
            message: tuple[Any, ...] = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise self._death(occasion) from error
        if message[0] == "failed":
            raise self._failure(message[1], occasion)
        if message[:2] != expected:
            raise PrompterError(f"the prompter of {self._who()} said {message[:2]}, expected {expected}")
        return message

    def _death(self, occasion: str) -> PrompterError:
        """Why the process is gone: the traceback that it sent, or the exit status that it ended with."""
        with suppress(EOFError, OSError):
            while self._pipe.poll():
                if (message := self._pipe.recv())[0] == "failed":
                    return self._failure(message[1], occasion)
        self._process.join(timeout=5)
        return PrompterError(
            f"the prompter of {self._who()} died with exit status {self._process.exitcode} when {occasion}; start the "
            "run again, it goes on from its last checkpoint" + self._log_tail()
        )

    def _failure(self, its_reason: str, occasion: str) -> PrompterError:
        return PrompterError(f"the prompter of {self._who()} failed when {occasion}: {its_reason}")

    def _who(self) -> str:
        return f"rank {self._rank} (pid {self.pid})"

    def _log_tail(self) -> str:
        lines = self._log.read_bytes()[self._log_start :].decode("utf-8", errors="replace").splitlines()[-8:]
        return f"\nend of {self._log}:\n  " + "\n  ".join(lines) if lines else ""
