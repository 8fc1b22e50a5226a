from __future__ import annotations

import argparse
import os
import pickle
from collections import OrderedDict

import pytest
import torch

from shardforge.core.errors import CheckpointError
from shardforge.families.pickles import Inert, read_pickle, read_saved


class Unknown:
    def __init__(self) -> None:
        self.inside = 3


class Harmful:
    def __reduce__(self):
        return os.system, ("exit 3",)


def test_tensors_and_plain_things_come_back(tmp_path):
    what = {
        "weight": torch.arange(6.0).view(2, 3).bfloat16(),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "settings": argparse.Namespace(layers=2, dtype=torch.float16, sizes=torch.Size([1, 2])),
        "order": OrderedDict(a=[1, (2.5, None)], b={True, "x"}),
    }
    torch.save(what, tmp_path / "x.pt")
    read = read_saved(tmp_path / "x.pt")
    assert torch.equal(read["weight"], what["weight"]) and torch.equal(read["parameter"], what["parameter"])
    assert (read["settings"], read["order"]) == (what["settings"], what["order"])


def test_a_tensor_with_attributes_comes_back_without_them(tmp_path):
    weight = torch.ones(2, 3)
    weight.owner = Unknown()
    torch.save(weight, tmp_path / "x.pt")
    read = read_saved(tmp_path / "x.pt")
    assert torch.equal(read, torch.ones(2, 3)) and not hasattr(read, "owner")


def test_what_is_not_known_is_inert_and_the_rest_is_read(tmp_path):
    torch.save({"odd": Unknown(), "odder": [os.system, Harmful()], "plain": 5}, tmp_path / "x.pt")
    read = read_saved(tmp_path / "x.pt")
    assert isinstance(read["odd"], Inert) and isinstance(read["odder"][1], Inert) and read["plain"] == 5


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_no_pickle_runs_anything(tmp_path, protocol, monkeypatch):
    (tmp_path / "x").write_bytes(pickle.dumps({"call": Harmful()}, protocol))
    monkeypatch.setattr(os, "system", lambda command: pytest.fail(command))
    assert isinstance(read_pickle(tmp_path / "x")["call"], Inert)


@pytest.mark.parametrize("content", [b"", b"text", b"\x80\x04."])
def test_what_is_no_pickle_is_refused(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"cannot be read"):
        read_pickle(tmp_path / "x")
    with pytest.raises(CheckpointError, match=r"not a file of torch.save"):
        read_saved(tmp_path / "x")
