"""The count of operations against hand calculations, and against torch's own counter of what is executed."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from alpro_stream.model.alpro import AlproModel, Heads, ModelConfig
from alpro_stream.model.operations import (
    answering_operations,
    contrastive_operations,
    count_parameters,
    peak_per_s,
    pretraining_operations,
    retrieval_operations,
    step_operations,
    video_operations,
)
from alpro_stream.model.text_encoder import TextEncoderConfig
from alpro_stream.model.video_encoder import VideoEncoderConfig

BASE = ModelConfig()
LENGTH, VOCAB, ENTITIES = 30, 30522, 1000
SMALL = ModelConfig(
    video=VideoEncoderConfig(image_size=48, num_frames=3, width=32, depth=2, num_heads=2, mlp_ratio=3.0),
    text=TextEncoderConfig(width=32, num_layers=2, num_multimodal_layers=3, num_heads=2, intermediate_size=48),
    projection_size=8,
)


def test_base_video_encoder_by_hand():
    # 4 frames of 14 x 14 patches: 784 patch tokens, 788 with a CLS for each frame, 785 with one.
    embedding = 784 * 2 * (3 * 16 * 16) * 768
    time = 784 * 2 * 5 * 768 * 768 + 784 * 4 * 4 * 768
    space = 788 * 2 * 4 * 768 * 768 + 788 * 4 * 197 * 768
    mlp = 785 * 2 * 2 * 768 * 3072
    assert video_operations(BASE) == embedding + 12 * (time + space + mlp)
    assert video_operations(BASE) == pytest.approx(195.7e9, rel=1e-3)


def test_base_step_by_hand():
    counted = pretraining_operations(BASE, LENGTH, VOCAB, Heads.of("pretrain", ENTITIES))

    def layer(length):  # Four square products, the attention, the two products of the MLP.
        return length * (4 * 2 * 768 * 768 + 2 * 2 * length * 768 + 2 * 2 * 768 * 3072)

    assert counted.text == 2 * 6 * layer(30)
    assert counted.fusion == 4 * 6 * layer(30 + 197)
    assert counted.backward == 2 * counted.forward
    assert counted.step == 3 * (counted.video + counted.text + counted.fusion + counted.heads) + counted.prompter
    assert counted.step == pytest.approx(1.0466e12, rel=1e-3)


def test_an_image_that_is_encoded_once_costs_a_frame():
    # Attention over one frame is as much cheaper, so a little less than a quarter.
    assert video_operations(BASE, num_frames=1) == pytest.approx(video_operations(BASE) / 4, rel=1e-2)


def executed(function):
    # As plain products: torch does not count what its fused attention does on a CPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        function()
    return counter.get_total_flops()


def test_formula_equals_what_the_parts_execute():
    model = AlproModel(SMALL, vocab_size=50, heads=Heads.of("pretrain", 7)).eval()
    counted = pretraining_operations(SMALL, 5, 50, Heads.of("pretrain", 7))
    video = torch.randn(1, 3, 3, 48, 48)
    ids, mask = torch.zeros(1, 5, dtype=torch.int64), torch.ones(1, 5)
    # Two projections that follow each other are multiplied first, weights and bias, in place of one over 27 tokens.
    saved = SMALL.video.depth * 2 * (27 * 32**2 - 32**3 - 32**2)
    assert executed(lambda: model.dual.video_encoder(video)) == counted.video - saved
    assert executed(lambda: model.dual.text_encoder(ids, mask)) == counted.text / 2
    text_BLD, video_BND = torch.randn(1, 5, 32), torch.randn(1, 10, 32)
    assert executed(lambda: model.multimodal(text_BLD, mask, video_BND)) == counted.fusion / 4
    heads = [
        executed(lambda: model.dual.video_projection(video_BND[:, 0])),
        2 * executed(lambda: model.dual.text_projection(text_BLD[:, 0])),
        3 * executed(lambda: model.match_logits(text_BLD[:, 0])),
        executed(lambda: model.word_logits(text_BLD)),
        executed(lambda: model.entity_logits(text_BLD[:, 0])),
    ]
    assert sum(heads) == counted.heads


def test_fine_tuning_fuses_three_pairs_or_one():
    model = AlproModel(SMALL, vocab_size=50, heads=Heads.of("question_answering", num_answers=9)).eval()
    full = pretraining_operations(SMALL, 5, 50, Heads.of("pretrain", 7))
    retrieval, answering = retrieval_operations(SMALL, 5), answering_operations(SMALL, 5, 9)
    assert (retrieval.video, answering.video) == (full.video, full.video)
    assert (retrieval.text, answering.text) == (full.text / 2, full.text / 2)
    assert (retrieval.fusion, answering.fusion) == (full.fusion * 3 / 4, full.fusion / 4)
    assert executed(lambda: model.answer_logits(torch.randn(1, 32))) == answering.heads
    matching = AlproModel(SMALL, vocab_size=50, heads=Heads.of("retrieval")).eval()
    heads = [
        executed(lambda: matching.dual.video_projection(torch.randn(1, 32))),
        executed(lambda: matching.dual.text_projection(torch.randn(1, 32))),
        3 * executed(lambda: matching.match_logits(torch.randn(1, 32))),
    ]
    assert sum(heads) == retrieval.heads


def test_backward_is_twice_the_forward():
    layer = AlproModel(SMALL, vocab_size=50, heads=Heads.of("retrieval")).multimodal.layers[0]
    tokens = torch.randn(4, 15, 32, requires_grad=True)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        fused = layer(tokens, None)
        forward = counter.get_total_flops()
        fused.sum().backward()
    assert counter.get_total_flops() == 3 * forward


def test_parameters_of_the_published_model():
    with torch.device("meta"):
        model = AlproModel(BASE, VOCAB, Heads.of("pretrain", ENTITIES))
    counts = count_parameters(model)
    assert counts["total"] == sum(count for name, count in counts.items() if name != "total")
    # The embeddings are shared with the MLM head and count once.
    block = 3 * 2 * 768 + 2 * (768 * 2304 + 2304 + 768 * 768 + 768) + 768 * 768 + 768 + 2 * 768 * 3072 + 3072 + 768
    video = 12 * block + 768 * 769 + 768 + 197 * 768 + 4 * 768 + 2 * 768
    layer = 4 * (768 * 768 + 768) + 2 * 768 * 3072 + 3072 + 768 + 4 * 768
    text = 6 * layer + (30522 + 512 + 2) * 768 + 2 * 768
    assert counts["dual"] == video + text + 2 * (768 * 256 + 256) + 1
    assert counts["multimodal"] == 6 * layer
    assert counts["total"] == pytest.approx(235.0e6, rel=0.01)


@pytest.mark.parametrize(
    ("device", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA A10G", 70),
    ],
)
def test_the_peak_is_that_of_the_device(device, tflops):
    assert peak_per_s(device) == tflops * 1e12


@pytest.mark.parametrize("device", ["NVIDIA L40", "NVIDIA A10", "NVIDIA A1000", "NVIDIA GeForce RTX 4090", ""])
def test_devices_that_only_sound_alike_have_no_peak(device):
    assert peak_per_s(device) is None


def test_what_is_frozen_has_no_backward_pass():
    def of(**changes):
        return step_operations("retrieval", SMALL, 6, vocab_size=50, **changes)

    whole = retrieval_operations(SMALL, 6)
    assert of() == whole.step == 3 * whole.forward
    assert of() - of(frozen=["video_encoder"]) == 2 * whole.video
    assert of() - of(frozen=["video_encoder", "text_encoder"]) == 2 * (whole.video + whole.text)


def test_each_task_has_its_step():
    sizes = {"vocab_size": 50, "num_entities": 7, "num_answers": 5}
    assert step_operations("prompter", SMALL, 6, **sizes) == contrastive_operations(SMALL, 6).step
    assert step_operations("question_answering", SMALL, 6, **sizes) == answering_operations(SMALL, 6, 5).step
    pretrain = pretraining_operations(SMALL, 6, 50, Heads.of("pretrain", 7))
    assert step_operations("pretrain", SMALL, 6, **sizes) == pretrain.step
    once = SMALL.model_copy(update={"video": SMALL.video.model_copy(update={"still": "once"})})
    assert step_operations("prompter", once, 6, is_image=True, **sizes) == contrastive_operations(once, 6, 1).step
