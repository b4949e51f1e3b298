"""The loss of question answering against cross-entropy one question at a time."""

from dataclasses import replace

import pytest
import torch
from test_objective import CONFIG, SIZE, VOCAB, make_batch
from torch.nn.functional import cross_entropy

from alpro_stream.losses.answers import AnswerCounts, AnswerObjective, answer_loss, answer_numbers
from alpro_stream.model.alpro import AlproModel, Heads
from alpro_stream.model.pixels import normalise

ANSWERS = ("dog", "cat", "", "two")
GIVEN = ("cat", "Dog ", "nowhere", "two", "", "dog")


def make_model():
    torch.manual_seed(0)
    model = AlproModel(CONFIG, VOCAB, Heads.of("question_answering", num_answers=len(ANSWERS)))
    for parameter in model.parameters():  # A fresh head answers all questions alike.
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture(scope="module")
def batch():
    return replace(make_batch(), answers=GIVEN, valid_B=torch.tensor([True] * 5 + [False]))


def run(model, batch, shares=1, counts=None):
    objective = AnswerObjective(model, ANSWERS)
    return objective(batch, shares, counts or AnswerCounts(*objective.count_local(batch)))


def logits_of(model, batch, row):
    rows = slice(row, row + 1)
    video_BND, _ = model.dual.encode_video(normalise(batch.frames_BTHWC[rows]))
    text_BLD, _ = model.dual.encode_text(batch.ids_BL[rows], batch.mask_BL[rows])
    return model.answer_logits(model.multimodal(text_BLD, batch.mask_BL[rows], video_BND)[:, 0])[0]


def test_equal_answers_have_one_number_and_an_empty_text_has_none():
    assert answer_numbers(("Dog", "a cat", "", "")) == {"dog": 0, "a cat": 1}


def test_the_loss_is_the_mean_over_questions_whose_answer_is_listed(batch):
    model = make_model()
    logits = [logits_of(model, batch, row) for row in range(SIZE)]
    labels = {0: 1, 1: 0, 3: 3}  # Row 2 has another answer, row 4 none, row 5 is not valid.
    expected = sum(cross_entropy(logits[row], torch.tensor(label)) for row, label in labels.items()) / 3
    terms = run(model, batch)
    torch.testing.assert_close(terms.total, expected)
    right = sum(int(logits[row].argmax()) == label for row, label in labels.items())
    assert terms.values["answer"].item() == pytest.approx(expected.item(), rel=1e-6)
    assert terms.values["answer/right"].item() == pytest.approx(right / 5)
    assert terms.values["answer/unlisted"].item() == pytest.approx(2 / 5)


def test_questions_that_are_not_valid_or_not_listed_change_no_gradient(batch):
    grads = []
    changed = batch.frames_BTHWC.clone()
    changed[[2, 4, 5]] = 255 - changed[[2, 4, 5]]
    for frames in (batch.frames_BTHWC, changed):
        model = make_model()
        run(model, replace(batch, frames_BTHWC=frames)).total.backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)
    assert any(grad.abs().sum() > 0 for grad in grads[0])


def test_micro_batches_add_up_to_the_whole(batch):
    model = make_model()
    objective = AnswerObjective(model, ANSWERS)
    counts = AnswerCounts(*objective.count_local(batch))
    assert [count.item() for count in counts] == [5, 3]
    whole = run(model, batch)
    whole.total.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    parts = [run(model, part, 2, counts) for part in batch.micro_batches(2)]
    (sum(part.total for part in parts) / 2).backward()
    for name, value in whole.values.items():
        torch.testing.assert_close(sum(part.values[name] for part in parts), value)
    for name, grad in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, grad, rtol=1e-4, atol=1e-6)


def test_a_batch_without_a_listed_answer_has_loss_0_and_no_gradient(batch):
    model = make_model()
    terms = run(model, replace(batch, answers=("",) * SIZE))
    terms.total.backward()
    assert terms.total.item() == terms.values["answer/right"].item() == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_the_denominator_may_count_more_questions_than_these():
    logits_BA, labels_B = torch.randn(3, 4), torch.tensor([1, -100, 2])
    loss = answer_loss(logits_BA, labels_B)
    torch.testing.assert_close(answer_loss(logits_BA, labels_B, torch.tensor(8)), loss * 2 / 8)


def test_the_model_compiles_without_a_break(batch):
    model = make_model().eval()
    expected = run(model, batch).total
    objective = AnswerObjective(model, ANSWERS)
    objective._logits = torch.compile(objective._logits, backend="eager", fullgraph=True, dynamic=False)
    torch.testing.assert_close(objective(batch, 1, AnswerCounts(*objective.count_local(batch))).total, expected)
