from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from shardforge.core.errors import Problems, RecipeError
from shardforge.core.layout import Layout
from shardforge.core.options import REQUIRED, option
from shardforge.core.slots import Mixer, Norm, Observer, Slot
from shardforge.recipe.build import build, pointed
from shardforge.recipe.tree import Node, Origin, override, read, wrap
from tests.unit.recipe.stock import Adamw, Board, Causal, Gqa, Rms, Rope, empty

HERE = Origin("here")


@dataclass(frozen=True, kw_only=True)
class Inner:
    size: int = option(REQUIRED, "how large", unit="tokens", at_least=1, at_most=9)
    norm: Norm = option("rmsnorm", "the norm")


@dataclass(frozen=True, kw_only=True)
class Everything:
    whole: int = 1
    real: float = option(0.5, "a share", above=0)
    text: str = ""
    flag: bool = False
    word: Literal["a", "b"] = "a"
    level: Literal[0, 1] = 0
    maybe: int | None = None
    either: int | Literal["auto"] | None = "auto"
    pair: tuple[int, float] = (1, 2.0)
    many: tuple[str, ...] = ()
    named: Mapping[str, Inner] = option({}, "sections by name")
    inner: Inner = option(Inner(size=3), "a section")
    absent: Inner | None = None
    mixer: Mixer | None = None
    seen: tuple[Observer, ...] = ()
    parallel: Layout = option(Layout(), "degrees")
    free: Any = None


def built(**given: Any) -> Everything:
    return build(Everything, wrap(given, HERE))[0]


def origins_of(**given: Any) -> dict[str, str]:
    return {path: str(origin) for path, origin in build(Everything, wrap(given, HERE))[1].items()}


def mistakes(**given: Any) -> list[str]:
    with pytest.raises(Problems) as caught:
        built(**given)
    return [problem.what + (f" | {problem.fix}" if problem.fix else "") for problem in caught.value.problems]


@pytest.mark.parametrize(
    ("field", "given", "value"),
    [
        ("whole", 3, 3),
        ("real", 3, 3.0),
        ("text", "x", "x"),
        ("flag", True, True),
        ("word", "b", "b"),
        ("maybe", None, None),
        ("maybe", 4, 4),
        ("either", 4, 4),
        ("either", "auto", "auto"),
        ("either", None, None),
        ("pair", [1, 2], (1, 2.0)),
        ("many", ["x", "y"], ("x", "y")),
        ("named", {"n": {"size": 2}}, {"n": Inner(size=2, norm=Rms())}),
        ("absent", {"size": 2, "norm": "none"}, None),
        ("mixer", {"kind": "gqa", "heads": 2}, Gqa(heads=2, position=Rope(), norms=(Rms(),))),
        ("seen", ["board", {"kind": "board", "note": "x"}], (Board(), Board(note="x"))),
        ("parallel", {"tp": 2}, Layout(tp=2)),
        ("parallel", Layout(tp=2), Layout(tp=2)),
        ("free", {"x": [1, "y"]}, {"x": [1, "y"]}),
    ],
)
def test_every_shape_of_field_is_read(field: str, given: Any, value: Any):
    found = getattr(built(**{field: given}), field)
    if field == "absent":
        assert (found.size, type(found.norm).kind) == (2, "none")
    else:
        assert (type(found), found) == (type(value), value)


def test_a_default_named_by_kind_becomes_a_config_at_every_depth():
    mixer = built(mixer={"kind": "gqa", "heads": 2}).mixer
    assert (mixer.position, mixer.mask, mixer.norms, mixer.qk_norm) == (Rope(), Causal(), (Rms(),), None)


def test_a_default_section_has_its_slots_filled():
    assert built().inner == Inner(size=3, norm=Rms())


def test_a_mapping_without_kind_takes_the_default_kind():
    assert built(inner={"size": 1, "norm": {"eps": 0.1}}).inner.norm == Rms(eps=0.1)


def test_a_null_entry_takes_an_inherited_name_out():
    assert list(built(named={"n": {"size": 2}, "m": None}).named) == ["n"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"whole": "two"}, "whole: expected int, got str 'two'"),
        ({"whole": True}, "whole: expected int, got bool True"),
        ({"whole": 1e3}, "whole: expected int, got float 1000.0 | write 1000"),
        ({"whole": "1e6"}, "whole: expected int, got str '1e6' | YAML reads 1e6 as text; write 1000000"),
        ({"whole": "010"}, "whole: expected int, got str '010' | YAML reads 010 as text; write 10"),
        ({"whole": None}, "whole: expected int, got nothing | give a value, or leave the key out"),
        ({"whole": [1]}, "whole: expected int, got a list"),
        ({"real": "3e-4"}, "real: expected float, got str '3e-4' | YAML reads 3e-4 as text; write 0.0003"),
        ({"real": "1e-9"}, "real: expected float, got str '1e-9' | YAML reads 1e-9 as text; write 1.0e-09"),
        ({"real": True}, "real: expected float, got bool True"),
        ({"real": float("nan")}, "real: expected a number, got .nan | write a number"),
        ({"text": 5}, "text: expected str, got int 5 | put it in quotes: '5'"),
        ({"flag": "yes"}, "flag: expected true or false, got str 'yes' | only true and false are booleans"),
        ({"flag": 1}, "flag: expected true or false, got int 1 | only true and false are booleans"),
        ({"word": "c"}, "word: 'c' is not one of 'a', 'b' | choose from a, b"),
        ({"word": ["a"]}, "word: a list is not one of 'a', 'b' | choose from a, b"),
        ({"level": True}, "level: True is not one of 0, 1 | choose from 0, 1"),
        ({"either": "atuo"}, "either: expected int or 'auto', got str 'atuo'"),
        ({"pair": [1]}, "pair: expected 2 values, got 1"),
        ({"pair": [1, "x"]}, "pair.1: expected float, got str 'x'"),
        ({"many": "x"}, "many: expected a list, got str 'x' | write [x]"),
        ({"named": [1]}, "named: expected a mapping of names, got a list"),
        ({"inner": 3}, "inner: expected a mapping, got int 3 | its fields are size, norm"),
        ({"mixer": 3}, "mixer: expected the name of a kind or a mapping with one, got int 3 | choose from gqa"),
        ({"mixer": {"heads": 3}}, "mixer: needs a 'kind' | choose from gqa"),
        ({"mixer": {"kind": 3}}, "mixer: expected the name of a kind, got int 3 | choose from gqa"),
        ({"mixer": {"kind": {}}}, "mixer: expected the name of a kind, got a mapping | choose from gqa"),
        ({"mixer": "gqu"}, "mixer: no mixer is called 'gqu' | did you mean 'gqa'?"),
        ({"mixer": "gqa"}, "mixer: field 'heads' is missing | heads: query heads"),
        ({"seen": [{"kind": "board", "nots": 1}]}, "seen.0: no field 'nots' | did you mean 'note'?"),
        ({"wohle": 1}, "recipe: no field 'wohle' | did you mean 'whole'?"),
        ({"inner": {}}, "inner: field 'size' is missing | size: how large"),
        ({"text": "${HOME}/x"}, "text: '${HOME}/x' asks for interpolation, which recipes do not have"
         " | write the value, or give it with --set text=..."),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named_with_what_is_wanted(given: dict[str, Any], message: str):
    assert mistakes(**given) == [message]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"inner": {"size": 0}}, "inner.size: 0 is not at least 1 | write a number that is at least 1 tokens"),
        ({"inner": {"size": 10}}, "inner.size: 10 is not at most 9 | write a number that is at most 9 tokens"),
        ({"real": 0}, "real: 0.0 is not above 0 | write a number that is above 0"),
        ({"parallel": {"tp": 0}}, "parallel.tp: 0 is not at least 1 | write a number that is at least 1"),
    ],
)
def test_a_limit_is_named_with_both_numbers(given: dict[str, Any], message: str):
    assert mistakes(**given) == [message]


def test_every_number_of_a_list_keeps_the_limit():
    with pytest.raises(Problems, match=r"betas: 1\.5 is not at most 1"):
        build(Adamw, wrap({"betas": [0.9, 1.5]}, HERE))


def test_an_error_of_a_config_points_to_the_field_it_names():
    assert mistakes(mixer={"kind": "gqa", "heads": 13}) == ["mixer.heads: 13 heads bring bad luck | write 12"]


def test_a_value_error_of_a_config_is_a_problem_of_its_section():
    assert mistakes(mixer={"kind": "gqa", "heads": 17}) == ["mixer: 17 heads are too many"]


def test_all_mistakes_are_reported_at_once():
    assert len(mistakes(whole="x", inner={"size": 0, "norm": "nrom"}, wrod="a", seen=[{}])) == 5


def test_earlier_problems_are_reported_with_the_later_ones():
    with pytest.raises(Problems) as caught:
        build(Everything, wrap({"whole": "x"}, HERE), [RecipeError("said twice", "x.yaml:1:1")])
    assert len(caught.value.problems) == 2


def test_mistakes_come_in_the_order_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("x.yaml").write_text("\n" * 8 + "word: c\nwhole: x\n" + "flag: 1\n")
    with pytest.raises(Problems) as caught:
        build(Everything, read(Path("x.yaml"), Path)[0])
    assert [problem.where for problem in caught.value.problems] == ["x.yaml:9:7", "x.yaml:10:8", "x.yaml:11:7"]


def test_every_leaf_has_an_origin():
    found = origins_of(mixer={"kind": "gqa", "heads": 2}, many=["x"], seen=[], pair=[1, 2], named={})
    assert {path: origin for path, origin in found.items() if path.startswith("mixer")} == {
        "mixer.kind": "here",
        "mixer.heads": "here",
        "mixer.position.kind": "default",
        "mixer.position.base": "default",
        "mixer.position.parts": "default",
        "mixer.mask.kind": "default",
        "mixer.qk_norm": "default",
        "mixer.norms.0.kind": "default",
        "mixer.norms.0.eps": "default",
        "mixer.gain": "default",
    }


@pytest.mark.parametrize(
    ("path", "origin"), [("many", "here"), ("seen", "here"), ("pair", "here"), ("word", "default")]
)
def test_a_plain_list_is_one_leaf(path: str, origin: str):
    found = origins_of(many=["x"], seen=[], pair=[1, 2])
    assert [(key, value) for key, value in found.items() if key.startswith(path)] == [(path, origin)]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3e-4, "0.0003"),
        (1e-20, "1.0e-20"),
        (1.5e-20, "1.5e-20"),
        (1e22, "1.0e+22"),
        (2.0, "2.0"),
        (float("-inf"), "-.inf"),
    ],
)
def test_a_float_is_written_with_a_point(value: float, text: str):
    assert pointed(value) == text


mixers, ffns = Slot("mixer", "nowhere"), Slot("ffn", "nowhere")


@dataclass(frozen=True, kw_only=True)
class Latent:
    heads: int
    latent: int
    rope_dim: int = 64


@dataclass(frozen=True, kw_only=True)
class Model:
    hidden: int
    mixer: Annotated[Any, mixers]
    ffn: Annotated[Any, ffns]


@dataclass(frozen=True, kw_only=True)
class Optim:
    lr: float
    clip: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Degrees:
    tp: int = 1
    pp: int = 1


@dataclass(frozen=True, kw_only=True)
class Small:
    model: Model
    optim: Optim
    parallel: Degrees
    precision: Literal["bf16", "fp8"] = "bf16"


@dataclass(frozen=True, kw_only=True)
class Needy:
    mixer: Annotated[Any, mixers] = "mla"


mixers._kinds, mixers._listed = {"mla": Latent}, True
ffns._kinds, ffns._listed = {"swiglu": empty("swiglu")}, True


def test_a_default_that_cannot_be_made_points_to_its_section():
    with pytest.raises(Problems) as caught:
        build(Needy, Node({}, Origin("x.yaml", 4, 2)))
    assert [str(problem) for problem in caught.value.problems] == [
        "x.yaml:4:2  mixer: field 'heads' is missing",
        "x.yaml:4:2  mixer: field 'latent' is missing",
    ]


def test_seven_mistakes_come_back_in_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text("model: {hidden: 2048}\noptim: {lr: 3.0e-4}\n")
    Path("exp.yaml").write_text(
        textwrap.dedent("""\
        base: base.yaml
        model:
          mixer: {kind: mla, heads: 16, latnet: 512, rope_dim: 64}
          ffn: {kind: swigul}
        optim:
          lr: 3e-4
        parallel:
          tp: two
          cpp: 4
        precision: fp7
        """)
    )
    with pytest.raises(Problems) as caught:
        build(Small, read(Path("exp.yaml"), Path)[0])
    assert str(caught.value) == textwrap.dedent("""\
        7 problems in the recipe
          exp.yaml:3:33  model.mixer: no field 'latnet'
              fix: did you mean 'latent'?
          exp.yaml:3:10  model.mixer: field 'latent' is missing
          exp.yaml:4:15  model.ffn: no ffn is called 'swigul'
              fix: did you mean 'swiglu'?
          exp.yaml:6:7  optim.lr: expected float, got str '3e-4'
              fix: YAML reads 3e-4 as text; write 0.0003
          exp.yaml:8:7  parallel.tp: expected int, got str 'two'
          exp.yaml:9:3  parallel: no field 'cpp'
              fix: did you mean 'pp'?
          exp.yaml:10:12  precision: 'fp7' is not one of 'bf16', 'fp8'
              fix: did you mean 'fp8'?""")


def test_a_set_value_is_named_as_it_was_typed():
    tree = override(wrap({}, HERE), "whole=two")
    with pytest.raises(Problems, match=r"--set whole=two  whole: expected int, got str 'two'"):
        build(Everything, tree)
