"""What the command lines of all programs have in common: how they start and end, and their
flags."""

import argparse
import errno
import os
import sys
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from files import UserError, is_lack_of_memory, one_line
from machine import add_machine_flags, rank, wait_for_all, world_size


ADVICE = {  # what to do about some errors of the operating system
    errno.ENOSPC: "make room, and give the same command again",
    errno.EDQUOT: "make room, and give the same command again",
    errno.EFBIG: "allow larger files, with ulimit -f unlimited",
    errno.EACCES: "choose another place, or change its permissions",
    errno.EROFS: "choose another place, which can be written to",
    errno.EMFILE: "allow more open files, with ulimit -n 4096",
}


def run_program(main):
    """Run a script's main(), under torchrun as one of several processes. A UserError, an error of
    the operating system, a lack of memory or Ctrl-C ends it with one line and without a traceback;
    the exit status is 1 or 130."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # they may have been closed: 2>&-
    sys.stderr = sys.stderr or open(os.devnull, "w")
    for stream in (sys.stdout, sys.stderr):  # what a terminal cannot show is written as \u03b1
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        if world_size() > 1:
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, timeout=timedelta(hours=2))
            if rank() > 0:
                sys.stdout = open(os.devnull, "w")
        main()
        if world_size() > 1:
            wait_for_all()
            dist.destroy_process_group()
            # DistributedDataParallel keeps threads of the group alive. At the usual end of Python
            # they can abort the process.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
    except UserError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        advice = ADVICE.get(error.errno)
        sys.exit(f"error: {one_line(error)}" + (f": {advice}" if advice else ""))
    except (MemoryError, RuntimeError) as error:
        if not is_lack_of_memory(error):
            raise
        sys.exit(
            f"error: out of memory ({one_line(error)}): choose a smaller --batch or --count, "
            "or a device with more memory"
        )
    except KeyboardInterrupt as interrupt:
        print(f"\nstopped. {interrupt}".rstrip(), file=sys.stderr)
        sys.exit(130)


def make_parser(docstring: str) -> argparse.ArgumentParser:
    """A parser whose help is the first paragraph of a script's docstring and its examples."""
    first, *others = docstring.split("\n\n")
    examples = [paragraph for paragraph in others if "    python " in paragraph]
    return argparse.ArgumentParser(
        usage="python %(prog)s [flags]",
        description="\n\n".join([first, *examples]),
        formatter_class=partial(
            argparse.RawDescriptionHelpFormatter, max_help_position=30, width=100
        ),
    )


# ---- Types for argparse --------------------------------------------------------------------------


def number(kind: type, least, most=None):
    """A type for argparse: an int or a float from `least` on, up to `most` where that is given."""
    name = "whole number" if kind is int else "number"
    limits = f"from {least} up" if most is None else f"from {least} to {most}"
    largest = 2**31 - 1 if most is None else most

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not value >= least:  # this also refuses NaN
            raise argparse.ArgumentTypeError(f"{text!r} is not a {name} {limits}")
        if value > largest:
            raise argparse.ArgumentTypeError(f"{text!r} is too large: at most {largest}")
        return value

    return parse


positive_int = number(int, 1)
non_negative_int = number(int, 0)
non_negative = number(float, 0)
fraction = number(float, 0, 1)


def worker(text: str) -> tuple[int, int]:
    """The second of eight workers, "2/8", as (1, 8): counted from 0."""
    i, _, k = text.partition("/")
    if not (i.isdecimal() and k.isdecimal() and 1 <= int(i) <= int(k)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/K, such as 2/8: the second of eight")
    return int(i) - 1, int(k)


# ---- Groups of flags -----------------------------------------------------------------------------


def add_teacher_flags(parser):
    """Which teacher: see find_teacher in pretrained.py."""
    parser.add_argument(
        "--teacher",
        dest="teacher_file",
        type=Path,
        metavar="FILE",
        help="the teacher's checkpoint (default: the one for the preset)",
    )
    add_teacher_kind(parser)


def add_teacher_kind(parser):
    parser.add_argument(
        "--teacher-kind",
        choices=("dit", "sit", "repa"),
        help="what a published teacher is (default: recognised by its behaviour)",
    )


def add_prompts_flag(parser):
    """The prompts of a text network: see use_prompts in pixart.py."""
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="DIR",
        help="of PixArt-α: prompts that text.py has encoded",
    )


def add_training_flags(parser):
    """The flags of every training. Those that replace a preset's value have no default: None means
    that they were not given."""
    group = parser.add_argument_group("training")
    add = group.add_argument
    add("--iterations", type=positive_int, help="training steps")
    add("--batch", type=positive_int, help="samples in a training step")
    add("--lr", type=non_negative, help="highest learning rate")
    add("--ema-decay", type=fraction, help="of the moving average of the weights")
    add("--seed", type=non_negative_int, help="of the training's random numbers (default: 0)")
    add(
        "--checkpointing",
        action=argparse.BooleanOptionalAction,
        help="recompute activations in the backward pass, which saves memory",
    )
    add("--accumulate", type=positive_int, metavar="K", help="split a batch into K micro-batches")
    add_machine_flags(parser, can_compile=True)


def add_worker_flag(parser):
    parser.add_argument(
        "--worker",
        type=worker,
        default=(0, 1),
        metavar="I/K",
        help="do the I-th of K parts of the work, into a folder that all share (default: 1/1)",
    )
