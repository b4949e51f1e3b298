import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from transformers import BertConfig, BertForMaskedLM, BertModel

from alpro_stream.errors import CheckpointError
from alpro_stream.model.alpro import AlproModel, DualEncoder, Heads, ModelConfig
from alpro_stream.model.pixels import normalise
from alpro_stream.model.text_encoder import TextEncoderConfig
from alpro_stream.model.video_encoder import VideoEncoder, VideoEncoderConfig
from alpro_stream.model.weights import (
    start_from_pretrained,
    start_text_from_bert,
    start_video_from_vit,
)

VOCAB = 40
CONFIG = ModelConfig(
    video=VideoEncoderConfig(image_size=32, patch_size=8, num_frames=3, width=16, depth=2, num_heads=2),
    text=TextEncoderConfig(
        width=16, num_layers=2, num_multimodal_layers=1, num_heads=2, intermediate_size=32, max_positions=10
    ),
    projection_size=6,
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def vit():
    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=5)
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return vit.eval()


@pytest.fixture
def vit_file(vit, tmp_path):
    save_file(vit.state_dict(), tmp_path / "vit.safetensors")
    return str(tmp_path / "vit.safetensors")


def bert_config(**changes):
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 10,
    }
    return BertConfig(**{**sizes, **changes})


@torch.no_grad()
def test_encoder_started_from_a_vit_equals_it_on_equal_frames(vit, vit_file):
    encoder = VideoEncoder(CONFIG.video).eval()
    report = start_video_from_vit(encoder, vit_file)
    frames_BTHWC = torch.randint(0, 256, (2, 1, 32, 32, 3), dtype=torch.uint8).expand(-1, 3, -1, -1, -1)
    video_BTCHW = normalise(frames_BTHWC)
    torch.testing.assert_close(encoder(video_BTCHW), vit.forward_features(video_BTCHW[:, 0]), rtol=1e-4, atol=1e-5)
    block = encoder.blocks[1]
    assert torch.equal(block.temporal_attn.proj.weight, vit.blocks[1].attn.proj.weight)
    assert torch.equal(block.temporal_norm1.weight, vit.blocks[1].norm1.weight)
    assert report.skipped == ("head.bias", "head.weight")
    assert "time_embed" in report.missing
    assert "blocks.0.temporal_fc.weight" in report.missing
    assert set(report.loaded) | set(report.missing) == set(encoder.state_dict())


def test_vit_from_a_pth_file_and_from_deeper_models(vit, tmp_path):
    torch.save({"state_dict": vit.state_dict()}, tmp_path / "vit.pth")
    encoder = VideoEncoder(CONFIG.video.model_copy(update={"depth": 1}))
    report = start_video_from_vit(encoder, str(tmp_path / "vit.pth"))
    assert torch.equal(encoder.blocks[0].mlp.fc1.weight, vit.blocks[0].mlp.fc1.weight)
    assert "blocks.1.attn.qkv.weight" in report.skipped


def test_position_embeddings_of_another_grid_are_resized_in_two_dimensions(vit, tmp_path):
    # A ramp along the columns stays a ramp along the columns, whatever the row.
    ramp = torch.linspace(0, 1, 4).expand(4, 4).flatten()
    with torch.no_grad():
        vit.pos_embed[0, 1:] = ramp[:, None]
    save_file(vit.state_dict(), tmp_path / "vit.safetensors")
    encoder = VideoEncoder(CONFIG.video.model_copy(update={"image_size": 64}))
    start_video_from_vit(encoder, str(tmp_path / "vit.safetensors"))
    grid_HWD = encoder.pos_embed[0, 1:].view(8, 8, 16)
    torch.testing.assert_close(grid_HWD, grid_HWD[:1].expand(8, -1, -1))
    assert (grid_HWD[0].diff(dim=0) > 0).all()
    assert torch.equal(encoder.pos_embed[:, 0], vit.pos_embed[:, 0])


@pytest.fixture
def timesformer(tmp_path):
    """A trained video encoder, and its file as TimeSformer's code writes it."""
    encoder = VideoEncoder(CONFIG.video)
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    tensors = {f"model.{name}": tensor for name, tensor in encoder.state_dict().items()}
    return encoder, {**tensors, "model.head.weight": torch.ones(4, 16)}, tmp_path / "timesformer.pyth"


def test_a_whole_timesformer_is_read_with_its_temporal_parts(timesformer):
    trained, tensors, path = timesformer
    torch.save({"epoch": 15, "model_state": tensors, "optimizer_state": {"state": {}}, "cfg": "MODEL: {}"}, path)
    encoder = VideoEncoder(CONFIG.video)
    report = start_video_from_vit(encoder, str(path))
    assert all(torch.equal(tensor, encoder.state_dict()[name]) for name, tensor in trained.state_dict().items())
    assert (report.skipped, report.resized, report.missing) == (("head.weight",), (), ())


def test_a_timesformer_of_more_frames_gives_the_nearest_of_its_time_embeddings(timesformer):
    trained, tensors, path = timesformer
    tensors["model.time_embed"] = torch.randn(1, 8, 16)
    torch.save({"model_state": tensors}, path)
    encoder = VideoEncoder(CONFIG.video)
    report = start_video_from_vit(encoder, str(path))
    assert report.resized == ("time_embed (1, 8, 16) -> (1, 3, 16)",)
    assert torch.equal(encoder.time_embed, tensors["model.time_embed"][:, [0, 2, 5]])
    assert torch.equal(encoder.blocks[1].temporal_fc.weight, trained.blocks[1].temporal_fc.weight)


def test_a_timesformer_with_a_hole_is_refused(timesformer):
    _, tensors, path = timesformer
    del tensors["model.blocks.1.temporal_fc.bias"]
    torch.save({"model_state": tensors}, path)
    with pytest.raises(CheckpointError, match=r"timesformer\.pyth: blocks\.1\.temporal_fc\.bias not in it"):
        start_video_from_vit(VideoEncoder(CONFIG.video), str(path))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"width": 32}, r"has shape .* and the model expects"),
        ({"depth": 3}, r"blocks\.2\..* not in it"),
        ({"patch_size": 16}, r"patch_embed\.proj\.weight has shape \(16, 3, 8, 8\)"),
    ],
)
def test_vit_of_other_sizes_is_refused_before_anything_changes(vit_file, sizes, message):
    encoder = VideoEncoder(CONFIG.video.model_copy(update=sizes))
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        start_video_from_vit(encoder, vit_file)
    assert all(torch.equal(before[name], tensor) for name, tensor in encoder.state_dict().items())


def test_a_whole_timesformer_is_read_with_its_time(tmp_path):
    config = CONFIG.video.model_copy(update={"num_frames": 4})
    theirs = VideoEncoder(config)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    state = {f"model.{name}": tensor for name, tensor in theirs.state_dict().items()}
    state["model.head.weight"] = torch.zeros(400, config.width)
    torch.save({"epoch": 3, "model_state": state, "cfg": "TRAIN: {}"}, tmp_path / "timesformer.pyth")
    encoder = VideoEncoder(config.model_copy(update={"num_frames": 2}))
    report = start_video_from_vit(encoder, str(tmp_path / "timesformer.pyth"))
    assert report.missing == ()
    assert report.skipped == ("head.weight",)
    assert report.resized == (f"time_embed (1, 4, {config.width}) -> (1, 2, {config.width})",)
    assert torch.equal(encoder.time_embed, theirs.time_embed[:, ::2])
    assert torch.equal(encoder.blocks[1].temporal_fc.weight, theirs.blocks[1].temporal_fc.weight)


def test_a_vit_with_parts_that_ours_does_not_have_is_refused(vit, tmp_path):
    torch.save(vit.state_dict() | {"blocks.0.ls1.gamma": torch.ones(16)}, tmp_path / "vit.pth")
    with pytest.raises(CheckpointError, match=r"no place for blocks\.0\.ls1\.gamma"):
        start_video_from_vit(VideoEncoder(CONFIG.video), str(tmp_path / "vit.pth"))


def test_unknown_vit_names_what_is_accepted(tmp_path):
    encoder = VideoEncoder(CONFIG.video)
    with pytest.raises(CheckpointError, match="neither a file nor a model that timm knows"):
        start_video_from_vit(encoder, str(tmp_path / "absent.pth"))
    (tmp_path / "broken.safetensors").write_bytes(b"not a header")
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        start_video_from_vit(encoder, str(tmp_path / "broken.safetensors"))


def test_the_names_of_a_published_vit_are_ours():
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32)
    encoder = VideoEncoder(VideoEncoderConfig(image_size=32, width=192, depth=12, num_heads=3))
    ours = {name: tensor.shape for name, tensor in encoder.state_dict().items()}
    theirs = {name: tensor.shape for name, tensor in vit.state_dict().items() if not name.startswith("head")}
    assert theirs.items() <= ours.items()


@torch.no_grad()
def test_text_halves_started_from_bert_equal_it(tmp_path):
    bert = BertModel(bert_config(), add_pooling_layer=False).eval()
    for parameter in bert.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    bert.save_pretrained(tmp_path)
    model = AlproModel(CONFIG, VOCAB, Heads.of("pretrain", num_entities=3)).eval()
    fresh_head = {name: tensor.clone() for name, tensor in model.mlm_head.state_dict().items()}
    report = start_text_from_bert(model.dual.text_encoder, str(tmp_path), model.multimodal, model.mlm_head)
    ids_BL, mask_BL = torch.randint(1, VOCAB, (2, 6)), torch.ones(2, 6, dtype=torch.int64)
    fused_BSD = model.multimodal(model.dual.text_encoder(ids_BL, mask_BL), mask_BL, torch.zeros(2, 0, 16))
    torch.testing.assert_close(fused_BSD, bert(input_ids=ids_BL, attention_mask=mask_BL).last_hidden_state)
    assert set(report.missing) == {f"mlm_head.{name}" for name in fresh_head}
    assert all(torch.equal(tensor, fresh_head[name]) for name, tensor in model.mlm_head.state_dict().items())


@torch.no_grad()
def test_masked_token_head_is_read_where_the_bert_has_one(tmp_path):
    bert = BertForMaskedLM(bert_config()).eval()
    torch.nn.init.normal_(bert.cls.predictions.bias)
    bert.save_pretrained(tmp_path)
    config = CONFIG.model_copy(update={"text": CONFIG.text.model_copy(update={"pretrained": str(tmp_path)})})
    model = AlproModel(config, VOCAB, Heads.of("pretrain", num_entities=3)).eval()
    (report,) = start_from_pretrained(model)
    assert report.missing == ()
    text_BLD = torch.randn(2, 6, 16)
    torch.testing.assert_close(model.mlm_head(text_BLD), bert.cls(text_BLD))


def test_a_dual_encoder_takes_the_lower_layers_only(vit_file, tmp_path):
    BertModel(bert_config()).save_pretrained(tmp_path / "bert")
    config = ModelConfig(
        video=CONFIG.video.model_copy(update={"pretrained": vit_file}),
        text=CONFIG.text.model_copy(update={"pretrained": str(tmp_path / "bert")}),
        projection_size=6,
    )
    video, text = start_from_pretrained(DualEncoder(config, VOCAB))
    assert video.source == vit_file
    assert text.missing == ()
    assert "bert.encoder.layer.2.output.dense.weight" in text.skipped
    assert "bert.encoder.layer.1.output.dense.weight" not in text.skipped
    assert "skipped (bert.* (" in str(text)


def test_nothing_is_read_without_a_source():
    assert start_from_pretrained(AlproModel(CONFIG, VOCAB, Heads.of("pretrain", num_entities=3))) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 41}, r"word_embeddings\.weight has shape \(41, 16\).*\(40, 16\)"),
        ({"num_hidden_layers": 2}, r"has no bert\.encoder\.layer\.2\..*at least the configured number of layers"),
    ],
)
def test_bert_of_other_sizes_is_refused(tmp_path, changes, message):
    BertModel(bert_config(**changes)).save_pretrained(tmp_path)
    model = AlproModel(CONFIG, VOCAB, Heads.of("pretrain", num_entities=3))
    with pytest.raises(CheckpointError, match=message):
        start_text_from_bert(model.dual.text_encoder, str(tmp_path), model.multimodal)


@pytest.mark.parametrize("change", [{"num_attention_heads": 4}, {"hidden_act": "relu"}, {"layer_norm_eps": 1e-5}])
def test_a_bert_that_computes_otherwise_is_refused(tmp_path, change):
    BertModel(bert_config(**change)).save_pretrained(tmp_path)
    model = AlproModel(CONFIG, VOCAB, Heads.of("pretrain", num_entities=3))
    with pytest.raises(CheckpointError, match=f"its {next(iter(change))} is"):
        start_text_from_bert(model.dual.text_encoder, str(tmp_path), model.multimodal)


def test_a_folder_without_bert_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="cannot read this BERT"):
        start_text_from_bert(DualEncoder(CONFIG, VOCAB).text_encoder, str(tmp_path))
