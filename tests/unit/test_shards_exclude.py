import pytest

from alpro_stream.errors import ShardError
from alpro_stream.manifest import sample_key
from alpro_stream.shards.exclude import format_exclude, parse_exclude


def test_lines_hold_a_key_and_a_comment():
    lines = list(format_exclude([("clip_7", "same media as clip_3"), ("b", ""), ("c", "two\nlines\r # here")]))
    assert lines == ["clip_7 # same media as clip_3\n", "b\n", "c # two lines # here\n"]
    assert parse_exclude("".join(lines)) == ["clip_7", "b", "c"]


def test_keys_of_any_id_survive():
    keys = [sample_key(row_id) for row_id in ("a", "a b", "#1", "a # b", "x/y.mp4", "ü\u2028z", "l" * 300)]
    assert parse_exclude("".join(format_exclude((key, "taken down") for key in keys))) == keys


def test_lists_written_by_hand_are_read():
    text = "# heading\r\n\r\n  a\t# tab\n#b\nc#1\n   # only a comment\nd #\n"
    assert parse_exclude(text) == ["a", "c#1", "d"]
    assert parse_exclude("") == []


def test_a_line_of_several_words_is_an_error():
    with pytest.raises(ShardError, match=r"line 2 of the exclude list is 'clip 7'; expected one key"):
        parse_exclude("a # fine\nclip 7\n")
