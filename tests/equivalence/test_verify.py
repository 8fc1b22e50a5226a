"""`verify` finds nothing in sound layouts, and every mistake that is put back: which weight, and why.

The mistakes are those that other frameworks shipped, by number of the field study: 1 loss, norm and auxiliary terms,
2 tensor parallelism, 3 context parallelism, 4 expert parallelism, 5 optimizers, 6 data-parallel variants.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from shardforge.core.layout import Layout
from shardforge.core.slots import optimizers
from shardforge.verify.prepare import Wanted
from shardforge.verify.run import verify
from shardforge.verify.verdict import Verdict, explanation
from tests.equivalence.tampers import ByShard
from tests.tiny import GLU, GQA, RTOL, tiny

MOE = {"kind": "moe", "experts": 4, "k": 2, "inner": 8, "balance": [{"scope": "sequence", "weight": 0.01}]}
EXPERTS = {"ffn": MOE}
MOVED = MOE | {"router": {"kind": "topk", "selection_bias": {"rate": 0.01}}}
MICRO = {"train": {"steps": 2, "sequences": 8, "seq_len": 16, "micro_batch": 2}}
OVERLAPPED = {"engine": {"kind": "native", "overlap": True}}
TIED = {"model": {"head": "tied"}}
BIASES = {"mixer": GQA | {"bias": "all"}, "ffn": GLU | {"bias": True}}


@dataclass(frozen=True)
class Seeded:
    """A mistake, where it is put back, and what verify must say of it."""

    tamper: str
    layout: str
    rule: str
    says: str  # in the likely cause
    first: str = ""  # first weight that differs in the order of the forward pass
    changes: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.tamper}-{self.layout}"


LAST, FIRST = "blocks.1.ffn.router.weight first", "embed.weight"

SEEDED = (
    # 1: Megatron-LM#7452, #7513, #7481: denominators, log(tp), the clip norm, auxiliary gradients
    Seeded("own_mean", "dp2", "guessed", "each data rank divides by the number of its own", FIRST),
    Seeded("own_mean", "cp2", "guessed", "each cp rank divides by the number of its own", FIRST),
    Seeded("micro_batch_mean", "dp2", "guessed", "each micro-batch divides by the number of its own", FIRST, MICRO),
    Seeded("gathered_vocabulary", "tp2", "shifted", "off by +log(tp=2)"),
    Seeded("labels_over_tp", "dp2-tp2", "labels", "scored labels are counted twice over dp or tp"),
    Seeded("norm_of_matrices", "dp2", "clip_norm", "the clip norm leaves out norms"),
    Seeded("norm_counts_copies", "tp2", "clip_norm", "counts norms twice (the degree of tp)"),
    Seeded("auxiliary_twice", "dp2", "backward", LAST, FIRST, {"ffn": MOE}),
    Seeded("padding_counts", "dp2", "terms", "the term router_z differs", FIRST, {"ffn": MOE | {"z_loss": 0.1}}),
    # 2: Megatron-LM#1446, #737; torchtitan PR#4490: gradients under tensor and sequence parallelism
    Seeded("bare_reader", "tp2", "partial", "(norms): their gradient is a partial sum", "blocks.0.mixer_residual.norm"),
    Seeded("bias_on_every_rank", "tp2", "multiple", "biases are counted twice over tp", "blocks.0.mixer.out", BIASES),
    # 3: Megatron-LM#1464, #673: gradients under context parallelism
    Seeded("own_keys_only", "cp2", "backward", "meets blocks.1.mixer", FIRST),
    # 4: transformers#48687, pytorch#160285: routers and experts
    Seeded("experts_twice", "dp2-ep2", "multiple", "experts are counted twice", "blocks.0.ffn.experts", {"ffn": MOE}),
    Seeded("routers_of_own_experts", "dp2-ep2", "backward", LAST, FIRST, {"ffn": MOE}),
    Seeded("bare_reader", "tp2-ep2", "partial", "is a partial sum", "blocks.0", {"ffn": MOE}),  # Megatron-LM#619
    Seeded("loads_over_data", "tp2", "remembered", "what is remembered of a step depends", "", {"ffn": MOVED}),
    Seeded(
        "loads_twice", "tp2", "loads", "the tokens of the experts of layer 0 are counted twice over tp", "", EXPERTS
    ),
    # 5: Megatron-LM#7117; DeepSpeed#8437: an update that depends on the layout
    Seeded("update_by_shard", "dp2", "optimizer", "the optimizer depends on the layout", FIRST),
    # 6: Megatron-Bridge#3826: data-parallel variants that do not train
    Seeded("never_summed", "dp2", "guessed", "gradients are not summed over data ranks", FIRST),
    Seeded("gradients_lost", "dp2", "lost", "got none", "blocks.1.mixer_residual.norm.weight"),
    Seeded("twins_apart", "pp2", "some", "only the gradients of the embedding differ", FIRST, TIED | MICRO),
    Seeded("piece_lost", "tp2", "backward", "meets blocks.1.ffn.up", FIRST, OVERLAPPED),  # Megatron-Bridge#2403
    # and what no list has yet: first weights, a resume, copies, evaluation
    Seeded("seeded_by_rank", "dp2", "start", "the first weights depend on the layout", FIRST),
    Seeded("forgotten_moments", "dp2", "resumed", "not what was saved", ""),
    Seeded("ranks_astray", "dp2-tp2-ep4", "start", "the first weights depend on the layout", FIRST, {"ffn": MOE}),
    Seeded("drifting_copies", "tp2", "copies", "hold different numbers: blocks.0"),
    Seeded("doubled_evaluation", "dp2", "held_out", "only evaluation differs"),
)


SOUND = {"tp2": {}, "cp2": {}, "pp2": TIED | MICRO, "dp2-ep2": {"ffn": MOVED}, "dp2-tp2-ep2-etp2": {"ffn": MOVED}}


def judged(layout: str, tamper: str = "", *, timeout_s: float = 120.0, **changes: Any) -> Verdict:
    where = f"tests.equivalence.tampers:{tamper}" if tamper else ""
    wanted = Wanted(layouts=(Layout.parse(layout),), timeout_s=timeout_s, tamper=where)
    return verify(tiny(**changes), wanted).verdicts[0]


@pytest.mark.parametrize("layout", SOUND)
def test_a_sound_layout_is_equal_and_its_checkpoint_goes_on_elsewhere(layout: str):
    verdict = judged(layout, **SOUND[layout])
    assert verdict.status == "equal", explanation(verdict)
    assert verdict.resumed is not None and verdict.resumed[0] != layout
    assert 0 < max(verdict.errors.values()) < RTOL


def test_a_layout_that_is_too_large_is_verified_by_smaller_ones_and_the_rest_is_said():
    model = {"vocab": 32, "hidden": 16, "stack": ["one x 2"]}
    train = {"steps": 2, "sequences": 64, "seq_len": 16, "micro_batch": 1}
    recipe = tiny(layout=Layout(pp=2, dp_shard=16, tp=4), model=model, train=train)
    report = verify(recipe, Wanted(processes=4))
    assert sorted(str(each.case) for each in report.verdicts) == [
        "dp2-tp2 2 micro-batches",
        "pp2-dp2 4 micro-batches",
        "pp2-tp2 4 micro-batches",
    ]
    assert report.unproved == [
        "dp 16 is verified at 2",
        "tp 4 is verified at 2",
        "pp x dp x tp together needs 8 processes",
    ]
    assert report.exit_code == 0


def test_every_other_optimizer_is_compared_too(monkeypatch: pytest.MonkeyPatch):
    optimizers.kinds()
    monkeypatch.setitem(optimizers._kinds, "by_shard", ByShard)
    verdict = judged("dp2")
    assert (verdict.status, verdict.rule) == ("different", "optimizer")
    assert verdict.worst.startswith("by_shard: step 2: weight")


def test_what_an_engine_refuses_in_the_ranks_is_refused_and_not_different():
    verdict = judged("dp2", "refusing_engine")
    assert (verdict.status, verdict.worst) == ("refused", "parallel  no engine for this\n    fix: another engine")


@pytest.mark.parametrize("seeded", SEEDED, ids=str)
def test_a_mistake_that_is_put_back_is_found_and_named(seeded: Seeded):
    verdict = judged(seeded.layout, seeded.tamper, **seeded.changes)
    assert (verdict.status, verdict.rule) == ("different", seeded.rule), explanation(verdict)
    assert seeded.says in verdict.cause
    assert verdict.first.startswith(seeded.first)


def test_a_rank_that_raises_is_named_with_its_coordinates_and_the_line():
    verdict = judged("dp2-tp2", "raising_rank")
    assert verdict.status == "failed"
    assert verdict.worst.startswith("rank 1 (dp 0, tp 1): ValueError: a number too many (verify/measure.py:")


def test_a_rank_that_dies_is_named_with_the_last_it_said():
    verdict = judged("dp2", "dying_rank")
    assert verdict.worst.startswith("rank 1 (dp 1): the process ended with exit code 9 after saying: out of memory")


def test_a_missing_rank_is_told_from_those_that_wait_for_it_in_a_collective():
    verdict = judged("dp2", "missing_rank", timeout_s=3.0)
    assert verdict.status == "failed"
    assert "no answer within 3 s; rank 0 (dp 0) stood in all_reduce" in verdict.worst
    assert "rank 1 (dp 1) stood in wait" in verdict.worst
