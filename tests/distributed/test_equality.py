"""What is learned does not depend on the ranks, the micro-batches or the ZeRO stage."""

import pytest
import torch
from recording import PRELOAD, Case, train_cases

from alpro_stream.run import RunConfig, train
from alpro_stream.testing.configs import tiny_run, write_corpus
from alpro_stream.testing.distributed import run_ranks

STAGES = (0, 1, 2, 3)


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


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """All cases: by number of ranks, then by name, the records of the ranks."""
    root = tmp_path_factory.mktemp("equality")
    corpus = write_corpus(root / "corpus")
    (checkpoint,) = run_ranks(prompter_run, 1, corpus, root / "stage_one", preload=PRELOAD)
    only_vtm = {"losses.vtc": 0, "losses.mlm": 0, "losses.pem.weight": 0}
    dropout = {"model.video.drop_path": 0.5, "model.text.dropout": 0.5}
    nothing_kept = {"losses.pem.threshold": 1.0}
    one = [
        Case("pretrain", pretrain(checkpoint)),
        Case("pretrain micro", pretrain(checkpoint, 0, 2)),
        Case("prompter", {"train.engine.zero_stage": 0}),
        Case("only vtm", pretrain(checkpoint, **only_vtm)),
        Case("nothing kept", pretrain(checkpoint, **nothing_kept)),
    ]
    two = [Case(f"pretrain {stage} {m}", pretrain(checkpoint, stage, m)) for stage in STAGES for m in (1, 2)]
    two.append(Case("prompter", {"train.engine.zero_stage": 1, "train.engine.num_micro_batches": 2}))
    two.append(Case("only vtm", pretrain(checkpoint, 2, 2, **only_vtm)))
    two.append(Case("dropout", pretrain(checkpoint, 1, 2, **dropout)))
    two.append(Case("nothing kept", pretrain(checkpoint, 1, 1, **nothing_kept)))
    found = {}
    for size, cases in ((1, one), (2, two)):
        by_rank = run_ranks(train_cases, size, corpus, root / str(size), cases, preload=PRELOAD, timeout_s=240)
        found[size] = {case.name: [record[case.name] for record in by_rank] for case in cases}
    return found


COMPARED = [
    (1, "pretrain micro", "pretrain"),
    *((2, f"pretrain {stage} {num_micro}", "pretrain") for stage in STAGES for num_micro in (1, 2)),
    (2, "prompter", "prompter"),
    (2, "only vtm", "only vtm"),
    (2, "nothing kept", "nothing kept"),
]
each_case = pytest.mark.parametrize(("world_size", "name", "reference"), COMPARED, ids=lambda value: str(value))


def global_batches(records):
    """Keys of each step, lane by lane, whichever rank and micro-batch had them."""
    parts = sorted(part for record in records for part in record.keys)
    return {step: [key for s, _, keys in parts if s == step for key in keys] for step in range(3)}


@each_case
def test_the_global_batches_are_the_same(records, world_size, name, reference):
    expected = global_batches(records[1][reference])
    assert [len(keys) for keys in expected.values()] == [8, 8, 8]
    assert global_batches(records[world_size][name]) == expected


@each_case
def test_losses_are_the_same(records, world_size, name, reference):
    expected = records[1][reference][0].metrics
    for found, step in zip(records[world_size][name][0].metrics, expected, strict=True):
        for key in [key for key in step if "loss/" in key] + ["gradient_norm", "learning_rate"]:
            assert_equal(torch.tensor(found[key]), torch.tensor(step[key]), f"{key} of step {step['step']}")


@each_case
def test_every_gradient_is_that_of_one_process(records, world_size, name, reference):
    expected = records[1][reference][0].plain_gradients or records[1][reference][0].gradients
    for record in records[world_size][name]:
        assert record.gradients.keys() == expected.keys()
        for parameter, gradient in expected.items():
            assert_equal(record.gradients[parameter], gradient, parameter)


@each_case
def test_weights_after_three_updates_are_the_same(records, world_size, name, reference):
    expected = records[1][reference][0].weights
    found = records[world_size][name][0].weights
    assert found.keys() == expected.keys()
    for parameter, weight in expected.items():
        assert_equal(found[parameter], weight, parameter)


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
    assert any(0 < line["pem_kept"] < 1 for line in plain.metrics)
    assert plain.gradients["model.dual.raw_temperature"].abs() > 1e-3
    assert plain.gradients["model.pem_head.0.weight"].abs().max() > 1e-3
    assert all(gradient.isfinite().all() for gradient in plain.gradients.values())
    assert records[2]["pretrain 3 1"][0].num_partitioned > 50
    assert records[2]["pretrain 2 1"][0].num_partitioned == 0
    assert not plain.weights.keys() ^ records[2]["pretrain 3 2"][0].weights.keys()
