"""Question answering: which answer of a list is right, from the multimodal CLS of question and video.

As published, a classifier over the most frequent answers (ALPRO's fine-tuning, and ClipBERT's before it). A question
whose answer is not in the list has nothing to learn from: no loss and no denominator sees it, as with a sample that is
not valid.

Legend: B samples of the micro-batch, A answers, L tokens, T frames, C colours, H W pixels.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from alpro_stream.losses.objective import Terms
from alpro_stream.model.alpro import AlproModel
from alpro_stream.model.pixels import normalise
from alpro_stream.model.precision import at_least_float32
from alpro_stream.stream.batch import Batch
from alpro_stream.stream.units import same_text

NO_LABEL = -100


class AnswerCounts(NamedTuple):
    """Questions of the global batch, and those of them whose answer is in the list; the same on every rank."""

    num_questions: Tensor
    num_listed: Tensor


def answer_loss(logits_BA: Tensor, labels_B: Tensor, num_listed: Tensor | None = None) -> Tensor:
    """Mean cross-entropy over the questions whose answer is in the list.

    Args:
        logits_BA: scores of the answers.
        labels_B: number of the right answer, -100 where the list does not have it.
        num_listed: the denominator, when it counts more questions than these; None counts the labels.

    Returns:
        The loss; 0 with zero gradients when no question has a label.
    """
    total = cross_entropy(at_least_float32(logits_BA), labels_B, ignore_index=NO_LABEL, reduction="sum")
    count = (labels_B != NO_LABEL).sum() if num_listed is None else num_listed
    return total / count.clamp(min=1)


def answer_numbers(answers: Sequence[str]) -> dict[str, int]:
    """Number of each answer of a list, by what equal answers have in common.

    An empty text stands for no answer: released models have outputs without one.
    """
    return {same_text(answer): number for number, answer in enumerate(answers) if answer}


class AnswerObjective(nn.Module):
    """Cross-entropy over the answer list.

    Args:
        model: with an answer head.
        answers: in the order of its outputs.
    """

    def __init__(self, model: AlproModel, answers: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self._numbers = answer_numbers(answers)

    def compile_parts(self) -> None:
        """Compiles the whole model; a graph break is an error."""
        self._logits = torch.compile(self._logits, fullgraph=True, dynamic=False)  # type: ignore[method-assign]

    def forward(self, batch: Batch, shares: int, counts: AnswerCounts) -> Terms:
        """The terms of a micro-batch, and shares of questions: right ones, and those the list has no answer to.

        Args:
            batch: the micro-batch, whose captions are questions.
            shares: ranks x micro-batches of a step.
            counts: denominators over the global batch.
        """
        labels_B = self._labels(batch)
        logits_BA = self._logits(batch.frames_BTHWC, batch.ids_BL, batch.mask_BL)
        loss = answer_loss(logits_BA, labels_B, counts.num_listed)
        num_questions = counts.num_questions.clamp(min=1)
        num_right = (logits_BA.detach().argmax(dim=1) == labels_B).sum()
        num_unlisted = (batch.valid_B & (labels_B == NO_LABEL)).sum()
        values = {
            "answer": loss.detach(),
            "answer/right": num_right / num_questions,
            "answer/unlisted": num_unlisted / num_questions,
        }
        return Terms(loss * shares, values)

    def count_local(self, batch: Batch) -> Tensor:
        """What `AnswerCounts` holds, of a rank's batch, valid questions only; summed over the ranks."""
        num_listed = (self._labels(batch) != NO_LABEL).sum()
        return torch.stack([batch.valid_B.sum(), num_listed]).float()

    def _logits(self, frames_BTHWC: Tensor, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        # The encoders alone, without the features of VTC.
        video_BND = self.model.dual.video_encoder(normalise(frames_BTHWC))
        text_BLD = self.model.dual.text_encoder(ids_BL, mask_BL)
        return self.model.answer_logits(self.model.multimodal(text_BLD, mask_BL, video_BND, num_tokens=1)[:, 0])

    def _labels(self, batch: Batch) -> Tensor:
        numbers = [self._numbers.get(same_text(answer), NO_LABEL) for answer in batch.answers]
        return torch.tensor(numbers, device=batch.valid_B.device).where(batch.valid_B, NO_LABEL)
