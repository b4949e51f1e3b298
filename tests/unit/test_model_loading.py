"""Weights by name into a model: what is reported, what is refused, and what is resized."""

import pytest
import torch
from model_files import assert_equal_parameters, parameters_of
from torch import nn

from alpro_stream.errors import CheckpointError
from alpro_stream.model.loading import groups, load_by_name, nearest_frames, some

GRID, FRAMES, WIDTH = 4, 3, 6


class Small(nn.Module):
    """A part of every kind that is treated in a way of its own."""

    def __init__(self, grid=GRID, frames=FRAMES, width=WIDTH):
        super().__init__()
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + grid**2, width))
        self.time_embed = nn.Parameter(torch.randn(1, frames, width))
        self.layer = nn.Linear(width, 2)
        self.head = nn.Linear(width, 5)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def model():
    return Small()


def test_everything_is_copied_and_reported(model):
    found = parameters_of(Small())
    report = load_by_name(model, found, "weights.pt", skipped=("prompter.b", "temp", "prompter.a"))
    assert_equal_parameters(model.state_dict(), found)
    assert report.source == "weights.pt"
    assert set(report.loaded) == found.keys()
    assert (report.resized, report.missing) == ((), ())
    assert report.skipped == ("prompter.a", "prompter.b", "temp")
    assert str(report) == (
        "weights.pt: 6 parameters loaded, 0 resized (none), 3 of the source skipped (prompter.* (2), temp), "
        "0 start fresh (none)"
    )


def test_the_report_counts_every_parameter_once_on_one_line(model):
    found = parameters_of(Small(grid=2, frames=5))
    del found["head.weight"], found["head.bias"]
    report = load_by_name(model, found, "weights.pt", fresh=("head",))
    assert report.loaded == ("layer.weight", "layer.bias")
    assert report.resized == ("pos_embed (1, 5, 6) -> (1, 17, 6)", "time_embed (1, 5, 6) -> (1, 3, 6)")
    assert report.missing == ("head.weight", "head.bias")
    assert str(report) == (
        "weights.pt: 2 parameters loaded, 2 resized (pos_embed (1, 5, 6) -> (1, 17, 6), time_embed (1, 5, 6) -> "
        "(1, 3, 6)), 0 of the source skipped (none), 2 start fresh (head.* (2))"
    )


def test_values_of_another_precision_are_copied_into_the_models_own(model):
    found = {name: tensor.half() for name, tensor in parameters_of(Small(grid=2)).items()}
    load_by_name(model, found, "weights.pt")
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
    assert torch.equal(model.layer.weight, found["layer.weight"].float())


REFUSED = {
    "missing": (lambda w: w.pop("layer.bias"), r"weights\.pt: layer\.bias not in it"),
    "several missing": (
        lambda w: [w.pop(name) for name in list(w)[:5]],
        r"pos_embed, time_embed, layer\.weight and 2 more not in it",
    ),
    "unknown": (lambda w: w.update(extra=torch.zeros(1)), r"weights\.pt: the model has no place for extra;"),
    "several unknown": (
        lambda w: w.update({f"x{number}.bias": torch.zeros(1) for number in range(9)}),
        r"no place for x0\.bias, x1\.bias, x2\.bias and 6 more",
    ),
    "other shape": (
        lambda w: w.update({"head.weight": torch.zeros(4, WIDTH)}),
        r"weights\.pt: head\.weight has shape \(4, 6\) and the model expects \(5, 6\)",
    ),
    "as many values, other shape": (
        lambda w: w.update({"head.weight": torch.zeros(WIDTH, 5)}),
        r"head\.weight has shape \(6, 5\) and the model expects \(5, 6\)",
    ),
    "not a number": (lambda w: w["head.bias"].fill_(torch.nan), r"weights\.pt: head\.bias has values .* not finite"),
    "infinite": (lambda w: w["head.bias"][1:2].fill_(-torch.inf), r"head\.bias has values that are not finite"),
    "not a number, resized": (
        lambda w: w.update(time_embed=torch.full((1, 7, WIDTH), torch.nan)),
        r"time_embed has values that are not finite",
    ),
    "another width of pos_embed": (
        lambda w: w.update(pos_embed=torch.zeros(1, 10, 7)),
        r"pos_embed has shape \(1, 10, 7\) and the model expects \(1, 17, 6\)",
    ),
    "another width of time_embed": (
        lambda w: w.update(time_embed=torch.zeros(1, 4, 7)),
        r"time_embed has shape \(1, 4, 7\) and the model expects \(1, 3, 6\)",
    ),
    "no square of patches": (
        lambda w: w.update(pos_embed=torch.zeros(1, 9, WIDTH)),
        r"pos_embed has shape \(1, 9, 6\) and the model expects \(1, 17, 6\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_named_and_nothing_is_changed(model, case):
    change, message = REFUSED[case]
    found, before = parameters_of(Small()), parameters_of(model)
    change(found)
    with pytest.raises(CheckpointError, match=message):
        load_by_name(model, found, "weights.pt")
    assert_equal_parameters(model.state_dict(), before)


def test_only_what_was_declared_fresh_may_be_missing(model):
    before, found = parameters_of(model), parameters_of(Small())
    del found["head.weight"], found["head.bias"]
    with pytest.raises(CheckpointError, match=r"head\.weight, head\.bias not in it"):
        load_by_name(model, found, "weights.pt")
    with pytest.raises(CheckpointError, match=r"head\.weight, head\.bias not in it"):
        load_by_name(model, found, "weights.pt", fresh=("layer",))
    load_by_name(model, found, "weights.pt", fresh=("head", "layer"))
    assert_equal_parameters(model.state_dict(), {**before, **found})
    del found["layer.weight"]
    with pytest.raises(CheckpointError, match=r"weights\.pt: layer\.weight not in it"):
        load_by_name(model, found, "weights.pt", fresh=("head",))


@pytest.mark.parametrize("grid", [2, 7])
def test_position_embeddings_are_resized_in_two_dimensions(model, grid):
    found = parameters_of(Small(grid=grid))
    down, across = torch.meshgrid(torch.linspace(0, 1, grid), torch.linspace(0, 1, grid), indexing="ij")
    # The first half of the numbers grows along the columns alone, the second half along the rows.
    found["pos_embed"][0, 1:, :3] = across.flatten()[:, None]
    found["pos_embed"][0, 1:, 3:] = down.flatten()[:, None]
    load_by_name(model, found, "weights.pt")
    patches_HWD = model.pos_embed.detach()[0, 1:].view(GRID, GRID, WIDTH)
    torch.testing.assert_close(patches_HWD[..., :3], patches_HWD[:1, :, :3].expand(GRID, -1, -1))
    torch.testing.assert_close(patches_HWD[..., 3:], patches_HWD[:, :1, 3:].expand(-1, GRID, -1))
    assert (patches_HWD[0, :, 0].diff() > 0).all()
    assert (patches_HWD[:, 0, 3].diff() > 0).all()
    assert torch.equal(model.pos_embed[:, 0], found["pos_embed"][:, 0])


@pytest.mark.parametrize(
    ("frames", "num_frames", "taken"),
    [
        (4, 8, [0, 0, 1, 1, 2, 2, 3, 3]),
        (8, 4, [0, 2, 4, 6]),
        (3, 4, [0, 0, 1, 2]),
        (4, 3, [0, 1, 2]),
        (4, 1, [0]),
        (1, 3, [0, 0, 0]),
    ],
)
def test_time_embeddings_take_the_nearest_frame(frames, num_frames, taken):
    found, model = parameters_of(Small(frames=frames)), Small(frames=num_frames)
    load_by_name(model, found, "weights.pt")
    assert torch.equal(model.time_embed, found["time_embed"][:, taken])
    interpolated = nn.functional.interpolate(found["time_embed"].mT, size=num_frames, mode="nearest").mT
    assert torch.equal(nearest_frames(found["time_embed"], num_frames), interpolated)


def test_only_embeddings_of_positions_and_of_time_are_resized():
    class Other(nn.Module):
        def __init__(self, length):
            super().__init__()
            self.queries = nn.Parameter(torch.randn(1, length, WIDTH))

    with pytest.raises(CheckpointError, match=r"queries has shape \(1, 10, 6\) and the model expects \(1, 17, 6\)"):
        load_by_name(Other(17), parameters_of(Other(10)), "weights.pt")


def test_lists_of_names_stay_short():
    names = [f"layer{number}.weight" for number in range(5)]
    assert some(names[:3]) == "layer0.weight, layer1.weight, layer2.weight"
    assert some(names) == "layer0.weight, layer1.weight, layer2.weight and 2 more"
    assert some([]) == groups([]) == "none"
    assert groups(["temp", "a.x", "b.x", "a.y.z"]) == "temp, a.* (2), b.*"
