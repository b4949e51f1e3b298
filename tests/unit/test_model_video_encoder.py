import math

import pytest
import torch
from pydantic import ValidationError

from alpro_stream.errors import ConfigError
from alpro_stream.model.video_encoder import SpaceTimeBlock, VideoEncoder, VideoEncoderConfig

SMALL = VideoEncoderConfig(image_size=32, patch_size=8, num_frames=3, width=16, depth=2, num_heads=4, mlp_ratio=2.0)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def slow_attention(attention, tokens_SD):
    """One row of tokens, one head at a time, with a plain softmax."""
    length, width = tokens_SD.shape
    size = width // attention.num_heads
    qkv = attention.qkv(tokens_SD)
    heads = []
    for head in range(attention.num_heads):
        query, key, value = (qkv[:, part * width + head * size : part * width + (head + 1) * size] for part in range(3))
        weights = torch.zeros(length, length, dtype=tokens_SD.dtype)
        for i in range(length):
            weights[i] = torch.softmax(torch.stack([query[i] @ key[j] for j in range(length)]) / math.sqrt(size), 0)
        heads.append(weights @ value)
    return attention.proj(torch.cat(heads, dim=1))


def slow_block(block, patches_TPD, cls_D):
    """One clip through one block, written as loops over patches and frames."""
    num_frames, num_patches, _ = patches_TPD.shape
    after_time = patches_TPD.clone()
    for p in range(num_patches):
        update = slow_attention(block.temporal_attn, block.temporal_norm1(patches_TPD[:, p]))
        after_time[:, p] = patches_TPD[:, p] + block.temporal_fc(update)
    after_space, cls_updates = after_time.clone(), []
    for t in range(num_frames):
        tokens = torch.cat([cls_D[None], after_time[t]])
        update = slow_attention(block.attn, block.norm1(tokens))
        cls_updates.append(update[0])
        after_space[t] = after_time[t] + update[1:]
    cls_D = cls_D + sum(cls_updates) / num_frames
    return (
        after_space + block.mlp(block.norm2(after_space)),
        cls_D + block.mlp(block.norm2(cls_D)),
    )


@torch.no_grad()
def test_block_equals_loops_over_patches_and_frames():
    block = SpaceTimeBlock(16, 4, 2.0, 0.0).double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    patches_BTPD, cls_B1D = torch.randn(2, 3, 5, 16).double(), torch.randn(2, 1, 16).double()
    patches, cls = block(patches_BTPD, cls_B1D)
    for b in range(2):
        slow_patches, slow_cls = slow_block(block, patches_BTPD[b], cls_B1D[b, 0])
        torch.testing.assert_close(patches[b], slow_patches)
        torch.testing.assert_close(cls[b, 0], slow_cls)


@pytest.mark.parametrize(("frames", "size", "patch", "width", "depth"), [(1, 32, 16, 8, 1), (5, 24, 8, 12, 3)])
def test_any_size_gives_one_token_a_patch_position(frames, size, patch, width, depth):
    config = VideoEncoderConfig(
        image_size=size, patch_size=patch, num_frames=frames, width=width, depth=depth, num_heads=2
    )
    tokens_BND = VideoEncoder(config)(torch.randn(2, frames, 3, size, size))
    assert tokens_BND.shape == (2, 1 + (size // patch) ** 2, width)


@torch.no_grad()
def test_patches_are_ordered_row_by_row():
    encoder = VideoEncoder(SMALL.model_copy(update={"num_frames": 1}))
    video = torch.zeros(1, 1, 3, 32, 32)
    brighter = video.clone()
    brighter[:, :, :, 8:16, 16:24] = 1  # row 1, column 2 of a 4 x 4 grid
    changed = (encoder.embed(brighter)[0] - encoder.embed(video)[0]).abs().sum(-1)[0, 0]
    assert changed.nonzero().flatten().tolist() == [1 * 4 + 2]


@torch.no_grad()
def test_fresh_encoder_ignores_the_order_of_frames_and_a_trained_one_does_not():
    encoder = VideoEncoder(SMALL).double().eval()
    video = torch.randn(1, 3, 3, 32, 32).double()
    torch.testing.assert_close(encoder(video), encoder(video.flip(1)))
    for block in encoder.blocks:
        torch.nn.init.normal_(block.temporal_fc.weight)
    torch.nn.init.normal_(encoder.time_embed)
    assert not torch.allclose(encoder(video), encoder(video.flip(1)), atol=1e-3)


@torch.no_grad()
def test_every_frame_is_normalised_before_the_mean():
    encoder = VideoEncoder(SMALL).double().eval()
    torch.nn.init.normal_(encoder.time_embed)
    video = torch.randn(2, 3, 3, 32, 32).double()
    patches_BTPD, cls_B1D = encoder.embed(video)
    for block in encoder.blocks:
        patches_BTPD, cls_B1D = block(patches_BTPD, cls_B1D)
    frames = [encoder.norm(patches_BTPD[:, t]) for t in range(3)]
    tokens_BND = encoder(video)
    torch.testing.assert_close(tokens_BND[:, 1:], sum(frames) / 3)
    torch.testing.assert_close(tokens_BND[:, :1], encoder.norm(cls_B1D))


def test_fresh_temporal_attention_copies_the_spatial_one():
    block = VideoEncoder(SMALL).blocks[1]
    assert torch.equal(block.temporal_attn.qkv.weight, block.attn.qkv.weight)
    assert block.temporal_attn.qkv.weight is not block.attn.qkv.weight
    assert block.attn.qkv.weight.abs().max() <= 0.04
    assert block.temporal_fc.weight.abs().max() == 0


def test_stochastic_depth_rises_linearly_and_drops_whole_clips():
    encoder = VideoEncoder(SMALL.model_copy(update={"depth": 3, "drop_path": 0.4}))
    assert [block.drop_path.drop_prob for block in encoder.blocks] == pytest.approx([0, 0.2, 0.4])
    block = SpaceTimeBlock(16, 4, 2.0, 0.5).train()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    patches, cls = torch.randn(64, 2, 4, 16), torch.randn(64, 1, 16)
    new_patches, new_cls = block(patches, cls)
    patches_same = (new_patches == patches).flatten(1).all(1)
    # All three branches dropped: about one clip in eight, and then no token of that clip has moved.
    assert 1 <= patches_same.sum() <= 20
    assert torch.equal(new_cls[patches_same], cls[patches_same])
    assert not (new_patches == patches)[~patches_same].flatten(1).all(1).any()


def test_wrong_clip_shape_names_both_shapes():
    with pytest.raises(ConfigError, match=r"\(2, 4, 3, 32, 32\).*\(any, 3 or 1 for images, 3, 32, 32\)"):
        VideoEncoder(SMALL)(torch.zeros(2, 4, 3, 32, 32))


@pytest.mark.parametrize("sizes", [{"image_size": 30}, {"width": 18}, {"depth": 0}, {"drop_path": 1.0}])
def test_impossible_sizes_are_refused(sizes):
    with pytest.raises(ValidationError):
        VideoEncoderConfig(**{**SMALL.model_dump(), **sizes})


def trained(**changes):
    """An encoder that heeds time, with numbers everywhere."""
    encoder = VideoEncoder(SMALL.model_copy(update=changes)).double().eval()
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return encoder


@torch.no_grad()
def test_an_image_that_is_repeated_equals_a_clip_of_equal_frames():
    encoder, image = trained(still="repeat"), torch.randn(2, 1, 3, 32, 32).double()
    clip = image.expand(-1, 3, -1, -1, -1)
    torch.testing.assert_close(encoder(image), encoder(clip), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(encoder.forward_cls(image), encoder.forward_cls(clip), rtol=1e-12, atol=1e-12)


def test_the_gradients_of_a_repeated_image_are_those_of_the_clip():
    encoder, image = trained(still="repeat"), torch.randn(2, 1, 3, 32, 32).double()
    weights = torch.randn(2, 17, 16).double()
    gradients = []
    for video in (image, image.repeat(1, 3, 1, 1, 1)):
        encoder.zero_grad()
        (encoder(video) * weights).sum().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in encoder.named_parameters()})
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], gradient, rtol=1e-9, atol=1e-9, msg=name)


def test_patches_of_a_repeated_image_are_embedded_once():
    encoder, seen = trained(still="repeat"), []
    encoder.patch_embed.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    encoder(torch.randn(2, 1, 3, 32, 32).double())
    encoder(torch.randn(2, 3, 3, 32, 32).double())
    assert seen == [2, 6]


@torch.no_grad()
def test_an_image_encoded_once_equals_the_clip_only_while_time_is_ignored():
    torch.manual_seed(2)
    fresh = VideoEncoder(SMALL.model_copy(update={"still": "once"})).double().eval()
    image = torch.randn(2, 1, 3, 32, 32).double()
    clip = image.expand(-1, 3, -1, -1, -1)
    torch.testing.assert_close(fresh(image), fresh(clip), rtol=1e-12, atol=1e-12)
    encoder = trained(still="once")
    torch.nn.init.normal_(encoder.time_embed, std=3)
    assert (encoder(image) - encoder(clip)).abs().max() > 1e-2


@torch.no_grad()
def test_an_image_encoded_once_is_one_frame_with_the_mean_of_the_times():
    encoder, image = trained(still="once"), torch.randn(2, 1, 3, 32, 32).double()
    one = trained(still="repeat", num_frames=1)
    mean = encoder.time_embed.mean(dim=1, keepdim=True)
    one.load_state_dict({**encoder.state_dict(), "time_embed": mean})
    torch.testing.assert_close(encoder(image), one(image), rtol=1e-12, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("still", ["repeat", "once"])
@pytest.mark.parametrize("frames", [1, 3])
def test_cls_alone_equals_the_first_of_all_tokens(still, frames):
    encoder, video = trained(still=still), torch.randn(2, frames, 3, 32, 32).double()
    torch.testing.assert_close(encoder.forward_cls(video), encoder(video)[:, 0], rtol=1e-12, atol=1e-12)


def test_gradients_of_cls_alone_are_those_of_the_first_of_all_tokens():
    encoder, video = trained(), torch.randn(2, 3, 3, 32, 32).double()
    weights = torch.randn(2, 16).double()
    gradients = []
    for output in (encoder(video)[:, 0], encoder.forward_cls(video)):
        encoder.zero_grad()
        (output * weights).sum().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in encoder.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-9, atol=1e-9, msg=name)


def test_cls_alone_refuses_a_wrong_clip_too():
    with pytest.raises(ConfigError, match=r"\(2, 2, 3, 32, 32\).*\(any, 3 or 1 for images, 3, 32, 32\)"):
        VideoEncoder(SMALL).forward_cls(torch.zeros(2, 2, 3, 32, 32))


def test_stochastic_depth_drops_whole_clips_of_cls_alone():
    block = SpaceTimeBlock(16, 4, 2.0, 0.5).train()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    cls = torch.randn(64, 1, 16)
    same = (block.forward_cls(torch.randn(64, 2, 4, 16), cls) == cls).flatten(1).all(1)
    # CLS stays where both of its branches are dropped: about one clip in four.
    assert 4 <= same.sum() <= 30
