import io

import numpy as np
import pytest
from media_files import write_image
from PIL import Image

from alpro_stream.errors import MediaError
from alpro_stream.media import UnreadableError, encode_jpeg, images, read_image

RED = (200, 30, 40)


def test_an_image_becomes_a_square(tmp_path):
    pixels, source = read_image(write_image(tmp_path / "a.png", RED, (40, 30)), 32)
    assert (pixels.shape, pixels.dtype) == ((32, 32, 3), np.uint8)
    assert (source.width, source.height, source.codec, source.num_frames) == (40, 30, "png", 1)
    assert pixels[16, 16].tolist() == list(RED)


@pytest.mark.parametrize(
    ("mode", "color", "suffix", "expected"),
    [
        ("CMYK", (0, 255, 255, 0), "jpg", (255, 0, 0)),
        ("L", 77, "png", (77, 77, 77)),
        ("1", 1, "png", (255, 255, 255)),
        ("P", 0, "png", (0, 0, 0)),
        ("RGBA", (*RED, 255), "png", RED),
        ("RGBA", (*RED, 0), "png", (255, 255, 255)),
        ("LA", (100, 255), "png", (100, 100, 100)),
        ("I;16", 25700, "png", (100, 100, 100)),
        ("RGB", RED, "webp", RED),
        ("RGB", RED, "bmp", RED),
        ("P", 0, "gif", (0, 0, 0)),
    ],
)
def test_every_mode_becomes_rgb(tmp_path, mode, color, suffix, expected):
    path = tmp_path / f"a.{suffix}"
    Image.new(mode, (20, 20), color).save(path)
    pixels, _ = read_image(path, 16)
    np.testing.assert_allclose(pixels[8, 8], expected, atol=6)


def test_exif_orientation_is_applied(tmp_path):
    picture = Image.new("RGB", (40, 20), "black")
    picture.paste((255, 255, 255), (0, 0, 20, 20))  # white on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise: white goes to the top
    path = tmp_path / "a.jpg"
    picture.save(path, exif=exif)
    pixels, source = read_image(path, 32)
    assert pixels[4, 16].mean() > 200
    assert pixels[28, 16].mean() < 50
    assert (source.width, source.height) == (20, 40)


def test_a_truncated_image_is_refused(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (200, 200, 3), np.uint8)
    path = tmp_path / "a.jpg"
    path.write_bytes(encode_jpeg(noise, 90)[:5000])
    with pytest.raises(MediaError, match=r"cannot be decoded: .*truncated") as caught:
        read_image(path, 32)
    assert not isinstance(caught.value, UnreadableError)


def test_what_is_no_image_is_refused(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_text("no image")
    with pytest.raises(UnreadableError, match="no image: expected JPEG"):
        read_image(path, 32)


def test_too_many_pixels_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    path = write_image(tmp_path / "a.png", size=(101, 100))
    monkeypatch.setattr(images, "MAX_IMAGE_PIXELS", 10_000)
    with pytest.raises(UnreadableError, match="101 x 100 pixels, more than the limit of 10000"):
        read_image(path, 32)


def test_a_bomb_beyond_pillows_own_limit_is_refused(tmp_path):
    path = tmp_path / "bomb.png"
    Image.new("1", (20_000, 20_000)).save(path)
    with pytest.raises(UnreadableError, match="more than"):
        read_image(path, 32)


def test_jpegs_decode_to_what_was_encoded():
    gradient = np.linspace(0, 255, 64 * 64 * 3).reshape(64, 64, 3).astype(np.uint8)
    decoded = np.asarray(Image.open(io.BytesIO(encode_jpeg(gradient, 90))))
    assert np.abs(decoded.astype(int) - gradient).mean() < 4
    assert len(encode_jpeg(gradient, 30)) < len(encode_jpeg(gradient, 90))
