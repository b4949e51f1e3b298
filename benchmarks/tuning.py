"""What settings do, each by two rows of the results: a pure function from results to a table."""

from dataclasses import dataclass

from benchmarks.targets import Results, number


@dataclass(frozen=True, slots=True)
class Setting:
    """A choice, and the rows that show what it does.

    Attributes:
        name: of the setting, with the choice.
        instead: the other choice.
        benchmark: that measured both.
        row: of the choice.
        other: of the other choice.
    """

    name: str
    instead: str
    benchmark: str
    row: str
    other: str


SETTINGS = (
    Setting("`payload=frames` of `alpro shard`", "`video`", "stream", "stream, libjpeg-turbo", "stream, stored videos"),
    Setting("`stream.decode.backend=libjpeg-turbo`", "`dali`", "stream", "stream, libjpeg-turbo", "stream, DALI"),
    Setting(
        "`stream.decode.workers=processes`",
        "`threads`",
        "stream",
        "stream, libjpeg-turbo",
        "stream, libjpeg-turbo in threads",
    ),
    Setting(
        "`stream.augment=none`",
        "`published`",
        "stream",
        "stream, libjpeg-turbo",
        "stream, libjpeg-turbo, published augmentation",
    ),
    Setting(
        "frames stored larger than the crop (256 for 224)",
        "resized while training",
        "decode",
        "libjpeg-turbo",
        "libjpeg-turbo, whole frames",
    ),
    Setting("`frames.sampling=keyframes` of `alpro shard`", "`exact`", "shard", "keyframes", "exact"),
    Setting("`prompter.placement=process`", "`inline`", "prompter", "step, process", "step, inline"),
    Setting(
        "`mode=rerank` with `top_k=16` of `alpro evaluate`",
        "`exact`",
        "evaluate",
        "re-ranked, k = 16",
        "exact, 1,000 x 1,000",
    ),
    Setting("`dtype=float16` of `alpro embed`", "`float32`", "search", "100,000 clips, float16", "100,000 clips"),
    Setting(
        "`train.engine.zero_stage=1` in one rank, saving",
        "`0`",
        "checkpoint",
        "the trainer waits, published, ZeRO 1",
        "the trainer waits, published, ZeRO 0",
    ),
)
TRAINING = {
    "stream.decode.num_workers=0": "1",
    "prompter.placement=inline": "process",
    "prompter.lookahead=4": "1",
    "stream.global_batch=6": "12",
    "train.engine.num_micro_batches=2": "1",
    "train.engine.activation_checkpointing=true": "false",
    "train.engine.zero_stage=0": "1",
    "train.engine.num_threads=1": "null",
    "two ranks, OMP_WAIT_POLICY=ACTIVE": "PASSIVE",
}
"""Rows of `settings`, and the value that each is compared with."""
_LESS_IS_BETTER = ("s", "ms")


def settings(results: Results) -> str:
    """A line for each setting of which both rows were measured."""
    lines = ["| setting | instead of | measured | times as fast |", "|---|---|---|---|"]
    for one in SETTINGS:
        rows = {row["name"]: row for row in results.get(one.benchmark, {}).get("rows", ())}
        if one.row in rows and one.other in rows:
            mine, other = rows[one.row], rows[one.other]
            times = mine["value"] / other["value"]
            times = 1 / times if mine["unit"] in _LESS_IS_BETTER else times
            both = f"{number(mine['value'])} against {number(other['value'])} {mine['unit']}"
            lines.append(f"| {one.name} | {one.instead} | {both} (`{one.benchmark}`) | {number(times)} |")
    return "\n".join(lines)


def training_settings(results: Results) -> str:
    """A line for each setting of a training that was measured, with the memory of all its processes."""
    if "settings" not in results:
        return "Not measured yet."
    rows = {row["name"]: row for row in results["settings"]["rows"]}
    lines = ["| setting | instead of | times as fast | clips/s | memory, GiB |", "|---|---|---|---|---|"]
    for name, instead in TRAINING.items():
        row = rows[name]
        other = rows[row["limit_of"]]
        memory = f"{number(row['details']['GiB'])} against {number(other['details']['GiB'])}"
        rates = f"{number(row['value'])} against {number(row['limit'])}"
        times, spread = row["details"]["times"], row["details"]["spread of times"]
        lines.append(f"| `{name}` | `{instead}` | {times:.2f} ± {times * spread / 2:.2f} | {rates} | {memory} |")
    return "\n".join(lines)
