from pathlib import Path

import pytest

from alpro_launch.cli import _parse, find_config, main, split_arguments
from alpro_launch.deepspeed_launcher import train_command
from alpro_launch.tables import retrieval_table
from alpro_sharding import ShardConfig
from alpro_stream.config import load_config
from alpro_stream.errors import ConfigError
from alpro_stream.evaluate.retrieval import EvaluateConfig
from alpro_stream.run import RunConfig

CONFIG_OF = {"shard": ShardConfig, "prompter": RunConfig, "pretrain": RunConfig, "evaluate": EvaluateConfig}


@pytest.mark.parametrize("path", sorted(Path("configs").rglob("*.yaml")), ids=str)
def test_every_shipped_config_is_valid(path: Path):
    name = path.stem if path.parent.name == "demo" else path.parent.name
    load_config(CONFIG_OF[name], path, ["manifest=m", "out=o"] if name == "shard" else [])


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


def test_one_rank_needs_no_launcher_and_two_get_a_port_of_their_own():
    one = train_command("c.yaml", ["a=1"], 1)
    assert one[1:] == ["-m", "alpro_launch.train", "c.yaml", "a=1"]
    first, second = (train_command("c.yaml", [], 2) for _ in range(2))
    assert "deepspeed.launcher.runner" in first
    assert first[first.index("--master_port") + 1].isdigit()
    assert first[-1] == second[-1] == "c.yaml"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "nowhere.yaml"], "no such configuration file: nowhere.yaml"),
        (["evaluate", "configs/demo/evaluate.yaml", "chekpoint=x"], "did you mean 'checkpoint'"),
        (["evaluate", "configs/demo/evaluate.yaml", "a.yaml"], "one configuration file is wanted"),
        (["inspect", "nowhere"], "nowhere is neither a shard folder nor a run"),
        (["bench", "nothing"], "with one of: demo, end_to_end"),
    ],
)
def test_mistakes_on_the_command_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert main(arguments) == 1
    assert message in capsys.readouterr().err


def test_the_demo_needs_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    assert main(["demo"]) == 1
    assert "needs a checkout" in capsys.readouterr().err


def test_table_has_every_score_both_ways_and_chance():
    figures = {f"recall_at_{k}": 50.0 for k in (1, 5, 10)} | {"median_rank": 1.5, "mean_rank": 2.0}
    figures |= {"num_queries": 4, "num_candidates": 3}
    metrics = {name: {"text_to_video": figures, "video_to_text": figures} for name in ("vtc", "vtm")}
    table = retrieval_table({"metrics": metrics, "chance": figures})
    assert [line.split()[0] for line in table.splitlines()[2:]] == ["VTC", "VTC", "VTM", "VTM", "chance", "4"]
