"""From plain data to a page: the one place that knows the templates."""

from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined

from alpro_stream.pages import numbers, pictures, plots
from alpro_stream.pages.report import ReportData


def render_report(report: ReportData) -> str:
    """The page of a run as one HTML file that asks for nothing else: styles, plots and pictures are inside.

    All text of the report is escaped.

    Raises:
        MediaError: a picture that is neither JPEG nor PNG.
    """
    return _environment().get_template("report.html.j2").render(report=report)


@cache
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
        numbers.decimal,
        numbers.rank,
        numbers.percent,
        numbers.duration,
        numbers.shorten,
        pictures.data_uri,
    ):
        environment.filters[formatter.__name__] = formatter
    environment.globals.update(
        chance_level=numbers.chance_level,
        loss_plot=plots.loss_plot,
        finite=plots.finite,
    )
    return environment
