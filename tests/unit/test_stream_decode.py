import io

import numpy as np
import pytest
import torch
from PIL import Image
from stream_parts import assert_pixels_equal

from alpro_stream.errors import ConfigError
from alpro_stream.stream.decode import WHOLE_FRAME, DecodeConfig, FrameRequest, build_decoder, decoder_name
from alpro_stream.stream.jpeg import jpeg_header

SIZE = 48


@pytest.fixture(scope="module")
def decoder():
    return build_decoder(DecodeConfig(num_threads=1), SIZE, max_frames=4, device_id=None)


def waves(width, height):
    """A picture without symmetries; colours differ, so that swapped channels show; fine waves show aliasing."""
    y, x = np.mgrid[:height, :width] / 12
    colours = [np.sin(x) + 0.1 * y, np.cos(y + 1) - 0.1 * x, np.sin(0.5 * x + y) + 0.3 * np.sin(15 * x) * (width > 200)]
    return Image.fromarray((127 + 60 * np.stack(colours, -1)).clip(0, 255).astype(np.uint8))


def jpeg(image):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def reference(data, box, flip):
    """The same by Pillow; `box` is left, top, width, height in pixels."""
    left, top, width, height = box
    image = Image.open(io.BytesIO(data)).convert("RGB").crop((left, top, left + width, top + height))
    pixels = np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BILINEAR))
    return pixels[:, ::-1] if flip else pixels


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((64, 64), (0, 0, 64, 64)),
        ((64, 64), (8, 3, 56, 56)),
        ((100, 60), (0, 0, 100, 60)),
        ((101, 67), (13, 5, 48, 48)),
        ((33, 40), (2, 3, 30, 30)),
        ((240, 200), (7, 11, 210, 175)),
    ],
)
def test_crop_resize_and_flip_equal_pillow(decoder, size, box, flip):
    data = jpeg(waves(*size))
    window = (box[0] / size[0], box[1] / size[1], box[2] / size[0], box[3] / size[1])
    (found,) = decoder.decode([FrameRequest(data, window, flip)])
    assert found.dtype == torch.uint8
    assert_pixels_equal(found, reference(data, box, flip))


def test_one_call_takes_frames_of_different_sizes(decoder):
    sizes = [(64, 64), (120, 90), (50, 77)]
    frames = [jpeg(waves(*size)) for size in sizes]
    found = decoder.decode([FrameRequest(data, WHOLE_FRAME, flip=i == 1) for i, data in enumerate(frames)])
    assert found.shape == (3, SIZE, SIZE, 3)
    for i, (data, size) in enumerate(zip(frames, sizes, strict=True)):
        assert_pixels_equal(found[i], reference(data, (0, 0, *size), flip=i == 1))


def test_a_frame_does_not_depend_on_its_neighbours(decoder):
    requests = [FrameRequest(jpeg(waves(60 + i, 64)), (0.1, 0.1, 0.8, 0.8), flip=bool(i % 2)) for i in range(4)]
    together = decoder.decode(requests)
    alone = torch.cat([decoder.decode([request]) for request in reversed(requests)]).flip(0)
    assert torch.equal(together, alone)


def test_results_are_not_overwritten_by_the_next_call(decoder):
    first = decoder.decode([FrameRequest(jpeg(waves(64, 64)), WHOLE_FRAME, False)])
    before = first.clone()
    decoder.decode([FrameRequest(jpeg(Image.new("RGB", (64, 64), "red")), WHOLE_FRAME, False)])
    assert torch.equal(first, before)


def test_grey_frames_become_rgb(decoder):
    data = jpeg(waves(64, 64).convert("L"))
    (found,) = decoder.decode([FrameRequest(data, WHOLE_FRAME, False)])
    assert_pixels_equal(found, reference(data, (0, 0, 64, 64), False))


def with_size(data, width, height):
    """The same file with another size in its header."""
    frame = data.index(b"\xff\xc0")
    return data[: frame + 5] + height.to_bytes(2) + width.to_bytes(2) + data[frame + 9 :]


@pytest.mark.parametrize("kept", [0, 10, 0.25, 0.5, 0.9])
def test_a_truncated_frame_is_refused_and_the_decoder_goes_on(decoder, kept):
    whole = jpeg(waves(64, 64))
    good = FrameRequest(whole, WHOLE_FRAME, False)
    expected = decoder.decode([good, good])
    cut = whole[: kept if isinstance(kept, int) else int(kept * len(whole))]
    with pytest.raises(ValueError, match=r"^(Failed to decode|nvImageCodec)") as caught:
        decoder.decode([good, FrameRequest(cut, WHOLE_FRAME, False)])
    assert "pipeline" not in str(caught.value)
    assert torch.equal(decoder.decode([good, good]), expected)


def test_bytes_that_are_no_picture_are_refused(decoder):
    with pytest.raises(ValueError, match=r"\w"):
        decoder.decode([FrameRequest(b"not a picture" * 100, WHOLE_FRAME, False)])


def test_headers():
    whole = jpeg(waves(64, 64))
    header = jpeg_header(whole)
    assert whole.startswith(header)
    assert header[-12:-10] == (12).to_bytes(2)  # the scan's own header: 12 bytes for three colours
    assert jpeg_header(jpeg(waves(70, 50))) == with_size(header, 70, 50)
    for other in (b"", b"\xff\xd8\xff\xd9", whole[:-1], whole[1:], whole[:300] + b"\xff\xd9", b"\xff\xd8" + bytes(99)):
        assert jpeg_header(other) is None


def test_files_of_several_scans_are_not_vouched_for():
    buffer = io.BytesIO()
    waves(64, 64).save(buffer, "JPEG", progressive=True)
    assert jpeg_header(buffer.getvalue()) is None


def test_mixed_needs_a_gpu():
    with pytest.raises(ConfigError, match=r"stream\.decode\.device is mixed, but no GPU"):
        build_decoder(DecodeConfig(device="mixed"), SIZE, 4, device_id=None)


def test_the_name_tells_decoders_apart():
    assert decoder_name(DecodeConfig(device="cpu")) != decoder_name(DecodeConfig(device="mixed"))
    assert decoder_name(DecodeConfig(num_threads=1)) == decoder_name(DecodeConfig(num_threads=8))
