"""Results that are shares of right answers or classes, as text for a terminal."""

from collections.abc import Mapping
from typing import Any

from alpro_launch.tables import Notes, terms


def answers_table(result: Mapping[str, Any]) -> str:
    """Accuracy of a result.json of question answering, by type of question and overall."""
    split, metrics, chance = result["split"], result["metrics"], result["chance"]
    head = f"{'questions':<12} {'number':>7} {'right':>7} {'one answer':>11}"
    lines = [head, "-" * len(head)]
    for name, share in metrics["by_type"].items():
        if share is not None:
            one_answer = f"{chance['by_type'][name]:10.2f}%"
            lines.append(f"{name:<12} {split['num_by_type'][name]:>7} {share:6.2f}% {one_answer}")
    lines.append(f"{'all':<12} {split['num_questions']:>7} {metrics['accuracy']:6.2f}%")
    lines.append(f"always {chance['answer']!r}: {chance['accuracy']:.2f}%")
    lines.append(
        f"{split['num_videos']} videos and images; {split['num_unlisted_answers']} questions whose answer the model "
        "does not have count as wrong"
    )
    return "\n".join(lines)


def recognition_table(result: Mapping[str, Any]) -> str:
    """Accuracy of a result.json of recognition, with that of guessing."""
    split = result["split"]
    head = f"{'':<10} {'right':>7} {'chance':>7}"
    lines = [head, "-" * len(head)]
    for name, share in result["metrics"].items():
        lines.append(f"{name.replace('_', ' '):<10} {share:6.2f}% {result['chance'][name]:6.2f}%")
    lines.append(
        f"{split['num_videos']} videos and images, {split['num_classes']} classes; {split['num_unlisted_classes']} of "
        "another class count as wrong"
    )
    return "\n".join(lines)


def figures_table(result: Mapping[str, Any]) -> str:
    """All figures of a result.json, in percent, with what guessing reaches where that is known."""
    split, chance = result["split"], result.get("chance", {})
    shares = _shares(result)
    width = max(map(len, shares))
    lines = [f"{name:<{width}} {'-' if share is None else f'{share:.2f}%':>8}" for name, share in shares.items()]
    guessing = ", ".join(f"{name} {share:.2f}%" for name, share in chance.items())
    asked = ", ".join(
        f"{value} {name[4:].replace('_', ' ')}" for name, value in split.items() if _is_count(name, value)
    )
    return "\n".join([*lines, *([f"guessing: {guessing}"] if guessing else []), asked])


def _is_count(name: str, value: Any) -> bool:
    return name.startswith("num_") and isinstance(value, int)


def shares_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Shares of several results of one task, by name; what differs in protocol or split stands below the table.

    The first result is what the others are compared with.
    """
    width = max(map(len, results))
    first, *_ = results.values()
    columns = list(_shares(first))
    lines = [f"{'':<{width}}      " + " ".join(f"{name:>8}" for name in columns)]
    notes = Notes()
    for name, result in results.items():
        mark = notes.mark(terms(result, "videos"), terms(first, "videos"))
        shares = _shares(result)
        figures = " ".join(f"{'-' if shares[column] is None else f'{shares[column]:.2f}':>8}" for column in columns)
        lines.append(f"{name:<{width}} {mark:<4} {figures}")
    return "\n".join([*lines, *notes.lines()])


def _shares(result: Mapping[str, Any]) -> dict[str, float | None]:
    """The figures of a result by name, those of types behind the others."""
    metrics = result["metrics"]
    return {**{name: value for name, value in metrics.items() if name != "by_type"}, **metrics.get("by_type", {})}
