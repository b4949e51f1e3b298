"""The page of a run: everything from data is escaped, nothing is loaded, odd values are shown plainly."""

import dataclasses
import math
import re
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
from page_files import NASTY, Page, picture

from alpro_stream import pages
from alpro_stream.errors import MediaError
from alpro_stream.pages import numbers, plots
from alpro_stream.pages.pictures import data_uri

TEMPLATES = Path(pages.__file__).parent / "templates"


def report_with(text: str = "plain", **changes) -> pages.ReportData:
    """A report in which every text is `text`."""
    clip = pages.ClipExample(
        id=text,
        caption=text,
        frames=(picture(), picture("PNG")),
        box=pages.Box(left=0.25, top=0.5, width=0.5, height=0.25),
        entities=(pages.EntityProbability(word=text, probability=0.4),),
        kept=True,
    )
    results = tuple(
        pages.RankedClip(rank=rank, id=text, thumbnail=picture(), score=1 / rank, is_right=rank == 9)
        for rank in (1, 2, 3, 4, 5, 9)
    )
    score = pages.RetrievalScore(
        name=text, recall_at_1=0.5, recall_at_5=0.75, recall_at_10=1.0, median_rank=1.5, mean_rank=2.25
    )
    report = pages.ReportData(
        title=text,
        summary=text,
        created=text,
        note=text,
        numbers=pages.KeyNumbers(
            num_clips=28,
            num_images=10,
            num_frames=1612,
            num_shards=2,
            num_entities=90,
            num_parameters=4_812_331,
            num_steps=540,
            clips_per_s=38.4,
            data_wait=0.021,
            prompter_wait=None,
        ),
        stages=(pages.StageTime(name=text, seconds=75.0, detail=text),),
        retrieval=(pages.RetrievalTable(title=text, num_queries=20, num_candidates=20, scores=(score,)),),
        curves=(
            pages.LossCurve(
                name=text,
                stage=text,
                description=text,
                steps=(1, 2),
                values=(2.0, 1.0),
                reference=3.0,
                reference_label=text,
            ),
        ),
        clips=(clip, dataclasses.replace(clip, kept=False)),
        searches=(
            pages.SearchExample(caption=text, score_name=text, results=results, right_rank=9, num_candidates=20),
        ),
        rejected=(pages.RejectedInput(line=3, id=text, stage=text, reason=text),),
        commands=(pages.Command(text=text, explanation=text),),
        configs=(pages.RunConfig(name=text, yaml=text),),
        versions={text: text},
    )
    return dataclasses.replace(report, **changes)


def empty_report() -> pages.ReportData:
    full = report_with()
    return pages.ReportData(title="t", summary="s", created="c", note="", numbers=full.numbers)


@pytest.mark.parametrize("text", NASTY, ids=range(len(NASTY)))
def test_text_from_data_never_becomes_markup(text):
    plain, nasty = Page(pages.render_report(report_with())), Page(pages.render_report(report_with(text)))

    def skeleton(page):  # long texts are folded, so that only their own elements may differ
        folded = {"details", "summary", "p"}
        return [(tag, sorted(attributes)) for tag, attributes in page.elements if tag not in folded]

    assert skeleton(nasty) == skeleton(plain)
    assert not nasty.all("script")
    for _, attributes in nasty.elements:
        assert not [name for name in attributes if name.startswith("on")]
    assert text in nasty.text, "the text itself is shown, whole and unchanged"


def test_nothing_is_loaded_from_elsewhere():
    page = Page(pages.render_report(report_with()))

    addresses = [
        value or ""
        for _, attributes in page.elements
        for name, value in attributes.items()
        if name in ("src", "href", "srcset", "action", "poster", "data")
    ]
    assert addresses
    assert all(address.startswith(("data:", "#")) for address in addresses)
    styles = "".join(page.text)
    assert "url(" not in styles
    assert "@import" not in styles
    (policy,) = page.all("meta", **{"http-equiv": "Content-Security-Policy"})
    assert "default-src 'none'" in (policy["content"] or "")


def test_navigation_leads_to_headed_sections_and_headings_are_in_order():
    page = Page(pages.render_report(report_with()))

    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {f"#{attributes['id']}" for attributes in page.all("section")} == {link["href"] for link in page.all("a")}
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(later <= earlier + 1 for earlier, later in pairwise(levels))
    assert all(image["alt"] for image in page.all("img"))


def test_the_crop_box_is_drawn_on_every_frame():
    page = Page(pages.render_report(report_with()))

    edges = page.all("path", **{"class": "edge"})
    assert len(edges) == 4, "two clips of two frames"
    assert {edge["d"] for edge in edges} == {"M25.00 50.00h50.00v25.00h-50.00z"}
    assert data_uri(picture("PNG")) in {image["src"] for image in page.all("img")}


def test_the_right_clip_is_marked_in_words_and_its_place_is_told():
    page = Page(pages.render_report(report_with()))

    items = [item for item in page.all("li") if "value" in item]
    assert [item["value"] for item in items] == ["1", "2", "3", "4", "5", "9"]
    assert [item["class"].split() for item in items] == [[], [], [], [], [], ["right", "after-gap"]]
    text = "".join(page.text)
    assert text.count("right clip\n") == 1
    assert "The right clip came at place 9." in text
    assert "Kept: counts in the PEM loss" in text
    assert "Ignored: not sure enough" in text


def test_bars_share_one_scale_with_the_threshold():
    page = Page(pages.render_report(report_with()))
    fills = [span["style"] for span in page.all("span", **{"class": "fill"})]
    marks = {span["style"] for span in page.all("span", **{"class": "mark"})}
    assert fills[1:] == ["width:100.00%"] * 2
    assert marks == {"left:50.00%"}, "0.2 of a scale that ends at the largest probability, 0.4"


def test_an_empty_report_says_so():
    text = "".join(Page(pages.render_report(empty_report())).text)
    assert text.count("no data") == 5
    assert "none" in text
    assert "not measured" in text


def test_broken_pictures_are_an_error():
    assert data_uri(picture()).startswith("data:image/jpeg;base64,")
    with pytest.raises(MediaError, match="3c 73 76 67"):
        data_uri(b"<svg onload='x'>")
    with pytest.raises(MediaError, match="no bytes"):
        data_uri(b"")


def run_report_with(text: str = "plain", **changes) -> pages.RunReportData:
    """A page of a single run in which every text is `text`."""
    full = report_with(text)
    sample = pages.DroppedSample(step=3, row=1, place=text, reason=text, substitute=text)
    report = pages.RunReportData(
        title=text,
        summary=text,
        created=text,
        numbers=pages.TrainingNumbers(
            num_steps=1200,
            num_planned=5000,
            seconds=75.0,
            clips_per_s=38.4,
            data_wait=0.021,
            prompter_wait=None,
            mfu=None,
            num_parameters=4_812_331,
            num_ranks=16,
            num_dropped=3,
        ),
        bottleneck=text,
        losses=full.curves,
        validation=full.curves,
        speed=full.curves,
        optimizer=full.curves,
        entities=full.curves,
        top_entities=text,
        clips=full.clips,
        dropped=(
            pages.DroppedCause(cause="crash", count=1, examples=(dataclasses.replace(sample, substitute=None),)),
            pages.DroppedCause(cause=text, count=2, examples=(sample,)),
        ),
        dropped_records=text,
        checkpoints=(pages.SavedCheckpoint(name=text, written=text, num_bytes=1_500_000),),
        configs=full.configs,
        versions={text: text},
    )
    return dataclasses.replace(report, **changes)


@pytest.mark.parametrize("text", NASTY, ids=range(len(NASTY)))
def test_text_of_a_run_never_becomes_markup(text):
    plain = Page(pages.render_run_report(run_report_with()))
    nasty = Page(pages.render_run_report(run_report_with(text)))

    def skeleton(page):
        folded = {"details", "summary", "p"}
        return [(tag, sorted(attributes)) for tag, attributes in page.elements if tag not in folded]

    assert skeleton(nasty) == skeleton(plain)
    assert not nasty.all("script")
    assert text in nasty.text


def test_the_page_of_a_run_links_to_the_sections_it_has():
    report = run_report_with()
    short = dataclasses.replace(report, validation=(), entities=(), top_entities="", clips=None)
    for page, num_sections in ((report, 9), (short, 7)):
        shown = Page(pages.render_run_report(page))
        sections = [f"#{section['id']}" for section in shown.all("section")]
        assert sections == [link["href"] for link in shown.all("a")]
        assert len(sections) == num_sections
        levels = [int(tag[1]) for tag, _ in shown.elements if re.fullmatch("h[1-6]", tag)]
        assert all(later <= earlier + 1 for earlier, later in pairwise(levels))


def test_dropped_samples_are_shown_by_cause_most_frequent_first():
    text = "".join(Page(pages.render_run_report(run_report_with())).text)
    dropped = text[text.index("Another one of the same pass") :]
    assert dropped.index("1 of 2 place") < dropped.index("crash") < dropped.index("nothing in its place")
    assert "step 3, row 1" in dropped


def test_a_run_without_anything_yet_says_so():
    nothing = dict.fromkeys(field.name for field in dataclasses.fields(pages.TrainingNumbers))
    numbers_of = pages.TrainingNumbers(**{**nothing, "num_steps": 0, "num_dropped": 0})
    report = pages.RunReportData(title="t", summary="s", created="c", numbers=numbers_of, clips=(), clips_note="gone")
    text = "".join(Page(pages.render_run_report(report)).text)
    assert text.count("no data") == 3
    for expected in ("gone", "none yet", "not known before the first checkpoint", "not measured"):
        assert expected in text


def curve(values, steps=None, **changes) -> pages.LossCurve:
    steps = tuple(range(1, len(values) + 1)) if steps is None else steps
    return pages.LossCurve(name="VTC", stage="ALPRO", steps=steps, values=tuple(values), **changes)


@pytest.mark.parametrize(
    "values",
    [
        [1.0],
        [0.0, 0.0],
        [2.0] * 5,
        [math.nan, 1.0, math.inf, 2.0, -math.inf],
        [1e300, -1e300, 0.0],
        [1e-310, 2e-310],
        [-902512940592.3097, -902512940592.3096],
        [3.4e38] * 50 + [-3.4e38],
        [float(value % 7) for value in range(20_000)],
    ],
    ids=range(9),
)
def test_every_plot_is_well_formed_and_inside_its_frame(values):
    svg = str(plots.loss_plot(curve(values, reference=1.0)))

    root = ElementTree.fromstring(svg)
    positions = [float(p) for path in root.iter("path") for p in re.findall(r"-?[\d.]+", path.get("d") or "")]
    assert positions
    assert 0 <= min(positions) <= max(positions) <= plots.WIDTH
    assert not {"nan", "inf"} & set(re.findall(r"[a-z]+", " ".join(p.get("d") or "" for p in root.iter("path"))))
    assert len(svg) < 30_000, "long series are thinned"


@pytest.mark.parametrize("values", [[], [math.nan, math.inf]])
def test_a_curve_without_values_says_so(values):
    assert "no data" in plots.loss_plot(curve(values))


def test_values_that_are_not_finite_are_gaps_and_counted():
    values = [5.0, 4.0, math.nan, 2.0, 1.0]
    pieces = plots.smooth_line(curve(values))
    assert pieces == [[(0, 5.0), (1, 4.0)], [(3, 2.0), (4, 1.0)]]
    text = "".join(Page(pages.render_report(report_with(curves=(curve(values),)))).text)
    assert "1 value is not finite" in text


def test_a_gap_between_thinned_points_stays_a_gap():
    values = [1.0] * 10_000
    values[5_001] = math.nan
    assert len(plots.smooth_line(curve(values))) == 2


def test_the_line_is_a_moving_average_and_its_end_is_labelled():
    values = [float(value) for value in range(100)]
    assert plots.final_value(curve(values)) == pytest.approx(sum(range(94, 100)) / 6)
    assert plots.final_value(curve(values, smooth=False)) == 99
    assert plots.final_value(curve([])) is None
    svg = plots.loss_plot(curve(values))
    assert ">96.5</text>" in svg
    assert "from 0.000 at step 1 to 96.5 at step 100" in svg


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0, 4.3, (0, 1, 2, 3, 4, 5)), (0, 5e-4, (0, 1e-4, 2e-4, 3e-4, 4e-4, 5e-4)), (-1, 1, (-1, -0.5, 0, 0.5, 1))],
)
def test_value_axis_has_round_ticks_around_the_range(low, high, ticks):
    axis = plots.nice_axis(low, high)
    assert axis.ticks == pytest.approx(ticks)
    assert axis.low <= low <= high <= axis.high


def test_step_axis_has_whole_ticks_inside_the_range():
    assert plots.nice_axis(1, 3, whole=True).ticks == (1, 2, 3)
    assert plots.nice_axis(7, 7, whole=True).ticks == (6, 7, 8)
    assert plots.nice_axis(1, 300, whole=True).ticks == (100, 200, 300)


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (numbers.count(1612), "1,612"),
        (numbers.count(4_812_331), "4.81\u00a0M"),
        (numbers.count(231_000_000), "231\u00a0M"),
        (numbers.count(999_999_999), "1,000\u00a0M"),
        (numbers.decimal(None), "not measured"),
        (numbers.decimal(math.nan), "not finite"),
        (numbers.decimal(0.0), "0.000"),
        (numbers.decimal(0.35), "0.350"),
        (numbers.decimal(38.44), "38.4"),
        (numbers.decimal(1234.5), "1,234"),
        (numbers.decimal(1.04e-5), "1.0e-5"),
        (numbers.percent(0.0214), "2.1\u00a0%"),
        (numbers.percent(0.5, unit=False), "50.0"),
        (numbers.rank(1.0), "1"),
        (numbers.rank(14.5), "14.5"),
        (numbers.duration(7.71), "7.7\u00a0s"),
        (numbers.duration(59.97), "1\u00a0min 0\u00a0s"),
        (numbers.duration(143.8), "2\u00a0min 24\u00a0s"),
        (numbers.duration(7260), "2\u00a0h 1\u00a0min"),
        (numbers.shorten("a  b\nc", 10), "a b c"),
        (numbers.shorten("abcdef", 4), "abc\u2026"),
    ],
)
def test_numbers_are_written_for_readers(shown, expected):
    assert shown == expected


@pytest.mark.parametrize(("num_candidates", "num_right"), [(1, 1), (3, 1), (28, 1), (20, 3), (6, 6)])
def test_chance_level_equals_counting_all_orders(num_candidates, num_right):
    """The rank of the best right answer over every way of placing the right answers."""
    from itertools import combinations
    from statistics import mean, median

    ranks = [min(places) for places in combinations(range(1, num_candidates + 1), num_right)]
    level = numbers.chance_level(num_candidates, num_right)
    assert level is not None
    for k, recall in ((1, level.recall_at_1), (5, level.recall_at_5), (10, level.recall_at_10)):
        assert recall == pytest.approx(mean(rank <= k for rank in ranks))
    assert level.median_rank == median(ranks)
    assert level.mean_rank == pytest.approx(mean(ranks))


def test_chance_of_nothing_is_nothing():
    assert numbers.chance_level(0) is None
    assert numbers.chance_level(3, 4) is None


def luminance(colour: str) -> float:
    """Relative luminance of WCAG 2.2."""
    parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
@pytest.mark.parametrize(
    ("text", "paper"),
    [
        *[(text, paper) for text in ("ink", "quiet", "accent", "right", "caution") for paper in ("paper", "panel")],
        ("ink", "caution-paper"),
        ("caution", "caution-paper"),
    ],
)
def test_text_colours_reach_contrast_aa(scheme, text, paper):
    css = (TEMPLATES / "base.css").read_text()
    palette = dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6});", re.findall(r":root \{(.*?)\}", css, re.S)[scheme]))
    lighter, darker = sorted((luminance(palette[text]), luminance(palette[paper])), reverse=True)
    assert (lighter + 0.05) / (darker + 0.05) >= 4.5
