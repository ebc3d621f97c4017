"""The ablation: what each choice is worth, one at a time, and where the history helps.

A row changes the *centre*, which is the preset's student or what the flags make of it, in one setting. It is trained
twice: with its history, and without (N = 0: step distillation), from the same weights, trajectories and batches; a row
of the second stage with a judge, and without (λ = 0). So every row has its control:

    centre            the preset itself
    kind              what is learned and put out: states and a direction, states, or clean predictions, these also
                      with history in all layers
    history           window, anchor, causal; `none` is the control
    history_layers    N: 1, a third, half, all of the layers
    steps             S: 1, 2, 4, 8
    step_heads        one output layer for all steps, or one for each
    own               the share of each batch that is fed the student's own history instead of its teacher's
    opens             the share of training over which the history layers open; it starts as step distillation
    guidance          of the teacher, whose trajectories are written anew
    count             trajectories
    iterations        the length of training; the longest also has more trajectories
    refine            the second stage (refine.py)
    judging           which prediction is judged in it, under how much noise, by how wide heads

    python ablation.py                                    every row once, for shapes: some hours on a CPU
    python ablation.py --factors centre --seeds 3         three seeds of some
    python ablation.py --preset points --seeds 3          first: python teacher.py --preset points
    python ablation.py --part 1/2                         one of two processes that share the trainings and the folder
    python ablation.py --trajectory clean --output state --history-layers 6           around another centre
    python ablation.py --teacher runs/mine/teacher.pt --out runs/ablation/mine        another teacher's students

What has been done, in whatever order, is not done again. Table and figure, ablation.json and .png (the name says where
the centre was moved), show all its rows that are complete; a row that says nothing new is left out.
"""

import argparse
import json
import math
from pathlib import Path
from statistics import mean, median

import data
from distill import distill, make_student, student_flags
from evaluate import Judge, exposure_bias
from model import HISTORIES
from presets import COMMON, REFINERS, STUDENTS, TEACHERS, flips
from refine import refine
from sample import HELD_OUT, few_step, table
from teacher import find_teacher, solve, write_trajectories
from training import (Fault, command, difference, fingerprint, machine_flags, make_folder, part_flag, pick_device,
                      positive, save_json, writable)

KINDS = (("states", "direction"), ("states", "state"), ("clean", "state"))
GAMES = (dict(judged="forced"), dict(level=0.2), dict(hidden=128))  # changes to the second stage

SECOND = ("refine", "judging")  # factors of the second stage


def factors(centre: dict, depth: int) -> dict[str, list[dict]]:
    """{factor: its settings, each a change to the centre}. `depth`: the layers of the network. The setting `refine` is
    a dict of changes to the second stage's settings."""
    count, length, guidance = (centre[key] for key in ("count", "iterations", "guidance"))
    return {
        "centre": [{}],
        "kind": [dict(trajectory=trajectory, output=output) for trajectory, output in KINDS]
                + [dict(trajectory="clean", output="state", history_layers=depth)],
        "history": [dict(history=history) for history in HISTORIES[1:]],
        "history_layers": [dict(history_layers=N) for N in (1, depth // 3, depth // 2, depth)],
        "steps": [dict(steps=S) for S in (1, 2, 4, 8)],
        "step_heads": [dict(step_heads=heads) for heads in (False, True)],
        "own": [dict(own=share) for share in (0.0, 0.5)],
        "opens": [dict(opens=share) for share in (0.0, 0.5)],
        "guidance": [dict(guidance=strength) for strength in (guidance, 2 * guidance)],
        "count": [dict(count=number) for number in (max(1, count // 4), count, 2 * count)],
        "iterations": [dict(iterations=max(1, length // 4)), dict(iterations=length),
                       dict(iterations=2 * length, count=2 * count)],
        "refine": [dict(refine={})],
        "judging": [dict(refine=change) for change in ({}, *GAMES)],
    }


class Bench:
    """Trains and judges students, which are whole settings, into `folder`: NAME/SEED.pt and .json. A name says where a
    student differs from the preset's, so that students of several centres share the folder: dict(steps=8) is a row of
    two students, "steps=8,history_layers=0" and "steps=8"."""

    def __init__(self, preset: dict, centre: dict, teacher, about: dict, trajectories: Path, folder: Path, device,
                 images: int, game: dict | None = None):
        self.preset, self.centre, self.teacher, self.about, self.game = preset, centre, teacher, about, game
        self.trajectories, self.folder = trajectories, folder
        self.device, self.images, self.judges = device, images, {}
        # What all the results in the folder have in common.
        self.common = dict(teacher=fingerprint(teacher.state_dict()), images=images, preset=preset)

    def basis(self, student: dict) -> dict:
        return self.common | (dict(game=self.game) if "refine" in student else {})

    def both(self, change: dict) -> tuple[dict, dict]:
        """The two students of a row, without and with history; the same one where there is no history to read. Of the
        second stage: without and with a judge."""
        student = self.centre | change
        if student["steps"] != self.centre["steps"]:
            student["told"] = None  # the centre's are for its own number of steps
        if "refine" in change:
            return student | dict(refine=dict(strength=0.0)), student
        without = student | dict(history_layers=0, history=self.preset["history"], opens=0.0)
        blind = student["steps"] == 1 or student["history"] == "none" or student["history_layers"] == 0
        return without, without if blind else student

    def name(self, student: dict) -> str:
        words = [f"{key}={value}" for key, value in student.items()
                 if key not in ("compile", "refine") and value != self.preset[key]]
        if "refine" in student:
            words += ["refined", *(f"{key}={value}" for key, value in student["refine"].items())]
        return ",".join(words) or "preset"

    def file(self, student: dict, seed: int) -> Path:
        return self.folder / self.name(student) / f"{seed}.json"

    def judge(self, guidance: float):
        """For a guidance: (its Judge, 256 held-out noises, their labels, the teacher's states from there)."""
        if guidance not in self.judges:
            about = self.about | dict(guidance=guidance)
            x_T, y = (tensor.to(self.device) for tensor in data.noise_and_labels(about, HELD_OUT, range(256)))
            cache = self.folder / f"teacher,{self.common['teacher']},guidance={guidance},images={self.images}.pt"
            judge = Judge(self.teacher, about, self.images, self.device, cache=cache)
            self.judges[guidance] = judge, x_T, y, solve(self.teacher, about, x_T, y)[1]
        return self.judges[guidance]

    def student(self, settings: dict, seed: int):
        """Train a student, or go on with it, or take the one that is there: (model, its about, losses)."""
        folder, about = self.trajectories, self.about | dict(guidance=settings["guidance"])
        if settings["guidance"] != self.preset["guidance"]:
            folder = self.folder / f"trajectories,guidance={settings['guidance']}"
        write_trajectories(self.teacher, about, folder, settings["count"], self.device, settings["bf16"])
        trajectories = data.Trajectories(folder, self.common["teacher"], settings["steps"], settings["trajectory"],
                                         settings["count"])
        out = self.file(settings, seed).with_suffix(".pt")
        if "refine" not in settings:
            student, about = make_student(self.teacher, about, settings)
            return distill(student, about, trajectories, settings, out, self.device, seed)
        student, about, _ = self.student({key: x for key, x in settings.items() if key != "refine"}, seed)
        channels, size, _ = data.image_shape(about)
        dataset = data.load(about["data"], size, channels, flip=self.game["flip"])
        game = self.game | dict(bf16=settings["bf16"]) | settings["refine"]
        return refine(student, about, self.teacher, trajectories, dataset, game, out, self.device, seed)

    def train(self, settings: dict, seed: int):
        """Train a student, judge it, and write down what was found."""
        judge, x_T, y, states = self.judge(settings["guidance"])  # first: it may refuse
        student, about, losses = self.student(settings, seed)
        own, strange = (few_step(student, about, x_T, y, shuffle) for shuffle in (False, True))
        save_json(self.file(settings, seed), dict(
            basis=self.basis(settings), name=self.name(settings), seed=seed, calls=about["S"],
            gmacs=student.macs(about["S"]) / 1e9,
            **judge(lambda x_T, y: few_step(student, about, x_T, y), self.name(settings)),
            shuffled=(strange[:, -1] - states[:, -1]).square().mean().item(),
            exposure=exposure_bias(student, about, states, own, y),
            loss=losses[-1][2 if "refine" in settings else 1]))  # of copying

    def results(self, settings: dict) -> list[dict]:
        """What was found of a student, of every seed there is. Raises Fault where it stands on another basis."""
        rows = []
        for file in sorted(self.file(settings, 0).parent.glob("*.json")):
            try:
                rows.append(dict(json.loads(file.read_text())))
            except (ValueError, TypeError):
                raise Fault(f"{file} is damaged: remove it, and this student is trained again") from None
        for row in rows:
            if row.get("basis") != self.basis(settings):
                different = difference(row.get("basis", {}), self.basis(settings))
                raise Fault(f"{self.folder} holds results of another basis: {different}. Choose another --out")
        return rows

    def teachers(self, S: int) -> dict:
        """The teacher's rows: at its full steps, and at S."""
        judge, *_ = self.judge(self.centre["guidance"])
        full, twice = self.about["steps"], 1 if self.centre["guidance"] == 1 else 2
        few = judge(lambda x_T, y: solve(self.teacher, judge.about, x_T, y, S)[1], f"teacher, {S} steps")
        cost = twice * self.teacher.macs() / 1e9
        return {f"teacher, {steps} steps": row | dict(calls=steps * twice, gmacs=steps * cost)
                for steps, row in ((full, judge.best), (S, few))}


# ---- the table and the figure ---------------------------------------------------------------------------------------

MEASURES = {"error": ".6f", "frechet": ".3f", "above": ".4f", "precision": ".3f", "recall": ".3f", "accuracy": ".3f"}
COLUMNS = ("seeds", "calls", "gmacs", *MEASURES, "shuffled", "error ratio", "above ratio")


def words(value) -> str:
    """A setting in words; of several, {"level": 0.2, …}."""
    return " ".join(f"{key} {x}" for key, x in value.items()) if isinstance(value, dict) else str(value)


def spread(values: list[float], form: str) -> str:
    """The mean of the seeds ± half of their range."""
    return format(mean(values), form) + (f" ± {(max(values) - min(values)) / 2:{form}}" if len(values) > 1 else "")


def ratio(without: list[dict], with_history: list[dict], measure: str) -> str:
    """How many times larger a measure is in the control, seed by seed. Where its smallest value with history is no
    larger than the range of these values (max − min), and so hardly told from 0, a bound; nothing where a control's
    value, or all the others, are not above 0."""
    pairs = [(a[measure], b[measure]) for a in without for b in with_history if a["seed"] == b["seed"]]
    others, own = zip(*pairs, strict=True) if pairs else ((0,), (0,))
    if min(others) <= 0 or max(own) <= 0:
        return ""
    if min(own) <= max(own) - min(own):
        return f"> {math.floor(10 * min(others) / max(own)) / 10:.1f}"
    return spread([a / b for a, b in pairs], ".2f")


def report(bench: Bench, rows: dict[str, list[dict]], out: Path):
    """Print the table of all the rows that have been trained; write ablation.json and ablation.png."""
    students, found = {}, {}  # {name: results}, {factor: [{value, the names of its two students}]}
    lines = {name: {key: format(row[key], form) for key, form in ({"calls": "d", "gmacs": ".4f"} | MEASURES).items()}
             for name, row in bench.teachers(bench.centre["steps"]).items()}
    for factor, changes in rows.items():
        for change in changes:
            pair = {bench.name(student): bench.results(student) for student in bench.both(change)}
            if not all(pair.values()) or list(pair) in [other["pair"] for other in found.get(factor, [])]:
                continue
            value = ", ".join(f"N = {x}" if key == "history_layers" else words(x) for key, x in change.items())
            found.setdefault(factor, []).append(dict(value=value, pair=list(pair)))
            for name, runs in pair.items():
                if name in students:
                    continue  # the centre, or its control: once is enough
                title = f"{factor} {value}".strip()
                line = dict(seeds=len(runs), calls=runs[0]["calls"], gmacs=f"{runs[0]['gmacs']:.4f}")
                line |= {key: spread([run[key] for run in runs], form) for key, form in MEASURES.items()}
                control, *_ = pair
                if name == control:
                    title += ", λ = 0" if factor in SECOND else ", N = 0"
                else:
                    line["shuffled"] = spread([run["shuffled"] / run["exposure"]["own"][-1] for run in runs], ".2f")
                    line |= {f"{key} ratio": ratio(pair[control], runs, key) for key in ("error", "above")}
                lines[title] = line
            students |= pair
    print("", table(lines, dict.fromkeys(COLUMNS, "")), "", sep="\n")
    print("mean ± half the range over seeds; above: Fréchet distance above the teacher's (small classifier, not FID);\n"
          "shuffled: how many times larger the error is with another sample's history; ratios: in the control\n")
    moved = bench.name(bench.centre).replace("preset", "")
    out = out / f"ablation{',' * bool(moved)}{moved}.json"
    save_json(out, dict(centre=bench.centre, images=bench.images, device=str(bench.device), lines=lines,
                        factors=found, students=students))
    found = {factor: values for factor, values in found.items() if len(values) > 1}
    if found:
        draw(found, students, writable(out.with_suffix(".png")))
    print(f"wrote {out}" + " and .png" * bool(found))


def draw(found: dict[str, list[dict]], students: dict[str, list[dict]], out: Path):
    """A column for each factor: error and distance above the teacher's, of each row and of its control (without
    history; in the second stage, without a judge); a dot is a seed."""
    from matplotlib.figure import Figure

    page = Figure((1.2 + 2.1 * len(found), 5.6), layout="tight")
    axes = page.subplots(2, len(found), squeeze=False, sharey="row")
    usual = median(abs(run["above"]) for runs in students.values() for run in runs)
    axes[0, 0].set_yscale("log")  # of the whole row
    axes[1, 0].set_yscale("symlog", linthresh=usual)
    for column, (factor, values) in zip(axes.T, found.items(), strict=True):
        for axis, measure in zip(column, ("error", "above"), strict=True):
            for which, name in enumerate(("control", "as named")):
                runs = [[run[measure] for run in students[value["pair"][-1 if which else 0]]] for value in values]
                axis.plot(range(len(runs)), [mean(seeds) for seeds in runs], color=f"C{which}", label=name)
                for x, seeds in enumerate(runs):
                    axis.plot([x] * len(seeds), seeds, "o", color=f"C{which}", markersize=4, alpha=0.7)
            axis.set_xticks(range(len(values)), [""] * len(values))
        column[0].set_title(factor, fontsize=10)
        column[1].set_xticks(range(len(values)), [value["value"] or "preset" for value in values], fontsize=8,
                             rotation=40, ha="right")
    axes[0, 0].set_ylabel("error to the\nteacher's images")
    axes[1, 0].set_ylabel("Fréchet distance\nabove the teacher's")
    axes[0, 0].legend(fontsize=8)
    page.savefig(out, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--preset", choices=("points", "shapes", "shapes64", "cifar10"), default="shapes",
        help="the centre, which the flags below can move (default: shapes)")
    add("--factors", nargs="+", metavar="FACTOR",
        help="train for these alone (default: all); the table shows all that is done")
    add("--seeds", type=positive, default=1, help="trainings of each student (default: 1)")
    add("--images", type=positive, default=5000, help="images to judge each by (default: 5000)")
    add("--teacher", type=Path, help="checkpoint (default: runs/PRESET/teacher.pt, or the one that ships with us)")
    add("--out", type=Path, help="folder for everything (default: runs/ablation/PRESET)")
    student_flags(add)
    add("--iterations", type=positive, help="training steps")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile: a slow start, then faster trainings")
    part_flag(add)
    machine_flags(add)
    args = parser.parse_args()

    device, runs = pick_device(args.device), Path("runs") / args.preset
    out = make_folder(args.out or Path("runs/ablation") / args.preset)
    teacher, about = find_teacher(args.teacher, args.preset, runs, device)
    trajectories = (out if args.teacher else runs) / "trajectories"  # another teacher has its own
    preset = COMMON | STUDENTS[args.preset] | {key: TEACHERS[args.preset][key] for key in ("count", "guidance")}
    preset |= {key: value for key, value in (data.read_meta(trajectories) or {}).items() if key == "guidance"}
    centre = preset | {key: value for key, value in vars(args).items() if key in preset and value is not None}
    rows = factors(centre, len(teacher.blocks))
    if args.preset not in REFINERS:
        rows = {factor: changes for factor, changes in rows.items() if factor not in SECOND}
    chosen = list(rows) if args.factors is None else args.factors
    if unknown := set(chosen) - set(rows):
        raise Fault(f"no factor {unknown.pop()!r}: choose from {', '.join(rows)}")
    game = COMMON | REFINERS.get(args.preset, {}) | dict(flip=flips(about, args.preset))
    bench = Bench(preset, centre, teacher, about, trajectories, out, device, args.images, game)
    wanted = {bench.name(one): one for factor in chosen for change in rows[factor] for one in bench.both(change)}
    for student in (one for changes in rows.values() for change in changes for one in bench.both(change)):
        bench.results(student)  # which may be another's
    todo = [(student, seed) for seed in range(args.seeds) for student in wanted.values()][args.part[0]::args.part[1]]
    todo = [(student, seed) for student, seed in todo if not bench.file(student, seed).exists()]
    for done, (student, seed) in enumerate(todo, start=1):
        print(f"\n{done} of {len(todo)}: {bench.name(student)}, seed {seed}")
        bench.train(student, seed)
    report(bench, rows, out)


if __name__ == "__main__":
    command(main)
