"""The objective against the paper's formulas, one sample and one pair at a time."""

from dataclasses import replace

import pytest
import torch

from alpro_stream.losses import objective as objective_module
from alpro_stream.losses.objective import (
    DualObjective,
    GlobalCounts,
    GlobalFeatures,
    ObjectiveConfig,
    PretrainObjective,
    SoftLabels,
    allowed_negatives,
    count_local,
    same_pairs,
)
from alpro_stream.losses.pem import PemConfig
from alpro_stream.model.alpro import AlproModel, Heads, ModelConfig
from alpro_stream.model.checkpointing import set_checkpointing
from alpro_stream.model.pixels import normalise
from alpro_stream.stream.batch import Batch
from alpro_stream.stream.maker import negative_noise

SIZE, LANES, LENGTH, VOCAB, ENTITIES, GRID, SEED = 6, 2, 7, 40, 5, 3, 11
# Rows 0 and 2 show the same video, rows 0 and 1 say the same; lane 1 (rows 3-5) has no double.
VIDEO_IDS, TEXT_IDS = (1, 2, 1, 4, 5, 6), (1, 1, 3, 4, 5, 6)
CONFIG = ModelConfig.model_validate(
    {
        "video": {"image_size": 48, "num_frames": 2, "width": 32, "depth": 2, "num_heads": 2, "drop_path": 0},
        "text": {
            "width": 32,
            "num_layers": 1,
            "num_multimodal_layers": 1,
            "num_heads": 2,
            "intermediate_size": 64,
            "dropout": 0,
        },
        "projection_size": 8,
    }
)


def make_batch():
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(5, VOCAB, (SIZE, LENGTH), generator=generator)
    mask = (torch.arange(LENGTH)[None] < torch.tensor([7, 5, 6, 3, 7, 4])[:, None]).long()
    masked = torch.rand(SIZE, LENGTH, generator=generator) < 0.3
    masked[4] = False
    return Batch(
        step=9,
        source="video",
        kind="video",
        first_lane=2,
        num_lanes=LANES,
        keys=tuple(f"k{i}" for i in range(SIZE)),
        captions=tuple(f"c{i}" for i in range(SIZE)),
        frames_BTHWC=torch.randint(0, 256, (SIZE, 2, 48, 48, 3), dtype=torch.uint8, generator=generator),
        ids_BL=ids,
        mask_BL=mask,
        mlm_ids_BL=torch.where(masked & mask.bool(), 4, ids),
        mlm_labels_BL=torch.where(masked & mask.bool(), ids, -100),
        boxes_B4=torch.tensor([[0, 0, 2, 2], [1, 1, 2, 2], [0, 1, 3, 1], [2, 0, 1, 2], [0, 0, 1, 1], [1, 0, 2, 3]]),
        video_id_B=torch.tensor(VIDEO_IDS),
        text_id_B=torch.tensor(TEXT_IDS),
        noise_B2N=negative_noise(SEED, 9, range(2, 2 + LANES), SIZE // LANES),
        valid_B=torch.ones(SIZE, dtype=torch.bool),
        answers=("",) * SIZE,
        num_quarantined=0,
    )


def make_model(depth=2):
    torch.manual_seed(0)
    config = CONFIG.model_copy(update={"video": CONFIG.video.model_copy(update={"depth": depth})})
    model = AlproModel(config, VOCAB, Heads.of("pretrain", ENTITIES))
    for name, parameter in model.named_parameters():
        # Features of a fresh model are nearly equal; make rows differ, and time matter.
        if "projection" in name or "temporal_fc" in name or "patch_embed" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def make_labels():
    labels = torch.rand(SIZE, ENTITIES, generator=torch.Generator().manual_seed(5)).softmax(1)
    return SoftLabels(labels, torch.tensor([True, False, True, True, False, True]))


def alone(batch):
    """How a world of one rank and one micro-batch gathers."""
    ignore = same_pairs(batch.video_id_B, batch.text_id_B)
    return lambda video, text: GlobalFeatures(video, text, ignore, batch.valid_B, 0)


def run_objective(model, config, batch, labels):
    objective = PretrainObjective(model, config)
    return objective(batch, alone(batch), 1, GlobalCounts(*count_local(batch, labels)), labels)


class Reference:
    """Every loss as nested loops over valid samples, each encoded by itself."""

    def __init__(self, model, batch):
        self.model, self.batch = model, batch
        self.valid = batch.valid_B.nonzero().flatten().tolist()
        rows = [slice(i, i + 1) for i in range(SIZE)]
        videos = [model.dual.encode_video(normalise(batch.frames_BTHWC[row])) for row in rows]
        texts = [model.dual.encode_text(batch.ids_BL[row], batch.mask_BL[row]) for row in rows]
        self.video_tokens, self.video_features = zip(*videos, strict=True)
        self.text_tokens, self.text_features = zip(*texts, strict=True)
        self.masked_tokens = [model.dual.encode_text(batch.mlm_ids_BL[row], batch.mask_BL[row])[0] for row in rows]
        self.masks = [batch.mask_BL[row] for row in rows]

    def similarity(self, video, text):
        product = (self.video_features[video][0] * self.text_features[text][0]).sum()
        return product / self.model.dual.raw_temperature[0]

    def vtc(self):
        loss = 0.0
        for i in self.valid:
            others = [j for j in self.valid if VIDEO_IDS[i] != VIDEO_IDS[j] and TEXT_IDS[i] != TEXT_IDS[j]]
            to_text = torch.stack([self.similarity(i, j) for j in [i, *others]])
            to_video = torch.stack([self.similarity(j, i) for j in [i, *others]])
            loss -= to_text.log_softmax(0)[0] + to_video.log_softmax(0)[0]
        return loss / (2 * len(self.valid))

    def negatives(self):
        """(video for text i, text for video i) by the race: the smallest noise / probability."""
        noise = self.batch.noise_B2N
        chosen = []
        for i in self.valid:
            lane = [j for j in self.valid if j // 3 == i // 3]
            others = [j for j in lane if VIDEO_IDS[i] != VIDEO_IDS[j] and TEXT_IDS[i] != TEXT_IDS[j]]
            if others:
                video = min(others, key=lambda j, i=i: noise[i, 0, j % 3].item() / self.similarity(j, i).exp().item())
                text = min(others, key=lambda j, i=i: noise[i, 1, j % 3].item() / self.similarity(i, j).exp().item())
                chosen.append((i, video, text))
        return chosen

    def fuse(self, video, text, tokens=None):
        text_tokens = (tokens or self.text_tokens)[text]
        return self.model.multimodal(text_tokens, self.masks[text], self.video_tokens[video])[0]

    def vtm(self):
        pairs = [(i, i, 1) for i in self.valid]
        for i, video, text in self.negatives():
            pairs += [(video, i, 0), (i, text, 0)]
        losses = [-self.model.vtm_head(self.fuse(v, t)[0]).log_softmax(0)[match] for v, t, match in pairs]
        return sum(losses) / len(losses)

    def mlm(self):
        losses = []
        for i in self.valid:
            scores = self.model.mlm_head(self.fuse(i, i, self.masked_tokens)[None, :LENGTH])[0].log_softmax(1)
            for position, label in enumerate(self.batch.mlm_labels_BL[i].tolist()):
                if label != -100:
                    losses.append(-scores[position, label])
        return sum(losses) / len(losses)

    def pem(self, labels):
        losses = []
        for i in self.valid:
            if labels.keep_B[i]:
                patches = self.fuse(i, i)[LENGTH + 1 :].view(GRID, GRID, -1)
                top, left, height, width = self.batch.boxes_B4[i].tolist()
                region = patches[top : top + height, left : left + width].flatten(0, 1).mean(0)
                losses.append(-(labels.labels_BM[i] * self.model.pem_head(region).log_softmax(0)).sum())
        return sum(losses) / len(losses)


def with_invalid(batch, rows):
    """The batch with some samples marked as not valid; their pixels, words and labels stay, for the losses to see."""
    valid_B = torch.ones(len(batch), dtype=torch.bool)
    valid_B[rows] = False
    return replace(batch, valid_B=valid_B)


def without_invalid(batch, labels):
    """The valid samples alone, as if there had been no others; all lanes that are left keep equally many."""
    valid_LN = batch.valid_B.view(batch.num_lanes, -1)
    rows = batch.valid_B.nonzero().flatten()
    size = len(batch) // batch.num_lanes
    noise = torch.stack([batch.noise_B2N[row][:, valid_LN[row // size]] for row in rows])
    tensors = {name: value[rows] for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    less = replace(
        batch,
        num_lanes=int(valid_LN.any(dim=1).sum()),
        keys=tuple(batch.keys[row] for row in rows),
        captions=tuple(batch.captions[row] for row in rows),
        answers=tuple(batch.answers[row] for row in rows),
        **tensors | {"noise_B2N": noise},
    )
    return less, SoftLabels(labels.labels_BM[rows], labels.keep_B[rows])


def gradients_of(total, model):
    found = torch.autograd.grad(total, list(model.parameters()), allow_unused=True)
    return {name: g for (name, _), g in zip(model.named_parameters(), found, strict=True)}


@pytest.mark.parametrize("invalid", [[], [1], [0, 4], [1, 2, 5]], ids=str)
def test_values_and_gradients_equal_the_slow_reference(invalid):
    model, batch, labels = make_model(), with_invalid(make_batch(), invalid), make_labels()
    config = ObjectiveConfig(vtc=0.5, vtm=2.0, mlm=1.5, pem=PemConfig(weight=3.0))
    terms = run_objective(model, config, batch, labels)
    slow = Reference(model, batch)
    expected = {"vtc": slow.vtc(), "vtm": slow.vtm(), "mlm": slow.mlm(), "pem": slow.pem(labels)}
    assert terms.values.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(terms.values[name], value.detach(), rtol=1e-5, atol=1e-6, msg=name)
    total = 0.5 * expected["vtc"] + 2 * expected["vtm"] + 1.5 * expected["mlm"] + 3 * expected["pem"]
    torch.testing.assert_close(terms.total, total, rtol=1e-5, atol=1e-6)
    slow_gradients = gradients_of(total, model)
    for name, gradient in gradients_of(terms.total, model).items():
        torch.testing.assert_close(gradient, slow_gradients[name], rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("left_out", "untouched"),
    [
        ("vtc", {"dual.video_projection", "dual.text_projection", "dual.raw_temperature"}),
        ("vtm", {"vtm_head"}),
        ("mlm", {"mlm_head"}),
        ("pem", {"pem_head"}),
    ],
)
def test_a_weight_of_0_leaves_a_loss_out_and_the_others_as_they_are(left_out, untouched):
    model, batch, labels = make_model(), make_batch(), make_labels()
    weights = {"vtc": 1.0, "vtm": 1.0, "mlm": 1.0, "pem": {"weight": 1.0}}
    everything = run_objective(model, ObjectiveConfig.model_validate(weights), batch, labels)
    weights[left_out] = {"weight": 0.0} if left_out == "pem" else 0.0
    terms = run_objective(model, ObjectiveConfig.model_validate(weights), batch, labels)
    assert terms.values.keys() == everything.values.keys() - {left_out}
    for name, value in terms.values.items():
        if (left_out, name) != ("vtc", "vtm"):  # Whose negatives are others then.
            torch.testing.assert_close(value, everything.values[name], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(terms.total.detach(), sum(terms.values.values()), rtol=1e-5, atol=1e-6)
    without = [name for name, gradient in gradients_of(terms.total, model).items() if gradient is None]
    assert all(name.startswith(tuple(untouched)) for name in without)
    assert all(any(name.startswith(part) for name in without) for part in untouched)


def test_vtc_alone_does_not_run_the_multimodal_encoder():
    model, batch = make_model(), make_batch()
    only_vtc = ObjectiveConfig(vtm=0, mlm=0, pem=PemConfig(weight=0))
    terms = run_objective(model, only_vtc, batch, None)
    dual = DualObjective(model.dual)(batch, alone(batch), 1)
    assert terms.values.keys() == dual.values.keys() == {"vtc"}
    torch.testing.assert_close(terms.total, dual.total)
    gradients = gradients_of(terms.total, model)
    assert {name.split(".")[0] for name, gradient in gradients.items() if gradient is not None} == {"dual"}


def test_all_weights_0_are_refused():
    with pytest.raises(ValueError, match="all four losses have weight 0"):
        ObjectiveConfig(vtc=0, vtm=0, mlm=0, pem=PemConfig(weight=0))


def test_pem_is_0_with_finite_gradients_when_no_sample_is_kept():
    model, batch = make_model(), make_batch()
    labels = replace(make_labels(), keep_B=torch.zeros(SIZE, dtype=torch.bool))
    terms = run_objective(model, ObjectiveConfig(vtc=0, vtm=0, mlm=0), batch, labels)
    assert terms.total.item() == 0
    assert all(g is None or bool((g == 0).all()) for g in gradients_of(terms.total, model).values())


@pytest.mark.parametrize("vtc", [0.0, 1.0])
def test_without_vtc_no_feature_decides_what_is_a_negative(vtc):
    """Untrained similarities would prefer some samples for no reason."""
    batch, config = make_batch(), ObjectiveConfig(vtc=vtc, mlm=0, pem=PemConfig(weight=0))
    found = []
    for seed in range(12):
        model = make_model()
        torch.nn.init.normal_(model.dual.text_projection.weight, std=2.0, generator=torch.Generator().manual_seed(seed))
        found.append(float(run_objective(model, config, batch, None).values["vtm"]))
    assert (len({round(value, 5) for value in found}) == 1) == (vtc == 0)


def test_negatives_are_of_the_own_lane_with_another_video_and_another_text():
    allowed_LNN = allowed_negatives(make_batch())
    assert allowed_LNN.shape == (LANES, 3, 3)
    pairs_of_a_lane = [{tuple(pair) for pair in allowed_NN.nonzero().tolist()} for allowed_NN in allowed_LNN]
    assert pairs_of_a_lane == [{(1, 2), (2, 1)}, {(i, j) for i in range(3) for j in range(3) if i != j}]


def test_counts_are_masked_tokens_pairs_with_a_negative_and_kept_samples():
    batch = make_batch()
    num_masked = sum(label != -100 for row in batch.mlm_labels_BL.tolist() for label in row)
    # Row 0 has no negative: its lane shares its video or its text. The five others have two each.
    assert count_local(batch, make_labels()).tolist() == [num_masked, SIZE + 2 * 5, 4]
    assert count_local(batch, None).tolist()[2] == 0


@pytest.fixture
def double_model(monkeypatch):
    """In float64, pixels too: what is left out must leave no trace, and rounding must not hide one."""
    monkeypatch.setattr(objective_module, "normalise", lambda frames: normalise(frames).double())
    return make_model().double()


def in_micro_batches(model, batch, labels, count):
    """(values, gradients) as the trainer adds them up over micro-batches."""
    counts = GlobalCounts(*count_local(batch, labels))
    objective = PretrainObjective(model, ObjectiveConfig())
    with torch.no_grad():
        video_GE, text_GE = objective(batch, None, 1)
    terms, size = [], len(batch) // count
    for index, micro in enumerate(batch.micro_batches(count)):
        rows = slice(index * size, (index + 1) * size)
        ignore = same_pairs(batch.video_id_B, batch.text_id_B)
        known = GlobalFeatures(video_GE, text_GE, ignore, batch.valid_B, rows.start)
        own = SoftLabels(labels.labels_BM[rows], labels.keep_B[rows])
        terms.append(objective(micro, lambda video, text, known=known: known, count, counts, own))
    values = {name: sum(part.values[name] for part in terms) for name in terms[0].values}
    return values, gradients_of(sum(part.total for part in terms) / count, model)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("invalid", [[1, 4], [0, 3], [3, 4, 5]], ids=["only negatives", "doubles", "a whole lane"])
def test_an_invalid_sample_changes_neither_a_loss_nor_a_gradient(double_model, invalid, count):
    batch, labels = with_invalid(make_batch(), invalid), make_labels()
    less, less_labels = without_invalid(batch, labels)
    assert len(less) == SIZE - len(invalid)
    assert count_local(batch, labels).tolist() == count_local(less, less_labels).tolist()
    expected = run_objective(double_model, ObjectiveConfig(), less, less_labels)
    values, gradients = in_micro_batches(double_model, batch, labels, count)
    for name, value in expected.values.items():
        assert value > 0
        torch.testing.assert_close(values[name], value, rtol=1e-12, atol=1e-12, msg=name)
    for name, gradient in gradients_of(expected.total, double_model).items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-9, atol=1e-12, msg=name)


def test_an_invalid_sample_changes_nothing_in_stage_one_either(double_model):
    batch = with_invalid(make_batch(), [0, 3])
    less, _ = without_invalid(batch, make_labels())
    found, expected = (DualObjective(double_model.dual)(one, alone(one), 1) for one in (batch, less))
    torch.testing.assert_close(found.values["vtc"], expected.values["vtc"], rtol=1e-12, atol=1e-12)
    expected_gradients = gradients_of(expected.total, double_model.dual)
    for name, gradient in gradients_of(found.total, double_model.dual).items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("content", ["as usual", "black and empty"])
def test_a_batch_without_a_valid_sample_is_0_with_gradients_of_0(content, count):
    model, batch, labels = make_model(), with_invalid(make_batch(), range(SIZE)), make_labels()
    if content == "black and empty":
        nothing = {"frames_BTHWC": torch.zeros_like(batch.frames_BTHWC), "mask_BL": torch.zeros_like(batch.mask_BL)}
        batch = replace(batch, **nothing)
    assert count_local(batch, labels).tolist() == [0, 0, 0]
    values, gradients = in_micro_batches(model, batch, labels, count)
    assert {name: value.item() for name, value in values.items()} == dict.fromkeys(("vtc", "vtm", "mlm", "pem"), 0)
    assert all(gradient.eq(0).all() for gradient in gradients.values())


def test_a_black_and_empty_sample_beside_others_leaves_finite_gradients():
    model, batch, labels = make_model(), with_invalid(make_batch(), [2]), make_labels()
    for part in (batch.frames_BTHWC, batch.mask_BL, batch.ids_BL, batch.mlm_ids_BL):
        part[2] = 0
    terms = run_objective(model, ObjectiveConfig(), batch, labels)
    assert all(gradient.isfinite().all() for gradient in gradients_of(terms.total, model).values())


def test_an_invalid_sample_is_nobodys_negative_and_has_none():
    allowed_LNN = allowed_negatives(with_invalid(make_batch(), [1, 4]))
    assert not allowed_LNN[0].any()
    assert allowed_LNN[1].nonzero().tolist() == [[0, 2], [2, 0]]


def test_shares_of_micro_batches_add_up_to_the_whole():
    model, batch, labels = make_model(), make_batch(), make_labels()
    whole = run_objective(model, ObjectiveConfig(), batch, labels)
    values, summed = in_micro_batches(model, batch, labels, 2)
    for name, value in whole.values.items():
        torch.testing.assert_close(values[name], value, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients_of(whole.total, model).items():
        torch.testing.assert_close(summed[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def make_image_batch():
    """Images are clips of one frame."""
    batch = make_batch()
    return replace(batch, kind="image", frames_BTHWC=batch.frames_BTHWC[:, :1])


def test_images_are_trained_as_clips_of_equal_frames():
    model, labels, image = make_model(), make_labels(), make_image_batch()
    clip = replace(image, frames_BTHWC=image.frames_BTHWC.repeat(1, 2, 1, 1, 1))
    found, expected = (run_objective(model, ObjectiveConfig(), batch, labels) for batch in (image, clip))
    for name, value in expected.values.items():
        torch.testing.assert_close(found.values[name], value, rtol=1e-5, atol=1e-6, msg=name)
    expected_gradients = gradients_of(expected.total, model)
    for name, gradient in gradients_of(found.total, model).items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("only", ["vtc", "vtm", "mlm", "pem"])
def test_a_loss_alone_has_the_value_it_has_beside_the_others(only):
    model, batch, labels = make_model(), make_batch(), make_labels()
    everything = run_objective(model, ObjectiveConfig(), batch, labels)
    weights = {name: float(name == only) for name in ("vtc", "vtm", "mlm")}
    config = ObjectiveConfig.model_validate({**weights, "pem": {"weight": float(only == "pem")}})
    terms = run_objective(model, config, batch, labels if only == "pem" else None)
    assert terms.values.keys() == {only}
    torch.testing.assert_close(terms.values[only], everything.values[only], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(terms.total.detach(), terms.values[only])


def without_masks(batch, labels):
    return replace(batch, mlm_ids_BL=batch.ids_BL, mlm_labels_BL=torch.full_like(batch.ids_BL, -100)), labels


def without_confidence(batch, labels):
    return batch, replace(labels, keep_B=torch.zeros(SIZE, dtype=torch.bool))


@pytest.mark.parametrize(
    ("empty", "remove", "head"), [("mlm", without_masks, "mlm_head"), ("pem", without_confidence, "pem_head")]
)
def test_a_loss_without_a_single_sample_is_0_and_disturbs_nothing(empty, remove, head):
    model = make_model()
    usual = run_objective(model, ObjectiveConfig(), make_batch(), make_labels())
    terms = run_objective(model, ObjectiveConfig(), *remove(make_batch(), make_labels()))
    assert terms.values[empty].item() == 0
    for name in usual.values.keys() - {empty}:
        torch.testing.assert_close(terms.values[name], usual.values[name], rtol=1e-5, atol=1e-6)
    gradients = gradients_of(terms.total, model)
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert all(gradient.eq(0).all() for name, gradient in gradients.items() if name.startswith(head))
    assert gradients["dual.video_projection.weight"].abs().max() > 0


@pytest.mark.parametrize("why", ["lanes of one sample", "the same video in a whole lane", "the same text everywhere"])
def test_where_nobody_has_a_negative_vtm_sees_the_positives_alone(why):
    model, batch, labels = make_model(), make_batch(), make_labels()
    if why == "lanes of one sample":
        batch = replace(batch, num_lanes=SIZE, noise_B2N=negative_noise(SEED, 9, range(SIZE), 1))
    elif why == "the same video in a whole lane":
        batch = replace(batch, video_id_B=torch.tensor([1, 1, 1, 2, 2, 2]))
    else:
        batch = replace(batch, text_id_B=torch.ones(SIZE, dtype=torch.int64))
    assert not allowed_negatives(batch).any()
    assert count_local(batch, labels).tolist()[1] == SIZE
    terms = run_objective(model, ObjectiveConfig(), batch, labels)
    slow = Reference(model, batch)
    losses = [-model.vtm_head(slow.fuse(i, i)[0]).log_softmax(0)[1] for i in range(SIZE)]
    torch.testing.assert_close(terms.values["vtm"], (sum(losses) / SIZE).detach(), rtol=1e-5, atol=1e-6)
    gradients = gradients_of(terms.total, model)
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def compiled(objective, monkeypatch, backend):
    """`backend` aot_eager traces as inductor does, and takes seconds."""
    compile_function = torch.compile

    def compile_with_backend(function, *, fullgraph, dynamic):
        assert fullgraph  # A graph break is an error.
        return compile_function(function, fullgraph=True, dynamic=dynamic, backend=backend)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", compile_with_backend)
        objective.compile_parts()
    return objective


@pytest.fixture
def _no_compiled_functions():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_no_compiled_functions")
@pytest.mark.parametrize(
    ("backend", "checkpointing", "depth"),
    [
        ("aot_eager", False, 1),  # to trace a block takes seconds
        pytest.param("aot_eager", True, 2, marks=pytest.mark.slow),
        pytest.param("inductor", False, 2, marks=pytest.mark.slow),
    ],
)
def test_compiled_parts_give_the_same_losses_and_gradients(monkeypatch, backend, checkpointing, depth):
    model, labels = make_model(depth), make_labels()
    batches = [make_batch(), with_invalid(make_batch(), [0, 4])]
    if backend == "aot_eager":
        batches.append(make_image_batch())
    expected = [run_objective(model, ObjectiveConfig(), batch, labels) for batch in batches]
    expected_gradients = [gradients_of(terms.total, model) for terms in expected]
    set_checkpointing(model, checkpointing)
    objective = compiled(PretrainObjective(model, ObjectiveConfig()), monkeypatch, backend)
    for batch, eager, eager_gradients in zip(batches, expected, expected_gradients, strict=True):
        counts = GlobalCounts(*count_local(batch, labels))
        terms = objective(batch, alone(batch), 1, counts, labels)
        assert terms.values.keys() == eager.values.keys()
        for name, value in eager.values.items():
            torch.testing.assert_close(terms.values[name], value, rtol=1e-5, atol=1e-6, msg=name)
        for name, gradient in gradients_of(terms.total, model).items():
            torch.testing.assert_close(gradient, eager_gradients[name], rtol=1e-3, atol=2e-5, msg=name)
        features = objective(batch, None, 1)
        video_BE, text_BE = PretrainObjective(model, ObjectiveConfig())(batch, None, 1)
        torch.testing.assert_close(features[0], video_BE, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(features[1], text_BE, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("_no_compiled_functions")
def test_the_compiled_dual_objective_is_the_same(monkeypatch):
    dual, batch = make_model(depth=1).dual, make_batch()
    expected = DualObjective(dual)(batch, alone(batch), 1)
    terms = compiled(DualObjective(dual), monkeypatch, "aot_eager")(batch, alone(batch), 1)
    torch.testing.assert_close(terms.values["vtc"], expected.values["vtc"], rtol=1e-5, atol=1e-6)
    expected_gradients = gradients_of(expected.total, dual)
    for name, gradient in gradients_of(terms.total, dual).items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-3, atol=1e-5, msg=name)
