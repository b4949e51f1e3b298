"""What is learned does not depend on the ranks, the micro-batches or the ZeRO stage."""

from dataclasses import replace
from unittest import mock

import pytest
import torch
from recording import PRELOAD, Case, train_cases

from alpro_stream.losses import objective
from alpro_stream.losses.objective import ObjectiveConfig, PretrainObjective, SoftLabels
from alpro_stream.model.alpro import AlproModel, Heads, ModelConfig
from alpro_stream.model.pixels import normalise
from alpro_stream.run import RunConfig, train
from alpro_stream.stream.batch import Batch
from alpro_stream.stream.maker import negative_noise
from alpro_stream.testing.configs import TINY_MODEL, tiny_run, write_corpus
from alpro_stream.testing.distributed import run_ranks
from alpro_stream.train.distributed import World, join_world
from alpro_stream.train.step import Step


def assert_equal(found, expected, name):
    """Equal but for the order in which float32 sums are made."""
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=3e-6, msg=lambda text: f"{name}: {text}")


def prompter_run(corpus, run_dir):
    # A low temperature, so that some soft labels of the little trained prompter are confident and some are not.
    changes = {"train.max_steps": 1, "model.temperature": 0.001}
    return train(RunConfig.model_validate(tiny_run(corpus, run_dir, changes))).checkpoint


def pretrain(checkpoint, stage=0, num_micro=1, **changes):
    return {
        "task": "pretrain",
        "prompter.checkpoint": str(checkpoint),
        "prompter.placement": "inline",
        "losses.pem.threshold": 0.1452,
        "train.engine.zero_stage": stage,
        "train.engine.num_micro_batches": num_micro,
        **changes,
    }


# Each stage and each number of micro-batches; the other pairs are slow.
FAST = ((0, 2), (1, 2), (2, 1), (3, 2))
SLOW = ((0, 1), (1, 1), (2, 2), (3, 1))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Trains cases on so many ranks; gives the records of the ranks by the name of the case."""
    root = tmp_path_factory.mktemp("equality")
    corpus = write_corpus(root / "corpus")
    (checkpoint,) = run_ranks(prompter_run, 1, corpus, root / "stage_one", preload=PRELOAD)

    def runs(size, folder, make_cases):
        cases = make_cases(checkpoint)
        by_rank = run_ranks(train_cases, size, corpus, root / folder, cases, preload=PRELOAD, timeout_s=240)
        return {case.name: [record[case.name] for record in by_rank] for case in cases}

    return runs


def pairs(checkpoint, which):
    return [Case(f"pretrain {stage} {m}", pretrain(checkpoint, stage, m)) for stage, m in which]


@pytest.fixture(scope="module")
def records(runs):
    """By number of ranks, then by name of the case, the records of the ranks."""
    only_vtm = {"losses.vtc": 0, "losses.mlm": 0, "losses.pem.weight": 0}
    dropout = {"model.video.drop_path": 0.5, "model.text.dropout": 0.5}
    nothing_kept = {"losses.pem.threshold": 1.0}

    def one(checkpoint):
        return [
            Case("pretrain", pretrain(checkpoint)),
            Case("pretrain micro", pretrain(checkpoint, 0, 2)),
            Case("prompter", {"train.engine.zero_stage": 0}),
            Case("only vtm", pretrain(checkpoint, **only_vtm)),
            Case("nothing kept", pretrain(checkpoint, **nothing_kept)),
        ]

    def two(checkpoint):
        return [
            *pairs(checkpoint, FAST),
            Case("prompter", {"train.engine.zero_stage": 1, "train.engine.num_micro_batches": 2}),
            Case("prompter 3", {"train.engine.zero_stage": 3}),
            Case("only vtm", pretrain(checkpoint, 2, 2, **only_vtm)),
            Case("dropout", pretrain(checkpoint, 1, 2, **dropout)),
            Case("nothing kept", pretrain(checkpoint, 1, 1, **nothing_kept)),
        ]

    return {1: runs(1, "one", one), 2: runs(2, "two", two)}


@pytest.fixture(scope="module")
def slow_records(runs):
    """On two ranks, as `records`."""
    return runs(2, "slow", lambda checkpoint: pairs(checkpoint, SLOW))


@pytest.fixture
def compared(request, world_size, name, reference):
    """The records of a case, and those that they have to equal."""
    records = request.getfixturevalue("records")
    is_slow = name not in records[world_size]
    found = request.getfixturevalue("slow_records") if is_slow else records[world_size]
    return found[name], records[1][reference]


COMPARED = [
    (1, "pretrain micro", "pretrain"),
    *((2, f"pretrain {stage} {num_micro}", "pretrain") for stage, num_micro in FAST),
    *(
        pytest.param(2, f"pretrain {stage} {num_micro}", "pretrain", marks=pytest.mark.slow)
        for stage, num_micro in SLOW
    ),
    (2, "prompter", "prompter"),
    (2, "prompter 3", "prompter"),
    (2, "only vtm", "only vtm"),
    (2, "nothing kept", "nothing kept"),
]
each_case = pytest.mark.parametrize(("world_size", "name", "reference"), COMPARED, ids=lambda value: str(value))


def global_batches(records):
    """Keys of each step, lane by lane, whichever rank and micro-batch had them."""
    parts = sorted(part for record in records for part in record.keys)
    return {step: [key for s, _, keys in parts if s == step for key in keys] for step in range(3)}


@each_case
def test_the_global_batches_are_the_same(compared):
    found, reference = map(global_batches, compared)
    assert [len(keys) for keys in reference.values()] == [8, 8, 8]
    assert found == reference


@each_case
def test_losses_are_the_same(compared):
    records, reference = compared
    for found, step in zip(records[0].metrics, reference[0].metrics, strict=True):
        for key in [key for key in step if "loss/" in key] + ["gradient_norm", "learning_rate"]:
            assert_equal(torch.tensor(found[key]), torch.tensor(step[key]), f"{key} of step {step['step']}")


@each_case
def test_every_gradient_is_that_of_one_process(compared):
    records, (reference,) = compared
    expected = reference.plain_gradients or reference.gradients
    for record in records:
        assert record.gradients.keys() == expected.keys()
        for parameter, gradient in expected.items():
            assert_equal(record.gradients[parameter], gradient, parameter)


@each_case
def test_weights_after_three_updates_are_the_same(compared):
    found, expected = (records[0].weights for records in compared)
    assert found.keys() == expected.keys()
    for parameter, weight in expected.items():
        # AdamW divides a gradient by its own size, so where one nearly vanishes its rounding shows: one weight of
        # 16,384 was seen to differ by 1 % of the learning rate, the most that an update moves it.
        differs = (found[parameter] - weight).abs() > 3e-6 + 1e-4 * weight.abs()
        assert differs.float().mean() < 1e-3, parameter
        assert (found[parameter] - weight).abs().max() < 5e-5, parameter


def test_deepspeed_hands_over_the_gradients_of_plain_autograd(records):
    for name in ("pretrain", "prompter", "only vtm"):
        record = records[1][name][0]
        for parameter, gradient in record.plain_gradients.items():
            assert_equal(record.gradients[parameter], gradient, parameter)


def test_dropout_is_the_same_for_what_others_see_of_a_micro_batch_and_for_its_gradients(records):
    for record in records[2]["dropout"]:
        assert record.feature_gap < 1e-5
    calm = records[2]["pretrain 1 2"][0].metrics[0]["loss/vtc"]
    assert abs(records[2]["dropout"][0].metrics[0]["loss/vtc"] - calm) > 1e-4


def test_the_cases_are_worth_comparing(records):
    (plain,) = records[1]["pretrain"]
    assert {"loss/vtc", "loss/vtm", "loss/mlm", "loss/pem"} <= plain.metrics[0].keys()
    assert any(0 < line["pem/kept"] < 1 for line in plain.metrics)
    assert plain.gradients["model.dual.raw_temperature"].abs() > 1e-3
    assert plain.gradients["model.pem_head.0.weight"].abs().max() > 1e-3
    assert all(gradient.isfinite().all() for gradient in plain.gradients.values())
    assert records[2]["pretrain 3 2"][0].num_partitioned > 50
    assert records[2]["pretrain 2 1"][0].num_partitioned == 0
    assert not plain.weights.keys() ^ records[2]["pretrain 3 2"][0].weights.keys()


SIZE, LANES, LENGTH, VOCAB, ENTITIES = 12, 4, 6, 30, 5
INVALID = {
    "none": (),
    "some of one rank": (0, 4, 5),
    "a lane": (6, 7, 8),
    "a rank": (0, 1, 2, 3, 4, 5),
    "all": tuple(range(SIZE)),
}
"""Rows that are not valid; with two ranks of two micro-batches each, a lane is a micro-batch."""


def batch_with(invalid):
    """Four lanes of three samples; the invalid ones have pixels, words and labels that would be learned from."""
    generator = torch.Generator().manual_seed(3)
    ids_BL = torch.randint(5, VOCAB, (SIZE, LENGTH), generator=generator)
    valid_B = torch.ones(SIZE, dtype=torch.bool)
    valid_B[list(invalid)] = False
    return Batch(
        step=0,
        source="video",
        kind="video",
        first_lane=0,
        num_lanes=LANES,
        keys=tuple(map(str, range(SIZE))),
        captions=("",) * SIZE,
        frames_BTHWC=torch.randint(0, 256, (SIZE, 2, 48, 48, 3), dtype=torch.uint8, generator=generator),
        ids_BL=ids_BL,
        mask_BL=torch.ones_like(ids_BL),
        mlm_ids_BL=torch.where(torch.arange(LENGTH) == 2, 4, ids_BL),
        mlm_labels_BL=torch.where(torch.arange(LENGTH) == 2, ids_BL, -100),
        boxes_B4=torch.tensor([[0, 1, 2, 2]] * SIZE),
        video_id_B=torch.arange(SIZE) % 11,  # The last one is the first one's double, on the other rank.
        text_id_B=torch.arange(SIZE),
        noise_B2N=negative_noise(0, 0, range(LANES), SIZE // LANES),
        valid_B=valid_B,
        answers=("",) * SIZE,
        num_quarantined=len(invalid),
    )


class OnlyGradients:
    """An engine that adds up gradients and makes no update."""

    def __init__(self, module):
        self.module = self.features = module

    def __call__(self, *arguments):
        return self.module(*arguments)

    def backward(self, loss):
        loss.backward()

    def step(self, rate):
        pass


def learned_from(batch, world, num_micro):
    """(values, gradients) of a global batch over ranks and micro-batches, in float64, as the trainer feeds them."""
    torch.manual_seed(0)
    model = AlproModel(ModelConfig.model_validate(TINY_MODEL), VOCAB, Heads.of("pretrain", ENTITIES)).double().eval()
    for name, parameter in model.named_parameters():
        if "projection" in name or "temporal_fc" in name:  # Features of a fresh model are nearly equal.
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(1))
    labels_BM = torch.rand(SIZE, ENTITIES, generator=torch.Generator().manual_seed(5)).double().softmax(dim=1)
    rows = slice(world.rank * SIZE // world.size, (world.rank + 1) * SIZE // world.size)
    own, labels = (
        batch.micro_batches(world.size)[world.rank],
        SoftLabels(labels_BM[rows], torch.ones(SIZE).bool()[rows]),
    )
    part = PretrainObjective(model, ObjectiveConfig())
    shares = world.size * num_micro
    with mock.patch.object(objective, "normalise", lambda frames: normalise(frames).double()):
        shown = Step(OnlyGradients(part), world, num_micro, seed=0).train(own, labels, 0.0)
    values = {name.removeprefix("loss/"): value for name, value in shown.items()}
    return values, {name: parameter.grad / shares for name, parameter in model.named_parameters()}


def learned_by_this_rank(num_micro):
    world = join_world(60)
    return {name: learned_from(batch_with(invalid), world, num_micro) for name, invalid in INVALID.items()}


@pytest.fixture(scope="module", params=[1, 2], ids=["one micro-batch", "two micro-batches"])
def learned_by_ranks(request):
    """By rank, then by name of the case."""
    return run_ranks(learned_by_this_rank, 2, request.param, preload=PRELOAD)


def learned_alone(batch):
    return learned_from(batch, World(0, 0, 1, torch.device("cpu")), 1)


def added_up(ranks, case):
    """Values and gradients, each summed over the ranks."""
    return [
        {name: sum(rank[case][which][name] for rank in ranks) for name in ranks[0][case][which]} for which in (0, 1)
    ]


@pytest.mark.parametrize("case", INVALID)
def test_ranks_with_invalid_samples_learn_what_one_process_learns(learned_by_ranks, case):
    for found, expected in zip(added_up(learned_by_ranks, case), learned_alone(batch_with(INVALID[case])), strict=True):
        assert found.keys() == expected.keys()
        for name, right in expected.items():
            torch.testing.assert_close(found[name], right, rtol=1e-9, atol=1e-12, msg=name)


def test_what_invalid_samples_hold_reaches_no_rank(learned_by_ranks):
    invalid = list(INVALID["some of one rank"])
    batch = batch_with(invalid)
    emptied = {"frames_BTHWC": batch.frames_BTHWC.clone(), "mlm_labels_BL": batch.mlm_labels_BL.clone()}
    emptied["frames_BTHWC"][invalid], emptied["mlm_labels_BL"][invalid] = 0, -100
    expected = learned_alone(replace(batch, ids_BL=batch.ids_BL.where(batch.valid_B[:, None], 0), **emptied))
    for found, right in zip(added_up(learned_by_ranks, "some of one rank"), expected, strict=True):
        for name, value in right.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12, msg=name)


def test_each_pattern_of_invalid_samples_is_another_lesson_and_none_at_all_is_nothing(learned_by_ranks):
    values = {case: added_up(learned_by_ranks, case)[0] for case in INVALID}
    assert all(
        len({round(value[name].item(), 9) for value in values.values()}) == len(INVALID) for name in values["all"]
    )
    assert dict.fromkeys(values["all"], 0) == values["all"]
    assert all(gradient.eq(0).all() for gradient in added_up(learned_by_ranks, "all")[1].values())
