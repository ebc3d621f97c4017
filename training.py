"""What any training loop needs and no paper is about: devices, precision, moving averages, progress, checkpoints,
resuming, several processes.

The rules that the rest of the project relies on:

  - A checkpoint is one file: {"about", "ema", "model", "optimiser", "step", "losses", "partial"}, and of a rival
    {"rival_model", "rival_optimiser"}. `about` is a plain dict that says what the file is and how it came to be; it
    must agree before a run is continued. A file is written aside and renamed, so it is whole or it is not there. It
    loads with `weights_only=True`.
  - All that is random in a step, and its learning rate, are functions of (seed, step); a checkpoint holds the rest. So
    a run that was interrupted and started again takes the very same steps: on a CPU, with as many threads, to the bit.
  - Under `torchrun`, the processes share each batch, rank 0 alone reports and writes checkpoints, and the losses are
    those of one process with the same batch (but `--own` takes the first samples of each one's part). A run may
    continue with another number of processes.
  - The user's mistakes are `Fault`s: one line, exit status 1, no traceback. Ctrl-C finishes the step, saves, and
    exits with 130.
"""

import argparse
import copy
import hashlib
import importlib
import json
import math
import os
import re
import secrets
import signal
import sys
import time
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel


class Fault(Exception):
    """Something the user can put right; the message says what is wrong and what to do."""


def command(main):
    """Run a script's main(), as one of several processes if torchrun started it: Faults and Ctrl-C end it with one
    line each, and without a traceback."""
    try:
        if world() > 1:
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, timeout=timedelta(hours=2))
            sys.stdout = sys.stdout if rank() == 0 else open(os.devnull, "w")
        main()
        if world() > 1:
            wait_for_all()
            dist.destroy_process_group()
    except (Fault, OSError) as error:  # OSError: a full disk, a folder without write permission
        sys.exit(f"error: {error}")
    except KeyboardInterrupt as stop:
        print(f"\nstopped{f': {stop}' if str(stop) else ''}. The same command goes on from what is saved.",
              file=sys.stderr)
        sys.exit(130)


def number(kind, least, most=None):
    """For argparse: an int or a float (`kind`) from `least` on, to `most` where that is given."""
    def parse(text):
        try:
            if least <= kind(text) <= (most or 2**31 - 1):
                return kind(text)
        except ValueError:
            pass
        name = "whole number" if kind is int else "number"
        raise argparse.ArgumentTypeError(f"{text!r} is not a {name} from {least} {f'to {most}' if most else 'up'}")
    return parse


whole, positive, strength, share = number(int, 0), number(int, 1), number(float, 0), number(float, 0, 1)


def machine_flags(add):
    """The flags that every program has; `add` is a parser's add_argument."""
    add("--device", default="auto", help="auto (CUDA, then MPS, then the CPU), cuda, mps or cpu (default: auto)")
    add("--bf16", action=argparse.BooleanOptionalAction,
        help="matrix products in bfloat16, where the hardware has them (default: the preset's choice in training; off "
             "in sampling and evaluation)")


def part(text: str) -> tuple[int, int]:
    """For argparse: "2/8" -> (1, 8)."""
    i, _, k = text.partition("/")
    if not (i.isdecimal() and k.isdecimal() and 1 <= int(i) <= int(k)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a part such as 2/8, the second of eight")
    return int(i) - 1, int(k)


def part_flag(add):
    """For work that several processes, or machines, share without knowing of each other."""
    add("--part", type=part, default=(0, 1), metavar="I/K",
        help="do the I-th of K parts of the work, into a folder that all share (default: all of it)")


def training_flags(add):
    """The flags of every training."""
    add("--iterations", type=positive, help="training steps")
    add("--batch", type=positive, help="samples a step")
    add("--lr", type=strength, help="highest learning rate")
    add("--seed", type=whole, default=0, help="of a training, or of what `teacher.py trajectories` writes (default: 0)")
    add("--checkpointing", choices=("auto", "on", "off"),
        help="recompute activations in the backward pass, which saves memory (default: auto, where they would not fit)")
    add("--accumulate", type=positive, metavar="K", help="save memory: a batch in K parts, in turn (default: 1)")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile: a slow start, then faster on a GPU")
    add("--export", type=exportable, help="also write the result, in float16 and for use only, to this file")
    machine_flags(add)


# ---- devices --------------------------------------------------------------------------------------------------------

def pick_device(name: str = "auto") -> torch.device:
    """"auto" takes CUDA, then MPS, then the CPU. Raises Fault when the named device is not there. float32 products on
    CUDA use TF32."""
    mps = torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if name == "cuda" and world() > 1:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    if not re.fullmatch(r"cuda(:\d+)?|mps|cpu", name):
        raise Fault(f"no device is called {name!r} here: use auto, cuda, mps or cpu")
    if (name.startswith("cuda") and not torch.cuda.is_available()) or (name == "mps" and not mps):
        raise Fault(f"this machine, or this build of PyTorch, has no {name} device: use --device auto")
    device = torch.device(name)
    if device.type == "cuda":
        if (device.index or 0) >= torch.cuda.device_count():
            raise Fault(f"there is no {name}: this machine has {torch.cuda.device_count()} GPU(s)")
        if device.index is not None:
            torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    return device


def at_once(device: torch.device) -> int:
    """Samples to compute at a time: what a CPU's cache holds, or what fills a GPU."""
    return 32 if device.type == "cpu" else 256


def precision(device: torch.device, bf16: bool | None) -> torch.dtype:
    """bfloat16 where it is asked for and the device multiplies in it natively; others are slower in it than in
    float32, and use that."""
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        native = device.type == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
    return torch.bfloat16 if bf16 and native else torch.float32


def autocast(device: torch.device, bf16: bool | None):
    """Matrix products in the `precision`, over float32 weights."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision(device, bf16) == torch.bfloat16,
                          cache_enabled=False)  # or bfloat16 weights made under no_grad get no gradient later


def fast_attention(device: torch.device, bf16: bool | None):
    """Around a training step. On a CPU the backward pass of fused attention is so slow in bfloat16 that it eats the
    gain: there plain products stand in for it."""
    plain = device.type == "cpu" and precision(device, bf16) == torch.bfloat16
    return sdpa_kernel(SDPBackend.MATH) if plain else nullcontext()


def recompute(preset: dict, model, blocks: int, device: torch.device) -> bool:
    """Whether the backward pass of a model on `device` is to recompute activations, by preset["checkpointing"]: "on",
    "off", or "auto": when those of a batch of trajectories of that many blocks would not fit into what a GPU has free
    (a tenth of it to spare) beside what training needs for each weight: gradient, average and AdamW's two."""
    if preset["checkpointing"] == "auto" and device.type == "cuda":
        samples = preset["batch"] // (world() * preset["accumulate"])
        stored = model.activation_bytes(blocks, precision(device, preset["bf16"]) == torch.bfloat16)
        torch.cuda.empty_cache()  # what earlier work has left there counts as free
        needed = samples * stored + 16 * sum(weight.numel() for weight in model.parameters())
        return needed > 0.9 * torch.cuda.mem_get_info(device)[0]
    return preset["checkpointing"] == "on"


def synchronise(device: torch.device):
    """Wait for the device: before reading a clock."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


# ---- several processes ----------------------------------------------------------------------------------------------
# torchrun starts them and tells each its number by the environment.

def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def everywhere(tensor, op="SUM"):
    """All-reduce a tensor in its place, to the "SUM" or the "MAX" of all processes, and return it."""
    if world() > 1:
        dist.all_reduce(tensor, getattr(dist.ReduceOp, op))
    return tensor


def wait_for_all():
    if world() > 1:
        dist.barrier()


def gather(items: list) -> list:
    """The items of all the processes, on rank 0; nothing on the others."""
    if world() == 1:
        return items
    lists = [None] * world() if rank() == 0 else None
    dist.gather_object(items, lists)
    return [item for part in lists or [] for item in part]


# ---- progress -------------------------------------------------------------------------------------------------------

class Progress:
    """Iterate with a progress line: items done/total, rate, ETA. Silent for what takes under two seconds. `note` is
    shown behind it; `start` items were done before (a resumed run). The rate is in `unit`s, `weight` to an item."""

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
            if rank() == 0 and now - began > 2 and (now - shown > (0.5 if live else 15) or last):
                rate = (done - self.start) / (now - began)
                left = int((self.total - done) / rate)
                eta = f"took {int(now - began)} s" if last else f"ETA {left // 60}:{left % 60:02d}"
                rate *= self.weight
                line = f"{self.title}: {done:,}/{self.total:,}  {rate:,.1f} {self.unit}/s  {eta}  {self.note}"
                start, end = ("\r", "\033[K" + "\n" * last) if live else ("", "\n")
                print(start + line, end=end, file=sys.stderr, flush=True)
                shown = now


# ---- files ----------------------------------------------------------------------------------------------------------

def optional(name: str):
    """Import a module that only some paths need. Raises Fault where its package is missing."""
    try:
        return importlib.import_module(name)
    except ImportError:
        name = name.partition(".")[0].replace("_", "-")
        raise Fault(f"this needs the package {name}: pip install -r requirements-imagenet.txt") from None


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
    new one. Neighbours that killed writers of this file left behind, ten minutes ago or more, are removed."""
    path = writable(path)
    for left in path.parent.glob(f".{path.name}.*.part"):
        with suppress(FileNotFoundError):
            if time.time() - left.stat().st_mtime > 600:
                left.unlink()
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")  # no process id: machines may share the folder
    try:
        with open(aside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except RuntimeError as error:  # torch.save hides what stopped it, a full disk or Ctrl-C, behind an error of its own
        if isinstance(error.__context__, (OSError, KeyboardInterrupt)):
            raise error.__context__ from None
        raise
    finally:
        aside.unlink(missing_ok=True)


def difference(there: dict, here: dict) -> str:
    """Where two descriptions differ first, in a few words."""
    key = next(k for k in here | there if there.get(k, "nothing") != here.get(k, "nothing"))
    a, b = there.get(key, "nothing"), here.get(key, "nothing")
    return difference(a, b) if isinstance(a, dict) and isinstance(b, dict) else f"{key} is {a} there, not {b}"


def save_json(path: Path, content):
    replace_file(Path(path), lambda file: file.write((json.dumps(content, indent=1) + "\n").encode()))


def load_checkpoint(path: str | Path, kind: str | tuple[str, ...], foreign=None) -> dict:
    """Read a checkpoint of this project whose about["kind"] is `kind`. `foreign`(content, path) may make one of a file
    that is not ours. Raises Fault for anything else."""
    kinds = (kind,) if isinstance(kind, str) else kind
    path = Path(path)
    if not path.is_file():
        raise Fault(f"no such checkpoint: {path}")
    open(path, "rb").close()  # a file that may not be read is not damaged
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the `args` of a public DiT's
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # a damaged file makes torch.load raise all sorts of things
        raise Fault(f"{path} is not a checkpoint, or is damaged (cut short?): it cannot be read") from None
    if foreign and isinstance(checkpoint, dict) and "about" not in checkpoint:
        checkpoint = foreign(checkpoint, path)
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


def exportable(path: str | Path) -> Path:
    """The path, if nothing is lost by writing there. Raises Fault where it holds a training."""
    path = writable(path)
    try:
        there = torch.load(path, weights_only=True, mmap=True)
    except Exception:  # nothing, or something else
        return path
    if "optimiser" in there:
        raise Fault(f"{path} holds a training that can be continued: export to another file")
    return path


def export(path: str | Path, about: dict, weights: dict):
    """Write a checkpoint for use only: the weights, in float16. Raises Fault (see exportable)."""
    path = exportable(path)
    half = {name: weight.half() for name, weight in weights.items()}
    replace_file(path, lambda file: torch.save({"about": about, "ema": half}, file))
    print(f"wrote {path}")


def fingerprint(weights: dict) -> str:
    """16 hexadecimal digits that tell these weights from others."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode() + weights[name].detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


# ---- the loop -------------------------------------------------------------------------------------------------------

@contextmanager
def interrupts():
    """Within this context, a first Ctrl-C (or SIGTERM) is only noted, in the list that it gives, so that the step can
    be finished; a second one stops at once."""
    asked = []

    def ask(which, _):
        if asked:
            raise KeyboardInterrupt
        asked.append(which)

    old = {which: signal.signal(which, ask) for which in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for which, handler in old.items():
            signal.signal(which, handler)


def learning_rate(step: int, iterations: int, warmup: int, schedule: str) -> float:
    """As a share of the highest: a linear warm-up, then "constant" or a "cosine" down to 0."""
    rate = min(1.0, (step + 1) / max(1, warmup))
    return rate * 0.5 * (1 + math.cos(math.pi * step / iterations)) if schedule == "cosine" else rate


@torch.no_grad()
def update_average(average: torch.nn.Module, model: torch.nn.Module, decay: float, step: int):
    """average ← decay·average + (1 − decay)·model, with a smaller decay in the first steps."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


def part_size(batch: int, parts: int) -> int:
    """Samples in a part, where each process takes its share of a batch in `parts` parts. Raises Fault where the batch
    cannot be shared evenly."""
    if batch % (world() * parts):
        raise Fault(f"a batch of {batch} cannot be shared by {world()} processes in {parts} parts each: choose another "
                    "--batch or --accumulate")
    return batch // (world() * parts)


def micro_batches(tensors, parts: int) -> list[tuple]:
    """This process's share of a batch (tensors whose first axis is the sample), in `parts` parts (see part_size)."""
    part_size(len(tensors[0]), parts)
    return list(zip(*(tensor.chunk(world())[rank()].chunk(parts) for tensor in tensors), strict=True))


class Player:
    """A model that is trained: with AdamW, without weight decay, at a learning rate of `lr` at most. loss_of(model,
    *batch) is a scalar, a mean over the batch, or such a loss and other such values that are to be watched."""

    def __init__(self, model, loss_of, lr: float, compile=False):
        self.model, self.loss_of, self.lr = model.train(), loss_of, lr
        self.weights = [w for w in model.parameters() if w.requires_grad]
        fused = self.weights[0].device.type == "cuda"
        self.optimiser = torch.optim.AdamW(self.weights, lr=lr, weight_decay=0.0, fused=fused)
        self.network = model
        if compile:
            torch._dynamo.reset()  # an earlier model's graphs count against the limit on recompilations
            model.compile_layers()

    def share(self, device):
        """From here on, backward() averages the gradients of all processes."""
        torch._dynamo.config.optimize_ddp = False  # DDP's way of cutting a compiled graph fails with checkpointing
        self.network = DistributedDataParallel(self.network, device_ids=[device] if device.type == "cuda" else None,
                                               gradient_as_bucket_view=True)

    def step(self, parts, rate: float, clip: float, device, bf16) -> list:
        """One step on a batch in parts, at `rate` times the learning rate: the loss and what else is watched, not
        finite if the gradient is not."""
        for group in self.optimiser.param_groups:
            group["lr"] = rate * self.lr
        self.optimiser.zero_grad(set_to_none=True)
        sums = 0
        for i, part in enumerate(parts, start=1):
            together = world() == 1 or i == len(parts)  # gradients travel once a step, with the last part
            with nullcontext() if together else self.network.no_sync(), fast_attention(device, bf16):
                with autocast(device, bf16):
                    values = self.loss_of(self.network, *(tensor.to(device) for tensor in part))
                    values = values if isinstance(values, tuple) else (values,)
                (values[0] / len(parts)).backward()
            sums = sums + torch.stack([value.detach().float() for value in values]) / len(parts)
        norm = torch.nn.utils.clip_grad_norm_(self.weights, clip)
        self.optimiser.step()
        return sums + 0 * norm


def train(title, model, batch_of, loss_of, out: Path, about: dict, *, iterations, batch, lr, decay=0.999, warmup=100,
          schedule="cosine", clip=1.0, bf16=False, accumulate=1, compile=False, save_seconds=None, log_every=50,
          rival: Player | None = None, verdict=lambda losses: None):
    """Minimise loss_of(model, *batch_of(step)) (see Player); return the averaged model and the means of the values,
    [(step, loss, …), …]. `model` is on its device and holds its starting weights.
    Saves to `out` and continues from it; a finished run is not run again. `about` describes the training: another one
    at `out` is a Fault, and is not overwritten. `batch` is for the rate in the progress line only.
    `save_seconds`: how often to save (default: every minute, or less often where saving takes long).
    A `rival` takes a step on the same batch after each of the model's; its values follow the model's in the means. The
    training ends in a Fault, without saving, when `verdict`(means so far) has something to say."""
    device = next(model.parameters()).device
    average = copy.deepcopy(model).eval().requires_grad_(False)
    players = {"": Player(model, loss_of, lr, compile)} | ({"rival_": rival} if rival else {})
    start, losses, partial = 0, [], 0.0  # `partial`: the sums of the values since the last entry of `losses`
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
            for name, player in players.items():
                load_weights(player.model, state[name + "model"], out)
                player.optimiser.load_state_dict(state[name + "optimiser"])
            print(f"continuing {out} at step {start:,} of {iterations:,}")
        del state

    def save(step):
        state = {"about": about, "ema": average.state_dict(), "step": step, "losses": losses,
                 "partial": partial.tolist()}
        for name, player in players.items():
            state |= {name + "model": player.model.state_dict(), name + "optimiser": player.optimiser.state_dict()}
        replace_file(out, lambda file: torch.save(state, file))

    if world() > 1 and start < iterations:
        for player in players.values():
            player.share(device)
    progress = Progress(title, range(start, iterations), start=start, unit="images", weight=batch)
    partial, saved = torch.tensor(partial, device=device), time.time()
    pause = 60 if save_seconds is None else save_seconds
    with interrupts() as asked:
        for step in progress:
            parts, rate = micro_batches(batch_of(step), accumulate), learning_rate(step, iterations, warmup, schedule)
            values = [player.step(parts, rate, clip, device, bf16) for player in players.values()]
            partial = partial + torch.cat(values)
            update_average(average, model, decay, step)

            done = step + 1
            log = done % log_every == 0 or done == iterations
            stop, late = bool(asked), time.time() - saved > pause
            if world() > 1:
                stop, late = everywhere(torch.tensor([stop, late], device=device).int(), "MAX").tolist()
            keep = stop or late or done == iterations
            if log or keep:
                partial = everywhere(partial) / world()  # each has the mean now, and goes on from it
                if not partial.isfinite().all():
                    raise Fault(f"the loss is not finite at step {done}: try a smaller --lr. What was saved before "
                                "stays")
            if log:
                losses.append((done, *(partial / ((done - 1) % log_every + 1)).tolist()))
                partial.zero_()
                progress.note = "loss " + " ".join(f"{value:.5f}" for value in losses[-1][1:])
                if trouble := verdict(losses):
                    raise Fault(f"{trouble} at step {done}. What was saved before stays; try again into another --out")
            if keep:
                began = time.time()
                if rank() == 0:
                    save(done)
                wait_for_all()
                saved = time.time()
                if save_seconds is None:
                    pause = max(60, 20 * (saved - began))
            if stop:
                raise KeyboardInterrupt(f"{out} holds {done:,} of {iterations:,} steps")
    return average, losses
