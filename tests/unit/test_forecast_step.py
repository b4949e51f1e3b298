"""A step, its scaling and the sentence about it, with round figures in place of a machine's."""

import re
from dataclasses import replace

import pytest

from alpro_launch.forecast.bottleneck import bottleneck
from alpro_launch.forecast.collectives import Links, Traffic
from alpro_launch.forecast.facts import Data, Facts
from alpro_launch.forecast.machine import Machine
from alpro_launch.forecast.memory import memory_of
from alpro_launch.forecast.rates import MeasuredRates
from alpro_launch.forecast.scaling import cut_to, rank_counts, scaling
from alpro_launch.forecast.step import Layout, StepForecast, forecast_step, layout_of
from alpro_launch.forecast.work import MicroWork, RunWork, Sizes, Work
from alpro_stream.config import load_config
from alpro_stream.errors import ConfigError
from alpro_stream.model.operations import contrastive_operations
from alpro_stream.run import RunConfig

WORKERS = "stream.decode.num_workers=2"


def run(*overrides, path="configs/prompter/tiny.yaml"):
    """Of 8 samples in 4 lanes."""
    return load_config(RunConfig, path, ["train.engine.zero_stage=0", *overrides])


def work(per_sample, saved=0.0):
    """Linear in the samples, and nothing for starting operations."""

    def micro(size):
        forward, backward, labels, features = (Work(flops=size * flops) for flops in per_sample)
        forward, backward = replace(forward, calls=1), replace(backward, calls=1)
        labels, features = (replace(part, calls=float(part.flops > 0)) for part in (labels, features))
        return MicroWork(features, forward, backward, labels, size * saved)

    return RunWork({"video": (micro(2), micro(4))}, 1000, 1000, 0, 10)


def machine(**changes):
    """A hundred operations a second; a parameter is updated in a millisecond."""
    rates = MeasuredRates({64: 100.0}, float("inf"), 0.0)
    links = Links(inside_per_s=7000.0, between_per_s=700.0, latency_s=0.0)
    plain = Machine(
        name="m", rates=rates, label_rates=rates, update_s=1e-3, update_tensor_s=0.0, links=links, decode_s=None
    )
    return replace(plain, **changes)


FACTS = Facts(Sizes(50), Data(steps_per_epoch=10, kinds={"video": 1.0}, clip_bytes=500.0))


def test_the_parts_of_a_step_by_hand():
    config = run()
    step = forecast_step(config, FACTS, work((100, 200, 50, 0)), machine(), layout_of(config, 1, 2))
    # Two ranks with four samples each; gradients are 4,000 bytes, and a sum sends half of them twice.
    assert step.parts["forward"] == pytest.approx(4.0)
    assert step.parts["backward"] == pytest.approx(8.0)
    assert step.parts["labels"] == pytest.approx(2.0)
    assert step.parts["update"] == pytest.approx(1.0)
    assert step.parts["gradients between ranks"] == pytest.approx(4000 / 7000)
    assert step.step_s == pytest.approx(sum(step.parts.values()))
    assert step.clips_per_s == pytest.approx(8 / step.step_s)
    assert step.operations == pytest.approx(
        4 * contrastive_operations(config.model, config.stream.text.num_tokens).step
    )
    assert step.flops == pytest.approx(4 * 350)


def test_zero_spreads_the_update_and_gathers():
    config = run("train.engine.zero_stage=1")
    step = forecast_step(config, FACTS, work((100, 200, 0, 0)), machine(), layout_of(config, 1, 2))
    assert step.parts["update"] == pytest.approx(0.5)
    assert step.parts["gradients between ranks"] == pytest.approx(6000 / 7000)


def test_micro_batches_compute_features_first_and_keep_less():
    layouts = {}
    for times in (1, 2):
        config = run(f"train.engine.num_micro_batches={times}")
        layouts[times] = forecast_step(
            config, FACTS, work((100, 200, 0, 40), saved=3.0), machine(), layout_of(config, 1, 2)
        )
    assert layouts[2].parts["forward"] == layouts[1].parts["forward"]
    # Two micro-batches of two samples each; one alone has nothing to wait for.
    assert layouts[2].parts["features first"] == pytest.approx(2 * 2 * 40 / 100)
    assert "features first" not in layouts[1].parts
    assert (layouts[1].memory.activations, layouts[2].memory.activations) == (12.0, 6.0)


def test_data_are_beside_the_trainer_where_they_have_cores_of_their_own():
    config, plain = run(WORKERS), work((100, 200, 0, 0))
    # Four clips of a rank by two workers; eight clips of 500 bytes from 40 bytes a second.
    step = forecast_step(config, FACTS, plain, machine(decode_s=1.0), layout_of(config, 1, 2), storage_per_s=40.0)
    assert step.beside == {"decoding": 2.0, "reading": 100.0}
    assert step.step_s == 100.0
    assert step.trainer_s < 20
    shared = machine(decode_s=1.0, shares_cores=True, cores_per_rank=1.0)
    step = forecast_step(config, FACTS, plain, shared, layout_of(config, 1, 2))
    assert step.parts["decoding on the same cores"] == 4.0
    config = run("stream.decode.num_workers=0")
    step = forecast_step(config, FACTS, plain, machine(decode_s=1.0), layout_of(config, 1, 2))
    assert (step.parts["decoding"], step.beside) == (4.0, {})
    videos = replace(FACTS, data=replace(FACTS.data, stores_videos=True))
    step = forecast_step(config, videos, plain, machine(decode_s=1.0), layout_of(config, 1, 2))
    assert (step.parts["decoding"], step.beside) == (4.0 / config.stream.decode.num_processes, {})


def test_a_gpu_decodes_beside_the_trainer_where_a_worker_asks_it_to():
    mixed, plain = ["stream.decode.device=mixed", "stream.decode.backend=dali"], work((100, 200, 0, 0))
    config = run(*mixed, "stream.decode.num_workers=4")
    step = forecast_step(config, FACTS, plain, machine(decode_s=1.0), layout_of(config, 1, 2))
    assert (step.beside, "decoding" in step.parts) == ({"decoding": 4.0}, False)
    config = run(*mixed, "stream.decode.num_workers=0")
    step = forecast_step(config, FACTS, plain, machine(decode_s=1.0), layout_of(config, 1, 2))
    assert (step.parts["decoding"], step.beside) == (4.0, {})


def test_steps_are_averaged_over_the_kinds_of_batches():
    config = run()
    video, image = (work((flops, 0, 0, 0)).by_size["video"] for flops in (100, 20))
    both = RunWork({"video": video, "image": image}, 1000, 1000, 0, 10)
    facts = replace(FACTS, data=replace(FACTS.data, kinds={"video": 0.25, "image": 0.75}))
    step = forecast_step(config, facts, both, machine(), layout_of(config, 1, 1))
    assert step.parts["forward"] == pytest.approx(0.25 * 8 + 0.75 * 1.6)


def test_unknown_links_are_no_matter_for_one_rank():
    config = run()
    assert forecast_step(config, FACTS, work((1, 1, 0, 0)), machine(links=None), layout_of(config, 1, 1)).step_s
    with pytest.raises(ConfigError, match="2 ranks exchange gradients, and no file says how fast"):
        forecast_step(config, FACTS, work((1, 1, 0, 0)), machine(links=None), layout_of(config, 1, 2))


@pytest.mark.parametrize(
    ("overrides", "place", "says"),
    [
        ([], (0, 8), "--nodes 0 --gpus 8: at least 1"),
        ([], (1, -1), "--nodes 1 --gpus -1: at least 1"),
        ([], (1, 3), "1 x 3 GPUs are 3 ranks, which do not divide 4 lanes in 1 micro-batches; allowed: 1, 2, 4"),
        ([], (2, 4), "2 x 4 GPUs are 8 ranks"),
        (["train.engine.num_micro_batches=2"], (1, 4), "4 ranks, .* in 2 micro-batches; allowed: 1, 2"),
        (["stream.global_batch=10"], (1, 2), "global_batch 10 is not a multiple of stream.num_lanes 4; .* example 8"),
    ],
)
def test_what_cannot_be_cut_is_refused(overrides, place, says):
    with pytest.raises(ConfigError, match=says):
        layout_of(run(*overrides), *place)


def test_nodes_are_filled_one_after_the_other():
    assert Layout(num_ranks=8, ranks_per_node=8, global_batch=64, num_micro_batches=1).num_nodes == 1
    assert Layout(num_ranks=16, ranks_per_node=8, global_batch=64, num_micro_batches=1).num_nodes == 2
    assert Layout(num_ranks=2, ranks_per_node=8, global_batch=64, num_micro_batches=2).micro_batch == 16


def test_strong_scaling_keeps_the_batch_and_weak_that_of_a_gpu():
    layout = Layout(num_ranks=4, ranks_per_node=8, global_batch=64, num_micro_batches=2)
    fewer = cut_to(layout, 1, 16, "strong")
    assert (fewer.global_batch, fewer.num_micro_batches) == (64, 8)
    more = cut_to(layout, 16, 16, "strong")
    assert (more.global_batch, more.num_micro_batches) == (64, 1)
    assert cut_to(layout, 32, 16, "strong") is None
    weak = cut_to(layout, 32, 16, "weak")
    assert (weak.global_batch, weak.num_micro_batches) == (512, 2)


def test_numbers_of_gpus_in_the_tables():
    assert rank_counts(2) == [1, 2, 4, 8, 16, 32, 64]
    assert rank_counts(24) == [1, 2, 4, 8, 16, 24, 32, 64]
    assert rank_counts(64)[-1] == 256


def test_efficiency_is_that_of_a_gpu_over_one_alone():
    config, plain = run("train.engine.zero_stage=0"), work((100, 200, 0, 0))
    layout = layout_of(config, 1, 2)
    rows = scaling(layout, 4, "weak", lambda cut: forecast_step(config, FACTS, plain, machine(), cut))
    assert (rows[0].num_ranks, rows[0].efficiency) == (1, 1.0)
    # Features: 8 samples of two float32 vectors of 32 and three int64, half of them of the other rank.
    two = 13.0 + 4000 / 7000 + 8 * 280 / 2 / 7000
    assert rows[1].efficiency == pytest.approx(13.0 / two)
    # The network of the nodes is ten times slower.
    assert rows[2].step.parts["gradients between ranks"] > 10 * rows[1].step.parts["gradients between ranks"]


def told(parts, beside=(), overrides=(), path="configs/pretrain/tiny.yaml", waits=False, videos=False):
    """The sentence about a step with these parts."""
    every = {
        "forward": 0.0,
        "backward": 0.0,
        "update": 0.0,
        "gradients between ranks": 0.0,
        "features between ranks": 0.0,
        "rest": 0.0,
    }
    every |= parts
    memory = memory_of(parameters=1, trained=1, zero_stage=0, num_ranks=1, activations=0)
    layout = Layout(num_ranks=2, ranks_per_node=2, global_batch=8, num_micro_batches=1)
    step = StepForecast(
        layout=layout,
        parts=every,
        beside=dict(beside),
        step_s=max([sum(every.values()), *dict(beside).values()]),
        operations=1.0,
        flops=1.0,
        utilisation=None,
        traffic=Traffic(0.0, 0, 0.0, 0),
        memory=memory,
        waits_for_calls=waits,
    )
    return bottleneck(step, run(*overrides, path=path), videos)


MODEL = {"forward": 30.0, "backward": 60.0}


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ({"parts": MODEL, "beside": {"decoding": 180.0, "reading": 9.0}}, r"decoding takes 2.0 times .*num_workers"),
        ({"parts": MODEL, "beside": {"decoding": 180.0}, "videos": True}, r"raise stream.decode.num_processes, store"),
        (
            {
                "parts": MODEL,
                "beside": {"decoding": 180.0},
                "overrides": ["stream.decode.device=mixed", "stream.decode.backend=dali"],
            },
            r"decode on cores \(stream.decode.device=cpu\)",
        ),
        (
            {"parts": MODEL, "beside": {"decoding": 18.0, "reading": 900.0}},
            r"reading takes 10.0 times .* faster storage",
        ),
        ({"parts": MODEL | {"gradients between ranks": 60.0}}, r"links between ranks \(40 % .* fewer nodes"),
        (
            {"parts": MODEL | {"gradients between ranks": 60.0}, "overrides": ["train.engine.zero_stage=1"]},
            r"set train.engine.zero_stage=0, which sends 33 % less, if the memory allows it",
        ),
        ({"parts": MODEL, "waits": True}, "starting operations.*compile=true"),
        (
            {"parts": MODEL | {"labels": 30.0}},
            r"the prompter, beside the model \(25 % .*: a smaller prompter",
        ),
        (
            {"parts": MODEL | {"decoding": 200.0}, "waits": True},
            r"trainer waits \(69 % .*: set stream.decode.num_w",
        ),
        (
            {"parts": MODEL | {"decoding on the same cores": 60.0}},
            r"cores that train \(40 % .*: take more cores",
        ),
        ({"parts": MODEL | {"rest": 60.0}}, r"beside its parts \(40 % .*: a larger stream.global_batch"),
        # The largest of two that are notable.
        ({"parts": MODEL | {"labels": 50.0, "update": 60.0}}, "the optimizer"),
        (
            {"parts": MODEL | {"labels": 30.0}, "overrides": ["train.engine.precision=bf16"]},
            "set prompter.precision=bf16",
        ),
        ({"parts": MODEL | {"update": 60.0}}, r"the optimizer \(40 % of the step\): set train.engine.zero_stage=1"),
        ({"parts": MODEL | {"update": 60.0}, "overrides": ["train.engine.zero_stage=1"]}, "makes fewer updates"),
        ({"parts": MODEL}, r"the model \(100 % of the step\): train.engine.precision=bf16"),
        ({"parts": MODEL, "overrides": ["train.engine.precision=bf16"]}, "train.engine.compile=true, or more GPUs"),
        ({"parts": MODEL, "overrides": ["train.engine.num_micro_batches=2"]}, "more GPUs need fewer micro-batches"),
        (
            {"parts": MODEL, "overrides": ["train.engine.activation_checkpointing=true"]},
            "turn activation_checkpointing",
        ),
    ],
)
def test_the_sentence_names_what_to_change(case, says):
    sentence = told(**case)
    assert sentence.startswith("bottleneck: ")
    assert re.search(says, sentence), sentence
