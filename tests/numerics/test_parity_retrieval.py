"""The retrieval model against the reference: a training step, and the scores that rank."""

from functools import cache

import numpy as np
import pytest
import torch
from parity_files import arrays, assert_close, facts, meta
from reference_models import (
    ONLY_VTC_AND_VTM,
    SIZES,
    TOLERANCES,
    assert_parity,
    batch_of,
    calls_of,
    each_dtype,
    each_output,
    inputs,
    outputs_of,
    pixels,
    reference_model,
    terms_of,
)

from alpro_stream.config import load_config
from alpro_stream.evaluate.embed import TextEmbeddings, VideoEmbeddings
from alpro_stream.evaluate.features import Features
from alpro_stream.evaluate.matching import matching_scores
from alpro_stream.evaluate.rerank import best_candidates
from alpro_stream.evaluate.retrieval import RetrievalConfig
from alpro_stream.evaluate.scoring import Scoring, score_all
from alpro_stream.train.distributed import World

CASE = "retrieval_tiny"


@cache
@torch.no_grad()
def retrieval(dtype):
    model, video_BTCHW = reference_model("retrieval", dtype), pixels("retrieval", dtype)
    batch = batch_of(*inputs(CASE, "ids", "mask"), inputs(CASE, "negative_video", "negative_text"))
    with outputs_of({"out.vtm_logits": model.vtm_head}) as found, calls_of("sample_negatives", "vtm_loss") as calls:
        terms = terms_of(model, batch, video_BTCHW, **ONLY_VTC_AND_VTM)
    assert terms.values.keys() == {"vtc", "vtm"}
    found["out.vtm_labels"] = calls["vtm_loss"][0][0][1]
    sides = ("video", "text")
    for side, ((scores_1NN, allowed_1NN, _), (index_1N, _)) in zip(sides, calls["sample_negatives"], strict=True):
        found[f"in.negative_{side}"] = index_1N[0]
        found[f"out.negative_{side}_weights"] = scores_1NN[0].masked_fill(~allowed_1NN[0], -torch.inf).softmax(dim=1)
    video_BND, video_BE = model.dual.encode_video(video_BTCHW)
    text_CLD, caption_CE = model.dual.encode_text(*inputs(CASE, "caption_ids", "caption_mask"))
    scores_VC = matching_scores(model, *embeddings(video_BND, video_BE, text_CLD, caption_CE), batch_size=4).T
    return found | {
        "out.vtc_loss": terms.values["vtc"],
        "out.vtm_loss": terms.values["vtm"],
        "total": terms.total,
        "out.video_feat": video_BE,
        "out.text_feat": model.dual.encode_text(batch.ids_BL, batch.mask_BL)[1],
        "out.inference_logits": pair_logits(model, text_CLD, video_BND),
        "out.inference_sim": video_BE @ caption_CE.T / model.dual.temperature(),
        "out.inference_score": scores_VC.to(dtype),
        "out.inference_score_4_decimals": scores_VC.to(dtype).round(decimals=4),
    }


def embeddings(video_VND, video_VE, text_CLD, text_CE):
    return TextEmbeddings(text_CLD, inputs(CASE, "caption_mask")[0], text_CE), VideoEmbeddings(video_VND, video_VE)


def pair_logits(model, text_CLD, video_VND):
    """Of every video with every caption, one pair at a time, (V, C, 2)."""
    (mask_CL,) = inputs(CASE, "caption_mask")
    rows = [
        [
            model.match_logits(model.multimodal(text_CLD[c : c + 1], mask_CL[c : c + 1], video_1ND)[:, 0])[0]
            for c in range(len(text_CLD))
        ]
        for video_1ND in video_VND.split(1)
    ]
    return torch.stack([torch.stack(row) for row in rows])


@each_dtype
@each_output(CASE)
def test_retrieval(dtype, output):
    assert_parity(retrieval(dtype), CASE, output, dtype)


@each_dtype
@pytest.mark.parametrize("side", ["video", "text"])
def test_the_injected_negatives_are_taken(dtype, side):
    assert np.array_equal(retrieval(dtype)[f"in.negative_{side}"], arrays(CASE)[f"in.negative_{side}"])


def test_losses_in_full_precision():
    found, published = retrieval(torch.float64), meta("retrieval")
    for name in ("vtc_loss", "vtm_loss"):
        assert found[f"out.{name}"].item() == pytest.approx(published[name], rel=1e-9)
    assert found["total"].item() == pytest.approx(published["vtc_loss"] + published["vtm_loss"], rel=1e-9)


def test_scores_are_the_second_column_of_the_softmax_and_not_rounded():
    """Theirs has four decimals, which makes ties; ranks can differ from theirs in those alone."""
    found = retrieval(torch.float64)
    assert_close(found["out.inference_score"], found["out.inference_logits"].softmax(dim=2)[:, :, 1], 1e-12)
    assert not torch.equal(found["out.inference_score"], found["out.inference_score_4_decimals"])
    theirs = torch.from_numpy(arrays(CASE)["out.inference_score_4_decimals"])
    order_VC = found["out.inference_score"].argsort(dim=1)
    assert (theirs.gather(1, order_VC).diff(dim=1) >= 0).all()


def test_a_whole_scoring_gives_their_similarities_and_scores():
    """What `alpro evaluate` computes from features, in both directions; theirs has a row a video."""
    found = all_scores()
    vtc_CV, vtm_CV = found["vtc"].text_to_video, found["vtm"].text_to_video
    temperature = reference_model("retrieval", torch.float64).dual.temperature().item()
    tolerance = TOLERANCES[torch.float64]
    assert_close(vtc_CV / temperature, arrays(CASE)["out.inference_sim"].T, tolerance)
    assert_close(vtm_CV, arrays(CASE)["out.inference_score"].T, tolerance)
    assert all(both.video_to_text.equal(both.text_to_video) for both in found.values())


def test_the_candidates_of_reranking_keep_their_scores():
    found, theirs = all_scores(top_k=2)["vtm"], arrays(CASE)["out.inference_score"].T
    for scores_CV, dim in ((found.text_to_video, 1), (found.video_to_text, 0)):
        chosen_CV = scores_CV >= 0
        assert (chosen_CV.sum(dim=dim) == 2).all()
        assert_close(scores_CV[chosen_CV], theirs[chosen_CV.numpy()], TOLERANCES[torch.float64])
        similarity_CV = torch.from_numpy(arrays(CASE)["out.inference_sim"].T)
        assert chosen_CV.equal(best_candidates(similarity_CV.movedim(dim, 1), 2).movedim(1, dim))


@pytest.mark.parametrize(
    ("name", "run"),
    [("msrvtt_1ka", "msrvtt_retrieval"), ("msrvtt_full", "msrvtt_retrieval"), ("didemo", "didemo_retrieval")],
)
def test_configurations_look_at_as_much_as_the_published_runs(name, run):
    config, published = load_config(RetrievalConfig, f"configs/evaluate/{name}.yaml"), facts()["runs"][run]
    assert (config.num_frames, config.num_tokens) == (published["frames"], published["text_length"])
    assert (config.num_clips, config.dual_softmax, config.captions == "joined") == (1, False, name == "didemo")
    assert (config.mode == "exact") == (name != "msrvtt_full")


@torch.no_grad()
def all_scores(**how):
    model = reference_model("retrieval", torch.float64)
    text_CLD, text_CE = model.dual.encode_text(*inputs(CASE, "caption_ids", "caption_mask"))
    texts, videos = embeddings(*model.dual.encode_video(pixels("retrieval", torch.float64)), text_CLD, text_CE)
    alone = World(0, 0, 1, torch.device("cpu"))
    text_C = torch.arange(SIZES["captions"])
    return score_all(model, Features(videos, texts), text_C, SIZES["batch"], Scoring(**how), alone)


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_how_many_pairs_go_at_once_does_not_matter(batch_size):
    """One caption by itself, on which theirs fails, and a last batch that is not full, included."""
    model = reference_model("retrieval", torch.float32)
    with torch.no_grad():
        text_CLD, text_CE = model.dual.encode_text(*inputs(CASE, "caption_ids", "caption_mask"))
        video_VND, video_VE = model.dual.encode_video(pixels("retrieval", torch.float32))
    texts, videos = embeddings(video_VND, video_VE, text_CLD, text_CE)
    expected = arrays(CASE)["out.inference_score"].T
    assert_close(matching_scores(model, texts, videos, batch_size), expected, TOLERANCES[torch.float32])
    one = TextEmbeddings(texts.text_CLD[:1], texts.mask_CL[:1], texts.feature_CE[:1])
    assert_close(matching_scores(model, one, videos, batch_size), expected[:1], TOLERANCES[torch.float32])
    assert expected.shape == (SIZES["captions"], SIZES["batch"])
