"""The DeepSpeed engine on one rank: its settings, its precision, its files."""

import os

import pytest
import torch
from torch import nn

from alpro_stream.errors import CheckpointError
from alpro_stream.model.alpro import DualEncoder, ModelConfig
from alpro_stream.testing.configs import TINY_MODEL
from alpro_stream.testing.distributed import run_ranks
from alpro_stream.train.checkpoint import write_mark
from alpro_stream.train.distributed import join_world
from alpro_stream.train.engine import Engine, EngineConfig, OptimizerConfig, deepspeed_config, parameter_groups


class Regression(nn.Module):
    """A model whose loss is simple and whose inner number format can be seen."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 1)
        self.inner = None

    def forward(self, values, factor=1.0):
        hidden = self.first(values)
        self.inner = hidden.dtype
        return self.second(hidden.relu()).float().square().mean() * factor


VALUES = torch.arange(8.0).view(2, 4) / 8


def make_engine(stage=1, module=None, **config):
    settings = EngineConfig(zero_stage=stage, **config)
    return Engine(module or Regression(), settings, OptimizerConfig(), join_world(10), rank_batch=2)


def update(engine, rate=0.01, factor=1.0):
    loss = engine(VALUES, factor)
    engine.backward(loss)
    engine.step(rate)
    return loss.item()


def test_biases_norms_and_the_temperature_do_not_decay():
    model = DualEncoder(ModelConfig.model_validate(TINY_MODEL), 30)
    model.video_projection.weight.requires_grad_(False)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decaying, others = parameter_groups(model, 0.05)
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.05, 0.0)
    decaying, others = ({names[id(p)] for p in group["params"]} for group in (decaying, others))
    assert {"raw_temperature", "video_encoder.norm.weight", "text_projection.bias"} <= others
    assert {"text_projection.weight", "text_encoder.embeddings.word_embeddings.weight"} <= decaying
    assert all(name.endswith(("bias", "raw_temperature")) or "norm" in name.lower() for name in others)
    assert decaying | others == set(names.values()) - {"video_projection.weight"}


def test_deepspeed_settings_repeat_nothing():
    settings = deepspeed_config(EngineConfig(zero_stage=2, num_micro_batches=4), 20.0, 32)
    assert settings["train_micro_batch_size_per_gpu"] == 8
    assert settings["gradient_accumulation_steps"] == 4
    assert settings["gradient_clipping"] == 20.0
    assert settings["zero_optimization"]["stage"] == 2
    assert "optimizer" not in settings


def test_bf16_is_autocast_inside_over_float32_parameters():
    for precision, inner in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        engine = make_engine(precision=precision)
        losses = [update(engine) for _ in range(3)]
        assert losses == sorted(losses, reverse=True)
        assert engine.module.inner == inner
        assert {parameter.dtype for parameter in engine.full_parameters().values()} == {torch.float32}
        engine.features(VALUES)
        assert engine.module.inner == inner


def try_stages(directory):
    """What an engine of each stage does; in a process of its own, as ZeRO 3 replaces functions of torch for good."""
    os.environ["TORCH_EXTENSIONS_DIR"] = str(directory / "compiled")
    return {stage: try_stage(stage, directory / str(stage)) for stage in (0, 1, 2, 3)}


def try_stage(stage, directory):
    directory.mkdir()
    engine = make_engine(stage)
    parameters = [engine.full_parameters()]
    update(engine, rate=0.0, factor=100.0)
    norm = engine.gradient_norm()
    parameters.append(engine.full_parameters())
    update(engine, rate=0.01)
    parameters.append(engine.full_parameters())
    engine.save(directory)
    write_mark(directory)
    goes_on = [update(engine) for _ in range(3)]
    other = make_engine(stage)
    other.load(directory)
    return {"norm": norm, "parameters": parameters, "goes on": goes_on, "resumed": [update(other) for _ in range(3)]}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("engine")


@pytest.fixture(scope="module")
def tried(directory):
    (found,) = run_ranks(try_stages, 1, directory, preload=("alpro_stream.run",))
    return found


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_learning_rate_and_the_gradient_norm_are_those_of_the_step(tried, stage):
    plain = Regression()
    (100 * plain(VALUES)).backward()
    norm = torch.cat([parameter.grad.flatten() for parameter in plain.parameters()]).norm().item()
    assert norm > 1
    assert tried[stage]["norm"] == pytest.approx(norm, rel=1e-5)
    first, at_rate_0, moved = tried[stage]["parameters"]
    assert first.keys() == dict(plain.named_parameters()).keys()
    assert all(torch.equal(at_rate_0[name], first[name]) for name in first)
    # Adam's step is about the learning rate.
    assert max((moved[name] - first[name]).abs().max().item() for name in first) == pytest.approx(0.01, rel=0.6)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_saved_and_loaded_it_goes_on_as_if_nothing_had_happened(tried, directory, stage):
    assert len(set(tried[stage]["goes on"])) == 3
    assert tried[stage]["resumed"] == tried[stage]["goes on"]
    assert not list((directory / str(stage)).glob("*.py"))


def test_nothing_was_compiled(tried, directory):
    assert not list((directory / "compiled").rglob("*.so"))


def test_an_engine_state_that_is_not_there_or_of_another_model_is_refused(tmp_path):
    engine = make_engine()
    with pytest.raises(CheckpointError, match="engine state"):
        engine.load(tmp_path / "nothing")
    engine.save(tmp_path)
    write_mark(tmp_path)
    other = Regression()
    other.first = nn.Linear(4, 9)
    other.second = nn.Linear(9, 1)
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        make_engine(module=other).load(tmp_path)


def test_a_write_that_fails_is_raised_after_deepspeed_is_done(tmp_path):
    engine = make_engine()
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "mp_rank_00_model_states.pt").mkdir()
    with pytest.raises(OSError, match="mp_rank_00_model_states"):
        engine.save(tmp_path)
    (tmp_path / "engine" / "mp_rank_00_model_states.pt").rmdir()
    engine.save(tmp_path)


class Noticed:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self._path = str(path)

    def __reduce__(self):
        return os.mkdir, (self._path,)


def test_nothing_is_unpickled_unless_the_digests_hold(tmp_path):
    checkpoint, noticed = tmp_path / "step-000001", tmp_path / "noticed"
    engine = make_engine()
    engine.save(checkpoint)
    write_mark(checkpoint)
    (state,) = (checkpoint / "engine").glob("*_optim_states.pt")
    torch.save({"optimizer_state_dict": Noticed(noticed)}, state)
    with pytest.raises(CheckpointError, match=rf"engine/{state.name} is damaged: .*remove .*step-000001 to go on"):
        make_engine().load(checkpoint)
    assert not noticed.exists()
    # With a mark that says so, it is read.
    write_mark(checkpoint)
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        make_engine().load(checkpoint)
    assert noticed.exists()


@pytest.mark.parametrize("stage", [0, 1])
def test_the_optimizer_settings_are_those_of_the_configuration_after_a_load_too(tmp_path, stage):
    engine = make_engine(stage)
    update(engine)
    engine.save(tmp_path)
    write_mark(tmp_path)
    settings = OptimizerConfig(weight_decay=0.5, betas=(0.8, 0.9), eps=1e-4)
    other = Engine(Regression(), EngineConfig(zero_stage=stage), settings, join_world(10), rank_batch=2)
    other.load(tmp_path)
    groups = other._engine.optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]
    assert all((group["betas"], group["eps"], group["fused"]) == ((0.8, 0.9), 1e-4, True) for group in groups)
