from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from shardforge import __version__
from shardforge.cli import main as cli
from shardforge.core.errors import DataError, Problems, RecipeError

HEAVY = ("torch", "numpy", "yaml", "rich", "matplotlib", "tokenizers", "safetensors", "transformers")
HELP_ALONE = f"""
import sys
from shardforge.cli.main import main
try:
    main(sys.argv[1:])
except SystemExit as stop:
    assert stop.code in (0, None), stop.code
loaded = [name for name in {HEAVY!r} if name in sys.modules]
assert not loaded, f"imported for a help text: {{loaded}}"
"""


def python(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, cwd=cwd)


@pytest.fixture
def fails_with(monkeypatch: pytest.MonkeyPatch):
    """Makes every command line raise the given exception."""

    def arrange(error: BaseException) -> None:
        def run(words: list[str]) -> int:
            raise error

        monkeypatch.setattr(cli, "run", run)

    return arrange


def test_the_list_of_commands_answers_without_heavy_imports():
    done = python("-c", HELP_ALONE, "--help")
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in cli.commands())


@pytest.mark.parametrize("name", cli.commands())
def test_the_help_of_a_command_answers_without_heavy_imports(name: str):
    done = python("-c", HELP_ALONE, name, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: shardforge {name}")


@pytest.mark.parametrize("name", cli.commands())
def test_a_command_says_what_it_is_for_in_one_line(name: str):
    text = cli.command(name).HELP
    assert text and "\n" not in text and len(text) <= 100


def test_no_command_at_all_prints_the_list(capsys: pytest.CaptureFixture[str]):
    assert cli.main([]) == 0
    assert "commands:" in capsys.readouterr().out


def test_the_version_is_the_package_version(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out == f"shardforge {__version__}\n"


def test_a_mistyped_command_gets_the_nearest_one(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["zooo"]) == 2
    assert "did you mean 'zoo'?" in capsys.readouterr().err


def test_a_mistyped_argument_names_the_help_of_its_command(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["zoo", "--wrong"]) == 2
    assert capsys.readouterr().err == ("error: shardforge zoo  cannot use --wrong\n    fix: shardforge zoo --help\n")


def test_a_mistake_is_printed_with_its_fix_and_no_traceback(fails_with, capsys: pytest.CaptureFixture[str]):
    fails_with(DataError("12 tokens, expected 13", "shard.bin", "build it again"))
    assert cli.main(["zoo"]) == 2
    assert capsys.readouterr().err == "error: shard.bin  12 tokens, expected 13\n    fix: build it again\n"


def test_several_mistakes_are_printed_together(fails_with, capsys: pytest.CaptureFixture[str]):
    fails_with(Problems([RecipeError("one", "a.yaml:1"), RecipeError("two", "a.yaml:2", "mend it")]))
    assert cli.main(["zoo"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        *("error: 2 problems in the recipe", "  a.yaml:1  one", "  a.yaml:2  two", "      fix: mend it")
    ]


@pytest.mark.parametrize("words", [["--traceback", "zoo"], ["zoo", "--traceback"]], ids=" ".join)
def test_the_traceback_is_there_when_asked_for(fails_with, words: list[str], capsys: pytest.CaptureFixture[str]):
    fails_with(DataError("torn"))
    assert cli.main(words) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--traceback", "zoo"], ["zoo", "--traceback"]], ids=" ".join)
def test_the_traceback_flag_stands_before_or_after_the_command(words: list[str]):
    assert cli.parser("zoo").parse_args(words).traceback is True


def test_an_interrupt_is_one_line_and_code_130(fails_with, capsys: pytest.CaptureFixture[str]):
    fails_with(KeyboardInterrupt())
    assert cli.main(["zoo"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("words", [["--help"], []], ids=["help", "no command"])
def test_a_reader_that_went_away_is_no_error(words: list[str]):
    read, write = os.pipe()
    os.close(read)
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with os.fdopen(write, "w") as closed:
        done = subprocess.run(
            [sys.executable, "-m", "shardforge", *words],
            stdout=closed,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            env=buffered,
        )
    assert (done.returncode, done.stderr) == (141, "")


def test_the_module_exits_with_the_code_of_the_command():
    assert python("-m", "shardforge", "no-such-command").returncode == 2


def test_a_bug_keeps_its_traceback(fails_with):
    fails_with(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        cli.main(["zoo"])
