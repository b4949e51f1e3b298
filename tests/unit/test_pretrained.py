"""The Python API on real clips: what it accepts, that its figures agree, and its refusals."""

import http.server
import json
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

import alpro_stream
from alpro_stream.config import validate
from alpro_stream.errors import CheckpointError, ConfigError, DataError, MediaError
from alpro_stream.media import FrameConfig, open_media, sparse_frames
from alpro_stream.model.folder import LoadedModel, ModelDescription
from alpro_stream.model.pixels import normalise
from alpro_stream.pretrained import Alpro
from alpro_stream.stream.text import Tokenizer
from alpro_stream.testing.configs import TINY_MODEL
from alpro_stream.testing.shards import write_tokenizer

CLIPS = Path("examples/clips")
VIDEO, OTHER = sorted((CLIPS / "videos").iterdir())[:2]
IMAGE = sorted((CLIPS / "images").iterdir())[0]
TEXTS = ["a red dog moves", "a blue boat moves", "a green cat"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def make(folder, task, **lists):
    tokenizer = Tokenizer(str(folder), 12)
    values = {"task": task, "model": TINY_MODEL, "vocab_size": tokenizer.vocab_size, "num_tokens": 12, **lists}
    description = validate(ModelDescription, values, source="test")
    torch.manual_seed(0)
    model = description.build()
    for name, parameter in model.named_parameters():
        if "temporal_fc" in name or "time_embed" in name:  # Fresh ones hide the order of the frames.
            torch.nn.init.normal_(parameter, std=0.2)
    return Alpro(LoadedModel(description, model, tokenizer))


@pytest.fixture(scope="module")
def model(folder):
    return make(folder, "pretrain", entities=["dog", "cat"])


def test_the_package_hands_out_the_class_without_loading_torch_before():
    assert alpro_stream.Alpro is Alpro
    with pytest.raises(AttributeError, match="Alpr"):
        _ = alpro_stream.Alpr


def test_features_are_unit_rows_and_similarity_is_their_product(model):
    video_VE, text_CE = model.encode_video([VIDEO, OTHER, IMAGE]), model.encode_text(TEXTS)
    assert (video_VE.shape, text_CE.shape) == ((3, 16), (3, 16))
    torch.testing.assert_close(video_VE.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(model.similarity([VIDEO, OTHER, IMAGE], TEXTS), video_VE @ text_CE.T)
    torch.testing.assert_close(model.encode_video(VIDEO), video_VE[:1])
    torch.testing.assert_close(model.encode_text(TEXTS[0]), text_CE[:1])


def test_a_path_its_frames_and_prepared_pixels_give_the_same_feature(model):
    config = model.model.config.video
    with open_media(VIDEO) as file:
        stored = np.stack(sparse_frames(file, FrameConfig(fps=3, max_frames=64, size=config.image_size)).frames)
    expected = model.encode_video(VIDEO)
    chosen = stored[(2 * np.arange(config.num_frames) + 1) * len(stored) // (2 * config.num_frames)]
    for same in (stored, list(stored), [Image.fromarray(frame) for frame in stored], torch.from_numpy(stored)):
        torch.testing.assert_close(model.encode_video(same), expected)
    prepared = normalise(torch.from_numpy(chosen)[None])
    torch.testing.assert_close(model.encode_video(prepared[0]), expected)
    torch.testing.assert_close(model.encode_video(prepared.repeat(2, 1, 1, 1, 1)), expected.repeat(2, 1))


def test_the_network_sees_the_whole_frame_and_the_order_of_frames(model):
    with open_media(VIDEO) as file:
        stored = np.stack(sparse_frames(file, FrameConfig(size=64)).frames)
    assert not torch.allclose(model.encode_video(stored), model.encode_video(stored[::-1].copy()), atol=1e-6)
    by_hand, _ = model.model.dual.encode_video(normalise(torch.zeros(1, 2, 48, 48, 3, dtype=torch.uint8)))
    black = model.encode_video(np.zeros((5, 30, 50, 3), np.uint8))
    torch.testing.assert_close(black, normalize(model.model.dual.video_projection(by_hand[:, 0]), dim=1))


def test_an_image_is_one_frame(model, tmp_path):
    picture = Image.open(IMAGE).convert("RGB")
    picture.save(tmp_path / "a.png")
    torch.testing.assert_close(model.encode_video(str(tmp_path / "a.png")), model.encode_video(picture))
    # The file of a large JPEG is shrunk while it is decoded, a picture afterwards.
    torch.testing.assert_close(model.encode_video(str(IMAGE)), model.encode_video(picture), atol=5e-3, rtol=0)
    torch.testing.assert_close(model.encode_video(picture), model.encode_video(np.asarray(picture)))


def test_match_is_the_probability_of_every_pair(model):
    scores_VC = model.match([VIDEO, IMAGE], TEXTS)
    assert scores_VC.shape == (2, 3)
    assert ((scores_VC > 0) & (scores_VC < 1)).all()
    torch.testing.assert_close(model.match(IMAGE, TEXTS[2]), scores_VC[1:, 2:])


def test_answers_are_ordered_and_named(folder):
    model = make(folder, "question_answering", answers=["yes", "no", "red", ""])
    answers = model.answer(VIDEO, "what moves", top=9)
    assert sorted(answer.text for answer in answers) == ["no", "red", "yes"]
    assert [a.probability for a in answers] == sorted((a.probability for a in answers), reverse=True)
    assert sum(a.probability for a in answers) < 1
    assert model.answer(VIDEO, "what moves", top=1) == answers[:1]
    for video, question, top in ((VIDEO, "what", 0), (VIDEO, ["a", "b"], 1), ([VIDEO, OTHER], "what", 1)):
        with pytest.raises(DataError, match="expected one question about one video"):
            model.answer(video, question, top=top)
    with pytest.raises(ConfigError, match="features of a question answering model are not trained"):
        model.encode_text("a dog")


def test_pictures_are_upright_and_on_white_as_files_are(model, tmp_path):
    orientation = Image.Exif()
    orientation[0x0112] = 6  # Turned by a quarter.
    Image.new("RGBA", (60, 40), (200, 0, 0, 90)).save(tmp_path / "transparent.png")
    Image.new("I;16", (9, 9), 9000).save(tmp_path / "grey.png")
    Image.open(IMAGE).reduce(4).save(tmp_path / "turned.jpg", exif=orientation)
    for path in tmp_path.iterdir():
        torch.testing.assert_close(model.encode_video(Image.open(path)), model.encode_video(path), msg=path.name)


def test_the_message_names_the_file_of_several(model, tmp_path):
    (tmp_path / "empty.mp4").touch()
    with pytest.raises(MediaError, match=r"empty\.mp4: the file is empty"):
        model.encode_video([VIDEO, tmp_path / "empty.mp4"])


@pytest.mark.parametrize("task", ["prompter", "pretrain", "retrieval", "question_answering"])
def test_saved_and_loaded_again_it_is_the_same(folder, tmp_path, task):
    lists = {"pretrain": {"entities": ["dog"]}, "question_answering": {"answers": ["yes", "no"]}}.get(task, {})
    model = make(folder, task, **lists)
    model.save_pretrained(tmp_path / "saved")
    assert {path.name for path in (tmp_path / "saved").iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer",
        "README.md",
    }
    again = Alpro.from_pretrained(tmp_path / "saved", device="cpu")
    assert again.description == model.description
    for name, tensor in model.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name
    if task == "question_answering":
        assert again.answer(IMAGE, TEXTS[0]) == model.answer(IMAGE, TEXTS[0])
    else:
        assert torch.equal(again.similarity(IMAGE, TEXTS), model.similarity(IMAGE, TEXTS))


def test_push_to_hub_uploads_what_is_saved(model, monkeypatch):
    """The hub itself cannot be here: its client is asked what it would send."""
    sent = {}

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, **options):
            sent["repository"] = repo_id
            return type("Url", (), {"repo_id": repo_id})()

        def upload_folder(self, folder_path, **options):
            sent["files"] = {path.name for path in Path(folder_path).iterdir()}

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Api)
    model.push_to_hub("me/alpro")
    assert sent["repository"] == "me/alpro"
    assert {"config.json", "model.safetensors", "tokenizer"} <= sent["files"]


def test_a_name_on_the_hub_is_fetched_as_a_folder(model, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path / "saved")
    asked = {}

    def download(name, **options):
        asked.update(options, name=name)
        return str(tmp_path / "saved")

    monkeypatch.setattr("alpro_stream.pretrained.snapshot_download", download)
    again = Alpro.from_pretrained("me/alpro", revision="v1", device="cpu")
    assert asked == {"name": "me/alpro", "revision": "v1"}
    assert torch.equal(again.encode_text(TEXTS), model.encode_text(TEXTS))


@pytest.fixture
def server():
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(CLIPS))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_an_address_is_fetched(model, server):
    by_address = model.encode_video([f"{server}/videos/{VIDEO.name}", f"{server}/images/{IMAGE.name}?size=full"])
    torch.testing.assert_close(by_address, model.encode_video([VIDEO, IMAGE]))


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("{}/videos/none.mp4", "404"),
        ("file:///etc/passwd", "cannot fetch file://"),
        ("http:///a.mp4", "http:///a.mp4: the address names no server"),
    ],
)
def test_a_bad_address_says_why(model, server, address, words):
    with pytest.raises(MediaError, match=words):
        model.encode_video(address.format(server))


@pytest.mark.parametrize(
    ("video", "error", "words"),
    [
        ([], DataError, "no video"),
        ("missing.mp4", MediaError, "No such file"),
        (np.zeros((2, 48, 48, 3), np.float32), DataError, "float32"),
        (np.zeros((2, 48, 48), np.uint8), DataError, r"shape \(2, 48, 48\).*grey"),
        (np.zeros((0, 48, 48, 3), np.uint8), DataError, "without frames"),
        ([[]], DataError, "without frames"),
        (None, DataError, "a video is a NoneType"),
        ([["a.mp4"]], DataError, "a frame is a str"),
        (torch.zeros(5, 3, 48, 48), DataError, r"\(5, 3, 48, 48\).*2 frames"),
        (torch.zeros(2, 3, 50, 50), ConfigError, r"50, 50\).*48, 48"),
        (torch.full((2, 3, 48, 48), torch.nan), DataError, "not finite"),
    ],
)
def test_bad_videos_are_refused(model, video, error, words):
    with pytest.raises(error, match=words):
        model.encode_video(video)


def test_what_a_model_was_not_made_for_is_refused(folder, model):
    with pytest.raises(ConfigError, match="cannot answer"):
        model.answer(IMAGE, "what")
    with pytest.raises(ConfigError, match="dual encoder"):
        make(folder, "prompter").match(IMAGE, TEXTS)
    with pytest.raises(ConfigError, match="no matching head"):
        make(folder, "question_answering", answers=["yes"]).match(IMAGE, TEXTS)
    with pytest.raises(DataError, match="no text"):
        model.encode_text([])
    for texts in (None, [3], [["a"]]):
        with pytest.raises(DataError, match="expected a str"):
            model.encode_text(texts)


def test_bad_sources_are_refused(model, tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        Alpro.from_pretrained("./missing")
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        Alpro.from_pretrained(tmp_path)
    (tmp_path / "weights.pt").write_bytes(b"abc")
    with pytest.raises(CheckpointError, match="alpro export"):
        Alpro.from_pretrained(tmp_path / "weights.pt")
    model.save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 9}))
    with pytest.raises(CheckpointError, match="format_version"):
        Alpro.from_pretrained(tmp_path / "saved")
