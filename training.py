"""What any training loop needs and no paper is about: devices, precision, moving averages, progress, checkpoints,
resuming.

The rules that the rest of the project relies on:

  - A checkpoint is one file: {"about", "ema", "model", "optimiser", "step", "losses", "partial"}. `about` is a plain
    dict that says what the file is and how it came to be; it must agree before a run is continued. A file is written
    aside and renamed, so it is whole or it is not there. It loads with `weights_only=True`.
  - A batch is a function of (seed, step), so a run that was interrupted and started again takes the very same steps.
  - The user's mistakes are `Fault`s: one line, exit status 1, no traceback. Ctrl-C finishes the step, saves, and
  exits with 130.
"""

import argparse
import copy
import hashlib
import json
import math
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import torch


class Fault(Exception):
    """Something the user can put right; the message says what is wrong and what to do."""


def command(main):
    """Run a script's main(): Faults and Ctrl-C end it with one line each, and without a traceback."""
    try:
        main()
    except Fault as fault:
        sys.exit(f"error: {fault}")
    except OSError as error:  # a full disk, a folder without write permission
        sys.exit(f"error: {error}")
    except KeyboardInterrupt as stop:
        print(f"\nstopped{f': {stop}' if str(stop) else ''}. The same command continues from there.", file=sys.stderr)
        sys.exit(130)


def number(kind, least, most=math.inf):
    """For argparse: an int or a float (`kind`) with least ≤ number < most."""
    def parse(text):
        try:
            if least <= kind(text) < most:
                return kind(text)
        except ValueError:
            pass
        name = "whole number" if kind is int else "number"
        raise argparse.ArgumentTypeError(f"{text!r} is not a {name} from {least} up")
    return parse


whole, positive, strength = number(int, 0, 2**31), number(int, 1, 2**31), number(float, 0)


def machine_flags(add):
    """The flags that every program has; `add` is a parser's add_argument."""
    add("--device", default="auto", help="auto (CUDA, then MPS, then the CPU), cuda, mps or cpu (default: auto)")
    add("--bf16", action="store_true", help="matrix products in bfloat16")


def training_flags(add):
    """The flags of every training."""
    add("--iterations", type=positive, help="training steps")
    add("--batch", type=positive, help="samples a step")
    add("--lr", type=strength, help="highest learning rate")
    add("--seed", type=whole, default=0, help="of weights, batches and noise (default: 0)")
    add("--checkpointing", action="store_true", help="save memory: recompute activations in the backward pass")
    add("--export", type=Path, help="also write the result, in float16 and for use only, to this file")
    machine_flags(add)


# ---- devices --------------------------------------------------------------------------------------------------------

def pick_device(name: str = "auto") -> torch.device:
    """"auto" takes CUDA, then MPS, then the CPU. Raises Fault when the named device is not there. float32 products on
    CUDA use TF32."""
    mps = torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if not re.fullmatch(r"cuda(:\d+)?|mps|cpu", name):
        raise Fault(f"no device is called {name!r} here: use auto, cuda, mps or cpu")
    if (name.startswith("cuda") and not torch.cuda.is_available()) or (name == "mps" and not mps):
        raise Fault(f"this machine, or this build of PyTorch, has no {name} device: use --device auto")
    device = torch.device(name)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    return device


def at_once(device: torch.device) -> int:
    """Samples to compute at a time: what a CPU's cache holds, or what fills a GPU."""
    return 32 if device.type == "cpu" else 256


def autocast(device: torch.device, bf16: bool):
    """bf16 matrix products over float32 weights, or nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def synchronise(device: torch.device):
    """Wait for the device: before reading a clock."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


# ---- progress -------------------------------------------------------------------------------------------------------

class Progress:
    """Iterate with a progress line: done/total, rate, ETA. Silent for what takes under two seconds. `note` is shown
    behind it; `start` items were done before (a resumed run); each item counts for `weight` units in the rate."""

    def __init__(self, title, items, total=None, start=0, unit="step", weight=1):
        self.title, self.items, self.unit, self.weight, self.start = title, items, unit, weight, start
        self.total = total if total is not None else start + len(items)
        self.note = ""

    def __iter__(self):
        began, shown, live = time.time(), 0.0, sys.stderr.isatty()
        for done, item in enumerate(self.items, start=self.start + 1):
            yield item
            now = time.time()
            last = done == self.total
            if now - began > 2 and (now - shown > (0.5 if live else 15) or last):
                rate = (done - self.start) / (now - began)
                left = int((self.total - done) / rate)
                eta = f"took {int(now - began)} s" if last else f"ETA {left // 60}:{left % 60:02d}"
                rate *= self.weight
                line = f"{self.title}: {done:,}/{self.total:,}  {rate:,.1f} {self.unit}/s  {eta}  {self.note}"
                start, end = ("\r", "\033[K" + "\n" * last) if live else ("", "\n")
                print(start + line, end=end, file=sys.stderr, flush=True)
                shown = now


# ---- files ----------------------------------------------------------------------------------------------------------

def writable(path: str | Path) -> Path:
    """The path, with its folder made. Raises Fault where a file stands in a folder's place or a folder in the
    file's."""
    path = Path(path)
    if path.is_dir():
        raise Fault(f"{path} is a folder, and a file is to be written there: choose another output path")
    make_folder(path.parent)
    return path


def make_folder(path: str | Path) -> Path:
    """Make a folder, parents too. Raises Fault where a file stands in its place."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise Fault(f"{path} cannot be a folder: it, or a part of its path, is a file. Choose another output") from None
    return path


def replace_file(path: Path, write):
    """Call write(file) on a temporary neighbour, then rename it to `path`: a reader sees the old file or the whole
    new one."""
    path = writable(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(aside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def difference(there: dict, here: dict) -> str:
    """Where two descriptions differ first, in a few words."""
    key = next(k for k in here | there if there.get(k) != here.get(k))
    a, b = there.get(key), here.get(key)
    return difference(a, b) if isinstance(a, dict) and isinstance(b, dict) else f"{key} is {a} there, not {b}"


def save_json(path: Path, content):
    replace_file(Path(path), lambda file: file.write((json.dumps(content, indent=1) + "\n").encode()))


def load_checkpoint(path: str | Path, kind: str | tuple[str, ...]) -> dict:
    """Read a checkpoint of this project whose about["kind"] is `kind`. Raises Fault for anything else."""
    kinds = (kind,) if isinstance(kind, str) else kind
    path = Path(path)
    if not path.is_file():
        raise Fault(f"no such checkpoint: {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # a damaged file makes torch.load raise all sorts of things
        raise Fault(f"{path} is not a checkpoint, or is damaged (cut short?): it cannot be read") from None
    about = checkpoint.get("about") if isinstance(checkpoint, dict) else None
    if not isinstance(about, dict) or "ema" not in checkpoint:
        raise Fault(f"{path} is not a checkpoint of this project: it lacks the fields 'about' and 'ema'")
    if about.get("kind") not in kinds:
        raise Fault(f"{path} holds a {about.get('kind')}, and a {' or '.join(kinds)} is needed")
    return checkpoint


def load_weights(model: torch.nn.Module, weights: dict, path):
    """Load strictly. Raises Fault naming the first difference."""
    try:
        model.load_state_dict(weights, strict=True)
    except (RuntimeError, AttributeError, TypeError) as error:
        reason = str(error).splitlines()[1 if "\n" in str(error) else 0].strip()[:200]
        raise Fault(f"{path} holds the weights of another model: {reason}") from None


def export(path: str | Path, about: dict, weights: dict):
    """Write a checkpoint for use only: the weights, in float16."""
    half = {name: weight.half() for name, weight in weights.items()}
    replace_file(Path(path), lambda file: torch.save({"about": about, "ema": half}, file))
    print(f"wrote {path}")


def fingerprint(weights: dict) -> str:
    """16 hexadecimal digits that tell these weights from others."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode() + weights[name].detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


# ---- the loop -------------------------------------------------------------------------------------------------------

class Interrupt:
    """Within this context, Ctrl-C (or SIGTERM) only sets `.asked`, so that a step is never left half done; asked
    twice, it stops at once."""

    def __enter__(self):
        self.asked = False
        self.old = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.old[number] = signal.signal(number, self.ask)
        return self

    def ask(self, *_):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *_):
        for number, handler in self.old.items():
            signal.signal(number, handler)


def learning_rate(step: int, iterations: int, lr: float, warmup: int, schedule: str) -> float:
    """Linear warm-up, then "constant" or a "cosine" down to 0."""
    rate = lr * min(1.0, (step + 1) / max(1, warmup))
    return rate * 0.5 * (1 + math.cos(math.pi * step / iterations)) if schedule == "cosine" else rate


@torch.no_grad()
def update_average(average: torch.nn.Module, model: torch.nn.Module, decay: float, step: int):
    """average ← decay·average + (1 − decay)·model, with a smaller decay in the first steps."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


def train(title, model, loss_of, out: Path, about: dict, *, iterations, batch, lr, decay=0.999, warmup=100,
          schedule="cosine", clip=1.0, save_seconds=60.0, log_every=50):
    """Minimise loss_of(model, step), a scalar, with AdamW (no weight decay); return the averaged model and the mean
    losses [(step, loss), …]. `model` is on its device and holds its starting weights. Saves to `out` and continues
    from it; a finished run is not run again. `about` describes the training: another one at `out` is a Fault, and is
    not overwritten. `batch` is for the rate in the progress line only."""
    device = next(model.parameters()).device
    model.train()
    average = copy.deepcopy(model).eval().requires_grad_(False)
    weights = [w for w in model.parameters() if w.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=lr, weight_decay=0.0, fused=device.type == "cuda")
    start, losses, partial = 0, [], 0.0  # `partial`: the sum of the losses since the last entry of `losses`
    if out.exists():
        state = load_checkpoint(out, about["kind"])
        if state["about"] != about:
            raise Fault(f"{out} holds another training: {difference(state['about'], about)}. Choose another --out, or "
                        "remove that file")
        if "optimiser" not in state:
            raise Fault(f"{out} was exported, to be used only: choose another --out, or remove that file")
        load_weights(average, state["ema"], out)
        start, losses, partial = state["step"], state["losses"], state["partial"]
        if start < iterations:
            load_weights(model, state["model"], out)
            optimiser.load_state_dict(state["optimiser"])
            print(f"continuing {out} at step {start:,} of {iterations:,}")

    def save(step):
        state = {"about": about, "ema": average.state_dict(), "model": model.state_dict(), "step": step,
                 "optimiser": optimiser.state_dict(), "losses": losses, "partial": partial.item()}
        replace_file(out, lambda file: torch.save(state, file))

    progress = Progress(title, range(start, iterations), start=start, unit="images", weight=batch)
    partial, saved = torch.tensor(partial, device=device), time.time()
    with Interrupt() as interrupt:
        for step in progress:
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(step, iterations, lr, warmup, schedule)
            loss = loss_of(model, step)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(weights, clip)
            optimiser.step()
            update_average(average, model, decay, step)

            partial += loss.detach() + 0 * norm  # not finite if the gradient is not
            done = step + 1
            log = done % log_every == 0 or done == iterations
            keep = interrupt.asked or done == iterations or time.time() - saved > save_seconds
            if (log or keep) and not partial.isfinite():
                raise Fault(f"the loss is not finite at step {done}: try a smaller --lr. What was saved before stays")
            if log:
                losses.append((done, partial.item() / ((done - 1) % log_every + 1)))
                partial.zero_()
                progress.note = f"loss {losses[-1][1]:.5f}"
            if keep:
                save(done)
                saved = time.time()
            if interrupt.asked and done < iterations:
                raise KeyboardInterrupt(f"{out} holds {done:,} of {iterations:,} steps")
    return average, losses
