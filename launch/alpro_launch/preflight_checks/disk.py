"""Whether the checkpoints fit into the run directory, and whether all machines see the same one."""

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from alpro_launch.preflight_checks.lines import Line, counted, gib, verdict_of_share
from alpro_stream.train.checkpoint import complete_checkpoints

# Folders over a network show what another machine wrote after some seconds.
_LONGEST_WAIT_S = 5.0
_POLL_S = 0.1
_REMEDY = "make room there, keep fewer (train.keep_checkpoints), or set another run_dir"


@dataclass(frozen=True, slots=True)
class Disk:
    """What a rank sees of the run directory.

    Attributes:
        free: bytes.
        sees_token: whether the file of the first rank is there.
        num_checkpoints: complete ones that are there.
        checkpoint_bytes: of one; None where that is not known.
    """

    free: int
    sees_token: bool
    num_checkpoints: int = 0
    checkpoint_bytes: int | None = None


def checkpoint_bytes(num_parameters: int, zero_stage: int) -> int:
    """About what a checkpoint takes; all of it is float32.

    The engine's files hold the parameters, AdamW's two moments and, from ZeRO stage 1 on, the parameters once more as
    the optimizer's; stage 3 has them there alone. `model.safetensors` holds them too.
    """
    copies = {0: 1 + 2, 1: 1 + 2 + 1, 2: 1 + 2 + 1, 3: 2 + 1}[zero_stage]
    return 4 * num_parameters * (copies + 1)


def token_path(run_dir: Path, token: str) -> Path:
    """The file of the first rank, which the others look for."""
    return run_dir / f".preflight-{token}"


def write_token(run_dir: Path, token: str) -> None:
    """Writes it.

    Raises:
        OSError: it cannot be written.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    token_path(run_dir, token).write_text(token, encoding="utf-8")


def look_at(run_dir: Path, token: str, checkpoint_bytes: int | None) -> Disk:
    """What this rank sees; waits a little for the file of the first rank."""
    until = time.monotonic() + _LONGEST_WAIT_S
    while not (is_there := token_path(run_dir, token).is_file()) and time.monotonic() < until:
        time.sleep(_POLL_S)
    free = shutil.disk_usage(run_dir).free if run_dir.is_dir() else 0
    return Disk(free, is_there, len(complete_checkpoints(run_dir)), checkpoint_bytes)


def judge_disk(found: Sequence[Disk], hosts: Sequence[str], run_dir: Path, num_kept: int) -> list[Line]:
    """One line.

    Args:
        found: by rank.
        hosts: by rank.
        run_dir: as configured.
        num_kept: checkpoints that are kept; one more is there while it is written.
    """
    blind = [host for host, disk in zip(hosts, found, strict=True) if not disk.sees_token]
    if blind:
        text = f"{', '.join(dict.fromkeys(blind))} see another {run_dir} than {hosts[0]}"
        remedy = "mount the same folder on all machines, at the same path"
        return [Line("run_dir", text, f"a file that {hosts[0]} wrote", "FAIL", remedy)]
    free, num_there, checkpoint = found[0].free, found[0].num_checkpoints, found[0].checkpoint_bytes
    text = f"{gib(free)} free in {run_dir}"
    if checkpoint is None:
        return [Line("run_dir", text, "the size of a checkpoint is not known")]
    num_new = num_kept + 1 - min(num_there, num_kept)
    share = num_new * checkpoint / free if free else float("inf")
    verdict = verdict_of_share(share)
    against = f"{counted(num_new, 'more checkpoint')} of about {gib(checkpoint)} ({num_kept} kept, one being written)"
    return [Line("run_dir", text, against, verdict, "" if verdict == "ok" else _REMEDY, "hardware")]
