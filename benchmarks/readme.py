"""Writes the tables and charts of README.md and of pages in docs/ from `benchmarks/results/`.

As `python benchmarks/readme.py`.
"""

import json
import sys
from pathlib import Path
from typing import Any

from alpro_stream.errors import ConfigError
from alpro_stream.pages.ablation_page import SpreadPlot, SpreadRow
from benchmarks.charts import Bar, bar_chart, spread_chart
from benchmarks.step_parts import advice, bars
from benchmarks.targets import Results, load_reasons, load_unmeasured, markdown, number, target_text
from benchmarks.tuning import settings, training_settings

RESULTS = Path("benchmarks/results")
README = Path("README.md")
DECODING = Path("docs/decoding.md")
ABLATION = Path("docs/ablation.md")
PERFORMANCE = Path("docs/performance.md")
FORECAST = Path("docs/forecast.md")
STREAM_CHART, STEP_CHART = Path("docs/stream.svg"), Path("docs/step.svg")
ABLATIONS = ("losses", "frames", "motion", "questions", "pem", "prompts", "entities")
"""In the order of the page; those that were run."""
NEEDED = ("decode", "demo", "end_to_end", "plan", "prompter", "shard", "step", "stream")
"""Results without which the documents cannot be written."""
INDEX = "index of 23,000 members"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


def section(results: Results) -> str:
    """The README's table and the sentence above it."""
    demo, shard, stream = results["demo"], results["shard"], results["stream"]
    machine = demo["machine"]
    figures, parts, base = _values(demo), _values(results["end_to_end"]), _values(results["step"])
    scale, rates = _values(results["plan"]), _values(stream)
    gpus = ", ".join(gpu["name"] for gpu in machine["gpus"]) or "no GPU"
    lines = [
        f"Measured on {machine['num_cores']:g} cores ({machine['cpu']}), {gpus}:",
        "",
        "| | |",
        "|---|---|",
        f"| `make demo`, after installation | {figures['whole demo'] / 60:.1f} min |",
        f"| memory of all its processes | {figures['memory of all processes']:.1f} GiB |",
        f"| R@1 text to video, on the clips it was trained on: VTC / VTM / chance "
        f"| {figures['VTC text to video R@1']:.0f} % / {figures['VTM text to video R@1']:.0f} % "
        f"/ {_limit(demo, 'VTC text to video R@1'):.0f} % |",
        f"| pre-training step of the demo: {parts['throughput']:.0f} clips/s, "
        f"{_ratio(results['end_to_end'], 'throughput'):.2f} of plain matrix products alone; of it waiting for data "
        f"| {100 * parts['data wait'] / parts['step']:.1f} % |",
        f"| waiting for the prompter | {100 * parts['prompter wait'] / parts['step']:.1f} % |",
        f"| step of the published model, batch 4, fp32: rate of its operations over that of a plain matrix product "
        f"| {100 * base['operations over matrix product']:.0f} % |",
        f"| and over the same step in separate passes | {base['step over literal']:.2f} x |",
        f"| sharding, exact frames / key frames only: rate over that of the ffmpeg command on the same cores "
        f"| {_ratio(shard, 'exact'):.1f} x / {_ratio(shard, 'keyframes'):.0f} x |",
        f"| 10 million samples in 10,000 shards: opening them / the plan of a batch "
        f"| {scale['opening']:.2f} s / {scale['plan of a batch: whole batch, middle']:.2f} ms |",
        f"| the stream on a CPU, 4 frames of 224 pixels a clip: share of raw libjpeg-turbo on the same cores "
        f"| {_ratio(stream, 'stream, libjpeg-turbo'):.2f} ({rates['stream, libjpeg-turbo']:,.0f} clips/s) |",
        f"| and times as fast as Mosaic Streaming / `webdataset` / the authors' way, on files of 3 frames a second "
        f"| {rates['stream over mosaic']:.1f} x / {rates['stream over webdataset-turbo']:.1f} x "
        f"/ {rates['stream over decord-3fps']:.0f} x |",
        "",
        f"The recall is memorisation of a small set, not quality. [{PERFORMANCE.as_posix()}]({PERFORMANCE.as_posix()}) "
        "has all targets,",
        "those that are missed with the reason, and what limits each stage.",
        "",
        f"![{stream_title(results)}]({STREAM_CHART.as_posix()})",
    ]
    return "\n".join(lines)


def tables(results: Results) -> str:
    """All rows of the benchmarks of the input side."""
    return "\n\n".join(_table(results[name]) for name in ("decode", "stream"))


def performance(results: Results) -> str:
    """All targets, what else is measured, the parts of a step, and what settings do."""
    values, limits = _values(results["end_to_end"]), _limits(results["end_to_end"])
    machine = results["end_to_end"]["machine"]
    return "\n".join(
        [
            "### Targets",
            "",
            markdown(results, load_reasons(), load_unmeasured()),
            "",
            "### Without a target",
            "",
            untargeted(results),
            "",
            "### A step",
            "",
            f"The demo's pre-training, {machine['num_cores']:g} cores ({machine['cpu']}); of it "
            f"`alpro bench end_to_end` says: {advice(values, limits)}.",
            "",
            f"![Parts of a step, in milliseconds]({STEP_CHART.name})",
            "",
            "### Settings",
            "",
            settings(results),
            "",
            "Of a training, the demo's on the same cores, one setting changed at a time (`settings`), compared round "
            "by round. Behind ± is half the interquartile range: a setting within it of 1 has shown nothing here.",
            "",
            training_settings(results),
        ]
    )


def untargeted(results: Results) -> str:
    """What users asked to know and nothing is promised for."""
    labels, scale = _values(results["prompter"]), _values(results["plan"])
    hidden, waiting = labels["labels hidden behind the step"], labels["wait for labels over step"]
    lines = [
        f"- **Labels hidden behind the step**: {100 * hidden:.4g} % of the time that the prompter's process computes; "
        f"the step waits {100 * waiting:.2g} % of its own for them, and takes "
        f"{labels['process over without labels']:.2f} times as long as without labels "
        f"({results['prompter']['machine']['num_cores']:g} cores; {_link('prompter')}).",
    ]
    if f"{INDEX}: size" in scale:
        size, parsing = scale[f"{INDEX}: size"], scale[f"{INDEX}: parsing"]
        lines.append(f"- **The {INDEX}**: {number(size)} MB, parsed in {number(parsing)} ms ({_link('plan')}).")
    return "\n".join(lines)


def forecast(results: Results) -> str:
    """Forecast steps beside those that were made, and the error of all."""
    if "forecast" not in results:
        return "Not measured yet."
    found = results["forecast"]
    machine, values = found["machine"], _values(found)
    lines = [
        f"On {machine['num_cores']:g} cores ({machine['cpu']}): off by {number(values['error, median'])} % in the "
        f"median, by {number(values['error, largest'])} % at the most, parts and trainings in one sitting.",
        "",
        "| training | forecast, ms | measured, ms | forecast over measured | by products alone |",
        "|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        if "by products alone" in row.get("details", {}):
            cells = [row["name"], number(row["value"]), number(row["limit"]), f"{row['ratio']:.2f}"]
            lines.append(f"| {' | '.join(cells)} | {row['details']['by products alone']:.2f} |")
    return "\n".join(lines)


def stream_title(results: Results) -> str:
    """Of the chart."""
    return f"Clips a second into the training process, {results['stream']['machine']['num_cores']:g} cores"


def stream_chart(results: Results) -> str:
    """The stream beside its peers, fastest first."""
    rows = [row for row in results["stream"]["rows"] if row["unit"] == "clips/s" and not row["name"].startswith("raw")]
    found = [Bar(row["name"], row["value"], is_ours=row["name"].startswith("stream")) for row in rows]
    return bar_chart(stream_title(results), sorted(found, key=lambda bar: -bar.value), "clips/s")


def step_chart(results: Results) -> str:
    """The parts of a step with their limits."""
    values, limits = _values(results["end_to_end"]), _limits(results["end_to_end"])
    return bar_chart(f"A step of the demo: {values['step']:.0f} ms", bars(values, limits), "ms", "the limit")


def fill(document: str, text: str) -> str:
    """A document with what is between its marks replaced."""
    before, _, rest = document.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def load_results(folder: Path) -> Results:
    """What the benchmarks wrote there.

    Raises:
        ConfigError: a result that the documents need is missing, or one cannot be used.
    """
    paths = {path.stem: path for path in folder.glob("*.json")}
    if missing := [name for name in NEEDED if name not in paths]:
        files = ", ".join(f"{folder}/{name}.json" for name in missing)
        raise ConfigError(f"{files}: missing; `alpro bench {missing[0]} --json {folder}/{missing[0]}.json` writes it")
    return {name: _read(path) for name, path in paths.items()}


def current() -> dict[Path, str]:
    """The documents as they should be for the committed results.

    Raises:
        ConfigError: a result is missing.
    """
    results = load_results(RESULTS)
    files = [RESULTS / "ablation" / f"{name}.json" for name in ABLATIONS]
    ablations = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.is_file()]
    texts = {
        README: section(results),
        DECODING: tables(results),
        ABLATION: "\n\n".join(map(_ablation, ablations)),
        PERFORMANCE: performance(results),
        FORECAST: forecast(results),
    }
    documents = {path: fill(path.read_text(encoding="utf-8"), text) for path, text in texts.items()}
    charts = {ABLATION.with_name(_chart_name(one)): ablation_chart(one) for one in ablations if len(one["seeds"]) > 1}
    return documents | charts | {STREAM_CHART: stream_chart(results), STEP_CHART: step_chart(results)}


def ablation_chart(result: dict[str, Any]) -> str:
    """Measures of the test split, with the spread over the seeds; of validation where the test was not looked at."""
    named = {measure["name"]: measure["unit"] for measure in result["measures"]}
    plots = [
        SpreadPlot(
            name=name,
            unit=named[name],
            rows=tuple(
                SpreadRow(
                    name=row,
                    values=tuple(cells[name]["values"].values()),
                    mean=cells[name]["mean"],
                    sd=cells[name]["sd"],
                    text=_spread(cells[name], len(result["seeds"])),
                )
                for row, cells in result["cells"].items()
            ),
        )
        for name in _final_measures(result)
    ]
    return spread_chart(f"{result['title']}: {len(result['seeds'])} seeds, mean and standard deviation", plots)


def _final_measures(result: dict[str, Any]) -> list[str]:
    """Those of the test split; all of them where it was not looked at."""
    names = [measure["name"] for measure in result["measures"]]
    known = {name for name in names if any(row[name]["values"] for row in result["cells"].values())}
    return [name for name in names if name.endswith("(test)") and name in known] or names


def _chart_name(result: dict[str, Any]) -> str:
    return f"ablation-{result['ablation']}.svg"


def _ablation(result: dict[str, Any]) -> str:
    """A line for each measure, a column for each row of the grid; then the differences by seed."""
    rows, seeds = list(result["cells"]), result["seeds"]
    lines = [
        f"`alpro ablate configs/ablate/{result['ablation']}.yaml`, {len(seeds)} "
        f"seed{'s' if len(seeds) > 1 else ''}, {result['machine']['num_cores']:g} cores ({result['machine']['cpu']}):",
        "",
        f"| | {' | '.join(rows)} |",
        "|---|" + "---|" * len(rows),
    ]
    for measure in result["measures"]:
        cells = [_spread(result["cells"][row][measure["name"]], len(seeds)) for row in rows]
        lines.append(f"| {measure['name']} ({measure['unit']}) | {' | '.join(cells)} |")
    if len(seeds) > 1:
        lines += ["", f"![{result['title']}, with the spread over the seeds]({_chart_name(result)})"]
    final = _final_measures(result)
    compared = [one for one in result["comparisons"] if len(one["differences"]) > 1 and one["measure"] in final]
    if compared:
        lines += [
            "",
            "Differences, seed by seed:",
            "",
            "| | | by seed | mean ± sd | same sign | seeds needed |",
        ]
        lines += ["|---|---|---|---|---|---|", *map(_difference, compared)]
    return "\n".join(lines)


def _spread(cell: dict[str, Any], num_seeds: int) -> str:
    if cell["mean"] is None:
        return "-"
    spread = "" if cell["sd"] is None else f" ± {cell['sd']:.1f}"
    fewer = f" (of {len(cell['values'])} seeds)" if len(cell["values"]) < num_seeds else ""
    return f"{cell['mean']:.1f}{spread}{fewer}"


def _difference(one: dict[str, Any]) -> str:
    by_seed = ", ".join(f"{value:+.1f}" for value in one["differences"].values())
    needed = "-" if one["seeds_needed"] is None else one["seeds_needed"]
    sign = "yes" if one["same_sign"] else "no"
    rows = f"{one['row']} − {one['baseline']}"
    return f"| {rows} | {one['measure']} | {by_seed} | {one['mean']:+.1f} ± {one['sd']:.1f} | {sign} | {needed} |"


def _table(result: dict[str, Any]) -> str:
    machine = result["machine"]
    details = list(dict.fromkeys(name for row in result["rows"] for name in row.get("details", {})))
    lines = [
        f"`benchmarks/{result['benchmark']}.py`, {machine['num_cores']:g} cores ({machine['cpu']}):",
        "",
        "| | of the limit | value | limit | target | " + " | ".join(details) + " |",
        "|---|---|---|---|---|" + "---|" * len(details),
    ]
    for row in result["rows"]:
        target = target_text(row["target"]).removesuffix(" of the limit") if row["target"] else ""
        cells = [
            row["name"],
            "" if row["ratio"] is None else f"{row['ratio']:.2f}",
            f"{number(row['value'])} {row['unit']}",
            "" if row["limit"] is None else number(row["limit"]),
            "" if not target else f"{target} {'kept' if row['ok'] else 'missed'}",
            *(number(row["details"][name]) if name in row.get("details", {}) else "" for name in details),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _read(path: Path) -> dict[str, Any]:
    """Results of a benchmark.

    Raises:
        ConfigError: it holds none, or was only to see that the benchmark runs.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} holds no results: {error}") from error
    if not isinstance(result, dict) or not result.keys() >= {"benchmark", "machine", "rows"}:
        raise ConfigError(f"{path} holds no results of a benchmark")
    if result.get("quick"):
        raise ConfigError(f"{path} was measured with --quick, which says nothing: run alpro bench {path.stem} again")
    return result


def _link(benchmark: str) -> str:
    """To a result, from a page in docs/."""
    return f"[{benchmark}.json](../{RESULTS.as_posix()}/{benchmark}.json)"


def _values(result: dict[str, Any]) -> dict[str, float]:
    return {row["name"]: row["value"] for row in result["rows"]}


def _limits(result: dict[str, Any]) -> dict[str, float]:
    return {row["name"]: row["limit"] for row in result["rows"] if row["limit"] is not None}


def _ratio(result: dict[str, Any], name: str) -> float:
    return next(float(row["ratio"]) for row in result["rows"] if row["name"] == name)


def _limit(result: dict[str, Any], name: str) -> float:
    return next(float(row["limit"]) for row in result["rows"] if row["name"] == name)


if __name__ == "__main__":
    try:
        documents = current()
    except ConfigError as error:
        sys.exit(f"error: {error}")
    for path, text in documents.items():
        path.write_text(text, encoding="utf-8")
