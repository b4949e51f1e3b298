import pytest
import torch
from pydantic import ValidationError

from alpro_stream.errors import ConfigError
from alpro_stream.model.alpro import AlproModel, DualEncoder, Heads, ModelConfig, build_model, unit_feature
from alpro_stream.model.text_encoder import TextEncoderConfig
from alpro_stream.model.video_encoder import VideoEncoderConfig

CONFIG = ModelConfig(
    video=VideoEncoderConfig(image_size=32, num_frames=2, width=16, depth=2, num_heads=2),
    text=TextEncoderConfig(
        width=16, num_layers=2, num_multimodal_layers=2, num_heads=2, intermediate_size=32, max_positions=10
    ),
    projection_size=6,
)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return AlproModel(CONFIG, vocab_size=40, heads=Heads.of("pretrain", num_entities=7)).eval()


def test_shapes_of_everything(model):
    tokens_BND, video_BE = model.dual.encode_video(torch.randn(3, 2, 3, 32, 32))
    mask_BL = torch.ones(3, 8, dtype=torch.int64)
    text_BLD, text_BE = model.dual.encode_text(torch.randint(0, 40, (3, 8)), mask_BL)
    fused_BSD = model.multimodal(text_BLD, mask_BL, tokens_BND)
    assert (tokens_BND.shape, text_BLD.shape) == ((3, 5, 16), (3, 8, 16))
    assert (video_BE.shape, text_BE.shape) == ((3, 6), (3, 6))
    assert fused_BSD.shape == (3, 13, 16)
    assert model.match_logits(fused_BSD[:, 0]).shape == (3, 2)
    assert model.word_logits(fused_BSD[:, :8]).shape == (3, 8, 40)
    assert model.entity_logits(fused_BSD[:, 9:].mean(1)).shape == (3, 7)


def test_features_have_unit_length(model):
    feature_BE = model.dual.encode_video(torch.randn(3, 2, 3, 32, 32))[1]
    torch.testing.assert_close(feature_BE.norm(dim=1), torch.ones(3))
    assert model.dual.double().encode_video(torch.randn(3, 2, 3, 32, 32).double())[1].dtype == torch.float64


@pytest.mark.parametrize(("raw", "expected"), [(0.07, 0.07), (0.9, 0.5), (-1.0, 0.001)])
def test_temperature_is_clamped_and_keeps_its_gradient(model, raw, expected):
    with torch.no_grad():
        model.dual.raw_temperature.fill_(raw)
    temperature = model.dual.temperature()
    assert temperature.shape == ()
    assert temperature.item() == pytest.approx(expected)
    (3 * temperature).backward()
    assert model.dual.raw_temperature.grad.item() == 3


def test_temperature_is_never_in_bfloat16(model):
    model.dual.bfloat16()
    assert model.dual.temperature().dtype == torch.float32


def test_the_dual_encoder_alone_has_the_lower_text_half_only(model):
    alone = DualEncoder(CONFIG, vocab_size=40)
    assert set(alone.state_dict()) == set(model.dual.state_dict())
    assert len(alone.text_encoder.layers) == 2
    alone.load_state_dict(model.dual.state_dict())
    video = torch.randn(2, 2, 3, 32, 32)
    assert torch.equal(alone.eval().encode_video(video)[1], model.dual.encode_video(video)[1])


def test_no_parameter_is_stored_twice(model):
    tensors = list(model.state_dict().values())
    assert len({tensor.data_ptr() for tensor in tensors}) == len(tensors)
    assert len(list(model.parameters())) == len(tensors)


def test_fresh_weights(model):
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "time_embed" in name or "temporal_fc" in name:
            assert parameter.abs().max() == 0, name
        elif "temperature" in name:
            assert parameter.item() == pytest.approx(0.07)
        elif parameter.ndim == 1:
            assert parameter.eq(1).all(), name
        else:
            assert parameter.abs().max() <= 0.04, name
            assert parameter.std().item() == pytest.approx(0.0176, rel=0.3), name


def test_widths_must_agree():
    with pytest.raises(ValidationError, match=r"video\.width 768 and text\.width 384"):
        ModelConfig(text=TextEncoderConfig(width=384))


def test_autocast_does_not_reach_the_projection(model):
    cls_BD = torch.randn(3, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        feature_BE = unit_feature(model.dual.video_projection, cls_BD)
    assert torch.equal(feature_BE, unit_feature(model.dual.video_projection, cls_BD))


HEADS = {"vtm_head": "match", "mlm_head": "word", "pem_head": "entity", "answer_head": "answer"}


@pytest.mark.parametrize(
    ("task", "lists", "heads"),
    [
        ("pretrain", {"num_entities": 7}, {"vtm_head", "mlm_head", "pem_head"}),
        ("pretrain", {}, {"vtm_head", "mlm_head"}),
        ("retrieval", {}, {"vtm_head"}),
        ("question_answering", {"num_answers": 4}, {"answer_head"}),
    ],
)
def test_a_task_has_the_heads_it_needs_and_refuses_the_others(task, lists, heads):
    model = build_model(task, CONFIG, 40, **lists)
    parts = {name.partition(".")[0] for name in model.state_dict()}
    assert parts == {"dual", "multimodal", *heads}
    hidden_BD = torch.randn(3, 16)
    for name, kind in HEADS.items():
        logits = getattr(model, f"{kind}_logits")
        if name in heads:
            assert torch.equal(logits(hidden_BD), getattr(model, name)(hidden_BD))
        else:
            assert getattr(model, name) is None
            with pytest.raises(ConfigError, match=r"this model has no .* head; use one that was trained for"):
                logits(hidden_BD)


def test_every_missing_head_is_named_with_the_task_that_has_it():
    model, hidden_BD = AlproModel(CONFIG, 40, Heads()), torch.randn(3, 16)
    for logits, message in (
        (model.match_logits, "no matching head; use one that was trained for pretrain or retrieval"),
        (model.word_logits, "no masked-word head; use one that was trained for pretrain"),
        (model.entity_logits, "no entity head; use one that was trained for pretrain"),
        (model.answer_logits, "no answer head; use one that was trained for question_answering"),
    ):
        with pytest.raises(ConfigError, match=message):
            logits(hidden_BD)


def test_a_prompter_is_the_dual_encoder_and_answers_are_needed():
    assert type(build_model("prompter", CONFIG, 40)) is DualEncoder
    with pytest.raises(ConfigError, match="a prompter is a dual encoder"):
        Heads.of("prompter")
    with pytest.raises(ConfigError, match="chooses from a list of answers, which is empty"):
        build_model("question_answering", CONFIG, 40)


@torch.no_grad()
def test_the_feature_alone_equals_that_beside_the_tokens(model):
    for block in model.dual.video_encoder.blocks:
        torch.nn.init.normal_(block.temporal_fc.weight, std=0.3)
    for frames in (1, 2):
        video_BTCHW = torch.randn(3, frames, 3, 32, 32)
        _, expected_BE = model.dual.encode_video(video_BTCHW)
        torch.testing.assert_close(model.dual.video_feature(video_BTCHW), expected_BE, rtol=1e-5, atol=1e-6)
