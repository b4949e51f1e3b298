"""The engine's AdamW, its parameter groups and the schedule against the published training."""

import math

import numpy as np
import pytest
import torch
from parity_files import arrays, assert_close, facts, meta
from torch import nn

from alpro_stream.train.distributed import join_world
from alpro_stream.train.engine import Engine, EngineConfig, OptimizerConfig, parameter_groups
from alpro_stream.train.schedule import learning_rate

SETTINGS = meta("optimiser")["trajectory"]
DECAYS = {"out.no_decay": 0.0, "out.decay": SETTINGS["decay"]}


class TwoTrajectories(nn.Module):
    """The start of both trajectories: a vector, which does not decay, and a matrix, which does."""

    def __init__(self):
        super().__init__()
        start = torch.from_numpy(arrays("optimiser")["in.start"])
        self.bias, self.weight = nn.Parameter(start.clone()), nn.Parameter(start.clone()[None])

    def forward(self, gradient):
        return (self.bias * gradient).sum() + (self.weight[0] * gradient).sum()


@pytest.fixture(scope="module")
def trajectories():
    """What the engine makes of the stored gradients and rates."""
    optimizer = OptimizerConfig(
        betas=SETTINGS["betas"], eps=SETTINGS["eps"], weight_decay=SETTINGS["decay"], max_grad_norm=1e9
    )
    module = TwoTrajectories()
    engine = Engine(module, EngineConfig(), optimizer, join_world(10), rank_batch=1)
    found = {"out.no_decay": [], "out.decay": []}
    for gradient, rate in zip(arrays("optimiser")["in.grads"], SETTINGS["rates"], strict=True):
        engine.backward(engine(torch.from_numpy(gradient)))
        engine.step(rate)
        found["out.no_decay"].append(module.bias.detach().clone())
        found["out.decay"].append(module.weight[0].detach().clone())
    return {name: torch.stack(steps).numpy() for name, steps in found.items()}


def slow_adamw(decay, eps_on_corrected, decay_first):
    """AdamW in float64, spelled out; the authors' has both switches off, torch's and ours both on."""
    (beta1, beta2), eps = SETTINGS["betas"], SETTINGS["eps"]
    value = arrays("optimiser")["in.start"].astype(np.float64)
    first = second = np.zeros_like(value)
    steps = []
    for step, (gradient, rate) in enumerate(zip(arrays("optimiser")["in.grads"], SETTINGS["rates"], strict=True), 1):
        first = beta1 * first + (1 - beta1) * gradient
        second = beta2 * second + (1 - beta2) * gradient.astype(np.float64) ** 2
        correction = math.sqrt(1 - beta2**step)
        root = np.sqrt(second) + eps * (correction if eps_on_corrected else 1)
        if decay_first:
            value = value * (1 - rate * decay)
        value = value - rate * correction / (1 - beta1**step) * first / root
        if not decay_first:
            value = value * (1 - rate * decay)
        steps.append(value)
    return np.stack(steps)


def test_without_decay_the_engine_follows_the_published_optimizer(trajectories):
    assert_close(trajectories["out.no_decay"], arrays("optimiser")["out.no_decay"])


def test_with_decay_too_but_for_its_place_before_the_step(trajectories):
    assert_close(trajectories["out.decay"], arrays("optimiser")["out.decay"], 1e-4)


@pytest.mark.parametrize("name", DECAYS)
def test_the_place_of_eps_and_of_the_decay_are_all_that_differs(trajectories, name):
    """1e-7: rounding of float32. The authors' order and eps give their values, ours give the engine's."""
    assert_close(slow_adamw(DECAYS[name], eps_on_corrected=False, decay_first=False), arrays("optimiser")[name], 1e-7)
    assert_close(trajectories[name], slow_adamw(DECAYS[name], eps_on_corrected=True, decay_first=True), 3e-7)


def test_their_eps_is_ours_over_the_root_of_the_bias_correction():
    """So torch's AdamW with that eps is theirs: 7 times ours at the first step, a tenth more after 90."""
    stored = arrays("optimiser")
    parameter = nn.Parameter(torch.from_numpy(stored["in.start"].astype(np.float64)))
    adamw = torch.optim.AdamW([parameter], betas=SETTINGS["betas"], weight_decay=0.0)
    steps = []
    for step, (gradient, rate) in enumerate(zip(stored["in.grads"], SETTINGS["rates"], strict=True), 1):
        parameter.grad = torch.from_numpy(gradient.astype(np.float64))
        adamw.param_groups[0].update(lr=rate, eps=SETTINGS["eps"] / math.sqrt(1 - SETTINGS["betas"][1] ** step))
        adamw.step()
        steps.append(parameter.detach().clone())
    assert_close(torch.stack(steps), stored["out.no_decay"], 1e-7)


def test_the_defaults_are_the_published_settings():
    published, run, ours = facts()["optimiser"], facts()["runs"]["pretrain"], OptimizerConfig()
    assert (list(ours.betas), ours.eps) == (published["betas"], published["eps"])
    assert ours.learning_rate == run["learning_rate"]
    assert (ours.warmup_ratio, ours.max_grad_norm) == (run["warmup_ratio"], run["clip_norm"])
    assert ours.weight_decay == run["configured_weight_decay"]


def test_the_configured_decay_reaches_matrices_where_theirs_reaches_nothing():
    (theirs,) = meta("optimiser")["parameter_groups_for_a_configured_decay_of_1e_3"]
    assert theirs["weight_decay"] == facts()["runs"]["pretrain"]["effective_weight_decay"] == 0
    module = nn.ModuleDict({"linear": nn.Linear(3, 2), "norm": nn.LayerNorm(2), "words": nn.Embedding(5, 2)})
    module.register_parameter("temperature", nn.Parameter(torch.tensor(0.07)))
    frozen = module["words"].weight.requires_grad_(False)
    decaying, others = parameter_groups(module, OptimizerConfig().weight_decay)
    assert decaying["weight_decay"] == 1e-3
    assert others["weight_decay"] == 0
    assert [id(parameter) for parameter in decaying["params"]] == [id(module["linear"].weight)]
    plain = {id(module["linear"].bias), id(module["norm"].weight), id(module["norm"].bias), id(module.temperature)}
    assert {id(parameter) for parameter in others["params"]} == plain
    # Theirs holds the frozen prompter too; only zero gradients and the absent decay keep it as it is.
    assert meta("optimiser")["parameters_of_the_prompter_in_the_group"] > 0
    assert id(frozen) not in {id(parameter) for group in (decaying, others) for parameter in group["params"]}


@pytest.mark.parametrize(("ratio", "name"), [(0.05, "005"), (0.1, "01")])
def test_learning_rates(ratio, name):
    published = facts()["schedule"][f"learning_rates_1e4_ratio_{name}_total_1000"]
    assert len(published) == 14
    for step, expected in published.items():
        # Updates count from 1. A rate for step 0 is only what theirs shows before the first update.
        if step != "0":
            assert learning_rate(int(step), 1000, 1e-4, ratio) == pytest.approx(expected, rel=1e-12), step
