"""The README says what the programs printed: its tables are those of the JSON files in assets/, and what it points to
is there."""

import json
import re
from pathlib import Path

import ablation
import benchmark
from evaluate import COLUMNS
from sample import table

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_tables_are_the_measured_ones():
    for name in ("shapes", "points"):
        assert table(json.loads((ROOT / f"assets/{name}.json").read_text())["rows"], COLUMNS) in README, name
    for name in ("shapes", "points"):
        lines = json.loads((ROOT / f"assets/ablation-{name}.json").read_text())["lines"]
        assert table(lines, dict.fromkeys(ablation.COLUMNS, "")) in README, name
    for title, rows in json.loads((ROOT / "assets/benchmark.json").read_text())["results"].items():
        assert table(rows, benchmark.COLUMNS) in README, title
    bill = json.loads((ROOT / "assets/bill.json").read_text())
    assert table(bill["rows"], benchmark.BILL) in README
    rates = dict.fromkeys(benchmark.BILLED, dict.fromkeys(benchmark.RATES, bill["tflops"]))
    again = benchmark.bill(rates, **benchmark.RECIPE)  # it is a count: anyone gets the same
    assert table(again, benchmark.BILL) in README


def test_the_short_table_says_what_the_ablation_says():
    for title, name, row in (
            ("points: clean predictions, N = 6 of 6", "points", "centre"),
            ("points: states, direction, N = 6 of 6", "points", "kind states, direction"),
            ("points: states, state, N = 6 of 6", "points", "kind states, state"),
            ("shapes: states, direction, N = 1 of 6", "shapes", "centre"),
            ("shapes: states, state, N = 1 of 6", "shapes", "kind states, state"),
            ("shapes: clean predictions, N = 6 of 6", "shapes", "kind clean, state, N = 6"),
            ("shapes: clean predictions, N = 6 of 6, own 0.5", "shapes-clean-own", "centre"),
            ("shapes: clean predictions, N = 6 of 6, own 0.5, twice as long", "shapes-clean-own-long", "centre"),
            ("shapes: clean predictions, N = 6 of 6, four times as long, twice the trajectories", "shapes-clean-long",
             "centre")):
        lines = json.loads((ROOT / f"assets/ablation-{name}.json").read_text())["lines"]
        control = f"{row.removesuffix(', N = 6')}, N = 0"
        few, without, with_history = lines["teacher, 4 steps"], lines[control], lines[row]
        cells = [title, few["above"], without["above"], with_history["above"], with_history["above ratio"] or "–"]
        assert f"| {' | '.join(cells)} |" in README, title


def test_the_second_stages_table_says_what_the_ablation_says():
    lines = json.loads((ROOT / "assets/ablation-shapes.json").read_text())["lines"]
    for title, row in (("teacher, 24 steps", "teacher, 24 steps"), ("R: the student", "centre"),
                       ("R, the control: λ = 0", "refine, λ = 0"), ("R + G", "refine")):
        cells = [title, *(lines[row][key] for key in ("error", "frechet", "above", "precision", "recall", "accuracy"))]
        assert f"| {' | '.join(cells)} |" in README, title


def test_links_and_commands_point_to_files():
    local = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith(("http", "#"))]
    scripts = re.findall(r"python (\w+\.py)", README)
    assert local and scripts
    assert [name for name in local + scripts if not (ROOT / name).exists()] == []


def test_flags_in_the_readme_exist():
    source = "".join(path.read_text() for path in ROOT.glob("*.py"))
    flags = set(re.findall(r"`?(--[a-z][a-z0-9-]+)", README))
    assert len(flags) > 10
    flags -= {"--help", "--nproc"}  # torchrun's
    assert [flag for flag in flags if f'"{flag.replace("--no-", "--")}"' not in source] == []
