import pytest

from alpro_launch.cli import main
from alpro_launch.hostfile import Host, num_slots, read_hostfile, taken, to_text
from alpro_stream.errors import ConfigError
from alpro_stream.exit_status import CONFIGURATION

GOOD = "# two machines\n\nnode1 slots=8\n  node2   slots=4  # an older one\n"


def test_hosts_and_their_slots(tmp_path):
    (tmp_path / "hosts").write_text(GOOD)
    hosts = read_hostfile(tmp_path / "hosts")
    assert hosts == [Host("node1", 8), Host("node2", 4)]
    assert num_slots(hosts) == 12
    (tmp_path / "again").write_text(to_text(hosts))
    assert read_hostfile(tmp_path / "again") == hosts


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "node1 slots=8\nnode2 slot=8\n",
            r"hosts, line 2: found 'node2 slot=8', expected `HOST slots=NUMBER`, such as",
        ),
        ("node1 slots = 8", "line 1: found 'node1 slots = 8', expected"),
        ("node1:8", "line 1: found 'node1:8', expected"),
        ("node1 slots=8x", "line 1: found 'node1 slots=8x', expected"),
        ("node1 slots=-1", "line 1: found 'node1 slots=-1', expected"),
        ("a slots=1\nb slots=0", "line 2: found 'b slots=0', expected at least one slot; put # before the line"),
        ("a slots=1\n\na slots=2", "line 3: found 'a slots=2', but a is in line 1 already; expected each host once"),
        ("# nothing\n", "hosts: found no host, expected"),
        (None, r"the hostfile .*hosts cannot be read: .*No such file"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path, text, message):
    if text is not None:
        (tmp_path / "hosts").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_hostfile(tmp_path / "hosts")


@pytest.mark.parametrize(
    ("num_ranks", "expected"),
    [
        (12, [Host("a", 8), Host("b", 4)]),
        (8, [Host("a", 8)]),
        (10, [Host("a", 8), Host("b", 2)]),
        (1, [Host("a", 1)]),
    ],
)
def test_fewer_ranks_take_the_first_hosts(num_ranks, expected):
    assert taken([Host("a", 8), Host("b", 4)], num_ranks) == expected


@pytest.mark.parametrize(
    ("text", "flags", "message"),
    [
        ("node1 slot=8", [], "expected `HOST slots=NUMBER`"),
        (
            "node1 slots=3",
            [],
            "has 3 slots, which do not divide the 4 lanes of the run in 1 micro-batches; allowed numbers ",
        ),
        ("node1 slots=3", [], "allowed numbers of ranks: 1, 2, 4. Change the slots"),
        ("node1 slots=4", ["train.engine.num_micro_batches=2"], "in 2 micro-batches; allowed numbers of ranks: 1, 2."),
        ("node1 slots=4", ["--ranks", "2"], "goes with neither --ranks nor --nodes"),
        ("node1 slots=4", ["--max-restarts", "-1"], "--max-restarts -1: expected 0 or more"),
    ],
)
def test_the_command_refuses_it_before_anything_starts(tmp_path, capsys, text, flags, message):
    (tmp_path / "hosts").write_text(text)
    run = f"run_dir={tmp_path / 'run'}"
    config = "configs/prompter/tiny.yaml"
    arguments = ["train", config, "stream.num_lanes=4", "stream.global_batch=8", run, *flags]
    assert main([*arguments, "--hostfile", str(tmp_path / "hosts")]) == CONFIGURATION
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
