"""Trying failed rows again and appending a second manifest: the result is that of one undisturbed run."""

import json
import shutil

import pytest
from media_files import constant_rate, write_image, write_video
from shard_runs import (
    config_of,
    contents,
    failures_of,
    refuse_invalid_tars,
    run_here,
    samples_of,
    temporaries,
    times_of_tars,
    write_manifest,
)

from alpro_sharding import shard as shard_on_ray
from alpro_sharding.worker import make_shard
from alpro_stream.errors import ShardError
from alpro_stream.shards import load_dataset_info, load_entities
from alpro_stream.shards.storage import temporary_beside


def shard(config, **options):
    return shard_on_ray(config, run=run_here, **options)


def row(name, caption="a dog on the grass", **fields):
    return {"id": name.partition(".")[0], "media": name, "captions": [caption], **fields}


@pytest.fixture
def media(tmp_path):
    """A folder with six clips and two pictures, every one of other bytes."""
    folder = tmp_path / "media"
    folder.mkdir()
    for number in range(6):
        write_video(folder / f"clip{number}.mp4", constant_rate(6 + number, 4))
    write_image(folder / "red.png")
    write_image(folder / "blue.png", (10, 20, 200))
    return folder


@pytest.fixture
def manifest(media):
    names = [*(f"clip{number}.mp4" for number in range(6)), "red.png", "blue.png"]
    return write_manifest(media / "manifest.jsonl", *(row(name) for name in names))


@pytest.fixture
def straight(manifest, tmp_path):
    """The digests of a run in which nothing was missing."""
    shard(config_of(manifest, tmp_path / "straight/out"))
    return contents(tmp_path / "straight/out")


def hide(*paths):
    for path in paths:
        path.rename(path.with_name(f"{path.name}.hidden"))


def show(*paths):
    for path in paths:
        path.with_name(f"{path.name}.hidden").rename(path)


def test_rows_that_failed_are_tried_again_and_only_their_shards_are_written(media, manifest, straight, tmp_path):
    missing = [media / name for name in ("clip1.mp4", "clip4.mp4", "clip5.mp4", "blue.png")]
    out = tmp_path / "out"
    config = config_of(manifest, out)
    hide(*missing)
    assert shard(config).num_failures == 4
    before, times = contents(out), times_of_tars(out)
    assert sorted(times) == [f"train/{name}.tar" for name in ("image-000000", "video-000000", "video-000001")]
    # Without being asked it leaves them, and tried again in vain they leave no trace.
    show(*missing[:2])
    shard(config)
    assert (contents(out), times_of_tars(out)) == (before, times)
    hide(*missing[:2])
    shard(config, retry_failed=True)
    assert (contents(out), times_of_tars(out)) == (before, times)

    show(*missing)
    # What was once read is not needed again: these samples are taken over from the tars.
    hide(media / "clip0.mp4", media / "red.png", media / "clip2.mp4")
    summary = shard(config, retry_failed=True)
    assert contents(out) == straight
    assert (summary.num_samples, summary.num_failures) == (8, 0)
    assert times_of_tars(out)["train/video-000001.tar"] == times["train/video-000001.tar"]
    assert not temporaries(out)


def test_rows_that_a_filter_left_out_are_not_tried_again(media, manifest, tmp_path):
    config = config_of(manifest, tmp_path / "out", filters={"min_duration_s": 1.6})
    hide(media / "clip1.mp4")
    shard(config)
    assert [(f["id"], f["stage"]) for f in failures_of(tmp_path / "out")] == [("clip0", "filter"), ("clip1", "probe")]
    show(media / "clip1.mp4")
    shutil.copy(media / "clip5.mp4", media / "clip0.mp4")  # it would pass now
    shard(config, retry_failed=True)
    assert [(f["id"], f["stage"]) for f in failures_of(tmp_path / "out")] == [("clip0", "filter")]


class Killed(BaseException):
    """Stands for the end of a process: nothing of the library catches it."""


def die_at(monkeypatch, name):
    """The process ends just before the first file of this name is published."""
    from alpro_sharding import worker
    from alpro_stream.shards import writer

    def dying(publish):
        def publish_or_die(*arguments):
            if arguments[-1 if publish.__name__ == "publish" else 0].name == name:
                raise Killed
            return publish(*arguments)

        return publish_or_die

    monkeypatch.setattr(writer, "publish", dying(writer.publish))
    for module in (writer, worker):
        monkeypatch.setattr(module, "publish_bytes", dying(module.publish_bytes))


def test_what_a_killed_worker_left_is_gone_when_another_has_done_its_work(manifest, straight, tmp_path):
    def run_after_a_death(tasks, num_workers, on_result, on_poll):
        for task in tasks:
            temporary_beside(task.directory / f"{task.planned.name}.tar").write_bytes(b"half of it")
            temporary_beside(task.note).write_bytes(b"half of it")
            task.note.with_suffix(".running").write_text("1")
            on_result(task, make_shard(task))

    shard_on_ray(config_of(manifest, tmp_path / "out"), run=run_after_a_death)
    assert contents(tmp_path / "out") == straight
    assert not temporaries(tmp_path / "out")


@pytest.mark.parametrize("retry_again", [False, True], ids=["plain rerun", "retried again"])
@pytest.mark.parametrize("suffix", ["tar", "idx", "hashes", "json"])
def test_killed_in_the_middle_of_a_retry(media, manifest, straight, tmp_path, monkeypatch, suffix, retry_again):
    config = config_of(manifest, tmp_path / "out")
    hide(media / "clip1.mp4")
    shard(config)
    show(media / "clip1.mp4")
    hide(media / "clip0.mp4")
    with monkeypatch.context() as patch:
        die_at(patch, f"video-000000.{suffix}")
        with pytest.raises(Killed):
            shard(config, retry_failed=True)
    refuse_invalid_tars(tmp_path / "out")
    if suffix != "tar":  # it is published, so its second sample needs no source either
        hide(media / "clip1.mp4")
    shard(config, retry_failed=retry_again)
    refuse_invalid_tars(tmp_path / "out")
    assert contents(tmp_path / "out") == straight
    assert not temporaries(tmp_path / "out")


def test_a_shard_whose_note_was_lost_is_completed_by_a_retry(media, manifest, straight, tmp_path):
    config = config_of(manifest, tmp_path / "out")
    shard(config)
    times = times_of_tars(tmp_path / "out")
    (tmp_path / "out/.ledger/train/video-000000.json").unlink()
    (tmp_path / "out/.ledger/train/video-000001.hashes").unlink()
    (tmp_path / "out/train/video-000002.idx").unlink()
    hide(*media.glob("clip*.mp4"))
    summary = shard(config, retry_failed=True)
    assert contents(tmp_path / "out") == straight
    assert summary.num_shards_reused == 1
    assert times_of_tars(tmp_path / "out")["train/image-000000.tar"] == times["train/image-000000.tar"]


# Appending


@pytest.fixture
def more(media):
    """A second manifest: new clips, an id of the first one, a copy of a clip, another split."""
    for number in range(3):
        write_video(media / f"late{number}.mp4", constant_rate(15 + number, 4))
    shutil.copy(media / "clip1.mp4", media / "copy.mp4")
    return write_manifest(
        media / "more.jsonl",
        row("late0.mp4", "a cat in a tree"),
        row("clip2.mp4", "used before"),
        row("copy.mp4", "a horse"),
        row("late1.mp4", "a dog on  the GRASS"),
        row("late2.mp4", "a cat at night", split="val"),
        row("lost.mp4"),
    )


def test_a_second_manifest_is_appended(manifest, more, straight, tmp_path):
    out = tmp_path / "out"
    first, second = config_of(manifest, out), config_of(more, out, append=True)
    shard(first)
    times = times_of_tars(out)
    with pytest.raises(ShardError, match=r"of another manifest: 'manifest.jsonl' \(8 rows.*now 'more.jsonl' \(6 rows"):
        shard(config_of(more, out))
    assert contents(out) == straight

    summary = shard(second)
    both = contents(out)
    assert (summary.num_rows, summary.num_samples, summary.num_failures) == (14, 12, 2)
    info = load_dataset_info(out / "train")
    videos = [f"video-{number:06d}" for number in range(5)]
    assert [shard.name for shard in info.shards] == [*videos, "image-000000"]
    assert [metadata.id for metadata, _ in samples_of(out / "train")] == [
        *(f"clip{number}" for number in range(6)),
        "late0",
        "copy",
        "late1",
        "red",
        "blue",
    ]
    assert [metadata.id for metadata, _ in samples_of(out / "val")] == ["late2"]
    assert times.items() <= times_of_tars(out).items()
    assert [(f["manifest"], f["line"], f["id"], f["stage"]) for f in failures_of(out)] == [
        ("more.jsonl", 2, "clip2", "manifest"),
        ("more.jsonl", 6, "lost", "probe"),
    ]
    assert "in this shard set already, from an earlier manifest" in failures_of(out)[0]["reason"]
    # Entities are counted over both, and what the second repeats of the first is listed.
    assert load_entities(out / "train/entities.json") == [
        ("dog", 9),
        ("grass", 9),
        ("cat", 1),
        ("horse", 1),
        ("tree", 1),
    ]
    assert "copy # same media as clip1" in (out / "train/duplicate_media.txt").read_text()
    assert "late1 # same captions as clip0" in (out / "train/duplicate_captions.txt").read_text()

    # Either command, given again, makes nothing.
    times = times_of_tars(out)
    for config in (second, first):
        shard(config)
        assert (contents(out), times_of_tars(out)) == (both, times)


def test_killed_while_it_appends(manifest, more, tmp_path):
    whole, out = tmp_path / "whole/out", tmp_path / "out"
    for folder in (whole, out):
        shard(config_of(manifest, folder))
    shard(config_of(more, whole, append=True))

    def run_until_the_second(tasks, num_workers, on_result, on_poll):
        for number, task in enumerate(tasks):
            if number == 1:
                raise Killed
            on_result(task, make_shard(task))

    with pytest.raises(Killed):
        shard_on_ray(config_of(more, out, append=True), run=run_until_the_second)
    assert len(times_of_tars(out)) == 5
    # A third manifest has to wait, for its numbers follow those of the second.
    third = write_manifest(more.with_name("third.jsonl"), row("late0.mp4", id="third"))
    with pytest.raises(ShardError, match=r"shards of 'more.jsonl' are not all made; finish that manifest first"):
        shard(config_of(third, out, append=True))
    shard(config_of(more, out, append=True))
    assert contents(out) == contents(whole)
    assert not temporaries(out)


def test_what_failed_in_either_manifest_can_be_tried_again(media, manifest, more, tmp_path):
    whole, out = tmp_path / "whole/out", tmp_path / "out"
    shutil.copy(media / "late0.mp4", media / "lost.mp4")
    shard(config_of(manifest, whole))
    shard(config_of(more, whole, append=True))
    hide(media / "clip3.mp4", media / "lost.mp4")
    shard(config_of(manifest, out))
    shard(config_of(more, out, append=True))
    show(media / "clip3.mp4", media / "lost.mp4")
    shard(config_of(more, out, append=True), retry_failed=True)
    assert contents(out) != contents(whole)
    shard(config_of(manifest, out), retry_failed=True)
    made, expected = contents(out), contents(whole)
    # The dataset card names the manifest of the last command.
    assert {name: digest for name, digest in made.items() if name != "README.md"} == {
        name: digest for name, digest in expected.items() if name != "README.md"
    }


def test_the_first_manifest_is_not_appended_to_itself(manifest, tmp_path):
    shard(config_of(manifest, tmp_path / "out"))
    before = contents(tmp_path / "out")
    shard(config_of(manifest, tmp_path / "out", append=True))
    assert contents(tmp_path / "out") == before
    assert [json.loads(path.read_text())["number"] for path in (tmp_path / "out/.ledger/_parts").glob("*.json")] == [0]
