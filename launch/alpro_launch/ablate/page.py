"""The table as what its page shows."""

from alpro_launch.ablate.config import AblateConfig
from alpro_launch.ablate.markdown import POWER_NOTE, column_title, comparison_cells, comparison_head
from alpro_launch.ablate.statistics import Spread
from alpro_launch.ablate.table import Table, mean_and_sd, notes
from alpro_launch.page_parts import shown_time
from alpro_stream.config import to_yaml
from alpro_stream.pages import AblationPage, RunConfig, SpreadPlot, SpreadRow, TextTable, render_ablation


def page_html(config: AblateConfig, table: Table, looked_at: str) -> str:
    """The page as one HTML file.

    Args:
        config: of the ablation.
        table: as far as it is known.
        looked_at: when the test split was looked at; empty if it was not.
    """
    return render_ablation(
        AblationPage(
            title=config.title,
            summary=_summary(config, looked_at),
            created=shown_time(),
            note=config.note,
            plots=tuple(
                SpreadPlot(
                    name=measure.name,
                    unit=measure.unit,
                    rows=tuple(_plot_row(table, row, measure.name, measure.digits) for row in table.cells),
                )
                for measure in table.measures
            ),
            figures=TextTable(
                head=("", *map(column_title, table.measures)),
                rows=tuple(
                    (row, *(_plot_row(table, row, m.name, m.digits).text for m in table.measures))
                    for row in table.cells
                ),
            ),
            chosen=f"Chosen by the largest mean of {table.choose}: {table.chosen}." if table.chosen else "",
            missing=tuple(f"{row}, {name}: {why}" for (row, name), why in notes(table).items()),
            differences=TextTable(
                head=tuple(comparison_head(table)), rows=tuple(tuple(cells) for cells in comparison_cells(table))
            ),
            power_note=POWER_NOTE,
            configs=(RunConfig(name="Grid", yaml=to_yaml(config)),),
        )
    )


def _summary(config: AblateConfig, looked_at: str) -> str:
    seeds = f"{len(config.seeds)} {'seed' if len(config.seeds) == 1 else 'seeds'}"
    held_back = any(stage.held_back for stage in config.stages.values())
    test = f" The test split was looked at on {looked_at}." if looked_at else " The test split was not looked at."
    return f"{len(config.all_rows())} rows, {seeds}." + (test if held_back else "")


def _plot_row(table: Table, row: str, measure: str, digits: int) -> SpreadRow:
    cell = table.cells[row][measure]
    few = f" ({len(cell.values)} of {len(table.seeds)} seeds)" if cell.missing else ""
    return SpreadRow(
        name=row,
        values=tuple(cell.values.values()),
        mean=cell.mean,
        sd=cell.sd,
        text=mean_and_sd(Spread(cell.mean, cell.sd), digits) + few,
    )
