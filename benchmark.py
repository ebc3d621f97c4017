"""Speed and memory, against a dense reference; and the bill, what distilling at ImageNet's size costs.

The *dense reference* computes the same function the way the authors' public code does: one sequence of all S·n tokens,
a mask of S·n × S·n entries in every layer, adaLN's modulation computed for each token anew, no cache when sampling.
It is written below, on the weights of our model, and its results are ours (tests/test_benchmark.py). Both sides of a
ratio are measured in turn, in one run; what is reported is the median.

    python benchmark.py                                          DiT-S/2 on a CPU, float32, or DiT-XL/2 on a GPU
    python benchmark.py --size B/2 --batch 32 --out runs/b2      another network
    python benchmark.py --bill                                   GPU hours, memory and disk, from the measured rates
    python benchmark.py --bill 100                               the same at 100 TFLOP/s; nothing is measured

Everything is written to benchmark.json in --out as it is measured; started again, it measures only what is missing.
"""

import argparse
import copy
import gc
import json
import statistics
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange, repeat

from discriminator import GROUP, Discriminator, Head
from model import DiT, modulate, size
from presets import REFINERS
from public import MARKS, ODE, TIMES, TOLD
from refine import players
from sample import few_step, table
from teacher import advance, solve
from training import (Fault, Player, autocast, command, difference, make_folder, pick_device, positive,
                      precision, save_json, strength, synchronise, whole)

LATENT = dict(image_size=32, channels=4, classes=1000)  # of 256×256 images


# ---- 1. The dense reference -----------------------------------------------------------------------------------------

def dense_masks(s: int, n: int, device):
    """Two masks of all s·n tokens, (s·n, s·n): each block on itself, and each block on all up to its own."""
    block = torch.arange(s, device=device).repeat_interleave(n)
    return block[:, None] == block, block[:, None] >= block


def dense_forward(model, x, t, y):
    """What model(x, t, y) gives, for a causal history and one output layer, computed densely."""
    b, s = x.shape[:2]
    tokens = model.x_embedder["proj"](rearrange(x, "b s c h w -> (b s) c h w"))
    x = rearrange(tokens, "(b s) d h w -> b s (h w) d", b=b) + model.pos_embed
    n = x.shape[2]
    x = rearrange(x, "b s n d -> b (s n) d")
    c = model.t_embedder(t) + model.y_embedder["embedding_table"](y)[:, None]
    c = repeat(c, "b s d -> b (s n) d", n=n)  # from here on, everything for each token
    diagonal, causal = dense_masks(s, n, x.device)
    for layer, block in enumerate(model.blocks):
        def attend(x, attn=block.attn, mask=causal if layer < model.history_layers else diagonal):
            q, k, v = rearrange(attn.qkv(x), "b m (qkv h d) -> qkv b h m d", qkv=3, h=attn.heads)
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            return attn.proj(rearrange(x, "b h m d -> b m (h d)"))
        shift1, scale1, gate1, shift2, scale2, gate2 = block.adaLN_modulation(c).chunk(6, dim=-1)
        x = x + gate1 * attend(modulate(block.norm1(x), shift1, scale1))
        x = x + gate2 * block.mlp(modulate(block.norm2(x), shift2, scale2))
    shift, scale = model.final_layer.adaLN_modulation(c).chunk(2, dim=-1)
    x = model.final_layer.linear(modulate(model.final_layer.norm_final(x), shift, scale))
    x = rearrange(x, "b (s h w) (p q c) -> b s c (h p) (w q)", s=s, h=model.grid, p=model.patch, q=model.patch)
    return x[:, :, : model.channels]


def dense_macs(model, s: int) -> int:
    """Multiply-accumulates of dense_forward for one sample: modulation and attention of all tokens with all."""
    n, d, depth = model.grid**2, model.width, len(model.blocks)
    modulation = (s * n - s) * (6 * depth + 2) * d * d
    return model.macs(1) * s + modulation + 2 * depth * d * (s * n) ** 2 - s * depth * 2 * n * n * d


def dense_sample(model, about, x_T, y):
    """Few steps without a cache: step s reads all s states again."""
    states, told = [x_T], torch.tensor(about["told"], device=x_T.device)
    for s in range(about["S"]):
        output = dense_forward(model, torch.stack(states, 1), told[: s + 1], y)[:, -1]
        states.append(advance(about, output.float(), None, None, None))
    return torch.stack(states, 1)


# ---- 2. Measuring ---------------------------------------------------------------------------------------------------

def seconds(jobs: dict, device, repeats: int) -> dict[str, float]:
    """The median time of each job, {name: function}, all of them in turn `repeats` times after a first round. What
    fails, since it does not fit into the device's memory or cannot be compiled, is left out."""
    times = {name: [] for name in jobs}
    for turn in range(repeats + 1):
        for name, job in jobs.items():
            if name not in times:
                continue
            synchronise(device)
            began = time.perf_counter()
            try:
                job()
            except RuntimeError as error:
                print(f"{name}: {str(error).splitlines()[0]}")
                del times[name]
            if name not in times:
                gc.collect()
                torch.cuda.empty_cache()
                continue
            synchronise(device)
            if turn:
                times[name].append(time.perf_counter() - began)
    if not times:
        raise Fault("none of these can be measured here: try a smaller --batch and --sample-batch")
    return {name: statistics.median(t) for name, t in times.items()}


def peak_gib(job, device) -> float | None:
    """The most GPU memory allocated while `job` runs again, with what is there: weights, gradients, AdamW's moments
    (distill.py has the average and the teacher there, too). None on a CPU."""
    if device.type != "cuda":
        return None
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    job()
    synchronise(device)
    return torch.cuda.max_memory_allocated(device) / 2**30


def matrix_rate(device, dtype) -> float:
    """FLOP/s of a large product in a precision (float32 is TF32 on CUDA): the device's own best, as a yardstick."""
    m = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(m, m, device=device, dtype=dtype) for _ in range(2))
    return 2 * m**3 / seconds({"": lambda: a @ b}, device, 300 if device.type == "cuda" else 5)[""]


def network(name: str, N: int, device) -> DiT:
    """A network with random weights, none of them zero: as costly as a trained one."""
    torch.manual_seed(0)
    with torch.device(device):
        model = DiT(**LATENT, **size(name), learn_sigma=True, history_layers=N)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    model.pos_embed.requires_grad_(False)
    return model


def changed(model: DiT, **attributes) -> DiT:
    """The same network, sharing its weights, with other attributes."""
    twin = copy.copy(model)
    vars(twin).update(attributes)
    return twin


def rows_of(jobs: dict, macs: dict, batch: int, device, repeats: int) -> dict[str, dict]:
    """Measure jobs {name: function} that compute a `batch` with so many multiply-accumulates: rows {name: {"batch",
    "peak_gib", "images" (a second), "ms" (an image), "tflops" (a second)}}."""
    return {row: dict(batch=batch, peak_gib=peak_gib(jobs[row], device), images=batch / t, ms=1000 * t / batch,
                      tflops=2 * macs[row] / t / 1e12) for row, t in seconds(jobs, device, repeats).items()}


def measure_training(name: str, N: int, batch: int, variants: dict[str, dict], device, repeats: int) -> dict[str, dict]:
    """Rows of a step of ARD training on clean predictions, as the authors' is, for variants {name: {"N",
    "checkpointing", "dense", "compiled", "bf16"}}. All share one network and one optimiser. Recomputation is not
    counted as work."""
    torch._dynamo.reset()  # each measurement compiles for its own shapes
    model, told = network(name, N, device), torch.tensor(TOLD, device=device)
    x, y = torch.randn(batch, 5, 4, 32, 32, device=device), torch.zeros(batch, dtype=torch.long, device=device)

    def loss(forward, x, y):
        return (forward(x[:, :-1], told, y).float() - x[:, 1:]).square().mean()

    def step(forward, bf16):
        player.network = forward
        player.step([(x, y)], 1.0, 1.0, device, bf16)

    player, jobs, macs = Player(model, loss, 1e-4), {}, {}
    for row, how in variants.items():
        dense, compiled = how.get("dense", False), how.get("compiled", False)
        twin = changed(model, history_layers=how.get("N", N), checkpointing=how.get("checkpointing", False))
        if compiled and not dense:  # as Player does, but for this twin alone
            twin = changed(twin, blocks=[torch.compile(block, dynamic=False) for block in model.blocks])
        forward = partial(dense_forward, twin) if dense else twin
        forward = torch.compile(forward, dynamic=False) if compiled and dense else forward
        jobs[row] = partial(step, forward, how.get("bf16", False))
        macs[row] = 3 * batch * (dense_macs(twin, 4) if dense else twin.macs(4))  # backward costs two
    return rows_of(jobs, macs, batch, device, repeats)


def game_macs(model, heads: int, judged: str) -> int:
    """Multiply-accumulates of a step of both players for one sample, by and large. `heads`: of all heads reading an
    image. Backward costs two forward passes, or one where only the image's gradient is wanted."""
    student = 3 * model.macs(4) + (model.macs(3) if judged == "own" else 0)  # the own history: without gradient
    return student + 2 * (model.macs(1) + heads) + 2 * (model.macs(1) + 3 * heads)  # judged; real and generated


def head_macs(head, model: DiT) -> int:
    """Of heads like this one on all layers, reading an image: every token meets every weight, but for the
    condition's."""
    return len(model.blocks) * model.grid**2 * sum(layer.weight.numel() for layer in (head.enter, head.mix, head.leave))


def measure_second_stage(name: str, N: int, batch: int, hidden: int, device, repeats: int, bf16: bool,
                         checkpointing: bool) -> dict[str, dict]:
    """Rows of a step of the second stage, of the student and of the heads, by which prediction is judged."""
    model, teacher = network(name, N, device), network(name, 0, device)
    model.checkpointing = checkpointing
    discriminator = Discriminator(teacher, hidden).to(device)
    about = dict(S=4, output="state", times=TIMES, told=TOLD, path=ODE["path"])
    images, y = torch.randn(batch, 4, 32, 32, device=device), torch.zeros(batch, dtype=torch.long, device=device)
    data = torch.randn(batch, 5, 4, 32, 32, device=device), y, images, y, images, images, torch.ones_like(y)
    heads, jobs, macs = Player(discriminator, lambda *_: None, 1e-3), {}, {}
    student = Player(model, lambda *_: None, 1e-4)

    def step(losses):
        student.loss_of, heads.loss_of = losses
        for player in (student, heads):
            player.step([data], 1.0, 1.0, device, bf16)

    for judged in ("own", "forced"):
        losses = players(model, about, discriminator, dict(judged=judged, level=0.02, strength=1.0))
        jobs[f"R + G, {judged}"] = partial(step, losses)
        macs[f"R + G, {judged}"] = batch * game_macs(model, head_macs(discriminator.heads[0], model), judged)
    return rows_of(jobs, macs, batch, device, repeats)


def measure_sampling(name: str, N: int, batch: int, device, repeats: int, bf16: bool) -> dict[str, dict]:
    """Rows of sampling: four steps with history, without it, by the dense reference; the teacher's 25, guided."""
    model = network(name, N, device)
    plain, about = changed(model, history_layers=0), dict(S=4, output="state", times=TIMES, told=TOLD)
    x, y = torch.randn(batch, 4, 32, 32, device=device), torch.zeros(batch, dtype=torch.long, device=device)

    def run(function, low, *inputs):
        with torch.no_grad(), autocast(device, low):
            function(*inputs, x, y)
    jobs = {"ours": partial(run, few_step, bf16, model, about),
            "ours, N = 0": partial(run, few_step, bf16, plain, about),
            "dense reference": partial(run, dense_sample, False, model, about)}
    slow = {"teacher, 25 steps": partial(run, solve, bf16, plain, ODE)}
    macs = {"ours": model.macs(4), "ours, N = 0": plain.macs(4), "teacher, 25 steps": 50 * plain.macs(1),
            "dense reference": sum(dense_macs(model, s) for s in range(1, 5))}
    macs = {row: batch * each for row, each in macs.items()}
    return rows_of(jobs, macs, batch, device, repeats) | rows_of(slow, macs, batch, device, max(1, repeats // 5))


# ---- 3. The bill ----------------------------------------------------------------------------------------------------

RECIPE = dict(count=1_280_000, iterations=300_000, refining=REFINERS["imagenet256"]["iterations"], batch=64)


def bill(rates: dict[str, dict], count: int, iterations: int, refining: int, batch: int) -> dict[str, dict]:
    """What distilling costs, {network and pixels: {column: value}}, from RATES for each network in TFLOP/s, {"XL/2":
    {"training", …}}, taken to hold at every size of image: `count` trajectories, `iterations` of a `batch`, and
    `refining` of the second stage. Hours are of one device, without recomputation (with it, a third more); GiB, by the
    count of stored activations, are for 16 images at a time: "GiB/16" without it, the others with it."""
    rows, game = {}, REFINERS["imagenet256"]
    for name, rate in rates.items():
        for pixels in (256, 512, 1024, 4096, 8192):
            settings, latent = size(name), pixels // 8
            N = round(settings["depth"] * 6 / 28)  # the paper's share of the layers
            with torch.device("meta"):
                model = DiT(**LATENT | dict(image_size=latent), **settings, learn_sigma=True, history_layers=N)
                head = Head(model.width, game["hidden"])
            weights = 24 * sum(w.numel() for w in model.parameters())  # weight, gradient, AdamW's two, average; teacher
            one, four = 2 * model.macs(1) / 1e12, 2 * model.macs(4) / 1e12
            two = 2 * game_macs(model, head_macs(head, model), game["judged"]) / 1e12
            # The second stage also has the heads' weights, and the activations of an image.
            more = 16 * len(model.blocks) * sum(w.numel() for w in head.parameters())
            more += 16 * model.activation_bytes(1, True)
            stored = 16 * model.activation_bytes(4, True, checkpointing=True)
            rows[f"DiT-{name} at {pixels}"] = {
                "traj. h": count * 50 * one / rate["sampling"] / 3600,
                "disk GB": count * 2 * (1 + len(MARKS)) * 4 * latent**2 / 1e9,
                "distill h": iterations * batch * 3 * four / rate["training"] / 3600,
                "GiB/16": (weights + 16 * model.activation_bytes(4, True)) / 2**30,
                "recomputing": (weights + stored) / 2**30,
                "R + G h": refining * batch * two / rate["refining"] / 3600,
                "R + G GiB": (weights + stored + more) / 2**30,
                "teacher ms": 1000 * 50 * one / rate["sampling"], "step ms": 1000 * 4 * one / rate["sampling"],
                "ARD ms": 1000 * four / rate["sampling"], "teacher TFLOP": 50 * one, "step TFLOP": 4 * one,
                "ARD TFLOP": four, "history %": 100 * (four / (4 * one) - 1)}
    return rows


# ---- 4. The program -------------------------------------------------------------------------------------------------

COLUMNS = {"batch": "d", "images": ".2f", "ms": ".2f", "tflops": ".3f", "share": ".1%", "peak_gib": ".1f"}
BILL = {"traj. h": ",.1f", "disk GB": ",.0f", "distill h": ",.1f", "GiB/16": ",.1f", "recomputing": ",.1f",
        "R + G h": ",.1f", "R + G GiB": ",.1f", "teacher ms": ",.0f", "step ms": ",.1f", "ARD ms": ",.1f",
        "teacher TFLOP": ",.2f", "step TFLOP": ",.3f", "ARD TFLOP": ",.3f", "history %": ".2f"}
BILLED, RATES = ("S/2", "B/2", "L/2", "XL/2"), ("training", "refining", "sampling")


def jobs_of(args, device) -> dict:
    """{name: function that measures and returns rows}, the most telling first."""
    cuda, N = device.type == "cuda", args.history_layers
    best = precision(device, cuda)
    low = best == torch.bfloat16
    ours = dict(bf16=low, compiled=cuda)
    variants = {"ours": ours, "ours, N = 0": ours | dict(N=0), "ours, recomputing": ours | dict(checkpointing=True),
                "dense reference": dict(dense=True)}
    if cuda:  # what of the difference is precision, and what the compiler
        variants |= {"ours, not compiled": dict(bf16=low), "dense, bf16": dict(dense=True, bf16=low),
                     "dense, bf16, compiled": ours | dict(dense=True)}
    train = partial(measure_training, device=device, repeats=args.repeats)
    jobs = {"matrix rate": lambda: {str(dtype): dict(tflops=matrix_rate(device, dtype) / 1e12)
                                    for dtype in dict.fromkeys((torch.float32, best))},
            f"training, {args.size}": lambda: train(args.size, N, args.batch, variants),
            f"sampling, {args.size}": lambda: measure_sampling(args.size, N, args.sample_batch, device, args.repeats,
                                                               low)}
    stage = partial(measure_second_stage, args.size, N, GROUP * -(-args.batch // GROUP), args.hidden, device,
                    args.repeats, low)
    jobs[f"second stage, {args.size}"] = lambda: stage(False)
    if cuda:
        jobs[f"second stage, {args.size}, recomputing"] = lambda: stage(True)
        large = {"ours": ours, "ours, recomputing": variants["ours, recomputing"]}
        jobs[f"training, {args.size}, large batch"] = lambda: train(args.size, N, 64, large)
    if args.bill is not None:
        for name in BILLED:
            layers = round(size(name)["depth"] * 6 / 28)
            jobs[f"rates, {name}"] = lambda name=name, layers=layers: {
                **train(name, layers, args.batch, {"training": ours, "refining": dict(bf16=low)}),
                "sampling": measure_sampling(name, layers, args.sample_batch, device, 1, low)["teacher, 25 steps"]}
    return jobs


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--size", help="network, as SIZE/PATCH (default: S/2; on a GPU: XL/2)")
    add("--batch", type=positive, help="images of a training step, to fit all variants (default: 4; on a GPU: 16)")
    add("--sample-batch", type=positive, help="images sampled at a time (default: 4; on a GPU: 32)")
    add("--history-layers", type=whole, help="lowest layers that read the history (default: 2; on a GPU: 6)")
    add("--repeats", type=positive, default=7, help="measurements of each, of which the median is taken (default: 7)")
    add("--hidden", type=positive, default=REFINERS["imagenet256"]["hidden"],
        help="width of the second stage's heads (default: the preset imagenet256's)")
    add("--bill", nargs="?", type=strength, const=0.0, metavar="TFLOPS", help="also measure all four sizes and compute "
        "what distilling with them costs; or, with a rate in TFLOP/s, compute that alone")
    add("--count", type=positive, default=RECIPE["count"], help="of trajectories, for the bill (default: 1,280,000)")
    add("--out", type=Path, default=Path("runs/benchmark"), help="folder for benchmark.json (default: runs/benchmark)")
    add("--device", default="auto", help="auto, cuda or cpu (default: auto)")
    args = parser.parse_args()
    recipe = RECIPE | dict(count=args.count)
    head = ("{count:,} trajectories, {iterations:,} iterations of {batch}, {refining:,} of the second stage, on one "
            "device".format(**recipe))
    if args.bill:
        rows = bill(dict.fromkeys(BILLED, dict.fromkeys(RATES, args.bill)), **recipe)
        print(f"{head} that does {args.bill:g} TFLOP/s", table(rows, BILL), sep="\n")
        save_json(make_folder(args.out) / "bill.json", dict(tflops=args.bill, **recipe, rows=rows))
        print(f"wrote {args.out / 'bill.json'}")
        return
    device = pick_device(args.device)
    defaults = dict(size=("S/2", "XL/2"), batch=(4, 16), sample_batch=(4, 32), history_layers=(2, 6))
    for key, values in defaults.items():
        if getattr(args, key) is None:
            setattr(args, key, values[device.type == "cuda"])
    try:
        with torch.device("meta"):
            DiT(**LATENT, **size(args.size), history_layers=args.history_layers)
    except ValueError as error:
        raise Fault(str(error)) from None
    file = make_folder(args.out) / "benchmark.json"
    machine = dict(device=torch.cuda.get_device_name(device) if device.type == "cuda" else
                   f"{device.type.upper()}, {torch.get_num_threads()} threads", torch=torch.__version__,
                   **{key: getattr(args, key) for key in (*defaults, "hidden")})
    there = json.loads(file.read_text()) if file.exists() else dict(machine=machine, results={})
    if there["machine"] != machine:
        raise Fault(f"{file} holds other measurements: {difference(there['machine'], machine)}. Choose another --out")
    results = there["results"]
    for title, job in jobs_of(args, device).items():
        if title not in results:
            rows = job()
            best = max(row["tflops"] for row in results.get("matrix rate", rows).values())  # measured first
            results[title] = {name: row | dict(share=row["tflops"] / best) for name, row in rows.items()}
            save_json(file, there)
        rows = results[title]
        print(f"\n{title}", table(rows, COLUMNS), sep="\n")
        if {"dense reference", "ours", "ours, N = 0"} <= rows.keys():
            ratio = rows["ours"]["images"] / rows["dense reference"]["images"]
            over = rows["ours"]["ms"] / rows["ours, N = 0"]["ms"] - 1
            print(f"ours: {ratio:.2f} times the images a second of the dense reference in torch.float32 "
                  f"(TF32 on CUDA); history takes {over:.2%} more time than none")
    if args.bill is not None:
        rates = {title.removeprefix("rates, "): {kind: row["tflops"] for kind, row in rows.items()}
                 for title, rows in results.items() if title.startswith("rates, ")}
        # What could not be measured, such as compiled training without a compiler, goes at the rate of what could.
        rates = {name: dict.fromkeys(RATES, next(iter(rate.values()))) | rate for name, rate in rates.items()}
        there["bill"] = bill(rates, **recipe)
        save_json(file, there)
        print(f"\n{head} such as this", table(there["bill"], BILL), sep="\n")
    print(f"\nimages: a second; ms: an image; share: of the best matrix rate. Wrote {file}")


if __name__ == "__main__":
    command(main)
