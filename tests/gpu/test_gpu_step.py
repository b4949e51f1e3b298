"""Training on a GPU: its number format, its compiler, the stages of ZeRO, its memory, and a run that goes on."""

from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from multiprocessing import get_context

import pytest
import torch
from dying_runs import metrics_of, weights_of
from torch import nn

from alpro_stream.losses.objective import (
    GlobalCounts,
    GlobalFeatures,
    ObjectiveConfig,
    PretrainObjective,
    SoftLabels,
    count_local,
    same_pairs,
)
from alpro_stream.model.alpro import AlproModel, Heads, ModelConfig
from alpro_stream.run import RunConfig, train
from alpro_stream.testing.configs import TINY_MODEL, tiny_run, write_corpus
from alpro_stream.train.distributed import join_world
from alpro_stream.train.engine import Engine, EngineConfig, OptimizerConfig
from alpro_stream.train.rehearsal import made_up_batch, rehearse
from alpro_stream.train.step import Step

SIZE, NUM_TOKENS, VOCAB_SIZE, NUM_ENTITIES = 8, 12, 60, 7
# Sums of float32 in another order; gradients of embeddings are added up in whatever order a GPU comes to them.
WITHIN_FP32 = {"rtol": 1e-4, "atol": 1e-5}
# bf16 has 8 bits.
WITHIN_BF16 = {"rtol": 0.03, "atol": 0.02}


def make_objective(device, depth=2):
    torch.manual_seed(0)
    config = ModelConfig.model_validate({**TINY_MODEL, "video": {**TINY_MODEL["video"], "depth": depth}})
    model = AlproModel(config, VOCAB_SIZE, Heads.of("pretrain", NUM_ENTITIES))
    for name, parameter in model.named_parameters():
        if "temporal_fc" in name or "time_embed" in name:  # Fresh ones hide the temporal attention.
            nn.init.normal_(parameter, std=0.1)
    return PretrainObjective(model, ObjectiveConfig()).to(device)


def make_batch(device, step=0):
    batch = made_up_batch("video", SIZE, 2, (2, 48), NUM_TOKENS, VOCAB_SIZE, rank=0)
    boxes_B4 = torch.tensor([[0, 0, 2, 2], [1, 1, 2, 2], [0, 1, 3, 1], [2, 0, 1, 2]]).repeat(2, 1)
    return replace(batch, step=step, boxes_B4=boxes_B4).to(device)


def make_labels(device):
    draw = torch.Generator().manual_seed(5)
    labels_BM = torch.randn(SIZE, NUM_ENTITIES, generator=draw).mul(3).softmax(dim=1)
    return SoftLabels(labels_BM.to(device), (torch.arange(SIZE) != 3).to(device))


def differentiate(objective, batch, labels, precision="fp32"):
    """Losses by name, and all gradients in a row."""
    ignore_GG = same_pairs(batch.video_id_B, batch.text_id_B)
    counts = GlobalCounts(*count_local(batch, labels))
    with torch.autocast(batch.frames_BTHWC.device.type, torch.bfloat16, enabled=precision == "bf16"):
        terms = objective(batch, lambda v, t: GlobalFeatures(v, t, ignore_GG, batch.valid_B, 0), 1, counts, labels)
    parameters = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(terms.total, parameters, allow_unused=True)
    found = [gradient.flatten().float() for gradient in gradients if gradient is not None]
    return {name: value.detach().float().cpu() for name, value in terms.values.items()}, torch.cat(found).cpu()


@pytest.fixture(scope="module")
def elsewhere():
    """Calls functions: on a GPU in another process, whose group of ranks and changes of torch end with it."""
    if not torch.cuda.is_available():
        yield lambda function, *arguments: function(*arguments)
        return
    pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))  # one, as to start it takes as long as the tests
    yield lambda function, *arguments: pool.submit(function, *arguments).result(timeout=90)
    pool.shutdown(wait=False, cancel_futures=True)


@pytest.mark.usefixtures("precise")
def test_losses_and_gradients_of_a_gpu_are_those_of_the_cpu(device_id):
    cpu, gpu = torch.device("cpu"), torch.device("cuda", device_id)
    (expected, ours), (found, theirs) = (
        differentiate(make_objective(where).eval(), make_batch(where), make_labels(where)) for where in (cpu, gpu)
    )
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **WITHIN_FP32, msg=name)
    torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("precise")
def test_losses_in_bf16_are_near_those_in_fp32(device):
    objective, batch, labels = make_objective(device).eval(), make_batch(device), make_labels(device)
    (exact, gradient), (near, rounded) = (
        differentiate(objective, batch, labels, precision) for precision in ("fp32", "bf16")
    )
    assert set(exact) == {"vtc", "vtm", "mlm", "pem"}
    for name, value in exact.items():
        torch.testing.assert_close(near[name], value, **WITHIN_BF16, msg=name)
    assert exact != near  # it was computed in bf16
    assert torch.cosine_similarity(gradient, rounded, dim=0) > 0.99


@pytest.mark.usefixtures("precise")
def test_a_compiled_step_is_the_eager_one(device):
    expected, gradient = differentiate(make_objective(device, 1).eval(), make_batch(device), make_labels(device))
    objective = make_objective(device, 1).eval()
    torch._dynamo.reset()
    # On a CPU the lines alone: `tests/unit/test_objective.py` compiles there.
    with nullcontext() if device.type == "cuda" else torch.compiler.set_stance("force_eager"):
        objective.compile_parts()
        found, theirs = differentiate(objective, make_batch(device), make_labels(device))
    torch._dynamo.reset()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **WITHIN_FP32, msg=name)
    torch.testing.assert_close(theirs, gradient, rtol=1e-3, atol=1e-4)


def rehearse_once(checkpointing):
    """What the rehearsal says of the memory."""
    world = join_world(60)
    settings = EngineConfig(zero_stage=0, activation_checkpointing=checkpointing)
    objective = make_objective(world.device, 4)
    for module in objective.modules():
        if hasattr(module, "checkpointing"):
            module.checkpointing = checkpointing
    return rehearse(objective, [make_batch("cpu")], NUM_ENTITIES, settings, OptimizerConfig(), world)


def test_the_rehearsal_says_how_much_memory_a_step_takes(device, elsewhere):
    plain, checkpointed = (elsewhere(rehearse_once, checkpointing) for checkpointing in (False, True))
    if device.type == "cpu":
        assert plain == checkpointed == 0
        return
    # Parameters in fp32 with gradients and two moments, at the least.
    parameters = sum(parameter.numel() for parameter in make_objective("cpu", 4).parameters())
    assert plain > 4 * 4 * parameters
    assert plain < 2**30
    assert checkpointed <= plain


def run_and_go_on(folder):
    """The same pre-training run in one sitting and in two."""
    corpus = write_corpus(folder / "corpus")
    changes = {"task": "pretrain", "losses.pem.weight": 0, "train.max_steps": 4, "train.engine.num_threads": 1}
    changes["stream.decode"] = {"num_workers": 0}
    configs = [RunConfig.model_validate(tiny_run(corpus, folder / name, changes)) for name in ("whole", "parted")]
    train(configs[0])
    asked = iter([False, False, False, True])  # when the ranks have met, then after each step
    first = train(configs[1], lambda: next(asked))
    second = train(configs[1])
    return [first.was_stopped, second.was_stopped], [config.run_dir for config in configs]


def test_a_run_goes_on_as_if_it_had_not_been_stopped(device, elsewhere, tmp_path):
    stopped, (whole, parted) = elsewhere(run_and_go_on, tmp_path)
    assert stopped == [True, False]
    expected, found = metrics_of(whole), metrics_of(parted)
    assert [line["step"] for line in found] == [line["step"] for line in expected] == [1, 2, 3, 4]
    ours, theirs = weights_of(parted), weights_of(whole)
    if device.type == "cpu":
        assert found == expected
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        return
    for line, wanted in zip(found, expected, strict=True):
        assert line["source"] == wanted["source"]
        for name in [name for name in wanted if "loss/" in name]:
            torch.testing.assert_close(line[name], wanted[name], **WITHIN_FP32, msg=f"{name} of {wanted['step']}")
    for name, tensor in theirs.items():
        # Where a gradient is all but nothing, its sign, and so Adam's step, is that of the rounding.
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=2e-4, msg=name)


def train_by_stage(stages, precision):
    """Losses and the gradient's norm of three steps of each stage, on the device of this process."""
    found = {}
    for stage in stages:
        world = join_world(60)
        settings = EngineConfig(zero_stage=stage, precision=precision)
        engine = Engine(make_objective(world.device), settings, OptimizerConfig(), world, SIZE)
        step = Step(engine, world, num_micro_batches=1, seed=0)
        lines = []
        for number in range(3):
            values = step.train(make_batch(world.device, number), make_labels(world.device), 1e-3)
            lines.append({**{name: float(value) for name, value in values.items()}, "norm": engine.gradient_norm()})
        engine.close()
        found[stage] = lines
    return found


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_losses_are_the_same_with_every_stage_of_zero(device, elsewhere, precision):
    # ZeRO 3 changes functions of torch for good: last here, and not at all in the process of the other tests.
    stages = (0, 1, 2, 3) if device.type == "cuda" else (0, 1, 2)
    found = elsewhere(train_by_stage, stages, precision)
    first, *others = (found[stage] for stage in stages)
    assert first[0]["loss/mlm"] > first[2]["loss/mlm"]  # it learns
    for stage, lines in zip(stages[1:], others, strict=True):
        for ours, expected in zip(lines, first, strict=True):
            tolerance = WITHIN_FP32 if precision == "fp32" else WITHIN_BF16
            for name, value in expected.items():
                torch.testing.assert_close(ours[name], value, **tolerance, msg=f"{name} with ZeRO {stage}")
