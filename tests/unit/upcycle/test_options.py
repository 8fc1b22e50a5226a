from __future__ import annotations

import pytest

from shardforge.core.errors import ForgeError, Problems
from shardforge.upcycle.methods.drop import Drop
from shardforge.upcycle.methods.noise import Noise
from shardforge.upcycle.options import Options, chosen, dump, read_options


def test_nothing_given_is_the_paper():
    options = read_options().options
    assert options.method == Drop(ratio=0.5, share_indices=True)
    assert (options.experts, options.k, options.router_init) == (8, 2, "uniform_zero_mean")


def test_flags_lie_over_a_file_and_sets_over_flags(tmp_path):
    path = tmp_path / "up.yaml"
    path.write_text("upcycle: {method: {kind: drop, ratio: 0.25}, experts: 4, k: 1, seed: 5}\n")
    options = read_options(path, {"experts": 16, "method": {"share_indices": False}}, ["k=3"]).options
    assert options == Options(method=Drop(ratio=0.25, share_indices=False), experts=16, k=3, seed=5)


def test_another_method_brings_its_own_fields(tmp_path):
    path = tmp_path / "up.yaml"
    path.write_text("upcycle: {method: {kind: drop, ratio: 0.25}}\n")
    assert read_options(path, {"method": {"kind": "noise", "std": 0.1}}).options.method == Noise(std=0.1)


def test_what_is_dumped_is_read_back(tmp_path):
    options = Options(method=Noise(ratio=0.3, std=1e-5), experts=6, expert_ffn=12, layers="every 2", seed=9)
    path = tmp_path / "up.yaml"
    path.write_text(dump(options))
    assert read_options(path).options == options


@pytest.mark.parametrize("ratio", [-0.1, 1.5])
def test_a_ratio_outside_of_0_to_1_is_refused_with_its_place(ratio):
    with pytest.raises(Problems, match=r"command line +upcycle.method.ratio") as found:
        read_options(flags={"method": {"kind": "drop", "ratio": ratio}})
    assert str(ratio) in str(found.value)


def test_all_mistakes_are_told_at_once(tmp_path):
    path = tmp_path / "up.yaml"
    path.write_text("upcycle:\n  experts: 0\n  gates: raw\n  dtype: fp8\n")
    with pytest.raises(Problems) as found:
        read_options(path, {"method": {"kind": "naive", "ratio": 0.5}})
    told = str(found.value)
    assert all(word in told for word in ("up.yaml:2", "'gates'", "did you mean 'gate'", "fp8", "'ratio'"))


@pytest.mark.parametrize(
    "text, layers",
    [("all", (0, 1, 2, 3, 4)), ("every 2", (1, 3)), ("0,3-4", (0, 3, 4)), ("2", (2,)), ("every 1", (0, 1, 2, 3, 4))],
)
def test_layers_are_named_in_three_ways(text, layers):
    assert chosen(text, 5) == layers


@pytest.mark.parametrize("text", ["", "some", "every 0", "every", "5", "3-2", "1,,2", "-1"])
def test_what_names_no_layers_is_refused(text):
    with pytest.raises(ValueError):
        chosen(text, 5)


def test_a_base_that_is_not_there_is_named(tmp_path):
    path = tmp_path / "up.yaml"
    path.write_text("base: nowhere\n")
    with pytest.raises(ForgeError, match="nowhere"):
        read_options(path)
