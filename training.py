"""The training loop of teachers and students, and the pieces of it that the GAN stage uses too.

Everything random in an iteration is a function of (seed, iteration), and so is the learning rate. A
checkpoint holds the rest. So a training that was stopped and started again takes the same steps, on
a CPU with the same number of threads bit for bit. Under torchrun, the processes share each batch.
"""

import copy
import math
import signal
import time
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from config import Training
from figures import draw_losses
from files import (
    UserError,
    check_finite,
    first_difference,
    load_checkpoint,
    load_weights,
    output_file,
    replace_file,
)
from machine import (
    Progress,
    Runtime,
    all_reduce,
    explain_memory,
    rank,
    wait_for_all,
    world_size,
)

with suppress(ImportError):
    import fcntl

LOG_EVERY = 50  # iterations over which the loss is averaged before it is logged
SMALLEST_SCALE = 1e-4  # of gradients in float16: where less is needed, something is wrong

# ---- 1. The pieces -------------------------------------------------------------------------------


def make_optimizer(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """AdamW without weight decay, as in the paper."""
    weights = [w for w in model.parameters() if w.requires_grad]
    fused = weights[0].device.type == "cuda"
    return torch.optim.AdamW(weights, lr=lr, weight_decay=0.0, fused=fused)


def learning_rate(iteration: int, training: Training) -> float:
    """A linear warm-up over the first twentieth, then constant, or a cosine down to 0."""
    warmup = max(1, training.iterations // 20)
    rate = training.lr * min(1.0, (iteration + 1) / warmup)
    if training.schedule == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * iteration / training.iterations))
    return rate


def micro_batches(batch: tuple, runtime: Runtime) -> list[tuple]:
    """This process's share of a batch, split into `accumulate` micro-batches. batch: tensors whose
    first axis is the sample. Raises UserError where the batch cannot be split evenly."""
    size = len(batch[0])
    if size % (world_size() * runtime.accumulate):
        raise UserError(
            f"a batch of {size} cannot be split evenly between {world_size()} processes with "
            f"{runtime.accumulate} micro-batches each: choose another --batch or --accumulate"
        )
    shares = [tensor.chunk(world_size())[rank()] for tensor in batch]
    pieces = [share.to(runtime.device).chunk(runtime.accumulate) for share in shares]
    return list(zip(*pieces, strict=True))


def attention_kernel(runtime: Runtime):
    """The context that chooses how attention is computed. The backward pass of the fused kernel is
    very slow in 16 bits on a CPU."""
    if runtime.dtype != torch.float32 and runtime.device.type == "cpu":
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


def make_scaler(runtime: Runtime) -> torch.amp.GradScaler:
    """Gradients in float16 are scaled up, so that small ones do not become 0, and down again before
    the step. In other dtypes this does nothing."""
    return torch.amp.GradScaler(runtime.device.type, enabled=runtime.dtype == torch.float16)


def accumulate_gradients(
    network, loss_of, batches: list[tuple], runtime: Runtime, scaler=None
) -> torch.Tensor:
    """Add the gradients of the mean of loss_of(network, *micro_batch), times the factor of
    `scaler`. Returns the mean, without that factor and detached."""
    total = 0
    for i, batch in enumerate(batches, start=1):
        is_last = i == len(batches)
        # Processes exchange their gradients once, after the last micro-batch.
        postpone = world_size() > 1 and not is_last
        exchange = network.no_sync() if postpone else nullcontext()
        with exchange, attention_kernel(runtime), explain_memory(len(batch[0])):
            with runtime.autocast():
                loss = loss_of(network, *batch) / len(batches)
            (scaler.scale(loss) if scaler else loss).backward()
        total = total + loss.detach().float()
    return total


class RecordedPass:
    """Runs compute(batches), which computes gradients and returns the loss, as a CUDA graph.

    In a pass of a small network, each of a thousand kernels takes less time than its launch. A CUDA
    graph launches all of them at once. The first passes run as usual, in a side stream, as PyTorch
    requires: they initialise things that must not be part of a recording. The next pass is
    recorded, on copies of its batches. From then on, the Python code of `compute` does not run
    again. Each batch is copied over the recorded one, and the same kernels overwrite the gradients
    and the loss."""

    def __init__(self, compute):
        self.compute = compute
        self.unrecorded = 3  # passes before the recording
        self.graph = None

    def __call__(self, batches: list[tuple]) -> torch.Tensor:
        if self.unrecorded > 0:
            self.unrecorded -= 1
            return self.run_in_stream(batches)
        if self.graph is None:
            self.record(batches)
        for recorded, given in zip(self.batches, batches, strict=True):
            for tensor, values in zip(recorded, given, strict=True):
                tensor.copy_(values)
        self.graph.replay()
        return self.loss

    def run_in_stream(self, batches):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            loss = self.compute(batches)
        torch.cuda.current_stream().wait_stream(stream)
        return loss

    def record(self, batches):
        self.batches = [tuple(tensor.clone() for tensor in batch) for batch in batches]
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.loss = self.compute(self.batches)


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float, iteration: int):
    """ema ← decay·ema + (1 − decay)·model, with a smaller decay in the first iterations."""
    decay = min(decay, (1 + iteration) / (10 + iteration))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def share_gradients(model: nn.Module, device: torch.device) -> nn.Module:
    """The network to train: under torchrun, one whose backward pass averages over all processes."""
    if world_size() == 1:
        return model
    # DDP's way of cutting a compiled graph fails with checkpointing.
    torch._dynamo.config.optimize_ddp = False
    ids = [device] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)


@contextmanager
def interrupts():
    """Yields a function that says whether Ctrl-C was pressed (or SIGTERM came), so that the
    iteration can be finished first. A second Ctrl-C stops at once."""
    requests = []

    def note(signal_number, frame):
        if requests:
            raise KeyboardInterrupt
        requests.append(signal_number)

    handlers = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(requests)
    finally:
        for signal_number, handler in handlers.items():
            signal.signal(signal_number, handler)


@contextmanager
def lock_checkpoint(file: Path):
    """Lock a checkpoint while it is trained. Raises UserError where another process trains it, too:
    the two would overwrite each other's results. (Windows has no such locks.)"""
    lock_file = file.with_name(f".{file.name}.lock")
    with ExitStack() as stack:
        if rank() == 0:
            lock = stack.enter_context(open(output_file(lock_file), "w"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"another process is training {file} now: wait for it, or choose another --out"
                ) from None
            except (NameError, OSError):  # no module fcntl, or a disk without locks
                pass
            stack.callback(lock_file.unlink, missing_ok=True)
        yield


class SaveClock:
    """Says when to save: every minute, or less often where saving takes more than three seconds."""

    def __init__(self):
        self.pause = 60.0  # seconds
        self.saved = time.time()

    def due(self) -> bool:
        return time.time() - self.saved > self.pause

    def timed(self, save):
        """Call save() and note how long it took."""
        began = time.time()
        save()
        self.saved = time.time()
        self.pause = max(60.0, 20 * (self.saved - began))


def any_process(condition: bool, device: torch.device) -> bool:
    """Whether the condition holds in any of the processes: all of them then act alike."""
    if world_size() == 1:
        return condition
    return bool(all_reduce(torch.tensor(int(condition), device=device), "MAX"))


# ---- 2. Continuing -------------------------------------------------------------------------------


def load_training(file: Path, kind: str, record) -> dict | None:
    """What a checkpoint holds of the training that `record` describes, or None where there is none.
    Raises UserError where the file holds another training."""
    if not file.exists():
        return None
    saved = load_checkpoint(file, kind)
    if saved["record"] != record:
        difference = first_difference(asdict(saved["record"]), asdict(record))
        raise UserError(
            f"{file} holds another training: {difference}. Choose another --out, or remove it"
        )
    if "optimizer" not in saved:
        raise UserError(f"{file} was exported, for use only: choose another --out, or remove it")
    missing = {"iteration", "losses"} - saved.keys()
    settings = getattr(record, "gan_training", None) or record.training
    if missing or not 0 <= saved["iteration"] <= settings.iterations:
        raise UserError(f"{file} is damaged: choose another --out, or remove it to begin again")
    for part in {"ema", "model"} & saved.keys():
        check_finite(saved[part], file)
    return saved


def restore(saved: dict, file: Path, model: nn.Module, optimizer, scaler) -> float:
    """Load the state of a training that goes on, and return the sum of its losses since the last
    entry. Raises UserError where the checkpoint is damaged."""
    try:
        load_weights(model, saved["model"], file)
        load_optimizer(optimizer, saved["optimizer"])
        if saved.get("scaler"):
            scaler.load_state_dict(saved["scaler"])
        return float(saved["loss_sum"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{file} is damaged and cannot be continued ({error!r}): choose another --out, or "
            "remove it to begin again"
        ) from None


def load_optimizer(optimizer, saved: dict):
    """Load the moments of AdamW. Raises ValueError, KeyError or TypeError where they are not those
    of these weights. (The settings are not read: the record has them.)"""
    settings = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict(dict(state=saved["state"], param_groups=settings))
    for group in optimizer.param_groups:
        for weight in group["params"]:
            state = optimizer.state[weight]
            for moment in (state["exp_avg"], state["exp_avg_sq"]):
                if moment.shape != weight.shape or not moment.isfinite().all():
                    raise ValueError("the optimizer's moments are not those of the weights")
            if state["step"] < 1:
                raise ValueError("the optimizer has taken no step")


# ---- 3. The loop ---------------------------------------------------------------------------------


def train(
    kind: str,
    model: nn.Module,
    loss_of,
    batch_at,
    file: Path,
    record,
    runtime: Runtime,
    preview=None,
):
    """Minimise loss_of(model, *batch_at(iteration)), a mean over the batch.

    The checkpoint `file` is written as a `kind` with its `record`, whose `training` says how long
    and how fast to learn. A training found there is continued; a finished one is returned as it is.
    `preview`(ema, iteration) is called ten times during the training. In the end, a curve of the
    losses is drawn into FILE-loss.png.
    Returns (the EMA of the model, [(iteration, mean loss since the last entry), …])."""
    training, device = record.training, runtime.device
    model.train()
    model.checkpointing = runtime.checkpointing
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer, scaler = make_optimizer(model, training.lr), make_scaler(runtime)
    first, losses, loss_sum = 0, [], torch.zeros((), device=device)

    saved = load_training(file, kind, record)
    if saved is not None:
        load_weights(ema, saved["ema"], file)
        first, losses = saved["iteration"], saved["losses"]
        if first == training.iterations:
            return ema, losses
        loss_sum += restore(saved, file, model, optimizer, scaler)
        print(f"continuing {file} at iteration {first:,} of {training.iterations:,}")

    def save(iteration: int):
        if rank() > 0:
            return
        content = dict(
            kind=kind,
            record=asdict(record),
            ema=ema.state_dict(),
            model=model.state_dict(),
            optimizer=optimizer.state_dict(),
            scaler=scaler.state_dict(),
            iteration=iteration,
            losses=losses,
            loss_sum=loss_sum.item(),
        )
        replace_file(file, lambda opened: torch.save(content, opened))

    if runtime.compile:
        model.compile_layers()
    network = share_gradients(model, device)

    def run_pass(batches: list[tuple]) -> torch.Tensor:
        # Gradients are cleared inside the pass: when it is recorded there are none yet, so that a
        # replay overwrites the gradients instead of adding to them.
        optimizer.zero_grad(set_to_none=True)
        return accumulate_gradients(network, loss_of, batches, runtime, scaler)

    # (Prompts may be read from disk, which cannot be recorded.)
    can_record = runtime.can_record and not model.config.reads_text
    compute_gradients = RecordedPass(run_pass) if can_record else run_pass
    clock = SaveClock()
    iterations = range(first, training.iterations)
    progress = Progress(kind, iterations, start=first, unit="images", size=training.batch)
    with lock_checkpoint(file), interrupts() as interrupted:
        for iteration in progress:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(iteration, training)
            loss = compute_gradients(micro_batches(batch_at(iteration), runtime))
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)  # not where the scaled gradient was infinite
            scaler.update()
            update_ema(ema, model, training.ema_decay, iteration)
            # 0 · norm is not finite if a gradient is not. (A scaler deals with that itself.)
            loss_sum += loss if scaler.is_enabled() else loss + 0 * norm

            done = iteration + 1
            is_last = done == training.iterations
            stop = any_process(interrupted(), device)
            save_now = is_last or stop or any_process(clock.due(), device)
            if save_now or done % LOG_EVERY == 0:
                loss_sum = all_reduce(loss_sum) / world_size()
                if not loss_sum.isfinite() or scaler.get_scale() < SMALLEST_SCALE:
                    raise UserError(
                        f"the loss is not finite at iteration {done}: try a smaller --lr. "
                        "What was saved before stays"
                    )
            if is_last or done % LOG_EVERY == 0:
                period = (done - 1) % LOG_EVERY + 1  # iterations since the last entry
                losses.append((done, (loss_sum / period).item()))
                loss_sum = torch.zeros((), device=device)
                progress.note = f"loss {losses[-1][1]:.5f}"
            if save_now:
                clock.timed(partial(save, done))
                wait_for_all()
            if rank() == 0 and losses and (is_last or stop):
                draw_losses({kind: losses}, file.with_name(f"{file.stem}-loss.png"))
            if stop:
                raise KeyboardInterrupt(
                    f"{file} holds {done:,} of {training.iterations:,} iterations; the same "
                    "command continues from there."
                )
            if preview and rank() == 0 and done % max(1, training.iterations // 10) == 0:
                preview(ema, done)
    return ema, losses
