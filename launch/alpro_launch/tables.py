"""Results as text for a terminal."""

from collections.abc import Mapping
from typing import Any

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


def _line(score: str, direction: str, values: Mapping[str, float]) -> str:
    recalls = " ".join(f"{values[f'recall_at_{k}']:6.1f}" for k in (1, 5, 10))
    return f"{score:<6} {direction:<14} {recalls} {values['median_rank']:7.1f} {values['mean_rank']:7.1f}"
