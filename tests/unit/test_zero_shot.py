"""Recognition by prompts: which class a video is nearest to, and how often that is right."""

import pytest
import torch
from retrieval_files import write_checkpoint, write_split

from alpro_launch.cli import main
from alpro_stream.config import validate
from alpro_stream.errors import ConfigError, DataError
from alpro_stream.evaluate import zero_shot
from alpro_stream.evaluate.aggregate import aggregate
from alpro_stream.evaluate.embed import embed_texts, embed_videos, evenly_spread, pixels_of, stored_clips
from alpro_stream.evaluate.features import Encoding
from alpro_stream.evaluate.zero_shot import RecognitionConfig, class_scores, recognise, share_in_top
from alpro_stream.media import FrameConfig
from alpro_stream.model.pixels import normalise
from alpro_stream.prompter.prompts import PROMPT_TOKENS, templates
from alpro_stream.stream.clips import build_clip_decoder
from alpro_stream.stream.decode import DecodeConfig
from alpro_stream.stream.sources import SourceConfig, open_sources
from alpro_stream.train.restore import load_trained

CPU = torch.device("cpu")
CLASSES = ["boat", "car", "cat", "dog", "tree"]
CAPTIONS = [["dog", "a red dog moves"], ["Cat"], ["car"], ["tree"], ["boat"], ["dog"], ["cat"]]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recognition")
    write_split(folder / "split", CAPTIONS)
    write_split(folder / "images", [["dog"], ["cat"]], kind="image")
    write_checkpoint(folder / "model")
    return folder


def evaluation(root, out, **changes):
    values = {
        "task": "recognition",
        "checkpoint": root / "model",
        "sources": [{"path": root / "split"}],
        "out": out,
        "batch_size": 3,
        "decode": {"num_workers": 0},
        **changes,
    }
    return validate(RecognitionConfig, values, source="test")


@pytest.fixture
def run(root, tmp_path):
    return lambda **changes: recognise(evaluation(root, tmp_path / "out", **changes))


def reference(root):
    """Scores of all classes for each video, one class and one sentence at a time; and those of the module."""
    trained = load_trained(root / "model", CPU)
    clips = stored_clips(open_sources([SourceConfig(path=str(root / "split"))]))
    decoder = build_clip_decoder(DecodeConfig(num_workers=0), 48, 32, None)
    how = Encoding(evenly_spread(2, FrameConfig()), decoder, trained.tokenizer, batch_size=3)
    found_VC = class_scores(trained, clips, CLASSES, how)
    videos = embed_videos(trained.dual, clips, how.choice, decoder, 8).feature_VE
    decoder.close()
    rows = []
    for video_E in videos:
        row = []
        for name in CLASSES:
            sentences = [template.format(name) for template in templates("video")]
            texts = embed_texts(trained.dual, sentences, trained.tokenizer, 4, PROMPT_TOKENS)
            row.append(texts.feature_CE.mean(dim=0) @ video_E / 0.07)
        rows.append(torch.stack(row))
    return torch.stack(rows), found_VC


def test_it_equals_one_class_and_one_sentence_at_a_time(root, run):
    expected_VC, found_VC = reference(root)
    torch.testing.assert_close(found_VC, expected_VC, rtol=1e-4, atol=1e-5)
    assert expected_VC.std(dim=1).min() > 0.01
    best = [CLASSES[number] for number in expected_VC.argmax(dim=1).tolist()]
    num_right = sum(name == own[0].lower() for name, own in zip(best, CAPTIONS, strict=True))
    found = run()
    assert found["metrics"]["top_1"] == pytest.approx(100 * num_right / len(CAPTIONS))
    assert found["metrics"]["top_5"] == 100
    assert found["chance"] == {"top_1": 20, "top_5": 100}
    assert found["split"]["num_classes"] == 5
    assert len(found["protocol"]["prompts"]["video"]) == 12


def test_scores_by_rank_and_ties_against_the_right_class():
    scores_VC = torch.tensor([[0.3, 0.2, 0.1], [0.1, 0.1, 0.0], [0.5, 0.4, 0.3], [9.0, 0.0, 0.0]])
    truth_V = torch.tensor([0, 1, 2, -1])
    assert [share_in_top(scores_VC, truth_V, k) for k in (1, 2, 3)] == [25, 50, 75]


def test_classes_of_a_file_are_more_than_those_of_the_data(root, run, tmp_path):
    (tmp_path / "classes.txt").write_text("\n".join(["house", *CLASSES[:-1], "bird"]))
    found = run(classes=tmp_path / "classes.txt")
    assert found["split"]["num_classes"] == 6
    assert found["split"]["num_unlisted_classes"] == 1  # tree
    assert found["metrics"]["top_5"] < 100


def test_clips_and_images_are_aggregated(root, run):
    found = run(num_clips=3, aggregation="lse", sources=[{"path": root / "split"}, {"path": root / "images"}])
    assert found["split"]["num_videos"] == 9
    assert set(found["protocol"]["prompts"]) == {"image", "video"}


@pytest.mark.parametrize("how", ["mean", "max", "lse"])
def test_the_similarities_of_clips_are_put_together(root, how):
    """Against each clip by itself; an image is one clip, and has the sentences of images."""
    trained = load_trained(root / "model", CPU)
    sources = open_sources([SourceConfig(path=str(root / name), name=name) for name in ("split", "images")])
    clips = stored_clips(sources)
    decoder = build_clip_decoder(DecodeConfig(num_workers=0), 48, 64, None)
    encoding = Encoding(evenly_spread(6, FrameConfig()), decoder, trained.tokenizer, batch_size=4, num_clips=3)
    found_VC = class_scores(trained, clips, CLASSES, encoding, how)
    classes = {kind: class_features(trained, kind) for kind in ("video", "image")}
    rows = []
    for clip in clips:
        frames_THWC = pixels_of([clip], evenly_spread(6, FrameConfig()), decoder)[0]
        parts = frames_THWC.split(2) if clip.source.kind == "video" else [frames_THWC]
        class_CE = classes[clip.source.kind]
        with torch.no_grad():
            features = [trained.dual.encode_video(normalise(part[None]))[1][0] for part in parts]
        logits_KC = torch.stack([class_CE @ feature_E / 0.07 for feature_E in features])
        if clip.source.kind == "image":
            logits_KC = logits_KC.expand(3, -1)
        rows.append(aggregate(logits_KC.T, how))
    decoder.close()
    torch.testing.assert_close(found_VC, torch.stack(rows), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(classes["video"], classes["image"], atol=1e-3)


def class_features(trained, kind):
    """Of each class, the mean of its sentences."""
    sentences = [template.format(name) for name in CLASSES for template in templates(kind)]
    texts = embed_texts(trained.dual, sentences, trained.tokenizer, 60, PROMPT_TOKENS)
    return texts.feature_CE.view(len(CLASSES), 12, -1).mean(dim=1)


@pytest.mark.parametrize("how", ["mean", "max", "lse"])
def test_the_way_that_is_asked_for_is_used(run, monkeypatch, how):
    asked = []
    original = zero_shot.aggregate
    monkeypatch.setattr(zero_shot, "aggregate", lambda logits, how: asked.append(how) or original(logits, how))
    run(num_clips=3, aggregation=how)
    assert set(asked) == {how}


def test_a_question_is_no_class(root, run, tmp_path):
    """In shards of questions a question stands in for the caption; such a video is left out, and counted."""
    write_split(tmp_path / "split", [["is it red?", "dog"], ["what is it?"], ["cat"]])
    (tmp_path / "classes.txt").write_text("dog\ncat\ntree\n")
    names = ("num_videos", "num_videos_without_class", "num_classes", "num_unlisted_classes")
    for classes, num_classes in ((None, 2), (tmp_path / "classes.txt", 3)):
        found = run(sources=[{"path": tmp_path / "split"}], classes=classes)
        assert [found["split"][name] for name in names] == [2, 1, num_classes, 0]
    write_split(tmp_path / "asked", [["what is it?"], ["is it a dog?"]])
    with pytest.raises(DataError, match=r"2 videos and images, and no caption \(questions are none\)"):
        run(sources=[{"path": tmp_path / "asked"}])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dog\ncat\nDog\n", "'dog' more than once"),
        ("dog\n", "has 1 class: nothing to choose from"),
        ("piano\nharp\n", "none of the 7 videos is of a class of .* set classes=null"),
    ],
)
def test_classes_that_cannot_be_chosen_from(run, tmp_path, text, message):
    (tmp_path / "classes.txt").write_text(text)
    with pytest.raises((ConfigError, DataError), match=message):
        run(classes=tmp_path / "classes.txt")


def test_a_model_that_answers_has_no_features(run, tmp_path):
    write_checkpoint(tmp_path / "model", "question_answering")
    with pytest.raises(ConfigError, match="its features are not trained"):
        run(checkpoint=tmp_path / "model")


def test_the_command_prints_a_table(root, capsys):
    path = root / "recognition.yaml"
    sources = f"sources: [{{path: {root / 'split'}}}]"
    path.write_text(f"task: recognition\ncheckpoint: {root / 'model'}\n{sources}\nout: {root / 'out'}\n")
    assert main(["evaluate", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "top 1" in printed
    assert "20.00%" in printed
    assert main(["evaluate", "--table", str(root / "out"), str(root / "out/result.json")]) == 0
    assert "top_5" in capsys.readouterr().out
