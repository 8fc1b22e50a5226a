from __future__ import annotations

import torch
from torch import Tensor

from shardforge.verify.compare import compare, first_in_order
from shardforge.verify.measure import Found, Key, fingerprint


def found(values: dict[Key, Tensor]) -> Found:
    return Found(values, {key: fingerprint(value) for key, value in values.items()})


def gradient(name: str, *numbers: float, step: int = 1) -> dict[Key, Tensor]:
    return {(f"step {step}", "gradient", name): torch.tensor(numbers, dtype=torch.float64)}


WANT = gradient("a", 3.0, 4.0) | gradient("b", 1.0, 0.0)


def test_equal_tensors_have_no_difference():
    _, errors, differences = compare([found(WANT)], WANT)
    assert differences == [] and errors == {"gradient": 0.0, "copies": 0.0}


def test_an_error_is_relative_to_the_norm_of_what_is_expected():
    _, errors, differences = compare([found(WANT | gradient("a", 3.0, 4.5))], WANT)
    assert errors["gradient"] == 0.1 and [each.name for each in differences] == ["a"]


def test_rounding_is_no_difference():
    assert compare([found(WANT | gradient("a", 3.0, 4.0 + 1e-12))], WANT)[2] == []


def test_rounding_of_what_should_be_nothing_is_no_difference():
    want = WANT | gradient("c", 1e-17)
    assert compare([found(want | gradient("c", -3e-17))], want)[2] == []


def test_something_where_nothing_should_be_is_a_difference():
    want = WANT | gradient("c", 1e-17)
    assert [each.name for each in compare([found(want | gradient("c", 1e-3))], want)[2]] == ["c"]


def test_a_multiple_is_recognised():
    one = compare([found(WANT | gradient("a", 6.0, 8.0))], WANT)[2][0]
    assert (one.ratio, one.rest) == (2.0, 0.0)


def test_what_no_rank_has_is_a_difference():
    got = {key: value for key, value in WANT.items() if key[2] != "b"}
    one = compare([found(got)], WANT)[2][0]
    assert one.name == "b" and one.got is None


def test_a_number_that_is_none_is_a_difference():
    assert compare([found(WANT | gradient("a", float("nan"), 4.0))], WANT)[2][0].error == float("inf")


def test_another_shape_is_a_difference():
    assert compare([found(WANT | gradient("a", 3.0, 4.0, 5.0))], WANT)[2][0].error == float("inf")


def test_ranks_answer_together():
    parts = [found(gradient("a", 3.0, 4.0)), found(gradient("b", 1.0, 0.0))]
    assert compare(parts, WANT)[2] == []


def test_a_copy_that_differs_is_named_with_its_rank():
    other = Found({}, {key: fingerprint(value + 1e-6) for key, value in WANT.items()})
    differences = compare([found(WANT), other], WANT)[2]
    assert [(each.what, each.name) for each in differences] == [("copies", "a on rank 1"), ("copies", "b on rank 1")]


def test_differences_come_in_the_order_of_steps_and_of_what_follows_from_what():
    want = gradient("a", 1.0) | gradient("a", 1.0, step=2) | {("step 1", "weight", "a"): torch.ones(1)}
    got = {key: 2 * value for key, value in want.items()}
    assert [each.key[:2] for each in compare([found(got)], want)[2]] == [
        ("step 1", "gradient"),
        ("step 1", "weight"),
        ("step 2", "gradient"),
    ]


def test_what_an_optimizer_makes_of_rounding_is_not_compared():
    want = WANT | gradient("c", 1e-17) | {("step 1", "weight", "c"): torch.tensor([0.01])}
    assert compare([found(want | {("step 1", "weight", "c"): torch.tensor([-0.01])})], want)[2] == []


def test_first_and_last_follow_the_forward_pass():
    differences = compare([found({key: 2 * value for key, value in WANT.items()})], WANT)[2]
    assert first_in_order(differences, ["b", "a"]) == ("b", "a")
