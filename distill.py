"""AutoRegressive Distillation: the student, its loss and its training (Kim et al., CVPR 2025, arXiv 2504.11295).

The teacher's ODE goes from noise x_T to an image in many small steps. The student makes S big ones. *Step
distillation* teaches it the teacher's next state from the teacher's last; but when it samples, it is fed its own last
state, which is a little wrong, and the errors pile up (exposure bias). ARD lets the student read the whole history of
the trajectory,

    x̂_{τ_{s-1}} = G_θ(x_{τ_S}, …, x_{τ_s}, s, y)                                              (paper, Sec. 3.2)

in which x_{τ_S} = x_T, the noise, is never wrong. Training is teacher-forced, like a language model's: one pass over
the teacher's states [x_{τ_S} | … | x_{τ_1}] under a block-wise causal mask predicts all S next states at once. The
student is the teacher's network, started from its weights (model.py); with history_layers = 0 it *is* step
distillation.

    python distill.py                                     16×16 shapes with the shipped teacher: minutes on a CPU
    python distill.py --history-layers 0 --out runs/n0    the same without history: the baseline
    python distill.py --preset points                     points in the plane (first: python teacher.py --preset points)
    python distill.py --adversarial --from runs/shapes/student.pt      the second stage (discriminator.py)

A run leaves student.pt, samples.png and result.json in its folder, --out. Started again, it continues; when done, it
evaluates. Trajectories are written where there are none, into runs/PRESET/trajectories: several runs share them.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch

import data
from discriminator import MOST, Discriminator, balance, draw, heads_loss, student_loss
from model import HISTORIES, DiT
from presets import COMMON, REFINERS, STUDENTS, TEACHERS, choose
from sample import compare, few_step, figure, table
from teacher import MARKS, PATHS, advance, find_teacher, load_network, over, write_trajectories
from training import (Fault, Player, command, export, fingerprint, load_weights, make_folder, pick_device,
                      positive, precision, rank, recompute, save_json, share, strength, train, training_flags, whole,
                      writable)


def predict(model, about: dict, history, y):
    """What a student makes of a whole history (b, S, c, h, w), x_T first: its S next states, in one pass."""
    times, told = (torch.tensor(about[key], device=history.device) for key in ("times", "told"))
    return advance(about, model(history, told, y).float(), history, times[:-1], times[1:])


def own_history(model, about: dict, x_T, y):
    """The states that a student feeds itself when it samples, (b, S, c, h, w); no gradient flows through them."""
    states = few_step(model, about, x_T, y)[:, :-1]
    torch.clear_autocast_cache()  # of weights in bfloat16 that were made without gradient
    return states


def ard_loss(model, about: dict, x, y, own=0.0):
    """The mean over the S steps of || x̂_{τ_{s-1}} − x_{τ_{s-1}} ||², teacher-forced.

    x: (b, S + 1, c, h, w), a trajectory of the teacher's, x_T first: of states, or of clean predictions, which carry
    the times of the states at their marks; y: (b,). The model reads the first S and is asked for the last S: the same
    sequence, one step ahead. The first round(own·b) samples are fed the student's own history instead, as when it
    samples, and asked for the teacher's states all the same (not in the paper; DAgger's idea, 1011.0686). Where a batch
    is shared or in parts, it is the first of every part."""
    history, target = x[:, :-1], x[:, 1:]  # (b, S, c, h, w)
    k = round(own * len(x))
    if k:
        history = torch.cat([own_history(model, about, x[:k, 0], y[:k]), history[k:]])
    return (predict(model, about, history, y) - target).square().mean()


def make_student(teacher, about: dict, preset: dict):
    """A student that starts from the teacher: same architecture, same weights, and eyes for the past in the lowest
    layers. With `step_heads`, every step has its own copy of the output layer. Returns (model, its about, still
    without the times that its trajectories give). Raises Fault for settings that cannot be."""
    S = preset["steps"]
    if (preset["output"], preset["trajectory"]) == ("direction", "clean"):
        raise Fault("a direction leads from one state to the next, and clean predictions are no states: "
                    "use --output state, or --trajectory states")
    if preset["told"] and len(preset["told"]) != S:
        raise Fault(f"--told has {len(preset['told'])} times, and the student takes {S} steps: give one for each")
    config = about["model"] | {key: preset[key] for key in ("history", "history_layers")}
    config["step_heads"] = S if preset["step_heads"] else 1
    try:
        student = DiT(**config)
    except ValueError as error:
        raise Fault(str(error)) from None
    weights = teacher.state_dict()
    heads = {name.replace("final_layer", head): value for head in student.head_names
             for name, value in weights.items() if name.startswith("final_layer.")}
    load_weights(student, weights | heads, "the teacher")
    return student, about | dict(kind="student", model=config, S=S, output=preset["output"],
                                 trajectory=preset["trajectory"])


def distill(student, about: dict, trajectories: data.Trajectories, preset: dict, out: Path, device, seed=0):
    """Train a student into the file `out`; returns (model, about, losses). Continues what is there."""
    meta, path = trajectories.meta, PATHS[about["path"]]
    fit = {key: preset[key] for key in ("iterations", "batch", "lr", "decay")}
    how = {key: preset[key] for key in ("bf16", "accumulate", "compile", "schedule")}
    about = about | {key: meta[key] for key in ("teacher", "guidance", "guided_channels", "steps")} | dict(
        marks=[meta["marks"][i - 1] for i in trajectories.marks],  # teacher's steps done at each of the S states
        times=trajectories.times, told=preset["told"] or [float(path.told(t)) for t in trajectories.times[:-1]],
        training=dict(**fit, own=preset["own"], seed=seed, count=len(trajectories), noise=meta["seed"]))

    student.to(device).checkpointing = recompute(preset, student, about["S"], device)

    def batch_of(step):
        return trajectories.batch(data.stream(seed, step).integers(len(trajectories), size=fit["batch"]))

    config = about["model"]
    print(f"distilling into {about['S']} steps: {config['history']} history in {config['history_layers']} of "
          f"{config['depth']} layers, {fit['iterations']:,} iterations of {fit['batch']} on {device} in "
          f"{precision(device, preset['bf16'])}, into {out}")
    student, losses = train("student", student, batch_of,
                            lambda model, x, y: ard_loss(model, about, x, y, preset["own"]),
                            out, about, **fit, warmup=fit["iterations"] // 20, **how)
    return student, about, losses


# ---- the second stage -----------------------------------------------------------------------------------------------

def refine(student, about: dict, teacher, trajectories: data.Trajectories, dataset: data.Dataset, preset: dict,
           out: Path, device, seed=0):
    """The paper's "R + G": go on training a student, still to copy its teacher (R), but also so that a discriminator
    takes its last prediction for real images of the `dataset` (G). Into the file `out`; returns (model, about, losses),
    the losses as [(step, total, copying, judged, λ, heads', their accuracy), …]. Continues what is there.

    Which prediction is judged, preset["judged"] says: the one "forced", from the teacher's states, which the copying
    loss has at hand; or the one from the student's "own", which is what it will be judged by in the end."""
    fit = {key: preset[key] for key in ("iterations", "batch", "lr", "decay")}
    how = {key: preset[key] for key in ("bf16", "accumulate", "compile", "schedule")}
    game = {key: preset[key] for key in ("judged", "level", "strength", "alone", "heads_lr", "hidden")}
    if dataset.classes != about["classes"] or list(dataset.shape) != data.image_shape(about):
        raise Fault("these images are of other classes, or another size, than the student's: check --preset and --data")
    meta, times = trajectories.meta, trajectories.times
    if (meta["teacher"], meta["guidance"], times) != tuple(about[key] for key in ("teacher", "guidance", "times")):
        raise Fault("these are not the trajectories that the student has learned: name them with --trajectories")
    about = about | dict(refined=dict(**fit, **game, seed=seed, start=fingerprint(student.state_dict()),
                                      images=len(dataset), count=len(trajectories), noise=meta["seed"]))
    torch.manual_seed(seed)
    discriminator = Discriminator(teacher, game["hidden"]).to(device)
    passes = 2 if game["judged"] == "own" else 1
    student.to(device).requires_grad_(True).checkpointing = recompute(preset, student, passes * about["S"] + 1, device)
    student.pos_embed.requires_grad_(False)
    path = PATHS[about["path"]]
    t = torch.tensor(game["level"] * path.T, device=device)
    t = t if path.T == 1 else t.round()
    last = getattr(student, student.head_names[-1]).linear.weight
    generated = []  # images that were judged, for the heads to learn from

    def noisy(images, noise):
        return over(path.alpha(t), images) * images + over(path.sigma(t), images) * noise

    def batch_of(step):
        rng = data.stream(seed, step)
        x, y = trajectories.batch(rng.integers(len(trajectories), size=fit["batch"]))
        real, labels = dataset.draw(fit["batch"], rng)
        noise = torch.from_numpy(rng.standard_normal((2, *real.shape), dtype=np.float32))
        return x, y, real, labels, *noise, torch.full_like(y, step >= game["alone"])

    def student_plays(model, x, y, real, labels, noise, other_noise, playing):
        prediction = predict(model, about, x[:, :-1], y)
        copying = (prediction - x[:, 1:]).square().mean()
        if game["judged"] == "own":
            prediction = predict(model, about, own_history(model, about, x[:, 0], y), y)
        image = prediction[:, -1]
        discriminator.requires_grad_(False)
        leaf = image.detach().requires_grad_()
        judged = student_loss(discriminator(noisy(leaf, noise), path.told(t), y))
        pull = (image * torch.autograd.grad(judged, leaf)[0]).sum()  # has judged's gradients; the discriminator is done
        weight = playing[0] * balance(copying, pull, last, game["strength"])
        generated.append(image.detach())
        return copying + weight * (pull - pull.detach() + judged.detach()), copying, judged, weight

    def heads_play(model, x, y, real, labels, noise, other_noise, playing):
        discriminator.requires_grad_(True)
        of_generated = model(noisy(generated.pop(0), noise), path.told(t), y)
        of_real = model(noisy(real, other_noise), path.told(t), labels)
        right = ((of_real > 0).float().mean() + (of_generated < 0).float().mean()) / 2
        return heads_loss(of_real, of_generated), right

    def verdict(losses):
        recent = [row[-1] for row in losses if row[0] > game["alone"]][-10:]
        if len(recent) == 10 and min(recent) > 0.99:
            return "the heads are always right, and teach nothing: try more noise (--level), or a lower --heads-lr"
        if losses[-1][4] >= 0.9 * MOST:
            return "the weight λ is at its bound, since the heads' gradient vanishes: try a lower --heads-lr"

    print(f"fine-tuning with {len(discriminator.heads)} heads "
          f"({sum(p.numel() for p in discriminator.parameters()) / 1e6:.1f}M parameters), "
          f"{fit['iterations']:,} iterations of {fit['batch']} on {device} in {precision(device, preset['bf16'])}, "
          f"into {out}; shown: total, copying, judged, λ, heads' loss, their accuracy")
    student, losses = train("student and heads", student, batch_of, student_plays, out, about, **fit,
                            warmup=fit["iterations"] // 20, **how, verdict=verdict,
                            rival=Player(discriminator, heads_play, game["heads_lr"], preset["compile"]))
    return student, about, losses


# ---- the program ----------------------------------------------------------------------------------------------------

def student_flags(add):
    """The flags that say what a student is and what it learns from; `add` is a parser's add_argument."""
    add("--count", type=positive, help="trajectories to train on")
    add("--steps", type=positive, help="the student's steps S: 1, 2, 4 or 8")
    add("--history", choices=HISTORIES, help="which earlier states a state may read")
    add("--history-layers", type=whole, help="in how many of the lowest layers; 0 is step distillation")
    add("--trajectory", choices=("states", "clean"), help="learn the states themselves, or the clean predictions")
    add("--output", choices=("direction", "state"), help="put out what the Euler step needs, or the next state itself")
    add("--step-heads", action=argparse.BooleanOptionalAction,
        help="an output layer for each step instead of one for all")
    add("--own", type=share, help="share of the samples that are fed the student's own history in training")
    add("--told", type=float, nargs="+", help="the times the student is told, one a step (default: the states' own)")


def find_trajectories(teacher, about: dict, args, preset: dict, folder: Path, device) -> data.Trajectories:
    """The trajectories in a folder, written if need be. Those that are there keep their own guidance, steps and so on.
    Raises Fault where they are not what the student needs."""
    there = data.read_meta(folder) or {}
    solver = COMMON | TEACHERS[args.preset] | there
    data.choose_marks(len(solver["marks"] or range(MARKS)), preset["steps"])
    if solver["keep"] not in ("both", preset["trajectory"]):
        raise Fault(f"of these trajectories the {solver['keep']} alone are kept: use --trajectory {solver['keep']}, or "
                    "write others: teacher.py trajectories --keep both")
    recipe = about | {key: there[key] for key in ("guidance", "guided_channels", "steps") if key in there}
    count = args.count or TEACHERS[args.preset]["count"]
    write_trajectories(teacher, recipe, folder, count, device, preset["bf16"], there.get("seed", 0), solver["marks"],
                       solver["keep"])
    return data.Trajectories(folder, fingerprint(teacher.state_dict()), preset["steps"], preset["trajectory"], count)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--preset", choices=STUDENTS, default="shapes", help="sets everything; flags override it (default: shapes)")
    add("--out", type=Path, help="folder for the results (default: runs/PRESET)")
    add("--teacher", type=Path, help="checkpoint (default: runs/PRESET/teacher.pt, or the one that ships with us)")
    add("--trajectories", type=Path, help="folder, written if need be (default: runs/PRESET/trajectories)")
    student_flags(add)
    add("--adversarial", action="store_true", help="the second stage: fine-tune a student against real images")
    add("--from", type=Path, dest="start", metavar="FILE", help="adversarial: the student to start from")
    add("--data", help="adversarial: the real images, if they are no longer where the teacher saw them")
    add("--judged", choices=("own", "forced"), help="adversarial: judge what comes of the student's own history, or of "
        "the teacher's")
    add("--level", type=share, help="adversarial: the noise under which images are judged, as a share of all time")
    add("--strength", type=strength, help="adversarial: of the heads' gradient, in units of the copying loss's")
    add("--alone", type=whole, help="adversarial: steps at first in which the student only copies, and the heads learn")
    add("--heads-lr", type=strength, help="adversarial: the heads' learning rate")
    add("--hidden", type=positive, help="adversarial: the heads' width")
    training_flags(add)
    args = parser.parse_args()

    if bool(args.start) != args.adversarial:
        raise Fault("the second stage starts from a student: --adversarial --from RUN/student.pt")
    if args.adversarial and args.preset not in REFINERS:
        raise Fault(f"there is no second stage for {args.preset}: heads mix the patches of an image")
    first, second = {*STUDENTS["shapes"], "own", "compile"}, {*REFINERS["shapes"], "data"}
    for flag in first - second if args.adversarial else second - first:
        if getattr(args, flag) is not None:
            raise Fault(f"--{flag.replace('_', '-')} is for the {'first' if args.adversarial else 'second'} stage")
    device, runs = pick_device(args.device), Path("runs") / args.preset
    out = make_folder(args.out or (runs.with_name(f"{args.preset}-refined") if args.adversarial else runs))
    if args.export:
        writable(args.export)  # better refused before the work
    began = time.time()
    teacher, teacher_about = find_teacher(args.teacher, args.preset, runs, device)
    if args.adversarial:
        preset = choose(REFINERS, args)
        student, about = load_network(args.start, "student", device)
        preset |= dict(steps=about["S"], trajectory=about["trajectory"])
    else:
        preset = choose(STUDENTS, args)
        student, about = make_student(teacher, teacher_about, preset)
    trajectories = find_trajectories(teacher, teacher_about, args, preset, args.trajectories or runs / "trajectories",
                                     device)
    if args.adversarial:
        kind = (args.data or about["data"], about["model"]["image_size"], about["model"]["channels"])
        dataset = data.load(*kind, flip=TEACHERS[args.preset]["flip"])
        student, about, losses = refine(student, about, teacher, trajectories, dataset, preset, out / "student.pt",
                                        device, args.seed)
    else:
        student, about, losses = distill(student, about, trajectories, preset, out / "student.pt", device, args.seed)
    if rank() > 0:
        return
    if args.export:
        export(args.export, about, student.state_dict())
    if args.adversarial:
        draw(losses, writable(out / "game.png"))
        print(f"wrote {out}/game.png: the two players' losses")

    rows, states, y = compare(teacher, teacher_about, student, about, device, args.bf16)
    print("", table(rows, {"calls": "d", "error": ".6f", "ms": ".2f"}), "", sep="\n")
    save_json(out / "result.json", dict(about=about, rows=rows, losses=losses, seconds=round(time.time() - began)))
    shown = 100 if about["model"]["image_size"] == 1 else 16
    figure({name: s[:shown] for name, s in states.items()}, out / "samples.png", y[:shown])
    print(f"wrote {out}/student.pt, samples.png and result.json in {time.time() - began:.0f} s")


if __name__ == "__main__":
    command(main)
