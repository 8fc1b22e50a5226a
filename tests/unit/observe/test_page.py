from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from shardforge.observe import page
from shardforge.observe.jsonl import read

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> @DATA@ @CSS@ & \"'"
VOID = {"meta", "link", "input", "br"}


class Page(HTMLParser):
    """Tags, attributes and the text of each element of a page; fails on tags that do not close."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.attributes, self.texts = [], [], [], {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag + "#" + dict(attrs).get("id", "") if tag == "script" else tag)

    def handle_endtag(self, tag):
        assert self.open.pop().split("#")[0] == tag

    def handle_data(self, data):
        if self.open:
            self.texts[self.open[-1]] = self.texts.get(self.open[-1], "") + data

    @property
    def data(self) -> dict:
        return json.loads(self.texts["script#data"])


@pytest.fixture
def history(tmp_path: Path, write_life):
    write_life(tmp_path, range(1, 6), verdict="", evals=[2])
    return read(write_life(tmp_path, range(4, 9), first_step=3, layout="tp2"))


def test_the_page_parses_and_closes_every_tag(history):
    assert Page(page.html([history], [{}])).tags.count("script") == 2


def test_the_page_holds_every_point_of_every_run(history):
    run = Page(page.html([history, history], [{}, {}])).data["runs"][1]
    assert run["x"] == {
        "steps": history.steps,
        "tokens": history.columns["tokens_seen"],
        "time": history.training_seconds(),
    }
    assert run["y"]["loss"] == history.columns["loss"]
    assert set(run["y"]) == {
        "loss", "lr", "grad_norm", "tokens_per_s", "flops_per_s", "share", "data_share", "memory", "term: z_loss",
    }  # fmt: skip


def test_the_page_holds_what_the_summary_shows(history):
    run = Page(page.html([history], [{}], [[{"commit": "abc"}]], ["def main():"])).data["runs"][0]
    kept = ("weights", "entropy", "verdict", "samples", "provenance")
    assert [run[name] for name in kept] == [8_000_000, 6.5, "finished", "def main():", [{"commit": "abc"}]]
    assert run["segments"] == [
        {"from": 0, "to": 3, "layout": "dp2", "ranks": 2},
        {"from": 3, "to": 8, "layout": "tp2", "ranks": 2},
    ]
    assert run["evals"] == [{"step": 2, "tokens": 2000, "time": 4.0, "loss": 18.0}]
    assert run["resumes"] == [{"step": 3, "tokens": 3000, "time": 6.0}]


def test_the_page_names_no_resource_outside_itself(history):
    text = page.html([history], [{}])
    loading = [value for name, value in Page(text).attributes if name in ("src", "href", "action", "data")]
    assert loading == ["data:,"]
    assert set(re.findall(r"\w+://[^\"'\s]+", text)) == {"http://www.w3.org/2000/svg"}  # a namespace, never loaded
    assert re.findall(r"@import|url\((?!#)|\bfetch\(|XMLHttpRequest|\bimport\b", text) == []


def test_the_page_forbids_the_browser_to_load_anything(history):
    policies = [value for name, value in Page(page.html([history], [{}])).attributes if name == "content"]
    assert any("default-src 'none'" in policy for policy in policies)


def test_a_hostile_name_stays_text(tmp_path: Path, write_life):
    hostile = read(write_life(tmp_path, [1, 2], name=HOSTILE))
    harmless = read(write_life(tmp_path / "b", [1, 2]))
    found = Page(page.html([hostile], [{HOSTILE: HOSTILE}], [HOSTILE], [HOSTILE]))
    assert found.tags == Page(page.html([harmless], [{}])).tags
    assert (found.data["runs"][0]["name"], found.data["runs"][0]["samples"]) == (HOSTILE, HOSTILE)
    assert found.texts["h1"] == HOSTILE


def test_the_script_writes_text_and_never_markup():
    script = page.files("shardforge.observe").joinpath("page.js").read_text()
    assert re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b", script) == []


def test_recipes_stand_field_by_field_with_a_gap_where_one_has_none(history):
    one = {"seed": 1, "model": {"hidden": 64, "blocks": {"a": {"ffn": None}}}, "tags": [1, {"x": 2}]}
    two = {"seed": 2, "model": {"hidden": 64}}
    assert Page(page.html([history, history], [one, two])).data["recipe"] == [
        {"field": "seed", "values": ["1", "2"]},
        {"field": "model.hidden", "values": ["64", "64"]},
        {"field": "model.blocks.a.ffn", "values": ["null", None]},
        {"field": "tags", "values": ['[1, {"x": 2}]', None]},
    ]


def test_a_number_that_is_not_finite_is_a_gap(history):
    history.columns["loss"][1] = math.nan
    history.columns["peak_flops"][2] = 0.0
    run = Page(page.html([history], [{}])).data["runs"][0]
    assert run["y"]["loss"][1] is None and run["y"]["share"][2] is None


def test_a_long_run_keeps_its_spikes_its_gaps_and_its_ends(history, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(page, "POINTS", 20)
    losses = [10.0 - step / 100 for step in range(500)]
    losses[137], losses[138] = 50.0, math.nan
    kept = page._kept(losses)
    assert len(kept) <= 20 and set(kept) >= {0, 137, 138, 499}


def test_a_thinned_run_brings_the_means_of_all_its_steps(tmp_path: Path, write_life, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(page, "POINTS", 30)
    history = read(write_life(tmp_path, range(1, 1001)))
    history.columns["loss"][:] = [9.0 if step % 10 == 0 else 1.0 for step in range(1000)]  # its mean is 1.8
    run = Page(page.html([history], [{}])).data["runs"][0]
    middle = run["means"]["loss"][len(run["means"]["loss"]) // 2]
    assert {1.0, 9.0} == set(run["y"]["loss"]) and middle == pytest.approx(1.8, abs=0.3)


def test_a_run_that_fits_brings_no_means(history):
    assert Page(page.html([history], [{}])).data["runs"][0]["means"] == {}


def test_a_run_without_a_step_has_a_page(tmp_path: Path, write_life):
    empty = read(write_life(tmp_path, [], verdict=""))
    assert Page(page.html([empty], [{}])).data["runs"][0]["x"]["steps"] == []
