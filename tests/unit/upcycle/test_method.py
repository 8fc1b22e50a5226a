from __future__ import annotations

import numpy as np
import pytest
import torch

from shardforge.upcycle.method import Draw, Moments
from shardforge.upcycle.transform import Dense


def test_a_stream_depends_on_seed_layer_expert_and_purpose():
    base = Draw(1, 2, 3).generator("noise/up").random(4)
    others = [Draw(2, 2, 3), Draw(1, 3, 3), Draw(1, 2, 4), Draw(1, 2, None)]
    assert all((base != each.generator("noise/up").random(4)).all() for each in others)
    assert (base != Draw(1, 2, 3).generator("noise/down").random(4)).all()
    assert (base == Draw(1, 2, 3).generator("noise/up").random(4)).all()


def test_streams_are_the_same_numbers_for_ever():
    """A checkpoint made by one version must be made byte for byte by the next."""
    assert Draw(1234, 0, 0).subset("drop", 16, 8).tolist() == [0, 3, 4, 5, 7, 8, 10, 13]
    drawn = Draw(1234, 0, 0).generator("noise/gate").standard_normal(2, dtype=np.float32)
    assert drawn.tolist() == pytest.approx([-0.2544341, -0.1386799], abs=1e-6)


def test_a_subset_is_ascending_and_has_no_twins():
    found = Draw(1, 0, 0).subset("drop", 100, 40)
    assert len(found) == 40 and (np.diff(found) > 0).all()


@pytest.mark.parametrize("axis", [0, 1])
def test_moments_give_the_statistics_of_any_set_of_neurons(axis):
    weight = torch.randn(20, 30, generator=torch.Generator().manual_seed(0)) * 0.02 + 0.01
    neurons = np.array([1, 4, 5, 17])
    mean, std = Dense.of(weight, axis).moments.of(neurons)
    part = weight[neurons] if axis == 1 else weight[:, neurons]
    assert mean == pytest.approx(part.double().mean().item(), rel=1e-9)
    assert std == pytest.approx(part.double().std().item(), rel=1e-9)


@pytest.mark.parametrize("neurons", [[], [0]])
def test_a_single_number_has_no_spread(neurons):
    moments = Moments(1, np.ones(3), np.ones(3))
    assert moments.of(np.array(neurons, np.int64))[1] == 0.0
