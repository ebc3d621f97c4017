"""The README says what the programs printed: its tables are those of the JSON files in assets/, and what it points to
is there."""

import json
import re
from pathlib import Path

from evaluate import COLUMNS
from sample import table

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_tables_are_the_measured_ones():
    results = sorted((ROOT / "assets").glob("*.json"))
    assert results
    for path in results:
        assert table(json.loads(path.read_text())["rows"], COLUMNS) in README, path.name


def test_links_and_commands_point_to_files():
    local = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith(("http", "#"))]
    scripts = re.findall(r"python (\w+\.py)", README)
    assert local and scripts
    assert [name for name in local + scripts if not (ROOT / name).exists()] == []


def test_flags_in_the_readme_exist():
    source = "".join(path.read_text() for path in ROOT.glob("*.py"))
    flags = set(re.findall(r"`?(--[a-z][a-z0-9-]+)", README))
    assert len(flags) > 10
    assert [flag for flag in flags if f'"{flag}"' not in source and flag != "--help"] == []
