"""Files of weights: what is read of them, and what of a stranger's file is refused."""

import os
import pickle

import pytest
import torch
from model_files import assert_equal_parameters, make_model
from safetensors.torch import load_file, save_file

from alpro_stream.errors import CheckpointError
from alpro_stream.model.loading import load_by_name
from alpro_stream.model.weight_files import read_tensors, save_weights

TENSORS = {
    "layer.weight": torch.arange(6.0).view(2, 3) - 2,
    "layer.bias": torch.tensor([0.5, -3.0], dtype=torch.float16),
    "position_ids": torch.arange(4)[None],
}
SUFFIXES = (".safetensors", ".pt", ".pth", ".pyth")


def write(path, tensors):
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)
    return path


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_both_kinds_of_files_give_the_tensors_by_name(tmp_path, suffix):
    found = read_tensors(write(tmp_path / f"weights{suffix}", TENSORS))
    assert_equal_parameters(found, TENSORS)
    assert {name: tensor.dtype for name, tensor in found.items()} == {n: t.dtype for n, t in TENSORS.items()}


def with_prefix(tensors):
    return {f"module.{name}": tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    "wrapped",
    [
        {"epoch": 3, "model_state": TENSORS, "optimizer_state": {"state": {0: torch.ones(2)}}, "cfg": "DEPTH: 12"},
        {"model": TENSORS, "optimizer": {"param_groups": [{"lr": 0.1}]}, "config": {"run": {"seed": 1}}, "epoch": 0},
        {"state_dict": TENSORS, "best_accuracy": 0.7},
        {"model_state_dict": with_prefix(TENSORS)},
        {"module": {"state_dict": TENSORS}},
        with_prefix(TENSORS),
    ],
    ids=["TimeSformer", "LAVIS", "state_dict", "distributed", "nested", "distributed and bare"],
)
def test_wrappers_of_training_programs_are_taken_off(tmp_path, wrapped):
    assert_equal_parameters(read_tensors(write(tmp_path / "weights.pt", wrapped)), TENSORS)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_prefix_that_only_some_names_have_is_a_part_of_the_name(tmp_path, suffix):
    mixed = {"module.weight": torch.ones(1), "bias": torch.zeros(1)}
    assert_equal_parameters(read_tensors(write(tmp_path / f"weights{suffix}", mixed)), mixed)


class Payload:
    """Unpickled by a reader that is not careful, it makes a file."""

    def __init__(self, proof):
        self._proof = proof

    def __reduce__(self):
        return os.system, (f"touch '{self._proof}'",)


@pytest.mark.parametrize("beside_tensors", [False, True])
@pytest.mark.parametrize("is_bare_pickle", [False, True])
def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(tmp_path, is_bare_pickle, beside_tensors):
    path, proof = tmp_path / "weights.pt", tmp_path / "proof"
    values = {"model": {**TENSORS, "extra": Payload(proof)}} if beside_tensors else Payload(proof)
    if is_bare_pickle:
        path.write_bytes(pickle.dumps(values, protocol=2))
    else:
        torch.save(values, path)
    with pytest.raises(CheckpointError, match=r"weights\.pt is no file of plain tensors.*would run code"):
        read_tensors(path)
    assert not proof.exists()
    # It would have: for a reader that is not careful.
    pickle.loads(path.read_bytes()) if is_bare_pickle else torch.load(path, weights_only=False)
    assert proof.exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.3, 0.5, 0.9, 1.0])
def test_a_file_cut_off_anywhere_is_named(tmp_path, suffix, share):
    path = write(tmp_path / f"weights{suffix}", {name: tensor.repeat(3, 50) for name, tensor in TENSORS.items()})
    whole = path.read_bytes()
    for length in {int(share * (len(whole) - 1)), max(0, int(share * (len(whole) - 1)) - 7)}:
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=rf"weights\{suffix}.*(truncated one|is damaged)"):
            read_tensors(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_what_is_no_file_of_weights_is_named(tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    with pytest.raises(CheckpointError, match=rf"no such weights file: .*weights\{suffix}$"):
        read_tensors(path)
    for content in (b"", b"<!DOCTYPE html><title>404</title>", b"\0" * 200, b"\xff" * 200):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"weights\{suffix}"):
            read_tensors(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(CheckpointError, match="no such weights file"):
        read_tensors(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({**TENSORS, "epoch": 3}, r"'epoch' is a int, expected a tensor"),
        ({"model": {**TENSORS, "extra": [1]}}, r"'extra' is a list, expected a tensor"),
        ({"encoder": TENSORS}, r"'encoder' is a dict, expected a tensor"),
        ({7: torch.ones(1)}, "7 is no name, expected weights by name"),
        ([torch.ones(1)], "holds a list, expected weights by name"),
        (torch.ones(1), "holds a Tensor, expected weights by name"),
        ({"state_dict": {}}, "holds no tensors"),
        ({}, "holds no tensors"),
    ],
)
def test_a_file_that_holds_something_else_says_what(tmp_path, content, message):
    with pytest.raises(CheckpointError, match=rf"weights\.pt.*{message}"):
        read_tensors(write(tmp_path / "weights.pt", content))


def test_a_safetensors_file_without_tensors_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="holds no tensors"):
        read_tensors(write(tmp_path / "weights.safetensors", {}))


def test_saved_weights_come_back_exactly_and_stay_tied(tmp_path):
    path = tmp_path / "weights.safetensors"
    model, other = make_model("pretrain", 40), make_model("pretrain", 40, seed=1)
    save_weights(model.state_dict(), path)
    assert_equal_parameters(load_file(path), model.state_dict())
    load_by_name(other, read_tensors(path), "test")
    assert_equal_parameters(other.state_dict(), model.state_dict())
    text_BLD = torch.randn(1, 2, 64)
    assert torch.equal(model.word_logits(text_BLD), other.word_logits(text_BLD))


def test_parameters_and_views_are_saved_by_their_values(tmp_path):
    values = {"parameter": torch.nn.Parameter(torch.randn(2, 3)), "view": torch.arange(6.0).view(2, 3).T}
    save_weights(values, tmp_path / "weights.safetensors")
    assert_equal_parameters(read_tensors(tmp_path / "weights.safetensors"), values)


def test_a_file_that_holds_itself_is_refused(tmp_path):
    found = {"weight": torch.ones(2)}
    found["model"] = found
    torch.save(found, tmp_path / "loop.pt")
    with pytest.raises(CheckpointError, match="'model' is a dict"):
        read_tensors(tmp_path / "loop.pt")


@pytest.mark.parametrize(
    "tensor",
    [torch.ones(2, 2).to_sparse(), torch.ones(2, dtype=torch.complex64), torch.ones(2, dtype=torch.bool)],
)
def test_tensors_that_are_no_weights_are_named(tmp_path, tensor):
    torch.save({"fine": torch.ones(2), "odd.weight": tensor}, tmp_path / "odd.pt")
    with pytest.raises(CheckpointError, match=r"odd\.weight is a torch\.\w+ tensor of torch\.\w+"):
        read_tensors(tmp_path / "odd.pt")
