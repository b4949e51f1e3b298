"""Results of benchmarks as a forecast reads them, and what it refuses."""

import json
from pathlib import Path

import pytest

from alpro_launch.forecast import measured
from alpro_launch.forecast.collectives import Links
from alpro_launch.forecast.devices import find_device
from alpro_launch.forecast.facts import Data
from alpro_launch.forecast.machine import CLIP_S, IMAGE_TIMES, VIDEO_S, gpu_machine, measured_machine
from alpro_launch.forecast.measured import Measured, read_measured
from alpro_launch.forecast.parts import FRAME_SIZE, Parts, parts_of, rows_of
from alpro_launch.forecast.rates import MeasuredRates
from alpro_launch.forecast.work import Work
from alpro_stream.config import load_config
from alpro_stream.errors import ConfigError
from alpro_stream.run import RunConfig

RESULTS = Path("benchmarks/results")
CPU = {"cpu": "a CPU", "num_cores": 2.0, "gpus": []}
GPU = {"cpu": "a CPU", "num_cores": 96.0, "gpus": [{"name": "NVIDIA A100-SXM4-80GB", "memory_gib": 79.3}]}
ONE = Parts(MeasuredRates({64: 2e10, 128: 4e10}, 5e9, 2e-5), 1e-9, 3e-6, 1e-4, 5e-4)
AS_DEFAULT = {"batch": 4, "precision": "fp32"}
DATA = Data(10.0, {"video": 1.0}, 500.0)
TWO = Parts(MeasuredRates({64: 1e10}, float("inf"), 0.0), 2e-9, 0.0, 2e-4, 0.0, Links(3e8, 3e8, 1e-4))


def as_text(benchmark, rows, machine=CPU, **content):
    return json.dumps({"benchmark": benchmark, "machine": machine, "content": content, "rows": rows})


def write(path, benchmark, rows, machine=CPU, **content):
    path.write_text(as_text(benchmark, rows, machine, **content))
    return path


def as_rows(parts):
    return [
        {"name": name, "value": value, "unit": unit}
        for num_ranks, one in parts.items()
        for name, value, unit in rows_of(one, num_ranks)
    ]


def step_rows(per_s=0.2, gflop=1045.577421824, **more):
    """As `benchmarks/step.py` writes them."""
    return [
        {"name": "samples", "value": per_s},
        {"name": "operations", "value": 128.0, "limit": 144.0},
        {"name": "operations of a sample", "value": gflop},
        *({"name": name, "value": value} for name, value in more.items()),
    ]


def turbo(milliseconds):
    """A row of the benchmark of decoders."""
    return {"name": "libjpeg-turbo", "value": 1.0, "details": {"CPU ms/clip": milliseconds}}


@pytest.fixture
def published(monkeypatch):
    """Counting the published model takes seconds."""
    work = Work(4 * 900e9, 30e9, 10_000)
    monkeypatch.setattr(measured, "_published_work", lambda batch: work * (batch / 4))
    return work


PUBLISHED_SIZE = "model.video.image_size=224"


def run(*overrides):
    return load_config(RunConfig, "configs/prompter/tiny.yaml", overrides)


def on(name, config, found=None, data=DATA, micro_batch=8.0, **given):
    """The machine of a device of the table."""
    return gpu_machine(find_device(name), config, found or Measured(), data, micro_batch, **given)


def test_parts_come_back_from_their_rows():
    back = parts_of([*as_rows({1: ONE, 2: TWO}), {"name": "2 ranks: pretrain, width 64", "value": 1.0}])
    assert back.keys() == {1, 2}
    for num_ranks, parts in ((1, ONE), (2, TWO)):
        found = back[num_ranks]
        assert found.rates.products == pytest.approx(parts.rates.products)
        assert (found.rates.bytes_per_s, found.rates.call_s) == pytest.approx(
            (parts.rates.bytes_per_s, parts.rates.call_s)
        )
        assert (found.update_s, found.update_tensor_s, found.frame_s, found.rest_s) == pytest.approx(
            (parts.update_s, parts.update_tensor_s, parts.frame_s, parts.rest_s)
        )
    assert back[1].links is None
    assert back[2].links.inside_per_s == pytest.approx(3e8)
    assert back[2].links.latency_s == pytest.approx(1e-4)


def test_the_machine_that_was_measured(tmp_path):
    found = read_measured([write(tmp_path / "forecast.json", "forecast", as_rows({1: ONE, 2: TWO}))])
    sizes = ["stream.augment=none", "model.video.width=64", f"model.video.image_size={FRAME_SIZE}"]
    one, two = (measured_machine(run(*sizes), found, num_ranks, DATA) for num_ranks in (1, 2))
    assert one.rates.seconds(Work(flops=2e10), 64) == pytest.approx(1.0)
    assert two.rates.seconds(Work(flops=2e10), 64) == pytest.approx(2.0)
    # Two frames of a clip of the tiny run.
    assert (one.decode_s, two.decode_s) == pytest.approx((2e-4, 4e-4))
    assert (one.cores_per_rank, two.cores_per_rank) == (2.0, 1.0)
    # One rank has no links of its own: those of two are taken for many such machines.
    assert one.links == two.links
    [decoding] = two.assumed
    assert decoding.startswith(
        f"a sample of stored frames takes 0.4 ms of a core, from that of a frame of {FRAME_SIZE}"
    )
    assert (one.name, one.memory_bytes, one.shares_cores) == ("2 cores (a CPU)", None, True)


def test_what_was_measured_otherwise_is_said(tmp_path):
    found = read_measured([write(tmp_path / "two.json", "forecast", as_rows({2: TWO}))])
    with pytest.raises(ConfigError, match=r"4 ranks of a node .* are more than the 2 cores"):
        measured_machine(run(), found, 4, DATA)
    assert (
        "1 ranks of a node have the rates that were measured with 2" in measured_machine(run(), found, 1, DATA).assumed
    )
    wide = measured_machine(run("model.video.width=768", "model.text.width=768"), found, 2, DATA)
    assert "products 768 wide have the rate that was measured 64 wide" in wide.assumed
    sizes = [f"model.video.image_size={FRAME_SIZE // 2}", "stream.augment=none"]
    assert measured_machine(run(*sizes), found, 2, DATA).decode_s == pytest.approx(4e-4 / 4)


@pytest.mark.parametrize(("part", "value"), [("product, width 64", 0.0), ("sums", 0.0), ("update", -5.0)])
def test_parts_that_cannot_be_are_refused(tmp_path, part, value):
    rows = [{**row, "value": value} if row["name"].endswith(part) else row for row in as_rows({2: TWO})]
    with pytest.raises(ConfigError, match=f"without a usable '{part}'"):
        read_measured([write(tmp_path / "forecast.json", "forecast", rows)])


def test_a_step_on_a_cpu_gives_its_rates(tmp_path, published):
    found = read_measured([write(tmp_path / "step.json", "step", step_rows(per_s=0.1), **AS_DEFAULT)])
    machine = measured_machine(run(), found, 1, DATA)
    # Four samples took 40 s, which the rates must give back.
    assert machine.rates.seconds(published, 768) == pytest.approx(40.0)
    assert machine.rates.products == {768: 144e9}
    assert machine.links is None


def test_a_step_on_a_gpu_replaces_the_assumed_share(tmp_path, published):
    content = {"batch": 8, "precision": "bf16"}
    found = read_measured([write(tmp_path / "step.json", "step", step_rows(per_s=100.0), GPU, **content)])
    config = run("train.engine.precision=bf16")
    machine = on("a100", config, found)
    # 900 GFLOP are executed for each of 100 samples.
    assert machine.rates.share == pytest.approx(90e12 / 312e12)
    assert machine.rates.seconds(Work(num_bytes=1e12), 768) == 0  # The share is that of a whole step.
    assert not any("of the peak" in text for text in machine.assumed)
    with pytest.raises(ConfigError, match=r"from 96 cores .*A100.*, and the forecast is for h100"):
        on("h100", config, found)
    with pytest.raises(ConfigError, match="measured in bf16, and the run computes in fp32"):
        on("a100", run(), found)
    with pytest.raises(ConfigError, match="a GPU, whose name in the table is wanted"):
        measured_machine(config, found, 1, DATA)


def gpu_results(path, rows, **more):
    """As `benchmarks/gpu.sh` writes them."""
    values = {"benchmark": "gpu", "machine": GPU, "rows": rows, "quick": False, **more}
    path.write_text(json.dumps(values))
    return path


GPU_ROWS = [
    *(
        {"name": f"step, {how}", "value": 1.0, "details": {"clips/s": per_s}}
        for how, per_s in {
            "bf16, batch 16": 80.0,
            "bf16, batch 64": 100.0,
            "bf16, batch 64, compiled": 150.0,
            "bf16, batch 64, activation checkpointing": 70.0,
            "fp32, batch 16": 10.0,
        }.items()
    ),
    {"name": "copy on the device", "value": 1500.0},
    {"name": "frames, DALI mixed", "value": 2000.0},
    {"name": "frames, DALI mixed, published augmentation", "value": 1000.0},
]


def test_results_of_a_gpu_give_the_share_of_the_nearest_step(tmp_path, published):
    found = read_measured([gpu_results(tmp_path / "gpu.json", GPU_ROWS)])

    def machine(micro_batch, *overrides):
        return on("a100", run("train.engine.precision=bf16", *overrides), found, micro_batch=micro_batch)

    def flops_per_s(machine):
        return machine.rates.share * machine.rates.peak_per_s

    # 900 GFLOP are executed for a sample.
    assert flops_per_s(machine(16.0)) == pytest.approx(80 * 900e9)
    assert flops_per_s(machine(100.0)) == pytest.approx(100 * 900e9)
    assert flops_per_s(machine(16.0, "train.engine.compile=true")) == pytest.approx(150 * 900e9)
    assert not any(text.startswith("batches of") for text in machine(16.0).assumed)
    compiled = machine(16.0, "train.engine.compile=true").assumed
    assert "batches of 16 reach the share of the peak that was measured with 64" in compiled
    assert machine(16.0).update_s == pytest.approx(7 * 4 / 1500e9)


def test_results_of_a_gpu_say_how_fast_it_decodes(tmp_path, published):
    found = read_measured([gpu_results(tmp_path / "gpu.json", GPU_ROWS)])
    mixed = ["train.engine.precision=bf16", "stream.decode.device=mixed", "stream.decode.backend=dali"]
    # Clips of two frames; four were measured.
    rates = {"none": 2000, "published": 1000, "increasing": 1000}
    for augment, rate in rates.items():
        machine = on("a100", run(*mixed, PUBLISHED_SIZE, f"stream.augment={augment}"), found)
        assert machine.decode_s == pytest.approx(2 / 4 / rate)
        assert any("measured with published" in text for text in machine.assumed) == (augment == "increasing")
    assert on("a100", run(*mixed)).decode_s is None


def test_of_two_steps_that_say_the_same_the_later_file_counts(tmp_path, published):
    row = {"name": "step, fp32, batch 8", "value": 1.0}
    files = [gpu_results(tmp_path / f"{per_s}.json", [{**row, "details": {"clips/s": per_s}}]) for per_s in (1.0, 2.0)]
    found = read_measured(files)
    assert on("a100", run(), found).rates.share == pytest.approx(2 * 900e9 / 19.5e12)
    assert [str(path) in text for path, (_, text) in zip(files, found.taken, strict=True)] == [True, True]


def test_results_of_a_gpu_without_a_step_name_what_measures_them(tmp_path):
    path = gpu_results(tmp_path / "gpu.json", [{"name": "copy on the device", "value": 1.0}])
    with pytest.raises(ConfigError, match=r"without a usable 'step': .*; run `bash benchmarks/gpu.sh` again"):
        read_measured([path])


def test_results_of_a_gpu_of_toy_size_are_refused(tmp_path):
    path = gpu_results(tmp_path / "gpu.json", GPU_ROWS, quick=True)
    with pytest.raises(ConfigError, match=r"gpu\.json was measured with --quick, at toy size"):
        read_measured([path])


def test_what_is_assumed_is_said():
    config = run("train.engine.precision=bf16")
    machine = on("a100", config)
    assert machine.rates.share == 0.6
    assert machine.assumed[0].startswith("matrix products reach 0.6 of the peak in bf16, all else 1,631 GB/s of memory")
    assert any("50 GB/s to the others, as p4de of Amazon EC2" in text for text in machine.assumed)
    chosen = on("a100", config, share=0.3, network_per_s=1e9, link_per_s=2e9)
    # Links do not reach what their names say, whoever says it.
    links = (chosen.links.inside_per_s, chosen.links.between_per_s)
    assert (chosen.rates.share, *links) == (0.3, 0.75 * 2e9, 0.75 * 1e9)
    flags = ("--share-of-peak", "--network", "--link")
    assert not any(flag in text for text in chosen.assumed for flag in flags)


def test_a_compiled_step_moves_fewer_bytes():
    eager, compiled = (on("a100", run(f"train.engine.compile={value}")) for value in ("false", "true"))
    moved = Work(num_bytes=1e12)
    assert compiled.rates.seconds(moved, 768) == pytest.approx(eager.rates.seconds(moved, 768) / 2)


def test_gpus_without_nvlink_reach_less_of_their_link():
    assert on("l4", run()).links.inside_per_s == pytest.approx(0.4 * 32e9)


def test_committed_results_say_how_fast_cores_decode_and_what_is_read(published):
    found = read_measured([RESULTS / "step.json", RESULTS / "stream.json", RESULTS / "end_to_end.json"])
    # What a forecast without results takes for other machines.
    assert found.clip_s == pytest.approx({name: CLIP_S[name] for name in found.clip_s}, rel=0.25)
    assert found.clip_s.keys() >= {"none", "published"}
    assert found.video_s == pytest.approx(VIDEO_S, rel=0.25)
    decoded = {row["name"]: row["details"] for row in json.loads((RESULTS / "decode.json").read_text())["rows"]}
    image_ms, clip_ms = (
        decoded[f"libjpeg-turbo, {name}"]["CPU ms/clip"] for name in ("random resized crops", "published augmentation")
    )
    assert image_ms / clip_ms == pytest.approx(IMAGE_TIMES, rel=0.25)
    assert found.clip_bytes == pytest.approx(63e3, rel=0.1)
    assert 0 < found.rest_s < 0.1
    assert len(found.taken) == 3
    machine = measured_machine(
        run("stream.augment=published", "model.video.num_frames=8", PUBLISHED_SIZE), found, 1, DATA
    )
    assert machine.decode_s == pytest.approx(2 * found.clip_s["published"])


def test_a_checkpoint_is_saved_at_the_slowest_rate_that_was_measured(tmp_path):
    rows = [
        {"name": "save, small", "value": 50.0},
        {"name": "save, large", "value": 20.0},
        {"name": "load", "value": 1},
    ]
    assert read_measured([write(tmp_path / "c.json", "checkpoint", rows)]).save_per_s == 20e6


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "is no JSON"),
        ("[1]", "holds no results"),
        ('{"benchmark": "step"}', "holds no results"),
        ('{"benchmark": "step", "rows": [1]}', "holds no results"),
        ('{"benchmark": "shard", "rows": []}', r"results of shard, .* those of forecast, .*step, .* do"),
        ('{"benchmark": "step", "rows": []}', r"holds no results \(machine: Field required\)"),
        ('{"benchmark": ["step"], "rows": []}', r"holds no results \(benchmark: Input should be a valid string\)"),
        (as_text("step", [], {**CPU, "gpus": None}), r"\(machine.gpus: "),
        (as_text("step", [], {**CPU, "gpus": ["A100"]}), r"\(machine.gpus.0: "),
        (as_text("step", [], {**CPU, "num_cores": 0}), r"\(machine.num_cores: "),
        (as_text("decode", [turbo("x")]), "rows.0.details.CPU ms/clip"),
        (
            as_text("decode", [turbo(float("nan"))]),
            "should be a finite number",
        ),
        (
            as_text("decode", [turbo(0)]),
            "without a usable 'libjpeg-turbo: CPU",
        ),
        (
            as_text("decode", [turbo(None)]),
            "without a usable 'libjpeg-turbo: ",
        ),
        (
            as_text("step", []),
            "results of step without a usable 'operations of",
        ),
        (
            as_text("step", step_rows()),
            "without a usable 'content: precision'",
        ),
        (as_text("forecast", []), "forecast without a usable 'parts'"),
        (as_text("checkpoint", []), "checkpoint without a usable 'save'"),
        (
            as_text("checkpoint", [{"name": "save, x", "value": 0}]),
            "checkpoint without a usable 'save, x'",
        ),
        (as_text("step", step_rows(gflop=3.0)), "measure it without --small"),
    ],
)
def test_what_says_nothing_is_refused(text, says, tmp_path):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=says) as refused:
        read_measured([path])
    assert str(path) in str(refused.value) or "--small" in says


def test_a_part_that_is_missing_is_named(tmp_path):
    rows = [row for row in as_rows({1: ONE}) if not row["name"].endswith("decoding")]
    with pytest.raises(ConfigError, match="without a usable 'decoding'"):
        read_measured([write(tmp_path / "forecast.json", "forecast", rows)])


def test_no_file_there(tmp_path):
    with pytest.raises(ConfigError, match=r"--measured .*none.json: No such file"):
        read_measured([tmp_path / "none.json"])


def test_rates_of_two_machines_are_refused(tmp_path, published):
    one = write(tmp_path / "one.json", "forecast", as_rows({1: ONE}))
    other = write(tmp_path / "other.json", "step", step_rows(), GPU, **AS_DEFAULT)
    with pytest.raises(ConfigError, match="rates of one forecast are from one machine"):
        read_measured([one, other])


def test_rates_of_float32_are_not_those_of_bf16(tmp_path):
    found = read_measured([write(tmp_path / "forecast.json", "forecast", as_rows({1: ONE}))])
    with pytest.raises(ConfigError, match="measured in fp32, and the run computes in bf16"):
        measured_machine(run("train.engine.precision=bf16"), found, 1, DATA)


def test_rates_of_a_step_are_of_its_number_format(tmp_path, published):
    found = read_measured([write(tmp_path / "step.json", "step", step_rows(), **AS_DEFAULT)])
    with pytest.raises(ConfigError, match=r"measured in fp32, and .* in bf16: add train\.engine\.precision=fp32"):
        measured_machine(run("train.engine.precision=bf16"), found, 1, DATA)
    pretrain = load_config(RunConfig, "configs/pretrain/tiny.yaml", ["prompter.precision=bf16"])
    with pytest.raises(ConfigError, match=r"add prompter\.precision=fp32 to forecast that"):
        measured_machine(pretrain, found, 1, DATA)


def test_more_than_the_peak_is_refused(tmp_path, published):
    content = {"batch": 4, "precision": "bf16"}
    found = read_measured([write(tmp_path / "step.json", "step", step_rows(per_s=500.0), GPU, **content)])
    with pytest.raises(ConfigError, match=r"450 TFLOP/s, more than the 312 of a100 in bf16"):
        on("a100", run("train.engine.precision=bf16"), found)


def test_the_prompter_computes_in_its_own_format():
    plain = load_config(RunConfig, "configs/pretrain/tiny.yaml", ["train.engine.precision=bf16"])
    machine = on("a100", plain)
    assert (machine.rates.peak_per_s, machine.label_rates.peak_per_s) == (312e12, 19.5e12)
    assert any("the prompter reaches the same rates, in fp32" in text for text in machine.assumed)
    options = ["train.engine.precision=bf16", "prompter.precision=bf16", "prompter.compile=true"]
    fast = load_config(RunConfig, "configs/pretrain/tiny.yaml", options)
    labels = on("a100", fast).label_rates
    assert labels.peak_per_s == 312e12
    assert labels.call_s == pytest.approx(machine.label_rates.call_s / 3)


def test_an_image_is_one_frame(tmp_path):
    found = read_measured([write(tmp_path / "decode.json", "decode", [turbo(1.0)])])
    mixed = Data(10.0, {"video": 0.75, "image": 0.25}, 500.0)
    overrides = ["model.video.num_frames=8", "stream.augment=none"]
    machine = on("a100", run(*overrides, PUBLISHED_SIZE), found, mixed)
    assert machine.decode_s == pytest.approx((0.75 * 8 + 0.25) / 4 * 1e-3)
    # Four times the pixels.
    assert on("a100", run(*overrides, "model.video.image_size=448"), found, mixed).decode_s == 4 * machine.decode_s
    # Not assumed of a size of its own, but of the same frames; images are random resized crops.
    augmented = on("a100", run(PUBLISHED_SIZE, "model.video.num_frames=8", "stream.augment=published"), found, mixed)
    assert augmented.decode_s == pytest.approx((0.75 * 8 + 0.25 * IMAGE_TIMES) / 4 * CLIP_S["published"])


def test_here_needs_rates_of_a_machine():
    with pytest.raises(ConfigError, match=r"--gpu here: the measured rates are of no machine; .* bench forecast"):
        measured_machine(run(), read_measured([RESULTS / "stream.json"]), 1, DATA)
