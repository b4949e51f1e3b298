"""`alpro forecast` as a user calls it, on runs that take no time to count."""

import json
import re
from pathlib import Path

import pytest
import yaml

from alpro_launch.cli import main
from alpro_launch.forecast import measured
from alpro_launch.forecast.devices import markdown_table
from alpro_launch.forecast.facts import bytes_of_clip, read_facts
from alpro_launch.forecast.work import Work
from alpro_stream.config import load_config
from alpro_stream.errors import PlanError
from alpro_stream.exit_status import CONFIGURATION
from alpro_stream.run import RunConfig
from alpro_stream.stream.sources import open_sources
from alpro_stream.testing.configs import tiny_run, write_corpus

TINY = "configs/prompter/tiny.yaml"
PARTS = "benchmarks/results/forecast.json"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Path of a run of stage one on 24 videos and 9 images."""
    folder = tmp_path_factory.mktemp("forecast")
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tiny_run(write_corpus(folder / "corpus"), folder / "run")))
    return path


@pytest.fixture(scope="module")
def said(config, tmp_path_factory):
    """What is written about it, for two GPUs."""
    file = tmp_path_factory.mktemp("said") / "forecast.json"
    options = ["--gpu", "a100", "--gpus", "2", "--storage-mb-per-s", "0.001", "--json", str(file)]
    assert main(["forecast", str(config), *options, "train.max_steps=null", "train.epochs=5"]) == 0
    return json.loads(file.read_text())


def test_a_run_is_its_steps(said):
    # Passes of 24 videos and 9 images in batches of 8: three steps and one.
    assert said["num_steps"] == 20
    assert said["epoch_s"] == pytest.approx(4 * said["step_s"])
    assert said["run_s"] == pytest.approx(20 * said["step_s"])
    assert said["gpu_hours"] == pytest.approx(2 * said["run_s"] / 3600)
    assert said["layout"]["num_nodes"] == 1


def test_storage_must_give_what_a_step_reads(said, config):
    run = load_config(RunConfig, config)
    sources = open_sources(run.stream.sources)
    read = {source.kind: bytes_of_clip(source, 2) for source in sources}
    # Two of six frames, by the sizes of all members of the first shard.
    first = sources[0]
    sizes = [[m.size for m in first.reader.frame_members("video-000000", slot)] for slot in range(5)]
    assert read["video"] == pytest.approx(sum(sum(each) for each in sizes) / 30 * 2)
    assert said["clip_bytes"] == pytest.approx(0.75 * read["video"] + 0.25 * read["image"])
    assert said["storage_bytes_per_s"] == pytest.approx(8 * said["clip_bytes"] / said["step_s"])
    # From a kilobyte a second, reading takes longest.
    assert said["step_s"] == pytest.approx(8 * said["clip_bytes"] / 1000)
    assert said["bottleneck"].startswith("bottleneck: reading takes")


def test_fewer_ranks_have_the_rates_that_were_measured_with_as_many(config, tmp_path):
    def forecast(num_ranks):
        file = tmp_path / f"{num_ranks}.json"
        ranks = [
            "--gpu",
            "here",
            "--gpus",
            str(num_ranks),
            f"stream.global_batch={4 * num_ranks}",
            f"stream.num_lanes={2 * num_ranks}",
        ]
        assert main(["forecast", str(config), *ranks, "--measured", PARTS, "--json", str(file)]) == 0
        return json.loads(file.read_text())

    one, two = forecast(1), forecast(2)
    assert two["weak_scaling"][0]["step_s"] == pytest.approx(one["step_s"])
    assert two["memory_bytes"]["context"] == 0


def test_files_of_both_flags_count(config, tmp_path):
    results = [f"benchmarks/results/{name}.json" for name in ("stream", "checkpoint")]
    flags = [word for file in results for word in ("--measured", file)]
    file = tmp_path / "forecast.json"
    assert main(["forecast", str(config), "--gpu", "a100", *flags, "--json", str(file)]) == 0
    assert [text.partition(":")[0] for text in json.loads(file.read_text())["measured"]] == ["stream", "checkpoint"]


def test_what_is_printed(config, capsys):
    assert main(["forecast", str(config), "--gpu", "h100"]) == 0
    shown = capsys.readouterr().out
    for text in ("a step of 8 samples on 1 x 1 h100", "storage must give", "fits", "scaling, strong", "scaling, weak"):
        assert text in shown
    assert "bottleneck: starting operations" in shown
    assert "assumed: matrix products reach 0.6 of the peak in fp32, all else 2,680 GB/s of memory" in shown


def test_a_config_that_is_shipped_and_data_that_are_not_here(capsys, tmp_path):
    file = tmp_path / "forecast.json"
    overrides = ["work_dir=nowhere", "stream.sources=[{path: nowhere, kind: video}]", "stream.text.tokenizer=./nowhere"]
    command = ["forecast", "configs/pretrain/tiny.yaml", *overrides, "--gpu", "a100", "--nodes", "2", "--gpus", "2"]
    assert main([*command, "train.engine.num_threads=1", "--json", str(file)]) == 0
    shown, said = capsys.readouterr().out, json.loads(file.read_text())
    for what in ("the data are not there", "the prompter is not there", "--samples N", "--clip-bytes N"):
        assert any(what in text for text in said["assumed"]), what
        assert what in shown
    assert (said["epoch_s"], said["run_s"], said["storage_bytes_per_s"]) == (None, None, None)
    assert said["parts_s"].keys() >= {"forward", "backward", "labels", "update", "gradients between ranks"}
    assert main([*command, "--samples", "800", "--clip-bytes", "1000", "--json", str(file)]) == 0
    said = json.loads(file.read_text())
    assert said["num_steps"] == 10 * 800 / 8
    assert said["storage_bytes_per_s"] == pytest.approx(8000 / said["step_s"])


def test_a_measured_machine(config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measured, "_published_work", lambda batch: Work(3e12, 1e10, 1e4))
    file = tmp_path / "forecast.json"
    results = [f"benchmarks/results/{name}.json" for name in ("step", "stream")]
    assert main(["forecast", str(config), "--gpu", "here", "--measured", *results, "--json", str(file)]) == 0
    said = json.loads(file.read_text())
    for name, text in zip(("step", "stream"), said["measured"], strict=True):
        assert re.match(rf"{name}: .* \(benchmarks/results/{name}.json, 2 cores", text)
    # The data of the run are here: it is their clips that are read.
    assert said["clip_bytes"] < 10e3
    assert (said["fits"], said["strong_scaling"]) == (None, [])
    assert "decoding on the same cores" in said["parts_s"]
    assert "fits" not in capsys.readouterr().out


def test_what_was_measured_and_is_not_used_is_said(config, tmp_path, monkeypatch):
    monkeypatch.setattr(measured, "_published_work", lambda batch: Work(3e12, 1e10, 1e4))
    file = tmp_path / "forecast.json"
    results = [f"benchmarks/results/{name}.json" for name in ("forecast", "step", "end_to_end", "decode")]
    assert main(["forecast", str(config), "--gpu", "here", "--measured", *results, "--json", str(file)]) == 0
    said = json.loads(file.read_text())["measured"]
    assert [text.partition(":")[0] for text in said if text.endswith(": not used")] == ["step", "end_to_end"]


def test_what_does_not_fit_is_said(config, capsys):
    # A batch of eight million samples on one GPU.
    command = ["forecast", str(config), "--gpu", "l4", "stream.global_batch=8000000", "--samples", "80000000"]
    assert main([*command, "stream.sources=[{path: nowhere, kind: video}]"]) == 0
    shown = capsys.readouterr().out
    assert "DOES NOT FIT" in shown
    assert "does not fit: raise train.engine.num_micro_batches" in shown
    assert ": NO" in shown


@pytest.mark.slow
def test_the_example_of_the_docs(capsys):
    """Counting the published model takes some seconds."""
    _, _, rest = Path("docs/forecast.md").read_text().partition("## ")[0].rpartition("```\nalpro ")
    command, *lines = rest.partition("\n```")[0].splitlines()
    assert main(command.split()) == 0
    shown = [line.strip() for line in capsys.readouterr().out.splitlines()]
    wanted = [line for line in lines if line and line != "..."]
    assert len(wanted) > 15
    assert not [line for line in wanted if line not in shown]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([TINY, "--gpu", "b7"], "--gpu b7: not in the table"),
        ([TINY, "--gpu", "a100", "--nodes", "0"], "'nodes': Input should be greater than or equal to 1 (got 0)"),
        ([TINY, "--gpu", "a100", "--gpus", "3"], "3 ranks, which do not divide 4 lanes"),
        ([TINY, "--gpu", "a100", "stream.global_batch=9"], "global_batch 9 is not a multiple of stream.num_lanes 4"),
        ([TINY, "--gpu", "a100", "--share-of-peak", "1.5"], "share_of_peak"),
        ([TINY, "--gpu", "a100", "--samples", "7"], "--samples 7: fewer than stream.global_batch 8"),
        (["configs/demo/shard.yaml", "--gpu", "a100"], "is no configuration of a training run"),
        (["configs/evaluate/tiny_qa.yaml", "--gpu", "a100"], "is no configuration of a training run"),
        ([TINY, "--gpu", "here", "--share-of-peak", "0.3"], "are of a GPU of the table, not of --gpu here"),
        ([TINY, "--gpu", "here"], "--gpu here: the measured rates are of no machine"),
        ([TINY, "--gpu", "here", "--gpus", "4", "--measured", PARTS], "4 ranks of a node (--gpus) are more than the 2"),
        ([TINY, "--gpu", "a100", "--network-gb-per-s", "1e-320"], "network_gb_per_s"),
        ([TINY, "--gpu", "a100", "stream.num_lanes=10000000000"], "global_batch 8 is not a multiple of stream.num_la"),
        ([TINY, "--gpu", "a100", "--measured", "nothing.json"], "nothing.json: No such file"),
        ([TINY, "--gpu", "a100", "--measured", "benchmarks/results/plan.json"], "results of plan, which say nothing"),
        ([TINY, TINY, "--gpu", "a100"], "one configuration file is wanted"),
    ],
)
def test_bad_input_ends_with_a_message(arguments, says, capsys):
    assert main(["forecast", *arguments]) == CONFIGURATION
    assert says in capsys.readouterr().err


def test_data_that_are_there_and_do_not_fit_are_refused(config):
    run = load_config(RunConfig, config, ["stream.global_batch=400"])
    with pytest.raises(PlanError, match="400"):
        read_facts(run)


def test_the_table_of_devices_is_that_of_the_page():
    page = Path("docs/forecast.md").read_text(encoding="utf-8")
    assert markdown_table() in page


def test_every_option_is_on_the_page():
    from alpro_launch.forecast.command import ForecastOptions

    page = Path("docs/forecast.md").read_text(encoding="utf-8")
    for name in ForecastOptions.model_fields:
        assert f"--{name.replace('_', '-')}" in page, name


def test_sources_have_the_steps_that_the_run_gives_them(config):
    def kinds(*overrides):
        return read_facts(load_config(RunConfig, config, overrides)).data.kinds

    assert kinds() == {"video": 0.75, "image": 0.25}
    assert kinds("stream.mix=alternate") == {"video": 0.5, "image": 0.5}
    sources = [{**one, "weight": weight} for one, weight in zip(sources_of(config), (1, 9), strict=True)]
    weighted = ["stream.mix=weights", f"stream.sources={json.dumps(sources)}"]
    assert kinds(*weighted) == {"video": 0.1, "image": 0.9}
    elsewhere = [{**one, "path": "nowhere"} for one in sources]
    assert kinds("stream.mix=weights", f"stream.sources={json.dumps(elsewhere)}") == {"video": 0.1, "image": 0.9}


def sources_of(config):
    return yaml.safe_load(Path(config).read_text())["stream"]["sources"]


def test_a_sample_of_the_data_may_be_less_than_a_batch(config):
    run = load_config(RunConfig, config, ["stream.global_batch=1000", "stream.num_lanes=1"])
    with pytest.raises(PlanError, match="less than one global batch"):
        read_facts(run)
    found = read_facts(run, samples=5000).data
    assert (found.steps_per_epoch, sum(found.kinds.values())) == (5, pytest.approx(1))
    assert found.clip_bytes is not None
