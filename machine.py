"""Devices, precision, several processes, and progress lines: what depends on the machine.

A program is one process, or one of several that `torchrun` has started. If there are several, each
works on its share, rank 0 alone prints and writes checkpoints, and the losses that are logged are
the same as those of one process.
"""

import argparse
import math
import os
import re
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from files import UserError, is_lack_of_memory, one_line

# ---- 1. Devices and precision --------------------------------------------------------------------


@dataclass(frozen=True)
class Runtime:
    """How a program runs. It changes results by rounding only."""

    device: torch.device
    dtype: torch.dtype = torch.float32  # of matrix products; weights are trained in float32
    checkpointing: bool = False  # recompute activations in the backward pass, to save memory
    accumulate: int = 1  # micro-batches of a batch, to save memory
    compile: bool = False  # torch.compile the layers of networks

    def autocast(self):
        """The context in which networks run: matrix products in `dtype`."""
        # Autocast's cache is off: it would reuse a 16-bit copy of a weight that was made under
        # no_grad, and the weight would get no gradient.
        is_short = self.dtype != torch.float32
        dtype = self.dtype if is_short else None
        return torch.autocast(self.device.type, dtype, enabled=is_short, cache_enabled=False)

    def prepare(self, model):
        """Prepare a network that is only called within `autocast` and is not trained. (In training,
        rounding would swallow small steps.) The weights of its matrix products are stored in
        `dtype`. Otherwise autocast converts them in every call, to the same values."""
        for layer in model.modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                layer.to(self.dtype)
        if self.compile:
            model.compile_layers()

    @property
    def can_record(self) -> bool:
        """Whether training passes can be recorded as a CUDA graph (training.RecordedPass), which
        helps small networks: in one process only, without compiling or checkpointing, and not in
        float16, where the scale of the gradients changes from pass to pass."""
        is_plain = not (self.compile or self.checkpointing) and world_size() == 1
        return self.device.type == "cuda" and self.dtype != torch.float16 and is_plain

    @property
    def precision(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def samples_at_once(self) -> int:
        """Samples to compute together without gradients: a CPU's cache holds few, a GPU wants
        many."""
        return 32 if self.device.type == "cpu" else 256


def add_machine_flags(parser, can_compile=False):
    group = parser.add_argument_group("machine")
    group.add_argument(
        "--device", default="auto", help="auto, cuda, mps or cpu (default: auto)"
    )
    group.add_argument(
        "--bf16",
        action=argparse.BooleanOptionalAction,
        help="matrix products in bfloat16 where the hardware has it, or in float16 on older GPUs "
        "(default: for training and trajectories, as the preset says; elsewhere, no)",
    )
    if can_compile:
        group.add_argument(
            "--compile", action="store_true", help="torch.compile: starts slowly, then runs faster"
        )


def runtime_from(flags, bf16=False, checkpointing=False) -> Runtime:
    """The Runtime that the flags of a program describe; `bf16` and `checkpointing` are defaults.
    Raises UserError where the device is not there, and where --compile cannot work."""
    device = pick_device(flags.device)
    bf16 = bf16 if flags.bf16 is None else flags.bf16
    dtype = short_dtype(device) if bf16 else torch.float32
    compiles = getattr(flags, "compile", False)
    if compiles:
        check_compiler(device)
    if getattr(flags, "checkpointing", None) is not None:
        checkpointing = flags.checkpointing
    accumulate = getattr(flags, "accumulate", None) or 1
    return Runtime(device, dtype, checkpointing, accumulate, compiles)


def pick_device(name: str) -> torch.device:
    """The device of that name, which becomes the current one. On CUDA, float32 products use TF32
    from now on. Raises UserError where there is no such device."""
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind in has if has[kind])
    if not re.fullmatch(r"cuda(:\d+)?|mps|cpu", name):
        raise UserError(f"no device is called {name!r}: use auto, cuda, mps or cpu")
    if not has[name.partition(":")[0]]:
        raise UserError(f"this machine, or this PyTorch, has no {name} device: use --device auto")
    if name == "cuda" and world_size() > 1:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    device = torch.device(name)
    if device.type == "cuda":
        if (device.index or 0) >= torch.cuda.device_count():
            count = torch.cuda.device_count()
            raise UserError(f"there is no {name}: this machine has {count} GPU(s)")
        torch.cuda.set_device(device.index or 0)
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    return device


def short_dtype(device: torch.device) -> torch.dtype:
    """The dtype in which a device multiplies fastest: bfloat16 where it has that natively; else
    float16 on GPUs of CUDA (T4, V100, RTX 20; not tried on one), and float32 elsewhere."""
    if device.type == "cuda":
        is_new = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if is_new else torch.float16
    has_bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return torch.bfloat16 if device.type == "cpu" and has_bf16() else torch.float32


def check_compiler(device: torch.device):
    """Compile one addition, to see whether torch.compile works before the work has begun. Raises
    UserError."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(1, device=device))
    except Exception as error:  # where a compiler is missing: of several types
        raise UserError(
            f"--compile does not work on this machine ({one_line(error)}): leave it out"
        ) from None


@contextmanager
def explain_memory(samples: int):
    """Raises UserError, with advice, where the memory does not hold so many samples."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_lack_of_memory(error):
            raise
        raise UserError(
            f"out of memory, with {samples} samples at a time ({one_line(error)}): --accumulate K "
            "takes a K-th of them at a time, --checkpointing keeps less of each"
        ) from None


def synchronise(device: torch.device):
    """Wait for the device, before a clock is read."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


# ---- 2. Several processes ------------------------------------------------------------------------


def rank() -> int:
    """The number of this process; torchrun sets it."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def all_reduce(tensor, op="SUM"):
    """The "SUM" or "MAX" over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor, getattr(dist.ReduceOp, op))
    return tensor


def wait_for_all():
    if world_size() > 1:
        dist.barrier()


def gather(items: list) -> list:
    """The items of all processes on rank 0, in the order of ranks; nothing on the others."""
    if world_size() == 1:
        return items
    lists = [None] * world_size() if rank() == 0 else None
    dist.gather_object(items, lists)
    return [item for part in lists or [] for item in part]


# ---- 3. Progress ---------------------------------------------------------------------------------


class Progress:
    """Iterate with a line that says how far the work is, how fast, and how long it will take.

    `start` items were done before, by a run that is continued. The rate counts `unit`s: each item
    has `size` of them; where the last item is smaller, `amount` is the total. `note` stands at the
    end of the line. What takes under two seconds prints nothing."""

    def __init__(self, title, items, total=None, start=0, unit="items", size=1, amount=None):
        self.title, self.items, self.unit, self.size = title, items, unit, size
        self.start = start
        self.total = start + len(items) if total is None else total
        self.amount = self.total * size if amount is None else amount
        self.note = ""

    def __iter__(self):
        live = sys.stderr.isatty()
        pause = 0.5 if live else 15  # seconds between two lines
        began, shown = time.time(), 0.0
        for done, item in enumerate(self.items, start=self.start + 1):
            yield item
            now = time.time()
            is_last = done == self.total
            if rank() == 0 and now - began > 2 and (is_last or now - shown > pause):
                self.show(done, now - began, live)
                shown = now

    def show(self, done: int, seconds: float, live: bool):
        made = min(done * self.size, self.amount) - self.start * self.size
        left = math.ceil(seconds * (self.total - done) / (done - self.start))
        when = f"ETA {left // 60}:{left % 60:02}" if left else f"took {seconds:.0f} s"
        rate = f"{made / seconds:,.1f} {self.unit}/s"
        line = f"{self.title}: {done:,}/{self.total:,}  {rate}  {when}  {self.note}"
        if live:  # write over the last line
            end = "\033[K" if left else "\033[K\n"
            print("\r" + line, end=end, file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)
