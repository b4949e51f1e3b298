"""The figures of soft labels, against hand-counted ones, and however the batch is cut."""

import math

import pytest
import torch

from alpro_stream.losses.objective import SoftLabels
from alpro_stream.losses.pem import keep_and_renormalise
from alpro_stream.prompter.figures import label_sums, most_frequent, top_counts, with_figures

ENTITIES = ("dog", "cat", "boat", "cup")
Q = torch.tensor(
    [
        [0.5, 0.5, 0.0, 0.0],  # kept
        [0.3, 0.2, 0.3, 0.2],  # ignored
        [0.1, 0.7, 0.1, 0.1],  # kept
        [0.0, 0.0, 1.0, 0.0],  # kept, not valid
    ]
)
VALID = torch.tensor([True, True, True, False])


def labels(rule="sample", threshold=0.4):
    return SoftLabels(*keep_and_renormalise(Q.clone(), Q, rule, threshold))


def summed(parts):
    """As the trainer adds ranks: each name over all of them."""
    return {name: sum(part[name].item() for part in parts) for name in parts[0]}


def cut(given, valid, rule, sizes):
    parts = zip(given.labels_BM.split(sizes), given.keep_B.split(sizes), valid.split(sizes), strict=True)
    return [label_sums(SoftLabels(rows, keep), valid, rule) for rows, keep, valid in parts]


def entropy(*probabilities):
    return -sum(p * math.log(p) for p in probabilities)


def test_figures_of_a_batch_counted_by_hand():
    assert with_figures(summed([label_sums(labels(), VALID, "sample")])) == pytest.approx(
        {
            "pem/kept": 2 / 3,
            "pem/top_probability": (0.5 + 0.3 + 0.7) / 3,
            "pem/entropy": (math.log(2) + entropy(0.7, 0.1, 0.1, 0.1)) / 2,
        }
    )


def test_entities_that_are_ignored():
    # Under 0.25: two of the first, two of the second, three of the third; the last sample is not valid.
    figures = with_figures(summed([label_sums(labels("entity", 0.25), VALID, "entity")]))
    assert figures == pytest.approx(
        {
            "pem/kept": 1,
            "pem/entities_ignored": (2 + 2 + 3) / 12,
            "pem/top_probability": (0.5 + 0.5 + 1) / 3,
            "pem/entropy": (math.log(2) + math.log(2) + 0) / 3,
        }
    )


@pytest.mark.parametrize("rule", ["sample", "entity"])
@pytest.mark.parametrize("sizes", [[2, 2], [1, 1, 1, 1], [3, 1]])
def test_cutting_the_batch_changes_nothing(rule, sizes):
    whole = with_figures(summed([label_sums(labels(rule), VALID, rule)]))
    assert with_figures(summed(cut(labels(rule), VALID, rule, sizes))) == pytest.approx(whole)
    counts = sum(
        top_counts(SoftLabels(rows, keep), valid)
        for rows, keep, valid in zip(
            labels(rule).labels_BM.split(sizes), labels(rule).keep_B.split(sizes), VALID.split(sizes), strict=True
        )
    )
    assert torch.equal(counts, top_counts(labels(rule), VALID))


@pytest.mark.parametrize("rule", ["sample", "entity"])
def test_nothing_to_count_gives_no_nan(rule):
    nothing = torch.zeros(4, dtype=torch.bool)
    shares = {"pem/kept": 0} | ({"pem/entities_ignored": 0} if rule == "entity" else {})
    assert with_figures(summed([label_sums(labels(rule), nothing, rule)])) == shares
    none_kept = labels(rule, threshold=1.0)
    figures = with_figures(summed([label_sums(none_kept, VALID, rule)]))
    assert figures["pem/kept"] == 0
    assert "pem/entropy" not in figures
    assert all(map(math.isfinite, figures.values()))
    assert most_frequent(top_counts(none_kept, VALID).tolist(), ENTITIES, 3) == []


def test_samples_that_are_not_valid_are_nowhere_counted_whatever_they_hold():
    given = labels()
    given.labels_BM[3] = float("nan")
    assert with_figures(summed([label_sums(given, VALID, "sample")])) == with_figures(
        summed([label_sums(labels(), VALID, "sample")])
    )
    assert torch.equal(top_counts(given, VALID), top_counts(labels(), VALID))


def test_other_values_stay_as_they_are():
    assert with_figures({"loss/pem": 0.5}) == {"loss/pem": 0.5}
    values = {"loss/pem": 0.5, **summed([label_sums(labels(), VALID, "sample")])}
    assert with_figures(values)["loss/pem"] == 0.5
    assert not with_figures(values).keys() & (values.keys() - {"loss/pem"})


def test_the_entities_that_were_the_best_most_often():
    assert top_counts(labels(), VALID).tolist() == [1, 1, 0, 0]
    assert most_frequent([2, 5, 0, 1], ENTITIES, 2) == [("cat", 5 / 8), ("dog", 2 / 8)]
    assert most_frequent([2, 5, 0, 1], ENTITIES, 9) == [("cat", 5 / 8), ("dog", 2 / 8), ("cup", 1 / 8)]
    with pytest.raises(ValueError, match="shorter"):
        most_frequent([1, 2], ENTITIES, 2)
