"""The reference's small models as models of ours: every weight comes in through the reader of the authors' files.

Weights and pixels are made by `parity/recipe.py`; nothing is random.
"""

from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from parity import recipe
from parity_files import arrays, assert_close, cases, meta

from alpro_stream.losses import objective
from alpro_stream.losses.objective import GlobalCounts, GlobalFeatures, ObjectiveConfig, PretrainObjective, SoftLabels
from alpro_stream.losses.pem import keep_and_renormalise
from alpro_stream.model.alpro import ModelConfig, build_model
from alpro_stream.model.foreign import ForeignFile
from alpro_stream.model.loading import load_by_name
from alpro_stream.model.pixels import PIXEL_MEAN, PIXEL_STD
from alpro_stream.model.reference_names import prompter_part
from alpro_stream.prompter.bank import build_bank
from alpro_stream.prompter.labels import entity_similarity
from alpro_stream.prompter.prompts import templates
from alpro_stream.stream.batch import Batch

SIZES = cases()["config"]
LENGTH, PATCH, GRID = SIZES["length"], SIZES["patch"], SIZES["image"] // SIZES["patch"]
ENTITIES = tuple(f"entity{number}" for number in range(SIZES["entities"]))
CONFIG = ModelConfig.model_validate(
    {
        "video": {
            "image_size": SIZES["image"],
            "patch_size": PATCH,
            "num_frames": SIZES["frames"],
            "width": SIZES["width"],
            "depth": SIZES["vit_depth"],
            "num_heads": SIZES["vit_heads"],
        },
        "text": {
            "width": SIZES["width"],
            "num_layers": SIZES["fusion_layer"],
            "num_multimodal_layers": SIZES["bert_layers"] - SIZES["fusion_layer"],
            "num_heads": SIZES["bert_heads"],
            "intermediate_size": SIZES["bert_ffn"],
            "max_positions": SIZES["positions"],
        },
        "projection_size": SIZES["proj"],
    }
)
TASKS = {"pretrain": "pretrain", "prompter": "prompter", "retrieval": "retrieval", "qa": "question_answering"}
"""Tables of weights in cases.json, and what these models are for."""
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-6}
"""Of the largest value of an array; in float64 it is the rounding of the stored array."""
RULES = {"out": "reference", "paper": "sample"}
"""The ignore rule behind each set of stored values."""
ONLY_VTC_AND_VTM = {"mlm": 0.0, "pem": {"weight": 0.0}}

each_dtype = pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)


def each_output(name):
    """All that `<name>.npz` says of results, so that no array can be left out."""
    return pytest.mark.parametrize("output", [key for key in arrays(name) if not key.startswith(("in.", "grad."))])


def assert_parity(ours, name, output, dtype):
    """One result of ours against the stored array of the same name: numbers are close, choices are equal."""
    expected, found = arrays(name)[output], ours[output]
    if expected.dtype.kind != "f":
        assert np.array_equal(found, expected)
        return
    assert found.dtype == dtype
    assert_close(found, expected, TOLERANCES[dtype])


def inputs(name, *keys):
    """Arrays `in.<key>` as tensors."""
    return [torch.from_numpy(arrays(name)[f"in.{key}"]) for key in keys]


def reference_tensors(kind, **shapes):
    """The recipe's weights of a model under the authors' names; `shapes` changes those that end so."""
    table = dict(cases()["state_dict_shapes"][kind])
    for ending, shape in shapes.items():
        table |= {key: shape for key in table if key.endswith(ending)}
    return {key: torch.from_numpy(np.asarray(value)) for key, value in recipe.state_dict(table).items()}


def reference_file(kind, **shapes):
    """As if the reference had saved its model."""
    return ForeignFile(Path(f"{kind}.pt"), TASKS[kind], reference_tensors(kind, **shapes))


def model_from(file, dtype, config=CONFIG):
    """A model of ours with the weights of a file, in evaluation mode."""
    model = build_model(file.task, config, SIZES["vocab"], SIZES["entities"], SIZES["answers"])
    parameters, skipped = file.parameters(file.task, config)
    load_by_name(model, parameters, str(file.path), skipped=skipped)
    return model.to(dtype).eval()


def reference_model(kind, dtype):
    """One of the four models, a new one at every call."""
    return model_from(reference_file(kind), dtype)


def frozen_prompter(dtype):
    """The prompter inside the pre-training model; its weights differ from those of a prompter's own file."""
    tensors = prompter_part(reference_tensors("pretrain"), "file")
    return model_from(ForeignFile(Path("pretrain.pt"), "prompter", tensors), dtype)


@cache
def pixels(case, dtype, batch=SIZES["batch"]):
    """The videos of a case, normalised already."""
    found = recipe.video(meta(case)["video"], batch, SIZES["frames"], SIZES["image"])
    assert recipe.checksum(found) == meta(case)["pixels"]
    return torch.from_numpy(found).to(dtype)


@cache
def cropped_pixels(case, dtype):
    """What the prompter sees of the videos of a case."""
    box = arrays(f"{case}_tiny")["in.crop_box"]
    found, _ = recipe.crop(pixels(case, torch.float32).numpy(), recipe.patch_mask(box, GRID), PATCH)
    assert recipe.checksum(found) == meta(case)["crop_pixels"]
    return torch.from_numpy(found).to(dtype)


@contextmanager
def outputs_of(modules):
    """Collects what each of some modules returned last, by their names."""
    found = {}
    with ExitStack() as stack:
        for name, module in modules.items():
            stack.callback(
                module.register_forward_hook(lambda _, __, output, name=name: found.update({name: output})).remove
            )
        yield found


@contextmanager
def calls_of(*names):
    """Collects arguments and results of functions that the objective calls, by their names."""
    found = {name: [] for name in names}

    def recording(name, function):
        def call(*arguments):
            found[name].append((arguments, function(*arguments)))
            return found[name][-1][1]

        return call

    with ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch.object(objective, name, recording(name, getattr(objective, name))))
        yield found


@contextmanager
def pixels_for_frames(video_GTCHW):
    """The objective reads these pixels, which no uint8 frames give, in place of the frames of `batch_of`."""
    with mock.patch.object(objective, "normalise", lambda frames: video_GTCHW[frames[:, 0, 0, 0, 0].long()]):
        yield


def noise_for(negative_video, negative_text):
    """The noise of a race that these negatives win."""
    noise_B2N = torch.ones(len(negative_video), 2, len(negative_video))
    winners_B21 = torch.stack([negative_video, negative_text], dim=1)[:, :, None]
    return noise_B2N.scatter(2, winners_B21, 1e-35)


def batch_of(ids_BL, mask_BL, negatives, *, mlm=None, boxes_B4=None, first_row=0):
    """A batch in one lane; its frames hold the number of their row alone (see `pixels_for_frames`)."""
    size = len(ids_BL)
    row_B = torch.arange(first_row, first_row + size)
    mlm_ids_BL, mlm_labels_BL = mlm or (ids_BL, torch.full_like(ids_BL, -100))
    return Batch(
        step=0,
        source="parity",
        kind="video",
        first_lane=0,
        num_lanes=1,
        keys=tuple(map(str, row_B.tolist())),
        captions=("",) * size,
        frames_BTHWC=row_B.to(torch.uint8)[:, None, None, None, None].expand(-1, 1, 1, 1, 3),
        ids_BL=ids_BL,
        mask_BL=mask_BL,
        mlm_ids_BL=mlm_ids_BL,
        mlm_labels_BL=mlm_labels_BL,
        boxes_B4=torch.zeros(size, 4, dtype=torch.int64) if boxes_B4 is None else boxes_B4,
        video_id_B=row_B,
        text_id_B=row_B,
        noise_B2N=noise_for(*negatives),
        valid_B=torch.ones(size, dtype=torch.bool),
        answers=("",) * size,
        num_quarantined=0,
    )


def terms_of(model, batch, video_GTCHW, soft_labels=None, **config):
    """The objective over a batch that is the whole global batch."""
    part = PretrainObjective(model, ObjectiveConfig.model_validate(config))
    counts = GlobalCounts(*objective.count_local(batch, soft_labels))
    ignore_GG = objective.same_pairs(batch.video_id_B, batch.text_id_B)
    with pixels_for_frames(video_GTCHW):
        return part(
            batch, lambda video, text: GlobalFeatures(video, text, ignore_GG, batch.valid_B, 0), 1, counts, soft_labels
        )


class StoredPrompts:
    """In place of a tokenizer: the stored ids of a prompt, looked up by its template and entity."""

    def __init__(self, name, kind):
        ids, mask = inputs(name, f"{kind}_prompt_ids", f"{kind}_prompt_mask")
        # Theirs are stored template by template.
        places = [(template, entity) for template in templates(kind) for entity in ENTITIES]
        self._rows = {template.format(entity): (ids[row], mask[row]) for row, (template, entity) in enumerate(places)}
        assert len(self._rows) == len(ids)

    def __call__(self, texts, num_tokens):
        ids, mask = zip(*(self._rows[text] for text in texts), strict=True)
        return torch.stack(ids), torch.stack(mask)


def banks_of(prompter, name):
    """The prompt banks of a case, built by our own code from the stored prompts."""
    banks = {kind: build_bank(prompter, StoredPrompts(name, kind), ENTITIES, kind) for kind in ("video", "image")}
    return {kind: bank_ME.clone() for kind, bank_ME in banks.items()}


def as_frames(video_BTCHW):
    """Frames that `normalise` turns into these pixels: fractions between 0 and 255, and beyond."""
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (PIXEL_MEAN, PIXEL_STD))
    return ((video_BTCHW.double() * std + mean) * 255).permute(0, 1, 3, 4, 2).float()


def pretraining_batch():
    """The batch of `pretrain_tiny`, with the reference's negatives, masks and crops."""
    ids_BL, mask_BL, boxes_B4 = inputs("pretrain_tiny", "ids", "mask", "crop_box")
    negatives, mlm = (
        inputs("pretrain_tiny", "negative_video", "negative_text"),
        inputs("pretrain_tiny", "mlm_ids", "mlm_labels"),
    )
    return batch_of(ids_BL, mask_BL, negatives, mlm=mlm, boxes_B4=boxes_B4)


@cache
@torch.no_grad()
def teacher(dtype):
    """What the prompter says of `pretrain_tiny`, by the names of the stored arrays."""
    prompter = frozen_prompter(dtype)
    banks = banks_of(prompter, "pretrain_tiny")
    feature_BE = prompter.video_feature(cropped_pixels("pretrain", dtype))
    similarity_BM = entity_similarity(feature_BE, banks[meta("pretrain")["kind"]], prompter.temperature())
    found = {
        "out.video_prompt_feat": banks["video"],
        "out.image_prompt_feat": banks["image"],
        "out.teacher_feat": feature_BE,
        "out.pem_similarity": similarity_BM,
        "out.pem_soft_labels": similarity_BM.softmax(dim=1),
    }
    for side, rule in RULES.items():
        labels_BM, keep_B = keep_and_renormalise(found["out.pem_soft_labels"], similarity_BM, rule, 0.2)
        assert torch.equal(labels_BM, found["out.pem_soft_labels"])
        found[f"{side}.pem_ignore"] = ~keep_B
    return found


def soft_labels(dtype, side):
    """The labels of `pretrain_tiny` under a rule."""
    return SoftLabels(teacher(dtype)["out.pem_soft_labels"], ~teacher(dtype)[f"{side}.pem_ignore"])
