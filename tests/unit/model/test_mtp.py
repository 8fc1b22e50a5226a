from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F

from shardforge.core.errors import ForgeError, Problems
from shardforge.engine import staged
from shardforge.model import flops
from shardforge.model.build import build
from shardforge.nn.batch import IGNORE, PADDING
from shardforge.nn.module import declared
from shardforge.nn.sequence import Sequence, Shares
from tests.tiny import GLU, GQA, LENGTH, VOCAB, assert_same, batch, tiny
from tests.tiny_kinds import MOE
from tests.tiny_mtp import DEPTH, MTP, made, one_document, read, run, sequence


@pytest.mark.parametrize("j", range(1, DEPTH + 1))
def test_a_depth_reads_the_tokens_up_to_its_own_and_no_later_one(j):
    model, given, place = made(), one_document(), 4
    before = read(model, given)[j][0, place]
    for changed in range(LENGTH):
        tokens = given.tokens.clone()
        tokens[0, changed] = (tokens[0, changed] + 1) % VOCAB
        after = read(model, dataclasses.replace(given, tokens=tokens))[j][0, place]
        assert torch.equal(after, before) == (changed > place + j), changed


def test_what_stands_in_one_document_changes_no_depth_of_another():
    model, given = made(), batch()
    tokens = given.tokens.where(given.documents == 0, (given.tokens + 1) % VOCAB)
    changed = dataclasses.replace(given, tokens=tokens)
    places = zip((given, *given.look_ahead(DEPTH).ahead), read(model, given), read(model, changed), strict=True)
    for there, before, after in places:
        assert torch.equal(before[there.documents == 0], after[there.documents == 0])
        assert not torch.isclose(before[there.documents == 1], after[there.documents == 1]).all(-1).any()


@pytest.mark.parametrize(("progress", "weight"), [(0.0, 0.3), (0.49, 0.3), (0.5, 0.1), (1.0, 0.1)])
def test_the_loss_is_the_main_one_and_the_weighted_mean_of_the_depths_by_one_number_of_tokens(progress, weight):
    phases = {"start": 0.3, "then": [{"at": 0.5, "value": 0.1}]}
    model, given = made(MTP | {"weight": phases}, objective={"kind": "next_token", "z_loss": 0.1}), batch()
    out = run(model, given, progress=progress)
    main, expected = None, 0.0
    for x, there in zip(read(model, given), (given, *given.look_ahead(DEPTH).ahead), strict=True):
        logits = F.linear(x, model.head.operand())
        terms = F.cross_entropy(logits.flatten(0, 1), there.labels.flatten(), ignore_index=IGNORE, reduction="sum")
        terms += 0.1 * (logits.logsumexp(-1).square() * (there.labels != IGNORE)).sum()
        main, expected = (terms, terms) if main is None else (main, expected + weight / DEPTH * terms)
    torch.testing.assert_close(out["total"], expected, rtol=1e-12, atol=0)


def test_the_reported_terms_are_the_main_cross_entropy_and_the_plain_mean_of_the_depths():
    model, given = made(), batch()
    out, sums = run(model, given), []
    for x, there in zip(read(model, given), (given, *given.look_ahead(DEPTH).ahead), strict=True):
        logits = F.linear(x, model.head.operand()).flatten(0, 1)
        sums.append(F.cross_entropy(logits, there.labels.flatten(), ignore_index=IGNORE, reduction="sum"))
    assert model.terms == ("loss", "mtp")
    torch.testing.assert_close(out["loss"], sums[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(out["mtp"], (sums[1] + sums[2]) / 2, rtol=1e-12, atol=0)


def test_the_table_gets_the_gradients_of_both_its_uses():
    shared, apart = made(), made()
    apart.mtp.__dict__["embed"] = copy.deepcopy(apart.embed)
    for model in (shared, apart):
        run(model, batch())["total"].backward()
    first, second = apart.embed.weight.grad, apart.mtp.embed.weight.grad
    assert first.any() and second.any()
    assert_same({"embed": shared.embed.weight.grad}, {"embed": first + second})


def test_a_block_is_told_which_places_are_padding_to_it_and_how_many_are_not():
    model, given = made(), batch().look_ahead(DEPTH)
    seen: list[Sequence] = []
    for further in model.mtp.children():
        further.block.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    seq = sequence(given)
    seq.shares = Shares(100, 8, (Shares(90, 7), Shares(80, 6)))
    model(given.tokens, seq, given.labels)
    assert [each.shares for each in seen] == [Shares(90, 7), Shares(80, 6)]
    for each, there in zip(seen, given.ahead, strict=True):
        assert torch.equal(each.documents, there.documents) and (each.documents == PADDING).any()


def test_routers_count_a_token_only_where_a_further_one_is_known():
    """The router's loss of a module is the same when what follows its last known place changes."""
    block = {"mixer": GQA, "ffn": MOE | {"z_loss": 1.0}}
    blocks = {"one": {"mixer": GQA, "ffn": GLU}, "further": block}
    model = made({"block": "further", "depth": DEPTH}, model={"blocks": blocks, "stack": ["one"]})
    losses = []
    for shift in (0, 1):
        given = one_document().look_ahead(DEPTH)
        for j, there in enumerate(given.ahead, 1):
            there.tokens[:, LENGTH - j :] = (there.tokens[:, LENGTH - j :] + shift) % VOCAB
        seq = sequence(given)
        model(given.tokens, seq, given.labels)
        losses.append([seq.records["router_z", layer].item() for layer in (1, 2)])
    assert losses[0] == losses[1] and min(losses[0]) > 0


@pytest.mark.parametrize("without", ["labels", "tokens ahead"])
def test_without_labels_or_tokens_ahead_the_model_is_the_one_without_further_modules(without):
    given = batch()
    plain, model = made(None), made()
    if without == "labels":
        outs = [each(given.tokens, sequence(given.look_ahead(DEPTH))) for each in (plain, model)]
    else:
        outs = [each(given.tokens, sequence(given), given.labels) for each in (plain, model)]
        assert outs[0].keys() == outs[1].keys()
        outs = [out["total"] for out in outs]
    assert torch.equal(*outs)


def test_embedded_tokens_ahead_are_dropped_apart_from_those_of_the_trunk():
    outs = [run(made(model={"dropout": rate}), batch(), key=3)["mtp"].item() for rate in (0.0, 0.5)]
    assert outs[0] != outs[1]


def test_weights_are_named_by_depth_and_role():
    block = {name.removeprefix("blocks.0.") for name, _ in made(None).named_parameters() if "blocks.0." in name}
    roles = {f"block.{name}" for name in block}
    roles |= {f"{role}.weight" for role in ("embed_norm", "hidden_norm", "project", "norm")}
    names = {item.fqn for item in declared(made()) if item.fqn.startswith("mtp.")}
    assert names == {f"mtp.{j}.{role}" for j in range(DEPTH) for role in roles}


def test_the_blocks_go_on_where_the_layers_end():
    assert [further.block.layer for further in made().mtp.children()] == [2, 3]


@pytest.mark.parametrize("mtp", [None, MTP | {"depth": 0}])
def test_a_model_of_no_depth_has_nothing_of_it(mtp):
    model = made(mtp)
    assert model.mtp is None and model.ahead == 0 and model.terms == ("loss",)


def test_the_flop_of_a_model_leave_out_what_predicts_further_tokens():
    plain, model = made(None), made()
    assert flops.step_flops(model, LENGTH) == flops.step_flops(plain, LENGTH) > 0
    assert flops.matmul_weights(model) == flops.matmul_weights(plain)
    assert flops.weights(model) > flops.weights(plain)


def test_the_work_of_the_last_stage_has_the_modules_and_the_head_once_more_for_each():
    plain, model = staged.work(made(None), LENGTH), staged.work(made(), LENGTH)
    project = 2.0 * 2 * 16 * 16 * LENGTH
    each = model.blocks[0] + project + plain.last + plain.first
    assert (model.first, model.blocks) == (plain.first, plain.blocks)
    assert model.last == pytest.approx(plain.last + DEPTH * each)


def test_the_last_stage_of_a_pipeline_has_the_modules():
    model = made()
    assert model.part([0], first=True, last=False).mtp is None
    assert model.part([1], first=False, last=True).mtp is model.mtp


@pytest.mark.parametrize(
    ("mtp", "told"),
    [
        ({"block": "none"}, "model.mtp.block: no block is called 'none'"),
        ({"block": "one", "depth": LENGTH}, f"no position has a token {LENGTH} places ahead"),
    ],
)
def test_a_section_that_cannot_work_is_told_with_the_field(mtp, told):
    with pytest.raises(Problems) as caught:
        tiny(model={"mtp": mtp})
    (error,) = caught.value.problems
    assert told in error.what


def test_a_block_that_only_the_modules_have_is_no_unused_block():
    blocks = {"one": {"mixer": GQA, "ffn": GLU}, "further": {"mixer": GQA, "ffn": {"kind": "mlp", "inner": 8}}}
    assert tiny(model={"blocks": blocks, "mtp": {"block": "further"}}).model.layers == ("one", "one")


@pytest.mark.parametrize("schedule", ["zero_bubble", "zbv", "dualpipev"])
def test_a_table_read_twice_is_refused_where_the_backward_pass_has_two_halves(schedule):
    engine = {"kind": "native", "schedule": schedule, "zero": 2, "stages": "0 | 1 | 1 | 0"}
    changes = {"parallel": {"pp": 2}, "engine": engine}
    changes["train"] = {"steps": 2, "sequences": 8, "seq_len": LENGTH, "micro_batch": 1}
    for head, refused in (("linear", False), ({"kind": "softcap", "head": "tied"}, True)):
        recipe = tiny(**changes, model={"head": head, "mtp": MTP})
        model = build(recipe.model, recipe.objective.build())
        if not refused:
            staged.cut(recipe, recipe.engine, model)
            continue
        with pytest.raises(ForgeError, match=r"model\.mtp and the head read the same table") as caught:
            staged.cut(recipe, recipe.engine, model)
        assert caught.value.fix == "head: linear, or engine.schedule: interleaved"
