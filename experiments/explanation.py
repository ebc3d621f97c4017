"""When history helps: one figure from the committed results of the ablations.

A history can repair what the last state has lost, as far as the student can read it in the noise
x_T. Both sides of this sentence can be measured:

    what the last state has lost    the error of a student without history at its second step, where
                                    it reads the teacher's own state and nothing else
    what can be read in x_T         the error of a student of a single step, which reads x_T alone

Their quotient is the horizontal axis. To the right of 1, x_T says more than the last state does.
The vertical axis is how many times as large the final error is without history.

    python experiments/explanation.py        writes assets/explanation.png
"""

import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import startup  # noqa: F401  before the large packages

from command_line import make_parser, run_program
from figures import new_figure, save_figure

RESULTS = Path(__file__).parent / "results"
ASSETS = Path(__file__).parents[1] / "assets"
POINTS, SHAPES, TEXTURES = "ablation-points", "ablation-shapes", "ablation-textures"
LONG = "ablation-textures-long"  # five times the iterations

# label: (file, student without history, student with history)
SETTINGS = {
    "points, x0": (POINTS, "history_layers=0", "preset"),
    "points, states, direction": (
        POINTS,
        "history_layers=0,targets=states,output=direction",
        "targets=states,output=direction",
    ),
    "shapes, states, direction": (SHAPES, "history_layers=0", "preset"),
    "shapes, x0": (
        SHAPES,
        "history_layers=0,targets=x0,output=state",
        "history_layers=6,targets=x0,output=state",
    ),
    "textures, x0, plain": (
        TEXTURES,
        "history_layers=0,noise_shortcut=False",
        "noise_shortcut=False",
    ),
    "textures, x0, plain, longer": (
        LONG,
        "history_layers=0,noise_shortcut=False,iterations=5000",
        "noise_shortcut=False,iterations=5000",
    ),
    "textures, x0, noise shortcut": (
        TEXTURES,
        "history_layers=0,noise_shortcut=False",
        "preset",
    ),
}
ONE_STEP = {  # the student of a single step in each file
    POINTS: "steps=1,history_layers=0",
    SHAPES: "steps=1,history_layers=0",
    TEXTURES: "steps=1,history_layers=0,noise_shortcut=False",
    LONG: "steps=1,history_layers=0,noise_shortcut=False,iterations=5000",
}


def mean_error(runs: list[dict]) -> float:
    return statistics.mean(run["error"] for run in runs)


def coordinates() -> dict[str, tuple[float, float]]:
    """{label: (lost / readable, ratio of errors)}, means over seeds."""
    found = {}
    for label, (file, without, with_history) in SETTINGS.items():
        students = json.loads((RESULTS / f"{file}.json").read_text())["students"]
        control = students[without]
        lost = statistics.mean(run["exposure"]["teacher"][1] for run in control)
        readable = mean_error(students[ONE_STEP[file]])
        ratio = mean_error(control) / mean_error(students[with_history])
        found[label] = (lost / readable, ratio)
    return found


def draw(points: dict[str, tuple[float, float]], file: Path):
    figure, [axis] = new_figure(7.2, 4.4)
    for i, (label, (x, y)) in enumerate(points.items()):
        axis.plot(x, y, "o")
        where = (6, (5, -12)[i % 2])  # of the label, in 1/72 inch: right, then up or down
        axis.annotate(label, (x, y), textcoords="offset points", xytext=where, fontsize=8)
    axis.axvline(1, color="0.7", linewidth=1)
    axis.axhline(1, color="0.7", linewidth=1)
    axis.set(
        xscale="log",
        yscale="log",
        xlabel="error of the second step without history / error of a single step from x_T",
        ylabel="final error without history / with history",
    )
    axis.margins(x=0.6, y=0.3)
    save_figure(figure, file)


def main():
    make_parser(__doc__).parse_args()
    points = coordinates()
    for label, (x, y) in points.items():
        print(f"{label:32} {x:10.4f} {y:8.2f}")
    draw(points, ASSETS / "explanation.png")
    print(f"wrote {ASSETS / 'explanation.png'}")


if __name__ == "__main__":
    run_program(main)
