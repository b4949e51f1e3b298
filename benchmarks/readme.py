"""Writes the README's table of results from the files in `benchmarks/results/`: `python benchmarks/readme.py`."""

import json
from pathlib import Path
from typing import Any

RESULTS = Path("benchmarks/results")
README = Path("README.md")
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


def section(
    demo: dict[str, Any], loop: dict[str, Any], step: dict[str, Any], shard: dict[str, Any], plan: dict[str, Any]
) -> str:
    """The table and the sentence above it.

    Args:
        demo: result of `benchmarks/demo.py`.
        loop: result of `benchmarks/end_to_end.py`.
        step: result of `benchmarks/step.py`.
        shard: result of `benchmarks/shard.py`.
        plan: result of `benchmarks/plan.py`.
    """
    machine = demo["machine"]
    figures, parts, base, scale = _values(demo), _values(loop), _values(step), _values(plan)
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
        f"| pre-training step of the demo: {parts['throughput']:.0f} clips/s, of which waiting for data "
        f"| {100 * parts['data wait'] / parts['step']:.1f} % |",
        f"| waiting for the prompter | {100 * parts['prompter wait'] / parts['step']:.1f} % |",
        f"| step of the published model, batch 4, fp32: rate of its operations over that of a plain matrix product "
        f"| {100 * base['operations over matrix product']:.0f} % |",
        f"| and over the same step in separate passes | {base['step over literal']:.2f} x |",
        f"| sharding, exact frames / key frames only: rate over that of the ffmpeg command on the same cores "
        f"| {_ratio(shard, 'exact'):.1f} x / {_ratio(shard, 'keyframes'):.0f} x |",
        f"| 10 million samples in 10,000 shards: opening them / the plan of a batch "
        f"| {scale['opening']:.2f} s / {scale['plan of a batch: whole batch, middle']:.2f} ms |",
        "",
        "The recall is memorisation of a small set, not quality. More in [benchmarks/results](benchmarks/results).",
    ]
    return "\n".join(lines)


def fill(readme: str, text: str) -> str:
    """The README with its section replaced."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def current() -> str:
    """The README as it should be for the committed results."""
    names = ("demo", "end_to_end", "step", "shard", "plan")
    results = (json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8")) for name in names)
    return fill(README.read_text(encoding="utf-8"), section(*results))


def _values(result: dict[str, Any]) -> dict[str, float]:
    return {row["name"]: row["value"] for row in result["rows"]}


def _ratio(result: dict[str, Any], name: str) -> float:
    return next(float(row["ratio"]) for row in result["rows"] if row["name"] == name)


def _limit(result: dict[str, Any], name: str) -> float:
    return next(float(row["limit"]) for row in result["rows"] if row["name"] == name)


if __name__ == "__main__":
    README.write_text(current(), encoding="utf-8")
