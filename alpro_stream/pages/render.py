"""From plain data to a page: the one place that knows the templates."""

from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from alpro_stream.pages import histograms, markdown, numbers, pictures, plots, spreads
from alpro_stream.pages.ablation_page import AblationPage
from alpro_stream.pages.report import ReportData
from alpro_stream.pages.run_report import RunReportData
from alpro_stream.pages.search_page import SearchPage
from alpro_stream.pages.shard_report import DatasetCard, ShardReportData

_MOST_REASONS = 100


def render_report(report: ReportData) -> str:
    """The page of the whole way, from shards to retrieval, as one HTML file that asks for nothing else.

    Styles, plots and pictures are inside. All text of the report is escaped.

    Raises:
        MediaError: a picture that is neither JPEG nor PNG.
    """
    return _render(_html(), "report.html.j2", report=report)


def render_run_report(report: RunReportData) -> str:
    """The page of a single training run as one HTML file that asks for nothing else.

    All text of the report is escaped.

    Raises:
        MediaError: a picture that is neither JPEG nor PNG.
    """
    return _render(_html(), "run_report.html.j2", report=report)


def render_ablation(page: AblationPage) -> str:
    """The page of an ablation as one HTML file that asks for nothing else. All text of the page is escaped."""
    return _render(_html(), "ablation.html.j2", page=page)


def render_search(page: SearchPage) -> str:
    """The page of a search as one HTML file that asks for nothing else, or as it is served.

    All text of the page is escaped.

    Raises:
        MediaError: a picture that is neither JPEG nor PNG.
    """
    return _render(_html(), "search.html.j2", page=page)


def render_shard_report(report: ShardReportData) -> str:
    """The page of a shard set as one HTML file that asks for nothing else: styles, plots and pictures are inside.

    All text of the report is escaped. Of the reasons for rejection the 100 most frequent are listed, of the nouns
    the same number.

    Raises:
        MediaError: a picture that is neither JPEG nor PNG.
    """
    return _render(_html(), "shard_report.html.j2", report=report)


def render_dataset_card(card: DatasetCard) -> str:
    """The card of a shard set: Markdown with the YAML head of Hugging Face's dataset cards.

    All text of the card is escaped, and equal cards give equal bytes.
    """
    return _render(_markdown(), "dataset_card.md.j2", card=card) + "\n"


def _render(environment: Environment, template: str, **values: Any) -> str:
    text = environment.get_template(template).render(**values)
    # JSON can spell lone surrogates, in the id of a rejected row for example, and no UTF-8 file can hold them.
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


@cache
def _html() -> Environment:
    environment = _environment()
    for source in (pictures.data_uri, pictures.picture_source):
        environment.filters[source.__name__] = source
    environment.globals.update(
        chance_level=numbers.chance_level,
        loss_plot=plots.loss_plot,
        histogram_plot=histograms.histogram_plot,
        spread_plot=spreads.spread_plot,
        finite=plots.finite,
        max_reasons=_MOST_REASONS,
    )
    return environment


@cache
def _markdown() -> Environment:
    environment = _environment()
    # Every expression of a template passes through here, so that none can be forgotten.
    environment.finalize = markdown.escape_markdown
    environment.globals.update(front_matter=markdown.front_matter)
    return environment


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("alpro_stream.pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for formatter in (
        numbers.count,
        numbers.exact,
        numbers.decimal,
        numbers.rank,
        numbers.percent,
        numbers.data_size,
        numbers.duration,
        numbers.shorten,
        numbers.most_frequent_first,
    ):
        environment.filters[formatter.__name__] = formatter
    return environment
