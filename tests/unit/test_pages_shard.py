"""The page and the card of a shard set: text from data stays text, nothing is loaded, numbers add up."""

import dataclasses
import math
import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest
import yaml
from markdown_it import MarkdownIt
from page_files import NASTY, Page, picture

from alpro_stream import pages
from alpro_stream.errors import MediaError
from alpro_stream.pages import numbers
from alpro_stream.pages.histograms import bin_label, histogram_plot
from alpro_stream.pages.markdown import escape_markdown, size_category

FOLDED = {"details", "summary", "p"}
# What a value might try to begin in Markdown.
MARKDOWN = [
    *NASTY,
    "a | b || c \\| d \\\\| e",
    "![x](javascript:alert(1)) [y](http://example.org) <http://example.org>",
    "`code` ```fence``` **bold** __bold__ _it_ ~~gone~~ $x$",
    "one\n\n# heading\n\n- item\n1. item\n\n---\n\n| a |\n|---|\r\n<b>\x0b\x85\u2029> quote",
    "---\npretty_name: other\n---",
    "&lt;script&gt; &#60;b&#62;",
    "lone \ud800 surrogate",
]


def report_with(text: str = "plain", **changes) -> pages.ShardReportData:
    """A report in which every text is `text`."""
    row = pages.RejectedInput(line=3, id=text, stage=text, reason=text)
    report = pages.ShardReportData(
        title=text,
        summary=text,
        created=text,
        num_rows=1_234_570,
        num_samples=1_234_567,
        num_rejected=3,
        num_shards=1235,
        num_bytes=1_987_654_321_000,
        num_duplicate_media=21,
        num_duplicate_captions=34,
        splits=(split(text, 1_234_000, 1234), split(text, 567, 1)),
        rejections=(
            pages.Rejection(stage=text, reason=text, count=1, examples=(row,)),
            pages.Rejection(stage=text, reason=text, count=2, examples=(row, dataclasses.replace(row, line=None))),
        ),
        histograms=(pages.Histogram(title=text, unit=text, edges=(0, 1, 10, math.inf), counts=(1, 4, 2)),),
        codecs=((text, 3), ("", 1)),
        samples=(pages.SampleSheet(key=text, split=text, caption=text, frames=(picture(),) * 9, detail=text),),
        entities=((text, 50), ("other", 100)),
        num_entities=1000,
        workers=(
            pages.WorkerRate(host=text, num_shards=1, num_samples=10, seconds=5.0, samples_per_s=2.0),
            pages.WorkerRate(host=text, num_shards=0, num_samples=0, seconds=0.0, samples_per_s=math.nan),
        ),
        stages=(pages.StageTime(name=text, seconds=75.0, detail=text),),
        licenses=((text, 3), ("", 1)),
        config=text,
        versions={text: text},
        commands=(pages.Command(text=text, explanation=text),),
    )
    return dataclasses.replace(report, **changes)


def split(name: str, num_samples: int, num_shards: int) -> pages.SplitCounts:
    return pages.SplitCounts(
        name=name,
        num_samples=num_samples,
        num_captions=2 * num_samples,
        num_questions=num_shards,
        num_shards=num_shards,
        num_bytes=1000 * num_samples,
        digest="0123456789abcdef" * 4,
    )


def empty_report() -> pages.ShardReportData:
    return pages.ShardReportData(
        title="t", summary="s", created="c", num_rows=0, num_samples=0, num_rejected=0, num_shards=0, num_bytes=0
    )


def card_with(text: str = "plain", **changes) -> pages.DatasetCard:
    """A card in which every text is `text`."""
    card = pages.DatasetCard(
        title=text,
        payload="frames",
        format_version=1,
        splits=(split(text, 1_234_000, 1234), split(text, 567, 1)),
        options={text: text},
        manifests=(text, text),
        sources=((text, 2), ("local", 3)),
        licenses=((text, 3), ("", 1)),
        entities=((text, 50), ("other", 100)),
        num_entities=1000,
        contact=text,
    )
    return dataclasses.replace(card, **changes)


def empty_card() -> pages.DatasetCard:
    return pages.DatasetCard(title="t", payload="frames", format_version=1)


def shown(page: str) -> str:
    """The text of a page, white space collapsed."""
    return " ".join("".join(Page(page).text).split())


@pytest.mark.parametrize("text", NASTY, ids=range(len(NASTY)))
def test_text_from_data_never_becomes_markup(text):
    plain = Page(pages.render_shard_report(report_with()))
    nasty = Page(pages.render_shard_report(report_with(text)))

    def skeleton(page):  # long texts are folded, so that only their own elements may differ
        return [(tag, sorted(attributes)) for tag, attributes in page.elements if tag not in FOLDED]

    assert skeleton(nasty) == skeleton(plain)
    assert not nasty.all("script")
    for _, attributes in nasty.elements:
        assert not [name for name in attributes if name.startswith("on")]
    assert text in nasty.text, "the text itself is shown, whole and unchanged"


def test_nothing_is_loaded_from_elsewhere():
    text = pages.render_shard_report(report_with("https://example.org/x.js"))
    page = Page(text)

    addresses = [
        value or ""
        for _, attributes in page.elements
        for name, value in attributes.items()
        if name in ("src", "href", "srcset", "action", "poster", "data", "xlink:href", "ping", "style")
    ]
    assert all(address.startswith(("data:", "#", "width:")) for address in addresses)
    assert len([address for address in addresses if address.startswith("data:image/jpeg")]) == 8
    assert "url(" not in text
    assert "@import" not in text
    (policy,) = page.all("meta", **{"http-equiv": "Content-Security-Policy"})
    assert "default-src 'none'" in (policy["content"] or "")


def test_navigation_leads_to_headed_sections():
    for report in (report_with(), empty_report()):
        page = Page(pages.render_shard_report(report))
        ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
        assert len(ids) == len(set(ids))
        assert {f"#{section['id']}" for section in page.all("section")} == {link["href"] for link in page.all("a")}
        assert [tag for tag, _ in page.elements].count("h1") == 1
        assert all(image["alt"] for image in page.all("img"))


def test_a_lone_surrogate_in_a_rejected_id_can_still_be_written():
    page = pages.render_shard_report(report_with("id \ud800"))
    assert b"id \\ud800" in page.encode("utf-8")


def test_numbers_are_whole_and_add_up():
    text = shown(pages.render_shard_report(report_with()))

    assert "rows in1,234,570 samples out1,234,567 rows rejected3 shards1,235 size1.99 TB" in text
    assert "captions2,469,134 questions1,235 entities1,000 repeated media21 repeated captions34" in text
    assert "Every row is accounted for" in text
    assert "1,234,0002,468,0001,2341,2341.23 GB" in text


@pytest.mark.parametrize(("num_rejected", "expected"), [(2, "1 row is neither"), (0, "3 rows are neither")])
def test_rows_that_are_missing_are_told(num_rejected, expected):
    text = shown(pages.render_shard_report(report_with(num_rejected=num_rejected)))
    assert expected in text
    assert "Every row is accounted for" not in text


def test_the_most_frequent_come_first_with_bars_in_proportion():
    page = Page(pages.render_shard_report(report_with()))

    widths = [span["style"] for span in page.all("span", **{"class": "fill"})]
    expected = {
        "reasons": ["100.00", "50.00"],
        "codecs": ["100.00", "33.33"],
        "nouns": ["100.00", "50.00"],
        "licences": ["100.00", "33.33"],
        "stages": ["100.00"],
        "workers": ["100.00", "0.00"],
    }
    assert widths == [f"width:{width}%" for part in expected.values() for width in part]
    text = "".join(page.text)
    assert text.index("2 examples") < text.index("1 example\n")
    assert text.index("other") < text.index("plain", text.index("other"))


def test_many_reasons_are_cut_and_the_rest_is_summed_up():
    rejections = tuple(pages.Rejection(stage="decode", reason=f"reason {n}", count=n) for n in range(1, 151))
    text = shown(pages.render_shard_report(report_with(rejections=rejections)))
    assert "reason 150" in text
    assert "reason 51" in text
    assert "reason 50 " not in text
    assert f"and {sum(range(1, 51)):,} rows for 50 other reasons" in text


def test_many_nouns_are_cut_and_the_number_of_all_is_told():
    entities = tuple((f"noun{n}", n) for n in range(1, 151))
    page = pages.render_shard_report(report_with(entities=entities))
    assert "The 100 most frequent of 1,000 nouns" in shown(page)
    assert ">noun51<" in page
    assert ">noun50<" not in page


def test_an_empty_report_says_so():
    text = shown(pages.render_shard_report(empty_report()))
    for sentence in ("no split has samples", "Rejected rows none", "no samples to show", "no entities", "states none"):
        assert sentence in text
    assert text.count("no data") == 3
    assert "not measured" in text


def test_broken_pictures_are_an_error():
    sample = dataclasses.replace(report_with().samples[0], frames=(b"<svg onload='x'>",))
    with pytest.raises(MediaError, match="3c 73 76 67"):
        pages.render_shard_report(report_with(samples=(sample,)))


def histogram(counts, edges=None, **changes) -> pages.Histogram:
    edges = tuple(float(edge) for edge in range(len(counts) + 1)) if edges is None else edges
    return pages.Histogram(**{"title": "Duration", "unit": "s", "edges": edges, "counts": tuple(counts)} | changes)


def columns(plot: str) -> list[ElementTree.Element]:
    return list(ElementTree.fromstring(plot).iter("rect"))


@pytest.mark.parametrize("counts", [[1], [0, 3, 1, 2], [10**9, 5 * 10**8, 0], list(range(1, 61))], ids=str)
def test_bars_are_in_proportion_side_by_side_and_inside_the_picture(counts):
    bars = columns(histogram_plot(histogram(counts)))

    heights = [float(bar.get("height") or 0) for bar in bars]
    assert heights == pytest.approx([count / max(counts) * max(heights) for count in counts], abs=0.01)
    feet = {round(float(bar.get("y") or 0) + float(bar.get("height") or 0), 1) for bar in bars}
    assert len(feet) == 1, "all stand on the axis"
    lefts = [float(bar.get("x") or 0) for bar in bars]
    rights = [left + float(bar.get("width") or 0) for left, bar in zip(lefts, bars, strict=True)]
    assert all(right <= left for right, left in zip(rights[:-1], lefts[1:], strict=True))
    assert 0 < lefts[0] < rights[-1] < 360
    assert min(float(bar.get("y") or 0) for bar in bars) >= 0


def test_the_count_axis_has_the_scale_of_the_bars():
    plot = ElementTree.fromstring(histogram_plot(histogram([1, 4])))
    (bar, highest) = plot.iter("rect")
    levels = {t.text: float(t.get("y") or 0) - 4 for t in plot.iter("text") if t.get("text-anchor") == "end"}
    assert levels["1"] == pytest.approx(float(bar.get("y") or 0), abs=0.01)
    assert levels["4"] == pytest.approx(float(highest.get("y") or 0), abs=0.01)


def test_open_ended_bins_are_named_and_have_no_label_at_infinity():
    open_ended = histogram([1, 2, 3], (-math.inf, 2, 600, math.inf))
    assert [bin_label(open_ended, index) for index in range(3)] == ["under 2 s", "2 to 600 s", "600 s or more"]
    plot = histogram_plot(open_ended)
    titles = [bar.findtext("title") for bar in columns(plot)]
    assert titles == ["under 2 s: 1", "2 to 600 s: 2", "600 s or more: 3"]
    assert "inf" not in plot
    assert "most often 600 s or more (3 of 6)" in plot


def test_labels_of_many_bins_do_not_run_into_each_other():
    plot = ElementTree.fromstring(histogram_plot(histogram([1] * 60, tuple(float(1000 + n) for n in range(61)))))
    labels = [text for text in plot.iter("text") if text.get("text-anchor") == "middle"]
    spans = [(float(t.get("x") or 0), len(t.text or "") * 6.0) for t in labels]
    assert len(labels) > 5
    assert all(x - w / 2 > before + b / 2 for (before, b), (x, w) in pairwise(spans))


def test_a_histogram_of_nothing_says_so():
    assert "no data" in histogram_plot(histogram([]))
    assert "no data" in histogram_plot(histogram([0, 0]))


def test_a_histogram_whose_edges_do_not_fit_is_refused():
    with pytest.raises(ValueError, match="'Duration' has 2 edges for 2 bins"):
        histogram([1, 2], (0.0, 1.0))


def tokens(card: str) -> list[str]:
    """Every construct of a card, in order, as a renderer with tables sees them; its YAML head left out."""
    body = card.split("\n---\n", 1)[1]
    found = []
    for block in MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(body):
        found.append(block.type)
        found += [token.type for token in block.children or () if token.type not in ("text", "softbreak")]
    return [kind for kind in found if kind not in ("text_special", "inline")]


@pytest.mark.parametrize("text", MARKDOWN, ids=range(len(MARKDOWN)))
def test_text_from_data_never_becomes_markdown(text):
    card = pages.render_dataset_card(card_with(text))

    assert tokens(card) == tokens(pages.render_dataset_card(card_with()))
    assert not {"html_inline", "html_block", "image", "s_open"} & set(tokens(card))
    card.encode("utf-8")


@pytest.mark.parametrize("text", [text for text in MARKDOWN if len(text) < 300 and "\n" not in text])
def test_text_in_a_card_reads_as_it_was(text):
    html = MarkdownIt("commonmark").render(f"x {escape_markdown(text)} x")
    expected = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    assert "".join(Page(html).text).strip() == f"x {expected} x"


@pytest.mark.parametrize("text", [text for text in MARKDOWN if len(text) < 300])
def test_text_in_a_table_of_a_card_keeps_to_its_cell(text):
    html = MarkdownIt("commonmark").enable("table").render(pages.render_dataset_card(card_with(text)))
    options = html.split("option</th>")[1].split("</table>")[0]
    cells = [Page(f"<p>{cell}</p>").text for cell in re.findall("<td>(.*?)</td>", options)]
    expected = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    assert ["".join(cell) for cell in cells] == [expected] * 2


@pytest.mark.parametrize("title", [*MARKDOWN, "yes", "1.0", "null", "a: b", "# no comment", "", "&anchor *alias"])
def test_the_head_of_a_card_is_yaml_with_known_keys_whatever_the_title(title):
    card = pages.render_dataset_card(card_with(title=title, licenses=(("CC BY 4.0", 3),)))

    assert card.startswith("---\n")
    head = yaml.safe_load(card[4:].split("\n---\n", 1)[0])
    expected = " ".join("".join(c if c.isprintable() else " " for c in title).split())
    assert head.pop("pretty_name") == (expected if len(expected) <= 300 else f"{expected[:299].rstrip()}…")
    assert head == {
        "license": "cc-by-4.0",
        "task_categories": ["video-text-to-text", "visual-question-answering"],
        "size_categories": ["1M<n<10M"],
    }


@pytest.mark.parametrize(
    ("licenses", "expected"),
    [
        ((), {}),
        ((("", 5),), {}),
        ((("MIT", 5), ("", 1)), {}),
        ((("MIT", 5), ("CC BY 4.0", 1)), {}),
        ((("MIT", 5),), {"license": "mit"}),
        ((("CC0 1.0", 5),), {"license": "cc0-1.0"}),
        ((("Shutterstock: research only", 5),), {"license": "other", "license_name": "shutterstock-research-only"}),
        ((("\u8bb8\u53ef", 5),), {"license": "other"}),
    ],
)
def test_the_head_states_a_licence_only_where_all_samples_share_it(licenses, expected):
    card = pages.render_dataset_card(card_with(licenses=licenses))
    head = yaml.safe_load(card[4:].split("\n---\n", 1)[0])
    assert {key: value for key, value in head.items() if key.startswith("license")} == expected


@pytest.mark.parametrize(
    ("num_samples", "expected"),
    [
        *[(0, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (9_999, "1K<n<10K"), (10_000, "10K<n<100K")],
        *[(2_500_000, "1M<n<10M"), (10**9, "1B<n<10B"), (10**12 - 1, "100B<n<1T"), (10**12, "n>1T"), (10**15, "n>1T")],
    ],
)
def test_size_categories(num_samples, expected):
    assert size_category(num_samples) == expected


def test_a_card_has_the_numbers_and_where_things_came_from():
    card = pages.render_dataset_card(card_with("plain", entities=(("cat", 5), ("bird", 7), ("ant", 5))))

    assert "1,234,567 samples with 2,469,134 captions and 1,235 question-answer pairs, in 1,235 WebDataset" in card
    assert "| plain | 1,234,000 | 2,468,000 | 1,234 | 1,234 | 1.23 GB |" in card
    assert f"| plain | {'0123456789abcdef' * 4} |" in card
    assert "| local | 3 |\n| plain | 2 |" in card
    assert "| plain | 3 |\n| not stated | 1 |" in card
    assert "The most frequent: bird (7), ant (5), cat (5)." in card
    assert "1,000 nouns" in card
    assert "Manifests: plain, plain." in card
    assert "alpro inspect SPLIT_FOLDER --verify" in card
    assert "write to plain and" in card
    assert "must fill this in" not in card


def test_a_card_lists_the_twenty_most_frequent_nouns():
    card = pages.render_dataset_card(card_with(entities=tuple((f"noun{n}", n) for n in range(1, 31))))
    assert len(re.findall(r"noun\d+ \(", card)) == 20
    assert "noun11 (11)." in card


def test_an_empty_card_says_so_and_what_the_maintainer_has_to_do():
    card = pages.render_dataset_card(empty_card())
    for sentence in ("No split has samples.", "No record of where", "states no licences", "No entities."):
        assert sentence in card
    assert "**The maintainer must fill this in" in card
    assert "| split |" not in card
    assert "\n\n\n" not in card
    assert card.endswith("alike.\n")


@pytest.mark.parametrize(
    ("payload", "there", "not_there"), [("frames", "000.jpg`, `", ".mp4"), ("video", ".mp4", "sound")]
)
def test_a_card_tells_what_a_sample_holds(payload, there, not_there):
    card = pages.render_dataset_card(card_with(payload=payload))
    assert there in card
    assert not_there not in card


@pytest.mark.parametrize(
    ("num_bytes", "expected"),
    [
        *[(0, "0 bytes"), (999, "999 bytes"), (1000, "1 kB"), (1_234_567, "1.23 MB"), (999_600, "1 MB")],
        *[(2 * 10**12, "2 TB"), (4 * 10**19, "40,000 PB")],
    ],
)
def test_sizes_are_written_for_readers(num_bytes, expected):
    assert numbers.data_size(num_bytes) == expected.replace(" ", "\u00a0")
