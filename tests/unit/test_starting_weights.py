"""Starting weights for ablations: what they have learned, and what they know nothing of."""

import pytest
import torch

from alpro_launch import starting_weights
from alpro_launch.starting_weights import StartingWeightsConfig, train_starting_weights
from alpro_stream.config import validate
from alpro_stream.errors import ConfigError
from alpro_stream.model.alpro import AlproModel
from alpro_stream.model.folder import read_model
from alpro_stream.model.video_encoder import VideoEncoder
from alpro_stream.testing.glyphs.corpus import CorpusConfig, split_of, write_corpus
from alpro_stream.testing.glyphs.render import draw_picture
from alpro_stream.testing.shards import write_tokenizer

_MODEL = {
    "video": {
        "image_size": 32,
        "patch_size": 8,
        "num_frames": 2,
        "width": 32,
        "depth": 2,
        "num_heads": 2,
        "drop_path": 0,
    },
    "text": {
        "width": 32,
        "num_layers": 1,
        "num_multimodal_layers": 1,
        "num_heads": 2,
        "intermediate_size": 64,
        "dropout": 0,
    },
    "projection_size": 16,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    write_corpus(CorpusConfig(out=folder / "corpus", num_clips={"train": 6}), num_processes=1)
    write_tokenizer(folder / "tokenizer")
    return folder


def _config(root, out, **changes):
    steps = {"max_steps": 3, "batch_size": 4, "learning_rate": 1e-3}
    values = {
        "corpus": root / "corpus",
        "out": out,
        "model": _MODEL,
        "text": {"tokenizer": str(root / "tokenizer"), "num_tokens": 16},
        "pictures": steps,
        "captions": steps,
        **changes,
    }
    return validate(StartingWeightsConfig, values, source="test")


def _trained(config):
    told = []
    train_starting_weights(config, told.append)
    model = read_model(config.out).model
    assert isinstance(model, AlproModel)
    return model, told


def test_the_video_encoder_knows_pictures_and_no_time(root, tmp_path):
    model, _ = _trained(_config(root, tmp_path / "start"))
    encoder = model.dual.video_encoder
    assert not encoder.time_embed.any()
    for block in encoder.blocks:
        assert not block.temporal_fc.weight.any()
        assert torch.equal(block.temporal_attn.qkv.weight, block.attn.qkv.weight)
    video = torch.randn(1, 2, 3, 32, 32)
    torch.testing.assert_close(encoder(video), encoder(video.flip(1)))


def test_places_and_times_have_the_deviation_that_is_asked_for(root, tmp_path):
    few = {"max_steps": 1, "batch_size": 4, "learning_rate": 1e-9}
    plain, wide = (
        _config(root, tmp_path / str(len(more)), pictures=few, captions=few, **more)
        for more in ({}, {"position_std": 0.2, "time_std": 0.3})
    )
    for config in (plain, wide):
        train_starting_weights(config)
    plain_encoder, encoder = (read_model(config.out).dual.video_encoder for config in (plain, wide))
    assert torch.allclose(encoder.pos_embed, 10 * plain_encoder.pos_embed, atol=1e-5)
    assert not plain_encoder.time_embed.any()
    assert 0.2 < float(encoder.time_embed.detach().std()) < 0.4


def test_what_is_written_is_what_learned(root, tmp_path, monkeypatch):
    """Time is taken out of an encoder at the end, which must have been without it all along."""
    frame, changes, original = torch.randn(2, 1, 3, 32, 32), [], VideoEncoder.start_time_as_identity

    def spied(encoder):
        with torch.no_grad():
            before = encoder(frame)
            original(encoder)
            changes.append(float((encoder(frame) - before).abs().max()))

    monkeypatch.setattr(VideoEncoder, "start_time_as_identity", spied)
    train_starting_weights(_config(root, tmp_path / "start"), lambda line: None)
    _, before_pictures, after_pictures = changes  # The first is of the constructor.
    assert before_pictures > 1e-3
    assert after_pictures < 1e-6


def test_no_picture_shows_a_pair_that_is_held_out(root, tmp_path, monkeypatch):
    shown = _shown(monkeypatch)
    _trained(_config(root, tmp_path / "start", pictures={"max_steps": 20, "batch_size": 32, "learning_rate": 1e-3}))
    assert {split_of(one.noun, one.colour, 8) for one in shown if one.noun < 24} == {"train"}
    assert {split_of(one.noun, one.colour, 8) for one in shown if one.noun >= 24} == {"train", "validation", "test"}


def test_each_stage_changes_its_own_part(root, tmp_path):
    """Longer pictures leave the text alone, longer captions the video encoder."""
    longer = {"max_steps": 5, "batch_size": 4, "learning_rate": 1e-3}
    first, told = _trained(_config(root, tmp_path / "first"))
    pictures, _ = _trained(_config(root, tmp_path / "pictures", pictures=longer))
    captions, _ = _trained(_config(root, tmp_path / "captions", captions=longer))
    assert _same(first.dual.text_encoder, pictures.dual.text_encoder)
    assert not _same(first.dual.video_encoder, pictures.dual.video_encoder)
    assert _same(first.dual.video_encoder, captions.dual.video_encoder)
    assert not _same(first.dual.text_encoder, captions.dual.text_encoder)
    assert not _same(first.multimodal, captions.multimodal)
    assert "% named" in told[0]
    assert "loss" in told[1]


def test_a_seed_gives_the_same_weights_and_another_one_others(root, tmp_path):
    files = [
        (_trained(_config(root, tmp_path / name, seed=seed)), tmp_path / name / "model.safetensors")[1].read_bytes()
        for name, seed in (("one", 3), ("again", 3), ("other", 4))
    ]
    assert files[0] == files[1]
    assert files[0] != files[2]


def test_weights_that_are_there_are_left_alone(root, tmp_path):
    config = _config(root, tmp_path / "start")
    _trained(config)
    before = (config.out / "model.safetensors").stat().st_mtime_ns
    _, told = _trained(config)
    assert told == [f"there already: {config.out}"]
    assert (config.out / "model.safetensors").stat().st_mtime_ns == before


def test_other_weights_in_the_folder_are_refused(root, tmp_path):
    _trained(_config(root, tmp_path / "start"))
    with pytest.raises(ConfigError, match=r"holds other starting weights \(seed.*choose another `out`"):
        _trained(_config(root, tmp_path / "start", seed=1))


def test_pictures_may_show_other_objects_than_the_corpus(root, tmp_path, monkeypatch):
    shown = _shown(monkeypatch)
    _trained(_config(root, tmp_path / "others", classes="others"))
    assert min(one.noun for one in shown) >= 24


def _shown(monkeypatch):
    """What the pictures of a training show, as they are drawn."""
    shown = []

    def drawn(thing, *rest):
        shown.append(thing)
        return draw_picture(thing, *rest)

    monkeypatch.setattr(starting_weights, "draw_picture", drawn)
    return shown


def _same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
