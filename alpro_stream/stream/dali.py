"""Stored frames and videos by DALI, on a GPU or a CPU; the only module of the library that imports `nvidia.dali`."""

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from alpro_stream.errors import ConfigError
from alpro_stream.stream.augment import BLUR, GREY, LUMA, RECIPES, AppliedOperation, mirror, warp_matrix
from alpro_stream.stream.decode import DecodeConfig, FrameDecoder, FrameError, FrameRequest, VideoRequest
from alpro_stream.stream.nvdec import VideoFacts, nvdec_refusal
from alpro_stream.stream.reused import ReusedMemory
from alpro_stream.stream.view import WHOLE_FRAME, View, pixel_window, show

try:
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali import math as dali_math
except ImportError as error:
    raise ConfigError(
        "NVIDIA DALI is not installed; install it with pip install 'alpro-stream[cuda13]' (or [cuda12]); either "
        "runs on a machine without a GPU"
    ) from error

# A call is cut into runs of so many frames: one is copied out while DALI decodes another, and the next one waits. Each
# run costs DALI half a millisecond, so that many short ones are slower than few long ones.
_MAX_RUN = 64
_RUNS_AHEAD = 3
# Most pixels of the stored frames of a run, one frame is always let through: those of the largest plain JPEG.
_MAX_RUN_PIXELS = 36_000_000
# Videos: DALI (2.4) gives each one being decoded some 20 frames of RGB for the reordering of frames, and keeps a NVDEC
# decoder with as many surfaces for each size that it met.
_MAX_VIDEO_RUN = 4
_MAX_VIDEO_RUN_PIXELS = 100_000_000
_NUM_SURFACES = 20
_JPEG_PADDING_BYTES = 1 << 20

_NUM_SLOTS = max(recipe.count for recipe in RECIPES.values())
_STAY, _WARP, _SCALE, _CONTRAST, _SHARPEN = range(5)
_CODES = {"brightness": _SCALE, "contrast": _CONTRAST, "sharpness": _SHARPEN}
_INTERPOLATIONS = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}

Run = Sequence[int]
"""Numbers of requests that DALI gets at once."""


class Kind(NamedTuple):
    """What a pipeline does after it cut the windows: each operator costs, even where it changes nothing."""

    resizes: bool
    augments: bool
    mirrors: bool


class DaliDecoder(FrameDecoder):
    """One DALI pipeline for each kind of view; of a frame it makes only the window that is seen.

    Damaged bytes among several frames of a call may crash the process (DALI 2.4), so headers are tried elsewhere first.
    On a GPU the pixels are written on PyTorch's current stream, and augmented by DALI. On a CPU, where DALI takes seven
    times as long for that, the frames are augmented as those of other decoders.

    Args:
        config: where, and with how many threads.
        image_size: side of the pixels, as in `build_decoder`.
        max_frames: most frames of one call that are worth room.
        device_id: the GPU, or None on a CPU.
    """

    needs_trial = True

    def __init__(self, config: DecodeConfig, image_size: int, max_frames: int, device_id: int | None) -> None:
        self.device = _device(config, device_id)
        self._image_size = image_size
        self._run_size = min(max_frames, _MAX_RUN)
        self._does_all = self.device.type == "cuda"
        self._num_threads = max(1, config.num_workers)
        self._threads = ThreadPoolExecutor(self._num_threads, thread_name_prefix="alpro-dali")
        self._memory = ReusedMemory(shared=False)
        options = _options(config, device_id, self._run_size)
        self._pipelines = _Pipelines(
            lambda kind: _frame_pipeline(self.device.type, image_size, kind, **options), self.device
        )

    def empty(self, shape: Sequence[int]) -> Tensor:
        """See `FrameDecoder.empty`."""
        return super().empty(shape) if self._does_all else self._memory.empty(shape)

    def start(
        self, requests: Sequence[FrameRequest], out_NHWC: Tensor, rows: Sequence[int]
    ) -> Callable[[], dict[int, FrameError]]:
        """See `FrameDecoder.start`."""
        windows = np.array([pixel_window(one.view.window, one.width, one.height) for one in requests], np.int32)
        views = [request.view for request in requests]
        pixels = [one.width * one.height for one in requests]
        works = []
        for kind, numbers in _by_kind(views, windows, self._image_size, self._does_all).items():

            def feed(pipeline: Any, run: Run, kind: Kind = kind) -> None:
                jpegs = [np.frombuffer(requests[number].jpeg, np.uint8) for number in run]
                inputs = _view_inputs([views[number] for number in run], windows[run], self._image_size, kind)
                _feed(pipeline, {"jpegs": jpegs} | inputs)

            def take(frames: Any, run: Run, kind: Kind = kind) -> None:
                self._copy(frames, [views[number] for number in run], out_NHWC, [rows[number] for number in run], kind)

            runs = _runs(numbers, pixels, self._run_size, _MAX_RUN_PIXELS)
            works.append(self._pipelines.begin(kind, runs, feed, take))

        def finish() -> dict[int, FrameError]:
            found = {number: why for work in works for number, why in self._pipelines.finish(work).items()}
            return {number: FrameError("decode", why) for number, why in found.items()}

        return finish

    def close(self) -> None:
        """Ends the pipelines and all threads, and frees what they hold."""
        self._pipelines.close()
        self._threads.shutdown()

    def _copy(self, frames: Any, views: Sequence[View], out_NHWC: Tensor, rows: Sequence[int], kind: Kind) -> None:
        if self.device.type == "cuda":
            _copy_rows(frames, out_NHWC, rows)
            return
        pixels_NHWC, frames_NHWC = out_NHWC.numpy(), np.asarray(frames.as_tensor())

        def copy(first: int) -> None:
            for number in range(first, len(rows), self._num_threads):
                frame_HWC, view, out_HWC = frames_NHWC[number], views[number], pixels_NHWC[rows[number]]
                if not kind.augments and _is_augmented(view):
                    show(frame_HWC, replace(view, window=WHOLE_FRAME), out_HWC)
                elif view.flip and not kind.mirrors:
                    # Mirrored while it is copied: cheaper than an operator and a copy.
                    mirror(frame_HWC, out_HWC)
                else:
                    np.copyto(out_HWC, frame_HWC)

        list(self._threads.map(copy, range(self._num_threads)))


class DaliVideoDecoder:
    """Decodes stored videos by NVDEC; on a CPU, for tests, only VP8, VP9 and MJPEG.

    Args:
        config: where, and with how many threads.
        image_size: side of the pixels handed out.
        device_id: the GPU, or None on a CPU.
        max_surfaces_mb: most device memory that NVDEC's surfaces are to take, in MiB; one size of video is always
            let through.
    """

    def __init__(
        self, config: DecodeConfig, image_size: int, device_id: int | None, max_surfaces_mb: float = 2048
    ) -> None:
        self._max_surfaces_mb = max_surfaces_mb
        self.device = _device(config, device_id)
        self._image_size = image_size
        self._sizes: set[tuple[str, int, int]] = set()
        options = _options(config, device_id, _MAX_VIDEO_RUN)
        self._pipelines = _Pipelines(
            lambda kind: _video_pipeline(self.device.type, image_size, kind, **options), self.device
        )

    def decode(self, requests: Sequence[VideoRequest], out_BTHWC: Tensor, rows: Sequence[int]) -> dict[int, str]:
        """See `VideoDecoder.decode`; on a GPU on PyTorch's current stream."""
        errors = {number: reason for number, one in enumerate(requests) if (reason := nvdec_refusal(one.located.facts))}
        stored = [(one.located.width, one.located.height) for one in requests]
        windows = np.array(
            [pixel_window(one.view.window, *size) for one, size in zip(requests, stored, strict=True)], np.int32
        )
        sizes = np.array([size[::-1] for size in stored], np.float32)
        views = [request.view for request in requests]
        for kind, numbers in _by_kind(views, windows, self._image_size, does_all=True).items():

            def feed(pipeline: Any, run: Run, kind: Kind = kind) -> None:
                videos = [np.frombuffer(requests[number].data, np.uint8) for number in run]
                indices = np.array([requests[number].located.frames for number in run], np.int32)
                inputs = _view_inputs([views[number] for number in run], windows[run], self._image_size, kind)
                _feed(pipeline, {"videos": videos, "frames": indices, "sizes": sizes[run]} | inputs)

            def take(clips: Any, run: Run) -> None:
                _copy_rows(clips, out_BTHWC, [rows[number] for number in run])

            pixels = [
                (len(one.located.frames) + _NUM_SURFACES) * one.located.facts.width * one.located.facts.height
                for one in requests
            ]
            wanted = [number for number in numbers if number not in errors]
            runs = list(_runs(wanted, pixels, _MAX_VIDEO_RUN, _MAX_VIDEO_RUN_PIXELS))
            for run in runs:
                self._make_room([requests[number].located.facts for number in run])
                errors |= self._pipelines.finish(self._pipelines.begin(kind, [run], feed, take))
        return errors

    def close(self) -> None:
        """Ends the pipelines and their threads, and frees what they hold."""
        self._pipelines.close()

    def _make_room(self, facts: Sequence[VideoFacts]) -> None:
        """Drops the pipelines, and NVDEC's decoders with them, where those for more sizes would take too much."""
        new = {(one.codec, one.width, one.height) for one in facts}
        if sum(surfaces_mb(width, height) for _, width, height in self._sizes | new) > self._max_surfaces_mb:
            self._pipelines.close()
            self._sizes.clear()
        self._sizes |= new


def surfaces_mb(width: int, height: int) -> float:
    """Device memory of a NVDEC decoder that is kept for videos of one size, in MiB; pixels in, 1.5 bytes each."""
    return _NUM_SURFACES * 1.5 * width * height / 2**20


def device_memory_mb(image_size: int, max_frames: int, frame_pixels: int, num_threads: int) -> int:
    """Most device memory that a `DaliDecoder` on a GPU takes beside CUDA's own, in MiB.

    Args:
        image_size: side of the pixels handed out.
        max_frames: most frames of one call.
        frame_pixels: of the largest stored frame.
        num_threads: of the decoder.
    """
    run_size = min(max_frames, _MAX_RUN)
    run_pixels = max(frame_pixels, min(run_size * frame_pixels, _MAX_RUN_PIXELS))
    shown = 3 * run_size * image_size**2
    # Bytes: each stored frame twice (whole and its window); what is shown once more for each operator, for some of them
    # as floats, and the rows of a resize before its columns are done, as floats.
    buffers = 2 * 3 * run_pixels + shown * (3 + _NUM_SLOTS * 10) + 4 * 3 * run_pixels
    jpeg = num_threads * (_JPEG_PADDING_BYTES + 6 * frame_pixels)
    num_pipelines = 4  # resizing or not, augmenting or not
    return -(-num_pipelines * (2 * buffers + jpeg) // 2**20)


@dataclass(slots=True, eq=False)
class _Work:
    """Runs of one call for pipelines of one kind.

    Attributes:
        kind: of the pipelines.
        feed: gives a run's inputs to a pipeline.
        take: takes what a pipeline made of a run.
        num_runs: that are not done.
        errors: what is wrong with requests, by number.
    """

    kind: Kind
    feed: Callable[[Any, Run], None]
    take: Callable[[Any, Run], None]
    num_runs: int = 0
    errors: dict[int, str] = field(default_factory=dict)


class _Pipelines:
    """The pipelines of a decoder, built when they are needed, and how they are worked with.

    A pipeline gives what it made in the order in which it was asked for it, and some runs are always scheduled ahead,
    those of a later call too: the time between two calls costs nothing.
    """

    def __init__(self, build: Callable[[Kind], Any], device: torch.device) -> None:
        self._build = build
        self._device = device
        self._built: dict[Kind, Any] = {}
        # Of each kind, oldest first: the runs that a pipeline has, and those behind them.
        self._scheduled: defaultdict[Kind, deque[tuple[_Work, Run]]] = defaultdict(deque)
        self._waiting: defaultdict[Kind, deque[tuple[_Work, Run]]] = defaultdict(deque)

    def begin(
        self, kind: Kind, runs: Iterable[Run], feed: Callable[[Any, Run], None], take: Callable[[Any, Run], None]
    ) -> _Work:
        """Begins with the runs; `finish` is to be called for the work."""
        work = _Work(kind, feed, take)
        for run in runs:
            self._waiting[kind].append((work, run))
            work.num_runs += 1
        self._schedule(kind)
        return work

    def finish(self, work: _Work) -> dict[int, str]:
        """Takes what was made of the runs, and of those in front of them; what is wrong with which request."""
        while work.num_runs:
            self._schedule(work.kind)
            self._take_oldest(work.kind)
        self._schedule(work.kind)
        return work.errors

    def close(self) -> None:
        """Drops the pipelines with all that they have."""
        for kind in list(self._built):
            self._drop(kind)

    def _schedule(self, kind: Kind) -> None:
        scheduled, waiting = self._scheduled[kind], self._waiting[kind]
        while waiting and len(scheduled) < _RUNS_AHEAD:
            if kind not in self._built:
                self._built[kind] = self._build(kind)
            work, run = waiting.popleft()
            try:
                work.feed(self._built[kind], run)
                self._built[kind].schedule_run()
            except BaseException:
                self._drop(kind)  # it may have some of the inputs
                waiting.appendleft((work, run))
                raise
            scheduled.append((work, run))

    def _take_oldest(self, kind: Kind) -> None:
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        pipeline = self._built[kind]
        work, run = self._scheduled[kind].popleft()
        try:
            (shown,) = pipeline.share_outputs(cuda_stream=stream)
        except RuntimeError as error:
            # DALI refuses a run as a whole and declares the pipeline invalid: one by one it is seen which it was.
            self._drop(kind)
            if len(run) == 1:
                work.errors[run[0]] = _cause(str(error))
                work.num_runs -= 1
            else:
                self._waiting[kind].extendleft((work, [number]) for number in reversed(run))
                work.num_runs += len(run) - 1
            return
        try:
            work.take(shown, run)
        except BaseException:
            self._scheduled[kind].appendleft((work, run))
            self._drop(kind)
            raise
        del shown  # its memory goes back to DALI
        pipeline.release_outputs()
        work.num_runs -= 1

    def _drop(self, kind: Kind) -> None:
        """Ends a pipeline; the runs that it had are to be scheduled again."""
        self._built.pop(kind, None)
        self._waiting[kind].extendleft(reversed(self._scheduled[kind]))
        self._scheduled[kind].clear()


def _device(config: DecodeConfig, device_id: int | None) -> torch.device:
    return torch.device(f"cuda:{device_id}" if config.device == "mixed" else "cpu")


def _options(config: DecodeConfig, device_id: int | None, batch_size: int) -> dict[str, Any]:
    return {
        "batch_size": batch_size,
        "num_threads": max(1, config.num_workers),
        "device_id": device_id if config.device == "mixed" else None,
        # One: runs that are ahead wait with their inputs, without buffers for what becomes of them.
        "prefetch_queue_depth": 1,
        "exec_dynamic": True,
    }


def _by_kind(
    views: Sequence[View], windows: NDArray[np.int32], image_size: int, does_all: bool
) -> dict[Kind, list[int]]:
    """Numbers of the requests that one pipeline can do; `does_all` when it also mirrors and augments."""
    numbers: dict[Kind, list[int]] = {}
    for number, view in enumerate(views):
        resizes = tuple(windows[number, 2:]) != (image_size, image_size)
        kind = Kind(resizes, augments=does_all and _is_augmented(view), mirrors=does_all)
        numbers.setdefault(kind, []).append(number)
    return numbers


def _runs(numbers: Sequence[int], pixels: Sequence[int], max_length: int, max_pixels: int) -> Iterator[Run]:
    run: list[int] = []
    for number in numbers:
        if run and (len(run) == max_length or sum(pixels[other] for other in run) + pixels[number] > max_pixels):
            yield run
            run = []
        run.append(number)
    if run:
        yield run


def _copy_rows(shown: Any, out: Tensor, rows: Sequence[int]) -> None:
    pixels = from_dlpack(shown.as_tensor())
    if rows[-1] - rows[0] == len(rows) - 1:
        out[rows[0] : rows[-1] + 1] = pixels
    else:
        out[torch.tensor(rows, device=out.device)] = pixels


def _is_augmented(view: View) -> bool:
    """Whether an operation of the view changes pixels."""
    return any(_code_of(operation) != _STAY for operation in view.operations)


def _code_of(applied: AppliedOperation) -> int:
    operation, argument = applied
    if operation in _CODES:
        return _STAY if argument == 1 else _CODES[operation]
    return _STAY if operation == "identity" else _WARP


def _cause(report: str) -> str:
    """What went wrong, out of DALI's report of where in the pipeline it did."""
    cause = report.partition("encountered:")[2] or report
    return cause.partition("C++ context:")[0].replace("Current pipeline object is no longer valid.", "").strip(" :[\n")


def _feed(pipeline: Any, inputs: Mapping[str, Any]) -> None:
    for name, values in inputs.items():
        pipeline.feed_input(name, values)


def _view_inputs(
    views: Sequence[View], windows: NDArray[np.int32], image_size: int, kind: Kind
) -> dict[str, NDArray[Any]]:
    """Inputs of the operators after the decoder, a row for each view."""
    inputs: dict[str, NDArray[Any]] = {
        "anchors": np.ascontiguousarray(windows[:, :2]),
        "shapes": np.ascontiguousarray(windows[:, 2:]),
    }
    if kind.mirrors:
        inputs["flips"] = np.array([view.flip for view in views], bool)
    if kind.resizes:
        inputs["interpolations"] = np.array([int(_INTERPOLATIONS[view.interpolation]) for view in views], np.int32)
    if kind.augments:
        for slot in range(_NUM_SLOTS):
            codes, matrices = np.zeros(len(views), np.int32), np.zeros((len(views), 2, 3), np.float32)
            factors = np.ones((len(views), 1), np.float32)
            for row, view in enumerate(views):
                if slot < len(view.operations):
                    operation, argument = view.operations[slot]
                    codes[row] = _code_of(view.operations[slot])
                    if codes[row] == _WARP:
                        matrices[row] = _corner_matrix(warp_matrix(operation, argument, image_size, image_size))
                    factors[row] = argument
            inputs |= {f"codes{slot}": codes, f"matrices{slot}": matrices, f"factors{slot}": factors}
    return inputs


def _corner_matrix(matrix: NDArray[np.float64] | None) -> NDArray[np.float64]:
    """DALI counts from the corner of the first pixel, `warp_matrix` from its centre."""
    assert matrix is not None
    corner = matrix.copy()
    corner[:, 2] += 0.5 - matrix[:, :2] @ (0.5, 0.5)
    return corner


@pipeline_def(enable_conditionals=True)  # type: ignore[untyped-decorator]
def _frame_pipeline(device: str, image_size: int, kind: Kind) -> Any:
    frames = fn.decoders.image_slice(
        # On a CPU the bytes are not copied: what feeds a run holds its requests until the run is done.
        fn.external_source(name="jpegs", dtype=types.UINT8, ndim=1, no_copy=device == "cpu"),
        fn.external_source(name="anchors", dtype=types.INT32, ndim=1),
        fn.external_source(name="shapes", dtype=types.INT32, ndim=1),
        axis_names="WH",
        device="mixed" if device == "cuda" else "cpu",
        output_type=types.RGB,
        adjust_orientation=False,
        # As libjpeg-turbo does by default, and as DALI's own CPU path does.
        jpeg_fancy_upsampling=True,
        device_memory_padding=_JPEG_PADDING_BYTES,
        host_memory_padding=_JPEG_PADDING_BYTES,
        affine=False,
    )
    return _shown(frames, device, image_size, kind)


@pipeline_def(enable_conditionals=True)  # type: ignore[untyped-decorator]
def _video_pipeline(device: str, image_size: int, kind: Kind) -> Any:
    clips = fn.decoders.video(
        fn.external_source(name="videos", dtype=types.UINT8, ndim=1),
        frames=fn.external_source(name="frames", dtype=types.INT32, ndim=1),
        device="mixed" if device == "cuda" else "cpu",
        pad_mode="none",
        affine=False,
    )
    sizes = fn.external_source(name="sizes", dtype=types.FLOAT, ndim=1)
    clips = fn.resize(clips, size=sizes, interp_type=types.INTERP_CUBIC, antialias=True)
    clips = fn.slice(
        clips,
        fn.external_source(name="anchors", dtype=types.INT32, ndim=1),
        fn.external_source(name="shapes", dtype=types.INT32, ndim=1),
        axis_names="WH",
    )
    return _shown(clips, device, image_size, kind)


def _shown(frames: Any, device: str, image_size: int, kind: Kind) -> Any:
    """What views show of their windows; frames or whole clips, (H, W, C) or (F, H, W, C)."""
    if kind.resizes:
        interpolations = fn.external_source(name="interpolations", dtype=types.INT32, ndim=0)
        interpolations = fn.reinterpret(interpolations, dtype=types.INTERP_TYPE)
        frames = fn.resize(frames, size=[image_size, image_size], interp_type=interpolations, antialias=True)
    if kind.mirrors:
        flips = fn.external_source(name="flips", dtype=types.BOOL, ndim=0)
        if flips:
            frames = fn.flip(frames, horizontal=1)
    if kind.augments:
        for slot in range(_NUM_SLOTS):
            frames = _augmented(frames, slot, device, image_size)
    return frames


def _augmented(frames: Any, slot: int, device: str, image_size: int) -> Any:
    codes = fn.external_source(name=f"codes{slot}", dtype=types.INT32, ndim=0)
    matrices = fn.external_source(name=f"matrices{slot}", dtype=types.FLOAT, ndim=2)
    factors = fn.external_source(name=f"factors{slot}", dtype=types.FLOAT, ndim=1)
    backend = "gpu" if device == "cuda" else "cpu"
    if device == "cuda":
        factors = factors.gpu()
    if codes == _WARP:
        frames = fn.warp_affine(frames, matrix=matrices, fill_value=GREY, interp_type=types.INTERP_LINEAR)
    elif codes == _SCALE:
        frames = _bytes(frames * factors)
    elif codes == _CONTRAST:
        means = fn.reductions.mean(frames, axis_names="HW", keep_dims=True)
        grey = fn.reductions.sum(
            means * types.Constant(np.array(LUMA, np.float32), device=backend), axis_names="C", keep_dims=True
        )
        frames = _bytes(grey + factors * (frames - grey))
    elif codes == _SHARPEN:
        # The outermost pixels stay as they are.
        inner = np.pad(np.ones((image_size - 2, image_size - 2, 1), np.float32), ((1, 1), (1, 1), (0, 0)))
        change = (1 - factors) * types.Constant(inner, device=backend)
        blurred = fn.filter(frames, types.Constant(BLUR, device=backend))
        frames = _bytes(frames * (1 - change) + blurred * change)
    return frames


def _bytes(pixels: Any) -> Any:
    """Rounded down, as in the published code."""
    return fn.cast(dali_math.floor(dali_math.clamp(pixels, 0, 255)), dtype=types.UINT8)
