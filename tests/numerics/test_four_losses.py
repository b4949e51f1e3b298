"""All four losses through the whole tiny model: gradients everywhere, and bfloat16 autocast close to float32."""

import pytest
import torch

from alpro_stream.losses.mlm import mlm_loss
from alpro_stream.losses.pem import box_to_mask, keep_and_renormalise, pem_loss, pool_region
from alpro_stream.losses.vtc import vtc_loss
from alpro_stream.losses.vtm import sample_negatives, vtm_loss
from alpro_stream.model.alpro import AlproModel, Heads, ModelConfig
from alpro_stream.model.pixels import normalise
from alpro_stream.model.text_encoder import TextEncoderConfig
from alpro_stream.model.video_encoder import VideoEncoderConfig

CONFIG = ModelConfig(
    video=VideoEncoderConfig(image_size=48, num_frames=2, width=32, depth=2, num_heads=2, drop_path=0.0),
    text=TextEncoderConfig(
        width=32,
        num_layers=2,
        num_multimodal_layers=2,
        num_heads=2,
        intermediate_size=64,
        max_positions=8,
        dropout=0.0,
    ),
    projection_size=8,
)
SIZE, LENGTH, VOCAB, ENTITIES = 4, 8, 30, 5


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = AlproModel(CONFIG, VOCAB, Heads.of("pretrain", ENTITIES))
    for name, parameter in model.named_parameters():
        # A zero projection hides the temporal attention behind it from the gradient.
        if "temporal_fc" in name or "time_embed" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def four_losses(model, boxes_B4):
    generator = torch.Generator().manual_seed(1)
    frames = torch.randint(0, 256, (SIZE, 2, 48, 48, 3), dtype=torch.uint8, generator=generator)
    ids_BL = torch.randint(5, VOCAB, (SIZE, LENGTH), generator=generator)
    mask_BL = torch.arange(LENGTH)[None] < torch.tensor([8, 5, 6, 3])[:, None]
    labels_BL = torch.where((torch.arange(LENGTH) == 1)[None], ids_BL, -100)
    masked_BL = torch.where(labels_BL >= 0, 4, ids_BL)
    noise_2NN = torch.empty(2, SIZE, SIZE).exponential_(generator=generator)
    similarity_BM = torch.randn(SIZE, ENTITIES, generator=generator)

    video_BND, video_BE = model.dual.encode_video(normalise(frames))
    text_BLD, text_BE = model.dual.encode_text(ids_BL, mask_BL)
    temperature = model.dual.temperature()
    allowed_NN = ~torch.eye(SIZE, dtype=torch.bool)
    # Equal similarities: the choice must not depend on rounding.
    video_index_N, _ = sample_negatives(torch.zeros(SIZE, SIZE), allowed_NN, noise_2NN[0])
    text_index_N, _ = sample_negatives(torch.zeros(SIZE, SIZE), allowed_NN, noise_2NN[1])
    fused_RSD = model.multimodal(
        torch.cat([text_BLD, text_BLD, text_BLD[text_index_N], model.dual.encode_text(masked_BL, mask_BL)[0]]),
        torch.cat([mask_BL, mask_BL, mask_BL[text_index_N], mask_BL]),
        torch.cat([video_BND, video_BND[video_index_N], video_BND, video_BND]),
    )
    labels_BM, keep_B = keep_and_renormalise(similarity_BM.softmax(1), similarity_BM, "sample", 0.2)
    region_BD = pool_region(fused_RSD[:SIZE, LENGTH + 1 :], box_to_mask(boxes_B4, 3), "mean", "crop")
    pairs = 3 * SIZE
    return {
        "vtc": vtc_loss(video_BE, text_BE, temperature),
        "vtm": vtm_loss(model.vtm_head(fused_RSD[:pairs, 0]), (torch.arange(pairs) < SIZE).long(), torch.ones(pairs)),
        "mlm": mlm_loss(model.mlm_head(fused_RSD[pairs:, :LENGTH]), labels_BL),
        "pem": pem_loss(model.pem_head(region_BD), labels_BM, keep_B),
    }


BOXES_B4 = torch.tensor([[0, 0, 2, 2], [1, 1, 2, 2], [0, 1, 3, 1], [2, 0, 1, 2]])


def test_every_parameter_gets_a_finite_gradient(model):
    sum(four_losses(model, BOXES_B4).values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        if not name.endswith("key.bias"):  # a softmax does not see what is added to all its scores
            assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    ("loss", "untouched"),
    [
        ("vtc", {"multimodal", "vtm_head", "mlm_head", "pem_head"}),
        ("vtm", {"mlm_head", "pem_head"}),
        ("mlm", {"vtm_head", "pem_head"}),
        ("pem", {"vtm_head", "mlm_head"}),
    ],
)
def test_each_loss_reaches_its_own_parts_only(model, loss, untouched):
    four_losses(model, BOXES_B4)[loss].backward()
    reached = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert reached == {"dual", "multimodal", "vtm_head", "mlm_head", "pem_head"} - untouched


def test_autocast_is_close_to_float32(model):
    exact = four_losses(model, BOXES_B4)
    sum(exact.values()).backward()
    exact_grads = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = four_losses(model, BOXES_B4)
        feature_BE = model.dual.encode_video(torch.zeros(1, 2, 3, 48, 48))[1]
    sum(rounded.values()).backward()
    assert feature_BE.dtype == torch.float32
    for name, value in exact.items():
        assert rounded[name].dtype == torch.float32
        torch.testing.assert_close(rounded[name], value, rtol=0.02, atol=0, msg=name)
    ours = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    theirs = torch.cat([exact_grads[name].flatten() for name, _ in model.named_parameters()])
    assert torch.cosine_similarity(ours, theirs, dim=0) > 0.99
