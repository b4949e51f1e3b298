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
    TakenError,
    WriteError,
)
from alpro_stream.exit_status import BUG, CONFIGURATION, DATA, HARDWARE, STATUS, status_of


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
        (TakenError("x"), HARDWARE),
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


FAULTS = {
    **dict.fromkeys(
        ["AlproError", "ConfigError", "PlanError", "TokenizerError", "CheckpointError", "OtherRankError"],
        "configuration",
    ),
    **dict.fromkeys(
        [
            *("ManifestError", "MediaError", "UnreadableError", "FetchError", "ShardError", "DataError", "SampleError"),
            "DivergenceError",
        ],
        "data",
    ),
    **dict.fromkeys(
        ["WriteError", "SaveError", "ProcessError", "PrompterError", "TakenError", "RankError"],
        "hardware",
    ),
}


def test_every_error_of_ours_says_where_to_look():
    def classes(base: type[AlproError]) -> list[type[AlproError]]:
        return [base, *(one for child in base.__subclasses__() for one in classes(child))]

    found = classes(AlproError)
    assert {one.fault for one in found} <= {*STATUS}
    # Those of other modules are theirs. FetchError and OtherRankError have it of the instance.
    assert {one.__name__: one.fault for one in found if one.__module__ == "alpro_stream.errors"} == FAULTS


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
