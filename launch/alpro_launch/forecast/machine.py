"""The machines of a forecast: figures of the table or measured ones, in the form in which a step needs them."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, log

from alpro_launch.forecast.collectives import FLOAT_BYTES, Links
from alpro_launch.forecast.devices import (
    CALL_S,
    COMPILED_BYTES,
    COMPILED_SHARE,
    CONTEXT_BYTES,
    HERE,
    LATENCY_S,
    SHARE_OF_LINK,
    SHARE_OF_MEMORY,
    SHARE_OF_PEAK,
    Device,
    Precision,
    is_of,
)
from alpro_launch.forecast.facts import Data
from alpro_launch.forecast.measured import Measured, MeasuredStep
from alpro_launch.forecast.parts import FRAME_SIZE
from alpro_launch.forecast.rates import AssumedRates, Rates
from alpro_stream.errors import ConfigError
from alpro_stream.run import RunConfig
from alpro_stream.train.engine import EngineConfig

_ADAMW_BYTES = 7 * FLOAT_BYTES
"""Of a parameter: reads it, its gradient and two moments, and writes all but the gradient."""
_GRADIENT_BYTES = {0: 7 * FLOAT_BYTES, 1: 8 * FLOAT_BYTES, 2: 8 * FLOAT_BYTES, 3: 6 * FLOAT_BYTES}
"""ASSUMED, of a parameter by ZeRO stage: copies into a bucket and back, division by the ranks, and the norm."""
CLIP_S = {"none": 2.0e-3, "published": 3.1e-3, "increasing": 3.4e-3}
"""Of a core for a clip of four stored frames: benchmarks/results/stream.json, on an AMD EPYC without AVX-512; a test
compares them. The last as much more than the second as in decode.json."""
VIDEO_S = 65e-3
"""Of a core for a clip out of a stored video of 640 x 360: the same file."""
IMAGE_TIMES = 1.9
"""An augmented image is a random resized crop, which takes so much longer than an augmented frame: decode.json."""
_CLIP_FRAMES, _CLIP_SIZE = 4, 224


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What every rank of a run works on.

    Attributes:
        name: for people.
        rates: of forward and backward.
        label_rates: of the prompter, which may compute in another number format.
        update_s: of AdamW, for a parameter.
        gradient_s: for a gradient on its way between ranks, beside the links; nothing where `update_s` has it.
        update_tensor_s: of AdamW, for a tensor.
        links: between ranks; None where they are not known.
        decode_s: seconds for a clip, of a core or, where it decodes, of the GPU; None where that is not known.
        rest_s: of a step, beside its parts.
        peak_per_s: floating point operations a second at best; None where that is not known.
        memory_bytes: of a GPU; None on a CPU, whose memory the ranks share.
        shares_cores: whether decoding and training are done by the same cores.
        cores_per_rank: with that, how many there are for a rank.
        save_per_s: bytes of a checkpoint a second; None where that is not known.
        assumed: what is taken without having been measured.
    """

    name: str
    rates: Rates
    label_rates: Rates
    update_s: float
    update_tensor_s: float
    links: Links | None
    decode_s: float | None
    gradient_s: float = 0.0
    rest_s: float = 0.0
    peak_per_s: float | None = None
    memory_bytes: float | None = None
    shares_cores: bool = False
    cores_per_rank: float = 1.0
    save_per_s: float | None = None
    assumed: Sequence[str] = ()


def gpu_machine(
    device: Device,
    config: RunConfig,
    measured: Measured,
    data: Data,
    micro_batch: float,
    *,
    share: float | None = None,
    network_per_s: float | None = None,
    link_per_s: float | None = None,
) -> Machine:
    """Machines with GPUs of the table.

    Args:
        device: of the table.
        config: of the run.
        measured: what replaces figures of the table.
        data: that the run reads.
        micro_batch: samples that a GPU computes at a time.
        share: of the peak that a whole step reaches, in place of what is measured or assumed.
        network_per_s: bytes a second of a node's network by its name, in place of the table's.
        link_per_s: of a GPU to the others of its node in one direction, likewise.

    Raises:
        ConfigError: the rates were measured on another device, or in another number format.
    """
    engine, assumed = config.train.engine, []
    if measured.machine and not is_of(device, list(measured.gpus)):
        raise ConfigError(
            f"the measured rates are from {measured.machine}, and the forecast is for {device.name} "
            f"({device.product}): measure there, leave the file out, or use --gpu {HERE}"
        )
    memory_per_s = measured.copy_per_s or SHARE_OF_MEMORY * device.memory_per_s
    if share is None and measured.steps:
        step = _nearest_step(measured.steps, engine, micro_batch)
        share = _share_of(step, device)
        assumed += _differences(step, engine, micro_batch)

    def rates(precision: Precision, is_compiled: bool) -> AssumedRates:
        peak, call_s = device.peak_per_s[precision], CALL_S * (COMPILED_SHARE if is_compiled else 1)
        if share is not None:
            return AssumedRates(peak, share, inf, call_s)
        return AssumedRates(peak, SHARE_OF_PEAK, memory_per_s / (COMPILED_BYTES if is_compiled else 1), call_s)

    label_rates = step_rates = rates(engine.precision, engine.compile)
    if share is None:
        assumed.append(
            f"matrix products reach {SHARE_OF_PEAK:g} of the peak in {engine.precision}, all else "
            f"{memory_per_s / 1e9:,.0f} GB/s of memory (--share-of-peak of a whole step); no step was measured"
        )
    assumed.append(f"starting an operation takes {1e6 * step_rates.call_s:.3g} us")
    if config.uses_pem and config.prompter is not None:
        label_rates = rates(config.prompter.precision, config.prompter.compile)
        assumed.append(f"the prompter reaches the same rates, in {config.prompter.precision}")
    if network_per_s is None:
        network_per_s = device.network_per_s
        of_a_node = f"{network_per_s / 1e9:g} GB/s to the others, as {device.instance} of Amazon EC2"
        assumed.append(f"a node has {of_a_node} (--network-gb-per-s)")
    if link_per_s is None:
        link_per_s = device.link_per_s
        to_others = f"{link_per_s / 1e9:g} GB/s to the others of its node ({device.link})"
        assumed.append(f"a GPU has {to_others} (--link-gb-per-s)")
    inside, between = SHARE_OF_LINK[device.link.partition(" ")[0]], SHARE_OF_LINK["network"]
    assumed.append(
        f"large collectives reach {inside:g} of the link in a node and {between:g} of the network, small ones start in "
        f"{1e6 * LATENCY_S:g} us"
    )
    assumed.append(f"the optimizer reads and writes {memory_per_s / 1e9:,.0f} GB/s of memory")
    assumed.append(f"CUDA takes {CONTEXT_BYTES / 1e9:g} GB of the memory for each process")
    return Machine(
        name=device.name,
        rates=step_rates,
        label_rates=label_rates,
        update_s=_ADAMW_BYTES / memory_per_s,
        gradient_s=_GRADIENT_BYTES[engine.zero_stage] / memory_per_s,
        update_tensor_s=0.0,
        links=Links(inside * link_per_s, between * network_per_s, LATENCY_S),
        decode_s=_decode_s(config, measured, data, assumed),
        rest_s=measured.rest_s or 0.0,
        peak_per_s=device.peak_per_s[engine.precision],
        memory_bytes=device.memory_bytes,
        save_per_s=measured.save_per_s,
        assumed=assumed,
    )


def _nearest_step(steps: Sequence[MeasuredStep], engine: EngineConfig, micro_batch: float) -> MeasuredStep:
    """Of the run's number format; compiled like it if there is such a one, and of the nearest batch."""
    fitting = [step for step in steps if step.precision == engine.precision]
    if not fitting:
        formats = " and ".join(sorted({step.precision for step in steps}))
        raise ConfigError(
            f"the step was measured in {formats}, and the run computes in {engine.precision}: measure with --precision "
            f"{engine.precision}"
        )
    return min(fitting, key=lambda step: (step.is_compiled != engine.compile, abs(log(step.batch / micro_batch))))


def _share_of(step: MeasuredStep, device: Device) -> float:
    """Of the peak, that a measured step reached."""
    peak = device.peak_per_s[step.precision]
    if step.flops_per_s > peak:
        raise ConfigError(
            f"the step was measured with {step.flops_per_s / 1e12:.4g} TFLOP/s, more than the {peak / 1e12:.4g} of "
            f"{device.name} in {step.precision}: it ran on something else"
        )
    return step.flops_per_s / peak


def _differences(step: MeasuredStep, engine: EngineConfig, micro_batch: float) -> list[str]:
    """Between the step that was measured and the run's; the share of the peak is taken all the same."""
    found = []
    if step.batch != micro_batch:
        found.append(f"batches of {micro_batch:g} reach the share of the peak that was measured with {step.batch}")
    if step.is_compiled != engine.compile:
        was = "compiled" if step.is_compiled else "not compiled"
        found.append(f"the step reaches the share of the peak that was measured {was} (train.engine.compile)")
    return found


def measured_machine(config: RunConfig, measured: Measured, num_ranks: int, data: Data) -> Machine:
    """The machine that was measured, or many like it.

    Args:
        config: of the run.
        measured: with rates of a machine.
        num_ranks: of a node.
        data: that the run reads.

    Raises:
        ConfigError: no rates of a machine, or those of a GPU, or in another number format than the run's; more ranks
            than it has cores.
    """
    if not measured.parts and measured.step_rates is None:
        what = "a GPU, whose name in the table is wanted" if measured.steps else "no machine"
        raise ConfigError(
            f"--gpu {HERE}: the measured rates are of {what}; give the results of `alpro bench forecast --json FILE`"
        )
    if num_ranks > measured.num_cores:
        raise ConfigError(
            f"{num_ranks} ranks of a node (--gpus) are more than the {measured.num_cores:g} cores of the machine that "
            "was measured: take more --nodes, each of which is such a machine"
        )
    _check_format(measured, config)
    assumed: list[str] = []
    if not measured.parts:
        assert measured.step_rates is not None
        assumed.append("AdamW reaches the bandwidth of other operations")
        return Machine(
            name=measured.machine,
            rates=measured.step_rates,
            label_rates=measured.step_rates,
            update_s=_ADAMW_BYTES / measured.step_rates.bytes_per_s,
            update_tensor_s=0.0,
            links=None,
            decode_s=_decode_s(config, measured, data, assumed),
            rest_s=measured.rest_s or 0.0,
            shares_cores=True,
            cores_per_rank=max(1.0, measured.num_cores / num_ranks),
            save_per_s=measured.save_per_s,
            assumed=assumed,
        )
    nearest = min(measured.parts, key=lambda number: abs(number - num_ranks))
    parts = measured.parts[nearest]
    if nearest != num_ranks:
        assumed.append(f"{num_ranks} ranks of a node have the rates that were measured with {nearest}")
    if measured.clip_s or data.stores_videos:
        decode_s = _decode_s(config, measured, data, assumed)
    else:
        of_augment = CLIP_S[config.stream.augment] / CLIP_S["none"]
        decode_s = parts.frame_s * of_augment * _frames(config, data) * _area(config, FRAME_SIZE)
        assumed.append(
            f"a sample of stored frames takes {1e3 * decode_s:.3g} ms of a core, from that of a frame of {FRAME_SIZE} "
            "pixels by the area of the crop (--measured with results of stream)"
        )
    width, widths = config.model.video.width, sorted(parts.rates.products)
    closest = min(max(width, widths[0]), widths[-1])  # As `rate_at` takes it.
    if closest != width:
        assumed.append(f"products {width} wide have the rate that was measured {closest} wide")
    links = parts.links or next((other.links for other in measured.parts.values() if other.links), None)
    return Machine(
        name=measured.machine,
        rates=parts.rates,
        label_rates=parts.rates,
        update_s=parts.update_s,
        update_tensor_s=parts.update_tensor_s,
        links=links,
        decode_s=decode_s,
        rest_s=parts.rest_s,
        shares_cores=True,
        cores_per_rank=max(1.0, measured.num_cores / num_ranks),
        save_per_s=measured.save_per_s,
        assumed=assumed,
    )


def _check_format(measured: Measured, config: RunConfig) -> None:
    """Refuses rates of another number format than that of the run or of its prompter."""
    was = measured.precision or "fp32"  # The parts of `bench forecast` are measured in it.
    formats = {"train.engine.precision": config.train.engine.precision}
    if config.uses_pem and config.prompter is not None:
        formats["prompter.precision"] = config.prompter.precision
    for key, wanted in formats.items():
        if wanted != was:
            raise ConfigError(
                f"the rates were measured in {was}, and the run computes in {wanted}: add {key}={was} to forecast that"
            )


def _decode_s(config: RunConfig, measured: Measured, data: Data, assumed: list[str]) -> float | None:
    """Seconds of a core or the GPU for a sample; of more frames in proportion. Adds to `assumed` what is not known.

    A crop of another size takes as much more as it has pixels: frames are stored at about the size of the crop.
    """
    if config.stream.decode.device == "mixed":
        augment, by_augment = config.stream.augment, measured.gpu_clip_s
        if not by_augment or data.stores_videos:
            return None
        nearest = augment if augment in by_augment else max(by_augment, key=lambda name: by_augment[name])
        if nearest != augment:
            assumed.append(f"a GPU decodes with augment={augment} as fast as was measured with {nearest}")
        return by_augment[nearest] * _frames(config, data) / _CLIP_FRAMES * _area(config, _CLIP_SIZE)
    if data.stores_videos:
        each, known, whole = measured.video_s or VIDEO_S, measured.video_s, "a clip out of a stored video"
    else:
        augment = config.stream.augment
        known = measured.clip_s.get(augment)
        still = IMAGE_TIMES if augment != "none" else 1.0
        frames = _frames(config, data, still) / _CLIP_FRAMES * _area(config, _CLIP_SIZE)
        each = (known or CLIP_S[augment]) * frames
        whole = "a sample of stored frames"
    if known is None:
        assumed.append(f"{whole} takes {1e3 * each:.3g} ms of a core (--measured with results of stream)")
    return each


def _area(config: RunConfig, measured_size: int) -> float:
    """Of a crop, over that of the one that was measured."""
    return float((config.model.video.image_size / measured_size) ** 2)


def _frames(config: RunConfig, data: Data, image: float = 1.0) -> float:
    """That are decoded of a sample on average; an image takes as long as `image` of them."""
    num_frames = config.model.video.num_frames
    return sum(share * (image if kind == "image" else num_frames) for kind, share in data.kinds.items())
