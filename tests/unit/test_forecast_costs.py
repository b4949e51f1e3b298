"""The formulas of a forecast against hand calculations."""

from functools import cache

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import linear, relu

from alpro_launch.forecast import devices, work
from alpro_launch.forecast.collectives import (
    KEPT_PARAMETERS,
    Links,
    Traffic,
    feature_bytes,
    gather_bytes,
    seconds,
    sum_bytes,
    zero_bytes,
    zero_calls,
)
from alpro_launch.forecast.memory import memory_of
from alpro_launch.forecast.rates import AssumedRates, MeasuredRates, fitted_rates, rate_at
from alpro_launch.forecast.work import Sizes, Work, work_of
from alpro_stream.errors import ConfigError
from alpro_stream.model.operations import PEAK_PER_S, contrastive_operations
from alpro_stream.run import RunConfig
from alpro_stream.testing.configs import TINY_MODEL
from alpro_stream.train.engine import BUCKET_ELEMENTS

TASKS = {
    "prompter": ({}, Sizes(50)),
    "pretrain": ({"prompter": {"checkpoint": "unused"}}, Sizes(50, 8)),
    "retrieval": ({}, Sizes(50)),
    "question_answering": ({}, Sizes(50, 0, 5)),
}


def tiny(task="prompter", **engine):
    unit = {"unit": "question"} if task == "question_answering" else {}
    more, sizes = TASKS[task]
    tree = {
        "task": task,
        "run_dir": "unused",
        "stream": {"sources": [{"path": "x"}], "text": {"tokenizer": "x", "num_tokens": 12}, **unit},
        "model": TINY_MODEL,
        "train": {"engine": engine},
        **more,
    }
    config = RunConfig.model_validate(tree)
    prompter = config.model if sizes.num_entities else None
    return config, Sizes(sizes.vocab_size, sizes.num_entities, sizes.num_answers, prompter)


@cache
def micro_work(task="prompter", size=4, **engine):
    """Of a micro-batch of clips."""
    return work_of(*tiny(task, **engine), {"video": 1.0}).of("video", size)


def test_a_ring_sends_what_is_missing_once_to_gather_and_twice_to_sum():
    # Four ranks: three quarters of 100 bytes are somewhere else.
    assert gather_bytes(100, 4) == 75
    assert sum_bytes(100, 4) == 150
    assert sum_bytes(100, 1) == 0


@pytest.mark.parametrize(
    ("stage", "num_micro_batches", "expected"),
    [
        # 1,000 parameters are 4,000 bytes: 3,500 of them are on the other seven of eight ranks.
        (0, 1, 7000),
        (1, 1, 7000 + 3500),
        (1, 4, 7000 + 3500),
        (2, 1, 7000 + 3500),
        (2, 4, 4 * 7000 + 3500),
        # Gathered for the forward pass, which the backward pass finds there, and scattered.
        (3, 1, 2 * 3500),
        (3, 4, 4 * 2 * 3500 + 4 * 3500),
    ],
)
def test_bytes_of_a_zero_stage(stage, num_micro_batches, expected):
    assert zero_bytes(1000, 1000, stage, 8, num_micro_batches) == expected


def test_a_model_that_is_not_kept_whole_is_gathered_for_both_passes():
    assert zero_bytes(KEPT_PARAMETERS, KEPT_PARAMETERS, 3, 2, 1) == 3 * 4 * KEPT_PARAMETERS / 2


def test_frozen_parameters_are_gathered_and_not_summed():
    # A half of 4,000 bytes for the forward pass, and of 400 for gradients.
    assert zero_bytes(1000, 100, 3, 2, 1) == 2000 + 200
    assert zero_bytes(1000, 100, 0, 2, 1) == 400


@pytest.mark.parametrize(
    ("stage", "num_micro_batches", "expected"),
    # Three buckets of gradients; five pieces of parameters.
    [(0, 4, 1), (1, 4, 3 + 1), (2, 4, 4 * 3 + 1), (3, 1, 3 + 5), (3, 4, 4 * (3 + 2 * 5))],
)
def test_collectives_of_a_zero_stage(stage, num_micro_batches, expected):
    assert zero_calls(4.5 * BUCKET_ELEMENTS, 2.5 * BUCKET_ELEMENTS, stage, num_micro_batches) == expected


def test_bytes_of_features():
    # 64 samples of two float32 features of 256 and three int64: 2,072 bytes each, half of them of the other rank.
    assert feature_bytes(64, 256, 2) == 64 * 2072 / 2


def test_the_slowest_link_sets_the_pace():
    links = Links(inside_per_s=300.0, between_per_s=50.0, latency_s=0.25)
    traffic = Traffic(gradient_bytes=600.0, gradient_calls=2, feature_bytes=150.0, feature_calls=4)
    assert seconds(traffic, links, 8, 1) == (2.0 + 2 * 0.25, 0.5 + 4 * 0.25)
    # Two nodes: one hop more for each collective.
    assert seconds(traffic, links, 16, 2) == (12.0 + 2 * 2 * 0.25, 3.0 + 4 * 2 * 0.25)
    assert seconds(traffic, links, 1, 1) == (0.0, 0.0)


def test_an_assumed_gpu_computes_or_waits_for_its_operations():
    rates = AssumedRates(peak_per_s=1000.0, share=0.5, bytes_per_s=100.0, call_s=0.01)
    busy, idle = Work(flops=1000.0, num_bytes=50.0, calls=10), Work(flops=10.0, calls=10)
    assert (rates.seconds(busy, 64), rates.waits_for_calls(busy, 64)) == (2.0 + 0.5, False)
    assert (rates.seconds(idle, 64), rates.waits_for_calls(idle, 64)) == (0.1, True)


def test_a_measured_machine_adds_its_parts():
    rates = MeasuredRates({64: 100.0}, bytes_per_s=10.0, call_s=0.5)
    assert rates.seconds(Work(flops=200.0, num_bytes=30.0, calls=4), 64) == 2.0 + 3.0 + 2.0


def test_products_between_two_widths():
    products = {64: 10.0, 256: 1000.0}
    # Half the way in both logarithms.
    assert rate_at(products, 128) == pytest.approx(100.0)
    assert [rate_at(products, width) for width in (8, 64, 256, 999)] == [10.0, 10.0, 1000.0, 1000.0]


def test_fitting_finds_the_rates_that_made_the_times():
    true = MeasuredRates({64: 100.0, 128: 300.0}, bytes_per_s=40.0, call_s=0.02)
    samples = [(Work(50, 900, 3), 64), (Work(700, 200, 500), 128), (Work(10, 10, 20), 128)]
    found = fitted_rates(true.products, [(work, width, true.seconds(work, width)) for work, width in samples])
    assert (found.bytes_per_s, found.call_s) == pytest.approx((40.0, 0.02))


def test_fitting_never_finds_less_than_nothing():
    # Faster than its products alone.
    found = fitted_rates({64: 100.0}, [(Work(200, 50, 5), 64, 1.0), (Work(200, 5, 50), 64, 1.1)])
    assert (found.bytes_per_s, found.call_s) == (float("inf"), 0.0)


def test_memory_of_the_zero_stages():
    def together(stage):
        found = memory_of(parameters=1000, trained=1000, zero_stage=stage, num_ranks=4, activations=0)
        return found.weights + found.gradients + found.optimizer

    # Parameter, gradient and two moments are 16 bytes; stages 1 and 2 keep a copy of the parameters too.
    assert together(0) == 16_000
    assert together(1) == 8_000 + 12_000 / 4
    assert together(2) == 4_000 + 16_000 / 4
    # A step has all parameters of so small a model, beside the rank's share.
    assert together(3) == 4_000 + 16_000 / 4


def test_memory_of_gradients_on_their_way():
    def buckets(parameters, stage, num_ranks):
        found = memory_of(
            parameters=parameters, trained=parameters, zero_stage=stage, num_ranks=num_ranks, activations=0
        )
        return found.buckets

    many = 3 * BUCKET_ELEMENTS
    # A bucket, and the same flattened; without ZeRO all gradients flattened, where they are sent.
    assert buckets(many, 1, 4) == 2 * 4 * BUCKET_ELEMENTS
    assert buckets(1000, 2, 4) == 2 * 4_000
    assert (buckets(many, 0, 4), buckets(many, 0, 1)) == (4 * many, 0)


def test_memory_counts_the_prompter_with_its_own_context():
    sizes = {"parameters": 10, "trained": 10, "zero_stage": 0, "num_ranks": 1, "activations": 5.0}
    alone, beside = memory_of(**sizes), memory_of(**sizes, prompter_parameters=100, decoder_bytes=7.0)
    assert beside.total - alone.total == 400 + 7 + devices.CONTEXT_BYTES
    assert alone.fits(2 * alone.total)
    assert not alone.fits(alone.total)  # Nothing would be left for pieces.


def test_counting_by_hand():
    with FakeTensorMode(), work._counting() as counted:
        rows_RD, weight_FD = torch.zeros(2, 3), torch.zeros(4, 3)
        before = counted.work
        relu(linear(rows_RD, weight_FD).view(8))
    # A product of (2, 3) and (3, 4); then eight numbers are read and eight are written. A view is nothing.
    assert counted.work.flops == 2 * 2 * 3 * 4
    assert counted.work.num_bytes - before.num_bytes == 16 * 4
    assert counted.work.calls - before.calls == 2


def test_a_dual_encoder_by_hand():
    micro = micro_work("prompter")
    # The last block computes the MLP and the queries and outputs of attention over space for CLS alone: of two frames
    # of nine patches and width 32, and one product is saved in time where two are joined.
    method = 4 * contrastive_operations(tiny()[0].model, 12).forward
    width, patches, frames = 32, 9, 2
    tokens, cls = frames * (1 + patches), frames
    not_asked = (tokens - cls) * (2 * 2 * width**2 + 4 * (1 + patches) * width)  # Queries, output, attention.
    not_mlp = frames * patches * 4 * width * 4 * width
    joined = 2 * (frames * patches * 2 * width**2)  # Of both blocks.
    small = 2 * 2 * width**3  # The joined matrices, once for a batch.
    similarity = 2 * 4 * 4 * 16
    executed = method - 4 * (not_asked + not_mlp + joined) + small + similarity
    assert micro.forward.flops == pytest.approx(executed, rel=0.001)
    # Two products for each one, but none for the gradient of the pictures.
    assert 1.5 < micro.backward.flops / micro.forward.flops <= 2.0


def test_work_grows_on_a_line(monkeypatch):
    task = "pretrain"
    said = micro_work(task, 8)
    monkeypatch.setattr(work, "_SIZES", (8, 10))
    counted = micro_work.__wrapped__(task, 8)
    for name in ("forward", "backward", "labels"):
        one, other = getattr(said, name), getattr(counted, name)
        assert (one.flops, one.num_bytes, one.calls) == pytest.approx(
            (other.flops, other.num_bytes, other.calls), rel=0.01
        )
    assert said.saved_bytes == pytest.approx(counted.saved_bytes, rel=0.01)
    assert said.labels.flops > 0


def test_checkpointing_keeps_less_and_computes_more():
    plain, saving = micro_work("retrieval"), micro_work("retrieval", activation_checkpointing=True)
    assert saving.saved_bytes < 0.6 * plain.saved_bytes
    assert saving.backward.flops > plain.backward.flops + 0.6 * plain.forward.flops


def test_features_alone_are_the_forward_pass_of_a_dual_encoder():
    micro = micro_work("prompter")
    # Nothing but the similarities of VTC is left out.
    assert micro.features.flops == pytest.approx(micro.forward.flops - 2 * 4 * 4 * 16)
    assert micro_work("question_answering").features == Work()


def test_images_cost_what_clips_cost_unless_they_are_read_once():
    config, sizes = tiny()
    found = work_of(config, sizes, {"image": 0.5, "video": 0.5})
    assert found.of("image", 4) == found.of("video", 4)
    once = config.model.video.model_copy(update={"still": "once"})
    config = config.model_copy(update={"model": config.model.model_copy(update={"video": once})})
    found = work_of(config, sizes, {"image": 0.5, "video": 0.5})
    assert found.of("image", 4).forward.flops < 0.7 * found.of("video", 4).forward.flops


def test_an_unknown_device_names_the_known_ones():
    assert devices.find_device("A100").name == "a100"
    with pytest.raises(ConfigError, match=r"--gpu a1000: not in the table, which has a100, .*h100.*; here is"):
        devices.find_device("a1000")


@pytest.mark.parametrize("device", devices.known_devices(), ids=lambda device: device.name)
def test_every_figure_of_the_table_has_its_source(device):
    figures = {"peak_per_s", "memory_bytes", "memory_per_s", "link_per_s", "network_per_s"}
    assert device.sources.keys() == figures
    assert all(getattr(device, name) for name in figures)
    # Data sheets put the peak with sparsity first, which is twice as high.
    known = [peak for name, peak in PEAK_PER_S.items() if name == device.name.upper()]
    assert not known or known == [device.peak_per_s["bf16"]]


def test_a_measured_gpu_is_recognised_by_its_name():
    a100, h100 = devices.find_device("a100"), devices.find_device("h100")
    assert devices.is_of(a100, ["NVIDIA A100-SXM4-80GB"] * 8)
    assert not devices.is_of(a100, ["NVIDIA H100 80GB HBM3"])
    assert not devices.is_of(a100, ["NVIDIA A100-PCIE-40GB"])
    assert not devices.is_of(a100, ["NVIDIA A100 80GB PCIe"])
    assert devices.is_of(h100, ["NVIDIA H100 80GB HBM3"])
    assert not devices.is_of(h100, ["NVIDIA H100 PCIe"])
    assert not devices.is_of(a100, [])
    assert not devices.is_of(devices.find_device("l4"), ["NVIDIA L40S"])
    assert devices.is_of(devices.find_device("l40s"), ["NVIDIA L40S"])
    assert not devices.is_of(devices.find_device("h200"), ["NVIDIA GH200 480GB"])
    assert devices.is_of(devices.find_device("h200"), ["NVIDIA H200"])
    assert not devices.is_of(devices.find_device("h200"), ["NVIDIA H200 NVL"])
