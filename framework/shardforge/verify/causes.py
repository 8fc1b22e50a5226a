"""What a pattern of errors points to: small functions, asked in order; the first that knows something is believed.

Each takes the evidence of one case and gives a sentence, or None. Put the special before the general.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch

from shardforge.core.layout import SHORT
from shardforge.verify.compare import RTOL, Difference, Evidence, first_in_order, whole_norm

Rule = Callable[[Evidence], str | None]
EXACT = 1e-6
"""How near a pattern must come to what it is taken for."""


def cause(evidence: Evidence) -> tuple[str, str]:
    """(name of the rule, what it says) of the first rule that fits; ("unknown", ...) always does."""
    for rule in RULES:
        if told := rule(evidence):
            return rule.__name__, told
    return "unknown", "the pattern fits nothing that is known here"


def resumed(evidence: Evidence) -> str | None:
    """The checkpoint of another layout gives other tensors than were saved."""
    wrong = [each for each in evidence.differences if each.phase == "resumed"]
    if not wrong:
        return None
    what = "; the weights are right" if all(each.what == "optimizer state" for each in wrong) else ""
    return f"what the checkpoint gives back is not what was saved: {listed(wrong)}{what}"


def start(evidence: Evidence) -> str | None:
    wrong = [each for each in evidence.differences if each.phase == "start" and each.what == "weight"]
    if not wrong:
        return None
    return f"the first weights depend on the layout ({listed(wrong)}): random numbers must follow from name and place"


def labels(evidence: Evidence) -> str | None:
    wrong = evidence.wrong("scored labels")
    if not wrong or math.isnan(wrong[0].ratio):
        return None
    return f"scored labels are counted {times(wrong[0].ratio)}{over(evidence, wrong[0].ratio)}"


def loads(evidence: Evidence) -> str | None:
    """The loss is right, and how many tokens each expert got is not."""
    wrong = evidence.wrong("expert load")
    if not wrong or not sound(evidence, wrong[0], "loss", "gradient"):
        return None
    ratio = wrong[0].ratio
    exact = wrong[0].rest < EXACT and close(ratio) is not None
    told = f"are counted {times(ratio)}{over(evidence, ratio)}" if exact else "are not those of the whole batch"
    return f"the tokens of the experts {wrong[0].name} {told}; the loss is right"


def remembered(evidence: Evidence) -> str | None:
    """Everything of a step is right but what modules keep of it for the next one."""
    wrong = evidence.wrong("remembered")
    if not wrong or not sound(evidence, wrong[0], "loss", "expert load", "gradient", "weight"):
        return None
    return (
        f"what is remembered of a step depends on the layout: {listed(wrong)}; it must follow from the loads of the "
        "whole batch alone, once a step"
    )


def copies(evidence: Evidence) -> str | None:
    wrong = evidence.wrong("copies")
    if not wrong or wrong[0] is not evidence.differences[0]:
        return None
    return f"ranks that should hold the same hold different numbers: {listed(wrong)}"


def shifted(evidence: Evidence) -> str | None:
    wrong = evidence.wrong("loss")
    if not wrong or wrong[0].got is None or wrong[0].want is None:
        return None
    shift = (wrong[0].got - wrong[0].want).item()
    for axis, degree in evidence.layout.degrees().items():
        if degree > 1 and abs(abs(shift) - math.log(degree)) < EXACT:
            sign = "+" if shift > 0 else "-"
            return (
                f"the loss is off by {sign}log({SHORT[axis]}={degree}): the normalizer of the softmax counts the "
                f"vocabulary {'of all ranks on each rank' if shift > 0 else 'of one rank only'}"
            )
    return None


def guessed(evidence: Evidence) -> str | None:
    """Step 1 looks exactly as it would with a well-known mistake."""
    wrong = [each for each in evidence.differences if each.phase == "step 1" and each.what in ("loss", "gradient")]
    for told, guess in evidence.guesses.items() if wrong else ():
        if all(each.got is not None and same(each.got, guess.get(each.key)) for each in wrong):
            return told
    return None


def lost(evidence: Evidence) -> str | None:
    wrong = evidence.wrong("gradient")
    gone = [each for each in wrong if each.got is None or not each.got.norm() > STILL_OF * norm(each)]
    if not gone:
        return None
    return f"gradients are lost: {listed(gone)} got {'none' if gone[0].got is None else 'zero'}"


def multiple(evidence: Evidence) -> str | None:
    """Wrong gradients are all the same multiple of the right ones."""
    wrong = [each for each in evidence.wrong("gradient") if each.want is not None and norm(each) > 0]
    if not wrong or any(not each.rest < EXACT or abs(each.ratio - wrong[0].ratio) > EXACT for each in wrong):
        return None
    if abs(wrong[0].ratio - 1) < EXACT:
        return None
    ratio, which = wrong[0].ratio, "gradients of all weights"
    if len(wrong) < len(evidence.gradients(wrong[0].phase)):
        which = f"the gradients of {kinds(evidence, wrong)}"
    if all(each.name.endswith("bias") for each in wrong) and ratio > 1:
        return f"{which} are counted {times(ratio)}{over(evidence, ratio)}: every rank adds the bias, not only one"
    return f"{which} are counted {times(ratio)}{over(evidence, ratio)}: {listed(wrong)}"


def partial(evidence: Evidence) -> str | None:
    """Only weights that are whole on each rank, while tp splits others."""
    wrong = evidence.wrong("gradient")
    if not wrong or evidence.layout.tp == 1 or any(evidence.split(each.name) for each in wrong):
        return None
    if not any(evidence.split(name) for name in evidence.dims):
        return None
    return (
        f"only weights that are whole on each rank differ ({kinds(evidence, wrong)}): their gradient is a partial sum "
        "that was not added up over tp; read them through nn.module.local"
    )


def some(evidence: Evidence) -> str | None:
    """One kind of weight alone."""
    wrong = evidence.wrong("gradient")
    if not wrong or any(each.what == "loss" for each in evidence.differences if each.phase == wrong[0].phase):
        return None
    named = kinds(evidence, wrong)
    return f"only the gradients of {named} differ" if not named.endswith("weights") else None


def backward(evidence: Evidence) -> str | None:
    """The loss of the step is right and gradients are wrong from some place on, down to the embedding."""
    wrong = evidence.wrong("gradient")
    if not wrong or any(each.what == "loss" for each in evidence.differences if each.phase == wrong[0].phase):
        return None
    _, last = first_in_order(wrong, evidence.order)
    if last == (evidence.order[-1] if evidence.order else ""):
        return "the loss is right and the gradient wrong from the head on: look at the backward of the loss"
    return f"the backward pass meets {last} first: look at what stands between it and the weights after it"


def terms(evidence: Evidence) -> str | None:
    wrong = evidence.wrong("term")
    if not wrong or any(each.what == "loss" for each in evidence.differences if each.phase == wrong[0].phase):
        return None
    ratio = wrong[0].ratio
    exact = wrong[0].rest < EXACT and close(ratio) is not None
    told = f"is counted {times(ratio)}{over(evidence, ratio)}" if exact else "differs"
    return f"the term {wrong[0].name} {told}; the loss is right"


def forward(evidence: Evidence) -> str | None:
    wrong = evidence.wrong("loss")
    if not wrong:
        return None
    if wrong[0].phase != "start" and not any(each.phase == "start" for each in evidence.differences):
        if wrong[0].phase == "step 1":
            return "evaluation is right and the training loss is not: dropout, or the normalisation of the loss"
        return None
    return "the forward pass itself differs: what enters or leaves a mixer, an ffn, the embedding or the head"


def clip_norm(evidence: Evidence) -> str | None:
    """The gradients are right and their norm is not: which piece is left out or counted twice."""
    wrong = evidence.wrong("gradient norm")
    if not wrong or wrong[0].got is None or not sound(evidence, wrong[0], "loss", "gradient"):
        return None
    grads, got = evidence.gradients(wrong[0].phase), wrong[0].got.item() ** 2
    total = whole_norm(grads) ** 2
    for name, members in pieces(evidence, grads):
        piece = whole_norm({each: grads[each] for each in members}) ** 2
        if 0 < piece < total and abs(total - piece - got) < EXACT * total:
            return f"the clip norm leaves out {name}"
        for axis, degree in evidence.layout.degrees().items():
            for factor in (degree, 1 / degree) if degree > 1 and piece else ():
                if abs(total + (factor - 1) * piece - got) < EXACT * total:
                    return f"the clip norm counts {name} {times(factor)} (the degree of {SHORT[axis]})"
    return "the clip norm is not that of the gradients, which are right"


def optimizer(evidence: Evidence) -> str | None:
    """Gradients are right up to the step after which weights are not."""
    wrong = evidence.wrong("weight", "optimizer state")
    if not wrong or not sound(evidence, wrong[0], "loss", "gradient", "gradient norm"):
        return None
    only = [each for each in wrong if each.what == "weight"] or wrong
    return f"gradients are right and the update of {kinds(evidence, only)} is not: the optimizer depends on the layout"


def held_out(evidence: Evidence) -> str | None:
    if all(each.phase in ("start", "held out") and each.what in ("loss", "term") for each in evidence.differences):
        return "only evaluation differs: its normalisation, or dropout that is not off"
    return None


RULES: tuple[Rule, ...] = (
    resumed,
    start,
    labels,
    loads,
    remembered,
    copies,
    shifted,
    guessed,
    lost,
    multiple,
    partial,
    some,
    terms,
    held_out,
    forward,
    backward,
    clip_norm,
    optimizer,
)

STILL_OF = 1e-9
"""A gradient below this share of what it should be counts as lost."""


def kinds(evidence: Evidence, wrong: Iterable[Difference]) -> str:
    """The narrowest word for a set of weights: "experts", "routers", "biases", "norms", ..., else their number."""
    names = {each.name for each in wrong}
    for word, members in pieces(evidence, evidence.dims):
        if names <= set(members) and len(members) < len(evidence.dims):
            return word
    return f"{len(names)} of {len(evidence.dims)} weights"


def pieces(evidence: Evidence, names: Iterable[str]) -> list[tuple[str, list[str]]]:
    """Groups of weights that a mistake may be about, narrow ones first."""
    every = list(names)
    tests: dict[str, Callable[[str], bool]] = {
        "biases": lambda name: name.endswith("bias"),
        "routers": lambda name: ".router." in name,
        "norms": lambda name: "norm" in name.split(".")[-2:-1] or name.split(".")[-2:-1] in (["q_norm"], ["k_norm"]),
        "experts": evidence.expert,
        "the embedding": lambda name: name.startswith("embed."),
        "the head": lambda name: name.startswith("head."),
        "weights that are whole on each rank": lambda name: not evidence.split(name),
        "weights that are split": evidence.split,
    }
    return [(word, [name for name in every if test(name)]) for word, test in tests.items()]


def sound(evidence: Evidence, wrong: Difference, *whats: str) -> bool:
    """Whether none of `whats` differs before `wrong`."""
    before = evidence.differences[: evidence.differences.index(wrong)]
    return not any(each.what in whats for each in before)


def listed(wrong: Iterable[Difference]) -> str:
    """Up to three names."""
    names = list(dict.fromkeys(each.name for each in wrong))
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def times(ratio: float) -> str:
    whole = close(ratio)
    if whole is not None:
        return "twice" if whole == 2 else f"{whole} times"
    part = close(1 / ratio) if ratio else None
    return f"1/{part} times" if part is not None else f"{ratio:.4g} times"


def close(ratio: float) -> int | None:
    """The whole number that `ratio` is, if it is one."""
    near = round(ratio) if math.isfinite(ratio) else 0
    return near if near and abs(ratio - near) < EXACT * near else None


def over(evidence: Evidence, ratio: float) -> str:
    """Axes, or products of two, whose degree explains the factor."""
    factor = ratio if ratio > 1 else 1 / ratio if ratio else 0.0
    degrees = {axis: degree for axis, degree in evidence.layout.degrees().items() if degree > 1}
    names = [SHORT[axis] for axis, degree in degrees.items() if abs(degree - factor) < EXACT]
    if not names:
        items = list(degrees.items())
        names = [
            f"{SHORT[one]} x {SHORT[other]}"
            for at, (one, first) in enumerate(items)
            for other, second in items[at + 1 :]
            if abs(first * second - factor) < EXACT
        ]
    return f" over {' or '.join(names)}" if names else ""


def norm(each: Difference) -> float:
    return each.want.double().norm().item() if each.want is not None else 0.0


def same(got: torch.Tensor, want: torch.Tensor | None) -> bool:
    if want is None:
        return False
    return bool((got.double() - want.double()).norm() <= 100 * RTOL * want.double().norm().clamp(min=1e-12))
