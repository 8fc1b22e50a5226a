from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from shardforge.nn.batch import IGNORE
from shardforge.nn.head import Head, VocabSplit
from shardforge.objective import cross_entropy as file
from shardforge.objective.cross_entropy import cross_entropy

B, S, H, V = 2, 7, 6, 10
LABELS = {
    "all": lambda labels: labels,
    "some-ignored": lambda labels: labels.masked_fill(torch.arange(B * S).view(B, S) % 3 == 1, IGNORE),
    "first-rows-ignored": lambda labels: labels.index_fill(1, torch.arange(4), IGNORE),
    "one-scored": lambda labels: torch.full_like(labels, IGNORE).index_put(
        (torch.tensor(1), torch.tensor(2)), labels[1, 2]
    ),
}


class Plain(Head):
    def __init__(self, weight: Tensor, cap: float | None = None):
        super().__init__()
        self.weight, self.cap = nn.Parameter(weight.clone()), cap

    def operand(self) -> Tensor:
        return self.weight

    def curve(self, logits: Tensor) -> Tensor:
        return logits if self.cap is None else self.cap * (logits / self.cap).tanh()

    def slope(self, curved: Tensor) -> Tensor | None:
        return None if self.cap is None else 1 - (curved / self.cap).square()


@dataclass
class Case:
    x: Tensor
    weight: Tensor
    labels: Tensor


def case(kind: str = "some-ignored", scale: float = 1.0) -> Case:
    generator = torch.Generator().manual_seed(3)
    x = scale * torch.randn(B, S, H, generator=generator, dtype=torch.float64)
    weight = torch.randn(V, H, generator=generator, dtype=torch.float64)
    return Case(x, weight, LABELS[kind](torch.randint(0, V, (B, S), generator=generator)))


def reference(given: Case, z: float = 0.0, cap: float | None = None) -> list[Tensor]:
    """Loss, z term, and the gradients of loss + z * term by x and weight, by autograd over whole logits."""
    x, head = given.x.clone().requires_grad_(), Plain(given.weight, cap)
    logits = head(x).flatten(0, 1)
    scored = given.labels.flatten() != IGNORE
    loss = F.cross_entropy(logits, given.labels.flatten(), ignore_index=IGNORE, reduction="sum")
    square = (logits.logsumexp(1).square() * scored).sum()
    grads = torch.autograd.grad(loss + z * square, (x, head.weight))
    return [loss.detach(), square.detach(), *grads]


def ours(given: Case, z: float = 0.0, cap: float | None = None, factor: float = 1.0) -> list[Tensor]:
    x, head = given.x.clone().requires_grad_(), Plain(given.weight, cap)
    sums = cross_entropy(x, head, given.labels, z, VocabSplit())
    (factor * sums.total).backward()
    return [sums.cross_entropy, sums.z, x.grad, head.weight.grad]


def same(got: list[Tensor], expected: list[Tensor]) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def on_half_the_vocabulary(z: float, cap: float | None) -> list[Tensor]:
    """As `ours` with half of the rows on each of two ranks; gradients put together."""
    given, rank = case(), dist.get_rank()
    x, rows = given.x.clone().requires_grad_(), given.weight.chunk(2)[rank]
    head = Plain(rows, cap)
    sums = cross_entropy(x, head, given.labels, z, VocabSplit(rank * len(rows), dist.group.WORLD))
    sums.total.backward()
    dist.all_reduce(x.grad)  # each rank's is the part that its columns send
    halves = [torch.empty_like(rows) for _ in range(2)]
    dist.all_gather(halves, head.weight.grad)
    return [sums.cross_entropy, sums.z, x.grad, torch.cat(halves)]


@pytest.fixture(params=["whole", "rows-of-3", "row-by-row"])
def chunked(request, monkeypatch) -> None:
    sizes = {"whole": 1 << 20, "rows-of-3": 3 * V * 8, "row-by-row": 1}
    monkeypatch.setattr(file, "FEWEST", 1)
    monkeypatch.setitem(file.CHUNK_BYTES, "cpu", sizes[request.param])


@pytest.mark.parametrize("kind", LABELS)
def test_loss_and_gradients_are_those_of_torch(chunked, kind):
    same(ours(case(kind)), reference(case(kind)))


@pytest.mark.parametrize(("z", "cap"), [(0.1, None), (0.0, 4.0), (0.1, 4.0)])
def test_z_loss_and_softcap_are_those_of_autograd(chunked, z, cap):
    same(ours(case(), z, cap), reference(case(), z, cap))


@pytest.mark.parametrize(("z", "cap"), [(0.0, None), (0.1, None), (0.1, 4.0)])
def test_half_of_the_vocabulary_on_each_of_two_ranks_is_the_whole(ranks, z, cap):
    for answer in ranks(2).run(on_half_the_vocabulary, z, cap):
        same(answer, reference(case(), z, cap))


def test_labels_that_are_all_ignored_give_nothing():
    given = case()
    given.labels.fill_(IGNORE)
    assert all(not value.any() for value in ours(given, z=0.1))


def test_a_factor_on_the_loss_is_a_factor_on_the_gradients():
    loss, square, *grads = reference(case())
    same(ours(case(), factor=0.125), [loss, square, *(grad * 0.125 for grad in grads)])


def test_huge_logits_are_scored_exactly():
    same(ours(case(scale=1e4)), reference(case(scale=1e4)))


def test_the_total_is_the_sum_of_its_terms():
    given = case()
    sums = cross_entropy(given.x, Plain(given.weight), given.labels, 0.25, VocabSplit())
    assert sums.total == sums.cross_entropy + 0.25 * sums.z


def test_reported_terms_cannot_be_differentiated():
    given = case()
    sums = cross_entropy(given.x.requires_grad_(), Plain(given.weight), given.labels, 0.1, VocabSplit())
    assert sums.total.requires_grad and not sums.cross_entropy.requires_grad and not sums.z.requires_grad


def test_without_gradients_the_loss_is_the_same():
    given = case()
    with torch.no_grad():
        sums = cross_entropy(given.x, Plain(given.weight), given.labels, 0.0, VocabSplit())
    same([sums.cross_entropy], reference(given)[:1])


@pytest.mark.parametrize("training", [True, False])
def test_logits_of_a_whole_batch_never_exist(monkeypatch, training):
    monkeypatch.setattr(file, "FEWEST", 1)
    monkeypatch.setitem(file.CHUNK_BYTES, "cpu", 3 * V * 8)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            nonlocal largest
            out = op(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.shape[1:] == (V,) and len(out) != H:  # the matrix itself has H rows
                largest = max(largest, len(out))
            return out

    given = case()
    with Watch(), torch.set_grad_enabled(training):
        cross_entropy(given.x.requires_grad_(), Plain(given.weight), given.labels, 0.0, VocabSplit())
    assert largest == 3


def test_half_precision_is_summed_in_float32():
    given = case()
    x, head = given.x.bfloat16().requires_grad_(), Plain(given.weight.bfloat16())
    sums = cross_entropy(x, head, given.labels, 0.0, VocabSplit())
    sums.total.backward()
    exact = reference(Case(x.detach().double(), head.weight.detach().double(), given.labels))
    assert sums.total.dtype == torch.float32
    assert (x.grad.dtype, head.weight.grad.dtype) == (torch.bfloat16, torch.bfloat16)
    assert abs(sums.cross_entropy.item() / exact[0].item() - 1) < 0.01
    assert (head.weight.grad.double() - exact[3]).norm() < 0.01 * exact[3].norm()
