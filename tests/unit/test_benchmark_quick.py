"""The code of the benchmarks, at sizes that tell nothing about speed: that it runs, and that each row has its limit."""

import argparse
import io
import json
import statistics
import sys
import time
from contextlib import closing, nullcontext
from pathlib import Path

import pytest
from stream_jpegs import jpeg, waves

from alpro_stream.config import validate
from alpro_stream.errors import AlproError, ConfigError
from alpro_stream.model.alpro import ModelConfig
from alpro_stream.run import RunConfig
from alpro_stream.testing.configs import TINY_MODEL, tiny_run, write_corpus
from alpro_stream.testing.shards import write_dataset, write_tokenizer
from alpro_stream.train.rehearsal import made_up_batch
from benchmarks import (
    decode,
    demo,
    end_to_end,
    evaluate,
    forecast,
    plan,
    prompter,
    search,
    settings,
    shard,
    shard_worker,
    step,
    stream,
    timing,
)
from benchmarks.harness import Measurement
from benchmarks.timing import copy_rate, loopback_rate, read_seconds, write_seconds

CLIP = Path(__file__).resolve().parents[2] / "examples/clips/videos/v050.mp4"
TINY = validate(ModelConfig, TINY_MODEL, source="test")


def limits(rows):
    return {row.name: row.limit_of for row in rows if row.limit is not None}


def test_clocks_of_memory_link_and_disk(tmp_path):
    assert copy_rate(1000, count=2) > 0
    assert loopback_rate(1000, count=2) > 0
    path = tmp_path / "plain"
    num_bytes = timing._BLOCK_BYTES + 5
    assert write_seconds(path, num_bytes) > 0
    assert path.stat().st_size == num_bytes
    assert read_seconds([path, path]) > 0


def test_prompter(monkeypatch):
    monkeypatch.setattr(prompter, "memory_rows", lambda exchanges: [])
    monkeypatch.setattr(prompter, "STEPS_OF_A_SAMPLE", 1)
    monkeypatch.setattr(prompter, "matrix_product_rate", lambda *arguments: 1e9)
    arguments = argparse.Namespace(model="small", batch=2, precision="fp32", compile=False, exchanges=20, quick=True)
    rows = prompter.rows(arguments)
    assert limits(rows) == {
        **{f"step, {name}": "matrix product" for name in ("without labels", "inline", "process")},
        "labels, inline": "matrix product",
        "labels, process": "matrix product",
        "handing a batch over": "memory copy",
    }
    found = {row.name: row for row in rows}
    both = found["step, without labels"].limit + found["labels, inline"].limit
    assert found["step, inline"].limit == pytest.approx(both)
    assert found["labels, inline"].limit > 0
    content = prompter._describe(arguments)
    assert {name: content[name] for name in ("model", "image_size", "width", "batch", "precision", "compiled")} == {
        "model": "small",
        "image_size": 32,
        "width": 64,
        "batch": 2,
        "precision": "fp32",
        "compiled": False,
    }


def test_trainer_and_prompter_share_the_cores_that_there_are():
    assert [prompter.threads_of(count) for count in (1, 2, 3, 4, 8, 16)] == [
        (1, 1),
        (2, 1),
        (3, 1),
        (3, 1),
        (6, 2),
        (12, 4),
    ]


def test_evaluate(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "DEMO", tmp_path / "none")
    monkeypatch.setattr(evaluate, "ABLATION", tmp_path / "none")
    monkeypatch.setattr(evaluate, "QUICK_SIZE", 20)
    monkeypatch.setattr(evaluate, "matrix_product_rate", lambda: 1e9)
    rows = evaluate.rows(argparse.Namespace(quick=True))
    assert set(limits(rows).values()) == {"matrix product"}
    exact, reranked, rate, _ = rows
    assert exact.limit == pytest.approx(20 * 20 / rate.limit)
    assert reranked.limit == pytest.approx(2 * 20 * 16 / rate.limit)
    assert evaluate._describe(argparse.Namespace(quick=True))["captions"] == 20


def test_search(tmp_path, monkeypatch):
    monkeypatch.setattr(search, "ModelConfig", lambda: TINY)
    monkeypatch.setattr(search, "_NUM_CLIPS", 2000)
    rows = search._measure(tmp_path, repetitions=1)
    assert {"100,000 clips", "of which the text encoder", "of which the nearest rows"} <= limits(rows).keys()
    found = {row.name: row for row in rows}
    parts = found["of which the text encoder"].limit + found["of which the nearest rows"].limit
    assert found["100,000 clips"].limit == pytest.approx(parts)
    assert found["100,000 clips, float16"].limit < parts


def test_plan(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "SHARD_SIZE", 40)
    monkeypatch.setattr(plan, "GLOBAL_BATCH", 16)
    monkeypatch.setattr(plan, "NUM_LANES", 4)
    plan.write_tokenizer(tmp_path / "tokenizer")
    directory = plan.write_links(tmp_path / "large", 3)
    opened = plan.serve("open", directory, 0)
    assert opened["parse_s"] > 0
    assert opened["seconds"] > 0
    soaked = plan.serve("soak", directory, 6)
    assert soaked["raw_clips_per_s"] > 0
    monkeypatch.setattr(plan, "_ask", lambda what, *rest: {"open": opened, "soak": soaked}[what])
    assert limits(plan._open_rows(directory, 1)) == {"opening": "parsing the JSON"}
    assert limits(plan._soak_rows(directory, 96, None)) == {"clips of 64x64 through the loader": "raw libjpeg-turbo"}


def test_decode(monkeypatch):
    jpegs = [jpeg(waves(256, 256, number)) for number in range(4)] * decode.BATCH
    monkeypatch.setattr(decode, "open_corpus", lambda folder: None)
    monkeypatch.setattr(decode, "make_shards", lambda corpus: None)
    monkeypatch.setattr(decode, "open_stream", lambda shards: nullcontext((None, None)))
    monkeypatch.setattr(decode, "stored_frames", lambda maker, order: jpegs)
    monkeypatch.setattr(decode, "measure", lambda variants, repetitions: {n: one_of(v) for n, v in variants.items()})
    rows = decode.rows(argparse.Namespace(clips=None, quick=True))
    assert {row.name for row in rows if row.limit is None} == {"raw libjpeg-turbo"}
    assert limits(rows)["DALI"] == "raw DALI"
    assert all(row.details["CPU ms/clip"] > 0 for row in rows)


def one_of(variant):
    return Measurement((variant(),))


def test_stream(tmp_path, monkeypatch):
    write_dataset(tmp_path / "train", video_shards=(16, 16), num_frames=8, size=256)
    write_tokenizer(tmp_path / "tokenizer")
    monkeypatch.setattr(stream, "open_corpus", lambda folder: None)
    monkeypatch.setattr(stream, "make_shards", lambda clips, payload: tmp_path)
    rows = stream.rows(argparse.Namespace(clips=None, quick=True, only=[stream._RAW, stream._OURS]))
    assert limits(rows) == {stream._OURS: stream._RAW}
    assert all(row.value > 0 and row.details["CPU ms/clip"] > 0 for row in rows)


def test_the_stream_is_compared_round_by_round():
    found = {stream._OURS: Measurement((2.0, 8.0, 30.0)), "mosaic": Measurement((1.0, 2.0, 3.0))}
    answer = dict.fromkeys(stream._DETAILS, 1.0)
    *_, over = stream._rows(found, {name: [answer] for name in found})
    assert (over.name, over.value, over.spread, over.ok) == ("stream over mosaic", 4.0, 1.0, True)


def test_forecast(monkeypatch):
    monkeypatch.setattr(forecast, "_WARMUP_STEPS", 1)
    rows = forecast.rows(argparse.Namespace(quick=True, ranks=[1]))
    steps = limits(rows)
    assert set(steps) == {f"1 rank: {size.name}" for size in forecast._QUICK_CHECKED}
    errors = [row.details["error %"] for row in rows if row.name in steps]
    assert {row.name: row.value for row in rows[-2:]} == {
        "error, median": pytest.approx(statistics.median(errors)),
        "error, largest": max(errors),
    }
    with pytest.raises(ConfigError, match=r"--ranks 0: at least 1"):
        forecast.rows(argparse.Namespace(quick=True, ranks=[0]))


def test_demo(tmp_path):
    (tmp_path / "seconds.json").write_text(json.dumps({"shard": 5.0, "train": 60.0}))
    (tmp_path / "evaluation").mkdir()
    result = {"chance": {"recall_at_1": 2.0}, "metrics": {"vtc": {"text_to_video": {"recall_at_1": 50.0}}}}
    (tmp_path / "evaluation/result.json").write_text(json.dumps(result))
    rows = demo._rows(tmp_path, 400.0, 5.0)
    assert [(row.name, row.value, row.ok) for row in rows] == [
        ("whole demo", 400.0, False),
        ("shard", 5.0, None),
        ("train", 60.0, None),
        ("memory of all processes", 5.0, True),
        ("VTC text to video R@1", 50.0, None),
    ]
    assert rows[-1].ratio == 25


def test_settings_of_a_training(tmp_path, monkeypatch):
    corpus, config = write_corpus(tmp_path / "corpus"), tmp_path / "run.yaml"
    config.write_text(json.dumps(tiny_run(corpus, tmp_path / "unused")))
    monkeypatch.setattr(settings, "CONFIG", str(config))
    changed = "train.engine.num_micro_batches=2"
    variants = {settings.DEMO: settings.Variant(), changed: settings.Variant([changed])}
    monkeypatch.setattr(settings, "VARIANTS", variants)
    found = settings.rows(argparse.Namespace(quick=True))
    assert limits(found) == {settings.DEMO: settings.DEMO, changed: settings.DEMO}
    assert found[1].limit == found[0].value > 0
    assert all(row.details["GiB"] > 0.1 for row in found)


def test_a_setting_that_cannot_be_trained_is_said(tmp_path, monkeypatch):
    corpus, config = write_corpus(tmp_path / "corpus"), tmp_path / "run.yaml"
    config.write_text(json.dumps(tiny_run(corpus, tmp_path / "unused")))
    monkeypatch.setattr(settings, "CONFIG", str(config))
    monkeypatch.setattr(settings, "VARIANTS", {settings.DEMO: settings.Variant(["train.engine.zero_stage=7"])})
    with pytest.raises(AlproError, match=r"(?s)zero_stage=7 ended with status \d+: .*zero_stage"):
        settings.rows(argparse.Namespace(quick=True))


def test_parts_of_a_step_have_limits(tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    changes = {"task": "pretrain", "losses.pem.weight": 0}
    config = validate(RunConfig, tiny_run(corpus, tmp_path / "run", changes), source="test")
    batch = made_up_batch("video", 4, 2, (2, 48), 12, 20, 0)
    forward, backward, num_parameters = end_to_end.objective_costs(config, batch)
    assert 1.5 * forward < backward < 2.5 * forward
    assert num_parameters > 1000
    assert all(seconds > 0 for seconds in end_to_end.media_seconds(config, num_clips=4, num_frames=2))
    assert end_to_end.text_seconds(config, ["a red dog moves"] * 4) > 0


def rates(**extra):
    names = ["ffmpeg, all threads", "decoding, a command a core"]
    fast = {name: Measurement((4.0,)) for name in names}
    slow = {"ffmpeg, a command a core": Measurement((3.0,)), "decoding, all threads": Measurement((2.0,))}
    ours = {f"exact {shard._NUM_CORES}": 6.0, "exact 1": 3.0, f"keyframes {shard._NUM_CORES}": 60.0, **extra}
    return fast | slow | {name: Measurement((value,)) for name, value in ours.items()}


def test_sharding_is_beside_the_faster_way_of_ffmpeg_and_ray_data_where_it_is():
    alone = shard.rate_rows(rates(), Measurement((1.0,)))
    assert [row.ratio for row in alone] == [1.5, 15.0, 1.5, 2.0, None]
    assert all(row.ok for row in alone if row.target)
    both = shard.rate_rows(rates(**{"plain Ray Data": 2.0}), Measurement((1.0,)))
    assert [(row.name, row.value, row.limit) for row in both[len(alone) :]] == [
        ("plain Ray Data", 2.0, 4.0),
        ("exact over plain Ray Data", 3.0, None),
    ]


PEER = """
import json, sys
print("ready", flush=True)
for line in sys.stdin:
    print(json.dumps({"num_tars": int(len(sys.argv) > 3)}), flush=True)
"""


def test_ray_data_is_asked_where_it_is_installed(tmp_path, monkeypatch, capsys):
    clips = [tmp_path / "clips" / "1.mp4", tmp_path / "clips" / "2.mp4"]
    monkeypatch.setattr(shard, "PEERS_PYTHON", tmp_path / "peers/.venv/bin/python")
    assert shard._start_ray_data(clips, tmp_path / "out") is None
    assert "needs `make peers`" in capsys.readouterr().err
    shard.PEERS_PYTHON.parent.mkdir(parents=True)
    shard.PEERS_PYTHON.symlink_to(sys.executable)
    assert shard._start_ray_data(clips, tmp_path / "out") is None, "it ends at once"
    assert "`make peers` again may help" in capsys.readouterr().err
    (tmp_path / "peers/ray_data_tars.py").write_text(PEER)
    peer = shard._start_ray_data(clips, tmp_path / "out")
    assert peer.rate() > 0
    peer.close()
    assert peer._process.returncode == 0
    (tmp_path / "peers/ray_data_tars.py").write_text(PEER.replace("> 3", "> 9"))
    with closing(shard._start_ray_data(clips, tmp_path / "out")) as peer, pytest.raises(AlproError, match="nothing"):
        peer.rate()


def test_shards_are_made_as_by_a_worker_of_ray(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("shard\nshard\n"))
    shard_worker.serve({"clips": [str(CLIP)], "out": str(tmp_path), "sampling": "keyframes"})
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["num_samples"] for answer in answers] == [1, 1]
    assert all(0 < answer["write_share"] < 1 for answer in answers)


def test_the_ffmpeg_command_runs_both_ways(tmp_path):
    assert shard._ffmpeg_rate([CLIP], 1, shard._AS_JPEGS) > 0
    assert shard._ffmpeg_rate([CLIP], 2, shard._NOWHERE) > 0


def test_step_of_toy_size_has_parts_and_a_ratio():
    worker = step.Step(argparse.Namespace(batch=2, precision="fp32", small=True, compile=False))
    sample = worker.sample(worker.ours)
    assert sample["rate"] > 0
    assert sample["ratio"] > 0
    # Of the prompter's encoder, which is no part of the model's.
    next(worker.prompter.video_encoder.children()).register_forward_pre_hook(lambda *_: time.sleep(2))
    seconds = {name: part for name, (part, _) in worker.parts().items()}
    assert set(seconds) == {"video encoder", "text encoder", "fusion", "losses", "backward", "prompter"}
    assert all(part > 0 for part in seconds.values()), "what the losses take is a difference"
    assert seconds["prompter"] > 2 > seconds["video encoder"]
