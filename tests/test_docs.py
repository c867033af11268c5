"""The pages agree with the results, with each other, and with the files that they link to."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MULTI_GPU = [(ROOT / path).read_text() for path in ("docs/multi_gpu.md", "configs/trainer/README.md")]


def test_tables_are_those_of_the_results() -> None:
    check = subprocess.run([sys.executable, ROOT / "docs" / "tables.py", "--check"], capture_output=True, text=True)
    assert check.returncode == 0, check.stdout + check.stderr


def test_a_changed_figure_in_a_table_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "docs")
    import tables

    page = (ROOT / "docs" / "benchmarks.md").read_text()
    assert tables.with_tables(page) == page
    assert "| 3,399 |" in page
    assert tables.with_tables(page.replace("| 3,399 |", "| 4,399 |")) == page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_of_a_page_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
    local = [link for link in links if "://" not in link]
    assert [link for link in local if not (page.parent / link).exists()] == []


def test_both_pages_on_several_gpus_have_the_same_commands_and_table() -> None:
    """test_configs.py and test_benchmarks.py try those of configs/trainer/README.md."""
    commands, tables = (
        [re.findall(pattern, text) for text in MULTI_GPU] for pattern in (r"unet-diffusion fit .*", r"\| \d+ M .*")
    )
    assert commands[0] == commands[1]
    assert tables[0] == tables[1]
