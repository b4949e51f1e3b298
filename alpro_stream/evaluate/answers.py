"""Accuracy of question answering, over all questions and for each type of question. Legend: Q questions."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from alpro_stream.errors import DataError


@dataclass(frozen=True, slots=True)
class AnswerAccuracy:
    """Shares of right answers, 0 to 1, and over how many questions."""

    overall: float
    by_type: dict[str, float | None]
    """None for a type without questions: nothing is known of it, which is not the same as nothing right."""
    num_questions: int
    num_by_type: dict[str, int]


def accuracy_by_type(
    prediction_Q: Tensor, truth_Q: Tensor, type_Q: Tensor, type_names: Sequence[str]
) -> AnswerAccuracy:
    """Share of right answers, of all questions and of each type.

    Args:
        prediction_Q: index of the predicted answer.
        truth_Q: index of the right answer; one that is not in the list of answers is negative, and never right.
        type_Q: index into `type_names`.
        type_names: types of questions, e.g. what, who, how; those without questions too.

    Raises:
        DataError: no question at all, or a type without a name.
    """
    if not len(truth_Q):
        raise DataError("nothing to evaluate: no question; the data set has no questions and answers")
    if type_Q.min() < 0 or type_Q.max() >= len(type_names):
        raise DataError(f"question types go from {type_Q.min()} to {type_Q.max()}; expected 0 to {len(type_names) - 1}")
    right_Q = (prediction_Q == truth_Q) & (truth_Q >= 0)
    num_by_type = type_Q.bincount(minlength=len(type_names)).tolist()
    num_right = type_Q[right_Q].bincount(minlength=len(type_names)).tolist()
    return AnswerAccuracy(
        overall=sum(num_right) / len(truth_Q),
        by_type={
            name: right / count if count else None
            for name, right, count in zip(type_names, num_right, num_by_type, strict=True)
        },
        num_questions=len(truth_Q),
        num_by_type=dict(zip(type_names, num_by_type, strict=True)),
    )
