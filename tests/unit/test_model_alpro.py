import pytest
import torch
from pydantic import ValidationError

from alpro_stream.model.alpro import Alpro, DualEncoder, ModelConfig, unit_feature
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
    return Alpro(CONFIG, vocab_size=40, num_entities=7).eval()


def test_shapes_of_everything(model):
    tokens_BND, video_BE = model.dual.encode_video(torch.randn(3, 2, 3, 32, 32))
    mask_BL = torch.ones(3, 8, dtype=torch.int64)
    text_BLD, text_BE = model.dual.encode_text(torch.randint(0, 40, (3, 8)), mask_BL)
    fused_BSD = model.multimodal(text_BLD, mask_BL, tokens_BND)
    assert (tokens_BND.shape, text_BLD.shape) == ((3, 5, 16), (3, 8, 16))
    assert (video_BE.shape, text_BE.shape) == ((3, 6), (3, 6))
    assert fused_BSD.shape == (3, 13, 16)
    assert model.vtm_head(fused_BSD[:, 0]).shape == (3, 2)
    assert model.mlm_head(fused_BSD[:, :8]).shape == (3, 8, 40)
    assert model.pem_head(fused_BSD[:, 9:].mean(1)).shape == (3, 7)


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
