"""Ranks and answer accuracies against those of the reference."""

import numpy as np
import pytest
import torch
from parity_files import arrays, meta

from alpro_stream.errors import DataError
from alpro_stream.evaluate.answers import accuracy_by_type
from alpro_stream.evaluate.ranking import (
    BothWays,
    metrics_both_ways,
    retrieval_metrics,
    text_to_video_ranks,
    video_to_text_ranks,
)

SETS = ("one_caption", "three_captions")


def stored(name):
    """Scores of captions and videos, the video of each caption, and the ranks found for them."""
    found = arrays("ranking")
    scores_CV, truth_C = (torch.from_numpy(found[f"in.{name}.{part}"]) for part in ("scores", "truth"))
    return scores_CV, truth_C, {side: found.get(f"{side}.{name}.video_to_text_rank") for side in ("out", "paper")}


def assert_metrics(ranks, num_candidates, expected):
    ours = retrieval_metrics(ranks, num_candidates)
    found = (ours.recall_at_1, ours.recall_at_5, ours.recall_at_10, ours.median_rank, ours.mean_rank)
    assert found == pytest.approx([expected[key] for key in ("r1", "r5", "r10", "medianR", "meanR")], rel=1e-12)


@pytest.mark.parametrize("name", SETS)
def test_text_to_video_is_theirs(name):
    scores_CV, truth_C, _ = stored(name)
    ranks = text_to_video_ranks(scores_CV, truth_C)
    assert np.array_equal(ranks, arrays("ranking")[f"out.{name}.text_to_video_rank"])
    assert_metrics(ranks, scores_CV.shape[1], meta("ranking")[name]["text2video"])


@pytest.mark.parametrize("name", SETS)
def test_video_to_text_is_the_usual_one(name):
    scores_CV, truth_C, ranks = stored(name)
    ours = video_to_text_ranks(scores_CV, truth_C)
    assert np.array_equal(ours, ranks["paper"])
    assert_metrics(ours, len(scores_CV), meta("ranking")[name]["video2text_best_caption"])


@pytest.mark.parametrize("name", SETS)
def test_metrics_of_both_directions_at_once(name):
    scores_CV, truth_C, _ = stored(name)
    found = metrics_both_ways(BothWays(scores_CV, scores_CV), truth_C)
    for ours, theirs in ((found.text_to_video, "text2video"), (found.video_to_text, "video2text_best_caption")):
        figures = (ours.recall_at_1, ours.recall_at_5, ours.recall_at_10, ours.median_rank, ours.mean_rank)
        expected = meta("ranking")[name][theirs]
        assert figures == pytest.approx([expected[key] for key in ("r1", "r5", "r10", "medianR", "meanR")], rel=1e-12)
    assert found.video_to_text.num_candidates == len(scores_CV)


@pytest.mark.parametrize("name", SETS)
def test_their_video_to_text_is_the_rank_of_the_last_caption_among_all(name):
    """So the video's own other captions count as wrong answers before it."""
    scores_CV, truth_C, ranks = stored(name)
    last_V = torch.stack([(truth_C == video).nonzero().max() for video in range(scores_CV.shape[1])])
    rank_CV = 1 + (scores_CV[:, None] < scores_CV[None]).sum(dim=1)
    theirs = rank_CV[last_V, torch.arange(len(last_V))]
    assert np.array_equal(theirs, ranks["out"])
    assert_metrics(theirs, len(scores_CV), meta("ranking")[name]["video2text"])
    ours = video_to_text_ranks(scores_CV, truth_C)
    assert (ours <= theirs).all()
    assert torch.equal(ours, theirs) == (name == "one_caption")


def answers():
    """Predictions, truths and types of the reference's 60 questions."""
    found = arrays("qa_accuracy")
    return [torch.from_numpy(found[f"in.{name}"]) for name in ("prediction", "truth", "question_type")]


def test_answer_accuracy_is_theirs_but_for_types_without_questions():
    expected = meta("qa_accuracy")
    names = expected["question_types"]
    found = accuracy_by_type(*answers(), names)
    assert found.overall == pytest.approx(expected["overall_acc"], rel=1e-12)
    counts = {name: expected["ratios"][f"{name}_ratio"][1] for name in names}
    assert (found.num_questions, found.num_by_type) == (60, counts)
    assert {name for name in names if counts[name] == 0} == {"when"}
    assert (expected["when_acc"], found.by_type["when"]) == (0, None)
    for name in names[:4]:
        assert found.by_type[name] == pytest.approx(expected[f"{name}_acc"], rel=1e-12)


def test_an_answer_outside_the_list_is_never_right():
    minus, zero = torch.tensor([-1, 3]), torch.tensor([0, 0])
    assert accuracy_by_type(minus, minus, zero, ["what"]).overall == 0.5


def test_no_question_and_an_unknown_type_are_refused():
    nothing = torch.zeros(0, dtype=torch.int64)
    with pytest.raises(DataError, match="no question"):
        accuracy_by_type(nothing, nothing, nothing, ["what"])
    prediction, truth, types = answers()
    with pytest.raises(DataError, match=r"types go from 0 to 3; expected 0 to 1"):
        accuracy_by_type(prediction, truth, types, ["what", "who"])
