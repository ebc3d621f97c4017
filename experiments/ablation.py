"""The ablation: what each choice is worth, one at a time, and where the history helps.

The *baseline* is the student of a preset, or what the flags make of it. Each row changes one
setting of it, and is trained twice from the same weights, trajectories and batches: with its
history, and without (N = 0: step distillation). So every row has its control. These are the
factors; each of their values is a row:

    baseline                the student itself
    kind                    targets and output: states, direction; states, state; x0, state; and the
                            last with history in all layers
    mask                    window, anchor, causal
    history_layers          N: one layer, a third, half and all of them
    noise_shortcut          with, without, and the shortcut alone (N = 0)
    extra_layers            a larger network without history, which costs at least as much
    steps                   S: 1, 2, 4, 8
    kind_and_steps          the baseline, and x0 predictions as for textures, in 4 and in 3 steps
    output_layer_per_step   one output layer for all steps, or one for each
    on_policy               the fraction of a batch that reads the student's own history
    guidance_scale          of the teacher, whose trajectories are written anew
    count                   trajectories
    iterations              the length of training; the longest also has more trajectories
    gan                     the second stage; its control is the second stage with λ = 0

    python experiments/ablation.py                              every row once: hours on a CPU
    python experiments/ablation.py --factors baseline --seeds 3     three seeds of one row
    python experiments/ablation.py --preset shapes              another preset
    python experiments/ablation.py --worker 1/2                 one of two processes that share it
                                                                (not the factor gan)
    python experiments/ablation.py --on-policy 0 --steps 2      around another baseline

Everything goes into the folder --out; what is there is not done again. The table and the figure,
ablation.json and .png, show all rows that are complete. Where the baseline is not the preset's, the
names of these files say so.
"""

import argparse
import json
import math
import statistics
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import startup  # noqa: F401  before the large packages

from matplotlib.figure import Figure

import data
from command_line import add_worker_flag, make_parser, positive_int, run_program
from config import (
    MASKS,
    ODE,
    PRESETS,
    Preset,
    StudentRecord,
    TeacherRecord,
    override_parts,
)
from distill import add_student_flags, distill, make_student, student_config
from evaluate import (
    ADHERENCE_COLUMNS,
    Evaluator,
    compare,
    count_macs,
    exposure_bias,
    few_step_with_shuffled_history,
    teacher_method,
    teacher_trajectory,
)
from files import (
    UserError,
    fingerprint,
    first_difference,
    output_folder,
    replace_file,
    save_json,
)
from gan import train_gan
from machine import Runtime, add_machine_flags, runtime_from
from model import DiT
from pretrained import find_teacher
from sample import few_step
from trajectories import choose_targets, describe, open_trajectories, scale_steps

PARTS = ("ode", "trajectories", "student", "distillation")  # of a preset: what the factors change
KINDS = (("states", "direction"), ("states", "state"), ("x0", "state"))
SAMPLES = 256  # for exposure bias and shuffled histories

# ---- 1. The rows ---------------------------------------------------------------------------------
# A student is described by a Preset; its `gan` is None where it has had no second stage.


def factors(baseline: Preset, depth: int) -> dict[str, list[dict]]:
    """{factor: its rows, each a dict of changes to the baseline}. `depth`: the network's layers."""
    kinds = [dict(targets=targets, output=output) for targets, output in KINDS]
    guidance_scale = baseline.ode.guidance_scale
    count, iterations = baseline.trajectories.count, baseline.distillation.iterations
    kept = len(baseline.trajectories.kept_steps)
    # x0 predictions as in the preset textures: a student has to read x_T to learn them.
    like_textures = dict(
        targets="x0", output="state", history_layers=depth, noise_shortcut=True, on_policy=1.0
    )
    return {
        "baseline": [{}],
        "kind": [*kinds, kinds[-1] | dict(history_layers=depth)],
        "mask": [dict(mask=mask) for mask in MASKS if mask != "none"],
        "history_layers": [dict(history_layers=N) for N in (1, depth // 3, depth // 2, depth)],
        "noise_shortcut": [
            dict(noise_shortcut=False),
            dict(noise_shortcut=True),
            dict(noise_shortcut=True, history_layers=0),
        ],
        "extra_layers": [
            dict(extra_layers=0),
            dict(extra_layers=1, history_layers=0, noise_shortcut=False),
        ],
        "steps": [dict(steps=S) for S in (1, 2, 4, 8) if kept % S == 0],
        "kind_and_steps": [
            changes | dict(steps=S)
            for changes in ({}, like_textures)
            for S in (baseline.student.steps, 3)
            if kept % S == 0
        ],
        "output_layer_per_step": [dict(output_layer_per_step=choice) for choice in (False, True)],
        "on_policy": [dict(on_policy=fraction) for fraction in (0.0, 0.5, 1.0)],
        "guidance_scale": [dict(guidance_scale=scale * guidance_scale) for scale in (1, 2)],
        "count": [dict(count=max(1, number)) for number in (count // 4, count, 2 * count)],
        "iterations": [
            dict(iterations=max(1, iterations // 4)),
            dict(iterations=iterations),
            dict(iterations=2 * iterations, count=2 * count),
        ],
        "gan": [dict(gan=True)],
    }


def change(baseline: Preset, changes: dict) -> Preset:
    return override_parts(baseline, argparse.Namespace(**changes), *PARTS)


def pair(preset: Preset, baseline: Preset, changes: dict) -> tuple[Preset, Preset]:
    """The two students of a row: its control, and itself. They are the same where there is no
    history to read. `preset`: the one that the baseline was made from."""
    if "gan" in changes:
        no_gan_loss = replace(preset.gan, weight=0.0)
        return replace(baseline, gan=no_gan_loss), replace(baseline, gan=preset.gan)
    student = change(baseline, changes)
    # Without history the mask has no effect: all masks share one control.
    without = dict(history_layers=0, noise_shortcut=False, mask=preset.student.mask)
    control = change(student, without)
    if not student.student.reads_history:
        return control, control
    return control, student


def name_of(preset: Preset, student: Preset) -> str:
    """Where a student differs from its preset, such as "steps=8,history_layers=0"."""
    words = []
    for part in PARTS:
        usual, chosen = getattr(preset, part), getattr(student, part)
        for field in fields(usual):
            value = getattr(chosen, field.name)
            if value != getattr(usual, field.name):
                words.append(f"{field.name}={value}")
    if student.gan is not None:
        words.append(f"gan_weight={student.gan.weight:g}")
    return ",".join(words) or "preset"


# ---- 2. Training and evaluation ------------------------------------------------------------------


class Ablation:
    """Trains and evaluates students. Those of all baselines share the folder, which holds
    NAME/SEED.pt and, when a student has been evaluated, NAME/SEED.json.

    `preset` has the teacher's own ODE, and trajectories that keep both states and x0 predictions,
    since rows need either. `images`: how many of each student are compared."""

    def __init__(
        self,
        preset: Preset,
        teacher: DiT,
        teacher_record: TeacherRecord,
        folder: Path,
        images: int,
        runtime: Runtime,
    ):
        ode = teacher_record.ode
        trajectories = replace(preset.trajectories, keep="both")
        self.preset = replace(preset, ode=ode, trajectories=trajectories)
        self.teacher, self.teacher_record = teacher, teacher_record
        self.folder, self.images, self.runtime = folder, images, runtime
        self.evaluators = {}
        common = dict(
            teacher=fingerprint(teacher.state_dict()), images=images, preset=asdict(self.preset)
        )
        self.basis = json.loads(json.dumps(common))  # of all results, as it is read from a file

    def check(self, student: Preset):
        """Raises UserError for a student that cannot be trained."""
        student_config(self.teacher_record, student.student)
        kept_steps = scale_steps(student.trajectories.kept_steps, student.ode.euler_steps)
        settings = replace(student.trajectories, kept_steps=kept_steps)
        teacher_record = replace(self.teacher_record, ode=student.ode)
        choose_targets(describe(self.teacher, teacher_record, settings), student.student)

    def file(self, student: Preset, seed: int) -> Path:
        return self.folder / name_of(self.preset, student) / f"{seed}.json"

    def evaluator(self, ode: ODE) -> Evaluator:
        if ode not in self.evaluators:
            self.evaluators[ode] = Evaluator(
                self.teacher,
                self.teacher_record,
                ode,
                self.images,
                self.runtime,
                cache=self.folder / f"teacher,guidance_scale={ode.guidance_scale:g}.pt",
            )
        return self.evaluators[ode]

    def train(self, student: Preset, seed: int):
        """Returns (the student, its record, losses). What was trained before is read."""
        ode = student.ode
        trajectories = open_trajectories(
            self.teacher,
            replace(self.teacher_record, ode=ode),
            student.trajectories,
            student.student,
            self.folder / f"trajectories,guidance_scale={ode.guidance_scale:g}",
            self.runtime,
        )
        training = replace(student.distillation, seed=seed)
        first = replace(student, gan=None)
        model, record = make_student(
            self.teacher, self.teacher_record, student.student, trajectories, training
        )
        file = self.file(first, seed).with_suffix(".pt")
        model, losses = distill(model, record, trajectories, file, self.runtime)
        if student.gan is None:
            return model, record, losses
        gan_training = replace(self.preset.gan_training, seed=seed)
        record = replace(record, gan=student.gan, gan_training=gan_training)
        dataset = data.load(self.teacher_record.data)
        file = self.file(student, seed).with_suffix(".pt")
        model, losses = train_gan(
            model, record, self.teacher, trajectories, dataset, file, self.runtime
        )
        return model, record, losses

    def run(self, student: Preset, seed: int):
        """Train a student, evaluate it, and write down what was found."""
        self.evaluator(student.ode)  # first, since it may refuse
        model, record, losses = self.train(student, seed)
        name = name_of(self.preset, student)
        content = dict(
            basis=self.basis,
            name=name,
            seed=seed,
            **self.measure(model, record, name),
            loss=losses[-1][1],  # the distillation loss
        )
        save_json(self.file(student, seed), content)

    def measure(self, model: DiT, record: StudentRecord, name: str) -> dict:
        """What is found of a student."""
        evaluator, steps = self.evaluator(record.student.ode), record.student.steps

        def images(x_T, y):
            return few_step(model, record.student, x_T, y)[:, -1]

        row = dict(calls=steps, gmacs=count_macs(record.model, steps) / 1e9)
        row |= evaluator(images, name)
        x_T, y = evaluator.noise(range(min(SAMPLES, self.images)))
        with self.runtime.autocast():
            trajectory = teacher_trajectory(self.teacher, record.student, x_T, y)
            exposure = exposure_bias(model, record.student, trajectory, y)
            if record.reads_history:
                states = few_step_with_shuffled_history(model, record.student, x_T, y)
                error = (states[:, -1] - trajectory[:, -1]).square().mean().item()
                row["shuffled"] = error / exposure["own"][-1]
        return row | dict(exposure=exposure)

    def results(self, student: Preset) -> list[dict]:
        """What was found of a student, one dict for each seed. Raises UserError where that was in
        another ablation."""
        rows = []
        for file in sorted(self.file(student, 0).parent.glob("*.json")):
            try:
                row = json.loads(file.read_text())
                basis = row.pop("basis")
            except (ValueError, KeyError, TypeError, AttributeError):
                raise UserError(f"{file} is damaged: remove it, and it is made again") from None
            if basis != self.basis:
                difference = first_difference(basis, self.basis)
                raise UserError(
                    f"{self.folder} holds results of another ablation: {difference}. Choose "
                    "another --out"
                )
            rows.append(row)
        return rows

    def teacher_rows(self, baseline: Preset, few_steps: list[int]) -> dict[str, dict]:
        """The teacher at its full steps, and at these numbers of steps. For scenes, the first row
        is that of real ones: how well their captions can be read back."""
        evaluator, methods = self.evaluator(baseline.ode), {}
        for steps in (baseline.ode.euler_steps, *few_steps):
            ode = replace(baseline.ode, euler_steps=steps)
            methods[f"teacher, {steps} steps"] = teacher_method(self.teacher, ode)
        rows = compare(methods, evaluator)
        if evaluator.has_captions:
            rows = {"true scenes": evaluator.real_row} | rows
        return rows


def title_of(factor: str, changes: dict) -> str:
    """The title of a row, such as "steps = 8"."""
    if factor in ("baseline", "gan"):
        return factor
    return ", ".join(f"{key} = {value}" for key, value in changes.items())


def collect(ablation: Ablation, baseline: Preset, rows: dict[str, list[dict]]) -> dict:
    """The content of ablation.json, of all rows that are complete:

        teachers    {title: what was found}
        factors     {factor: [{"title", "pair": the names of the control and of the student}, …]}
        students    {name: what was found, a list with a dict for each seed}
    """
    found, students = {}, {}
    for factor, values in rows.items():
        entries = []
        for changes in values:
            results = {}
            for student in pair(ablation.preset, baseline, changes):
                results[name_of(ablation.preset, student)] = ablation.results(student)
            names = list(results)
            entry = dict(title=title_of(factor, changes), pair=[names[0], names[-1]])
            is_new = entry["pair"] not in [other["pair"] for other in entries]
            if is_new and all(results.values()):
                entries.append(entry)
                students |= results
        if entries:
            found[factor] = entries
    few_steps = {runs[0]["calls"] for runs in students.values()} | {baseline.student.steps}
    return dict(
        baseline=asdict(baseline),
        images=ablation.images,
        device=str(ablation.runtime.device),
        teachers=ablation.teacher_rows(baseline, sorted(few_steps, reverse=True)),
        factors=found,
        students=students,
    )


# ---- 3. The table and the figure -----------------------------------------------------------------

MEASURES = {
    "error": ".6f", "distance": ".3f", "above": ".4f", "precision": ".3f", "recall": ".3f",
    "accuracy": ".3f", **ADHERENCE_COLUMNS,
}
COLUMNS = ("seeds", "calls", "gmacs", *MEASURES, "shuffled", "error ratio", "above ratio")
LEGEND = """
The mean and, for several seeds, ± half of the range. error: mean squared error to the teacher's
image of the same noise. distance: Fréchet distance to real images, in the features of a small
classifier (not FID). above: distance minus the teacher's. shuffled: how many times as large the
error is when a student reads another sample's history. ratios: how many times as large a value is
in the control.
"""


def spread(values: list[float], form: str) -> str:
    """The mean ± half of the range."""
    text = format(statistics.mean(values), form)
    if len(values) == 1:
        return text
    return f"{text} ± {(max(values) - min(values)) / 2:{form}}"


def ratio(control: list[dict], student: list[dict], measure: str) -> str:
    """The control's value of a measure divided by the student's, seed by seed. Where the student's
    values spread as widely as the smallest of them is above 0, only a lower bound. Empty where no
    seed is common, and where the values are not positive."""
    others = {run["seed"]: run[measure] for run in control}
    pairs = [(others[run["seed"]], run[measure]) for run in student if run["seed"] in others]
    if not pairs:
        return ""
    without, own = zip(*pairs, strict=True)
    if min(without) <= 0 or max(own) <= 0:
        return ""
    if min(own) <= max(own) - min(own):
        tenths = math.floor(10 * min(without) / max(own))  # so that the bound holds
        return f"> {tenths / 10:.1f}"
    return spread([a / b for a, b in pairs], ".2f")


def line_of(row: dict) -> dict[str, str]:
    """The texts of a single run, by the columns of the table."""
    line = {}
    if "calls" in row:  # not of real images
        line = dict(calls=str(row["calls"]), gmacs=f"{row['gmacs']:.4f}")
    for measure, form in MEASURES.items():
        if measure in row:
            line[measure] = format(row[measure], form)
    return line


def student_line(runs: list[dict], control: list[dict] | None) -> dict[str, str]:
    """The texts of a line, by its columns. `control`: the runs of its control, if it has one."""
    line = line_of(runs[0]) | dict(seeds=str(len(runs)))
    for measure in line.keys() & MEASURES.keys():
        line[measure] = spread([run[measure] for run in runs], MEASURES[measure])
    if control is None:
        return line
    if "shuffled" in runs[0]:
        line["shuffled"] = spread([run["shuffled"] for run in runs], ".2f")
    line["error ratio"] = ratio(control, runs, "error")
    line["above ratio"] = ratio(control, runs, "above")
    return line


def table_lines(content: dict) -> dict[str, dict[str, str]]:
    """The table of an ablation.json: {title: {column: text}}. A student that belongs to several
    rows, such as the baseline, is shown once."""
    students, shown = content["students"], set()
    lines = {title: line_of(row) for title, row in content["teachers"].items()}
    for factor, rows in content["factors"].items():
        absent = "λ = 0" if factor == "gan" else "N = 0"
        for row in rows:
            control, student = row["pair"]
            if control not in shown:
                lines[f"{row['title']}, {absent}"] = student_line(students[control], None)
            if student not in {control, *shown}:
                lines[row["title"]] = student_line(students[student], students[control])
            shown |= {control, student}
    return lines


def markdown(lines: dict[str, dict], columns=COLUMNS) -> str:
    """Lines {title: {column: text}} as a Markdown table with aligned columns. A column that no line
    has is left out."""
    columns = [column for column in columns if any(column in line for line in lines.values())]
    cells = [["", *columns]]
    for title, line in lines.items():
        cells.append([title, *(line.get(column, "") for column in columns)])
    widths = [max(len(text) for text in column) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    rows = []
    for row in cells:
        padded = [f"{text:{width}}" for text, width in zip(row, widths, strict=True)]
        rows.append(f"| {' | '.join(padded)} |")
    return "\n".join(rows)


def draw(content: dict, file: Path):
    """A column for each factor of several rows: error and degradation of the rows and of their
    controls. A dot is a seed. content: that of ablation.json."""
    shown = {factor: rows for factor, rows in content["factors"].items() if len(rows) > 1}
    if not shown:
        return
    students = content["students"]
    everywhere = [abs(run["above"]) for runs in students.values() for run in runs]
    labels = {  # one line for each setting that a row changes
        factor: [row["title"].replace(f"{factor} = ", "").replace(", ", "\n") for row in rows]
        for factor, rows in shown.items()
    }
    widths = [max(2.1, 0.3 * "\n".join(texts).count("\n")) for texts in labels.values()]  # inches
    page = Figure((1.2 + sum(widths), 5.6), layout="tight")
    axes = page.subplots(2, len(shown), squeeze=False, sharey="row", width_ratios=widths)
    axes[0, 0].set(yscale="log", ylabel="error to the\nteacher's images")
    axes[1, 0].set_yscale("symlog", linthresh=statistics.median(everywhere))
    axes[1, 0].set_ylabel("Fréchet distance\nabove the teacher's")
    for (top, bottom), (factor, rows) in zip(axes.T, shown.items(), strict=True):
        for axis, measure in ((top, "error"), (bottom, "above")):
            for i, label in enumerate(("control", "row")):
                seeds = [[run[measure] for run in students[row["pair"][i]]] for row in rows]
                axis.plot([statistics.mean(values) for values in seeds], f"C{i}", label=label)
                for x, values in enumerate(seeds):
                    axis.plot([x] * len(values), values, f"C{i}o", markersize=4, alpha=0.7)
            axis.set_xticks(range(len(rows)), [""] * len(rows))
        bottom.set_xticks(range(len(rows)), labels[factor], fontsize=7, rotation=40, ha="right")
        top.set_title(factor, fontsize=10)
    axes[0, 0].legend(fontsize=8)
    replace_file(file, lambda opened: page.savefig(opened, dpi=110))


# ---- 4. The program ------------------------------------------------------------------------------


def parse_flags():
    parser = make_parser(__doc__)
    add = parser.add_argument
    presets = [name for name in PRESETS if name not in ("imagenet256", "pixart256")]
    add("--preset", choices=presets, default="textures", help="default: textures")
    add("--factors", nargs="+", metavar="FACTOR", help="train these only (default: all)")
    add("--seeds", type=positive_int, default=1, help="trainings of each student (default: 1)")
    add("--images", type=positive_int, default=5000, help="of each student (default: 5000)")
    add("--teacher", dest="teacher_file", type=Path, metavar="FILE", help="its checkpoint")
    add("--out", type=Path, help="folder for everything (default: runs/ablation/PRESET)")
    add_student_flags(parser)
    add("--iterations", type=positive_int, help="training steps of the baseline")
    add_worker_flag(parser)
    add_machine_flags(parser)
    return parser.parse_args()


def check_factors(chosen: list[str], rows: dict):
    for factor in chosen:
        if factor not in rows:
            raise UserError(f"no factor {factor!r}: choose from {', '.join(rows)}")


def find_students(ablation: Ablation, baseline: Preset, rows: dict, chosen) -> dict[str, Preset]:
    """All students of the chosen factors by their names. Raises UserError, before the work, where
    settings contradict one another, and where the folder holds results of another ablation."""
    students = {}
    for factor, values in rows.items():
        for changes in values:
            for student in pair(ablation.preset, baseline, changes):
                ablation.results(student)  # raises
                if factor in chosen:
                    ablation.check(student)
                    students[name_of(ablation.preset, student)] = student
    return students


def main():
    flags = parse_flags()
    preset = PRESETS[flags.preset]
    runtime = runtime_from(flags, preset.bf16)
    folder = output_folder(flags.out or Path("runs/ablation") / flags.preset)
    runs = Path("runs") / flags.preset
    teacher, record = find_teacher(flags.teacher_file, flags.preset, runs, runtime.device)
    if record.data.source is None:
        raise UserError("students are compared with real images, but this teacher has none")
    ablation = Ablation(preset, teacher, record, folder, flags.images, runtime)
    baseline = replace(override_parts(ablation.preset, flags, *PARTS), gan=None)
    rows = factors(baseline, record.model.depth)
    if preset.gan is None:
        del rows["gan"]
    chosen = flags.factors or list(rows)
    check_factors(chosen, rows)
    students = find_students(ablation, baseline, rows, chosen)
    i, workers = flags.worker
    todo = [(seed, name) for seed in range(flags.seeds) for name in students][i::workers]
    for done, (seed, name) in enumerate(todo, start=1):
        if not ablation.file(students[name], seed).exists():
            print(f"\n{done} of {len(todo)}: {name}, seed {seed}")
            ablation.run(students[name], seed)
    content = collect(ablation, baseline, rows)
    print(f"\n{markdown(table_lines(content))}\n{LEGEND}")
    moved = name_of(ablation.preset, baseline)
    file = folder / f"ablation{',' + moved if moved != 'preset' else ''}.json"
    save_json(file, content)
    draw(content, file.with_suffix(".png"))
    print(f"wrote {file}, and a figure where a factor has several rows")


if __name__ == "__main__":
    run_program(main)
