"""The DALI decoder; the only module of the library that imports `nvidia.dali`."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.dlpack import from_dlpack

from alpro_stream.errors import ConfigError
from alpro_stream.stream.decode import DecodeConfig, FrameRequest

try:
    from nvidia.dali import fn, pipeline_def, types
except ImportError as error:
    raise ConfigError(
        "NVIDIA DALI is not installed; install it with pip install 'alpro-stream[cuda13]' (or [cuda12]); either "
        "runs on a machine without a GPU"
    ) from error


class DaliDecoder:
    """One DALI pipeline that decodes only the wanted window of each frame, then resizes and mirrors it.

    It checks nothing: damaged bytes among several frames of a call may crash the process (DALI 2.4). Frames of which
    nothing is known go through `alpro_stream.stream.clips.ClipDecoder`.
    """

    def __init__(self, config: DecodeConfig, image_size: int, max_frames: int, device_id: int | None) -> None:
        self._build = partial(
            _frame_pipeline,
            config.device,
            image_size,
            batch_size=max_frames,
            num_threads=max(1, config.num_threads),
            device_id=device_id,
            prefetch_queue_depth=1,
        )
        self._pipeline = self._build()

    def decode(self, requests: Sequence[FrameRequest]) -> torch.Tensor:
        """See `FrameDecoder.decode`."""
        self._pipeline.feed_input("jpegs", [np.frombuffer(request.jpeg, np.uint8) for request in requests])
        self._pipeline.feed_input("anchors", [np.asarray(request.window[:2], np.float32) for request in requests])
        self._pipeline.feed_input("shapes", [np.asarray(request.window[2:], np.float32) for request in requests])
        self._pipeline.feed_input("flips", [np.asarray(request.flip, np.int32) for request in requests])
        try:
            (frames,) = self._pipeline.run()
        except RuntimeError as error:
            # DALI declares a pipeline invalid once an operator failed in it.
            self._pipeline = self._build()
            raise ValueError(_cause(str(error))) from error
        # Copied: DALI reuses the memory of its outputs at the next run.
        tensor: torch.Tensor = from_dlpack(frames.as_tensor()).clone()
        return tensor


def _cause(report: str) -> str:
    """What went wrong, out of DALI's report of where in the pipeline it did."""
    cause = report.partition("encountered:")[2] or report
    return cause.partition("C++ context:")[0].replace("Current pipeline object is no longer valid.", "").strip(" :[\n")


@pipeline_def  # type: ignore[untyped-decorator]
def _frame_pipeline(device: str, image_size: int) -> Any:
    jpegs = fn.external_source(name="jpegs", dtype=types.UINT8, ndim=1)
    anchors = fn.external_source(name="anchors", dtype=types.FLOAT, ndim=1)
    shapes = fn.external_source(name="shapes", dtype=types.FLOAT, ndim=1)
    flips = fn.external_source(name="flips", dtype=types.INT32, ndim=0)
    frames = fn.decoders.image_slice(
        jpegs,
        anchors,
        shapes,
        axis_names="WH",
        normalized_anchor=True,
        normalized_shape=True,
        device=device,
        output_type=types.RGB,
    )
    frames = fn.resize(frames, size=[image_size, image_size], interp_type=types.INTERP_LINEAR, antialias=True)
    return fn.flip(frames, horizontal=flips)
