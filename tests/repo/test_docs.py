from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.repo import doc_runner

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "recipes/**/*.md", "slurm/**/*.md", "kernels/**/*.md", "tests/*.md")
    for path in ROOT.glob(pattern)
)
RUN = [path for path in DOCUMENTS if any(block.tested for block in doc_runner.blocks(path))]
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.fixture
def run_document(inside):
    """Runs the tested blocks of a document with a folder as the clone."""

    def run(document: Path, folder: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, doc_runner.__file__, str(document)],
            capture_output=True,
            text=True,
            check=False,
            cwd=folder,
            env=inside(folder),
        )

    return run


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_python_in_a_document_is_python(document: Path):
    for block in doc_runner.blocks(document):
        if block.language == "python":
            compile(block.text, f"{name(document)}:{block.line}", "exec")


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_relative_links_of_a_document_lead_somewhere(document: Path):
    prose = doc_runner.FENCE.sub("", document.read_text())
    targets = [first or second for first, second in LINK.findall(prose)]
    local = [target.partition("#")[0] for target in targets if not re.match(r"[a-z]+:", target)]
    assert [target for target in local if target and not (document.parent / target).exists()] == []


@pytest.mark.parametrize("document", RUN, ids=name)
def test_tested_blocks_of_a_document_run_in_order(document: Path, workspace: Path, run_document):
    done = run_document(document, workspace)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("page", ["zoo", "recipe"])
def test_a_generated_page_is_current(page: str):
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "dev" / f"{page}_docs.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_failing_block_fails_its_document_at_its_line(tmp_path: Path, run_document):
    document = tmp_path / "guide.md"
    document.write_text("# A\n\n```python test\na = 1\n```\n\n```python test\nassert a == 2\n```\n")
    done = run_document(document, tmp_path)
    assert done.returncode == 1 and f'"{document}", line 8' in done.stderr


def test_a_block_with_a_path_becomes_that_file(tmp_path: Path, run_document):
    document = tmp_path / "guide.md"
    document.write_text("```python test pkg/idea.py\nword = 'new'\n```\n```sh test\ngrep new pkg/idea.py\n```\n")
    assert run_document(document, tmp_path).returncode == 0
    assert (tmp_path / "pkg" / "idea.py").read_text() == "word = 'new'\n"


def test_a_block_without_the_mark_is_not_run(tmp_path: Path, run_document):
    document = tmp_path / "guide.md"
    document.write_text("```python\nraise SystemExit(3)\n```\n")
    assert run_document(document, tmp_path).returncode == 0


def test_a_marked_block_of_an_unknown_language_is_refused(tmp_path: Path, run_document):
    document = tmp_path / "guide.md"
    document.write_text("```rust test\nfn main() {}\n```\n")
    done = run_document(document, tmp_path)
    assert done.returncode == 1 and "cannot be tested" in done.stderr


def test_a_block_inside_a_longer_fence_is_only_text(tmp_path: Path):
    document = tmp_path / "guide.md"
    document.write_text("````markdown\n```python test\nraise SystemExit(3)\n```\n````\n")
    assert [block.language for block in doc_runner.blocks(document)] == ["markdown"]
