import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from stream_parts import IMAGE_SIZE, NUM_FRAMES, PATCH_SIZE, assert_pixels_equal, open_maker, stream_config

from alpro_stream.config import validate
from alpro_stream.errors import ConfigError
from alpro_stream.shards.layout import DatasetInfo, save_dataset_info
from alpro_stream.shards.writer import ShardWriter
from alpro_stream.stream.config import StreamConfig, fingerprint
from alpro_stream.stream.frames import choose_frames
from alpro_stream.stream.maker import negative_noise
from alpro_stream.stream.seeds import Draws, sample_keys
from alpro_stream.stream.sources import open_sources
from alpro_stream.stream.text import IGNORED_LABEL, Tokenizer
from alpro_stream.testing.shards import caption_of, picture, sample, write_dataset, write_tokenizer


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("stream")
    write_dataset(root / "train", video_shards=[5, 7, 6], image_shards=[9], num_frames=9)
    write_tokenizer(root / "tokenizer")
    return root


def number_of(key):
    return int(key.rpartition("-")[2])


def test_what_a_batch_holds(root):
    maker, plan = open_maker(stream_config(root))
    batch = maker.make(plan, 0, range(4))
    assert batch.frames_BTHWC.shape == (8, NUM_FRAMES, IMAGE_SIZE, IMAGE_SIZE, 3)
    assert batch.captions == tuple(caption_of(number_of(key)) for key in batch.keys)
    ids, mask = maker.tokenizer(batch.captions)
    assert torch.equal(batch.ids_BL, ids)
    assert torch.equal(batch.mask_BL, mask)
    hidden = batch.mlm_labels_BL != IGNORED_LABEL
    assert torch.equal(batch.mlm_labels_BL[hidden], ids[hidden])
    assert torch.equal(batch.mlm_ids_BL[~hidden], ids[~hidden])
    top, left, height, width = batch.boxes_B4.T
    assert torch.stack([top, left, height - 1, width - 1]).min() >= 0
    assert torch.stack([top + height, left + width]).max() <= IMAGE_SIZE // PATCH_SIZE
    assert (batch.kind, batch.source, batch.step) == ("video", "video", 0)
    assert len(set(batch.keys)) == 8


def test_pixels_are_the_drawn_window_of_the_drawn_frames(root):
    """The window is as large as the image here, so that nothing is resized: 28 of 32 pixels."""
    config = stream_config(root, flip_probability=1)
    maker, plan = open_maker(config)
    batch = maker.make(plan, 0, range(4))
    for clip, key in zip(batch.frames_BTHWC, batch.keys, strict=True):
        identity = (config.seed, "video", 0, key)
        left, top = np.floor(Draws("crop", *identity).uniform(2) * 5).astype(int)
        chosen = choose_frames(9, NUM_FRAMES, "headtail", Draws("frames", *identity))
        for pixels, frame in zip(clip, chosen, strict=True):
            stored = np.asarray(Image.open(io.BytesIO(picture(number_of(key), frame, 32))))
            assert_pixels_equal(pixels, stored[top : top + 28, left : left + 28][:, ::-1])


def test_masks_are_those_of_the_sample(root):
    config = stream_config(root)
    maker, plan = open_maker(config)
    batch = maker.make(plan, 0, range(4))
    for row, key in enumerate(batch.keys):
        own = sample_keys([(config.seed, "video", 0, key)], "mlm")
        masked = maker.tokenizer.mask(batch.ids_BL[row : row + 1].numpy(), own, 0.15)
        assert batch.mlm_ids_BL[row].tolist() == masked.ids_BL[0].tolist()
        assert batch.mlm_labels_BL[row].tolist() == masked.labels_BL[0].tolist()


def test_a_sample_does_not_depend_on_its_batch(root):
    maker, plan = open_maker(stream_config(root))
    whole = maker.make(plan, 1, range(4))
    for lane in range(4):
        alone, part = maker.make(plan, 1, range(lane, lane + 1)), whole.micro_batches(4)[lane]
        assert (alone.keys, alone.first_lane, alone.num_lanes) == (part.keys, lane, 1)
        for name in ("frames_BTHWC", "mlm_ids_BL", "boxes_B4", "video_id_B", "text_id_B", "noise_B2N"):
            assert torch.equal(getattr(alone, name), getattr(part, name))


def test_noise_belongs_to_the_lane_and_not_to_its_place_in_a_batch(root):
    whole = negative_noise(7, 9, range(2, 4), 3)
    assert (whole.shape, whole.dtype) == ((6, 2, 3), torch.float32)
    for index, lane in enumerate((2, 3)):
        own = whole[3 * index : 3 * index + 3]
        drawn_2NN = torch.from_numpy(Draws("negatives", 7, 9, lane).exponential(2, 3, 3)).float()
        assert torch.equal(own, drawn_2NN.transpose(0, 1))
        assert torch.equal(own, negative_noise(7, 9, range(lane, lane + 1), 3))
    others = (negative_noise(8, 9, range(2, 4), 3), negative_noise(7, 10, range(2, 4), 3), whole.roll(3, 0))
    assert not any(torch.equal(other[:3], whole[:3]) for other in (*others, whole.flip(1)))
    maker, plan = open_maker(stream_config(root, seed=7))
    assert torch.equal(maker.make(plan, 1, range(1, 3)).noise_B2N, negative_noise(7, 1, range(1, 3), 2))


def test_augmentation_changes_with_the_pass_and_the_seed(root):
    def drawn(seed, steps):
        maker, plan = open_maker(stream_config(root, seed=seed, sources=[{"path": root / "train", "kind": "video"}]))
        batches = [maker.make(plan, step, range(4)) for step in steps]
        return {key: batch.boxes_B4[row].tolist() for batch in batches for row, key in enumerate(batch.keys)}

    first, second, other = drawn(1, range(2)), drawn(1, range(2, 4)), drawn(2, range(2))
    for later in (second, other):
        common = first.keys() & later.keys()
        assert len(common) >= 8
        assert sum(first[key] != later[key] for key in common) > len(common) / 2


@pytest.mark.parametrize(("probability", "low", "high"), [(0, 0, 0), (1, 8, 8)])
def test_the_flip_is_of_whole_clips(root, probability, low, high):
    plain, plan = open_maker(stream_config(root, crop_scale=1, flip_probability=0))
    maker, _ = open_maker(stream_config(root, crop_scale=1, flip_probability=probability))
    expected, found = (m.make(plan, 0, range(4)).frames_BTHWC for m in (plain, maker))
    mirrored = sum(torch.equal(one.flip(2), other) for one, other in zip(expected, found, strict=True))
    assert low <= mirrored <= high


def test_flips_are_drawn_anew_in_every_pass(root):
    changes = {"crop_scale": 1, "frames": "uniform", "sources": [{"path": root / "train", "kind": "video"}]}
    maker, plan = open_maker(stream_config(root, **changes))
    seen = {}
    for step in range(6):
        batch = maker.make(plan, step, range(4))
        for key, clip in zip(batch.keys, batch.frames_BTHWC, strict=True):
            seen.setdefault(key, []).append(clip)
    pairs = [(clips[0], other) for clips in seen.values() for other in clips[1:]]
    changed = [not torch.equal(one, other) for one, other in pairs]
    assert all(torch.equal(one, other.flip(2)) for (one, other), flip in zip(pairs, changed, strict=True) if flip)
    assert 0.2 < np.mean(changed) < 0.8


def test_images_are_clips_of_one_frame(root):
    calls = []

    class Counted:
        def __init__(self, decoder):
            self._decoder = decoder

        def decode(self, requests):
            calls.append(len(requests))
            return self._decoder.decode(requests)

    config = stream_config(root, sources=[{"path": root / "train", "kind": "image"}])
    maker, plan = open_maker(config, wrap=Counted)
    batch = maker.make(plan, 0, range(4))
    # The first is decoded by itself, as its kind of frame is met for the first time.
    assert calls == [1, 7]
    assert batch.kind == "image"
    assert batch.frames_BTHWC.shape == (8, 1, IMAGE_SIZE, IMAGE_SIZE, 3)


def test_every_caption_is_chosen_and_equal_texts_and_videos_are_known(root, tmp_path):
    captions = ("A red dog moves", "a blue cat moves ", "a RED dog moves")
    with ShardWriter(tmp_path, "video-000000", "video") as writer:
        for number in range(8):
            clip = sample(number, "video", 2, 32)
            writer.add(replace(clip, metadata=replace(clip.metadata, captions=captions)))
        save_dataset_info(tmp_path, DatasetInfo.of_shards("x", {"frames": {"size": 32}}, [writer.close()]))
    maker, plan = open_maker(stream_config(root, sources=[{"path": tmp_path}]))
    batches = [maker.make(plan, step, range(4)) for step in range(12)]
    counts = [sum(batch.captions.count(caption) for batch in batches) for caption in captions]
    # 96 draws of 3: standard deviation 4.6.
    assert sum(counts) == 96
    assert min(counts) > 32 - 4 * 5
    for batch in batches:
        words = [caption.strip().lower() for caption in batch.captions]
        for ids, names in ((batch.text_id_B, words), (batch.video_id_B, batch.keys)):
            same = np.array(names)[:, None] == np.array(names)[None]
            assert np.array_equal((ids[:, None] == ids[None]).numpy(), same)
    assert sorted(batches[0].video_id_B.tolist()) == sorted(batches[1].video_id_B.tolist())


def fingerprint_of(root, num_frames=NUM_FRAMES, **changes):
    config = stream_config(root, **changes)
    return fingerprint(config, open_sources(config.sources), Tokenizer(config.text.tokenizer, 12), num_frames)


def test_the_fingerprint_survives_json(root):
    assert json.loads(json.dumps(fingerprint_of(root))) == fingerprint_of(root)


def test_the_fingerprint_does_not_depend_on_places_and_threads(root, tmp_path):
    write_dataset(tmp_path / "train", video_shards=[5, 7, 6], image_shards=[9], num_frames=9)
    write_tokenizer(tmp_path / "tokenizer")
    moved = fingerprint_of(tmp_path, decode={"num_threads": 2, "prefetch": 7})
    assert moved == fingerprint_of(root)
    heavier = [{"path": root / "train", "weight": 3}]
    assert fingerprint_of(root, sources=heavier) == fingerprint_of(root)
    assert fingerprint_of(root, sources=heavier, mix="weights") != fingerprint_of(root, mix="weights")


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"global_batch": 16},
        {"num_lanes": 2},
        {"window_shards": 3},
        {"mix": "alternate"},
        {"frames": "uniform"},
        {"crop_scale": 0.5},
        {"flip_probability": 0.1},
        {"augment": True},
        {"num_frames": 8},
        {"decode": {"device": "mixed"}},
    ],
)
def test_the_fingerprint_holds_every_setting_that_decides_a_batch(root, change):
    assert fingerprint_of(root, **change) != fingerprint_of(root)


def test_the_fingerprint_holds_what_is_read_and_in_which_order(root, tmp_path):
    kinds = [{"path": root / "train", "kind": kind} for kind in ("video", "image")]
    assert fingerprint_of(root, sources=kinds) == fingerprint_of(root)
    assert fingerprint_of(root, sources=kinds[::-1]) != fingerprint_of(root)
    assert fingerprint_of(root, sources=kinds[:1]) != fingerprint_of(root)
    write_dataset(tmp_path / "train", video_shards=[5, 7, 7], image_shards=[9], num_frames=9)
    assert fingerprint_of(root, sources=[{"path": tmp_path / "train"}]) != fingerprint_of(root)


def sources_of(root, **changes):
    return [{"path": root / "train", "kind": "video", **changes}]


def test_what_makes_no_difference_to_the_order_is_not_in_the_fingerprint(root, tmp_path):
    one = fingerprint_of(root, sources=sources_of(root))
    for mix in ("alternate", "weights"):
        assert fingerprint_of(root, sources=sources_of(root, weight=3), mix=mix) == one
    # There are 3 shards of videos, and one of images.
    assert fingerprint_of(root, window_shards=50) == fingerprint_of(root, window_shards=3)
    assert fingerprint_of(root, sources=sources_of(root), window_shards=2) == one
    assert fingerprint_of(root, sources=sources_of(root), window_shards=3) != one
    _, few = open_maker(stream_config(root, window_shards=3))
    _, many = open_maker(stream_config(root, window_shards=50))
    assert all(np.array_equal(few[step].refs, many[step].refs) for step in range(20))


@pytest.mark.parametrize("keys", ["", "# nothing\n", "nobody\n", "image-00001\n"])
def test_a_list_that_excludes_nothing_is_not_in_the_fingerprint(root, tmp_path, keys):
    path = tmp_path / "exclude.txt"
    plain = fingerprint_of(root, sources=sources_of(root))
    path.write_text(f"{keys}video-00003\n")
    found = fingerprint_of(root, sources=sources_of(root, exclude=path))
    assert found != plain
    path.write_text("video-00003\n")
    assert fingerprint_of(root, sources=sources_of(root, exclude=path)) == found
    path.write_text(keys)
    assert fingerprint_of(root, sources=sources_of(root, exclude=path)) == plain


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([5, 10], r"expected a list of ranges of steps; write \[\[5, 10\]\] \(got \[5, 10\]\)"),
        ([[10, 5]], r"skip_steps: \[10, 5\] is no range of steps"),
        (["5-10"], "skip_steps"),
    ],
)
def test_steps_to_skip_that_are_none(root, value, message):
    values = {"sources": [{"path": "x"}], "text": {"tokenizer": "x"}}
    assert validate(StreamConfig, {**values, "skip_steps": [[5, 10]]}, "run.yaml").skip_steps == ((5, 10),)
    with pytest.raises(ConfigError, match=message):
        validate(StreamConfig, {**values, "skip_steps": value}, "run.yaml")


def test_crop_only_shows_nothing_but_pems_crop(root):
    whole, crop = (
        open_maker(stream_config(root, crop_only_probability=p))[0].make(
            open_maker(stream_config(root))[1], 0, range(4)
        )
        for p in (0, 1)
    )
    assert torch.equal(whole.boxes_B4, crop.boxes_B4)
    for full, shown, box in zip(whole.frames_BTHWC, crop.frames_BTHWC, whole.boxes_B4.tolist(), strict=True):
        top, left, height, width = (PATCH_SIZE * side for side in box)
        rows, columns = slice(top, top + height), slice(left, left + width)
        assert torch.equal(shown[:, rows, columns], full[:, rows, columns])
        assert shown.sum() == full[:, rows, columns].sum()
        assert shown.sum() < full.sum()


def test_augment_changes_pixels_by_key_and_flips_videos_by_its_own_operation(root):
    def frames(**values):
        maker, plan = open_maker(stream_config(root, crop_scale=1.0, **values))
        return maker.make(plan, 0, range(plan.num_lanes)).frames_BTHWC

    plain, augmented = frames(flip_probability=0.0), frames(flip_probability=0.0, augment=True)
    changed = [not torch.equal(a, b) for a, b in zip(plain, augmented, strict=True)]
    assert any(changed)
    assert torch.equal(frames(flip_probability=1.0, augment=True), augmented)
    assert not torch.equal(frames(flip_probability=1.0), plain)
