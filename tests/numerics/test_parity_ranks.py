"""Two ranks against the reference's two processes, on one node and on two, where the reference errs.

Legend: G samples of both ranks, B of one, E projection.
"""

import os

import numpy as np
import pytest
import torch
from parity_files import arrays, assert_close, meta
from reference_models import (
    ONLY_VTC_AND_VTM,
    TOLERANCES,
    batch_of,
    inputs,
    pixels,
    pixels_for_frames,
    reference_model,
    terms_of,
)

from alpro_stream.losses.objective import GlobalCounts, ObjectiveConfig, PretrainObjective, count_local
from alpro_stream.testing.distributed import run_ranks

CASE = "two_ranks_tiny"
RANKS, SIZE = 2, meta("two_ranks")["batch_per_rank"]
LOCAL_RANKS = {"one_node": (0, 1), "two_nodes": (0, 0)}
"""By layout, the local rank of each rank."""
LOSSES = meta("two_ranks")["losses"]

each_layout = pytest.mark.parametrize("layout", LOCAL_RANKS)
each_rank = pytest.mark.parametrize("rank", range(RANKS))


def rows_of(rank):
    return slice(rank * SIZE, (rank + 1) * SIZE)


def rank_batch(layout, rank):
    ids_GL, mask_GL = inputs(CASE, "ids", "mask")
    negatives = inputs(CASE, f"{layout}.rank{rank}.negative_video", f"{layout}.rank{rank}.negative_text")
    return batch_of(ids_GL[rows_of(rank)], mask_GL[rows_of(rank)], negatives, first_row=rank * SIZE)


def all_pixels(dtype):
    return pixels("two_ranks", dtype, RANKS * SIZE)


def losses_of_this_rank(cases):
    """What each layout gives on this rank: its shares of the losses, gradients, and the features of all ranks."""
    # Only here: with DeepSpeed behind them these take seconds, and the ranks have them already.
    from alpro_stream.train.distributed import join_world
    from alpro_stream.train.step import Step

    found = {}
    for layout, dtype in cases:
        os.environ["LOCAL_RANK"] = str(LOCAL_RANKS[layout][int(os.environ["RANK"])])
        world = join_world(60)
        assert (world.local_rank, world.size) == (LOCAL_RANKS[layout][world.rank], RANKS)
        batch = rank_batch(layout, world.rank)
        # The trainer's own way of gathering: it decides which rows are this rank's.
        (gather,) = Step(None, world, 1, seed=0)._gathers([batch])
        counts = GlobalCounts(*world.sum(count_local(batch, None)))
        model = reference_model("retrieval", dtype)
        objective = PretrainObjective(model, ObjectiveConfig.model_validate(ONLY_VTC_AND_VTM))
        with pixels_for_frames(all_pixels(dtype)):
            video_BE, text_BE = objective(batch, None, RANKS)
            terms = objective(batch, gather, RANKS, counts, None)
        terms.total.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        features = gather(video_BE.detach(), text_BE.detach())
        found[layout, dtype] = {
            "values": terms.values,
            "gradients": gradients,
            "features": {"video": features.video_GE, "text": features.text_GE},
        }
    return found


CASES = [(layout, dtype) for layout in LOCAL_RANKS for dtype in TOLERANCES]
each_case = pytest.mark.parametrize(("layout", "dtype"), CASES, ids=str)


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(losses_of_this_rank, RANKS, CASES, preload=("alpro_stream.run",))


def global_value(ranks, layout, dtype, name):
    return sum(found[layout, dtype]["values"][name] for found in ranks)


@each_case
def test_contrastive_loss_is_that_of_one_process_on_any_number_of_nodes(ranks, layout, dtype):
    ours = global_value(ranks, layout, dtype, "vtc")
    assert_close(ours, arrays(CASE)["out.single_process.vtc_loss"], TOLERANCES[dtype])
    if dtype == torch.float64:
        right = [LOSSES[f"out.one_node.rank{rank}.vtc_loss"] for rank in range(RANKS)]
        assert ours.item() == pytest.approx(LOSSES["out.single_process.vtc_loss"], rel=1e-9)
        assert ours.item() == pytest.approx(np.mean(right), rel=1e-9)


@each_case
def test_matching_loss_is_the_mean_of_theirs(ranks, layout, dtype):
    """Given its negatives, theirs is right in both layouts."""
    ours = global_value(ranks, layout, dtype, "vtm")
    expected = np.mean([LOSSES[f"out.{layout}.rank{rank}.vtm_loss"] for rank in range(RANKS)])
    assert_close(ours, expected, TOLERANCES[dtype])


@each_case
@pytest.mark.parametrize("side", ["video", "text"])
def test_features_are_gathered_in_the_order_of_global_ranks(ranks, layout, dtype, side):
    for found in ranks:
        assert_close(found[layout, dtype]["features"][side], arrays(CASE)[f"out.{side}_feat"], TOLERANCES[dtype])


def test_the_mean_gradient_is_that_of_one_process(ranks):
    """Of the contrastive loss over all six pairs and the mean of the matching losses over three each."""
    model = reference_model("retrieval", torch.float64)
    ids_GL, mask_GL = inputs(CASE, "ids", "mask")
    own = [inputs(CASE, f"one_node.rank{r}.negative_video", f"one_node.rank{r}.negative_text") for r in range(RANKS)]
    negatives = [torch.cat([one[side] + rank * SIZE for rank, one in enumerate(own)]) for side in range(2)]
    batch = batch_of(ids_GL, mask_GL, negatives)
    terms_of(model, batch, all_pixels(torch.float64), **ONLY_VTC_AND_VTM).total.backward()
    gradients = [found["one_node", torch.float64]["gradients"] for found in ranks]
    for name, parameter in model.named_parameters():
        if not name.endswith("key.bias"):
            assert_close(sum(one[name] for one in gradients) / RANKS, parameter.grad, 1e-9)


def slow_contrastive_loss(rank, first_target):
    """Of the pairs of one rank among those of both, with the partner of its first pair in column `first_target`."""
    video_GE, text_GE = (torch.from_numpy(arrays(CASE)[f"out.{side}_feat"]).double() for side in ("video", "text"))
    total = 0.0
    for row in range(SIZE):
        for own_GE, other_GE in ((video_GE, text_GE), (text_GE, video_GE)):
            scores_G = own_GE[rank * SIZE + row] @ other_GE.T / 0.07
            total -= scores_G.log_softmax(dim=0)[first_target + row].item()
    return total / (2 * SIZE)


@each_layout
@each_rank
def test_their_contrastive_loss_follows_from_the_local_rank(layout, rank):
    """Columns are in the order of global ranks, their targets begin at batch x local rank."""
    expected = LOSSES[f"out.{layout}.rank{rank}.vtc_loss"]
    # Features are stored rounded, and divided by the temperature.
    assert slow_contrastive_loss(rank, SIZE * LOCAL_RANKS[layout][rank]) == pytest.approx(expected, rel=1e-6)


def test_on_a_second_node_their_targets_are_the_pairs_of_the_first():
    wrong = slow_contrastive_loss(1, 0)
    assert wrong == pytest.approx(LOSSES["out.two_nodes.rank1.vtc_loss"], rel=1e-6)
    assert abs(wrong - LOSSES["out.one_node.rank1.vtc_loss"]) > 1
    assert slow_contrastive_loss(1, SIZE) == pytest.approx(LOSSES["out.one_node.rank1.vtc_loss"], rel=1e-6)


@each_layout
@each_rank
def test_their_matching_loss_follows_from_their_negatives(layout, rank):
    """One process with the pairs of one rank gives it: the mistake is in the choice of the negatives alone."""
    batch = rank_batch(layout, rank)
    with torch.no_grad():
        terms = terms_of(
            reference_model("retrieval", torch.float64), batch, all_pixels(torch.float64), vtc=0.0, **ONLY_VTC_AND_VTM
        )
    assert terms.values["vtm"].item() == pytest.approx(LOSSES[f"out.{layout}.rank{rank}.vtm_loss"], rel=1e-9)
