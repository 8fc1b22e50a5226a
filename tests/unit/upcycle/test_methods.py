"""The laws of specification B1-B3 on random gated ffns without any file."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from shardforge.upcycle.method import Draw, methods
from shardforge.upcycle.methods.drop import Drop
from shardforge.upcycle.methods.naive import Naive
from shardforge.upcycle.methods.noise import Noise
from shardforge.upcycle.methods.random import Random
from shardforge.upcycle.methods.virtual_group import VirtualGroup
from shardforge.upcycle.normals import Normals
from tests.unit.upcycle.dense import STD, expert, forward, glu

HIDDEN, INNER = 256, 1024
NAMES = ("gate", "up", "down")


@pytest.fixture(scope="module")
def ffn():
    return glu(HIDDEN, INNER)


@pytest.fixture(scope="module")
def probe():
    return torch.randn(512, HIDDEN, generator=torch.Generator().manual_seed(9))


def rows(name, weight):
    """Neurons first."""
    return weight.t() if name == "down" else weight


def cosine(one, other):
    return F.cosine_similarity(one, other, -1).mean().item()


def outputs(method, ffn, probe, count):
    return [forward(expert(method, ffn, number)[0], probe) for number in range(count)]


@pytest.mark.parametrize("ratio, law", [(0.1, 0.899), (0.25, 0.749), (0.5, 0.493), (0.75, 0.252), (1.0, -0.003)])
def test_shared_indices_leave_a_share_of_the_dense_output(ffn, probe, ratio, law):
    found = [cosine(forward(ffn, probe), y) for y in outputs(Drop(ratio=ratio), ffn, probe, 3)]
    assert np.mean(found) == pytest.approx(law, abs=0.03)
    assert np.mean(found) == pytest.approx(1 - ratio, abs=0.03)


@pytest.mark.parametrize("ratio, law", [(0.1, 0.745), (0.25, 0.446), (0.5, 0.163), (0.75, 0.024), (1.0, 0.002)])
def test_sets_of_their_own_leave_its_cube(ffn, probe, ratio, law):
    method = Drop(ratio=ratio, share_indices=False)
    found = [cosine(forward(ffn, probe), y) for y in outputs(method, ffn, probe, 3)]
    assert np.mean(found) == pytest.approx(law, abs=0.03)


@pytest.mark.parametrize("ratio, law", [(0.1, 0.809), (0.25, 0.562), (0.5, 0.247), (0.75, 0.059)])
def test_two_experts_share_the_square(ffn, probe, ratio, law):
    found = [cosine(a, b) for a, b in combinations(outputs(Drop(ratio=ratio), ffn, probe, 3), 2)]
    assert np.mean(found) == pytest.approx(law, abs=0.03)
    assert np.mean(found) == pytest.approx((1 - ratio) ** 2, abs=0.03)


def test_ratio_zero_is_naive(ffn):
    dropped, copied = expert(Drop(ratio=0.0), ffn, 0)[0], expert(Naive(), ffn, 0)[0]
    assert all(torch.equal(dropped[name], copied[name]) and torch.equal(copied[name], ffn[name]) for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_at_ratio_one_no_row_survives_and_the_statistics_do(ffn, name):
    made = rows(name, expert(Drop(ratio=1.0), ffn, 0)[0][name])
    source = rows(name, ffn[name])
    assert not (made == source).any(1).any()
    error = 3 * source.std().item() / source.numel() ** 0.5
    assert made.mean().item() == pytest.approx(source.mean().item(), abs=error)
    assert made.std().item() == pytest.approx(source.std().item(), abs=error)


@pytest.mark.parametrize("inner, ratio, count", [(24, 0.5, 12), (25, 0.5, 12), (10, 0.29, 2), (7, 0.1, 0)])
def test_exactly_the_truncated_share_is_drawn(inner, ratio, count):
    ffn = glu(8, inner)
    made, edits, _ = expert(Drop(ratio=ratio), ffn, 0)
    assert count == int(ratio * inner)
    for name in NAMES:
        changed = (rows(name, made[name]) != rows(name, ffn[name])).any(1).sum().item()
        assert changed == count == len(edits[name].places)


@pytest.mark.parametrize("name", NAMES)
def test_what_was_not_drawn_is_equal_to_the_bit(ffn, name):
    made, edits, _ = expert(Drop(), ffn, 3)
    kept = np.setdiff1d(np.arange(INNER), edits[name].places)
    assert torch.equal(rows(name, made[name])[kept], rows(name, ffn[name])[kept])


def test_statistics_are_of_the_drawn_part_of_one_matrix():
    ffn = glu(64, 200)
    ffn["gate"][:100] += 5.0  # half of the neurons lie elsewhere
    _, edits, _ = expert(Drop(ratio=0.3), ffn, 0)
    part = ffn["gate"][edits["gate"].places]
    assert edits["gate"].mean == pytest.approx(part.mean().item(), rel=1e-5)
    assert edits["gate"].std == pytest.approx(part.std().item(), rel=1e-5)
    assert abs(edits["up"].mean) < 0.05


@pytest.mark.parametrize("shared", [True, False])
def test_sets_are_equal_if_and_only_if_they_are_shared(ffn, shared):
    _, edits, _ = expert(Drop(share_indices=shared), ffn, 0)
    sets = {tuple(edits[name].places) for name in NAMES}
    assert len(sets) == (1 if shared else 3)


def test_experts_draw_sets_of_their_own(ffn):
    assert not np.array_equal(expert(Drop(), ffn, 0)[1]["up"].places, expert(Drop(), ffn, 1)[1]["up"].places)


def test_an_expert_does_not_depend_on_how_many_there_are(ffn):
    few, many = expert(Drop(), ffn, 2, experts=4)[0], expert(Drop(), ffn, 2, experts=64)[0]
    assert all(torch.equal(few[name], many[name]) for name in NAMES)


def test_the_order_of_neurons_does_not_change_the_ffn(ffn, probe):
    made, _, neurons = expert(Drop(ratio=0.0, share_indices=False), ffn, 0)
    assert sorted(neurons) == list(range(INNER)) and not np.array_equal(neurons, np.arange(INNER))
    torch.testing.assert_close(forward(made, probe), forward(ffn, probe), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("number", [0, 5])
def test_script_mode_is_the_published_procedure_on_the_same_draws(ffn, number):
    """Permute the neurons; then for each matrix draw int(ratio * f) indices, take torch's mean and std of just these
    rows or columns, and overwrite them with normal numbers."""
    made, _, _ = expert(Drop(ratio=0.5, share_indices=False), ffn, number)
    draw = Draw(1, 0, number)
    permutation = torch.from_numpy(draw.generator("neurons").permutation(INNER))
    expected = {"gate": ffn["gate"][permutation], "up": ffn["up"][permutation], "down": ffn["down"][:, permutation]}
    for name, weight in expected.items():
        index = torch.from_numpy(np.sort(draw.generator(f"drop/{name}").permutation(INNER)[: int(INNER * 0.5)]))
        normal = torch.from_numpy
        noise = Normals(draw.generator(f"noise/{name}"))
        if name == "down":
            part = weight[:, index]
            drawn = normal(noise.draw(len(index), HIDDEN)).t()
            weight[:, index] = drawn * part.std() + part.mean()
        else:
            part = weight[index]
            drawn = normal(noise.draw(HIDDEN, len(index))).t()
            weight[index] = drawn * part.std() + part.mean()
        torch.testing.assert_close(made[name], weight, rtol=1e-6, atol=1e-8)


def test_a_narrow_expert_has_some_neurons_and_draws_a_part_of_these(ffn):
    made, edits, neurons = expert(Drop(), ffn, 0, width=256)
    assert len(set(neurons)) == 256 and len(edits["up"].places) == 128
    kept = np.setdiff1d(np.arange(256), edits["up"].places)
    assert torch.equal(made["up"][kept], ffn["up"][neurons[kept]])
    assert torch.equal(made["down"][:, kept], ffn["down"][:, neurons[kept]])


def test_noise_is_added_to_the_chosen_neurons_alone(ffn):
    made, edits, _ = expert(Noise(ratio=0.25, std=0.02), ffn, 0)
    added = made["down"] - ffn["down"]
    places = edits["down"].places
    assert len(places) == 256 and len(edits["down"].redrawn) == 0
    assert added[:, places].std().item() == pytest.approx(0.02, rel=0.02)
    assert added[:, np.setdiff1d(np.arange(INNER), places)].abs().max() == 0.0


@pytest.mark.parametrize("name", NAMES)
def test_random_has_the_spread_of_the_models_own_start(ffn, name):
    made = expert(Random(), ffn, 0)[0][name]
    assert made.std().item() == pytest.approx(STD[name], rel=0.01)
    assert cosine(made.flatten(), ffn[name].flatten()) == pytest.approx(0.0, abs=0.01)


def test_slices_of_a_virtual_group_are_in_order_and_make_up_the_whole(ffn):
    slices = [expert(VirtualGroup(), ffn, number, width=256)[0] for number in range(8)]
    for copy in (slices[:4], slices[4:]):
        assert torch.equal(torch.cat([each["gate"] for each in copy]), ffn["gate"])
        assert torch.equal(torch.cat([each["down"] for each in copy], 1), ffn["down"])


@pytest.mark.parametrize(
    "expert_size, experts, k, field", [(100, 8, 4, "expert_ffn"), (256, 6, 4, "experts"), (256, 8, 2, "k")]
)
def test_what_slices_cannot_make_up_is_refused(expert_size, experts, k, field):
    problems = list(VirtualGroup().refused(1024, expert_size, experts, k))
    assert [each[0] for each in problems] == [field] and all(each[2] for each in problems)


def test_every_method_says_where_it_comes_from():
    import importlib

    for config in methods.kinds().values():
        text = importlib.import_module(config.__module__).__doc__
        assert text and all(word in text for word in ("Paper:", "Changes:", "Cost:"))
