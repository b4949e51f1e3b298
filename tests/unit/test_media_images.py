import io

import numpy as np
import pytest
from media_files import peak_memory_mb, write_image
from PIL import Image

from alpro_stream.errors import MediaError
from alpro_stream.media import FrameConfig, UnreadableError, encode_jpeg, open_media, read_image, read_whole_image

RED = (200, 30, 40)


def image_of(path, size=32, **options):
    with open_media(path) as file:
        return read_image(file, FrameConfig(size=size, **options))


def test_an_image_becomes_a_square(tmp_path):
    pixels, source = image_of(write_image(tmp_path / "a.png", RED, (40, 30)))
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
    pixels, _ = image_of(path, 16)
    np.testing.assert_allclose(pixels[8, 8], expected, atol=6)


def test_exif_orientation_is_applied(tmp_path):
    picture = Image.new("RGB", (40, 20), "black")
    picture.paste((255, 255, 255), (0, 0, 20, 20))  # white on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise: white goes to the top
    path = tmp_path / "a.jpg"
    picture.save(path, exif=exif)
    pixels, source = image_of(path)
    assert pixels[4, 16].mean() > 200
    assert pixels[28, 16].mean() < 50
    assert (source.width, source.height) == (20, 40)


def test_a_truncated_image_is_refused(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (200, 200, 3), np.uint8)
    path = tmp_path / "a.jpg"
    path.write_bytes(encode_jpeg(noise, 90)[:5000])
    with pytest.raises(MediaError, match=r"cannot be decoded: .*truncated") as caught:
        image_of(path)
    assert not isinstance(caught.value, UnreadableError)


def test_what_is_no_image_is_refused(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_text("no image")
    with pytest.raises(UnreadableError, match="no image: expected JPEG"):
        image_of(path)


def test_too_many_pixels_are_refused_before_they_are_decoded(tmp_path):
    path = write_image(tmp_path / "a.png", size=(101, 100))
    path.write_bytes(path.read_bytes()[:60])  # nothing is left to decode
    with pytest.raises(UnreadableError, match=r"101 x 100 pixels, more than the limit of 10000 \(frames.max_pixels\)"):
        image_of(path, max_pixels=10_000)
    with pytest.raises(MediaError, match="cannot be decoded"):
        image_of(path, max_pixels=10_100)


def test_a_large_jpeg_is_decoded_at_a_fraction_of_its_size(tmp_path):
    path = write_image(tmp_path / "a.jpg", size=(1600, 1200))
    pixels, source = image_of(path, max_pixels=200 * 150)
    assert (source.width, source.height) == (1600, 1200)
    np.testing.assert_allclose(pixels[16, 16], RED, atol=3)
    # At least twice the pixels that are wanted: a quarter of 1600 x 1200 for 128.
    with pytest.raises(UnreadableError, match="400 x 300 pixels"):
        image_of(path, 128, max_pixels=200 * 150)
    # All of a progressive one has to be held.
    Image.open(path).save(tmp_path / "b.jpg", progressive=True)
    with pytest.raises(UnreadableError, match="1600 x 1200 pixels"):
        image_of(tmp_path / "b.jpg", max_pixels=200 * 150)


def test_a_fraction_of_a_jpeg_looks_like_the_whole(tmp_path):
    y, x = np.mgrid[:600, :800]
    picture = np.stack([127 + 120 * np.sin(x / 37), 127 + 120 * np.cos(y / 29), (x + y) % 256 * 0.9], axis=2)
    path = tmp_path / "a.jpg"
    Image.fromarray(picture.astype(np.uint8)).save(path, quality=95)
    whole = Image.open(path).convert("RGB").resize((64, 64), Image.Resampling.BICUBIC)
    assert np.abs(image_of(path, 64)[0].astype(int) - np.asarray(whole)).mean() < 2


def test_short_side_keeps_the_aspect_ratio(tmp_path):
    assert image_of(write_image(tmp_path / "a.png", size=(90, 60)), resize="short_side")[0].shape == (32, 48, 3)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (90, 60)).save(tmp_path / "b.jpg", exif=exif)
    assert image_of(tmp_path / "b.jpg", resize="short_side")[0].shape == (48, 32, 3)
    with pytest.raises(MediaError, match=r"resize=short_side takes up to 8 to 1"):
        image_of(write_image(tmp_path / "c.png", size=(90, 1)), resize="short_side")


def test_transparent_pixels_do_not_bleed_into_opaque_ones(tmp_path):
    # Transparent black beside opaque white is white everywhere once it is on white.
    picture = np.zeros((40, 40, 4), np.uint8)
    picture[:, 20:] = 255
    path = tmp_path / "a.png"
    Image.fromarray(picture).save(path)
    assert image_of(path, 16)[0].min() >= 254


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation(tmp_path, orientation):
    quarters = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]]], np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "a.png"
    Image.fromarray(quarters.repeat(20, 0).repeat(30, 1)).save(path, exif=exif)
    # What the standard says of row 0 and column 0 of the stored picture.
    shown = {
        1: quarters,
        2: quarters[:, ::-1],
        3: quarters[::-1, ::-1],
        4: quarters[::-1],
        5: quarters.transpose(1, 0, 2),
        6: quarters.transpose(1, 0, 2)[:, ::-1],
        7: quarters[::-1, ::-1].transpose(1, 0, 2),
        8: quarters.transpose(1, 0, 2)[::-1],
    }[orientation]
    pixels, source = image_of(path, 16)
    np.testing.assert_array_equal(pixels[4::8, 4::8], shown)
    assert (source.width, source.height) == ((60, 40) if orientation < 5 else (40, 60))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "I;16"])
def test_the_largest_image_needs_little_memory(tmp_path, mode):
    path = tmp_path / "a.png"
    Image.new(mode, (6000, 6000)).save(path, compress_level=1)
    assert peak_memory_mb("read_image(file, FrameConfig())", path) < 500


def test_a_bomb_beyond_pillows_own_limit_is_refused(tmp_path):
    path = tmp_path / "bomb.png"
    Image.new("1", (20_000, 20_000)).save(path)
    with pytest.raises(UnreadableError, match="more pixels than the limit of 36000000"):
        image_of(path)


def test_jpegs_decode_to_what_was_encoded():
    gradient = np.linspace(0, 255, 64 * 64 * 3).reshape(64, 64, 3).astype(np.uint8)
    decoded = np.asarray(Image.open(io.BytesIO(encode_jpeg(gradient, 90))))
    assert np.abs(decoded.astype(int) - gradient).mean() < 4
    assert len(encode_jpeg(gradient, 30)) < len(encode_jpeg(gradient, 90))


def test_chroma_is_stored_as_asked_for():
    stripes = np.zeros((16, 16, 3), np.uint8)
    stripes[:, ::2, 0] = stripes[:, 1::2, 2] = 255
    full, half = (np.asarray(Image.open(io.BytesIO(encode_jpeg(stripes, 95, chroma)))) for chroma in ("444", "420"))
    assert np.abs(full.astype(int) - stripes).mean() < 10
    assert np.abs(half.astype(int) - stripes).mean() > 40


def whole(data, max_pixels=10_000):
    return read_whole_image(io.BytesIO(data), max_pixels)


def stored_as(picture, name="PNG", **options):
    file = io.BytesIO()
    picture.save(file, name, **options)
    return file.getvalue()


@pytest.mark.parametrize("size", [(40, 30), (1, 1), (1, 90), (90, 1), (33, 17)])
def test_a_whole_image_is_the_stored_one_pixel_by_pixel(size):
    noise = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8)
    np.testing.assert_array_equal(whole(stored_as(Image.fromarray(noise))), noise)
    jpeg = encode_jpeg(noise, 90)
    np.testing.assert_array_equal(whole(jpeg), np.asarray(Image.open(io.BytesIO(jpeg))))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_whole_image_is_upright(orientation):
    noise = np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = {
        1: noise,
        2: noise[:, ::-1],
        3: noise[::-1, ::-1],
        4: noise[::-1],
        5: noise.transpose(1, 0, 2),
        6: noise.transpose(1, 0, 2)[:, ::-1],
        7: noise[::-1, ::-1].transpose(1, 0, 2),
        8: noise.transpose(1, 0, 2)[::-1],
    }[orientation]
    np.testing.assert_array_equal(whole(stored_as(Image.fromarray(noise), exif=exif)), turned)


@pytest.mark.parametrize(
    ("mode", "color", "expected"),
    [
        ("L", 77, (77, 77, 77)),
        ("P", 0, (0, 0, 0)),
        ("1", 1, (255, 255, 255)),
        ("RGBA", (*RED, 0), (255, 255, 255)),
        ("LA", (100, 255), (100, 100, 100)),
        ("I;16", 25700, (100, 100, 100)),
    ],
)
def test_a_whole_image_of_every_mode_becomes_rgb(mode, color, expected):
    pixels = whole(stored_as(Image.new(mode, (20, 10), color)))
    assert (pixels.shape, pixels.dtype) == ((10, 20, 3), np.uint8)
    np.testing.assert_array_equal(pixels, np.full((10, 20, 3), expected))


def test_a_whole_image_of_too_many_pixels_is_refused_before_it_is_decoded():
    cut = stored_as(Image.new("RGB", (101, 100)))[:60]  # nothing is left to decode
    with pytest.raises(UnreadableError, match=r"101 x 100 pixels, more than the limit of 10000"):
        whole(cut)
    with pytest.raises(MediaError, match="cannot be decoded"):
        whole(cut, 10_100)
    # The decoder of WebP holds a picture twice.
    webp = stored_as(Image.new("RGB", (100, 60)), "WEBP")
    with pytest.raises(UnreadableError, match="limit of 5000"):
        whole(webp)
    assert whole(webp, 12_000).shape == (60, 100, 3)


def test_a_whole_image_that_is_damaged_or_none_is_refused():
    noise = np.random.default_rng(0).integers(0, 255, (90, 90, 3), np.uint8)
    with pytest.raises(MediaError, match=r"cannot be decoded: .*truncated") as caught:
        whole(encode_jpeg(noise, 90)[:3000])
    assert not isinstance(caught.value, UnreadableError)
    with pytest.raises(UnreadableError, match="no image: expected JPEG"):
        whole(b"no image")
