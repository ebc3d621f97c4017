"""What happens while a program is still importing its packages, seen in real processes."""

import ast
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = [path for path in ROOT.glob("*.py") if '__name__ == "__main__"' in path.read_text()]


def run_with(tmp_path, module: str, content: str, program="sample"):
    """Run a program that finds `content` in place of a package."""
    (tmp_path / f"{module}.py").write_text(content)
    command = [sys.executable, ROOT / f"{program}.py", "--count", "1"]
    return subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, text=True,
                          capture_output=True)


@pytest.mark.parametrize("module, content, says", [
    ("matplotlib", "raise ModuleNotFoundError(\"No module named 'matplotlib'\")",
     "error: No module named 'matplotlib': pip install -r requirements.txt\n"),
    ("einops", "raise ImportError('built for\\nanother torch')",
     "error: built for another torch: pip install -r requirements.txt\n"),
    ("torch", "raise KeyboardInterrupt", "\nstopped.\n"),
])  # fmt: skip
def test_imports_that_fail_or_are_stopped_end_in_one_line(tmp_path, module, content, says):
    ended = run_with(tmp_path, module, content)
    assert ended.stderr == says
    assert ended.returncode in (1, 130, -signal.SIGINT)


def test_a_bug_of_ours_keeps_its_traceback(tmp_path):
    ended = run_with(tmp_path, "einops", "1 / 0")
    assert "Traceback" in ended.stderr and "ZeroDivisionError" in ended.stderr


def test_every_program_imports_it_first():
    assert len(PROGRAMS) == 9
    for program in PROGRAMS:
        first = ast.parse(program.read_text()).body[1]  # after the docstring
        assert isinstance(first, ast.Import) and first.names[0].name == "startup"
