"""`alpro inspect`: how a data set would be mixed, and where a run goes on."""

import json
import shutil
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from page_files import Page
from stream_parts import open_maker, stream_config

from alpro_launch.cli import main as alpro
from alpro_launch.inspection import inspect
from alpro_launch.page_parts import loss_curves, speed_curves, totals
from alpro_launch.page_pictures import clip_examples
from alpro_launch.shuffle_view import shuffle_view
from alpro_launch.training_page import write_training_page
from alpro_stream.config import load_config, save_config, validate
from alpro_stream.exit_status import CONFIGURATION, DATA
from alpro_stream.losses.objective import same_pairs
from alpro_stream.run import RunConfig, run_entities, train
from alpro_stream.shards import DatasetInfo, Sample, ShardWriter, save_dataset_info
from alpro_stream.shards.layout import tar_path
from alpro_stream.stream.clips import build_clip_decoder
from alpro_stream.stream.mixing import MixingConfig
from alpro_stream.stream.plan import PLAN_VERSION
from alpro_stream.stream.quarantine import Failure, Occurrence
from alpro_stream.testing.configs import tiny_run, write_corpus
from alpro_stream.testing.shards import sample, write_dataset, write_tokenizer
from alpro_stream.train import restore
from alpro_stream.train.restore import ensure_bank


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def run_dir(corpus, tmp_path_factory):
    """A run of four steps with a checkpoint half way; a pass is four steps, one of them of images."""
    run_dir = tmp_path_factory.mktemp("run")
    changes = {"train.max_steps": 4, "train.checkpoint_every": 2}
    train(validate(RunConfig, tiny_run(corpus, run_dir, changes), source="test"))
    return run_dir


@pytest.fixture
def checkpoint(run_dir, tmp_path):
    """A copy of the one half way, to be changed."""
    return shutil.copytree(run_dir / "checkpoints/step-000002", tmp_path / "step-000002")


def change(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_a_checkpoint_says_where_exactly_its_run_goes_on(checkpoint):
    goes_on = inspect(checkpoint)["goes_on"]
    stream = load_config(RunConfig, checkpoint / "config.yaml").stream
    maker, plan = open_maker(stream)
    with closing(maker):
        batch = maker.make(plan, 2, range(plan.num_lanes))
    assert goes_on["next_keys"] == list(batch.keys[:8])
    source, pass_index, step_in_pass = plan.place(2)
    assert (goes_on["step"], goes_on["epoch"], goes_on["skipped"]) == (2, 0, [])
    assert (goes_on["source"], goes_on["pass"], goes_on["step_in_pass"]) == (batch.source, pass_index, step_in_pass)
    assert maker.sources[source].name == batch.source
    assert goes_on["data"] == "unchanged"
    assert goes_on["summary"].startswith("the run goes on from exactly where it stopped, with step 2, which is step")


def test_steps_that_are_left_out_are_not_the_next(checkpoint):
    change(checkpoint / "config.yaml", "skip_steps: []", "skip_steps: [[2, 3]]")
    change(checkpoint / "state.json", '"skipped": []', '"skipped": [[0, 1]]')
    goes_on = inspect(checkpoint)["goes_on"]
    assert (goes_on["step"], goes_on["skipped"]) == (3, [[0, 1]])


def test_a_run_lists_its_checkpoints_and_means_the_newest(run_dir):
    view = inspect(run_dir)
    assert view["checkpoints"] == ["step-000002", "step-000004"]
    assert view["checkpoint"].endswith("step-000004")
    assert view["goes_on"]["step"] is None
    assert view["goes_on"]["summary"] == "the run is finished: nothing is left to do"
    assert view["bottleneck"].startswith("bottleneck: ")
    assert view["quarantine"]["num"] == 0
    assert view["fingerprint"]["seed"] == 42


def text_of(path):
    return "".join(Page(path.read_text(encoding="utf-8")).text)


def section(path, name):
    html = path.read_text(encoding="utf-8")
    start = html.index(f'<section id="{name}"')
    return "".join(Page(html[start : html.index("</section>", start) + len("</section>")]).text)


def test_the_page_of_a_run_on_the_command_line(run_dir, tmp_path, capsys):
    assert alpro(["inspect", str(run_dir), "--page"]) == 0
    assert capsys.readouterr().out == f"written: {run_dir / 'report.html'}\n"
    assert alpro(["inspect", str(run_dir), "--page", str(tmp_path / "new/page.html")]) == 0
    page = tmp_path / "new/page.html"
    text = text_of(page)
    assert "Training of the prompter, 4 of 4 steps; the last one on" in text
    for shown in ("VTC", "Clips per second", "Waiting for data", "Learning rate", "Norm of the gradient", "deepspeed"):
        assert shown in text
    for checkpoint in ("step-000002", "step-000004"):
        assert checkpoint in section(page, "checkpoints")
    assert "checkpoint_every: 2" in section(page, "setup")
    assert "Pseudo-labels" not in text
    assert [path.name for path in page.parent.iterdir()] == ["page.html"]


@pytest.fixture
def unfinished(run_dir, tmp_path):
    """A run that has come to no checkpoint, while a line of its metrics is being written."""
    folder = tmp_path / "unfinished"
    folder.mkdir()
    (folder / ".lock").touch()
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()[:3]
    (folder / "metrics.jsonl").write_text("\n".join(lines)[:-20])
    return folder


def test_a_run_without_a_checkpoint_is_described_and_has_a_page(unfinished):
    assert inspect(unfinished)["checkpoints"] == []
    assert inspect(unfinished)["last_step"] == 2
    page = write_training_page(unfinished)
    assert "Training, 2 steps; the last one on" in text_of(page)
    assert "VTC" in section(page, "losses")
    assert "none yet" in section(page, "checkpoints")
    (unfinished / "metrics.jsonl").unlink()
    assert inspect(unfinished)["last_step"] is None
    assert "Training, before its first step." in text_of(write_training_page(unfinished))


def test_the_page_has_what_the_metrics_have_and_what_was_dropped(unfinished, run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    lines[1] |= {"validation/vtc": 2.5, "pem/entropy": 1.25, "pem/top_entities": "dog 41 %, cat 3 %"}
    lines.append({"step": 5, "validation/text_to_video_r1": 75.0})
    (unfinished / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    occurrence = Occurrence(7, 2, "video-000001", 3)
    dropped = Failure(occurrence, "video", "", 0, "video-000001:3 video-9", "decode", "frame 2 is no JPEG", "tar:1 key")
    (unfinished / "quarantine").mkdir()
    # The substitute could not be used either, and the run was killed while it wrote another one down.
    again = replace(dropped, cause="crash", place="tar:1 key", substitute=None)
    record = f"{dropped.to_json()}\n{again.to_json()}\n{dropped.to_json()[:40]}"
    (unfinished / "quarantine/rank-00000.jsonl").write_text(record)
    page = write_training_page(unfinished)
    assert "text to video r1" in section(page, "validation")
    assert "75.0" in section(page, "validation")
    assert "Entropy" in section(page, "entities")
    assert "dog 41 %, cat 3 %" in text_of(page)
    where = section(page, "dropped")
    assert "step 7, row 2: video-000001:3 video-9" in where
    assert "frame 2 is no JPEG" in where
    assert "crash" not in where


def test_a_page_of_something_else_is_refused(checkpoint, corpus, capsys):
    for path in (checkpoint, corpus / "train"):
        assert alpro(["inspect", str(path), "--page"]) == CONFIGURATION
        assert f"{path} is not the folder of a run" in capsys.readouterr().err
        assert not (path / "report.html").exists()


def test_another_version_of_the_program_costs_what_it_wrote_alone(run_dir, tmp_path):
    copy = shutil.copytree(run_dir, tmp_path / "copy")
    for file in ("checkpoints/step-000004/config.yaml", "config.yaml"):
        change(copy / file, "checkpoint_every", "checkpoint_often")
    change(copy / "checkpoints/step-000004/state.json", '"format_version": ', '"format_version": 9')
    page = write_training_page(copy)
    assert "checkpoint_often: 2" in section(page, "setup")
    assert "VTC" in section(page, "losses")


@pytest.fixture(scope="module")
def pretraining(corpus, run_dir, tmp_path_factory):
    """The folder of a pre-training before its first step, labelled by the run above."""
    folder = tmp_path_factory.mktemp("pretraining")
    changes = {"task": "pretrain", "prompter.checkpoint": str(run_dir), "prompter.num_entities": 20}
    config = validate(RunConfig, tiny_run(corpus, folder, changes), source="test")
    (folder / ".lock").touch()
    save_config(config, folder / "config.yaml")
    return config


def test_clips_are_those_of_the_whole_batches_with_their_crops(pretraining):
    config = pretraining
    examples = clip_examples(config, 16)
    maker, plan = open_maker(config.stream)
    video = config.model.video
    maker.decoder.close()
    decoder = build_clip_decoder(config.stream.decode, video.image_size, 8 * video.num_frames, None)
    maker = replace(maker, image_size=video.image_size, patch_size=video.patch_size, decoder=decoder)
    num_clips = plan.steps_per_epoch * 8
    with closing(maker):
        batches = [maker.make(plan, step, range(plan.num_lanes)) for step in range(plan.steps_per_epoch)]
    keys = [key for batch in batches for key in batch.keys]
    boxes = [box for batch in batches for box in batch.boxes_B4.tolist()]
    chosen = [int((i + 0.5) * num_clips / 16) for i in range(16)]
    assert [example.id for example in examples] == [keys[index] for index in chosen]
    grid = video.image_size // video.patch_size
    found = [[example.box.top * grid, example.box.left * grid] for example in examples]
    assert found == [pytest.approx(boxes[index][:2]) for index in chosen]
    assert {len(example.frames) for example in examples} == {1, 2}
    assert all(0 < example.entities[0].probability <= 1 for example in examples)
    assert not (config.run_dir / "prompter").exists()


def test_the_prompt_bank_of_a_run_serves_its_page(pretraining, tmp_path, monkeypatch):
    config = pretraining.model_copy(update={"run_dir": tmp_path})
    prompter = config.prompter.checkpoint
    bank = ensure_bank(
        prompter, run_entities(config.prompter, config.stream), tmp_path / "prompter", torch.device("cpu")
    )
    monkeypatch.setattr(restore, "write_bank", None)
    assert len(clip_examples(config, 1)) == 1
    assert [*bank.parent.iterdir()] == [bank]


def test_the_page_of_a_pretraining_shows_its_pseudo_labels_while_data_and_prompter_are_there(
    pretraining, run_dir, tmp_path
):
    folder = pretraining.run_dir
    shown = Page(write_training_page(folder).read_text(encoding="utf-8"))
    assert len(shown.all("article", **{"class": "clip"})) == 10
    for there in (str(pretraining.stream.sources[0].path), str(run_dir)):
        gone = shutil.copytree(folder, tmp_path / Path(there).name)
        change(gone / "config.yaml", there, "/no/such/place")
        text = section(write_training_page(gone), "entities")
        assert "not shown: " in text
        assert "/no/such/place" in text


def test_figures_of_a_run_count_each_step_by_its_time():
    lines = [
        {"step": 10, "step_s": 1.0, "clips_per_s": 8.0, "data_wait_percent": 50.0},
        {"step": 20, "step_s": 3.0, "clips_per_s": 4.0, "data_wait_percent": 10.0, "loss/vtc": float("nan")},
        {"step": 20, "validation/vtc": 1.0},
    ]
    found = totals(lines)
    assert (found.num_steps, found.seconds, found.clips_per_s) == (20, 40.0, 5.0)
    assert (found.data_wait, found.prompter_wait, found.mfu) == (0.2, None, None)
    assert totals([]).clips_per_s is None
    assert [curve.name for curve in speed_curves(lines)] == ["Clips per second", "Waiting for data", "Time of a step"]
    (curve,) = loss_curves(lines, "ALPRO", None)
    assert (curve.steps, curve.reference) == ((20,), None)


def test_data_that_is_gone_costs_the_keys_alone(checkpoint, corpus):
    change(checkpoint / "config.yaml", str(corpus), "/no/such/corpus")
    view = inspect(checkpoint)
    assert view["goes_on"]["data"].startswith("not found: ")
    assert "/no/such/corpus" in view["goes_on"]["data"]
    assert view["goes_on"]["next_keys"] is None
    assert view["goes_on"]["summary"] == "the run stopped before step 2, and cannot go on until its data are there"
    assert (view["goes_on"]["step"], view["cursor"]["step"], view["task"]) == (2, 2, "prompter")


def test_shards_that_are_gone_cost_the_keys_alone(checkpoint, corpus, tmp_path):
    moved = shutil.copytree(corpus, tmp_path / "moved")
    for path in [*moved.glob("train/*.tar"), *moved.glob("train/*.idx")]:
        path.unlink()
    change(checkpoint / "config.yaml", str(corpus / "train"), str(moved / "train"))
    goes_on = inspect(checkpoint)["goes_on"]
    assert goes_on["source"] in ("video", "image")
    assert goes_on["next_keys"] is None
    assert goes_on["data"].startswith("not found: ")


def test_other_data_in_its_place_is_told_by_both_digests(checkpoint, corpus, tmp_path):
    info = write_dataset(tmp_path / "train", video_shards=(5, 9, 1, 9), image_shards=(9,), size=32)
    change(checkpoint / "config.yaml", str(corpus / "train"), str(tmp_path / "train"))
    view = inspect(checkpoint)
    before = view["fingerprint"]["sources"]["0"]["dataset"]
    assert f"source video: dataset: {before!r} != {info.digest!r}" in view["goes_on"]["data"]
    assert view["goes_on"]["next_keys"] is None
    assert "does not go on from there" in view["goes_on"]["summary"]


def test_an_order_of_another_version_gives_no_keys(checkpoint):
    change(checkpoint / "state.json", f'"plan_version": {PLAN_VERSION}', '"plan_version": 99')
    goes_on = inspect(checkpoint)["goes_on"]
    assert f"99 != {PLAN_VERSION}" in goes_on["data"]
    assert goes_on["next_keys"] is None


def related_sample(number):
    """Three samples of each source video, two captions each, of 20 in all."""
    made = sample(number, "video", 2, 32)
    captions = (f"a red dog {number % 10}", f"A blue cat {number % 10} ")
    source = {"media": f"{number}.mp4", "sha256": f"digest {number // 3}"}
    return Sample(replace(made.metadata, captions=captions, source=source), made.frames)


@pytest.fixture(scope="module")
def related(tmp_path_factory):
    root = tmp_path_factory.mktemp("related")
    infos = []
    (root / "train").mkdir()
    for shard in range(4):
        with ShardWriter(root / "train", f"video-{shard:06d}", "video") as writer:
            for number in range(12 * shard, 12 * shard + 12):
                writer.add(related_sample(number))
            infos.append(writer.close())
    save_dataset_info(root / "train", DatasetInfo.of_shards("train", {"frames": {"size": 32}}, infos))
    write_tokenizer(root / "tokenizer")
    return root


@pytest.mark.parametrize("unit", ["clip", "caption"])
@pytest.mark.parametrize("is_plain", [True, False])
def test_masked_pairs_are_those_that_training_masks(related, tmp_path, unit, is_plain):
    (tmp_path / "exclude.txt").write_text("video-00003\nvideo-00030\n")
    source = {} if is_plain else {"kind": "video", "name": "web", "exclude": str(tmp_path / "exclude.txt")}
    changes = {"global_batch": 8, "num_lanes": 4, "window_shards": 2, "seed": 42}
    settings = validate(MixingConfig, {**changes, **source, "unit": unit}, "test")
    (view,) = shuffle_view(related / "train", settings)["sources"]
    assert view["num_units"] == (48 if is_plain else 46) * (1 if unit == "clip" else 2)
    sources = [{"path": related / "train", **source}]
    decode = {"num_workers": 1, "num_processes": 1}
    config = stream_config(related, **changes, sources=sources, unit=unit, decode=decode)
    maker, plan = open_maker(config)
    videos, texts = [], []
    with closing(maker):
        for step in range(plan.steps_per_pass[0]):
            batch = maker.make(plan, step, range(4))
            # Against names that are all different only one of the two masks counts.
            alone = batch.video_id_B.new_tensor(range(8))
            videos.append(int(same_pairs(batch.video_id_B, alone).triu(1).sum()))
            texts.append(int(same_pairs(alone, batch.text_id_B).triu(1).sum()))
    assert view["same_video_in_a_batch"]["pairs_mean"] == sum(videos) / len(videos) > 0
    assert view["same_text_in_a_batch"]["pairs_mean"] == sum(texts) / len(texts) > 0
    assert view["same_text_in_a_batch"]["pairs_largest"] == max(texts)


def test_shuffle_on_the_command_line(related, capsys):
    assert alpro(["inspect", str(related / "train"), "--shuffle", "window_shards=1", "global_batch=10", "ranks=5"]) == 0
    view = json.loads(capsys.readouterr().out)
    (source,) = view["sources"]
    assert (source["num_units"], source["num_shards"]) == (48, 4)
    assert (source["global_batch"], source["num_lanes"], source["steps_per_pass"]) == (10, 5, 4)
    assert source["left_over_a_pass"]["num"] == 8
    assert source["left_over_a_pass"]["percent"] == pytest.approx(100 * 8 / 48, abs=0.001)
    assert "smaller global_batch" in source["left_over_a_pass"]["verdict"]
    assert "raise window_shards (now 1 of 4 shards)" in source["neighbours_kept"]["verdict"]
    assert source["files_a_rank"]["ranks"] == 5
    assert 1 <= source["files_a_rank"]["in_a_step"] <= 2


def test_each_kind_is_measured_with_what_fits(corpus):
    views = shuffle_view(corpus / "train", MixingConfig())["sources"]
    assert [(view["name"], view["global_batch"], view["num_lanes"]) for view in views] == [
        ("video", 24, 12),
        ("image", 8, 4),
    ]


def test_damaged_samples_are_left_out_and_counted(related, tmp_path):
    directory = shutil.copytree(related / "train", tmp_path / "train")
    path = tar_path(directory, "video-000001")
    path.write_bytes(path.read_bytes().replace(b'{"id": "video-00013"', b'{"id"; "video-00013"'))
    (view,) = shuffle_view(directory, MixingConfig())["sources"]
    assert view["same_text_in_a_batch"]["unreadable_samples"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["window_shards=2"], "window_shards=2: settings of the order need --shuffle"),
        (["--shuffle", "window_shard=2"], "did you mean 'window_shards'"),
        (["--shuffle", "ranks=5"], "5 ranks do not divide the"),
        (["--shuffle", "global_batch=100"], "the largest batch that fits"),
        (["--shuffle", "unit=question"], "source 'video' has 0 questions in its 48 samples; set another stream.unit"),
        (["--shuffle", "kind=image"], "has no image shards"),
        (["--shuffle", "exclude=no/such.txt"], "no/such.txt cannot be read as an exclude list"),
    ],
)
def test_mistakes_are_one_clear_message(related, capsys, arguments, message):
    assert alpro(["inspect", str(related / "train"), *arguments]) == (
        DATA if "exclude list" in message else CONFIGURATION
    )
    assert message in capsys.readouterr().err


def test_shuffle_of_something_else_is_refused(tmp_path: Path, capsys):
    assert alpro(["inspect", str(tmp_path), "--shuffle"]) == DATA
    assert f"{tmp_path} is empty; expected shards" in capsys.readouterr().err
