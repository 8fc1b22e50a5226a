from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from shardforge.checkpoint import folders, tensorfile
from shardforge.checkpoint.audit import audit
from shardforge.core.errors import CheckpointError, DataError, Problems
from shardforge.families.open import open_source
from shardforge.recipe.load import load
from shardforge.upcycle import run
from shardforge.upcycle.options import read_options
from shardforge.upcycle.pieces import router
from tests.unit.upcycle import dense

ROOT = Path(__file__).resolve().parents[3]


def upcycled(source, output, processes=1, opener=open_source, **flags):
    given = read_options(flags={"experts": 4, "seed": 3} | flags)
    return run.upcycle(source, output, given, processes=processes, opener=opener)


def weights(path):
    source = open_source(path)
    return {name: source.read(name) for name in source.names}


@pytest.fixture(scope="module")
def made(source, tmp_path_factory):
    return upcycled(source, tmp_path_factory.mktemp("made") / "out")


def test_the_result_is_sound(made):
    assert audit(made.step).problems == ()


def test_the_recipe_builds_the_model_that_was_written(made):
    recipe = load(made.path / "recipe.yaml").recipe
    assert recipe.model.blocks["moe"].ffn.experts == 4
    assert recipe.train.start == str(made.path)


def test_everything_but_the_ffn_is_copied_to_the_byte(made, source):
    before, after = weights(source), weights(made.path)
    kept = [name for name in before if ".ffn." not in name]
    assert kept and all(torch.equal(before[name], after[name]) for name in kept)


@pytest.mark.parametrize("expert", [0, 3])
def test_experts_in_the_files_are_those_of_the_method(made, source, expert):
    before = weights(source)
    ffn = {name: before[f"blocks.1.ffn.{name}.weight"] for name in ("gate", "up", "down")}
    expected, _, _ = dense.expert(made_method(made), ffn, expert, seed=3, layer=1)
    after = weights(made.path)
    for name, weight in expected.items():
        assert torch.equal(after[f"blocks.1.ffn.experts.{name}"][expert].t(), weight)


def made_method(made):
    return read_options(made.path / "upcycle.yaml").options.method


def test_any_number_of_processes_writes_the_same_bytes(source, tmp_path, monkeypatch):
    found = []
    for processes in (1, 2, 4):
        place = tmp_path / str(processes)
        place.mkdir()
        monkeypatch.chdir(place)  # the recipe names its folder as it was named
        upcycled(source, Path("out"), processes)
        found.append(dense.contents(place))
    assert found[0] == found[1] == found[2]


def test_the_same_call_again_changes_nothing(made, source):
    before = dense.contents(made.path)
    again = upcycled(source, made.path)
    assert not again.fresh and again.report == made.report and dense.contents(made.path) == before


def test_other_options_are_refused_with_what_differs(made, source):
    before = dense.contents(made.path)
    with pytest.raises(CheckpointError, match=r"method.ratio: 0.5 there, 0.25 here"):
        upcycled(source, made.path, method={"ratio": 0.25})
    assert dense.contents(made.path) == before


def test_another_source_of_the_same_shapes_is_refused(made, source, tmp_path):
    other = dense.save(tmp_path / "other", model={"init": {"std": 0.2}})
    with pytest.raises(CheckpointError, match=r"source: \w+ there, \w+ here"):
        upcycled(other, made.path)


KILLED = textwrap.dedent(
    """
    import os, signal, sys
    from pathlib import Path
    from shardforge.checkpoint import tensorfile
    from shardforge.upcycle import run
    from shardforge.upcycle.options import read_options

    source, root = Path(sys.argv[1]), Path(sys.argv[2])
    given = read_options(flags={"experts": 4, "seed": 3})
    names = ("put", "write_whole", "settle_folder")  # every way in which something reaches the disk
    real = {name: getattr(tensorfile, name) for name in names}
    steps = 0

    def run_until(place, end):
        "Do it in `place`, and die at step `end`."
        global steps
        place.mkdir()
        os.chdir(place)

        def watched(work):
            def step(*args, **kwargs):
                global steps
                steps += 1
                if steps == end:
                    os.kill(os.getpid(), signal.SIGKILL)
                return work(*args, **kwargs)
            return step

        for name in names:
            setattr(tensorfile, name, watched(real[name]))
        run.upcycle(source, Path("out"), given, processes=1)

    run_until(root / "whole", None)
    total, steps = steps, 0
    for end in [1, 2, 5, total // 3, total // 2, *range(total - 9, total + 1)]:
        child = os.fork()
        if child == 0:
            run_until(root / str(end), end)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL, end
    """
)


def test_killed_at_any_point_it_never_looks_whole_and_goes_on_to_the_same_bytes(source, tmp_path, monkeypatch):
    command = [sys.executable, "-c", KILLED, str(source), str(tmp_path)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    said = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
    assert said.returncode == 0, said.stderr
    expected = dense.contents(tmp_path / "whole")
    places = [path for path in tmp_path.iterdir() if path.name != "whole"]
    assert len(places) == 15
    for place in places:
        root = place / "out" / "checkpoints"
        if not folders.committed(root):  # the very last step is after the marker has its name
            assert all(audit(path).problems for path in folders.torn(root))
        monkeypatch.chdir(place)
        upcycled(source, Path("out"))
        assert dense.contents(place) == expected, place.name


def test_finished_files_are_kept_and_a_changed_one_is_made_again(source, tmp_path, monkeypatch):
    real, written = tensorfile.write_tensors, []

    def failing(path, parts):
        if path.name.startswith("rank-00002"):
            raise OSError(28, "No space left on device")
        return real(path, parts)

    monkeypatch.setattr(tensorfile, "write_tensors", failing)
    with pytest.raises(CheckpointError, match="No space left"):
        upcycled(source, tmp_path / "out")
    torn = folders.torn(tmp_path / "out" / "checkpoints")[0]
    with (torn / "rank-00001.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")
    monkeypatch.setattr(tensorfile, "write_tensors", lambda path, parts: written.append(path.name) or real(path, parts))
    made = upcycled(source, tmp_path / "out")
    assert written == ["rank-00001.safetensors", "rank-00002.safetensors"]
    assert audit(made.step).problems == ()


def test_an_unfinished_one_with_other_options_is_refused(source, tmp_path, monkeypatch):
    def broken(path, parts):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch, pytest.raises(CheckpointError):
        patch.setattr(tensorfile, "write_tensors", broken)
        upcycled(source, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"unfinished.*\n.*seed: 3 there, 4 here"):
        upcycled(source, tmp_path / "out", seed=4)


def test_a_worker_that_dies_is_an_error(source, tmp_path):
    with pytest.raises(DataError, match="one of 2 workers was killed") as found:
        upcycled(source, tmp_path / "out", processes=2, opener=dense.dying)
    assert "--processes 1" in found.value.fix
    assert folders.committed(tmp_path / "out" / "checkpoints") == []


def test_a_source_is_never_written_to(made, source):
    """Files and folders are as the fixture left them: nothing was added, nothing is newer than its checkpoint."""
    marker = source / "checkpoints" / folders.name(7) / folders.MARKER
    assert all(path.stat().st_mtime_ns <= marker.stat().st_mtime_ns for path in source.rglob("*") if path.is_file())


@pytest.mark.parametrize("place", ["", "inside", ".."])
def test_an_output_in_its_source_or_around_it_is_refused(source, place):
    with pytest.raises(CheckpointError, match="lie in one another"):
        upcycled(source, source / place)


def test_a_folder_of_something_else_is_refused(source, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="something else: notes"):
        upcycled(source, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_full_disk_is_told_before_anything_is_written(source, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match="1000 B left"):
        upcycled(source, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_weights_that_do_not_match_their_recipe_are_told(source, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    text = (copy / "recipe.yaml").read_text()
    (copy / "recipe.yaml").write_text(text.replace("inner: 24", "inner: 32"))
    with pytest.raises(Problems, match=r"blocks.0.ffn.down.weight: \[16, 24\] in the files, \[16, 32\]"):
        upcycled(copy, tmp_path / "out")


def test_carrying_moments_of_a_source_without_them_is_refused(tmp_path):
    bare = dense.save(tmp_path / "bare")
    with pytest.raises(CheckpointError, match="no optimizer state"):
        upcycled(bare, tmp_path / "out", moments="carry")


def test_carried_moments_are_the_sources_where_neurons_were_kept_and_0_elsewhere(source, tmp_path):
    made = upcycled(source, tmp_path / "out", moments="carry")
    assert audit(made.step).problems == ()
    before, after = open_source(source), open_source(made.path)
    was = before.read_moment("exp_avg_sq", "blocks.0.ffn.down.weight")
    weight = before.read("blocks.0.ffn.down.weight")
    found = after.read_moment("exp_avg_sq", "blocks.0.ffn.experts.down")
    kept = (after.read("blocks.0.ffn.experts.down") == weight.t()).all(-1)  # [e, f]
    assert kept.float().mean() == 0.5
    for expert in range(4):
        assert torch.equal(found[expert][kept[expert]], was.t()[kept[expert]])
        assert found[expert][~kept[expert]].abs().max() == 0.0
    assert after.read_moment("exp_avg", "blocks.0.ffn.router.weight").abs().max() == 0.0
    name = "blocks.0.mixer.q.weight"
    assert torch.equal(after.read_moment("exp_avg", name), before.read_moment("exp_avg", name))


def test_shared_neurons_are_the_first_and_never_drawn_anew(source, tmp_path):
    found = weights(upcycled(source, tmp_path / "out", shared=6, expert_ffn=12).path)
    before = weights(source)
    assert torch.equal(found["blocks.0.ffn.shared.up.weight"], before["blocks.0.ffn.up.weight"][:6])
    assert torch.equal(found["blocks.0.ffn.shared.down.weight"], before["blocks.0.ffn.down.weight"][:, :6])


@pytest.mark.parametrize("dtype, expected", [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_all_weights_get_the_type_that_is_asked_for(source, tmp_path, dtype, expected):
    made = upcycled(source, tmp_path / "out", dtype=dtype)
    assert audit(made.step).problems == ()
    assert {tensor.dtype for tensor in weights(made.path).values()} == {expected}


def test_biases_go_with_their_neurons_and_the_output_bias_is_copied(tmp_path):
    biased = dense.save(tmp_path / "biased", ffn={"kind": "mlp", "inner": 24, "activation": "gelu", "bias": True})
    found, before = weights(upcycled(biased, tmp_path / "out").path), weights(biased)
    up, bias = found["blocks.0.ffn.experts.up"], found["blocks.0.ffn.experts.up_bias"]
    kept = (up.transpose(1, 2) == before["blocks.0.ffn.up.weight"]).all(-1)  # [e, f]
    assert torch.equal(kept, bias == before["blocks.0.ffn.up.bias"])
    assert torch.equal(found["blocks.0.ffn.experts.down_bias"], before["blocks.0.ffn.down.bias"].expand(4, -1))


@pytest.mark.parametrize("init, mean, std", [
    ("uniform_zero_mean", 0.0, 0.02), ("normal_002", 0.0, 0.02),
    ("uniform", 0.5, 0.2887), ("normal_02887", 0.0, 0.2887),
])  # fmt: skip
def test_router_rows_have_their_spread(made, init, mean, std):
    layer = dataclasses.replace(made.target.layers[0], experts=64, hidden=512)
    rows = router(1, init, layer)
    assert rows.mean().item() == pytest.approx(mean, abs=3 * std / rows.numel() ** 0.5)
    assert rows.std().item() == pytest.approx(std, rel=0.02)


def test_a_zero_mean_router_has_no_mean_at_all(made):
    assert abs(router(1, "uniform_zero_mean", made.target.layers[0]).double().mean().item()) < 1e-8


def test_virtual_groups_repeat_router_rows(source, tmp_path):
    made = upcycled(source, tmp_path / "out", method="virtual_group", expert_ffn=12, experts=8, k=2)
    rows = weights(made.path)["blocks.0.ffn.router.weight"]
    assert torch.equal(rows[0::2], rows[1::2]) and not torch.equal(rows[0], rows[2])


def test_nothing_in_the_output_tells_the_time_or_who_wrote_it(made):
    names = {path.name for path in made.path.iterdir()}
    assert names == {"checkpoints", "recipe.yaml", "upcycle.yaml", "report.json", "report.html"}
    manifest = json.loads((made.step / folders.MANIFEST).read_bytes())
    assert manifest.keys() == {"step", "describe", "extra", "files"}


MEASURED = textwrap.dedent(
    """
    import sys
    from pathlib import Path
    import torch
    torch.set_num_threads(1)
    from shardforge.families.open import open_source
    from shardforge.upcycle import run
    from shardforge.upcycle.options import read_options

    def of(key):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

    source, output = Path(sys.argv[1]), Path(sys.argv[2])
    given = read_options(flags={"experts": 8, "layers": "0"})
    run.upcycle(source, output.with_name("warm"), given, processes=1)  # what is imported on the way
    Path("/proc/self/clear_refs").write_text("5")
    before = of("VmRSS")
    made = run.upcycle(source, output, read_options(flags={"experts": 8}), processes=1)
    print(of("VmHWM") - before, max(path.stat().st_size for path in made.step.glob("*.safetensors")))
    """
)


def test_memory_stays_below_twice_the_largest_layer(tmp_path):
    changes = {"model": {"hidden": 512}, "mixer": {"kind": "gqa", "heads": 4, "kv_heads": 4, "head_dim": 8}}
    wide = dense.save(tmp_path / "wide", ffn={"kind": "glu", "inner": 1024}, **changes)
    env = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_TRIM_THRESHOLD_": "0"}
    command = [sys.executable, "-c", MEASURED, str(wide), str(tmp_path / "out")]
    said = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, check=True).stdout.split()
    grown, layer = map(int, said)
    assert layer > 8 * 3 * 512 * 1024 * 4
    assert grown < 2 * layer, f"{grown / layer:.2f} layers"
