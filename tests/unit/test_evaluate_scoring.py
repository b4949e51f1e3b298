"""What becomes of scores: several clips, dual softmax, re-ranking, and how often each part of the model is called."""

from collections import Counter

import pytest
import torch

from alpro_stream.errors import ConfigError, DataError
from alpro_stream.evaluate.aggregate import aggregate
from alpro_stream.evaluate.dual_softmax import dual_softmax
from alpro_stream.evaluate.embed import TextEmbeddings, VideoEmbeddings
from alpro_stream.evaluate.features import Features
from alpro_stream.evaluate.matching import match_odds, matching_scores
from alpro_stream.evaluate.ranking import BothWays, metrics_both_ways, text_to_video_ranks, video_to_text_ranks
from alpro_stream.evaluate.rerank import best_candidates, reranked
from alpro_stream.evaluate.scoring import Scoring, score_all
from alpro_stream.model.alpro import AlproModel, DualEncoder, Heads, ModelConfig
from alpro_stream.testing.configs import TINY_MODEL
from alpro_stream.train.distributed import World

ALONE = World(0, 0, 1, torch.device("cpu"))
NUM_CAPTIONS, NUM_VIDEOS, NUM_TOKENS, WIDTH = 7, 5, 6, 32


@pytest.fixture
def random():
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = AlproModel(ModelConfig.model_validate(TINY_MODEL), 50, Heads(vtm=True)).eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    made.dual.raw_temperature.data.fill_(0.07)
    return made


def features_of(random, num_captions=NUM_CAPTIONS, num_videos=NUM_VIDEOS, num_clips=1, num_tokens=4):
    unit = torch.nn.functional.normalize
    rows = num_videos * num_clips
    videos = VideoEmbeddings(
        torch.randn(rows, num_tokens, WIDTH, generator=random),
        unit(torch.randn(rows, 16, generator=random), dim=1),
    )
    texts = TextEmbeddings(
        torch.randn(num_captions, NUM_TOKENS, WIDTH, generator=random),
        (torch.arange(NUM_TOKENS) < torch.arange(num_captions)[:, None] % NUM_TOKENS + 1).long(),
        unit(torch.randn(num_captions, 16, generator=random), dim=1),
    )
    return Features(videos, texts)


def scored(model, features, num_captions=NUM_CAPTIONS, num_videos=NUM_VIDEOS, **how):
    return score_all(model, features, torch.arange(num_captions), num_videos, Scoring(**how), ALONE)


@pytest.mark.parametrize("how", ["mean", "max", "lse"])
def test_aggregation_against_plain_arithmetic(how):
    logits_K = torch.tensor([0.7, -2.0, 1.5], dtype=torch.float64)
    expected = {"mean": sum(logits_K) / 3, "max": logits_K[2], "lse": sum(value.exp() for value in logits_K).log()}
    assert aggregate(logits_K, how).item() == pytest.approx(expected[how].item(), rel=1e-14)
    assert aggregate(logits_K[:1], how) == logits_K[0]


def plain_match(model, features, caption, rows, how):
    """Logits of each clip from a pass of its own, put together, then the softmax: ClipBERT's order."""
    texts, videos = features.texts, features.videos
    logits_K2 = torch.stack(
        [
            model.match_logits(
                model.multimodal(
                    texts.text_CLD[caption : caption + 1],
                    texts.mask_CL[caption : caption + 1],
                    videos.tokens_VND[row : row + 1],
                )[:, 0]
            )[0].double()
            for row in rows
        ]
    )
    return aggregate(logits_K2.T, how).softmax(dim=0)[1].item()


@pytest.mark.parametrize("how", ["mean", "max", "lse"])
@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_several_clips_are_matched_one_by_one(model, random, how, batch_size):
    features = features_of(random, num_clips=3)
    with torch.no_grad():
        expected = [
            [plain_match(model, features, c, range(3 * v, 3 * v + 3), how) for v in range(NUM_VIDEOS)]
            for c in range(NUM_CAPTIONS)
        ]
    found = scored(model, features, num_clips=3, aggregation=how, batch_size=batch_size)["vtm"].text_to_video
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("how", ["mean", "max", "lse"])
def test_similarities_of_several_clips_are_put_together_as_logits(model, random, how):
    features, temperature = features_of(random, num_clips=3), model.dual.temperature().item()
    scores_CK = features.texts.feature_CE @ features.videos.feature_VE.T
    expected_CV = torch.stack(
        [aggregate(part / temperature, how) * temperature for part in scores_CK.split(3, dim=1)], dim=1
    )
    found = scored(model, features, num_clips=3, aggregation=how, scores=("vtc",))["vtc"].text_to_video
    torch.testing.assert_close(found, expected_CV)


def test_the_same_clip_three_times_is_that_clip(model, random):
    features = features_of(random)
    videos = VideoEmbeddings(*(part.repeat_interleave(3, dim=0) for part in vars(features.videos).values()))
    one = scored(model, features)["vtm"].text_to_video
    for how in ("mean", "max", "lse"):
        found = scored(model, Features(videos, features.texts), num_clips=3, aggregation=how)["vtm"].text_to_video
        torch.testing.assert_close(found, one, rtol=0, atol=1e-6)


def test_dual_softmax_is_the_product_of_both_probabilities(random):
    logits_QN = torch.randn(4, 3, generator=random, dtype=torch.float64)
    given = logits_QN.exp()
    expected = (given / given.sum(dim=1, keepdim=True)) * (given / given.sum(dim=0, keepdim=True))
    torch.testing.assert_close(dual_softmax(logits_QN).exp(), expected)


def test_dual_softmax_takes_a_candidate_that_suits_all_from_all_but_one():
    """The hub, column 0, is the best of every query; with the product each query finds its own."""
    logits_QN = torch.tensor([[5.0, 0.0, 0.0], [4.0, 3.5, 0.0], [4.0, 0.0, 3.5]])
    truth = torch.arange(3)
    assert text_to_video_ranks(logits_QN, truth).tolist() == [1, 2, 2]
    assert text_to_video_ranks(dual_softmax(logits_QN), truth).tolist() == [1, 1, 1]


def test_dual_softmax_of_the_model_is_that_of_its_logits(model, random):
    features = features_of(random)
    plain, dual = scored(model, features), scored(model, features, dual_softmax=True)
    logits = {
        "vtc": plain["vtc"].text_to_video.double() / model.dual.temperature().item(),
        "vtm": plain["vtm"].text_to_video.logit(),
    }
    for name, logits_CV in logits.items():
        torch.testing.assert_close(dual[name].text_to_video, dual_softmax(logits_CV), rtol=0, atol=1e-4)
        assert dual[name].video_to_text.equal(dual[name].text_to_video)


def test_the_best_candidates_of_each_query_and_of_equal_ones_the_first():
    scores_QN = torch.tensor([[0.1, 0.9, 0.5, 0.5], [0.2, 0.2, 0.2, 0.2]])
    best = best_candidates(scores_QN, 2)
    assert best.tolist() == [[False, True, True, False], [True, True, False, False]]
    with pytest.raises(ConfigError, match=r"top_k=5 is more than the 4 there are"):
        best_candidates(scores_QN, 5)


def test_reranked_candidates_come_first_and_the_others_stay_behind_in_order():
    first_QN = torch.tensor([[0.9, 0.8, -0.7, 0.6]])
    second_QN = torch.tensor([[0.0, 0.3, 1.0, 1.0]], dtype=torch.float64)
    found = reranked(first_QN, second_QN, best_candidates(first_QN, 2))
    assert found.argsort(dim=1, descending=True).tolist() == [[1, 0, 3, 2]]


@pytest.mark.parametrize("direction", ["text_to_video", "video_to_text"])
def test_with_all_candidates_reranking_is_exact(model, random, direction):
    """Each direction with as many as it has: with fewer captions than videos, or as many."""
    features = features_of(random, num_captions=5)
    exact, found = (scored(model, features, num_captions=5, top_k=top_k)["vtm"] for top_k in (None, 5))
    assert getattr(found, direction).equal(getattr(exact, direction))


def test_reranking_takes_the_best_of_each_direction_by_vtc_and_orders_them_by_vtm(model, random):
    features = features_of(random)
    exact, found = scored(model, features), scored(model, features, top_k=2)
    vtc, vtm = exact["vtc"].text_to_video, exact["vtm"].text_to_video
    for caption in range(NUM_CAPTIONS):
        best = vtc[caption].topk(2).indices.tolist()
        expected = sorted(best, key=lambda video: -vtm[caption, video].item())
        others = [video for video in vtc[caption].argsort(descending=True).tolist() if video not in best]
        assert found["vtm"].text_to_video[caption].argsort(descending=True).tolist() == expected + others
    for video in range(NUM_VIDEOS):
        best = vtc[:, video].topk(2).indices.tolist()
        expected = sorted(best, key=lambda caption: -vtm[caption, video].item())
        others = [caption for caption in vtc[:, video].argsort(descending=True).tolist() if caption not in best]
        assert found["vtm"].video_to_text[:, video].argsort(descending=True).tolist() == expected + others


def counted(model, work):
    """Rows that go through the multimodal encoder in what is done."""
    rows = Counter()
    handle = model.multimodal.register_forward_pre_hook(lambda _, args: rows.update(pairs=len(args[0])))
    try:
        work()
    finally:
        handle.remove()
    return rows["pairs"]


@pytest.mark.parametrize("num_clips", [1, 2])
def test_every_pair_is_fused_once_and_when_reranking_only_the_chosen(model, random, num_clips):
    features = features_of(random, num_clips=num_clips)
    assert counted(model, lambda: scored(model, features, num_clips=num_clips, batch_size=3)) == 35 * num_clips
    vtc_CV = scored(model, features, num_clips=num_clips, scores=("vtc",))["vtc"].text_to_video
    chosen = best_candidates(vtc_CV, 2) | best_candidates(vtc_CV.T, 2).T
    found = counted(model, lambda: scored(model, features, num_clips=num_clips, top_k=2, batch_size=3))
    assert found == num_clips * int(chosen.sum())
    assert 14 <= int(chosen.sum()) <= 24
    assert counted(model, lambda: scored(model, features, num_clips=num_clips, scores=("vtc",))) == 0


def test_a_thousand_by_a_thousand_fuses_each_pair_once(random):
    """At the smallest size: one layer of width 4, one token on either side."""
    video = {"image_size": 16, "width": 4, "depth": 1, "num_heads": 1, "num_frames": 1}
    text = {"width": 4, "num_layers": 1, "num_multimodal_layers": 1, "num_heads": 1, "intermediate_size": 4}
    tiny = AlproModel(ModelConfig.model_validate({"video": video, "text": text}), 10, Heads(vtm=True)).eval()
    videos = VideoEmbeddings(torch.randn(1000, 1, 4, generator=random), torch.randn(1000, 2, generator=random))
    mask_CL = torch.ones(1000, 1, dtype=torch.int64)
    texts = TextEmbeddings(torch.randn(1000, 1, 4, generator=random), mask_CL, torch.randn(1000, 2, generator=random))
    work = {"features": Features(videos, texts), "num_captions": 1000, "num_videos": 1000, "batch_size": 4096}
    assert counted(tiny, lambda: scored(tiny, **work)) == 1_000_000
    assert counted(tiny, lambda: scored(tiny, **work, top_k=16)) <= 32_000


def test_odds_of_pairs_that_are_not_wanted_are_minus_infinity(model, random):
    features = features_of(random)
    wanted_CV = torch.zeros(NUM_CAPTIONS, NUM_VIDEOS, dtype=torch.bool)
    wanted_CV[2, 3] = wanted_CV[6, 0] = True
    found = match_odds(model, features.texts, features.videos, wanted_CV, batch_size=4)
    expected = matching_scores(model, features.texts, features.videos, batch_size=4)
    assert found.isfinite().equal(wanted_CV)
    torch.testing.assert_close(found[wanted_CV].sigmoid(), expected[wanted_CV], rtol=0, atol=1e-6)


def test_a_dual_encoder_has_no_matching(random):
    dual = DualEncoder(ModelConfig.model_validate(TINY_MODEL), 50)
    with pytest.raises(ConfigError, match="no matching head"):
        scored(dual, features_of(random))


def test_videos_without_a_caption_are_candidates_and_no_queries():
    scores_CV = torch.tensor([[0.9, 0.1, 0.95], [0.2, 0.8, 0.1]])
    truth_C = torch.tensor([0, 1])
    assert text_to_video_ranks(scores_CV, truth_C).tolist() == [2, 1]
    assert video_to_text_ranks(scores_CV, truth_C).tolist() == [1, 1]
    metrics = metrics_both_ways(BothWays(scores_CV, scores_CV), truth_C)
    assert (metrics.text_to_video.num_queries, metrics.text_to_video.num_candidates) == (2, 3)
    assert (metrics.video_to_text.num_queries, metrics.video_to_text.num_candidates) == (2, 2)


def test_weights_that_are_no_use_are_said_to_be_after_reranking_too(model, random):
    features = features_of(random)
    features.videos.feature_VE[1] = torch.nan
    both = scored(model, features, top_k=2)["vtm"]
    with pytest.raises(DataError, match="not finite"):
        metrics_both_ways(both, torch.zeros(NUM_CAPTIONS, dtype=torch.int64))
