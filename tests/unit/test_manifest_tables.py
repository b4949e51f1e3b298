import csv
import json

import pyarrow
import pyarrow.parquet
import pytest

from alpro_stream.errors import ManifestError
from alpro_stream.manifest import ManifestConfig, ManifestRow, RejectedRow, read_manifest

WEBVID = "videoid,contentUrl,duration,page_dir,name\n"


def read(path, **config):
    return list(read_manifest(path, ManifestConfig(**config)))


def read_csv(tmp_path, text, **config):
    path = tmp_path / "m.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read(path, **config)


def outlines(rows):
    """Lines with the id of a row, or the reason of a rejected one."""
    return [(row.line, row.id if isinstance(row, ManifestRow) else row.reason) for row in rows]


@pytest.mark.parametrize("name", ["m.csv", "m.tsv", "m.parquet"])
def test_columns_named_as_our_fields_need_no_mapping(tmp_path, name):
    columns = ["id", "media", "caption", "split", "start_s", "end_s", "license", "note"]
    cells = ["a/1.x", "v/a.mp4", 'a dog, "Rex",\nruns', "val", "1.5", "", "CC0", "n"]
    path = tmp_path / name
    if name == "m.parquet":
        values = [[None if cell == "" else cell] for cell in cells]
        pyarrow.parquet.write_table(pyarrow.table(dict(zip(columns, values, strict=True))), path)
    else:
        with path.open("w", newline="") as file:
            csv.writer(file, delimiter="," if name == "m.csv" else "\t").writerows([columns, cells])
    (row,) = read(path)
    line = 1 if name == "m.parquet" else 2
    assert row == ManifestRow(
        "a/1.x", "v/a.mp4", ('a dog, "Rex", runs',), (), 1.5, None, "val", "video", line, license="CC0"
    )


def test_webvid(tmp_path):
    text = WEBVID + '21179416,https://x/21179416.mp4,PT00H00M11S,006001_006050,"Aerial shot, winter forest"\n'
    (row,) = read_csv(tmp_path, text, format="webvid")
    assert (row.id, row.media) == ("21179416", "006001_006050/21179416.mp4")
    assert (row.captions, row.kind, row.line) == (("Aerial shot, winter forest",), "video", 2)
    (row,) = read_csv(tmp_path, text, format="webvid", columns={"media": "contentUrl"})
    assert (row.id, row.media) == ("21179416", "https://x/21179416.mp4")


def test_an_empty_part_of_a_path_rejects_the_row(tmp_path):
    rows = read_csv(tmp_path, WEBVID + "7,u,d,,a dog\n8,u,d,p,a cat\n", format="webvid")
    assert outlines(rows) == [(2, "'media' is made of '{page_dir}/{videoid}.mp4', where 'page_dir' is ''"), (3, "8")]


@pytest.mark.parametrize(
    ("header", "columns", "message"),
    [
        ("videoid,name", {"id": "videoid", "media": "url"}, "no column 'url': the columns of .* are videoid, name"),
        ("id,name", {"media": "{dir}/{id}.mp4", "captions": "name"}, "no column 'dir': the columns"),
        ("id,name", {}, r"no column for media, captions: .*are id, name; set reading.columns=\{media: COLUMN"),
        ("id,media,a", {"captions": ["a", "b"]}, "no column 'b'"),
    ],
)
def test_columns_that_are_not_there_are_an_error(tmp_path, header, columns, message):
    with pytest.raises(ManifestError, match=message):
        read_csv(tmp_path, f"{header}\n1,2,3\n", columns=columns)


@pytest.mark.parametrize(
    ("header", "columns", "twice"),
    [
        ("id,media,caption,caption", {}, "'caption'"),
        ("id,id,media,media,caption", {}, "'id', 'media'"),
        ("id,dir,dir,caption", {"media": "{dir}/{id}.mp4"}, "'dir'"),
    ],
)
@pytest.mark.parametrize("name", ["m.csv", "m.parquet"])
def test_a_column_that_is_there_twice_is_an_error_where_it_is_used(tmp_path, name, header, columns, twice):
    def write(names):
        if name == "m.csv":
            (tmp_path / name).write_text(f"{','.join(names)}\n{','.join('x' * len(names))}\n")
        else:
            table = pyarrow.Table.from_arrays([pyarrow.array(["x"])] * len(names), names=names)
            pyarrow.parquet.write_table(table, tmp_path / name)

    write(header.split(","))
    with pytest.raises(ManifestError, match=rf"more than one column {twice}: .*; rename all but one"):
        read(tmp_path / name, columns=columns)
    write(["id", "media", "caption", "note", "note"])
    (row,) = read(tmp_path / name)
    assert row.id == "x"


def test_questions_alone_stand_as_captions(tmp_path):
    (row,) = read_csv(tmp_path, "id,media,question,answer\na,a.mp4,who runs,a dog\n")
    assert (row.captions, row.qa) == (("who runs",), (("who runs", "a dog"),))


HEADER = "id,media,caption\n"


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (
            b'a,a.mp4,"never closed\nb,b.mp4,c\nd,d.mp4,e\n',
            [(2, "begins on line 2 is never closed"), (3, "b"), (4, "d")],
        ),
        (b'a,a.mp4,"never closed\nb,b.mp4,"c, d"\n', [(2, "begins on line 2 is never closed"), (3, "b")]),
        (b'x,x.mp4,"two\nlines"\na,a.mp4,"open', [(2, "x"), (4, "begins on line 4 is never closed")]),
        (b'a,a.mp4,"he said "hi""\nb,b.mp4,c\n', [(2, "written twice"), (3, "b")]),
        (b'a,a.mp4,5" pipe\n', [(2, "a")]),
        (
            b"a,a.mp4,one, two\nb,b.mp4,c\nc,c.mp4\n",
            [(2, "4 columns where"), (3, "b"), (4, "2 columns")],
        ),
        (b"a,a.mp4,caf\xe9\nb,b.mp4,c\n", [(2, "not UTF-8 (byte 11 of line 2)"), (3, "b")]),
        (b'a,a.mp4,"one\n\xe9"\nb,b.mp4,c\n', [(2, "not UTF-8 (byte 0 of line 3)"), (4, "b")]),
        (b"a,a.mp4,nul\0here\nb,b.mp4,c\n", [(2, "NUL"), (3, "b")]),
        (b"a,a.mp4," + b"x" * 10_000_000 + b"\nb,b.mp4,c\n", [(2, "longer than"), (3, "b")]),
        (b'a,a.mp4,"' + b"x" * 10_000_000 + b'"\nb,b.mp4,c\n', [(2, "longer than"), (3, "b")]),
        (b"a,a.mp4," + b"x" * 900_000 + b"\n", [(2, "a")]),
        (b"a,a.mp4,\n,b.mp4,c\n\nc,,c\n", [(2, "no caption"), (3, "no 'id'"), (5, "no 'media'")]),
        (b"a,a.mp4,c\r\nb,b.mp4,d\r\n", [(2, "a"), (3, "b")]),
    ],
)
def test_bad_rows_cost_themselves_alone(tmp_path, rows, expected):
    found = outlines(read_csv(tmp_path, HEADER.encode() + rows))
    assert [line for line, _ in found] == [line for line, _ in expected]
    for (_, text), (_, part) in zip(found, expected, strict=True):
        assert text == part if len(part) == 1 else part in text  # an id, or a part of the reason
        assert len(text) < 300


def test_an_open_quote_far_from_the_next_one_is_given_up_at_the_limit(tmp_path):
    many = "".join(f"r{number},m.mp4,{'a long caption ' * 30}\n" for number in range(3000))
    rows = read_csv(tmp_path, f'{HEADER}a,a.mp4,"open\n{many}')
    assert outlines(rows[:2]) == [(2, "a quote in the row that begins on line 2 is never closed"), (3, "r0")]
    assert [row.id for row in rows[1:]] == [f"r{number}" for number in range(3000)]


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path):
    (row,) = read_csv(tmp_path, b"\xef\xbb\xbf" + HEADER.encode() + b"a,a.mp4,c\n")
    assert row.id == "a"


@pytest.mark.parametrize(
    ("text", "message"),
    [(b"", "is empty"), (b"\xff\xfei\0d\0", "header cannot be read"), (b'"id', "header")],
)
def test_a_table_without_a_header_is_an_error(tmp_path, text, message):
    with pytest.raises(ManifestError, match=message):
        read_csv(tmp_path, text)


def test_parquet_lists_and_numbers(tmp_path):
    path = tmp_path / "m.parquet"
    table = {
        "n": [7, 8, None],
        "url": ["https://x/7.mp4", "https://x/8.mp4", "https://x/9.mp4"],
        "texts": [["a dog", "a pet"], [], ["a cat"]],
        "from": [1.5, float("nan"), None],
        "vector": [[0.0] * 4] * 3,
    }
    pyarrow.parquet.write_table(pyarrow.table(table), path)
    columns = {"id": "n", "media": "url", "captions": "texts", "start_s": "from"}
    first, second, third = read(path, columns=columns)
    assert (first.id, first.captions, first.start_s, first.line) == ("7", ("a dog", "a pet"), 1.5, 1)
    assert second == RejectedRow(2, "8", "no caption: 'captions' needs at least one text")
    assert third == RejectedRow(3, None, "no 'id'")


def test_a_parquet_text_that_is_no_text_costs_its_row_alone(tmp_path):
    path = tmp_path / "m.parquet"
    captions = pyarrow.array([b"a dog", b"caf\xe9", b"x" * 2_000_000, b"a cat"]).view(pyarrow.string())
    table = pyarrow.table({"id": ["a", "b", "c", "d"], "media": ["m.mp4"] * 4, "caption": captions})
    # Not asked for, so it may hold anything.
    table = table.append_column("note", pyarrow.array([b"\xff"] * 4).view(pyarrow.string()))
    pyarrow.parquet.write_table(table, path)
    rows = outlines(read(path))
    assert rows[0] == (1, "a")
    assert rows[1] == (2, "not UTF-8 (byte 3 of a text)")
    assert "longer than" in rows[2][1]
    assert rows[3] == (4, "d")


def test_many_parquet_rows_keep_their_order(tmp_path):
    path = tmp_path / "m.parquet"
    ids = [f"r{number}" for number in range(2500)]
    table = pyarrow.table({"id": ids, "media": ["m.mp4"] * 2500, "caption": ["c"] * 2500})
    pyarrow.parquet.write_table(table, path, row_group_size=700)
    assert [(row.id, row.line) for row in read(path)] == [(row_id, line) for line, row_id in enumerate(ids, 1)]


@pytest.mark.parametrize("damage", ["cut", "no parquet", "middle"])
def test_a_damaged_parquet_file_is_an_error(tmp_path, damage):
    path = tmp_path / "m.parquet"
    ids = [f"row number {number}" for number in range(5000)]
    table = pyarrow.table({"id": ids, "media": ids, "caption": ids})
    pyarrow.parquet.write_table(table, path, compression="zstd", use_dictionary=False)
    data = bytearray(path.read_bytes())
    if damage == "middle":
        data[100:300] = bytes(200)
    path.write_bytes(json.dumps(ids).encode() if damage == "no parquet" else data[:-100] if damage == "cut" else data)
    with pytest.raises(ManifestError, match=r"m.parquet is (damaged|no Parquet file)"):
        read(path)
