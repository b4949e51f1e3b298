"""The reference vectors under `parity`, and the one way in which all parity tests compare with them."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import torch

PARITY = Path(__file__).parent / "parity"


@cache
def cases():
    """All of cases.json: sizes of the small model, shapes of its weights, and the cases."""
    return json.loads((PARITY / "cases.json").read_text())


@cache
def facts():
    """All of facts.json: hyper-parameters, schedules and distributions of the published training."""
    return json.loads((PARITY / "facts.json").read_text())


def meta(case):
    """What cases.json holds of a case besides its arrays: scalars, names, settings."""
    return cases()["cases"][case]["meta"]


@cache
def arrays(name):
    """The arrays of ``<name>.npz`` by name: `in.*` inputs, `out.*` what the reference gave, `paper.*` as published."""
    with np.load(PARITY / f"{name}.npz") as stored:
        return dict(stored)


def assert_close(ours, expected, tolerance=1e-5):
    """The largest error is at most `tolerance` of the largest expected value; shapes are equal."""
    ours, expected = (_float64(values) for values in (ours, expected))
    assert ours.shape == expected.shape
    assert np.isfinite(ours).all()
    scale, error = np.abs(expected).max(), np.abs(ours - expected).max()
    assert error <= tolerance * scale, f"off by {error:.3g}, {error / scale:.3g} of the largest value {scale:.3g}"


def _float64(values):
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().double().numpy()
    return np.asarray(values, dtype=np.float64)
