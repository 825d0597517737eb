"""The commands of the README and the docs exist, and CI runs the first two."""

import re
from pathlib import Path

import pytest

from pdarts_fast.cli import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_exists(page: Path) -> None:
    named = re.findall(r"^ {4}(?:\S*/)?pdarts-fast (\S+)", page.read_text(), re.MULTILINE)
    assert set(named) <= set(COMMANDS)


def test_readme_names_the_main_job_and_the_tests_first() -> None:
    text = (ROOT / "README.md").read_text()
    first, second = re.findall(r"^ {4}(python3 -m venv .*)$", text, re.MULTILINE)
    assert first.endswith("pdarts-fast search --preset demo")
    assert second.endswith(".venv/bin/pytest")


def test_ci_runs_what_the_readme_says() -> None:
    text = (ROOT / "README.md").read_text()
    _, tests = re.findall(r"^ {4}(python3 -m venv .*)$", text, re.MULTILINE)
    script = (ROOT / ".ci" / "run").read_text().replace("install -q ", "install ")
    install, _, run = tests.rpartition(" && ")
    assert install in script
    assert f"\n{run}\n" in script
    assert "pdarts-fast search --preset demo" in script


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_linked_file_exists(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
    assert all((page.parent / link).exists() for link in links)
