"""The machines of a forecast: figures of the table or measured ones, in the form in which a step needs them."""

from collections.abc import Sequence
from dataclasses import dataclass

from alpro_launch.forecast.collectives import FLOAT_BYTES, Links
from alpro_launch.forecast.devices import (
    CALL_S,
    COMPILED_SHARE,
    HERE,
    LATENCY_S,
    SHARE_OF_LINK,
    SHARE_OF_MEMORY,
    SHARE_OF_PEAK,
    Device,
    is_of,
)
from alpro_launch.forecast.measured import Measured
from alpro_launch.forecast.rates import AssumedRates, MeasuredRates, Rates
from alpro_stream.errors import ConfigError
from alpro_stream.run import RunConfig

_ADAMW_BYTES = 7 * FLOAT_BYTES
"""Of a parameter: reads it, its gradient and two moments, and writes all but the gradient."""
_CLIP_S = {"none": 1.3e-3, "published": 2.0e-3, "increasing": 2.0e-3}
"""Of a core for a clip of four stored frames: benchmarks/results/stream.json, on an AMD EPYC."""
_VIDEO_S = 41e-3
"""Of a core for a clip out of a stored video of 640 x 360: the same file."""
_CLIP_FRAMES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What every rank of a run works on.

    Attributes:
        name: for people.
        rates: of forward, backward and labels.
        update_s: of AdamW, for a parameter.
        update_tensor_s: of AdamW, for a tensor.
        links: between ranks; None where they are not known.
        decode_s: seconds of a core for a clip; None where GPUs decode, at a rate that is not known.
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
    update_s: float
    update_tensor_s: float
    links: Links | None
    decode_s: float | None
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
    *,
    stores_videos: bool = False,
    share: float | None = None,
    network_per_s: float | None = None,
) -> Machine:
    """Machines with GPUs of the table.

    Args:
        device: of the table.
        config: of the run.
        measured: what replaces figures of the table.
        stores_videos: whether whole videos are decoded.
        share: of the peak, in place of the assumed one.
        network_per_s: of a node, in place of the table's.

    Raises:
        ConfigError: the rates were measured on another device, or in another number format.
    """
    engine, assumed = config.train.engine, []
    if measured.machine and not is_of(device, list(measured.gpus)):
        raise ConfigError(
            f"the measured rates are from {measured.machine}, and the forecast is for {device.name} "
            f"({device.product}): measure there, leave the file out, or use --gpu {HERE}"
        )
    peak = device.peak_per_s[engine.precision]
    if share is None and measured.flops_per_s is not None:
        if measured.precision != engine.precision:
            raise ConfigError(
                f"the step was measured in {measured.precision}, and the run computes in {engine.precision}: measure "
                f"with --precision {engine.precision}"
            )
        share = measured.flops_per_s / peak
    elif share is None:
        share = SHARE_OF_PEAK
        assumed.append(f"executed operations reach {share:g} of the peak in {engine.precision} (--share-of-peak)")
    call_s = CALL_S * (COMPILED_SHARE if engine.compile else 1)
    assumed.append(f"starting an operation takes {1e6 * call_s:.3g} us")
    network = device.network_per_s * SHARE_OF_LINK if network_per_s is None else network_per_s
    if network_per_s is None:
        assumed.append(
            f"a node has {device.network_per_s / 1e9:g} GB/s to the others, as {device.sources['network_per_s']} "
            "(--network-gb-per-s)"
        )
    assumed.append(f"large collectives reach {SHARE_OF_LINK:g} of a link, small ones start in {1e6 * LATENCY_S:g} us")
    return Machine(
        name=device.name,
        rates=AssumedRates(peak, share, call_s),
        update_s=_ADAMW_BYTES / (SHARE_OF_MEMORY * device.memory_per_s),
        update_tensor_s=0.0,
        links=Links(SHARE_OF_LINK * device.link_per_s, network, LATENCY_S),
        decode_s=_decode_s(config, measured, stores_videos),
        rest_s=measured.rest_s or 0.0,
        peak_per_s=peak,
        memory_bytes=device.memory_bytes,
        save_per_s=measured.save_per_s,
        assumed=assumed,
    )


def measured_machine(config: RunConfig, measured: Measured, num_ranks: int, stores_videos: bool = False) -> Machine:
    """The machine that was measured, or many like it.

    Args:
        config: of the run.
        measured: with rates of a machine.
        num_ranks: of a node.
        stores_videos: whether whole videos are decoded.

    Raises:
        ConfigError: no rates of a machine, or none of a GPU that is not in the table.
    """
    if not measured.parts and measured.step_rates is None:
        what = "a GPU, whose name in the table is wanted" if measured.flops_per_s else "no machine"
        raise ConfigError(
            f"--gpu {HERE}: the measured rates are of {what}; give the results of `alpro bench forecast --json FILE`"
        )
    decode_s = _decode_s(config, measured, stores_videos)
    if not measured.parts:
        assert measured.step_rates is not None
        return Machine(
            name=measured.machine,
            rates=measured.step_rates,
            update_s=_ADAMW_BYTES / measured.step_rates.bytes_per_s,
            update_tensor_s=0.0,
            links=None,
            decode_s=decode_s,
            rest_s=measured.rest_s or 0.0,
            shares_cores=True,
            cores_per_rank=max(1.0, measured.num_cores / num_ranks),
            save_per_s=measured.save_per_s,
            assumed=["AdamW reaches the bandwidth of other operations"],
        )
    nearest = min(measured.parts, key=lambda number: abs(number - num_ranks))
    parts = measured.parts[nearest]
    assumed = []
    if nearest != num_ranks:
        assumed.append(f"{num_ranks} ranks of a node have the rates that were measured with {nearest}")
    if not measured.clip_s and not stores_videos:
        decode_s = parts.frame_s * config.model.video.num_frames
    links = parts.links or next((other.links for other in measured.parts.values() if other.links), None)
    return Machine(
        name=measured.machine,
        rates=_for_format(parts.rates, config),
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


def _for_format(rates: MeasuredRates, config: RunConfig) -> MeasuredRates:
    if config.train.engine.precision == "bf16":
        raise ConfigError(
            "the rates were measured in fp32, and the run computes in bf16: add train.engine.precision=fp32"
        )
    return rates


def _decode_s(config: RunConfig, measured: Measured, stores_videos: bool) -> float | None:
    """Seconds of a core for a clip; of more frames in proportion."""
    if config.stream.decode.device == "mixed":
        return None
    if stores_videos:
        return measured.video_s or _VIDEO_S
    augment = config.stream.augment
    each = measured.clip_s.get(augment) or _CLIP_S[augment]
    return each * config.model.video.num_frames / _CLIP_FRAMES
