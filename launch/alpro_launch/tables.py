"""Results as text for a terminal."""

from collections.abc import Mapping
from typing import Any

from alpro_stream.config import differences

_DIRECTIONS = {"text_to_video": "text to video", "video_to_text": "video to text"}


def retrieval_table(result: Mapping[str, Any]) -> str:
    """Retrieval figures of a result.json, chance last."""
    head = f"{'score':<6} {'direction':<14} {'R@1':>6} {'R@5':>6} {'R@10':>6} {'median':>7} {'mean':>7}"
    lines = [head, "-" * len(head)]
    for score, directions in result["metrics"].items():
        lines += [_line(score.upper(), _DIRECTIONS[name], values) for name, values in directions.items()]
    lines.append(_line("chance", _DIRECTIONS["text_to_video"], result["chance"]))
    first = next(iter(result["metrics"].values()))["text_to_video"]
    lines.append(f"{first['num_queries']} captions, {first['num_candidates']} clips")
    return "\n".join(lines)


def results_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Figures of several results, by name; what differs in protocol or split stands below the table.

    A row is compared with the first one of its score. One of another protocol or split has a mark and a note.
    """
    width = max(map(len, results))
    figures = f"{'R@1':>6} {'R@5':>6} {'R@10':>6} {'median':>7}"
    lines = [
        f"{'':<{width}}      score  {'text to video':^28}  {'video to text':^28}",
        f"{'':<{width}}             {figures}  {figures}",
    ]
    notes = Notes()
    for name, result in results.items():
        for score, both in result["metrics"].items():
            first = next(other for other in results.values() if score in other["metrics"])
            mark = notes.mark(_terms(result, score), _terms(first, score))
            figures = f"{_figures(both['text_to_video'])}  {_figures(both['video_to_text'])}"
            lines.append(f"{name:<{width}} {mark:<4} {score.upper():<6} {figures}")
    return "\n".join([*lines, *notes.lines()])


class Notes:
    """What stands below a table of rows that do not all compare."""

    def __init__(self) -> None:
        self._notes: list[str] = []

    def mark(self, terms: Mapping[str, Any], first: Mapping[str, Any]) -> str:
        """The mark of a row; none where its terms are those of the first row."""
        unlike = differences(dict(terms), dict(first))
        if not unlike:
            return ""
        note = f"unlike the first: {'; '.join(unlike)}"
        if note not in self._notes:
            self._notes.append(note)
        return f"[{self._notes.index(note) + 1}]"

    def lines(self) -> list[str]:
        """The notes; no line at all where there are none."""
        numbered = [f"[{number}] {note}" for number, note in enumerate(self._notes, start=1)]
        return ["", "Not all rows compare:", *numbered] if numbered else []


def terms(result: Mapping[str, Any], *counted: str) -> dict[str, Any]:
    """What must be the same for two results to compare: the protocol, and the split with how many of what it has."""
    split = result["split"]
    size = ", ".join(f"{split[f'num_{name}']} {name}" for name in counted)
    return {**result["protocol"], "split": f"{split['digest'][:12]} ({size})"}


def _terms(result: Mapping[str, Any], score: str) -> dict[str, Any]:
    found = terms(result, "captions", "videos")
    # Re-ranking leaves VTC as it is.
    return {key: value for key, value in found.items() if score != "vtc" or key not in ("mode", "top_k")}


def _figures(values: Mapping[str, float]) -> str:
    recalls = " ".join(f"{values[f'recall_at_{k}']:6.1f}" for k in (1, 5, 10))
    return f"{recalls} {values['median_rank']:7.1f}"


def _line(score: str, direction: str, values: Mapping[str, float]) -> str:
    return f"{score:<6} {direction:<14} {_figures(values)} {values['mean_rank']:7.1f}"
