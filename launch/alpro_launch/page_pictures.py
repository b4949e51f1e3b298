"""The pictures of a run's page: clips with PEM's crop as training saw them, and what captions retrieve."""

import io
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from alpro_stream.evaluate.embed import StoredClip, evenly_spread, pixels_of, stored_clips
from alpro_stream.evaluate.ranking import text_to_video_ranks
from alpro_stream.media import FrameConfig
from alpro_stream.pages import Box, ClipExample, EntityProbability, RankedClip, SearchExample
from alpro_stream.run import RunConfig, run_entities
from alpro_stream.stream.batch import Batch
from alpro_stream.stream.clips import ClipDecoder, build_clip_decoder
from alpro_stream.stream.config import make_plan
from alpro_stream.stream.decode import DecodeConfig
from alpro_stream.stream.maker import BatchMaker
from alpro_stream.stream.sources import closing_storage, open_sources
from alpro_stream.stream.text import Tokenizer
from alpro_stream.train.restore import ensure_bank, load_labeller

_SHOWN_PIXELS = 192
_TOP_ENTITIES = 5
_TOP_CLIPS = 5


def clip_examples(config: RunConfig, count: int) -> tuple[ClipExample, ...]:
    """Clips of the first pass of a pre-training run, cropped and flipped as there, with their soft labels.

    They are spread over the pass, so that images are among them; only the lanes they are in are read.

    Args:
        config: of a run with a prompter.
        count: most clips.

    Raises:
        AlproError: the data or the prompter are not there any more, or do not fit the run.
    """
    assert config.prompter is not None
    entities = run_entities(config.prompter, config.stream)
    # Not where the run works: it may still do so, and this needs no speed.
    device = torch.device("cpu")
    with TemporaryDirectory() as folder:  # A look at a run writes nothing into it.
        for made in (config.run_dir / "prompter").glob("*.safetensors"):
            (Path(folder) / made.name).symlink_to(made.absolute())
        bank = ensure_bank(config.prompter.checkpoint, entities, Path(folder), device, config.prompter.prompts)
        labeller = load_labeller(config.prompter.checkpoint, bank, config.losses.pem, device)
    video = config.model.video
    grid = video.image_size // video.patch_size
    tokenizer = Tokenizer(config.stream.text.tokenizer, config.stream.text.num_tokens)
    decode = config.stream.decode.model_copy(update={"num_workers": 0, "device": "cpu", "backend": "auto"})
    with ExitStack() as stack:
        storage = stack.enter_context(closing_storage(config.stream.sources, config.stream.cache, config.stream.fetch))
        sources = open_sources(config.stream.sources, config.stream.unit, storage)
        for source in sources:
            stack.callback(source.reader.close)
        plan = make_plan(config.stream, sources)

        def maker(patch_size: int) -> BatchMaker:
            # The same grid of patches at another size gives the same draws, so the same crops, in more pixels.
            size, max_frames = grid * patch_size, plan.lane_batch * video.num_frames
            decoder = build_clip_decoder(decode, size, max_frames, None)
            made = BatchMaker(config.stream, sources, tokenizer, decoder, video.num_frames, size, patch_size)
            stack.callback(made.close)
            return made

        seen, shown = maker(video.patch_size), maker(-(-_SHOWN_PIXELS // grid))
        examples = []
        num_clips = min(plan.steps_per_epoch, config.train.num_steps(plan.steps_per_epoch)) * config.stream.global_batch
        for i in range(min(count, num_clips)):
            step, row = divmod(int((i + 0.5) * num_clips / min(count, num_clips)), config.stream.global_batch)
            lane, row = divmod(row, plan.lane_batch)
            lanes = range(lane, lane + 1)
            batch = seen.make(plan, step, lanes)
            labels = labeller(batch.frames_BTHWC, batch.boxes_B4, batch.kind)
            pictures, kept = shown.make(plan, step, lanes), bool(labels.keep_B[row])
            examples.append(_clip_example(pictures, row, grid, labels.labels_BM[row], kept, entities))
    return tuple(examples)


def _clip_example(batch: Batch, row: int, grid: int, q_M: Tensor, kept: bool, entities: list[str]) -> ClipExample:
    top, left, height, width = (int(value) / grid for value in batch.boxes_B4[row])
    best = q_M.topk(min(_TOP_ENTITIES, len(entities)))
    frames = batch.frames_BTHWC[row]
    return ClipExample(
        id=batch.keys[row],
        caption=batch.captions[row],
        frames=tuple(_jpeg(frame.numpy()) for frame in (frames[:1] if batch.kind == "image" else frames)),
        box=Box(left=left, top=top, width=width, height=height),
        entities=tuple(
            EntityProbability(word=entities[int(index)], probability=float(value))
            for value, index in zip(best.values, best.indices, strict=True)
        ),
        kept=kept,
    )


def search_examples(evaluation: Path, sources_of: RunConfig, score: str, count: int) -> tuple[SearchExample, ...]:
    """Captions and the clips an evaluation retrieved for them; the worst ranked one is always among them."""
    with np.load(evaluation / "scores.npz") as arrays:
        captions, keys = [str(text) for text in arrays["captions"]], [str(key) for key in arrays["keys"]]
        truth_C, scores_CV = torch.from_numpy(arrays["truth"]), torch.from_numpy(arrays[score])
    ranks_C = text_to_video_ranks(scores_CV, truth_C)
    spread = [int((i + 0.5) * len(captions) / count) for i in range(min(count, len(captions)))]
    rows = list(dict.fromkeys([*spread[:-1], int(ranks_C.argmax())]))
    clips = {clip.key: clip for clip in stored_clips(open_sources(sources_of.stream.sources))}
    decoder = build_clip_decoder(DecodeConfig(num_workers=0), _SHOWN_PIXELS, 1, None)
    name = {"vtc": "VTC similarity", "vtm": "VTM probability"}[score]
    examples = []
    for row in rows:
        order = scores_CV[row].argsort(descending=True, stable=True).tolist()
        right, right_rank = int(truth_C[row]), int(ranks_C[row])
        results = [
            RankedClip(
                rank=place,
                id=keys[index],
                thumbnail=_thumbnail(clips[keys[index]], decoder),
                score=float(scores_CV[row, index]),
                is_right=index == right,
            )
            for place, index in enumerate(order[:_TOP_CLIPS], start=1)
        ]
        if right not in order[:_TOP_CLIPS]:
            thumbnail, own = _thumbnail(clips[keys[right]], decoder), float(scores_CV[row, right])
            results.append(RankedClip(rank=right_rank, id=keys[right], thumbnail=thumbnail, score=own, is_right=True))
        examples.append(
            SearchExample(
                caption=captions[row],
                score_name=name,
                results=tuple(results),
                right_rank=right_rank,
                num_candidates=len(keys),
            )
        )
    decoder.close()
    return tuple(examples)


def _thumbnail(clip: StoredClip, decoder: ClipDecoder) -> bytes:
    """The frame in the middle."""
    return _jpeg(pixels_of([clip], evenly_spread(1, FrameConfig()), decoder)[0, 0].numpy())


def _jpeg(pixels: "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=82)
    return buffer.getvalue()
