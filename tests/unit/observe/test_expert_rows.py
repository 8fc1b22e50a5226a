from __future__ import annotations

import io

import pytest
from rich.console import Console as Terminal

from shardforge.observe import expert_rows
from shardforge.observe.experts import ExpertTally


def tally(*load: float, **options) -> ExpertTally:
    return ExpertTally(tuple(map(float, load)), **{"tokens": 100.0, "entropy": 50.0, "dropped": 0.0} | options)


EVEN, LOST = tally(4, 4, 4, 4), tally(8, 8, 0, 0)


@pytest.mark.parametrize(("use", "style"), [(EVEN, ""), (tally(12, *[2] * 9), "yellow"), (LOST, "bold red")])
def test_the_color_of_the_words_is_the_health_of_the_worst_layer(use, style):
    assert expert_rows.words({1: EVEN, 2: use}).style == style


def test_the_words_say_what_is_known():
    text = expert_rows.words({1: EVEN, 2: tally(8, 8, 0, 0, dropped=4.0)}).plain
    assert text == "MaxVio 1.00 in layer 2 · 2 of 8 dead · entropy 36% · 12.5% dropped"


def test_biases_and_similarity_stand_where_they_are_known():
    biased = {1: tally(1, 1, bias=(-0.25, 0.125))}
    assert (
        expert_rows.further(biased, {1: 0.25, 2: 0.5}).plain == "selection bias -0.25 to 0.125 · alike 0.500 in layer 2"
    )
    assert not expert_rows.further({1: EVEN}, {})


@pytest.mark.parametrize(
    ("layers", "experts", "shape"), [(2, 4, (1, 4)), (3, 4, (2, 4)), (58, 256, (8, 64)), (1, 65, (1, 64))]
)
def test_the_picture_has_two_layers_a_line_and_stays_small(layers, experts, shape):
    lines = expert_rows.picture([[1.0] * experts] * layers).plain.splitlines()
    assert (len(lines), len(lines[0])) == shape


def test_one_dead_expert_of_many_is_still_seen():
    loads = [[1.0] * 256 for _ in range(58)]
    loads[40][100] = 0.0
    screen = io.StringIO()
    Terminal(file=screen, force_terminal=True, color_system="truecolor", width=100).print(expert_rows.picture(loads))
    assert screen.getvalue().count("8;2;0;0;0") == 1


@pytest.mark.parametrize(
    ("load", "color"), [(1.0, "#e2e8f0"), (64.0, "#dc2626"), (1 / 64, "#2563eb"), (0.0, "#000000")]
)
def test_colors_go_from_blue_over_gray_to_red(load, color):
    assert expert_rows.picture([[load]]).spans[0].style.color.triplet.hex == color
