from __future__ import annotations

import json

import pytest

from shardforge.recipe.load import from_mapping
from shardforge.recipe.provenance import plain
from shardforge.upcycle import page, report, run
from shardforge.upcycle.options import read_options
from shardforge.upcycle.target import target
from tests.tiny import mapping
from tests.unit.upcycle import dense


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Wide enough for cosines to have settled."""
    folder = tmp_path_factory.mktemp("report")
    source = dense.save(folder / "run", ffn={"kind": "glu", "inner": 512}, model={"hidden": 128, "stack": ["one"]})
    return run.upcycle(source, folder / "out", read_options(flags={"experts": 6}), processes=1)


@pytest.mark.parametrize("name", ["gate", "up", "down"])
def test_a_matrix_is_measured(made, name):
    found = made.report["matrices"][name]
    assert found["redrawn"] == 0.5
    assert found["std"] == pytest.approx(found["source_std"], rel=0.02)
    assert found["cosine_to_dense"] == pytest.approx(0.5, abs=0.03)
    assert found["cosine_between_experts"] == pytest.approx(0.25, abs=0.03)


def test_outputs_follow_the_laws(made):
    assert made.report["output_cosine_to_dense"] == pytest.approx(0.5, abs=0.04)
    assert made.report["output_cosine_between_experts"] == pytest.approx(0.25, abs=0.04)


def test_weights_are_counted_as_a_token_meets_them(made):
    ffn = 3 * 128 * 512
    total, active = made.report["weights"]["total"], made.report["weights"]["active"]
    assert total - active == 4 * ffn


@pytest.mark.parametrize(("stack", "verdict"), [(["small x 2"], "exact"), (["small", "large"], "no")], ids=str)
def test_the_verdict_is_that_of_the_worst_layer(stack, verdict):
    blocks = {"small": dense.block(), "large": dense.block(ffn=dense.FFN | {"inner": 32})}
    used = {name: block for name, block in blocks.items() if any(name in item for item in stack)}
    model = plain(from_mapping(mapping(model={"blocks": used, "stack": stack})).recipe.model)
    given = read_options(flags={"method": "naive", "expert_ffn": 24})
    found = report.preservation(given.options, target(model, given, "source"))
    assert found["verdict"] == verdict
    assert len(set(found["reasons"])) == len(found["reasons"])
    assert ("an expert has 24 of 32 neurons" in found["reasons"]) == (verdict == "no")


def test_the_files_hold_the_report(made):
    assert report.read(made.path) == json.loads(json.dumps(made.report))
    text = (made.path / report.PAGE).read_text()
    assert text == page.html(made.report) and "50.0%" in text and "arXiv" not in text


def test_the_table_has_a_row_for_each_matrix_and_one_for_outputs(made):
    head, *rows = report.rows(made.report)
    assert [row[0] for row in rows] == ["gate", "up", "down", "output"]
    assert all(len(row) == len(head) for row in rows)


def test_a_page_cannot_be_left_by_a_name(made):
    assert "<script>" not in page.html({**made.report, "source": "<script>"})


def test_one_expert_is_compared_with_none(tmp_path, source):
    given = read_options(flags={"experts": 1, "k": 1})
    found = run.upcycle(source, tmp_path / "out", given, processes=1).report
    assert found["output_cosine_between_experts"] is None and report.rows(found)[1][-1] == "-"


def test_a_router_that_cannot_learn_from_the_task_is_told():
    assert "k=1" in report.notes(read_options(flags={"k": 1}).options)[0]
    assert report.notes(read_options(flags={"k": 1, "gate": "raw"}).options) == []
