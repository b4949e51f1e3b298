"""Indexes: every clip once with its feature, whoever made which part, and after every kind of interruption."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from search_files import NUM_CLIPS, NUM_SHARDS, embed, embed_config, make_root, write_tiny_model

from alpro_launch.cli import main as alpro
from alpro_stream.config import save_config
from alpro_stream.errors import AlproError, CheckpointError, ConfigError, PlanError, ShardError
from alpro_stream.evaluate.embed import embed_videos, evenly_spread, stored_clips
from alpro_stream.evaluate.index import Index
from alpro_stream.evaluate.index_clips import IndexClips
from alpro_stream.evaluate.index_files import (
    begin_index,
    part_path,
    read_description,
    write_description,
    write_part,
)
from alpro_stream.exit_status import HARDWARE
from alpro_stream.media import FrameConfig
from alpro_stream.model.folder import write_model
from alpro_stream.shards.layout import DatasetInfo, save_dataset_info
from alpro_stream.shards.storage import temporary_beside
from alpro_stream.shards.writer import ShardWriter
from alpro_stream.stream.clips import build_clip_decoder
from alpro_stream.stream.decode import DecodeConfig
from alpro_stream.stream.sources import SourceConfig, open_sources
from alpro_stream.testing.shards import sample, write_dataset, write_tokenizer
from alpro_stream.train.restore import load_trained

PARTS = range(NUM_SHARDS)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_root(tmp_path_factory.mktemp("embed"))


@pytest.fixture
def root(made, tmp_path):
    """The same, to be changed."""
    for name in ("corpus", "model", "index"):
        shutil.copytree(made / name, tmp_path / name)
    # It names its sources by their absolute path.
    (tmp_path / "index/index.json").write_text(
        (made / "index/index.json").read_text().replace(str(made), str(tmp_path))
    )
    return tmp_path


def files_of(index: Path) -> dict[str, tuple[int, bytes]]:
    """Contents of all parts, and when they were written."""
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in sorted((index / "parts").iterdir())}


def spoil(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_every_clip_is_there_once_with_the_feature_of_its_model(made):
    index = Index(made / "index")
    clips = stored_clips(open_sources([SourceConfig(path=str(made / "corpus/train"))]))
    trained = load_trained(made / "model", torch.device("cpu"))
    decoder = build_clip_decoder(DecodeConfig(num_workers=0), 48, 8, None)
    videos = embed_videos(trained.dual, clips, evenly_spread(2, FrameConfig()), decoder, 4)
    decoder.close()

    assert len(index) == len(clips) == NUM_CLIPS
    rows = [index.row(number) for number in range(len(index))]
    assert [(row.source, row.shard, row.slot, row.key, row.captions) for row in rows] == [
        (clip.source.name, clip.shard, clip.slot, clip.key, clip.captions) for clip in clips
    ]
    assert {row.media for row in rows} == {f"{row.key}.mp4" for row in rows}
    features = torch.cat(index.features)
    assert torch.allclose(features, videos.feature_VE, atol=1e-6)
    assert torch.allclose(features.norm(dim=1), torch.ones(NUM_CLIPS), atol=1e-5)
    assert features.std(dim=0).min() > 1e-3, "a model that tells no clips apart would make this test blind"
    for number in (-1, NUM_CLIPS):
        with pytest.raises(IndexError):
            index.row(number)


def test_float16_takes_half_the_room(made, tmp_path):
    embed(made, out=tmp_path / "half", dtype="float16")
    half, whole = Index(tmp_path / "half"), Index(made / "index")
    assert half.features[0].dtype == torch.float16
    assert torch.allclose(torch.cat(half.features).float(), torch.cat(whole.features), atol=1e-3)


@pytest.mark.parametrize("num_ranks", [2, 3, 7])
def test_ranks_share_the_shards_and_the_last_one_completes_the_index(made, tmp_path, num_ranks):
    completed = [embed(made, rank, num_ranks, out=tmp_path / "index") for rank in reversed(range(num_ranks))]
    assert [index is not None for index in completed] == [False] * (num_ranks - 1) + [True]
    assert files_of(tmp_path / "index").keys() == files_of(made / "index").keys()
    for name, (_, data) in files_of(tmp_path / "index").items():
        assert data == files_of(made / "index")[name][1], name


def test_an_unfinished_index_is_no_index(made, tmp_path):
    embed(made, 0, 2, out=tmp_path / "index")
    with pytest.raises(ShardError, match=r"not finished: some parts are missing; run the same `alpro embed` again"):
        Index(tmp_path / "index")


def test_what_is_there_is_not_made_again(root):
    before = files_of(root / "index")
    assert embed(root) is not None
    assert files_of(root / "index") == before


@pytest.mark.parametrize("suffix", ["npy", "jsonl", "json"])
@pytest.mark.parametrize("harm", ["spoiled", "gone", "cut"])
def test_a_part_that_is_missing_or_damaged_is_made_again_and_no_other(root, suffix, harm):
    before = files_of(root / "index")
    path = part_path(root / "index", 2, suffix)
    if harm == "gone":
        path.unlink()
    elif harm == "cut":
        path.write_bytes(path.read_bytes()[:20])
    else:
        spoil(path)

    if suffix != "json":
        with pytest.raises(ShardError, match=rf"00002.{suffix} is missing or damaged"):
            Index(root / "index")
    embed(root)
    after = files_of(root / "index")
    assert {name: data for name, (_, data) in after.items() if name[0] != "."} == {
        name: data for name, (_, data) in before.items()
    }
    remade = {name for name in before if after[name][0] != before[name][0]}
    if not (suffix == "json" and harm == "spoiled"):  # Its last byte is a line's end: still the same JSON, or none.
        assert remade == {"00002.npy", "00002.jsonl", "00002.json"}
        assert after.keys() == before.keys()
    Index(root / "index")


def test_what_killed_writers_left_goes_and_what_another_one_is_writing_stays(root):
    old, new = (root / f"index/parts/.00002.npy.{name}.tmp" for name in ("of-a-dead-one", "of-a-live-one"))
    for leftover in (old, new):
        leftover.write_bytes(b"the beginning")
    os.utime(old, (time.time() - 7200,) * 2)
    part_path(root / "index", 2, "json").unlink()
    embed(root)
    assert not old.exists()
    assert new.read_bytes() == b"the beginning"


def test_parts_of_another_model_are_made_again_where_index_json_was_removed(root):
    """All other ways to tell are gone: shards, rows and digests are the same."""
    other = write_tiny_model(root / "other", root / "corpus", seed=1)
    before = files_of(root / "index")
    (root / "index/index.json").unlink()
    embed(root, 0, 2, checkpoint=other)
    with pytest.raises(ShardError, match="not finished"):
        Index(root / "index")
    assert embed(root, 1, 2, checkpoint=other) is not None
    embed(root, checkpoint=other, out=root / "fresh")
    after, fresh = files_of(root / "index"), files_of(root / "fresh")
    assert {name: data for name, (_, data) in after.items()} == {name: data for name, (_, data) in fresh.items()}
    assert all(after[f"{number:05d}.npy"] != before[f"{number:05d}.npy"] for number in PARTS)


def test_an_index_with_a_part_of_something_else_is_refused(root):
    description = read_description(root / "index")
    assert description.parts is not None
    odd = description.parts[3].model_copy(update={"identity_sha256": "0" * 64})
    parts = (*description.parts[:3], odd, *description.parts[4:])
    write_description(root / "index", description.model_copy(update={"parts": parts}))
    with pytest.raises(ShardError, match=r"part 3 of .* is of another model or other data than index.json says"):
        Index(root / "index")
    embed(root)
    assert len(Index(root / "index")) == NUM_CLIPS


@pytest.mark.parametrize("content", [b"{", b"", b"[]", b"\xff\xfe", b'{"format_version": 1}'])
def test_a_damaged_description_is_made_anew_as_its_message_says(root, content, caplog):
    (root / "index/index.json").write_bytes(content)
    with pytest.raises(ShardError, match="make it anew with `alpro embed`"):
        Index(root / "index")
    before = files_of(root / "index")
    assert embed(root) is not None
    assert len(Index(root / "index")) == NUM_CLIPS
    assert files_of(root / "index") == before, "its parts are whole"
    assert "cannot be read as an index" in caplog.text


def test_of_two_that_begin_at_once_one_is_refused(made, tmp_path, monkeypatch):
    """Another one writes index.json after this one found none, and before it writes its own."""
    ours = read_description(made / "index").model_copy(update={"parts": None})
    theirs = ours.model_copy(update={"weights_sha256": "0" * 64})

    def overtaken(path):
        monkeypatch.undo()
        begin_index(tmp_path / "index", theirs)
        return temporary_beside(path)

    monkeypatch.setattr("alpro_stream.evaluate.index_files.temporary_beside", overtaken)
    with pytest.raises(ConfigError, match="holds an index of something else"):
        begin_index(tmp_path / "index", ours)
    assert read_description(tmp_path / "index") == theirs
    assert [path.name for path in (tmp_path / "index").iterdir() if path.is_file()] == ["index.json"]


def test_whoever_lost_the_folder_meanwhile_does_not_complete_it(made, tmp_path, monkeypatch):
    """Somebody removes index.json and begins another index, while the last part is made."""
    theirs = read_description(made / "index").model_copy(update={"parts": None, "weights_sha256": "0" * 64})

    def write_and_lose(directory, number, part):
        write_part(directory, number, part)
        write_description(directory, theirs)

    monkeypatch.setattr("alpro_stream.evaluate.embed_index.write_part", write_and_lose)
    with pytest.raises(ConfigError, match="holds an index of something else"):
        embed(made, out=tmp_path / "index")
    assert read_description(tmp_path / "index") == theirs


@pytest.mark.parametrize(
    "change",
    [{"num_frames": 3}, {"image_size": 64}, {"dimension": 8}, {"weights_sha256": "0"}, {"data": {"video": "0"}}],
    ids=lambda change: next(iter(change)),
)
def test_whatever_decides_the_features_is_of_the_identity(root, change):
    description = read_description(root / "index")
    other = description.model_copy(update=change)
    assert other.identity_sha256() != description.identity_sha256()
    write_description(root / "index", other)
    with pytest.raises(ConfigError, match=next(iter(change))):
        embed(root)


def test_other_stored_frames_of_whole_videos_are_another_index(root):
    with pytest.raises(ConfigError, match=r"video.fps: 5.0 != 3.0"):
        embed(root, video={"fps": 5})


def test_an_index_made_by_relative_paths_is_used_from_anywhere(root, monkeypatch):
    (root / "gone.txt").write_text("video-00003\n")
    monkeypatch.chdir(root)
    embed(root, out=root / "relative", sources=[{"path": "corpus/train", "exclude": "gone.txt"}])
    (root / "elsewhere").mkdir()
    monkeypatch.chdir(root / "elsewhere")
    (source,) = read_description(root / "relative").config.sources
    assert (source.path, source.exclude) == (str(root / "corpus/train"), str(root / "gone.txt"))
    with closing(IndexClips(Index(root / "relative"))) as clips:
        assert clips.pictures(0)


def test_features_that_are_not_finite_are_refused(root):
    trained = load_trained(root / "model", torch.device("cpu"))
    weights = trained.model.state_dict()
    weights["dual.video_projection.weight"].fill_(3e38)  # Finite, and no feature is.
    write_model(root / "large", trained.description, weights, trained.tokenizer)
    with pytest.raises(CheckpointError, match=r"features that are not finite \(nan\)"):
        embed(root, checkpoint=root / "large", out=root / "of_large")


def write_many_shards(root):
    write_dataset(root / "corpus/train", video_shards=[3] * 60, size=64)
    write_tokenizer(root / "corpus/tokenizer")
    write_tiny_model(root / "model", root / "corpus")


def wait_for_part(process, index, number):
    deadline = time.monotonic() + 120
    while not part_path(index, number, "json").is_file():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_a_rank_that_is_killed_fails_the_command(tmp_path):
    write_many_shards(tmp_path)
    save_config(embed_config(tmp_path, batch_size=1), tmp_path / "embed.yaml")
    command = [sys.executable, "-m", "alpro_launch.cli", "embed", str(tmp_path / "embed.yaml"), "--ranks", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        # Its second part: only then it has told of the first.
        wait_for_part(process, tmp_path / "index", 3)
        killed = next(rank for rank in psutil.Process(process.pid).children() if rank.environ()["RANK"] == "1")
        killed.kill()
        _, shown = process.communicate(timeout=60)
    assert process.returncode == HARDWARE
    last = shown.splitlines()[-1]
    assert last.startswith("rank 1 ")
    assert last.endswith("was ended by SIGKILL (out of memory, perhaps); the same command makes what is missing")
    assert "rank 1, part 1 of its 30: " in shown
    assert read_description(tmp_path / "index").parts is None


def test_killed_in_between_it_goes_on_from_the_parts_that_are_there(tmp_path):
    threads = torch.get_num_threads()
    write_many_shards(tmp_path)
    save_config(embed_config(tmp_path, batch_size=1), tmp_path / "embed.yaml")
    command = [sys.executable, "-m", "alpro_launch.embed", str(tmp_path / "embed.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
        wait_for_part(process, tmp_path / "index", 1)
        process.send_signal(signal.SIGKILL)
    whole = {number for number in range(60) if part_path(tmp_path / "index", number, "json").is_file()}
    assert 1 in whole
    assert len(whole) < 60, "it was killed too late to show anything"
    assert read_description(tmp_path / "index").parts is None
    before = files_of(tmp_path / "index")

    torch.set_num_threads(1)
    try:
        embed(tmp_path, batch_size=1)
        embed(tmp_path, batch_size=1, out=tmp_path / "undisturbed")
    finally:
        torch.set_num_threads(threads)
    after, undisturbed = files_of(tmp_path / "index"), files_of(tmp_path / "undisturbed")
    for number in whole:
        assert after[f"{number:05d}.npy"] == before[f"{number:05d}.npy"]
    # A file that was being written begins with a dot; nobody takes it for a part.
    kept = {name: data for name, (_, data) in after.items() if not name.startswith(".")}
    assert kept == {name: data for name, (_, data) in undisturbed.items()}


def test_two_ranks_of_the_command_make_one_index(made, tmp_path, capfd):
    save_config(embed_config(made, out=tmp_path / "index"), tmp_path / "embed.yaml")
    assert alpro(["embed", str(tmp_path / "embed.yaml"), "--ranks", "2"]) == 0
    assert f"{NUM_CLIPS} clips, 16 numbers each; 0 left out" in capfd.readouterr().out
    features = torch.cat(Index(tmp_path / "index").features)
    assert torch.allclose(features, torch.cat(Index(made / "index").features), atol=1e-5)


def test_an_index_of_something_else_is_refused_with_both_values(root):
    known = read_description(root / "index")
    write_tiny_model(root / "other", root / "corpus", seed=1)
    with pytest.raises(ConfigError) as error:
        embed(root, checkpoint=root / "other")
    for text in (known.weights_sha256, "weights_sha256: ", str(root / "index"), "set another out"):
        assert text in str(error.value)
    with pytest.raises(ConfigError, match=r"dtype: 'float16' != 'float32'"):
        embed(root, dtype="float16")
    write_dataset(root / "corpus/train", video_shards=(4,), size=64)
    with pytest.raises(ConfigError, match=rf"data.video: '\w+' != '{known.data['video']}'"):
        embed(root)


def test_excluded_samples_are_not_in_it(made, tmp_path):
    (tmp_path / "gone.txt").write_text("video-00003  # taken down\n")
    embed(
        made, out=tmp_path / "index", sources=[{"path": str(made / "corpus/train"), "exclude": tmp_path / "gone.txt"}]
    )
    index = Index(tmp_path / "index")
    keys = {index.row(number).key for number in range(len(index))}
    assert len(index) == len(keys) == NUM_CLIPS - 1
    assert "video-00003" not in keys


def damaged_set(folder: Path, damaged: set[int], count: int = 6) -> None:
    """A split of which some samples hold no pictures."""
    folder.mkdir(parents=True)
    with ShardWriter(folder, "video-000000", "video") as writer:
        for number in range(count):
            whole = sample(number, "video", 3, 32)
            writer.add(whole if number not in damaged else type(whole)(whole.metadata, (b"no picture",) * 3))
        infos = [writer.close()]
    save_dataset_info(folder, DatasetInfo.of_shards("train", {"payload": "frames"}, infos))


def test_a_damaged_sample_is_left_out_and_named(made, tmp_path):
    damaged_set(tmp_path / "train", {1, 4})
    index = embed(made, out=tmp_path / "index", sources=[{"path": str(tmp_path / "train")}])
    (part,) = index.parts
    assert part.num_clips == 4
    assert len(part.left_out) == 2
    assert part.left_out[0].startswith("video-000000:1 video-00001: it cannot be decoded")
    opened = Index(tmp_path / "index")
    assert [opened.row(number).slot for number in range(4)] == [0, 2, 3, 5]
    clean = Index(made / "index").features[0]
    assert torch.cat(opened.features).shape == (4, clean.shape[1])


def test_an_index_without_clips_is_refused_when_it_is_made_and_when_it_is_opened(made, tmp_path):
    damaged_set(tmp_path / "train", set(range(6)))
    with pytest.raises(ShardError, match=r"no clip of the data sets could be embedded; the first: video-000000:0"):
        embed(made, out=tmp_path / "index", sources=[{"path": str(tmp_path / "train")}])
    description = read_description(tmp_path / "index")
    write_description(tmp_path / "index", description.model_copy(update={"parts": ()}))
    with pytest.raises(ShardError, match="has no clips"):
        Index(tmp_path / "index")


def test_a_model_for_answers_has_no_features(made, tmp_path):
    write_tiny_model(tmp_path / "model", made / "corpus", task="question_answering")
    with pytest.raises(ConfigError, match="question answering model, whose features are not trained"):
        embed(made, checkpoint=tmp_path / "model", out=tmp_path / "index")


def test_data_that_are_not_there(made, tmp_path):
    with pytest.raises(AlproError, match="no such shard folder"):
        embed(made, out=tmp_path / "index", sources=[{"path": str(tmp_path / "nowhere")}])
    damaged_set(tmp_path / "train", set())
    with pytest.raises(PlanError, match="has no image shards"):
        embed(made, out=tmp_path / "index", sources=[{"path": str(tmp_path / "train"), "kind": "image"}])


def test_what_is_no_index(tmp_path, root):
    with pytest.raises(ShardError, match=r"is no index: it has no index.json; make one with `alpro embed`"):
        Index(tmp_path)
    path = root / "index/index.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "format_version": 2}))
    with pytest.raises(ShardError, match="format_version"):
        Index(root / "index")
    path.write_text("{")
    with pytest.raises(ShardError, match="cannot be read as an index"):
        Index(root / "index")


def test_features_are_mapped_and_never_pickles(made):
    features = np.load(part_path(made / "index", 0, "npy"), allow_pickle=False)
    assert features.dtype == np.float32
    assert features.shape == (5, 16)
