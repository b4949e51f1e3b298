"""Indexes: every clip once with its feature, whoever made which part, and after every kind of interruption."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from search_files import NUM_CLIPS, NUM_SHARDS, embed, embed_config, make_root, write_tiny_model

from alpro_launch.cli import main as alpro
from alpro_stream.config import save_config
from alpro_stream.errors import AlproError, ConfigError, PlanError, ShardError
from alpro_stream.evaluate.embed import embed_videos, evenly_spread, stored_clips
from alpro_stream.evaluate.index import Index, part_path, read_description, write_description
from alpro_stream.media import FrameConfig
from alpro_stream.shards.layout import DatasetInfo, save_dataset_info
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
    (root / "index/parts/.00002.npy.0123456789ab.tmp").write_bytes(b"of a writer that was killed")

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
        assert after.keys() == before.keys(), "leftovers go"
    Index(root / "index")


def test_killed_in_between_it_goes_on_from_the_parts_that_are_there(tmp_path):
    threads = torch.get_num_threads()
    write_dataset(tmp_path / "corpus/train", video_shards=[3] * 60, size=64)
    write_tokenizer(tmp_path / "corpus/tokenizer")
    write_tiny_model(tmp_path / "model", tmp_path / "corpus")
    save_config(embed_config(tmp_path, batch_size=1), tmp_path / "embed.yaml")
    command = [sys.executable, "-m", "alpro_launch.embed", str(tmp_path / "embed.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not part_path(tmp_path / "index", 1, "json").is_file():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.002)
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
    assert {name: data for name, (_, data) in after.items()} == {n: data for n, (_, data) in undisturbed.items()}


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
