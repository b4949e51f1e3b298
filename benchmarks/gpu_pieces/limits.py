"""What the device itself does: matrix products and copies, which other figures are divided by."""

import statistics
from collections.abc import Sequence
from functools import partial

import torch

from alpro_stream.model.operations import peak_per_s
from benchmarks.gpu_pieces.piece import Parts, Setting
from benchmarks.harness import Measurement, Row
from benchmarks.timing import matrix_product_rate, repeat


def parts(setting: Setting) -> Parts:
    return {
        **{f"matrix product, {name}": partial(product, setting, name) for name in ("bf16", "fp32")},
        "copy on the device": partial(copy, setting, is_inside=True),
        "copy to the device": partial(copy, setting, is_inside=False),
    }


def product(setting: Setting, precision: str) -> Sequence[Row]:
    """A large one with PyTorch, over the number of the data sheet where that is known."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    size = 8192 if setting.is_cuda and not setting.is_quick else 256
    rates = [matrix_product_rate(size, dtype, setting.device, count=5) / 1e12 for _ in range(setting.repetitions(5))]
    peak = peak_per_s(torch.cuda.get_device_name(setting.device)) if setting.is_cuda and precision == "bf16" else None
    limit = peak / 1e12 if peak else None
    return [
        Row.of(
            f"matrix product, {precision}, {size}",
            Measurement(tuple(rates)),
            "TFLOP/s",
            limit,
            limit_of="data sheet" if limit else "",
        )
    ]


def copy(setting: Setting, is_inside: bool) -> Sequence[Row]:
    """Bytes of a copy inside the device, read and written counted; or of one from the host's pinned memory, once."""
    num_bytes = (1 << 20) if setting.is_quick else (1 << 30)
    source = torch.ones(num_bytes, dtype=torch.uint8, device=setting.device if is_inside else "cpu")
    if setting.is_cuda and not is_inside:
        source = source.pin_memory()
    target = torch.empty(num_bytes, dtype=torch.uint8, device=setting.device)
    seconds = repeat(lambda: target.copy_(source, non_blocking=True), 3 if setting.is_quick else 10)
    moved = (2 if is_inside else 1) * num_bytes / 1e9
    name = "copy on the device" if is_inside else "copy to the device"
    return [Row(name=name, value=moved / statistics.median(seconds), unit="GB/s")]
