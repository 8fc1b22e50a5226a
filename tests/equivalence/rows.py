"""What a rank of the pool runs for test_matrix.py: two steps of a row of the matrix."""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest.mock import patch

from torch import Tensor

from shardforge.core.layout import Layout
from shardforge.nn.batch import IGNORE, PADDING, Batch
from tests.equivalence import cases
from tests.tiny import batch


def two_steps(layout: Layout, changes: dict[str, Any], data: str) -> dict[str, Tensor]:
    """As cases.two_steps; "padded" data ends each row with positions that hold no token."""
    with patch.object(cases, "batch", padded if data == "padded" else batch):
        return cases.two_steps(layout, changes)


def padded(step: int) -> Batch:
    whole = batch(step)
    documents, labels = whole.documents.clone(), whole.labels.clone()
    for row in range(len(whole)):
        documents[row, 16 - row % 5 :], labels[row, 16 - row % 5 :] = PADDING, IGNORE
    return dataclasses.replace(whole, documents=documents, labels=labels)
