"""Evaluations that ask for one thing at a time: masked words, multiple choice, and the prompter's labels of crops."""

import json

import numpy as np
import pytest
import torch
from retrieval_files import write_checkpoint, write_split

from alpro_launch.evaluate import load_evaluation, show_table
from alpro_stream.config import validate
from alpro_stream.errors import ConfigError, DataError
from alpro_stream.evaluate import multiple_choice
from alpro_stream.evaluate.embed import TextEmbeddings, embed_texts, embed_videos, evenly_spread, stored_clips
from alpro_stream.evaluate.masked_words import MaskedWordsConfig, fill_in
from alpro_stream.evaluate.multiple_choice import ChoiceConfig, choose
from alpro_stream.evaluate.prompter_labels import LocatedObject, PrompterLabelsConfig, label, seen_in
from alpro_stream.losses.pem import PemConfig
from alpro_stream.media import FrameConfig
from alpro_stream.prompter.bank import build_bank
from alpro_stream.prompter.labels import Labeller
from alpro_stream.stream.clips import build_clip_decoder
from alpro_stream.stream.crops import pem_crop_boxes
from alpro_stream.stream.decode import DecodeConfig
from alpro_stream.stream.seeds import sample_keys
from alpro_stream.stream.sources import SourceConfig, open_sources
from alpro_stream.testing.distributed import run_ranks
from alpro_stream.train.distributed import join_world
from alpro_stream.train.restore import load_trained

CPU = torch.device("cpu")
NOUNS = ["dog", "cat", "car", "boat", "tree"]
CAPTIONS = [["a red dog moves"], ["a blue cat moves", "a cat"], ["a green car moves"], ["a red boat"], ["a blue tree"]]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one-thing")
    write_split(folder / "split", CAPTIONS)
    write_checkpoint(folder / "model", task="pretrain")
    write_checkpoint(folder / "prompter", task="prompter")
    (folder / "words.json").write_text(json.dumps(NOUNS))
    clips = stored_clips(open_sources([SourceConfig(path=str(folder / "split"))]))
    keys = [clip.key for clip in clips]
    choices = [
        {
            "id": keys[0],
            "captions": ["a red dog moves", "a red cat moves", "a red car moves"],
            "answer": 0,
            "group": "n",
        },
        {"id": keys[0], "captions": ["a blue dog moves", "a red dog moves"], "answer": 1, "group": "c"},
        {"id": keys[2], "captions": ["a green car moves", "a red car moves"], "answer": 0, "group": "c"},
        {"id": keys[4], "captions": ["a blue tree", "a  blue tree"], "answer": 0, "group": "tie"},
        {"id": "elsewhere", "captions": ["a", "b"], "answer": 0},
    ]
    _write(folder / "choices.jsonl", choices)
    _write(folder / "cloze.jsonl", [{"id": keys[1], "text": "a cat moves on a tree", "word": "cat"}])
    left, right = (0.0, 0.0, 0.5, 0.5), (0.0, 0.5, 0.5, 0.5)
    objects = [{"word": "dog", "boxes": [left] * 6}, {"word": "sofa", "boxes": [right] * 6}]
    _write(folder / "objects.jsonl", [{"id": key, "objects": objects} for key in keys])
    return folder


def _write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _config(model, root, out, **changes):
    task = {MaskedWordsConfig: "masked_words", ChoiceConfig: "multiple_choice", PrompterLabelsConfig: "prompter_labels"}
    files = {
        "masked_words": {"words": root / "words.json"},
        "multiple_choice": {"choices": root / "choices.jsonl"},
        "prompter_labels": {"objects": root / "objects.jsonl", "entities": root / "words.json"},
    }[task[model]]
    values = {
        "task": task[model],
        "checkpoint": root / ("prompter" if model is PrompterLabelsConfig else "model"),
        "sources": [{"path": root / "split"}],
        "out": out,
        "batch_size": 3,
        "decode": {"num_workers": 0},
        **files,
        **changes,
    }
    return validate(model, values, source="test")


@pytest.fixture(scope="module")
def encoded(root):
    """Model, tokenizer, clips, and their embeddings, each by itself."""
    trained = load_trained(root / "model", CPU)
    clips = stored_clips(open_sources([SourceConfig(path=str(root / "split"))]))
    decoder = build_clip_decoder(DecodeConfig(num_workers=0), 48, 32, None)
    videos = [embed_videos(trained.dual, [clip], evenly_spread(2, FrameConfig()), decoder, 1) for clip in clips]
    decoder.close()
    return trained, clips, videos


def test_masked_words_equal_one_word_at_a_time(root, encoded, tmp_path):
    trained, _, videos = encoded
    word_ids = [int(trained.tokenizer([noun])[0][0, 1]) for noun in NOUNS]
    right = []
    for video, own in zip(videos, CAPTIONS, strict=True):
        for caption in own:
            ids, mask = trained.tokenizer([caption])
            for position, token in enumerate(ids[0].tolist()):
                if token not in word_ids:
                    continue
                hidden = ids.clone()
                hidden[0, position] = trained.tokenizer.mask_id
                with torch.inference_mode():
                    text = trained.dual.text_encoder(hidden, mask)
                    fused = trained.model.multimodal(text, mask, video.tokens_VND)[:, : ids.shape[1]]
                    logits_V = trained.model.word_logits(fused)[0, position]
                among = word_ids[int(logits_V[word_ids].argmax())]
                right.append((int(logits_V.argmax()) == token, among == token))
    expected = 100 * np.mean(right, axis=0)
    found = fill_in(_config(MaskedWordsConfig, root, tmp_path / "out"))
    assert len(right) == found["split"]["num_questions"] == 6
    assert found["metrics"] == {"accuracy": expected[0], "accuracy_among_words": expected[1]}
    assert 0 < expected[1] < 100
    assert found["chance"]["most_frequent_word"] == pytest.approx(100 * 2 / 6)


def test_of_a_sentence_its_own_word_alone_is_hidden(root, tmp_path):
    found = fill_in(_config(MaskedWordsConfig, root, tmp_path / "out", sentences=root / "cloze.jsonl"))
    assert found["split"]["num_questions"] == 1
    assert found["split"]["num_videos"] == 1


def test_words_of_several_tokens_are_left_out_and_named(root, tmp_path):
    (tmp_path / "words.json").write_text(json.dumps([*NOUNS, "hippopotamus"]))
    found = fill_in(_config(MaskedWordsConfig, root, tmp_path / "out", words=tmp_path / "words.json"))
    assert found["split"]["words_without_token"] == ["hippopotamus"]
    assert found["split"]["num_words"] == 5
    (tmp_path / "words.json").write_text(json.dumps(["hippopotamus"]))
    with pytest.raises(DataError, match=r"no word of .* occurs in the 6 sentences.*1 of the words are several or none"):
        fill_in(_config(MaskedWordsConfig, root, tmp_path / "out", words=tmp_path / "words.json"))


def test_choices_equal_one_caption_at_a_time(root, encoded, tmp_path):
    trained, clips, videos = encoded
    rows = [json.loads(line) for line in (root / "choices.jsonl").read_text().splitlines()][:4]
    number_of = {clip.key: number for number, clip in enumerate(clips)}
    right = {"vtc": [], "vtm": []}
    for row in rows:
        video = videos[number_of[row["id"]]]
        scores = {"vtc": [], "vtm": []}
        for caption in row["captions"]:
            text = embed_texts(trained.dual, [caption], trained.tokenizer, 1)
            scores["vtc"].append(float(text.feature_CE[0] @ video.feature_VE[0]))
            with torch.inference_mode():
                cls = trained.model.multimodal(text.text_CLD, text.mask_CL, video.tokens_VND)[:, 0]
                no, yes = trained.model.match_logits(cls)[0].double().tolist()
            scores["vtm"].append(yes - no)
        for name, own in scores.items():
            others = [score for n, score in enumerate(own) if n != row["answer"]]
            right[name].append(own[row["answer"]] > max(others) + 1e-6)
    found = choose(_config(ChoiceConfig, root, tmp_path / "out"))
    for name in ("vtc", "vtm"):
        assert found["metrics"][name] == pytest.approx(100 * np.mean(right[name]))
        assert found["metrics"]["by_type"][f"c_{name}"] == pytest.approx(100 * np.mean(right[name][1:3]))
        assert found["metrics"]["by_type"][f"tie_{name}"] == 0
    assert 0 < sum(map(sum, right.values())) < 6
    assert found["chance"]["all"] == pytest.approx(100 * (1 / 3 + 1.5) / 4)
    assert found["split"]["num_elsewhere"] == 1
    assert found["split"]["num_by_group"] == {"c": 2, "n": 1, "tie": 1}


def test_equal_captions_tie_wherever_they_lie_in_a_batch(root, tmp_path, monkeypatch):
    """As on CPUs and GPUs whose products give another last digit in another row, only much larger."""

    def embed_with_noise(*args):
        texts = embed_texts(*args)
        row_C = torch.arange(len(texts.feature_CE)).float()
        feature_CE = texts.feature_CE + 1e-3 * row_C[:, None]
        return TextEmbeddings(texts.text_CLD + 1e-3 * row_C[:, None, None], texts.mask_CL, feature_CE)

    monkeypatch.setattr(multiple_choice, "embed_texts", embed_with_noise)
    key = json.loads((root / "choices.jsonl").read_text().splitlines()[0])["id"]
    captions = ["a blue tree", "a  blue tree", "A blue tree"]
    _write(tmp_path / "choices.jsonl", [{"id": key, "captions": captions, "answer": answer} for answer in range(3)])
    found = choose(_config(ChoiceConfig, root, tmp_path / "out", choices=tmp_path / "choices.jsonl"))
    assert found["metrics"]["vtc"] == found["metrics"]["vtm"] == 0


@pytest.mark.parametrize("how", ["mean", "max"])
def test_the_clips_of_a_video_are_put_together(root, tmp_path, how):
    """Against each clip of each question by itself."""
    trained = load_trained(root / "model", CPU)
    clips = {clip.key: clip for clip in stored_clips(open_sources([SourceConfig(path=str(root / "split"))]))}
    decoder = build_clip_decoder(DecodeConfig(num_workers=0), 48, 64, None)
    rows = [json.loads(line) for line in (root / "choices.jsonl").read_text().splitlines()][:3]
    right = []
    for row in rows:
        videos = embed_videos(trained.dual, [clips[row["id"]]], evenly_spread(6, FrameConfig()), decoder, 3, 3)
        text = embed_texts(trained.dual, row["captions"], trained.tokenizer, 4)
        scores_CK = text.feature_CE @ videos.feature_VE.T / trained.dual.temperature().detach()
        score_C = scores_CK.mean(dim=1) if how == "mean" else scores_CK.amax(dim=1)
        right.append(int(score_C.argmax()) == row["answer"])
    decoder.close()
    choices = tmp_path / "choices.jsonl"
    _write(choices, rows)
    found = choose(_config(ChoiceConfig, root, tmp_path / how, num_clips=3, aggregation=how, choices=choices))
    assert found["metrics"]["vtc"] == pytest.approx(100 * np.mean(right))


def test_what_knows_no_clips_says_so(root, tmp_path):
    with pytest.raises(ConfigError, match="words are filled in about one clip; set num_clips=1"):
        fill_in(_config(MaskedWordsConfig, root, tmp_path / "out", num_clips=2))
    with pytest.raises(ConfigError, match="a prompter sees one clip, as in training; set num_clips=1"):
        label(_config(PrompterLabelsConfig, root, tmp_path / "out", num_clips=2))


def test_sentences_without_a_question_are_counted(root, tmp_path):
    key = json.loads((root / "cloze.jsonl").read_text())["id"]
    rows = [("a cat moves", "cat"), ("a sofa", "sofa"), ("a dog", "cat")]
    _write(tmp_path / "cloze.jsonl", [{"id": key, "text": text, "word": word} for text, word in rows])
    found = fill_in(_config(MaskedWordsConfig, root, tmp_path / "out", sentences=tmp_path / "cloze.jsonl"))
    assert found["split"]["num_questions"] == 1
    assert found["split"]["num_sentences_without_question"] == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "a", "captions": ["x", "y"], "answer": 2}', "line 1: .*answer 2 is none of the 2 captions"),
        ('{"id": "a", "captions": ["x"], "answer": 0}', "line 1: .*captions"),
        ('{"captions": ["x", "y"], "answer": 0}', "line 1: .*id"),
        ("\n\n{", r"is no file of JSON lines \(line 3\)"),
        ('{"id": "a", "captions": ["x", "x"], "answer": 0}', "line 1: .*the true caption is there twice: 'x'"),
        ('{"id": "a", "captions": ["x", "y"], "answer": 0}', "none of the 1 lines .* such as 'a', where the data set"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(root, tmp_path, line, message):
    (tmp_path / "choices.jsonl").write_text(line + "\n")
    with pytest.raises((ConfigError, DataError), match=message):
        choose(_config(ChoiceConfig, root, tmp_path / "out", choices=tmp_path / "choices.jsonl"))


def test_a_checkpoint_without_the_head_is_refused(root, tmp_path):
    with pytest.raises(ConfigError, match=r"is a prompter: it has no matching head; set scores=\[vtc\]"):
        choose(_config(ChoiceConfig, root, tmp_path / "out", checkpoint=root / "prompter"))
    found = choose(_config(ChoiceConfig, root, tmp_path / "out", checkpoint=root / "prompter", scores=["vtc"]))
    assert set(found["metrics"]) == {"vtc", "by_type"}
    with pytest.raises(ConfigError, match="trained for prompter: it has no head for masked words"):
        fill_in(_config(MaskedWordsConfig, root, tmp_path / "out", checkpoint=root / "prompter"))


def test_labels_equal_one_crop_at_a_time(root, tmp_path):
    trained = load_trained(root / "prompter", CPU)
    clips = stored_clips(open_sources([SourceConfig(path=str(root / "split"))]))
    decoder = build_clip_decoder(DecodeConfig(num_workers=0), 48, 32, None)
    banks = {"video": build_bank(trained.dual, trained.tokenizer, NOUNS, "video")}
    labeller = Labeller(trained.dual, banks, PemConfig(), trained.dual.config.video.patch_size)
    from alpro_stream.evaluate.embed import pixels_of

    config = _config(PrompterLabelsConfig, root, tmp_path / "out", crops_per_clip=8)
    shown, not_shown = [], []
    for clip in clips:
        pixels = pixels_of([clip], evenly_spread(2, FrameConfig()), decoder)
        for crop in range(8):
            box = pem_crop_boxes(48, 16, sample_keys([("prompter labels", clip.key, crop)], "pem box"))
            q_M = labeller(pixels, torch.from_numpy(box), "video").labels_BM[0]
            top, left, height, width = (box[0] / 3).tolist()
            rows, columns = min(top + height, 0.5) - max(top, 0), min(left + width, 0.5) - max(left, 0)
            has_dog = max(rows, 0) * max(columns, 0) >= 0.125
            (shown if has_dog else not_shown).append((int(q_M.argmax()) == 0, float(q_M[0]), float(q_M.max())))
    decoder.close()
    found = label(config)
    assert found["split"]["num_crops_with_object"] == len(shown)
    assert found["split"]["num_crops_without_object"] == len(not_shown)
    assert shown
    assert not_shown
    right, mass, largest = 100 * np.mean(shown, axis=0)
    assert found["metrics"]["top_entity"] == pytest.approx(right)
    assert found["metrics"]["mass_on_objects"] == pytest.approx(mass, rel=1e-4)
    assert found["metrics"]["confidence_with_object"] == pytest.approx(largest, rel=1e-4)
    assert found["metrics"]["confidence_without_object"] == pytest.approx(100 * np.mean(not_shown, axis=0)[2], rel=1e-4)


def test_an_object_is_shown_where_a_frame_has_half_of_it_in_the_crop():
    crop = np.array([0.0, 0.0, 0.5, 0.5])

    def seen(*boxes):
        return seen_in([LocatedObject(word="dog", boxes=boxes)], crop, num_frames=2) == ["dog"]

    inside, half, less, none = (0.1, 0.1, 0.2, 0.2), (0.0, 0.25, 0.5, 0.5), (0.0, 0.26, 0.5, 0.5), None
    assert seen(inside, inside)
    assert seen(half, half)
    assert not seen(less, less)
    assert seen(none, inside)
    assert not seen(none, none)
    # Of four stored frames, evaluation takes the second and the last.
    assert not seen(inside, none, inside, none)
    assert seen(none, inside, none, none)


def _evaluate_on_ranks(root, out):
    world = join_world(60.0)
    found = {
        "words": fill_in(_config(MaskedWordsConfig, root, out / "words"), world),
        "choices": choose(_config(ChoiceConfig, root, out / "choices"), world),
        "labels": label(_config(PrompterLabelsConfig, root, out / "labels"), world),
    }
    return {name: one["metrics"] for name, one in found.items()}


def test_two_ranks_find_the_same(root, tmp_path):
    found, other = run_ranks(_evaluate_on_ranks, 2, root, tmp_path / "two")
    assert found == other
    alone = {
        "words": fill_in(_config(MaskedWordsConfig, root, tmp_path / "words")),
        "choices": choose(_config(ChoiceConfig, root, tmp_path / "choices")),
        "labels": label(_config(PrompterLabelsConfig, root, tmp_path / "labels")),
    }
    for name, one in alone.items():
        by_type = one["metrics"].pop("by_type", {})
        assert found[name].pop("by_type", {}) == pytest.approx(by_type)
        assert found[name] == pytest.approx(one["metrics"])


def test_results_are_shown_beside_each_other(root, tmp_path, capsys):
    for name in ("one", "other"):
        choose(_config(ChoiceConfig, root, tmp_path / name))
    show_table([str(tmp_path / "one"), str(tmp_path / "other")])
    assert "c_vtm" in capsys.readouterr().out
    assert load_evaluation(str(tmp_path / "one" / "result.json"), []).task == "multiple_choice"
