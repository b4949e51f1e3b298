"""Results that are shares of right answers or classes, as text for a terminal."""

from collections.abc import Mapping
from typing import Any

from alpro_launch.tables import Notes


def answers_table(result: Mapping[str, Any]) -> str:
    """Accuracy of a result.json of question answering, by type of question and overall."""
    split, metrics, chance = result["split"], result["metrics"], result["chance"]
    head = f"{'questions':<12} {'number':>7} {'right':>7}"
    lines = [head, "-" * len(head)]
    for name, share in metrics["by_type"].items():
        if share is not None:
            lines.append(f"{name:<12} {split['num_by_type'][name]:>7} {share:6.2f}%")
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
        mark = notes.mark(_terms(result), _terms(first))
        shares = _shares(result)
        figures = " ".join(f"{'-' if shares[column] is None else f'{shares[column]:.2f}':>8}" for column in columns)
        lines.append(f"{name:<{width}} {mark:<4} {figures}")
    return "\n".join([*lines, *notes.lines()])


def _shares(result: Mapping[str, Any]) -> dict[str, float | None]:
    """The figures of a result by name, those of types behind the others."""
    metrics = result["metrics"]
    return {**{name: value for name, value in metrics.items() if name != "by_type"}, **metrics.get("by_type", {})}


def _terms(result: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same for two results to compare."""
    split = result["split"]
    return {**result["protocol"], "split": f"{split['digest'][:12]} ({split['num_videos']} videos)"}
