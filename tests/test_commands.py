"""The command lines with bad input: each must say in one line what is wrong, and leave every file as it was. Most cases
call a script's main() and catch its Fault; a few run the real script, to see the exit status and the one line. All
start from a tiny run (teacher, trajectories, student) that was made by the same commands with good input, so that what
is refused is the one thing that a case changes.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import data
import distill
import evaluate
import refine
import sample
import teacher
from model import DiT, size
from training import Fault, export

ROOT = Path(teacher.__file__).resolve().parent
SCRIPTS = {"teacher.py": teacher, "distill.py": distill, "refine.py": refine, "sample.py": sample,
           "evaluate.py": evaluate}


def make_teacher(path: Path, seed: int):
    """A teacher of 8×8 images of three classes with random weights. A fresh DiT would put out zeros only."""
    config = dict(image_size=8, channels=3, classes=3, **size("N/4"))
    generator = torch.Generator().manual_seed(seed)
    weights = {name: 0.05 * torch.randn(w.shape, generator=generator) for name, w in DiT(**config).state_dict().items()}
    about = dict(kind="teacher", model=config, path="flow", predicts="v", guidance=1.0, steps=8, data="shapes",
                 classes=["ant", "bee", "cat"], training=dict(iterations=1, batch=1, lr=0.1, decay=0.9, seed=0))
    export(path, about, weights)


def run(monkeypatch, command: str):
    """A command line, in this process."""
    script, *words = command.split()
    monkeypatch.setattr(sys, "argv", [script, *words, "--device", "cpu"])
    SCRIPTS[script].main()


def distilling(folder: Path) -> str:
    return (f"distill.py --teacher {folder}/teacher.pt --trajectories {folder}/trajectories --count 8 --iterations 2 "
            f"--batch 4 --out {folder}")


def fill_in(command: str, folder: Path) -> str:
    command = command.replace("DISTILL", distilling(folder)).replace("TEACHER", "teacher.py --iterations 2")
    command = command.replace("REFINE", "refine.py --teacher GOOD/teacher.pt --trajectories GOOD/trajectories "
                              "--count 8 --from GOOD/student.pt --out GOOD/empty")
    return command.replace("GOOD", str(folder))


@pytest.fixture(scope="module")
def good(tmp_path_factory, few_shapes):
    """A folder with a finished run, a second teacher and broken files. Shards of 8 trajectories: they are quick."""
    folder = tmp_path_factory.mktemp("good")
    make_teacher(folder / "teacher.pt", seed=1)
    make_teacher(folder / "other.pt", seed=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "SHARD", 8)
        run(patch, distilling(folder))

        whole = torch.load(folder / "teacher.pt", weights_only=True)
        (folder / "cut.pt").write_bytes((folder / "teacher.pt").read_bytes()[:-1000])
        (folder / "text.pt").write_text("This is text.\n")
        torch.save(whole | {"about": whole["about"] | {"kind": "critic"}}, folder / "critic.pt")
        for key, value in {"depth": 7, "width": 32, "patch": 3, "colour": "red"}.items():
            changed = whole["about"]["model"] | {key: value}
            torch.save(whole | {"about": whole["about"] | {"model": changed}}, folder / f"{key}.pt")
        (folder / "empty").mkdir()
        (folder / "notes").mkdir()
        (folder / "notes" / "a.txt").write_text("notes")
        (folder / "images" / "ant").mkdir(parents=True)
        Image.effect_noise((8, 8), 50).save(folder / "images" / "ant" / "0.png")
        (folder / "images" / "ant" / "1.png").write_bytes((folder / "images" / "ant" / "0.png").read_bytes()[:60])
        yield folder


def files(folder: Path) -> dict:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_good_run_is_good(good, monkeypatch, tmp_path):
    names = {path.name for path in good.iterdir()}
    assert {"student.pt", "result.json", "samples.png", "trajectories"} <= names
    for checkpoint in ("student", "teacher"):
        run(monkeypatch, f"sample.py {good}/{checkpoint}.pt --labels bee 2 --count 5 --out {tmp_path}/{checkpoint}")
        assert Image.open(tmp_path / checkpoint / "grid.png").size == (3 * 68 + 4, 2 * 68 + 4)


BAD = [
    ("sample.py GOOD/none.pt", "no such checkpoint: GOOD/none.pt"),
    ("sample.py GOOD/empty", "no such checkpoint: GOOD/empty"),
    ("sample.py GOOD/cut.pt", "GOOD/cut.pt is not a checkpoint, or is damaged"),
    ("sample.py GOOD/text.pt", "GOOD/text.pt is not a checkpoint, or is damaged"),
    ("sample.py GOOD/critic.pt", "GOOD/critic.pt holds a critic"),
    ("sample.py GOOD/depth.pt", "GOOD/depth.pt holds the weights of another model"),
    ("sample.py GOOD/width.pt", "GOOD/width.pt holds the weights of another model"),
    ("sample.py GOOD/patch.pt", "GOOD/patch.pt describes no network that is known here"),
    ("sample.py GOOD/colour.pt", "GOOD/colour.pt describes no network that is known here"),
    ("sample.py GOOD/student.pt --labels 3", "no class '3': give numbers from 0 to 2, or names (ant, bee, cat)"),
    ("sample.py GOOD/student.pt --labels 0 -1", "no class '-1'"),
    ("sample.py GOOD/student.pt --labels ant dog", "no class 'dog'"),
    ("sample.py GOOD/student.pt --steps 3", "--steps and --guidance are for teachers"),
    ("sample.py GOOD/student.pt --out GOOD/text.pt", "GOOD/text.pt cannot be a folder"),
    ("sample.py GOOD/student.pt --out GOOD/text.pt/deeper", "GOOD/text.pt/deeper cannot be a folder"),
    ("evaluate.py GOOD/none", "no such checkpoint: GOOD/none/student.pt"),
    ("evaluate.py GOOD GOOD/student.pt", "two runs are called good"),
    ("evaluate.py GOOD/teacher", "a run called teacher would be taken for another row of the table"),
    ("evaluate.py GOOD --teacher GOOD/other.pt", "GOOD/other.pt is not the teacher of GOOD"),
    ("evaluate.py GOOD/student.pt", "these images are of other classes, or another size, than the network's"),
    ("evaluate.py --samples GOOD/images", "the protocol compares --samples with a --reference: give both"),
    ("DISTILL --steps 3", "choose --steps from 1, 2, 4, 8"),
    ("DISTILL --steps 16", "choose --steps from 1, 2, 4, 8"),
    ("DISTILL --accumulate 3 --count 16", "a batch of 4 cannot be shared by 1 processes in 3 parts each"),
    ("DISTILL --own 0.2 --accumulate 2", "--own 0.2 of so small a part of a batch is no sample"),
    ("DISTILL --opens 0.9", "--opens 0.9 would open the last history layer when the training is over"),
    ("DISTILL --output direction --trajectory clean", "use --output state, or --trajectory states"),
    ("DISTILL --history-layers 99", "history_layers is 99: the model has 6 layers"),
    ("DISTILL --preset imagenet256 --steps 2", "GOOD/student.pt holds another training"),  # the told times are dropped
    ("DISTILL --told 999 500", "--told has 2 times, and the student takes 4 steps"),
    ("REFINE --from GOOD/none.pt", "no student at GOOD/none.pt: make one, python distill.py --preset shapes"),
    ("REFINE", "these images are of other classes"),
    ("REFINE --iterations 100", "in the first 200 steps nobody judges"),
    ("REFINE --from GOOD/teacher.pt", "holds a teacher, and a student is needed"),
    ("REFINE --teacher GOOD/other.pt", "GOOD/student.pt is another teacher's student"),
    ("REFINE --data GOOD/images", "cannot read the image GOOD/images/ant/1.png"),
    ("REFINE --compile", "--compile is for the first stage"),
    ("REFINE --batch 6", "a batch of 6, in 1 × 1 parts, is not made of groups of 8"),
    ("DISTILL --teacher GOOD/none.pt", "no teacher at GOOD/none.pt"),
    ("DISTILL --teacher GOOD/student.pt", "holds a student, and a teacher is needed"),
    ("DISTILL --teacher GOOD/other.pt", "GOOD/trajectories holds other trajectories or latents: teacher is"),
    ("DISTILL --trajectories GOOD/notes", "GOOD/notes holds other files"),
    ("DISTILL --trajectories GOOD/text.pt", "GOOD/text.pt cannot be a folder"),
    ("DISTILL --out GOOD/text.pt", "GOOD/text.pt cannot be a folder"),
    ("DISTILL --lr 0.5", "GOOD/student.pt holds another training: lr is 0.001 there, not 0.5"),
    ("DISTILL --history-layers 2", "GOOD/student.pt holds another training: history_layers is 1 there, not 2"),
    ("TEACHER --data GOOD/none --out GOOD/empty", "no such folder of images: GOOD/none"),
    ("TEACHER --data GOOD/empty --out GOOD/empty", "no images in GOOD/empty"),
    ("TEACHER --data GOOD/notes --out GOOD/empty", "no images in GOOD/notes"),
    ("TEACHER --data GOOD/images --out GOOD/empty", "cannot read the image GOOD/images/ant/1.png"),
    ("TEACHER --preset cifar10 --out GOOD/empty", "--data ROOT"),
    ("TEACHER --preset points --size Q/1 --out GOOD/empty", "no model size 'Q/1'"),
    ("TEACHER --preset points --size N/2 --out GOOD/empty", "an image of 1 pixels cannot be cut into patches of 2"),
    ("TEACHER --preset points --predicts eps --out GOOD/empty", "use --predicts v, or --path ddpm"),
    ("TEACHER --preset points --out GOOD/text.pt", "GOOD/text.pt cannot be a folder"),
    ("TEACHER --preset points --out GOOD", "GOOD/teacher.pt holds another training"),
    ("TEACHER --preset points --out GOOD/new --export GOOD/empty", "GOOD/empty is a folder"),
    ("DISTILL --out GOOD/empty --export GOOD/text.pt/a.pt", "GOOD/text.pt cannot be a folder"),
    ("teacher.py trajectories --out GOOD --steps 10", "--steps must be a multiple of 8, which 10 is not"),
    ("teacher.py trajectories --out GOOD --guidance 3", "guidance is 1.0 there, not 3.0"),
    ("teacher.py trajectories --out GOOD --path ddpm", "--path has no meaning for this job, which is `teacher.py traj"),
    ("TEACHER --out GOOD --keep clean", "--keep has no meaning for this job, which is `teacher.py train`"),
    ("DISTILL --export GOOD/student.pt", "GOOD/student.pt holds a training that can be continued"),
    ("teacher.py trajectories --out GOOD/empty --preset points", "no teacher at GOOD/empty/teacher.pt"),
]


@pytest.mark.parametrize("command, says", BAD, ids=[command for command, _ in BAD])
def test_bad_input_is_a_fault_and_nothing_is_overwritten(good, monkeypatch, tmp_path, command, says):
    monkeypatch.chdir(tmp_path)
    before = files(good)
    with pytest.raises(Fault, match=re.escape(says.replace("GOOD", str(good)))) as fault:
        run(monkeypatch, fill_in(command, good))
    assert "\n" not in str(fault.value)
    assert files(good) == before
    assert not files(tmp_path)


@pytest.mark.parametrize("command, least", [
    ("sample.py --count 0", 1), ("sample.py --count -3", 1), ("sample.py --batch 0", 1), ("sample.py --steps 1.5", 1),
    ("distill.py --steps 0", 1), ("distill.py --count -1", 1), ("distill.py --iterations 0", 1),
    ("teacher.py --batch many", 1), ("teacher.py --iterations -5", 1), ("teacher.py --image-size 0", 1),
    ("sample.py --seed -1", 0), ("distill.py --history-layers -1", 0), ("teacher.py --seed 0.5", 0),
])
def test_counts_and_seeds_are_whole_numbers(monkeypatch, capsys, command, least):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, command)
    flag, value = command.split()[1:]
    assert stop.value.code == 2
    assert f"argument {flag}: '{value}' is not a whole number from {least} up" in capsys.readouterr().err


@pytest.mark.parametrize("flag, most", [("--own", "1"), ("--told", "1000")])
@pytest.mark.parametrize("value", ["1000.5", "-0.1", "nan", "half"])
def test_a_share_or_time_has_bounds(monkeypatch, capsys, flag, most, value):
    with pytest.raises(SystemExit):
        run(monkeypatch, f"distill.py {flag}={value}")
    assert f"argument {flag}: '{value}' is not a number from 0 to {most}" in capsys.readouterr().err


BAD_FOR_REAL = [
    ("sample.py GOOD/cut.pt", "GOOD/cut.pt is not a checkpoint, or is damaged"),
    ("TEACHER --data GOOD/images", "cannot read the image GOOD/images/ant/1.png"),
]


@pytest.mark.parametrize("command, says", BAD_FOR_REAL, ids=[command for command, _ in BAD_FOR_REAL])
def test_a_script_ends_with_one_line_and_no_traceback(good, tmp_path, command, says):
    before = files(good)
    script, *words = fill_in(command, good).split()
    done = subprocess.run([sys.executable, ROOT / script, *words], cwd=tmp_path, capture_output=True, text=True,
                          timeout=120)
    *progress, last = done.stderr.splitlines()
    assert done.returncode == 1 and last.startswith("error: ") and says.replace("GOOD", str(good)) in last
    assert not any(line.startswith("error") for line in progress)
    assert "Traceback" not in done.stdout + done.stderr
    assert files(good) == before
