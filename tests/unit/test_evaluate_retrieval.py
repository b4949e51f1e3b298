"""A whole evaluation of a small model: what it counts, what it says of itself, and what it refuses."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from retrieval_files import evaluation, write_checkpoint, write_split

from alpro_launch.cli import main
from alpro_stream.errors import CheckpointError, ConfigError, DataError
from alpro_stream.evaluate.embed import StoredClip, stored_clips
from alpro_stream.evaluate.queries import different_texts, odd_captions, queries_of, split_digest
from alpro_stream.evaluate.ranking import video_to_text_ranks
from alpro_stream.evaluate.retrieval import evaluate
from alpro_stream.exit_status import CONFIGURATION, DATA
from alpro_stream.model.alpro import DualEncoder
from alpro_stream.model.text_encoder import MultimodalEncoder
from alpro_stream.stream.sources import SourceConfig, open_sources
from alpro_stream.stream.text import Tokenizer
from alpro_stream.testing.shards import write_dataset

CAPTIONS = [
    ["a red dog moves", "the dog"],
    ["a green cat moves"],
    ["a blue car", "the blue car moves", "one car moves"],
    ["a yellow tree moves"],
    ["a red boat moves", "a boat"],
]
NUM_CAPTIONS, NUM_VIDEOS = 9, 5


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("retrieval")
    write_split(folder / "split", CAPTIONS)
    write_checkpoint(folder / "model")
    return folder


@pytest.fixture(scope="module")
def result(root):
    return evaluate(evaluation(root, root / "split", out=root / "out"))


@pytest.fixture
def run(root, tmp_path):
    return lambda **changes: evaluate(evaluation(root, root / "split", out=tmp_path / "out", **changes))


def scores_of(folder):
    with np.load(folder / "scores.npz") as arrays:
        return dict(arrays)


def test_each_encoder_runs_once_per_item_and_the_fusion_once_per_pair(run, monkeypatch):
    rows = Counter()
    for owner, method in ((DualEncoder, "encode_video"), (DualEncoder, "encode_text"), (MultimodalEncoder, "forward")):
        original = getattr(owner, method)

        def counting(self, first, *rest, _name=method, _original=original, **named):
            rows[_name] += len(first)
            return _original(self, first, *rest, **named)

        monkeypatch.setattr(owner, method, counting)
    run()
    assert rows == {"encode_video": NUM_VIDEOS, "encode_text": NUM_CAPTIONS, "forward": NUM_VIDEOS * NUM_CAPTIONS}


def test_the_result_says_how_it_was_made(root, result):
    assert json.loads((root / "out/result.json").read_text()) == json.loads(json.dumps(result))
    for score in ("vtc", "vtm"):
        both = result["metrics"][score]
        found = [(both[way]["num_queries"], both[way]["num_candidates"]) for way in ("text_to_video", "video_to_text")]
        assert found == [(NUM_CAPTIONS, NUM_VIDEOS), (NUM_VIDEOS, NUM_CAPTIONS)]
    protocol = result["protocol"]
    names = ("captions", "num_frames", "num_clips", "aggregation", "num_tokens", "mode", "top_k", "dual_softmax")
    assert [protocol[name] for name in names] == ["all", 2, 1, None, 12, "exact", None, False]
    assert result["split"]["captions_per_video"] == (1, 3)
    assert result["checkpoint"]["task"] == "retrieval"
    assert len(result["checkpoint"]["weights_sha256"]) == 64
    assert result["versions"].keys() >= {"alpro-stream", "torch"}
    assert result["config"]["batch_size"] == 4


def test_scores_are_written_with_what_they_belong_to(root, result):
    found = scores_of(root / "out")
    assert found.keys() == {"vtc", "vtm", "keys", "captions", "truth"}
    assert found["vtm"].shape == found["vtc"].shape == (NUM_CAPTIONS, NUM_VIDEOS)
    assert found["captions"].tolist() == [caption for own in CAPTIONS for caption in own]
    assert found["truth"].tolist() == [0, 0, 1, 2, 2, 2, 3, 4, 4]


def test_scores_may_be_left_out(run, tmp_path):
    run(keep_scores=False)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["result.json"]


def test_reranked_scores_have_a_matrix_for_each_direction(run, root, result, tmp_path):
    found = run(mode="rerank", top_k=2)
    scores = scores_of(tmp_path / "out")
    assert {"vtm", "vtm_video_to_text"} <= scores.keys()
    assert ((scores["vtm"] >= 0).sum(axis=1) == 2).all()
    assert ((scores["vtm_video_to_text"] >= 0).sum(axis=0) == 2).all()
    assert found["metrics"]["vtc"] == result["metrics"]["vtc"]
    assert (found["protocol"]["mode"], found["protocol"]["top_k"]) == ("rerank", 2)
    exact = scores_of(root / "out")["vtm"]
    chosen = scores["vtm"] >= 0
    np.testing.assert_allclose(scores["vtm"][chosen], exact[chosen], atol=1e-6)


def test_captions_are_all_the_first_or_joined(root):
    clips = stored_clips(open_sources([SourceConfig(path=str(root / "split"))]))
    assert queries_of(clips, "first").captions == [own[0] for own in CAPTIONS]
    joined = queries_of(clips, "joined")
    assert joined.captions[2] == "a blue car the blue car moves one car moves"
    assert joined.truth_C.tolist() == list(range(NUM_VIDEOS))


def test_paragraph_retrieval_has_a_query_a_video(run, result):
    found = run(captions="joined", num_tokens=16)
    assert found["split"]["num_captions"] == NUM_VIDEOS
    assert found["split"]["digest"] != result["split"]["digest"]
    assert found["protocol"]["num_tokens"] == 16


def clip(key, *captions):
    return StoredClip(None, "shard", 0, key, captions)


def test_the_digest_of_a_split_is_that_of_its_keys_and_captions_in_any_order():
    clips = [clip("a", "x", "y"), clip("b", "z")]
    digest = split_digest(clips, "all")
    assert split_digest(clips[::-1], "all") == digest
    assert split_digest([replace(one, shard="other", slot=7) for one in clips], "all") == digest
    for other in ([clip("a", "y", "x"), clips[1]], clips[:1], [clip("c", "x", "y"), clips[1]]):
        assert split_digest(other, "all") != digest
    assert split_digest(clips, "first") != digest


def test_clips_of_a_video_are_parts_of_it_one_after_the_other(run, root, tmp_path, monkeypatch):
    """A video of 6 frames as 3 clips of 2 is what the encoder sees, in this order."""
    seen = []
    original = DualEncoder.encode_video
    monkeypatch.setattr(
        DualEncoder, "encode_video", lambda self, video: seen.append(video.clone()) or original(self, video)
    )
    found = run(num_clips=3, aggregation="max", batch_size=100)
    assert (found["protocol"]["num_clips"], found["protocol"]["aggregation"]) == (3, "max")
    (clips,) = seen
    seen.clear()
    run(num_frames=6, batch_size=100)
    (whole,) = seen
    assert clips.shape[:2] == (3 * NUM_VIDEOS, 2)
    assert clips.view(whole.shape).equal(whole)
    assert not clips[0].equal(clips[1])


def test_an_image_is_one_clip_that_stands_for_all(root, tmp_path):
    write_split(tmp_path / "images", CAPTIONS[:3], kind="image")
    found = []
    for number in (1, 3):
        out = tmp_path / str(number)
        evaluate(evaluation(root, tmp_path / "images", out=out, num_clips=number, batch_size=100))
        found.append(scores_of(out))
    for name in ("vtc", "vtm"):
        np.testing.assert_allclose(found[1][name], found[0][name], rtol=0, atol=1e-6)


def test_other_frames_than_in_training_resize_the_time_embeddings(run):
    assert run(num_frames=4)["protocol"]["num_frames"] == 4


def test_excluded_samples_are_no_candidates(root, tmp_path):
    keys = [clip.key for clip in stored_clips(open_sources([SourceConfig(path=str(root / "split"))]))]
    (tmp_path / "exclude.txt").write_text(f"{keys[1]}\n")
    source = SourceConfig(path=str(root / "split"), exclude=str(tmp_path / "exclude.txt"))
    found = stored_clips(open_sources([source]))
    assert [one.key for one in found] == [keys[0], *keys[2:]]
    assert [one.captions[0] for one in found] == [own[0] for number, own in enumerate(CAPTIONS) if number != 1]


def test_features_are_kept_for_the_next_evaluation_of_the_same(run, root, result, tmp_path, monkeypatch):
    cached = {"cache_dir": tmp_path / "cache"}
    first = run(**cached)
    (file,) = (tmp_path / "cache").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(DualEncoder, "encode_video", lambda *_: pytest.fail("encoded again"))
        assert run(**cached)["metrics"] == first["metrics"] == result["metrics"]
        assert run(**cached, mode="rerank", top_k=5)["metrics"]["vtc"] == result["metrics"]["vtc"]
    changes = ({"num_frames": 4}, {"num_clips": 2}, {"num_tokens": 8}, {"captions": "first"}, {"video": {"fps": 1}})
    for change in changes:
        run(**cached, **change)
    monkeypatch.setattr("alpro_stream.evaluate.retrieval.decoder_name", lambda _: "another")
    run(**cached)
    write_checkpoint(tmp_path / "other/model", seed=1)
    run(**cached, checkpoint=tmp_path / "other/model")
    assert len(list((tmp_path / "cache").iterdir())) == 8
    monkeypatch.undo()
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"features-\w+-rank0of1.safetensors cannot be read.*remove it"):
        run(**cached)


@pytest.mark.parametrize(
    ("captions", "expected"),
    [
        ([["a red dog"], [""], [" . "]], (2, 0, 0)),
        ([["a red dog"], ["It is this of the..."], ["THE"]], (0, 2, 0)),
        ([["a red dog"], ["a red dog and a blue cat and a green boat and a tree"], ["cat"]], (0, 0, 1)),
    ],
)
def test_captions_that_say_nothing_are_counted_and_said(root, tmp_path, caplog, captions, expected):
    write_split(tmp_path / "split", captions)
    found = evaluate(evaluation(root, tmp_path / "split", out=tmp_path / "out"))
    assert tuple(found["split"]["odd_captions"].values()) == expected
    assert found["split"]["num_captions"] == 3
    assert "all of them are queries" in caplog.text


def test_a_caption_as_long_as_the_model_reads_is_not_cut(root):
    tokenizer = Tokenizer(str(root / "tokenizer"), 12)
    texts = [" ".join(["dog"] * number) for number in (9, 10, 11)]
    assert odd_captions(texts, tokenizer, 12).cut == 1


def test_a_split_without_captions_is_refused(root, tmp_path):
    """Shards of questions and answers, in which a question stands in for the caption."""
    write_split(tmp_path / "split", [["what moves?"], ["is it red?"], ["what is it?"]])
    with pytest.raises(DataError, match=r"3 videos and images, and no caption.*Shard the split with captions"):
        evaluate(evaluation(root, tmp_path / "split"))
    with pytest.raises(DataError, match="no caption"):
        queries_of([clip("a"), clip("b")], "joined")


TWINS = [["a red dog", "a dog"], ["a cat"], ["a dog", "a car"], ["a cat"], ["a tree", "The Car", "a dog"], ["a boat"]]


@pytest.mark.parametrize("changes", [{}, {"mode": "rerank", "top_k": 3}, {"dual_softmax": True}], ids=str)
def test_equal_captions_have_equal_scores_whatever_the_batches(root, tmp_path, changes):
    """Capitals make no difference to the tokenizer; of 9 captions 3, 2, 2 and 1 are of several videos, or of one."""
    write_split(tmp_path / "split", TWINS)
    found = []
    for size in (3, 5, 32):
        result = evaluate(evaluation(root, tmp_path / "split", out=tmp_path / str(size), batch_size=size, **changes))
        found.append(result["metrics"])
        scores = scores_of(tmp_path / str(size))
        captions = scores["captions"].tolist()
        for text in ("a dog", "a cat"):
            rows = [number for number, caption in enumerate(captions) if caption == text]
            for name in ("vtc", "vtm"):
                assert all((scores[name][row] == scores[name][rows[0]]).all() for row in rows)
        assert result["split"]["captions_of_several_videos"] == 5
        assert "that of another video counts against the right answer" in result["protocol"]["equal_captions"]
    assert all(metrics == found[0] for metrics in found)


def test_equal_captions_go_through_the_model_once(root, tmp_path, monkeypatch):
    write_split(tmp_path / "split", TWINS)
    rows = Counter()
    for owner, method in ((DualEncoder, "encode_text"), (MultimodalEncoder, "forward")):
        original = getattr(owner, method)

        def counting(self, first, *rest, _name=method, _original=original, **named):
            rows[_name] += len(first)
            return _original(self, first, *rest, **named)

        monkeypatch.setattr(owner, method, counting)
    evaluate(evaluation(root, tmp_path / "split", out=tmp_path / "out"))
    # The Car of video 4 is not a car of video 2.
    assert rows == {"encode_text": 7, "forward": 7 * 6}


def test_an_equal_caption_of_another_video_counts_against_the_right_one(root, tmp_path):
    """Both cats have the same only caption, so its rank is 2 at best; a video is no rival of itself."""
    write_split(tmp_path / "split", [["a cat", "a cat"], ["a cat"], ["a dog", "a dog"]])
    evaluate(evaluation(root, tmp_path / "split", out=tmp_path / "out", scores=["vtc"]))
    scores = torch.from_numpy(scores_of(tmp_path / "out")["vtc"])
    ranks = video_to_text_ranks(scores, torch.tensor([0, 0, 1, 2, 2]))
    dog_is_first = scores[3, 2] > scores[0, 2]
    assert ranks.tolist() == [
        2 if scores[0, 0] > scores[3, 0] else 4,
        3 if scores[0, 1] > scores[3, 1] else 5,
        1 if dog_is_first else 4,
    ]


def test_texts_differ_by_what_the_model_reads(root):
    tokenizer = Tokenizer(str(root / "tokenizer"), 12)
    long = " ".join(["dog"] * 10)
    found = different_texts(["a dog", "A Dog", "a cat", f"{long} cat", f"{long} tree", "a dog"], tokenizer)
    assert found.texts == ["a dog", "a cat", f"{long} cat"]
    assert found.text_C.tolist() == [0, 0, 1, 2, 2, 0]
    assert found.num_of_several(torch.tensor([0, 0, 1, 2, 3, 0])) == 2
    assert different_texts(["a dog cat", "a dog tree"], tokenizer, 4).text_C.tolist() == [0, 0]


def test_a_video_without_a_caption_is_a_candidate(root, tmp_path):
    write_split(tmp_path / "split", [["a red dog", "is it a dog?"], ["what is it?"], ["a cat"]])
    found = evaluate(evaluation(root, tmp_path / "split", out=tmp_path / "out"))
    assert found["metrics"]["vtm"]["text_to_video"]["num_candidates"] == 3
    assert found["metrics"]["vtm"]["video_to_text"]["num_queries"] == 2
    assert found["split"]["captions_per_video"] == (0, 1)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("prompter", r"is a prompter: it has no matching head; set scores=\[vtc\]"),
        ("question_answering", r"was trained to answer questions.*checkpoint to one of task pretrain or retrieval"),
    ],
)
def test_a_model_of_the_wrong_task_is_refused_before_anything_is_encoded(root, tmp_path, monkeypatch, task, message):
    monkeypatch.setattr(DualEncoder, "encode_video", lambda *_: pytest.fail("encoded"))
    write_checkpoint(tmp_path / "model", task)
    with pytest.raises(ConfigError, match=message):
        evaluate(evaluation(tmp_path, root / "split"))


def test_a_prompter_is_not_told_what_does_not_go_together(root, tmp_path):
    write_checkpoint(tmp_path / "model", "prompter")
    with pytest.raises(ConfigError, match=r"set scores=\[vtc\] mode=exact"):
        evaluate(evaluation(tmp_path, root / "split", mode="rerank", top_k=2))
    evaluate(evaluation(tmp_path, root / "split", mode="exact", scores=["vtc"], top_k=2))


def test_a_prompter_ranks_by_vtc(root, tmp_path):
    write_checkpoint(tmp_path / "model", "prompter")
    assert evaluate(evaluation(tmp_path, root / "split", scores=["vtc"]))["metrics"].keys() == {"vtc"}


def test_fewer_videos_than_k_are_refused_before_anything_is_encoded(run, monkeypatch):
    monkeypatch.setattr(DualEncoder, "encode_video", lambda *_: pytest.fail("encoded"))
    message = r"top_k=16 is more than there is to choose from: 5 videos, 9 captions. Set top_k to 5 at most, or mode="
    with pytest.raises(ConfigError, match=message):
        run(mode="rerank")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "rerank", "scores": ["vtc"]}, "add vtm to scores, or use mode=exact"),
        ({"mode": "rerank", "dual_softmax": True}, "dual_softmax needs the score of every pair"),
        ({"aggregation": "sum"}, "aggregation"),
        ({"num_clips": 0}, "num_clips"),
    ],
)
def test_settings_that_do_not_fit_together(root, changes, message):
    with pytest.raises(ConfigError, match=message):
        evaluation(root, root / "split", **changes)


def test_a_text_longer_than_the_model_can_read_is_refused(run):
    with pytest.raises(ConfigError, match="texts of 600 tokens do not fit the 512 positions"):
        run(num_tokens=600)


def test_no_model_is_said(root, tmp_path):
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        evaluate(evaluation(root, root / "split", checkpoint=tmp_path / "nowhere"))


@pytest.fixture
def files(root, result, tmp_path):
    """Results of several protocols."""
    for name, changes in {"plain": {}, "few": {"mode": "rerank", "top_k": 2}, "long": {"num_frames": 4}}.items():
        evaluate(evaluation(root, root / "split", out=tmp_path / name, **changes))
    return tmp_path


def test_a_result_is_made_again_and_compared(files, capsys):
    assert main(["evaluate", str(files / "few/result.json")]) == 0
    assert "the same as" in capsys.readouterr().out
    again = json.loads((files / "few/again/result.json").read_text())
    assert again["protocol"]["top_k"] == 2
    assert main(["evaluate", str(files / "few/result.json"), "num_frames=4"]) == DATA
    shown = capsys.readouterr().err
    assert "protocol.num_frames: 2 != 4" in shown
    assert "Traceback" not in shown


def test_a_result_is_not_written_over(files, capsys):
    assert main(["evaluate", str(files / "few/result.json"), f"out={files / 'few'}"]) == CONFIGURATION
    assert "set another out" in capsys.readouterr().err


def test_a_result_of_other_weights_is_another_one(files, root, capsys):
    path = files / "plain/result.json"
    stored = json.loads(path.read_text())
    stored["checkpoint"]["weights_sha256"] = "0" * 64
    path.write_text(json.dumps(stored))
    assert main(["evaluate", str(path)]) == DATA
    assert "weights_sha256" in capsys.readouterr().err


def test_a_table_of_results_says_of_each_row_what_differs(files, capsys):
    assert main(["evaluate", "--table", *(str(files / name) for name in ("plain", "few", "long"))]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {tuple(line.split()[:3]) for line in lines if line.startswith(str(files))}
    names = {name: str(files / name) for name in ("plain", "few", "long")}
    assert {row[:2] for row in rows if row[0] == names["plain"]} == {(names["plain"], "VTC"), (names["plain"], "VTM")}
    assert {row for row in rows if row[0] == names["few"] and row[1] == "[1]"} == {(names["few"], "[1]", "VTM")}
    assert {row for row in rows if row[0] == names["long"]} == {(names["long"], "[2]", way) for way in ("VTC", "VTM")}
    assert "[1] unlike the first: mode: 'rerank' != 'exact'; top_k: 2 != None" in lines
    assert "[2] unlike the first: num_frames: 4 != 2" in lines


def test_a_table_of_one_protocol_has_no_notes(files, capsys):
    assert main(["evaluate", "--table", str(files / "plain"), str(files / "plain/result.json")]) == 0
    shown = capsys.readouterr().out
    assert "[1]" not in shown
    assert "unlike" not in shown


def test_another_split_is_a_note(files, root, capsys, tmp_path):
    write_split(tmp_path / "split", CAPTIONS[:4])
    evaluate(evaluation(root, tmp_path / "split", out=tmp_path / "other"))
    assert main(["evaluate", "--table", str(files / "plain"), str(tmp_path / "other")]) == 0
    assert "(7 captions, 4 videos)' != " in capsys.readouterr().out


@pytest.mark.parametrize("content", ["{}", "no json", '{"task": "question_answering", "metrics": {}}'])
def test_a_file_that_is_no_result_is_refused(tmp_path, capsys, content):
    (tmp_path / "result.json").write_text(content)
    assert main(["evaluate", "--table", str(tmp_path)]) == CONFIGURATION
    shown = capsys.readouterr().err
    assert "result.json" in shown
    assert shown.count("\n") == 1


def test_images_and_videos_of_a_data_set_are_candidates_side_by_side(root, tmp_path):
    write_dataset(tmp_path / "split", video_shards=(3, 2), image_shards=(2,), size=64)
    found = evaluate(evaluation(root, tmp_path / "split", out=tmp_path / "out"))
    assert found["split"]["num_videos"] == 7
    assert found["split"]["sources"].keys() == {"video", "image"}
    assert torch.from_numpy(scores_of(tmp_path / "out")["vtm"]).isfinite().all()
