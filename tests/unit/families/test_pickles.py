from __future__ import annotations

import argparse
import collections
import io
import os
import pickle
from collections import OrderedDict

import pytest
import torch

from shardforge.core.errors import CheckpointError
from shardforge.families.pickles import (
    HARMLESS,
    Inert,
    Unpickler,
    distrusted,
    read_pickle,
    read_saved,
    read_stream,
)
from tests.unit.families.torchscript import program


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


@pytest.mark.parametrize("through", ["file", "stream"])
def test_a_program_of_torchscript_is_refused_and_does_not_run(tmp_path, through):
    path = program(tmp_path / "x.pt", tmp_path / "ran")
    with pytest.raises(CheckpointError, match=r"TorchScript(.|\n)*state_dict"), path.open("rb") as file:
        read_saved(path) if through == "file" else read_stream(file, path)
    assert not (tmp_path / "ran").exists()


def test_a_stream_is_read_as_a_file_is(tmp_path):
    torch.save({"a": torch.arange(3)}, stream := io.BytesIO())
    assert torch.equal(read_stream(io.BytesIO(stream.getvalue()), tmp_path)["a"], torch.arange(3))


def test_a_stream_in_the_format_before_zip_files_is_refused(tmp_path):
    torch.save({"a": 1}, stream := io.BytesIO(), _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"format before torch 1.6"):
        read_stream(io.BytesIO(stream.getvalue()), tmp_path / "x")


KNOWN = [*HARMLESS, ("torch", "float32"), ("torch", "strided"), ("torch", "contiguous_format"), ("os", "system")]


@pytest.mark.parametrize("module, name", KNOWN, ids=lambda each: each)
@pytest.mark.parametrize("attribute", ["__contains__", "__doc__", "__defaults__", "__new__", "__call__", "marked"])
def test_what_a_pickle_sets_on_a_name_stays_with_that_name(module, name, attribute):
    first, again = (Unpickler(io.BytesIO()).find_class(module, name) for _ in range(2))
    real = HARMLESS.get((module, name), Inert if module == "os" else first)
    before = getattr(real, attribute, None)
    try:
        setattr(first, attribute, "changed")
    except (TypeError, AttributeError):
        assert first is again  # closed: nobody can
    else:
        assert getattr(again, attribute, None) != "changed"
    assert getattr(real, attribute, None) == before


class Built:
    """A pickle that names a class and sets an attribute of the class itself."""

    def __init__(self, named: type):
        self.named = named

    def dumps(self) -> bytes:
        state = pickle.dumps((None, {"__contains__": 1}), 2)[2:-1]
        return b"\x80\x02c" + f"{self.named.__module__}\n{self.named.__qualname__}\n".encode() + state + b"b."


def test_slot_state_of_a_pickle_does_not_change_a_class_of_the_process(tmp_path):
    (tmp_path / "x").write_bytes(Built(argparse.Namespace).dumps())
    assert read_pickle(tmp_path / "x").__contains__ == 1
    assert "a" in argparse.Namespace(a=1) and "b" not in argparse.Namespace(a=1)


def test_slot_state_on_a_closed_class_is_an_error(tmp_path):
    (tmp_path / "x").write_bytes(Built(collections.OrderedDict).dumps())
    with pytest.raises(CheckpointError, match=r"cannot be read"):
        read_pickle(tmp_path / "x")


@pytest.mark.parametrize("read", [read_pickle, read_saved])
def test_a_pipe_is_refused_and_not_waited_for(tmp_path, read):
    os.mkfifo(tmp_path / "x")
    with pytest.raises(CheckpointError, match=r"no regular file"):
        read(tmp_path / "x")
    with pytest.raises(CheckpointError, match=r"missing"):
        read(tmp_path / "y")


def test_errors_of_foreign_content_name_the_place_and_are_short(tmp_path):
    with pytest.raises(CheckpointError, match=r"is odd: KeyError") as found, distrusted(tmp_path, "is odd"):
        raise KeyError("x" * 10000)
    assert found.value.where == str(tmp_path) and found.value.fix and len(str(found.value)) < 500


def test_a_mistake_that_has_a_text_keeps_it(tmp_path):
    with pytest.raises(CheckpointError, match=r"^there  what$"), distrusted(tmp_path):
        raise CheckpointError("what", "there")
