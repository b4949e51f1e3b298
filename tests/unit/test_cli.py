import subprocess
import sys
from pathlib import Path

import pytest

from alpro_launch.ablate.config import AblateConfig
from alpro_launch.ablate.jobs import make_jobs
from alpro_launch.cli import _parse, find_config, main, split_arguments
from alpro_launch.evaluate import load_evaluation
from alpro_launch.local_ranks import rank_environments, train_command
from alpro_launch.processes import Ended, _failure, run
from alpro_launch.tables import retrieval_table
from alpro_sharding import ShardConfig
from alpro_stream.config import load_config
from alpro_stream.errors import ConfigError
from alpro_stream.evaluate.embed_config import EmbedConfig
from alpro_stream.evaluate.offline_features import OfflineConfig
from alpro_stream.exit_status import CONFIGURATION
from alpro_stream.run import RunConfig

CONFIG_OF = {
    "shard": ShardConfig,
    "prompter": RunConfig,
    "pretrain": RunConfig,
    "finetune": RunConfig,
    "baselines": RunConfig,
    "embed": EmbedConfig,
}


@pytest.mark.parametrize("path", sorted(Path("configs").rglob("*.yaml")), ids=str)
def test_every_shipped_config_is_valid(path: Path):
    name = path.stem if path.parent.name == "demo" else path.parent.name
    if name == "evaluate":
        load_evaluation(str(path), [])
        return
    if name == "ablate":
        _check_ablation(path)
        return
    if path.stem == "frozen_features":
        load_config(OfflineConfig, path)
        return
    load_config(CONFIG_OF[name], path, ["manifest=m", "out=o"] if name == "shard" else [])


def _check_ablation(path: Path):
    """A grid with all the stages that it names, or a stage, which a grid must name to be of use."""
    grids = {grid: text for grid in Path("configs/ablate").glob("*.yaml") if "stages:" in (text := grid.read_text())}
    if path in grids:
        make_jobs(load_config(AblateConfig, path, ["seeds=[0]"]))
    else:
        assert any(f"config: {path}" in text for text in grids.values()), path


def test_the_published_runs_are_the_defaults_as_published():
    config = load_config(RunConfig, "configs/pretrain/webvid_cc3m.yaml")
    assert (config.stream.global_batch, config.stream.text.num_tokens, config.train.epochs) == (256, 30, 10)
    optimizer = config.train.optimizer
    assert (optimizer.learning_rate, optimizer.betas, optimizer.warmup_ratio) == (1e-4, (0.9, 0.98), 0.05)
    assert (config.model.video.width, config.model.video.depth, config.model.text.num_layers) == (768, 12, 6)
    assert config.prompter is not None
    assert (config.prompter.num_entities, config.losses.pem.threshold) == (1000, 0.2)


def test_arguments_are_configs_and_overrides():
    assert split_arguments(["a.yaml", "x.y=1", "b.yaml"]) == (["a.yaml", "b.yaml"], ["x.y=1"])
    with pytest.raises(ConfigError, match="no configuration file"):
        split_arguments(["x=1"])


def test_an_option_may_stand_between_configs_and_overrides():
    arguments = _parse(["train", "a.yaml", "--ranks", "2", "b.yaml", "x=1"])
    assert (arguments.arguments, arguments.ranks) == (["a.yaml", "b.yaml", "x=1"], 2)
    with pytest.raises(SystemExit):
        _parse(["train", "a.yaml", "--rank-count", "2"])
    with pytest.raises(SystemExit):
        _parse(["demo", "x=1"])


def test_a_config_is_looked_for_among_the_shipped_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shipped = tmp_path / "shipped"
    (shipped / "demo").mkdir(parents=True)
    (shipped / "demo/pretrain.yaml").write_text("")
    monkeypatch.setattr("alpro_launch.cli._SHIPPED_CONFIGS", shipped)
    monkeypatch.chdir(tmp_path)
    assert find_config("configs/demo/pretrain.yaml") == str(shipped / "demo/pretrain.yaml")
    assert find_config("mine.yaml") == "mine.yaml"


def test_each_rank_knows_its_place_and_two_runs_do_not_meet():
    first, second = rank_environments(2)
    assert (first["RANK"], first["WORLD_SIZE"], second["LOCAL_RANK"]) == ("0", "2", "1")
    assert first["MASTER_PORT"] == second["MASTER_PORT"]
    assert train_command("c.yaml", ["a=1"])[1:] == ["-m", "alpro_launch.train", "c.yaml", "a=1"]


def test_the_first_failure_ends_the_others_and_is_the_status():
    code = "import os, sys, time; sys.exit(3) if os.environ['RANK'] == '1' else time.sleep(600)"
    assert run([sys.executable, "-c", code], rank_environments(2)) == 3


def test_a_rank_that_was_killed_is_the_cause_of_those_that_ended_for_it():
    codes = ("raise SystemExit(69)", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "raise SystemExit(65)")
    children = [subprocess.Popen([sys.executable, "-c", code]) for code in codes]
    for child in children:
        child.wait()
    assert _failure(children) == Ended(-9, 1)
    assert _failure(children[::2]) == Ended(69, 0)


def test_children_end_when_their_parent_is_killed():
    # One write each: lines of two processes that print may mix.
    child = "import os, time; os.write(1, b'up' + os.linesep.encode()); time.sleep(600)"
    parent = f"from alpro_launch.processes import run; import sys; run([sys.executable, '-c', {child!r}], [{{}}, {{}}])"
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == [b"up\n", b"up\n"]
    process.kill()
    assert process.stdout.read() == b""  # It ends only when the last child has closed its output.
    process.wait()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "nowhere.yaml"], "no such configuration file: nowhere.yaml"),
        (["evaluate", "configs/demo/evaluate.yaml", "chekpoint=x"], "did you mean 'checkpoint'"),
        (["evaluate", "configs/demo/evaluate.yaml", "a.yaml"], "one configuration file is wanted"),
        (["evaluate", "nowhere/result.json"], "nowhere/result.json cannot be read"),
        (["evaluate", "configs/demo/evaluate.yaml", "--ranks", "0"], "at least 1 is needed"),
        (["evaluate", "--table", "nowhere"], "nowhere cannot be read"),
        (["inspect", "nowhere"], "nowhere is neither a shard folder nor a run"),
        (["inspect", "nowhere", "--page"], "nowhere is not the folder of a run, so there is no page to make of it"),
        (["inspect", "nowhere", "--page", "--verify"], "--page goes with no other option or setting"),
        (["inspect", "nowhere", "ranks=2", "--page", "x.html"], "--page goes with no other option or setting"),
        (["train", "configs/demo/prompter.yaml", "--ranks", "0"], "at least 1 is needed"),
        (["bench", "nothing"], "with one of: checkpoint, decode, demo, end_to_end"),
    ],
)
def test_mistakes_on_the_command_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert main(arguments) == CONFIGURATION
    assert message in capsys.readouterr().err


def test_the_demo_needs_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    assert main(["demo"]) == CONFIGURATION
    assert "needs a checkout" in capsys.readouterr().err


def test_table_has_every_score_both_ways_and_chance():
    figures = {f"recall_at_{k}": 50.0 for k in (1, 5, 10)} | {"median_rank": 1.5, "mean_rank": 2.0}
    figures |= {"num_queries": 4, "num_candidates": 3}
    metrics = {name: {"text_to_video": figures, "video_to_text": figures} for name in ("vtc", "vtm")}
    table = retrieval_table({"metrics": metrics, "chance": figures})
    assert [line.split()[0] for line in table.splitlines()[2:]] == ["VTC", "VTC", "VTM", "VTM", "chance", "4"]
