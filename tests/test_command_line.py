"""What the command lines of all programs share: how they end, and which values their flags take."""

import argparse
import dataclasses
import sys

import pytest
import torch

from command_line import (
    add_training_flags,
    add_worker_flag,
    fraction,
    make_parser,
    non_negative,
    non_negative_int,
    positive_int,
    run_program,
)
from config import Training, override
from files import UserError


LESS = ": choose a smaller --batch or --count, or a device with more memory"
ROOM = ": make room, and give the same command again"


@pytest.mark.parametrize(
    "error, status, says",
    [
        (UserError("no such file: choose another"), "error: no such file: choose another", ""),
        (OSError(28, "No space left"), "error: [Errno 28] No space left" + ROOM, ""),
        (OSError("of another kind"), "error: of another kind", ""),
        (torch.OutOfMemoryError("CUDA: 9 GiB"), "error: out of memory (CUDA: 9 GiB)" + LESS, ""),
        (MemoryError(), "error: out of memory (MemoryError)" + LESS, ""),
        (KeyboardInterrupt("12 of 30 are done."), 130, "\nstopped. 12 of 30 are done.\n"),
        (KeyboardInterrupt(), 130, "\nstopped.\n"),
    ],
)
def test_a_program_that_is_stopped_ends_in_one_line(capsys, error, status, says):
    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        run_program(main)
    assert end.value.code == status  # Python prints a text, and ends with status 1
    assert capsys.readouterr().err == says


def test_what_is_a_bug_of_ours_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_program(lambda: 1 // 0)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run_program(lambda: torch.ones(2, 3) @ torch.ones(2, 3))


def test_a_lack_of_memory_is_said_in_one_line():
    with pytest.raises(SystemExit, match="out of memory .*allocate memory.*smaller --batch"):
        run_program(lambda: torch.empty(2**58))


def test_a_program_runs_without_its_standard_streams(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    run_program(lambda: print("out", file=sys.stderr))


@pytest.mark.parametrize(
    "kind, good, bad, says",
    [
        (positive_int, "3", ["0", "-3", "1.5", "many", ""], "whole number from 1 up"),
        (non_negative_int, "0", ["-1", "0.5"], "whole number from 0 up"),
        (non_negative, "1e-3", ["-0.1", "nan", "half"], "number from 0 up"),
        (fraction, "0.5", ["-0.1", "nan"], "number from 0 to 1"),
    ],
)
def test_numbers_have_bounds(kind, good, bad, says):
    assert kind(good) == float(good)
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError) as error:
            kind(text)
        assert str(error.value) == f"{text!r} is not a {says}"


def test_numbers_that_are_too_large():
    cases = [(positive_int, "9999999999", 2**31 - 1), (non_negative, "inf", 2**31 - 1)]
    for kind, text, most in [*cases, (fraction, "1.5", 1)]:
        with pytest.raises(argparse.ArgumentTypeError) as error:
            kind(text)
        assert str(error.value) == f"{text!r} is too large: at most {most}"


def test_workers_are_counted_from_one_in_words_and_from_zero_inside(capsys):
    parser = make_parser("a program")
    add_worker_flag(parser)
    assert parser.parse_args([]).worker == (0, 1)
    assert parser.parse_args(["--worker", "2/8"]).worker == (1, 8)
    for text in ("0/8", "9/8", "2", "/8", "a/b"):
        with pytest.raises(SystemExit):
            parser.parse_args(["--worker", text])
        assert f"{text!r} is not I/K, such as 2/8" in capsys.readouterr().err


def test_the_flags_of_a_training_are_fields_of_it():
    """A flag whose name is no field would be accepted, and change nothing."""
    parser = make_parser("a program")
    add_training_flags(parser)
    words = "--iterations 7 --batch 3 --lr 0.5 --ema-decay 0.25 --seed 9".split()
    chosen = override(Training(1, 1, 1.0, 1.0), parser.parse_args(words))
    assert chosen == Training(iterations=7, batch=3, lr=0.5, ema_decay=0.25, seed=9)
    assert override(chosen, parser.parse_args([])) == chosen  # no flag has a default of its own
    names = {field.name for field in dataclasses.fields(Training)}
    assert names - vars(parser.parse_args([])).keys() == {"schedule", "on_policy", "logit_mean"}


def test_help_is_the_docstring(capsys):
    with pytest.raises(SystemExit):
        make_parser("What it does.\n\n    python it.py").parse_args(["--help"])
    assert "What it does.\n\n    python it.py\n" in capsys.readouterr().out
