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

A run leaves student.pt, samples.png and result.json in its folder, --out. Started again, it continues; when done, it
compares student and teacher (evaluate.py says more). Trajectories are written where there are none, into
runs/PRESET/trajectories, with seed 0 whatever --seed: several runs share them.
"""

import argparse
import time
from pathlib import Path

import torch

import data
from model import HISTORIES, DiT
from presets import COMMON, STUDENTS, TEACHERS, choose
from sample import compare, few_step, figure, table
from teacher import MARKS, PATHS, advance, find_teacher, write_trajectories
from training import (Fault, command, export, fingerprint, load_weights, make_folder, number, part_size, pick_device,
                      positive, precision, rank, recompute, save_json, share, train, training_flags, whole)


def predict(model, about: dict, history, y):
    """What a student makes of a whole history (b, S, c, h, w), x_T first: its S next states, in one pass."""
    times, told = (torch.tensor(about[key], device=history.device) for key in ("times", "told"))
    return advance(about, model(history, told, y).float(), history, times[:-1], times[1:])


def own_history(model, about: dict, x_T, y):
    """The states that a student feeds itself when it samples, (b, S, c, h, w); no gradient flows through them."""
    return few_step(model, about | dict(S=about["S"] - 1), x_T, y)  # what its last step makes, it does not read


def ard_loss(model, about: dict, x, y, own=0.0):
    """The mean over the S steps (and over samples and pixels) of ( x̂_{τ_{s-1}} − x_{τ_{s-1}} )², teacher-forced.

    x: (b, S + 1, c, h, w), a trajectory of the teacher's, x_T first: of states, or of clean predictions, which are
    given the times of the states in whose place they stand; y: (b,). The model reads the first S and is asked for the
    last S: the same sequence, one step ahead. The first round(own·b) samples are fed the student's own history instead,
    as when it samples, and asked for the teacher's states all the same (not in the paper; DAgger's idea, 1011.0686).
    Where a batch is shared or in parts, it is the first of every part."""
    history, target = x[:, :-1], x[:, 1:]  # (b, S, c, h, w)
    k = round(own * len(x))
    if k:
        history = torch.cat([own_history(model, about, x[:k, 0], y[:k]), history[k:]])
    return (predict(model, about, history, y) - target).square().mean()


def make_student(teacher, about: dict, preset: dict):
    """A student that starts from the teacher: same architecture, same weights, and eyes for the past in the lowest
    layers. With `step_heads`, every step has its own copy of the output layer. Returns (model, its about, still
    without what the trajectories say: distill() adds it). Raises Fault for settings that cannot be."""
    S = preset["steps"]
    if (preset["output"], preset["trajectory"]) == ("direction", "clean"):
        raise Fault("a direction leads from one state to the next, and clean predictions are no states: "
                    "use --output state, or --trajectory states")
    if preset["told"] and len(preset["told"]) != S:
        raise Fault(f"--told has {len(preset['told'])} times, and the student takes {S} steps: give one for each")
    if preset["opens"] * preset["iterations"] > preset["iterations"] - 1:
        raise Fault(f"--opens {preset['opens']:g} would open the last history layer when the training is over: less")
    part = part_size(preset["batch"], preset["accumulate"])
    if preset["own"] and not round(preset["own"] * part):
        raise Fault(f"--own {preset['own']:g} of so small a part of a batch is no sample: choose a larger --batch, or "
                    "a smaller --accumulate")
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
    fed = {key: preset[key] for key in ("own", "opens")}
    how = {key: preset[key] for key in ("bf16", "accumulate", "compile", "schedule")}
    about = about | {key: meta[key] for key in ("teacher", "guidance", "guided_channels", "steps")} | dict(
        marks=[meta["marks"][i - 1] for i in trajectories.marks],  # teacher's steps done at each state after x_T
        times=trajectories.times, told=preset["told"] or [float(path.told(t)) for t in trajectories.times[:-1]],
        training=dict(**fit, **fed, seed=seed, count=len(trajectories), noise=meta["seed"]))

    student.to(device)
    student.checkpointing = recompute(preset, student, about["S"], device)
    N, opening = student.history_layers, preset["opens"] * fit["iterations"]

    def batch_of(step):  # … and sets how many layers are open then, from below: a function of the step, too
        student.history_layers = N if step >= opening else int(N * step / opening)
        return trajectories.batch(data.stream(seed, step).integers(len(trajectories), size=fit["batch"]))

    config = about["model"]
    print(f"distilling into {about['S']} steps: {config['history']} history in {config['history_layers']} of "
          f"{config['depth']} layers, {fit['iterations']:,} iterations of {fit['batch']} on {device} in "
          f"{precision(device, preset['bf16'])}, into {out}")
    student, losses = train("student", student, batch_of,
                            lambda model, x, y: ard_loss(model, about, x, y, preset["own"]),
                            out, about, **fit, warmup=fit["iterations"] // 20, **how)
    return student, about, losses


# ---- the program ----------------------------------------------------------------------------------------------------

def student_flags(add):
    """The flags that say what a student is and what it learns from; `add` is a parser's add_argument."""
    add("--count", type=positive, help="trajectories to train on")
    add("--steps", type=positive, help="the student's steps S: 1, 2, 4 or 8 (imagenet256: 1, 2 or 4)")
    add("--history", choices=HISTORIES, help="which earlier states a state may read")
    add("--history-layers", type=whole, help="in how many of the lowest layers; 0 is step distillation")
    add("--trajectory", choices=("states", "clean"), help="learn the states themselves, or the clean predictions")
    add("--output", choices=("direction", "state"), help="put out what the Euler step needs, or the next state itself")
    add("--step-heads", action=argparse.BooleanOptionalAction,
        help="an output layer for each step instead of one for all")
    add("--own", type=share, help="share of each batch that is fed the student's own history in training")
    add("--opens", type=share,
        help="share of the training in which the history layers open, one by one, below 1 (default: 0)")
    add("--told", type=number(float, 0, 1000), nargs="+", metavar="TIME",
        help="the times that the student is told, one a step (default: the states' own; those of the authors' code for "
             "imagenet256 with 4 steps)")


def find_trajectories(teacher, about: dict, args, preset: dict, folder: Path, device) -> data.Trajectories:
    """The trajectories in a folder, written if need be. Those that are there keep their own guidance, steps and so on.
    Raises Fault where they are not what the student needs."""
    there = data.read_meta(folder) or {}
    solver = COMMON | TEACHERS[args.preset] | there
    data.choose_marks(len(solver["marks"] or range(MARKS)), preset["steps"])  # refuses before the work
    if solver["keep"] not in ("both", preset["trajectory"]):
        raise Fault(f"of these trajectories the {solver['keep']} alone are kept: use --trajectory {solver['keep']}, or "
                    "write others: teacher.py trajectories --keep both")
    recipe = about | {key: there[key] for key in ("guidance", "guided_channels", "steps") if key in there}
    count = args.count or TEACHERS[args.preset]["count"]
    write_trajectories(teacher, recipe, folder, count, device, preset["bf16"], there.get("seed", 0), solver["marks"],
                       solver["keep"])
    return data.Trajectories(folder, fingerprint(teacher.state_dict()), preset["steps"], preset["trajectory"], count)


def report(teacher, student, about: dict, losses, out: Path, device, args, began: float):
    """The end of a run that `began` then: the export, the table, result.json and samples.png."""
    if args.export:
        export(args.export, about, student.state_dict())
    rows, states, y = compare(teacher, student, about, device, args.bf16)
    print("", table(rows, {"calls": "d", "error": ".6f", "ms": ".2f"}), "", sep="\n")
    save_json(out / "result.json", dict(about=about, rows=rows, losses=losses, seconds=round(time.time() - began)))
    figure(states, out / "samples.png", y)
    print(f"wrote {out}/student.pt, samples.png and result.json in {time.time() - began:.0f} s")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--preset", choices=STUDENTS, default="shapes", help="sets everything; flags override it (default: shapes)")
    add("--out", type=Path, help="folder for the results (default: runs/PRESET)")
    add("--teacher", type=Path, help="checkpoint (default: runs/PRESET/teacher.pt, or the one that ships with us)")
    add("--trajectories", type=Path, help="folder, written if need be (default: runs/PRESET/trajectories)")
    student_flags(add)
    training_flags(add)
    args = parser.parse_args()

    device, runs, preset = pick_device(args.device), Path("runs") / args.preset, choose(STUDENTS, args)
    out = make_folder(args.out or runs)
    began = time.time()
    if args.told is None and len(preset["told"] or ()) != preset["steps"]:
        preset["told"] = None  # the preset's are for its own number of steps
    teacher, teacher_about = find_teacher(args.teacher, args.preset, runs, device)
    student, about = make_student(teacher, teacher_about, preset)
    trajectories = find_trajectories(teacher, teacher_about, args, preset, args.trajectories or runs / "trajectories",
                                     device)
    student, about, losses = distill(student, about, trajectories, preset, out / "student.pt", device, args.seed)
    if rank() == 0:
        report(teacher, student, about, losses, out, device, args, began)


if __name__ == "__main__":
    command(main)
