"""Which bytes are a plain JPEG, told by their markers."""

import io

import pytest
import simplejpeg
from PIL import Image
from stream_jpegs import frame_of, jpeg, waves, with_sampling, with_segment, with_size

from alpro_stream.stream.jpeg import HeaderReader, JpegHeader, grey_jpeg, read_header

EXIF = 0xE1
PLAIN = jpeg(waves(64, 48))
GREY = jpeg(waves(64, 48).convert("L"))


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def test_a_header_is_everything_before_the_pixels():
    header = read_header(PLAIN)
    assert (header.width, header.height) == (64, 48)
    assert PLAIN.startswith(header.data)
    assert header.data[-14:-10] == b"\xff\xda" + (12).to_bytes(2)  # the scan's own header, of three colours
    other = read_header(jpeg(waves(70, 50)))
    assert (other.width, other.height, other.data) == (70, 50, with_size(header.data, 70, 50))


@pytest.mark.parametrize("chroma", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"optimize": True},
        {"restart_marker_blocks": 1},
        {"restart_marker_rows": 1},
        {"exif": turned(1)},
        {"exif": Image.Exif()},
        {"icc_profile": bytes(70_000)},
        {"comment": "one\xff\xda"},
        {"dpi": (300, 300)},
        {"quality": 5},
    ],
)
def test_whatever_baseline_encoders_write_is_plain(options, chroma):
    header = read_header(jpeg(waves(65, 43), subsampling=chroma, **options))
    assert (header.width, header.height) == (65, 43)


def test_grey_and_rgb_are_plain_too():
    assert read_header(GREY) == JpegHeader(GREY[: len(read_header(GREY).data)], 64, 48)
    assert read_header(with_sampling(GREY, 0x22)) is not None  # which means nothing where there is but one
    assert read_header(jpeg(waves(64, 48), keep_rgb=True)) is not None


@pytest.mark.parametrize("marker", [0xE0, 0xE1, 0xE2, 0xED, 0xEF, 0xFE])
@pytest.mark.parametrize("contents", [b"", b"http://ns.adobe.com/\0<x/>", b"\xff\xd8\xff\xc2" * 9, bytes(65_533)])
def test_segments_of_applications_are_passed_over(marker, contents):
    found = read_header(with_segment(PLAIN, marker, contents))
    assert (found.width, found.height) == (64, 48)


def changed(data, at, value):
    return data[:at] + bytes([value]) + data[at + 1 :]


NOT_PLAIN = {
    "progressive": jpeg(waves(64, 48), progressive=True),
    "progressive, grey": jpeg(waves(64, 48).convert("L"), progressive=True),
    "CMYK": jpeg(waves(64, 48).convert("CMYK")),
    "12 bits": changed(PLAIN, frame_of(PLAIN) + 4, 12),
    "two colours": changed(PLAIN, frame_of(PLAIN) + 9, 2),
    "several scans": changed(PLAIN, PLAIN.index(b"\xff\xda") + 4, 1),
    "lossless": changed(PLAIN, frame_of(PLAIN) + 1, 0xC3),
    "arithmetic": changed(PLAIN, frame_of(PLAIN) + 1, 0xC9),
    "turned": jpeg(waves(64, 48), exif=turned(6)),
    "mirrored": jpeg(waves(64, 48), exif=turned(2)),
    "damaged EXIF": with_segment(PLAIN, EXIF, b"Exif\0\0" + bytes(range(256))),
    "turned by the second of two": with_segment(jpeg(waves(64, 48), exif=turned(6)), EXIF, b"Exif\0\0"),
    "colours sampled otherwise": with_sampling(PLAIN, 0x22, 0x21, 0x11),
    "brightness sampled otherwise": with_sampling(PLAIN, 0x42, 0x11, 0x11),
    "nothing sampled": with_sampling(PLAIN, 0, 0x11, 0x11),
    "no width": with_size(PLAIN, 0, 48),
    "height to be told later": with_size(PLAIN, 64, 0),
    "too many pixels": with_size(PLAIN, 6001, 6000),
    "largest": with_size(PLAIN, 65535, 65535),
    "no frame header": PLAIN[: frame_of(PLAIN)] + PLAIN[PLAIN.index(b"\xff\xc4") :],
    "empty": b"",
    "a start and an end": b"\xff\xd8\xff\xd9",
    "a start": b"\xff\xd8" + bytes(99),
    "first byte missing": PLAIN[1:],
    "last byte missing": PLAIN[:-1],
    "bytes behind the end": PLAIN + b"\0",
    "cut off, with an end": PLAIN[:300] + b"\xff\xd9",
    "a segment beyond the end": PLAIN[:2] + b"\xff\xe0\xff\xff" + PLAIN[6:400] + b"\xff\xd9",
    "PNG": b"\x89PNG\r\n\x1a\n" + bytes(99),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_PLAIN)
def test_others_are_not_plain(name):
    assert read_header(NOT_PLAIN[name]) is None
    reader = HeaderReader()
    assert reader.read(PLAIN) is not None
    assert reader.read(NOT_PLAIN[name]) is None


def test_the_limits_are_exact():
    assert read_header(with_size(PLAIN, 6000, 6000)) is not None
    assert read_header(with_size(PLAIN, 1, 1)) is not None


def test_any_damage_of_a_header_gives_a_header_or_none():
    length = len(read_header(PLAIN).data)
    for at in range(length):
        for value in (0, 0xFF, PLAIN[at] ^ 1):
            found = read_header(changed(PLAIN, at, value))
            assert found is None or found.width * found.height > 0
    assert all(read_header(PLAIN[:stop]) is None for stop in range(len(PLAIN)))
    assert all(read_header(PLAIN[:stop] + b"\xff\xd9") is None for stop in range(length - 2))


@pytest.mark.parametrize("data", [PLAIN, GREY, jpeg(waves(64, 48), subsampling="4:4:4")])
def test_a_file_of_the_header_alone_is_decoded_to_grey(data):
    """Damage before the pixels is to show, and none behind them."""
    pixels = simplejpeg.decode_jpeg(grey_jpeg(read_header(data)), "RGB", strict=False)
    assert pixels.shape == (48, 64, 3)
    assert (pixels[24:] == 128).all()
    assert read_header(grey_jpeg(read_header(data))) == read_header(data)


def test_a_reader_knows_headers_again(monkeypatch):
    reader, parsed = HeaderReader(), []
    monkeypatch.setattr("alpro_stream.stream.jpeg.read_header", lambda data: parsed.append(data) or read_header(data))
    frames = [jpeg(waves(64, 48, number)) for number in range(5)]
    assert len({reader.read(frame) for frame in frames}) == 1
    assert len(parsed) == 1
    assert reader.read(frames[3][:-1]) is None  # one without an end is not taken for it


def test_a_reader_never_mixes_headers_up():
    """More kinds than it remembers, each several times, also such that differ in one byte."""
    kinds = [jpeg(waves(40 + number, 48)) for number in range(6)]
    kinds += [jpeg(waves(64, 48), quality=quality) for quality in (50, 51)]
    kinds += [jpeg(waves(64, 48), subsampling=chroma) for chroma in ("4:4:4", "4:2:2")]
    kinds += [GREY, with_segment(PLAIN, 0xE2, b""), with_segment(PLAIN, 0xE2, b"x"), with_segment(GREY, 0xFE, b"x")]
    kinds += [NOT_PLAIN["progressive"], NOT_PLAIN["turned"], NOT_PLAIN["colours sampled otherwise"]]
    reader = HeaderReader()
    for order in (kinds, kinds[::-1], kinds[::2] + kinds[1::2], [one for one in kinds for _ in range(2)]):
        for data in order:
            assert reader.read(data) == read_header(data)


def test_no_header_is_the_start_of_another():
    """So that the first that fits is the one."""
    headers = [read_header(data).data for data in (PLAIN, GREY, jpeg(waves(64, 48), optimize=True))]
    for one in headers:
        assert read_header(one + PLAIN[len(read_header(PLAIN).data) :]).data == one


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_no_damage_of_exif_makes_a_turned_picture_plain():
    """What cannot be made sense of is left to Pillow; where it sees no turn, it shows the same pixels."""
    turned_by_a_quarter = jpeg(waves(64, 48), exif=turned(6))
    start = turned_by_a_quarter.index(b"Exif") + 6
    num_plain = 0
    for at in range(start, start + 24):
        for value in (0, 1, 0xFF):
            data = changed(turned_by_a_quarter, at, value)
            image = Image.open(io.BytesIO(data))
            if read_header(data) is not None:
                num_plain += 1
                assert image.getexif().get(0x0112, 1) == 1
    assert num_plain > 0
