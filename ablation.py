"""The ablation: what each choice is worth, one at a time, and where the history helps.

A row is a student that differs from its preset's, the *centre*, in one setting. Each is trained twice: with its
history, and without (N = 0: step distillation), from the same weights, trajectories and batches. So every row has its
control:

    kind              what is learned and put out: states and a direction, states, or clean predictions
    history           window, anchor, causal; `none` is the control
    history_layers    N: 1, a third, half, all of the layers
    steps             S: 1, 2, 4, 8
    step_heads        one output layer for all steps, or one for each
    own               the share of training in which the student is fed its own history instead of its teacher's
    guidance          of the teacher, whose trajectories are written anew
    count             trajectories
    iterations        the length of training; the longest also has more trajectories

    python ablation.py                                    every row once, for shapes: some hours on a CPU
    python ablation.py --factors kind --seeds 3           three seeds of some
    python ablation.py --preset points --seeds 3          first: python teacher.py --preset points
    python ablation.py --part 1/2                         one of two processes that share the trainings and the folder

What has been done, in whatever order, is not done again. Table and figure show all that is there: ablation.json, .png.
"""

import argparse
import json
from pathlib import Path
from statistics import mean

import data
from distill import distill, make_student
from evaluate import Judge, exposure_bias
from model import HISTORIES
from presets import COMMON, STUDENTS, TEACHERS
from sample import HELD_OUT, few_step, methods, table
from teacher import find_teacher, solve, write_trajectories
from training import (Fault, command, fingerprint, machine_flags, make_folder, part_flag, pick_device, positive,
                      save_json, writable)

KINDS = (("states", "direction"), ("states", "state"), ("clean", "state"))


def factors(preset: str, depth: int) -> dict[str, list[dict]]:
    """{factor: its settings, each a change to the preset's student, or to its teacher's guidance}."""
    centre, teacher = COMMON | STUDENTS[preset], TEACHERS[preset]
    count, length, guidance = teacher["count"], centre["iterations"], teacher["guidance"]
    return {
        "kind": [dict(trajectory=trajectory, output=output) for trajectory, output in KINDS]
                + [dict(trajectory="clean", output="state", history_layers=depth)],
        "history": [dict(history=history) for history in HISTORIES[1:]],
        "history_layers": [dict(history_layers=N) for N in (1, depth // 3, depth // 2, depth)],
        "steps": [dict(steps=S) for S in (1, 2, 4, 8)],
        "step_heads": [dict(step_heads=heads) for heads in (False, True)],
        "own": [dict(own=share) for share in (0.0, 0.5)],
        "guidance": [dict(guidance=strength) for strength in (guidance, 2 * guidance)],
        "count": [dict(count=number) for number in (count // 4, count, 4 * count)],
        "iterations": [dict(iterations=length // 4), dict(iterations=length),
                       dict(iterations=4 * length, count=4 * count)],
    }


def both(change: dict, centre: dict) -> tuple[dict, dict]:
    """The two students of a row, without and with history, as changes to the centre that say no more than needed: equal
    students are trained once. With one step there is no history."""
    without = {key: value for key, value in change.items() if key not in ("history", "history_layers")}
    without["history_layers"] = 0
    with_history = without if change.get("steps") == 1 else change
    return tuple({key: value for key, value in one.items() if value != centre[key]} for one in (without, with_history))


def name_of(change: dict) -> str:
    return ",".join(f"{key}={value}" for key, value in change.items()) or "centre"


class Bench:
    """Trains and judges the students of a preset, into `folder`: NAME/SEED.pt and .json."""

    def __init__(self, preset: dict, name: str, teacher, about: dict, folder: Path, device, count: int):
        self.centre = preset | {key: TEACHERS[name][key] for key in ("count", "guidance")}
        self.trajectories = Path("runs") / name / "trajectories"
        self.teacher, self.about, self.folder = teacher, about, folder
        self.device, self.count, self.judges = device, count, {}

    def judge(self, guidance: float):
        """For a guidance: (its Judge, 256 held-out noises, their labels, the teacher's states from there)."""
        if guidance not in self.judges:
            about = self.about | dict(guidance=guidance)
            x_T, y = (tensor.to(self.device) for tensor in data.noise_and_labels(about, HELD_OUT, range(256)))
            self.judges[guidance] = (Judge(self.teacher, about, self.count, self.device), x_T, y,
                                     solve(self.teacher, about, x_T, y)[1])
        return self.judges[guidance]

    def file(self, change: dict, seed: int) -> Path:
        return self.folder / name_of(change) / f"{seed}.json"

    def train(self, change: dict, seed: int):
        """Train a student, unless it has been, judge it, and write down what was found."""
        preset = self.centre | change
        folder, about = self.trajectories, self.about | dict(guidance=preset["guidance"])
        if "guidance" in change:
            folder = self.folder / f"trajectories,guidance={preset['guidance']}"
        write_trajectories(self.teacher, about, folder, preset["count"], self.device, preset["bf16"])
        trajectories = data.Trajectories(folder, fingerprint(self.teacher.state_dict()), preset["steps"],
                                         preset["trajectory"], preset["count"])
        student, about = make_student(self.teacher, about, preset)
        out = self.file(change, seed)
        student, about, losses = distill(student, about, trajectories, preset, out.with_suffix(".pt"), self.device,
                                         seed)
        judge, x_T, y, states = self.judge(preset["guidance"])
        run = methods(self.teacher, self.about, student, about)[f"student, {about['S']} steps"][1]
        save_json(out, dict(change=change, seed=seed, loss=losses[-1][1], calls=about["S"],
                            gmacs=student.macs(about["S"]) / 1e9, **judge(run, name_of(change)),
                            exposure=exposure_bias(student, about, states, few_step(student, about, x_T, y), y)))

    def teachers(self, S: int) -> dict:
        """The teacher's rows: at its full steps, and at S."""
        judge, *_ = self.judge(self.centre["guidance"])
        full, twice = self.about["steps"], 1 if self.centre["guidance"] == 1 else 2
        few = judge(lambda x_T, y: solve(self.teacher, judge.about, x_T, y, S)[1], f"teacher, {S} steps")
        cost = twice * self.teacher.macs() / 1e9
        return {f"teacher, {steps} steps": row | dict(calls=steps * twice, gmacs=steps * cost)
                for steps, row in ((full, judge.best), (S, few))}


# ---- the table and the figure ---------------------------------------------------------------------------------------

MEASURES = {"error": ".6f", "above": ".3f", "precision": ".3f", "recall": ".3f", "accuracy": ".3f"}


def spread(values: list[float], form: str) -> str:
    """The mean of the seeds ± half of their range."""
    return format(mean(values), form) + (f" ± {(max(values) - min(values)) / 2:{form}}" if len(values) > 1 else "")


def ratio(without: list[float], with_history: list[float]) -> str:
    """How many times larger the first are, seed by seed; a bound where the second are within their own spread of 0."""
    if min(with_history) <= max(with_history) - min(with_history):
        largest = max(with_history)
        return f"> {mean(without) / largest:.1f}" if largest > 0 else ""
    return spread([a / b for a, b in zip(without, with_history, strict=False)], ".2f")


def report(bench: Bench, rows: dict[str, list[dict]], out: Path):
    """Print the table of all the rows that have been trained; write ablation.json and ablation.png."""
    def runs(change):
        return [json.loads(file.read_text()) for file in sorted(bench.file(change, 0).parent.glob("*.json"))]

    found = {factor: [dict(value=", ".join(map(str, change.values())), pair=[runs(one) for one in pair])
                      for change in changes if all(map(runs, pair := both(change, bench.centre)))]
             for factor, changes in rows.items()}
    found = {factor: values for factor, values in found.items() if values}
    lines, seen = {}, []
    for name, row in bench.teachers(bench.centre["steps"]).items():
        lines[name] = {key: format(row[key], form) for key, form in ({"calls": "d", "gmacs": ".4f"} | MEASURES).items()}
    for factor, values in found.items():
        for value in values:
            for students, control in zip(value["pair"], (True, False), strict=True):
                if students in seen:
                    continue  # the centre, or its control: once is enough
                seen.append(students)
                line = dict(seeds=len(students), calls=students[0]["calls"], gmacs=f"{students[0]['gmacs']:.4f}")
                line |= {key: spread([run[key] for run in students], form) for key, form in MEASURES.items()}
                if not control:
                    line |= {f"{key} ratio": ratio(*([run[key] for run in side] for side in value["pair"]))
                             for key in ("error", "above")}
                lines[f"{factor} {value['value']}{', N = 0' * control}"] = line
    columns = ("seeds", "calls", "gmacs", *MEASURES, "error ratio", "above ratio")
    print("", table(lines, dict.fromkeys(columns, "")), "", sep="\n")
    print("mean ± half the range over seeds; above: Fréchet distance above the teacher's (small classifier, not FID);\n"
          "ratios: how many times larger without history. What a line does not say is as in the preset\n")
    save_json(out / "ablation.json", dict(centre=bench.centre, count=bench.count, device=str(bench.device),
                                          lines=lines, found=found))
    draw(found, writable(out / "ablation.png"))
    print(f"wrote {out}/ablation.json and ablation.png")


def draw(found: dict[str, list[dict]], out: Path):
    """A column for each factor: error and distance above the teacher's, without and with history; a dot is a seed."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    page, axes = plt.subplots(2, len(found), figsize=(1.2 + 2.1 * len(found), 5.6), squeeze=False, sharey="row")
    for column, (factor, values) in zip(axes.T, found.items(), strict=True):
        for axis, measure in zip(column, ("error", "above"), strict=True):
            for which, name in enumerate(("without history", "with history")):
                runs = [[run[measure] for run in value["pair"][which]] for value in values]
                axis.plot(range(len(runs)), [mean(seeds) for seeds in runs], color=f"C{which}", label=name)
                for x, seeds in enumerate(runs):
                    axis.plot([x] * len(seeds), seeds, "o", color=f"C{which}", markersize=4, alpha=0.7)
            axis.set_yscale("log") if measure == "error" else axis.set_yscale("symlog", linthresh=1)
            axis.set_xticks(range(len(values)), [""] * len(values))
        column[0].set_title(factor, fontsize=10)
        column[1].set_xticks(range(len(values)), [value["value"].replace(", ", "\n") for value in values], fontsize=8)
    axes[0, 0].set_ylabel("error to the teacher's images")
    axes[1, 0].set_ylabel("Fréchet distance above the teacher's")
    axes[0, 0].legend(fontsize=8)
    page.tight_layout()
    page.savefig(out, dpi=110)
    plt.close(page)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--preset", choices=("points", "shapes", "shapes64", "cifar10"), default="shapes",
        help="the centre (default: shapes)")
    add("--factors", nargs="+", metavar="FACTOR", help="train for these alone (default: all)")
    add("--seeds", type=positive, default=1, help="trainings of each student (default: 1)")
    add("--count", type=positive, default=5000, help="images to judge each by (default: 5000)")
    add("--teacher", type=Path, help="checkpoint (default: runs/PRESET/teacher.pt, or the one that ships with us)")
    add("--out", type=Path, help="folder for everything (default: runs/ablation/PRESET)")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile: a slow start, then faster trainings")
    part_flag(add)
    machine_flags(add)
    args = parser.parse_args()

    device, out = pick_device(args.device), make_folder(args.out or Path("runs/ablation") / args.preset)
    teacher, about = find_teacher(args.teacher, args.preset, Path("runs") / args.preset, device)
    rows = factors(args.preset, len(teacher.blocks))
    unknown = set(args.factors or ()) - set(rows)
    if unknown:
        raise Fault(f"no factor {unknown.pop()!r}: choose from {', '.join(rows)}")
    preset = COMMON | STUDENTS[args.preset] | {key: value for key in ("bf16", "compile")
                                               if (value := getattr(args, key)) is not None}
    bench = Bench(preset, args.preset, teacher, about, out, device, args.count)
    wanted = [one for factor in args.factors or rows for change in rows[factor] for one in both(change, bench.centre)]
    todo = [(change, seed) for seed in range(args.seeds)
            for change in {name_of(change): change for change in wanted}.values()]
    todo = [(change, seed) for change, seed in todo if not bench.file(change, seed).exists()]
    todo = todo[args.part[0]::args.part[1]]
    for done, (change, seed) in enumerate(todo, start=1):
        print(f"\n{done} of {len(todo)}: {name_of(change)}, seed {seed}")
        bench.train(change, seed)
    report(bench, rows, out)


if __name__ == "__main__":
    command(main)
