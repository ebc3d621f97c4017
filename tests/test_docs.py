"""The documentation agrees with what it describes: its tables are those of the JSON files in
experiments/results/, its commands are accepted, and the files and flags that it names exist.

A table that has changed is printed by the test that misses it, to be copied into the document."""

import argparse
import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import pytest

import evaluate
from experiments import ablation, benchmark, cost, routes

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "experiments" / "results"
PAGES = {path.name: path.read_text() for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")]}
SCRIPTS = {}  # path -> name of the module
for path in [*ROOT.glob("*.py"), *ROOT.glob("experiments/*.py")]:
    if "parse_args" in path.read_text():
        name = path.relative_to(ROOT)
        SCRIPTS[str(name)] = ".".join(name.with_suffix("").parts)


def read(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


# ---- 1. Tables -----------------------------------------------------------------------------------

SUMMARY = {  # a row: (its file, its control, itself)
    "points: x0 predictions, N = 6 of 6": ("ablation-points", "baseline, N = 0", "baseline"),
    "points: states, direction, N = 6 of 6": (
        "ablation-points",
        "targets = states, output = direction, N = 0",
        "targets = states, output = direction",
    ),
    "points: states, state, N = 6 of 6": (
        "ablation-points",
        "targets = states, output = state, N = 0",
        "targets = states, output = state",
    ),
    "shapes: states, direction, N = 1 of 6": ("ablation-shapes", "baseline, N = 0", "baseline"),
    "shapes: states, state, N = 1 of 6": (
        "ablation-shapes",
        "targets = states, output = state, N = 0",
        "targets = states, output = state",
    ),
    "shapes: x0 predictions, N = 6 of 6": (
        "ablation-shapes",
        "targets = x0, output = state, N = 0",
        "targets = x0, output = state, history_layers = 6",
    ),
    "the same, four times the iterations, twice the trajectories": (
        "ablation-shapes-clean-long",
        "baseline, N = 0",
        "baseline",
    ),
    "shapes: x0 predictions, N = 6 of 6, on-policy 0.5": (
        "ablation-shapes-clean-own",
        "baseline, N = 0",
        "baseline",
    ),
    "the same, twice the iterations": (
        "ablation-shapes-clean-own-long",
        "baseline, N = 0",
        "baseline",
    ),
}
PAPER = {  # the last row: FID on ImageNet
    "teacher, 4 steps": "–",
    "step distillation": "7.36",
    "ARD": "1.43",
    "ratio": "5.1",
}
SECOND_STAGE = {  # title -> (its line in the ablation, or the name of its student)
    "teacher, 24 steps": "teacher, 24 steps",
    "R: the student of the first stage": "baseline",
    "R, longer: the control, λ = 0": "gan, λ = 0",
    "R + G": "gan",
    "R + G, the teacher's history: `--on-policy 0`": "gan,judged=forced",
    "R + G, noisier images: `--noise-level 0.2`": "gan,level=0.2",
    "R + G, wider heads: `--hidden 128`": "gan,hidden=128",
}
SPEED = {  # title -> the goal in benchmark.goals, and how its value is written
    "training, images/s: ours / dense reference in TF32": lambda value: f"{value:.2f}",
    "training, share of the bf16 matrix rate, batch 64": lambda value: f"{100 * value:.0f} %",
    "training, peak memory, micro-batch 16, recomputing": lambda value: f"{value:.1f} GiB",
    "sampling, images/s: ours / dense reference in TF32": lambda value: f"{value:.2f}",
    "sampling, what the history adds to the time": lambda value: f"{100 * (value - 1):.1f} %",
}
SPEED_GOALS = ("≥ 4", "≥ 45 %", "a card of 24 GB", "≥ 2", "≤ 1.5 %")


def ablation_tables() -> dict[str, str]:
    found = {}
    for file in sorted(RESULTS.glob("ablation-*.json")):
        if file.stem != "ablation-shapes-six":  # its rows are also in ablation-shapes
            lines = ablation.table_lines(json.loads(file.read_text()))
            found[file.stem] = ablation.markdown(lines)
    return found


def summary_table() -> str:
    """Degradations: what all rows of the ablations that matter most say, side by side."""
    rows = {}
    for title, (name, control, student) in SUMMARY.items():
        lines = ablation.table_lines(read(name))
        rows[title] = {
            "teacher, 4 steps": lines["teacher, 4 steps"]["above"],
            "step distillation": lines[control]["above"],
            "ARD": lines[student]["above"],
            "ratio": lines[student]["above ratio"] or "–",
        }
    rows["*paper: ImageNet-256, DiT-XL/2, N = 6 of 28 (FID)*"] = PAPER
    return ablation.markdown(rows, list(PAPER))


def second_stage_table() -> str:
    content = read("ablation-shapes")
    lines, rows = ablation.table_lines(content), {}
    for title, name in SECOND_STAGE.items():
        rows[title] = lines.get(name) or ablation.student_line(content["students"][name], None)
        rows[title] = dict(seeds=rows[title].get("seeds", "")) | rows[title]
    return ablation.markdown(rows, ["seeds", *ablation.MEASURES])


def goals_table() -> str:
    goals, rows = benchmark.goals(read("benchmark-h200")["results"]).values(), {}
    for (title, write), (value, _), goal in zip(SPEED.items(), goals, SPEED_GOALS, strict=True):
        rows[title] = dict(measured=write(value).replace("-", "−"), goal=goal)
    return ablation.markdown(rows, ["measured", "goal"])


def tables() -> dict[str, str]:
    """All tables of the documents, by names that say where they come from."""
    found = ablation_tables()
    found["summary"] = summary_table()
    found["second stage"] = second_stage_table()
    found["goals"] = goals_table()
    found["routes"] = routes.routes_table(read("routes")["students"])
    columns = evaluate.COLUMNS | evaluate.MORE_COLUMNS | evaluate.ADHERENCE_COLUMNS
    for file in sorted(RESULTS.glob("*.json")):
        content = json.loads(file.read_text())
        if "exposure_bias" in content:
            found[file.stem] = evaluate.table(content["rows"], columns)
        for title, rows in content.get("results", {}).items():
            found[f"{file.stem}, {title}"] = evaluate.table(rows, benchmark.COLUMNS)
    rates = cost.measured_rates(RESULTS / "benchmark-h200.json")
    found["cost"] = evaluate.table(cost.estimate_all(rates), cost.COLUMNS)
    return found


@pytest.mark.parametrize("name", tables())
def test_tables_are_those_of_the_results(name):
    table = tables()[name]
    pages = [page for page, text in PAGES.items() if page != "README.md" and table in text]
    assert pages, f"no document has this table:\n\n{table}\n"


def test_numbers_in_the_tables_of_the_readme_are_in_the_documents():
    documents = "".join(text for page, text in PAGES.items() if page != "README.md")
    rows = re.findall(r"^\|.*\|$", PAGES["README.md"], re.MULTILINE)
    numbers = set(re.findall(r"(?<![\d.])\d+\.\d+(?![\d.])", "\n".join(rows)))
    known = set(re.findall(r"\d+\.\d+", documents))
    assert numbers - known == set()


# ---- 2. Commands, files and flags ----------------------------------------------------------------


class Parsed(Exception):
    """The flags of a command have been read."""


def parse(monkeypatch, script: str, words: list[str]):
    """Let a script read these flags, and do nothing else. Returns its parser. Raises SystemExit for
    flags that it refuses."""
    read_flags, parsers = argparse.ArgumentParser.parse_args, []

    def parse_args(parser):
        parsers.append(parser)
        read_flags(parser)
        raise Parsed

    monkeypatch.setattr(sys, "argv", [script, *words])
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    with pytest.raises(Parsed):
        importlib.import_module(SCRIPTS[script]).main()
    monkeypatch.undo()
    return parsers[0]


def commands(text: str) -> list[str]:
    """The lines in blocks of code that start one of our scripts, in one line each."""
    blocks = "\n".join(re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    lines = re.sub(r"\\\n\s*", "", blocks).splitlines()
    return [line for line in lines if re.match(r"(python|torchrun) .*\.py", line)]


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_accepted(page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for command in commands(PAGES[page]):
        words = shlex.split(command, comments=True)
        script = next(word for word in words if word.endswith(".py"))
        assert script in SCRIPTS, command
        parse(monkeypatch, script, words[words.index(script) + 1 :])
    assert commands(PAGES[page])


def test_flags_exist(monkeypatch):
    flags = {"--help", "--nproc_per_node", "--no-deps"}  # the last two: of torchrun and of pip
    required = {
        "latents.py": "--images a --out b",
        "text.py": "--prompts a --encoder b --out c",
        "pretrained.py": "a b",
        "experiments/protocol.py": "--samples a --reference b",
    }
    for script in SCRIPTS:
        parser = parse(monkeypatch, script, required.get(script, "").split())
        flags |= set(re.findall(r"--[\w-]+", parser.format_help()))
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]+", "".join(PAGES.values())))
    assert len(named) > 10
    assert named - flags == set()


def slug(heading: str) -> str:
    """What GitHub calls a heading in a link."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_links_and_names_lead_to_files(page):
    text = PAGES[page]
    folder = ROOT if page == "README.md" else ROOT / "docs"
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        file = folder / path if path else folder / page
        assert file.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            assert anchor in map(slug, headings), link
    for name in re.findall(r"`((?:\w+/)*\w+\.py)`", text):
        places = (ROOT / name, ROOT / "experiments" / name)
        assert any(place.exists() for place in places), name


def test_lengths():
    assert len(PAGES["README.md"].splitlines()) <= 200
    for text in PAGES.values():
        prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
        lines = [line for line in prose.splitlines() if not line.startswith("|")]
        assert [line for line in lines if len(line) > 100] == []
