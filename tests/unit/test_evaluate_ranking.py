import pytest
import torch

from alpro_stream.errors import DataError
from alpro_stream.evaluate.ranking import (
    chance_text_to_video,
    retrieval_metrics,
    text_to_video_ranks,
    video_to_text_ranks,
)

# Three videos; captions 0 and 1 belong to video 0, caption 2 to video 1, caption 3 to video 2.
TRUTH_C = torch.tensor([0, 0, 1, 2])
SCORES_CV = torch.tensor(
    [
        [0.9, 0.1, 0.2],
        [0.3, 0.8, 0.5],
        [0.2, 0.7, 0.6],
        [0.4, 0.6, 0.3],
    ]
)


def test_text_to_video_rank_is_the_place_of_the_captions_own_video():
    assert text_to_video_ranks(SCORES_CV, TRUTH_C).tolist() == [1, 3, 1, 3]


def test_video_to_text_rank_is_that_of_the_best_of_its_captions():
    # Video 0: its caption 0 scores 0.9, first. Video 1: 0.7, after 0.8. Video 2: 0.3, after 0.5 and 0.6.
    assert video_to_text_ranks(SCORES_CV, TRUTH_C).tolist() == [1, 2, 3]


def test_two_captions_of_a_video_do_not_compete_with_each_other():
    scores_CV = torch.tensor([[0.9, 0.0], [0.8, 0.1], [0.1, 0.5]])
    assert video_to_text_ranks(scores_CV, torch.tensor([0, 0, 1])).tolist() == [1, 1]


def test_equal_scores_count_against_the_right_answer():
    constant_CV = torch.ones(4, 3)
    assert text_to_video_ranks(constant_CV, TRUTH_C).tolist() == [3, 3, 3, 3]
    assert video_to_text_ranks(constant_CV, TRUTH_C).tolist() == [3, 4, 4]


def test_metrics_of_known_ranks():
    metrics = retrieval_metrics(torch.tensor([1, 1, 2, 6, 11, 3]), num_candidates=20)
    assert metrics.recall_at_1 == pytest.approx(100 * 2 / 6)
    assert metrics.recall_at_5 == pytest.approx(100 * 4 / 6)
    assert metrics.recall_at_10 == pytest.approx(100 * 5 / 6)
    assert (metrics.median_rank, metrics.mean_rank) == (2.5, 4.0)
    assert (metrics.num_queries, metrics.num_candidates) == (6, 20)


def test_chance_is_what_random_scores_reach():
    generator = torch.Generator().manual_seed(0)
    scores_CV = torch.rand(20_000, 8, generator=generator)
    ranks = text_to_video_ranks(scores_CV, torch.randint(8, (20_000,), generator=generator))
    found, expected = retrieval_metrics(ranks, 8), chance_text_to_video(8)
    assert found.recall_at_1 == pytest.approx(expected.recall_at_1, abs=1)
    assert found.recall_at_5 == pytest.approx(expected.recall_at_5, abs=1)
    assert found.recall_at_10 == expected.recall_at_10 == 100
    assert found.mean_rank == pytest.approx(expected.mean_rank, abs=0.05)


@pytest.mark.parametrize("ranks", [text_to_video_ranks, video_to_text_ranks])
def test_scores_that_are_not_finite_are_no_recall(ranks):
    with pytest.raises(DataError, match="not finite"):
        ranks(torch.full((4, 3), torch.nan), TRUTH_C)


def test_nothing_to_rank_is_an_error_and_not_a_nan():
    with pytest.raises(DataError, match="no query"):
        retrieval_metrics(torch.tensor([], dtype=torch.int64), 5)
