"""Speed and memory of training and sampling on this machine, beside a dense reference.

The *dense reference* computes the same function as our network, in the way of the authors' code:

    training    all S·n tokens are one sequence; every layer has a mask of S·n × S·n entries
    sampling    the history layers cache keys and values of earlier states, as ours do
    both        adaLN's modulation is computed for each token, not once for each state; float32
                (TF32 on CUDA)

It is written below, on the weights of our network; a test checks that the results are the same.
What is compared is measured in turns, one run of each, and the median is reported. A training step
is a whole one: forward and backward pass, gradient clipping, AdamW and EMA. The memory is that of
distill.py, which holds the teacher too.

    python experiments/benchmark.py                     DiT-XL/2 on a GPU: about three minutes;
                                                        DiT-S/2 on a CPU, in float32
    python experiments/benchmark.py --size B/2          another network

Results go into benchmark.json in the folder --out as they are measured. After --seconds nothing new
is started; the same command then measures what is missing. Files called profile-….txt list the
kernels that take most of the time.
"""

import copy
import gc
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import startup  # noqa: F401  before the large packages

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import nn

from command_line import make_parser, non_negative, non_negative_int, positive_int, run_program
from config import (
    AUTHORS_STUDENT,
    PRESETS,
    PUBLIC_DIT_ODE,
    ModelConfig,
    StudentRecord,
    parse_size,
)
from data import file_name
from distill import ard_loss
from evaluate import count_macs, table
from files import UserError, first_difference, output_folder, save_json
from gan import GROUP, GANTrainer
from machine import Runtime, pick_device, synchronise
from model import DiT, KVCache, history_mask, modulate
from sample import few_step
from teacher import solve
from training import accumulate_gradients, make_optimizer, micro_batches, update_ema

STUDENT = AUTHORS_STUDENT
LARGE_BATCH = 64  # the paper's

# ---- 1. The dense reference ----------------------------------------------------------------------


class DenseReference:
    """What model(x, timesteps, y, cache) returns, for causal history and one output layer. x: all
    states of a trajectory, or with a cache the next one."""

    def __init__(self, model: DiT):
        self.model = model
        states, tokens = STUDENT.steps, model.config.tokens
        device = model.pos_embed.device
        self.own_state = history_mask("none", states, tokens).to(device)    # (S·n, S·n)
        self.all_earlier = history_mask("causal", states, tokens).to(device)
        self.remembered = {}  # the attention of a history layer -> its keys and values so far

    def __call__(self, x, timesteps, y, cache: KVCache | None = None):
        model, config = self.model, self.model.config
        states = x.shape[1]
        tokens = rearrange(model.embed(x), "b s n d -> b (s n) d")
        c = repeat(model.condition(timesteps, y), "b s d -> b (s n) d", n=config.tokens)
        if cache is None or cache.states_read == 0:
            self.remembered.clear()
        for i, block in enumerate(model.blocks):
            reads_history = i < config.history_layers
            mask = self.all_earlier if reads_history else self.own_state
            if cache is None:
                tokens = dense_layer(block, tokens, c, mask)
            else:  # one state, which may read all keys that there are
                past = self.remembered if reads_history else None
                tokens = dense_layer(block, tokens, c, None, past)
        if cache is not None:
            cache.states_read += states
        final = model.final_layer
        shift, scale = final.adaLN_modulation(c).chunk(2, dim=-1)
        out = final.linear(modulate(final.norm_final(tokens), shift, scale))
        out = rearrange(
            out,
            "b (s h w) (p q c) -> b s c (h p) (w q)",
            s=states, h=config.grid_size, p=config.patch, q=config.patch,
        )
        return out[:, :, : config.channels]


def dense_layer(block, x, c, mask, past: dict | None = None):
    """x and c: (b, m, width), one condition for each of the m tokens; mask: (m, m), or None. Keys
    and values are added to those in `past`, where it is given."""
    modulation = block.adaLN_modulation(c).chunk(6, dim=-1)                 # for each token
    shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation
    normed = modulate(block.norm1(x), shift_attn, scale_attn)
    x = x + gate_attn * dense_attention(block.attn, normed, mask, past)
    return x + gate_mlp * block.mlp(modulate(block.norm2(x), shift_mlp, scale_mlp))


def dense_attention(attention, x, mask, past: dict | None):
    heads = attention.heads
    qkv = rearrange(attention.qkv(x), "b m (three h d) -> three b h m d", three=3, h=heads)
    q, k, v = qkv
    if past is not None:
        if attention in past:
            k = torch.cat([past[attention][0], k], dim=2)
            v = torch.cat([past[attention][1], v], dim=2)
        past[attention] = k, v
    x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return attention.proj(rearrange(x, "b h m d -> b m (h d)"))


# ---- 2. Measuring --------------------------------------------------------------------------------


@dataclass
class Job:
    """What is measured."""

    run: Callable[[], None]
    images: int  # that a run makes or learns from
    # Multiply-accumulates of a run, where they are counted. The backward pass of training counts as
    # two forward passes; recomputation is not counted.
    macs: int | None = None


def measure(jobs: dict[str, Job], device, repeats: int) -> dict[str, dict]:
    """All jobs run in turns, `repeats` times after a first round, and the median counts. What does
    not fit into the device's memory is left out, with a line that says so. Returns {name: row}:

        batch       images of a run             ms          milliseconds an image
        images      images a second             tflops      TFLOP a second
        peak_gib    GPU memory
    """
    jobs = {name: job for name, job in jobs.items() if first_run(name, job, device)}
    times = {name: [] for name in jobs}
    for _ in range(repeats):
        for name, job in jobs.items():
            times[name].append(seconds(job, device))
    rows = {}
    for name, job in jobs.items():
        median = statistics.median(times[name])
        row = dict(batch=job.images, images=job.images / median, ms=1e3 * median / job.images)
        if job.macs is not None:
            row["tflops"] = 2 * job.macs / median / 1e12
        if device.type == "cuda":
            row["peak_gib"] = peak_gib(job, device)
        rows[name] = row
    return rows


def seconds(job: Job, device) -> float:
    synchronise(device)
    began = time.perf_counter()
    job.run()
    synchronise(device)
    return time.perf_counter() - began


def first_run(name: str, job: Job, device) -> bool:
    """Run a job for the first time, which also compiles and warms up what it needs. Returns whether
    that was possible."""
    try:
        seconds(job, device)
        return True
    except (RuntimeError, UserError) as error:  # of CUDA's memory, or of torch.compile
        print(f"{name} cannot be measured here: {str(error).splitlines()[0][:200]}", flush=True)
    free_memory()
    return False


def free_memory():
    gc.collect()
    torch.cuda.empty_cache()


def peak_gib(job: Job, device) -> float:
    """The most GPU memory that is allocated while a job runs, with all that lies there."""
    free_memory()
    torch.cuda.reset_peak_memory_stats(device)
    seconds(job, device)
    return torch.cuda.max_memory_allocated(device) / 2**30


def profile(job: Job, device) -> str:
    """A table of the kernels (on a CPU: operators) that take most of the time."""
    is_cuda = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity
    activities = [activity.CUDA if is_cuda else activity.CPU]
    with torch.profiler.profile(activities=activities) as profiler:
        elapsed = seconds(job, device)
    key = "self_device_time_total" if is_cuda else "self_cpu_time_total"
    events = profiler.key_averages()
    listing = events.table(sort_by=key, row_limit=25, max_name_column_width=90)
    return f"one run of {job.images} images: {1e3 * elapsed:.1f} ms\n{listing}"


# ---- 3. What is measured -------------------------------------------------------------------------


def latent_config(size: str, history_layers: int, image_size: int = 32) -> ModelConfig:
    """The public DiT of a size, on the latents of 256×256 images. Raises ValueError."""
    return ModelConfig(
        image_size=image_size,
        channels=4,
        classes=1000,
        learn_sigma=True,
        mask="causal",
        history_layers=history_layers,
        **parse_size(size),
    )


@dataclass
class Bench:
    """The sizes of all measurements on a device, and the profiles made on the way."""

    device: torch.device
    size: str
    batch: int  # images of a training step
    sample_batch: int
    history_layers: int
    repeats: int
    on_gpu: bool  # ours runs as one would run it there; on a CPU, it runs like the reference

    def __post_init__(self):
        self.profiles = {}
        dtype = torch.bfloat16 if self.on_gpu else torch.float32
        self.runtime = Runtime(self.device, dtype, compile=self.on_gpu)
        self.exact = Runtime(self.device)  # float32, or TF32

        try:
            self.config = latent_config(self.size, self.history_layers)
        except ValueError as error:
            raise UserError(str(error)) from None

    def profile(self, title: str, jobs: dict, rows: dict, *names: str):
        """Profile the first of the named jobs that could be measured."""
        for name in names:
            if name in rows:
                self.profiles[f"{title}, {name}"] = profile(jobs[name], self.device)
                return

    def labels(self, count: int):
        return torch.randint(1000, (count,), device=self.device)

    def noise(self, *shape):
        return torch.randn(*shape, device=self.device)


def random_network(config: ModelConfig, device) -> DiT:
    """Random weights of which none is zero: as costly as trained ones."""
    torch.manual_seed(0)
    with torch.device(device):
        model = DiT(config)
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.02)
    return model


def variant(model: DiT, **attributes) -> DiT:
    """The same network, which shares its weights, with other attributes."""
    other = copy.copy(model)
    for name, value in attributes.items():
        setattr(other, name, value)
    return other


def without_history(model: DiT) -> DiT:
    return variant(model, config=replace(model.config, history_layers=0))


def measure_matrix_rate(bench: Bench) -> dict[str, dict]:
    """FLOP/s of one large product of random matrices: the device's own best, as a yardstick."""
    side, repeats = (8192, 300) if bench.on_gpu else (2048, 5)
    precisions = {"float32": torch.float32}  # on CUDA, TF32
    if bench.on_gpu:
        precisions["bfloat16"] = torch.bfloat16
    rows = {}
    for name, dtype in precisions.items():
        a = bench.noise(side, side).to(dtype)
        b = bench.noise(side, side).to(dtype)
        jobs = {name: Job(partial(torch.matmul, a, b), images=1, macs=side**3)}
        rows[name] = dict(tflops=measure(jobs, bench.device, repeats)[name]["tflops"])
    return rows


class TrainingBench:
    """A student in training, and all that distill.py holds in memory beside it: its EMA, AdamW's
    state and the teacher."""

    def __init__(self, bench: Bench):
        self.bench = bench
        self.model = random_network(bench.config, bench.device).train()
        self.model.pos_embed.requires_grad_(False)
        if bench.runtime.compile:
            self.model.compile_layers()
        self.ema = random_network(bench.config, bench.device).requires_grad_(False)
        self.teacher = random_network(bench.config, bench.device).requires_grad_(False)
        self.optimizer = make_optimizer(self.model, lr=1e-4)

    def job(self, network, batch: int, runtime: Runtime) -> Job:
        """A training step. The arithmetic of the dense reference is not counted."""
        trajectory = self.bench.noise(batch, STUDENT.steps + 1, 4, 32, 32)
        y = self.bench.labels(batch)
        macs = None
        if isinstance(network, DiT):
            macs = 3 * batch * count_macs(network.config, STUDENT.steps)
        return Job(partial(self.step, network, (trajectory, y), runtime), batch, macs)

    def step(self, network, batch: tuple, runtime: Runtime):
        """An iteration of training.train."""

        def loss_of(network, trajectory, y):
            return ard_loss(network, STUDENT, trajectory, y)

        accumulate_gradients(network, loss_of, micro_batches(batch, runtime), runtime)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        update_ema(self.ema, self.model, decay=0.9999, iteration=100_000)


def measure_training(bench: Bench) -> dict[str, dict]:
    """A training step of a batch that fits without recomputing, and what its speed is made of. On a
    GPU also the paper's batch in micro-batches of that size, which need no other graphs."""
    trainee = TrainingBench(bench)
    model, batch, runtime = trainee.model, bench.batch, bench.runtime
    dense = DenseReference(model)
    jobs = {
        "ours": trainee.job(model, batch, runtime),
        "ours, N = 0": trainee.job(without_history(model), batch, runtime),
        "ours, recomputing": trainee.job(variant(model, checkpointing=True), batch, runtime),
        "dense reference": trainee.job(dense, batch, bench.exact),
    }
    if bench.on_gpu:
        count = max(1, LARGE_BATCH // batch)
        accumulating = replace(runtime, accumulate=count)
        jobs["ours, accumulating"] = trainee.job(model, batch * count, accumulating)
        # How much of the difference is due to the compiler and to precision:
        eager = variant(model, compiled_blocks=None)
        jobs["ours, not compiled"] = trainee.job(eager, batch, runtime)
        jobs["dense reference, bf16"] = trainee.job(dense, batch, runtime)
        # 80 GB may not hold the reference's activations, which are large.
        halves = replace(bench.exact, accumulate=2)
        jobs["dense reference, in halves"] = trainee.job(dense, batch, halves)
    rows = measure(jobs, bench.device, bench.repeats)
    bench.profile("training", jobs, rows, "ours, accumulating", "ours", "ours, recomputing")
    return rows


def measure_second_stage(bench: Bench) -> dict[str, dict]:
    """An iteration of the second stage: a step of the student, and one of the discriminator."""
    preset = PRESETS["imagenet256"]
    record = StudentRecord(
        model=bench.config,
        student=STUDENT,
        data=preset.data,
        classes=(),
        class_weights=(),
        teacher="",
        trajectories=0,
        training=preset.distillation,
        gan=preset.gan,
        gan_training=preset.gan_training,
    )
    first = random_network(bench.config, bench.device)
    teacher = random_network(replace(bench.config, history_layers=0), bench.device)
    runtime = replace(bench.runtime, compile=False)
    trainer = GANTrainer(first, record, teacher, runtime, inputs={})
    count = GROUP * math.ceil(bench.batch / GROUP)  # the discriminator compares images in groups
    trajectory = bench.noise(count, STUDENT.steps + 1, 4, 32, 32)
    noise, real, real_noise = bench.noise(3, count, 4, 32, 32)
    y = bench.labels(count)
    batch = (trajectory, y, noise, real, y, real_noise)

    def step(checkpointing: bool):
        trainer.model.checkpointing = checkpointing
        trainer.step(batch)

    jobs = {
        "ours": Job(partial(step, False), count),
        "ours, recomputing": Job(partial(step, True), count),
    }
    rows = measure(jobs, bench.device, bench.repeats)
    bench.profile("second stage", jobs, rows, "ours, recomputing")
    return rows


def measure_large_batch(bench: Bench) -> dict[str, dict]:
    """The paper's batch, all at once."""
    trainee = TrainingBench(bench)
    model = trainee.model
    recomputing = variant(model, checkpointing=True)
    jobs = {
        "ours, recomputing": trainee.job(recomputing, LARGE_BATCH, bench.runtime),
        "ours": trainee.job(model, LARGE_BATCH, bench.runtime),
    }
    rows = measure(jobs, bench.device, bench.repeats)
    bench.profile("training, large batch", jobs, rows, "ours, recomputing")
    return rows


def measure_sampling(bench: Bench) -> dict[str, dict]:
    """Four steps with history and without, four steps of the reference, and the teacher's 25."""
    unprepared = random_network(bench.config, bench.device).eval().requires_grad_(False)
    model = copy.deepcopy(unprepared)
    bench.runtime.prepare(model)
    without = without_history(model)
    x_T, y = bench.noise(bench.sample_batch, 4, 32, 32), bench.labels(bench.sample_batch)

    def student(network, runtime: Runtime):
        with runtime.autocast():
            few_step(network, STUDENT, x_T, y)

    def teacher():
        with bench.runtime.autocast():
            solve(without, PUBLIC_DIT_ODE, x_T, y)

    def job(network, runtime: Runtime) -> Job:
        macs = None
        if isinstance(network, DiT):
            macs = bench.sample_batch * count_macs(network.config, STUDENT.steps)
        return Job(partial(student, network, runtime), bench.sample_batch, macs)

    jobs = {
        "ours": job(model, bench.runtime),
        "ours, N = 0": job(without, bench.runtime),
        "dense reference": job(DenseReference(unprepared), bench.exact),
    }
    if bench.on_gpu:
        # How much of the difference is due to the compiler, and to casting the weights once:
        eager = variant(model, compiled_blocks=None)
        jobs["ours, not compiled"] = job(eager, bench.runtime)
        jobs["ours, nothing prepared"] = job(unprepared, bench.runtime)
    rows = measure(jobs, bench.device, 3 * bench.repeats)  # to tell N = 6 from N = 0
    calls = PUBLIC_DIT_ODE.euler_steps * PUBLIC_DIT_ODE.calls_per_step
    macs = bench.sample_batch * calls * count_macs(without.config)
    slow = {"teacher": Job(teacher, bench.sample_batch, macs)}
    rows |= measure(slow, bench.device, max(1, bench.repeats // 3))
    bench.profile("sampling", jobs, rows, "ours")
    return rows


def measurements(bench: Bench) -> dict:
    """{title: function that measures and returns rows}, the most telling first."""
    named = {
        "matrix rate": measure_matrix_rate,
        "training": measure_training,
        "sampling": measure_sampling,
        "second stage": measure_second_stage,
    }
    if bench.on_gpu:
        named["training, large batch"] = measure_large_batch
    return named


# ---- 4. The program ------------------------------------------------------------------------------

COLUMNS = {
    "batch": "d", "images": ".2f", "ms": ".2f", "tflops": ".3f", "share": ".1%", "peak_gib": ".1f"
}


def goals(results: dict) -> dict[str, tuple[float | None, str]]:
    """What matters most: {name: (value, or None where it was not measured; the goal on a GPU)}."""

    def get(title, row, column):
        return results.get(title, {}).get(row, {}).get(column)

    def ratio(above, below):
        return above / below if above and below else None

    ours = get("training", "ours", "images")
    dense = get("training", "dense reference", "images")
    dense = dense or get("training", "dense reference, in halves", "images")
    shares = [
        get("training", "ours, accumulating", "share") or 0,
        get("training, large batch", "ours, recomputing", "share") or 0,
        get("training, large batch", "ours", "share") or 0,
    ]
    peak = get("training", "ours, recomputing", "peak_gib")
    fast, slow = (get("sampling", row, "images") for row in ("ours", "dense reference"))
    overhead = ratio(get("sampling", "ours", "ms"), get("sampling", "ours, N = 0", "ms"))
    return {
        "training: images/s, ours / dense": (ratio(ours, dense), ">= 4"),
        "training: share of the matrix rate at batch 64": (max(shares) or None, ">= 0.45"),
        "training, recomputing: peak GiB": (peak, "<= 23"),
        "sampling: images/s, ours / dense": (ratio(fast, slow), ">= 2"),
        "sampling: time with history / without": (overhead, "<= 1.015"),
    }


def open_results(file: Path, settings: dict) -> dict:
    """What was measured before. Raises UserError where that was something else."""
    if not file.exists():
        return dict(settings=settings, results={})
    try:
        content = json.loads(file.read_text())
        there, _ = dict(content["settings"]), dict(content["results"])
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{file} is damaged, or was written by another program: choose another --out"
        ) from None
    if there != settings:
        difference = first_difference(there, settings)
        raise UserError(f"{file} holds other measurements: {difference}. Choose another --out")
    return content


def add_shares(rows: dict, results: dict, precision: str):
    """How much of the device's matrix rate each row reaches."""
    rate = results["matrix rate"][precision]["tflops"]
    for row in rows.values():
        if "tflops" in row:
            row["share"] = row["tflops"] / rate


def parse_flags():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--size", help="network, as SIZE/PATCH (default: S/2; on a GPU: XL/2)")
    add("--batch", type=positive_int, help="images of a training step (default: 4; on a GPU: 16)")
    add("--sample-batch", type=positive_int, help="images sampled at a time (default: 4; GPU: 32)")
    add("--history-layers", type=non_negative_int, help="N (default: 2; on a GPU: 6)")
    add("--repeats", type=positive_int, default=7, help="runs of each, of which the median counts")
    add("--seconds", type=non_negative, default=150, help="then nothing new starts (default: 150)")
    add("--out", type=Path, default=Path("runs/benchmark"), help="folder (default: runs/benchmark)")
    add("--device", default="auto", help="auto, cuda or cpu (default: auto)")
    flags = parser.parse_args()
    flags.device = pick_device(flags.device)
    defaults = dict(size="S/2", batch=4, sample_batch=4, history_layers=2)
    if flags.device.type == "cuda":
        defaults = dict(size="XL/2", batch=16, sample_batch=32, history_layers=6)
    for name, value in defaults.items():
        if getattr(flags, name) is None:
            setattr(flags, name, value)
    return flags


def main():
    began = time.time()
    flags = parse_flags()
    names = ("size", "batch", "sample_batch", "history_layers", "repeats")
    settings = {name: getattr(flags, name) for name in names}
    bench = Bench(flags.device, **settings, on_gpu=flags.device.type == "cuda")
    device = flags.device.type.upper()
    settings["device"] = torch.cuda.get_device_name() if bench.on_gpu else device
    settings |= dict(threads=torch.get_num_threads(), torch=torch.__version__)
    folder = output_folder(flags.out)
    content = open_results(folder / "benchmark.json", settings)
    results, left_out = content["results"], []
    for title, function in measurements(bench).items():
        if title not in results and time.time() - began < flags.seconds:
            rows = function(bench)
            free_memory()
            if rows:
                results[title] = rows
                add_shares(rows, results, bench.runtime.precision)
                save_json(folder / "benchmark.json", content)
            for name, text in bench.profiles.items():
                (folder / f"profile-{file_name(name)}.txt").write_text(text + "\n")
        if title not in results:
            left_out.append(title)
            continue
        print(f"\n{title}\n{table(results[title], COLUMNS)}", flush=True)
    print("\nimages: a second; ms: an image; share: of the matrix rate\n")
    for name, (value, goal) in goals(results).items():
        measured = "not measured" if value is None else f"{value:.3f}"
        print(f"{name:48} {measured:>14}   goal on a GPU: {goal}")
    if left_out:
        print(f"not measured: {', '.join(left_out)}. The same command tries again")
    print(f"wrote {folder / 'benchmark.json'}")


if __name__ == "__main__":
    run_program(main)
