"""The page of a search: all text escaped, pictures inside or from its own server alone, readable without motion."""

import base64
import dataclasses
import re

import pytest
from page_files import NASTY, Page, picture

from alpro_stream import pages
from alpro_stream.errors import MediaError


def hit(text="plain", rank=1, num_frames=3, **changes):
    frames = tuple(pages.SearchFrame(picture=picture(), time_s=number / 2) for number in range(num_frames))
    values = {
        "rank": rank,
        "key": text,
        "captions": (text, text),
        "source": text,
        "media": text,
        "similarity": 0.4321,
        "match": 0.875,
        "frames": frames,
    }
    return pages.SearchHit(**{**values, **changes})


def page_with(text="plain", hits=None, **changes):
    hits = (hit(text), hit(text, 2, num_frames=0, note=text, match=None)) if hits is None else hits
    return pages.SearchPage(**{"query": text, "hits": hits, "num_clips": 1234, "about": text, "error": text, **changes})


@pytest.mark.parametrize("is_served", [False, True])
@pytest.mark.parametrize("text", NASTY, ids=range(len(NASTY)))
def test_text_from_data_and_from_the_query_never_becomes_markup(text, is_served):
    plain = Page(pages.render_search(page_with(is_served=is_served)))
    nasty = Page(pages.render_search(page_with(text, is_served=is_served)))

    def skeleton(page):  # long texts are folded, so that only their own elements may differ
        folded = {"details", "summary", "p"}
        return [(tag, sorted(attributes)) for tag, attributes in page.elements if tag not in folded]

    assert skeleton(nasty) == skeleton(plain)
    assert not nasty.all("script")
    for _, attributes in nasty.elements:
        assert not [name for name in attributes if name.startswith("on")]
    assert text in nasty.text, "the text itself is shown, whole and unchanged"


def test_a_page_as_a_file_loads_nothing():
    page = Page(pages.render_search(page_with()))
    assert len(page.all("img")) == 3
    assert all(image["src"].startswith("data:image/") for image in page.all("img"))
    assert not page.all("form")
    (policy,) = page.all("meta", **{"http-equiv": "Content-Security-Policy"})
    assert "img-src data:;" in policy["content"]
    assert "form-action 'none'" in policy["content"]


def test_a_clip_is_played_from_the_page_itself_and_its_first_frame_is_the_poster():
    film = b"\x1a\x45\xdf\xa3 of a clip"
    page = Page(pages.render_search(page_with(hits=(hit('"><b>', clip=film), hit("an image", 2)))))
    (video,) = page.all("video")
    assert base64.b64decode(video["src"].removeprefix("data:video/webm;base64,")) == film
    assert video["poster"].startswith("data:image/jpeg;base64,")
    assert "controls" in video
    assert "autoplay" not in video
    assert len(page.all("img")) == 3, "of the other one"
    (policy,) = page.all("meta", **{"http-equiv": "Content-Security-Policy"})
    assert "media-src data:;" in policy["content"]
    with pytest.raises(MediaError, match="WebM for a clip"):
        pages.render_search(page_with(hits=(hit(clip=b"MZ"),)))


def test_a_served_page_asks_its_own_server_for_pictures():
    frame = pages.SearchFrame(picture="/clip/7/0.jpg", time_s=None)
    page = Page(pages.render_search(page_with(hits=(hit(frames=(frame,)),), is_served=True, max_query_chars=77)))
    assert [image["src"] for image in page.all("img")] == ["/clip/7/0.jpg"]
    (policy,) = page.all("meta", **{"http-equiv": "Content-Security-Policy"})
    assert "default-src 'none'; img-src 'self' data:;" in policy["content"]
    (form,) = page.all("form")
    assert (form["method"], form["action"]) == ("get", "/")
    (box,) = page.all("input")
    assert (box["name"], box["maxlength"], box["value"]) == ("q", "77", "plain")


def test_the_frames_are_shown_in_turn_with_their_times():
    html = pages.render_search(page_with())
    assert re.search(r"@keyframes show-3 \{ 0% \{ opacity: 1; \} 33\.3333%, 100% \{ opacity: 0; \} \}", html)
    page = Page(html)
    assert [figure["style"] for figure in page.all("figure")] == ["--place: 0", "--place: 1", "--place: 2"]
    assert [text.replace("\u00a0", " ") for text in page.text if text.endswith("\u00a0s")] == [
        "0.0 s",
        "0.5 s",
        "1.0 s",
    ]
    for sometimes in ("prefers-reduced-motion: reduce", "@media print"):
        assert sometimes in html
    assert all(image["alt"] for image in page.all("img"))


def test_scores_and_what_is_missing_are_told():
    text = " ".join("".join(Page(pages.render_search(page_with())).text).split())
    assert "The best 2 of 1,234 clips" in text
    assert text.count("similarity 0.432") == 2
    assert text.count("match 87.5 %") == 1
    assert text.count("1 more caption") == 2
    nothing = hit(num_frames=0, media="", captions=())
    assert "no pictures" in pages.render_search(page_with(hits=(nothing,)))


def test_before_the_first_query_there_is_a_box_and_nothing_else():
    page = Page(pages.render_search(page_with("", hits=(), is_served=True)))
    assert page.all("input")
    assert not page.all("li")
    assert not page.all("p", role="alert")


def test_a_picture_that_is_none_is_refused():
    frame = pages.SearchFrame(picture=b"<svg onload=alert(1)>", time_s=None)
    with pytest.raises(MediaError, match="JPEG or PNG"):
        pages.render_search(page_with(hits=(dataclasses.replace(hit(), frames=(frame,)),)))
