import io
import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from stream_jpegs import jpeg, waves
from stream_parts import (
    IMAGE_SIZE,
    NUM_FRAMES,
    PATCH_SIZE,
    Wrapped,
    assert_batches_equal,
    open_maker,
    stored_as,
    stream_config,
    write_clips,
)

from alpro_stream.config import validate
from alpro_stream.errors import ConfigError
from alpro_stream.shards.layout import DatasetInfo, save_dataset_info
from alpro_stream.shards.writer import ShardWriter
from alpro_stream.stream.config import StreamConfig, fingerprint
from alpro_stream.stream.crops import black_outside, pem_crop_boxes
from alpro_stream.stream.decode import FrameError
from alpro_stream.stream.frames import choose_frames
from alpro_stream.stream.maker import negative_noise
from alpro_stream.stream.seeds import Draws, sample_keys
from alpro_stream.stream.sources import open_sources
from alpro_stream.stream.text import IGNORED_LABEL, Tokenizer
from alpro_stream.testing.shards import caption_of, sample, write_dataset, write_tokenizer


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("stream")
    write_dataset(root / "train", video_shards=[5, 7, 6], image_shards=[9], num_frames=9)
    write_tokenizer(root / "tokenizer")
    return root


@pytest.fixture(scope="module")
def distinct(tmp_path_factory):
    """Videos of which no two frames are alike: two steps in a pass, and two clips left over."""
    root = tmp_path_factory.mktemp("distinct")
    write_clips(root / "train", [5, 7, 6], stored_frames)
    write_tokenizer(root / "tokenizer")
    return root


def stored_frames(number):
    return [jpeg(waves(32, 32, 100 * number + frame)) for frame in range(9)]


def number_of(key):
    return int(key.rpartition("-")[2])


def seen(stored, identity, flip=False):
    """Pixels of a clip whose window is as large as the image, so that nothing is resized: 28 of 32 pixels."""
    left, top = np.floor(Draws("crop", *identity).uniform(2) * 5).astype(int)
    chosen = choose_frames(len(stored), NUM_FRAMES, "headtail", Draws("frames", *identity))
    frames = np.stack([np.array(Image.open(io.BytesIO(stored[index])).convert("RGB")) for index in chosen])
    cut = frames[:, top : top + IMAGE_SIZE, left : left + IMAGE_SIZE]
    return cut[:, :, ::-1] if flip else cut


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


def test_pixels_are_the_drawn_window_of_the_drawn_frames(distinct):
    config = stream_config(distinct, flip_probability=1)
    maker, plan = open_maker(config)
    batch = maker.make(plan, 0, range(4))
    for clip, key in zip(batch.frames_BTHWC, batch.keys, strict=True):
        np.testing.assert_array_equal(clip, seen(stored_frames(number_of(key)), (config.seed, "video", 0, key), True))


@pytest.mark.parametrize("num_workers", [0, 1, 2, 4])
def test_any_number_of_threads_gives_the_same_batch(distinct, num_workers):
    changes = {"crop_scale": 0.7, "augment": "increasing"}
    one, plan = open_maker(stream_config(distinct, **changes))
    many, _ = open_maker(stream_config(distinct, **changes, decode={"num_workers": num_workers}))
    for step in (0, 1):
        assert_batches_equal(many.make(plan, step, range(4)), one.make(plan, step, range(4)))
    many.close()


def test_frames_that_are_no_plain_jpeg_give_the_same_batch_and_are_counted(distinct, tmp_path):
    """One of the nine of every third clip; what is lost by its format is nothing."""

    def frames_of(number):
        frames = stored_frames(number)
        return [*frames[:4], stored_as(frames[4], "PNG"), *frames[5:]] if number % 3 == 0 else frames

    write_clips(tmp_path / "train", [5, 7, 6], frames_of)
    config = stream_config(distinct, seed=3)
    expected = open_maker(config)[0]
    maker, plan = open_maker(stream_config(distinct, seed=3, sources=[{"path": tmp_path / "train"}]))
    num_expected = 0
    for step in (0, 1):
        batch = maker.make(plan, step, range(4))
        assert_batches_equal(batch, expected.make(plan, step, range(4)))
        for key in batch.keys:
            chosen = choose_frames(9, NUM_FRAMES, "headtail", Draws("frames", config.seed, "video", 0, key))
            num_expected += 4 in chosen and number_of(key) % 3 == 0
    maker.close()
    figures = maker.gauges.lap()
    assert figures["stream/fallbacks"] == num_expected > 0
    assert figures["stream/quarantined"] == 0


class Refusing(Wrapped):
    """A decoder that refuses the frames of some clips, and spoils the place where they would be."""

    numbers = frozenset()

    def decode(self, requests, out_NHWC, rows):
        refused = {frame for number in self.numbers for frame in stored_frames(number)}
        errors = super().decode(requests, out_NHWC, rows)
        for number, request in enumerate(requests):
            if request.jpeg in refused:
                out_NHWC[rows[number]] = 200
                errors[number] = FrameError("decode", f"refused {number}")
        return errors


@pytest.fixture
def refusing(distinct):
    """A maker whose decoder refuses what the test says, and one that refuses nothing; the plan, the decoder."""
    wrapped = []
    config = stream_config(distinct, quarantine={"max_rate": 1.0, "max_consecutive": 100}, crop_only_probability=0.5)
    maker, plan = open_maker(config, lambda decoder: wrapped.append(Refusing(decoder)) or wrapped[0])
    return maker, open_maker(config)[0], plan, wrapped[0]


ROW = 5


def test_everything_of_a_substitute_is_its_own_and_the_other_rows_stay(refusing):
    maker, sound, plan, decoder = refusing
    expected = sound.make(plan, 0, range(4))
    decoder.numbers = {number_of(expected.keys[ROW])}
    batch = maker.make(plan, 0, range(4))
    (key,) = set(batch.keys) - set(expected.keys)
    assert batch.keys[ROW] == key
    identity = (maker.config.seed, "video", 0, key)
    assert batch.captions[ROW] == caption_of(number_of(key)) != expected.captions[ROW]
    ids, mask = maker.tokenizer([batch.captions[ROW]])
    masked = maker.tokenizer.mask(ids.numpy(), sample_keys([identity], "mlm"), 0.15)
    assert torch.equal(batch.ids_BL[ROW], ids[0])
    assert torch.equal(batch.mask_BL[ROW], mask[0])
    assert batch.mlm_ids_BL[ROW].tolist() == masked.ids_BL[0].tolist()
    assert batch.mlm_labels_BL[ROW].tolist() == masked.labels_BL[0].tolist()
    (box,) = pem_crop_boxes(IMAGE_SIZE, PATCH_SIZE, sample_keys([identity], "pem"))
    assert batch.boxes_B4[ROW].tolist() == box.tolist()
    assert batch.video_id_B[ROW] not in expected.video_id_B
    pixels = batch.frames_BTHWC[ROW].numpy()
    flip = Draws("flip", *identity).uniform(1)[0] < 0.5
    shown = seen(stored_frames(number_of(key)), identity, flip)
    if Draws("crop only", *identity).uniform(1)[0] < 0.5:
        black_outside(shown := torch.from_numpy(shown.copy()), batch.boxes_B4[ROW].numpy() * PATCH_SIZE)
    np.testing.assert_array_equal(pixels, shown)
    assert batch.valid_B.all()
    assert batch.num_quarantined == 1
    # Its rows are those of a lane: no other lane sees a difference, and in its own the other rows see none.
    for name in ("frames_BTHWC", "ids_BL", "mlm_ids_BL", "mlm_labels_BL", "boxes_B4", "video_id_B", "text_id_B"):
        one, other = getattr(batch, name), getattr(expected, name)
        rest = torch.arange(8) != ROW
        assert torch.equal(one[rest], other[rest]), name
    assert torch.equal(batch.noise_B2N, expected.noise_B2N)


def test_where_nothing_is_left_a_row_is_black_and_without_words(refusing):
    maker, sound, plan, decoder = refusing
    expected = sound.make(plan, 0, range(4))
    known = {number_of(key) for step in (0, 1) for key in sound.make(plan, step, range(4)).keys}
    decoder.numbers = {number_of(expected.keys[ROW])} | (set(range(18)) - known)
    batch = maker.make(plan, 0, range(4))
    assert batch.valid_B.tolist() == [row != ROW for row in range(8)]
    assert not batch.frames_BTHWC[ROW].any()
    assert batch.keys == expected.keys  # the one that was planned
    assert batch.captions == (*expected.captions[:ROW], "", *expected.captions[ROW + 1 :])
    assert (batch.mlm_labels_BL[ROW] == IGNORED_LABEL).all()
    assert torch.equal(batch.ids_BL[ROW], maker.tokenizer([""])[0][0])
    assert batch.video_id_B[ROW] not in expected.video_id_B
    rest = torch.arange(8) != ROW
    assert torch.equal(batch.frames_BTHWC[rest], expected.frames_BTHWC[rest])
    assert batch.num_quarantined == 1
    figures = maker.gauges.lap()
    assert figures["stream/quarantined"] == 1


def test_a_batch_of_which_nothing_can_be_used_is_black(refusing):
    maker, _, plan, decoder = refusing
    decoder.numbers = set(range(18))
    batch = maker.make(plan, 0, range(4))
    assert not batch.frames_BTHWC.any()
    assert not batch.valid_B.any()
    assert set(batch.captions) == {""}
    assert len(set(batch.video_id_B.tolist())) == 8
    assert batch.num_quarantined == 8


def test_reading_takes_what_decoding_needs_and_no_more(distinct):
    maker, plan = open_maker(stream_config(distinct))
    read = maker.read(plan, 0, range(4))
    jpegs = {data for sample in read.samples for data in sample.clip.jpegs}
    assert len(jpegs) == 8 * NUM_FRAMES
    assert read.num_bytes == sum(map(len, jpegs))


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

    class Counted(Wrapped):
        def decode(self, requests, out_NHWC, rows):
            calls.append(len(requests))
            return super().decode(requests, out_NHWC, rows)

    config = stream_config(root, sources=[{"path": root / "train", "kind": "image"}])
    maker, plan = open_maker(config, wrap=Counted)
    batch = maker.make(plan, 0, range(4))
    assert calls == [8]
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
    moved = fingerprint_of(tmp_path, decode={"num_workers": 2, "prefetch": 7})
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
        {"augment": "published"},
        {"num_frames": 8},
        {"decode": {"backend": "dali"}},
        {"decode": {"device": "mixed"}},
    ],
)
def test_the_fingerprint_holds_every_setting_that_decides_a_batch(root, change):
    assert fingerprint_of(root, **change) != fingerprint_of(root)


def test_the_fingerprint_tells_the_rules_of_augmentation_apart(root):
    rules = [fingerprint_of(root, augment=augment) for augment in ("none", "published", "increasing")]
    assert all(one != other for one, other in itertools.combinations(rules, 2))


def test_the_fingerprint_does_not_depend_on_whether_the_decoder_was_named(root):
    assert fingerprint_of(root, decode={"backend": "libjpeg-turbo"}) == fingerprint_of(root)
    mixed, dali = {"device": "mixed"}, {"device": "mixed", "backend": "dali"}
    assert fingerprint_of(root, decode=dali) == fingerprint_of(root, decode=mixed)


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

    plain, augmented = frames(flip_probability=0.0), frames(flip_probability=0.0, augment="published")
    changed = [not torch.equal(a, b) for a, b in zip(plain, augmented, strict=True)]
    assert any(changed)
    assert torch.equal(frames(flip_probability=1.0, augment="published"), augmented)
    assert not torch.equal(frames(flip_probability=1.0), plain)
