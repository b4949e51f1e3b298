import errno
import subprocess
import sys
import textwrap

import pytest
import torch

from alpro_launch import train as train_entry
from alpro_launch.cli import main
from alpro_stream.errors import (
    AlproError,
    CheckpointError,
    ConfigError,
    DivergenceError,
    FetchError,
    OtherRankError,
    PrompterError,
    RankError,
    SampleError,
    WriteError,
)
from alpro_stream.exit_status import BUG, CONFIGURATION, DATA, HARDWARE, status_of


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ConfigError("x"), CONFIGURATION),
        (CheckpointError("x"), CONFIGURATION),
        (FileNotFoundError(errno.ENOENT, "x"), CONFIGURATION),
        (PermissionError(errno.EACCES, "x"), CONFIGURATION),
        (SampleError("shard:0 key", "decode", "x"), DATA),
        (DivergenceError("x"), DATA),
        (FetchError("404", transient=False), DATA),
        (FetchError("503", transient=True), HARDWARE),
        (OSError(errno.ENOSPC, "No space left on device"), HARDWARE),
        (WriteError("x"), HARDWARE),
        (RankError("x"), HARDWARE),
        (PrompterError("x"), HARDWARE),
        (MemoryError(), HARDWARE),
        (torch.OutOfMemoryError("x"), HARDWARE),
        (OtherRankError("rank 1 failed", "data"), DATA),
        (OtherRankError("rank 1 failed", "bug"), BUG),
        (ZeroDivisionError(), BUG),
    ],
    ids=lambda value: value if isinstance(value, int) else repr(value),
)
def test_what_an_error_ends_with(error: Exception, status: int):
    assert status_of(error) == status


def test_every_error_of_ours_says_where_to_look():
    def classes(base: type[AlproError]) -> list[type[AlproError]]:
        return [base, *(one for child in base.__subclasses__() for one in classes(child))]

    assert {one.fault for one in classes(AlproError) if one is not OtherRankError} == {
        "configuration",
        "data",
        "hardware",
    }


def test_a_bug_has_its_traceback_and_its_status(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("alpro_stream.run.train", broken)
    assert train_entry.main(["configs/pretrain/tiny.yaml"]) == BUG
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setattr("alpro_launch.inspection.inspect", broken)
    assert main(["inspect", "."]) == BUG
    assert "a bug" in capsys.readouterr().err


def test_the_statuses_cost_no_import_of_torch():
    script = "import sys, alpro_stream.exit_status; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True)
