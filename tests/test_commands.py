"""The command lines with bad input: each says in one line what is wrong and leaves every file as it
was. Most cases call a script's main() and catch its UserError; a few run the real script, to see
the exit status and the one line. All start from a tiny run (teacher, trajectories, student) that
the same commands made of good input, so that what is refused is the one thing that a case changes.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import distill
import evaluate
import gan
import sample
import shards
import teacher
import trajectories
from files import UserError
from tiny import write_teacher

ROOT = Path(teacher.__file__).resolve().parent
SCRIPTS = {
    "teacher.py": teacher,
    "trajectories.py": trajectories,
    "distill.py": distill,
    "gan.py": gan,
    "sample.py": sample,
    "evaluate.py": evaluate,
}


def run(monkeypatch, command: str):
    """A command line, in this process."""
    script, *words = command.split()
    monkeypatch.setattr(sys, "argv", [script, *words, "--device", "cpu"])
    SCRIPTS[script].main()


SHORT = {  # what the commands below have in common
    "DISTILL": "distill.py --preset shapes --teacher GOOD/teacher.pt --count 8 --iterations 2 "
    "--batch 4 --trajectories GOOD/trajectories --out GOOD",
    "TEACHER": "teacher.py --iterations 2",
    "GAN": "gan.py --teacher GOOD/teacher.pt --trajectories GOOD/trajectories "
    "--from GOOD/student.pt --out GOOD/empty",
    "TRAJECTORIES": "trajectories.py --preset shapes --teacher GOOD/teacher.pt --count 8 "
    "--folder GOOD/trajectories",
    "STUDENT": "sample.py GOOD/student.pt --out GOOD/empty",
}


def fill_in(command: str, folder: Path) -> str:
    first, _, rest = command.partition(" ")
    return f"{SHORT.get(first, first)} {rest}".replace("GOOD", str(folder))


@pytest.fixture(scope="module")
def small():
    """Shards of 8 trajectories, and few images in the report: they are quick."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD", 8)
        patch.setattr(trajectories, "SHARD", 8)
        patch.setattr(evaluate, "REPORT_IMAGES", 16)
        yield patch


@pytest.fixture(scope="module")
def good(tmp_path_factory, small, few_shapes):
    """A folder with a finished run, a second teacher, and broken files."""
    folder = tmp_path_factory.mktemp("good")
    write_teacher(folder / "teacher.pt", seed=1)
    write_teacher(folder / "other.pt", seed=2)
    run(small, fill_in("DISTILL", folder))

    whole = torch.load(folder / "teacher.pt", weights_only=True)
    (folder / "cut.pt").write_bytes((folder / "teacher.pt").read_bytes()[:-1000])
    (folder / "text.pt").write_text("This is text.\n")
    torch.save(whole | dict(kind="critic"), folder / "critic.pt")
    for key, value in dict(depth=7, width=32, patch=3, colour="red").items():
        model = whole["record"]["model"] | {key: value}
        record = whole["record"] | dict(model=model)
        torch.save(whole | dict(record=record), folder / f"{key}.pt")
    (folder / "empty").mkdir()
    (folder / "notes").mkdir()
    (folder / "notes" / "a.txt").write_text("notes")
    (folder / "images" / "ant").mkdir(parents=True)
    image = folder / "images" / "ant" / "0.png"
    Image.effect_noise((8, 8), 50).save(image)
    image.with_name("1.png").write_bytes(image.read_bytes()[:60])
    return folder


def files(folder: Path) -> dict:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_good_run_is_good(good, monkeypatch, tmp_path):
    names = {path.name for path in good.iterdir()}
    assert {"student.pt", "no-history.pt", "result.json", "samples.png", "trajectories"} <= names
    for name in ("student", "teacher"):
        out = tmp_path / name
        run(monkeypatch, f"sample.py {good}/{name}.pt --labels bee 2 --count 5 --out {out}")
        assert Image.open(out / "grid.png").size == (3 * 68 + 4, 2 * 68 + 4)


BAD = [
    # checkpoints
    ("sample.py GOOD/none.pt", "GOOD/none.pt"),
    ("sample.py GOOD/empty", "GOOD/empty"),
    ("sample.py GOOD/cut.pt", "GOOD/cut.pt cannot be read"),
    ("sample.py GOOD/text.pt", "GOOD/text.pt cannot be read"),
    ("sample.py GOOD/critic.pt", "GOOD/critic.pt is not a checkpoint of this project"),
    ("sample.py GOOD/depth.pt", "GOOD/depth.pt holds the weights of another network"),
    ("sample.py GOOD/width.pt", "GOOD/width.pt holds the weights of another network"),
    ("sample.py GOOD/patch.pt", "GOOD/patch.pt describes no teacher that is known here"),
    ("sample.py GOOD/colour.pt", "no field 'colour'"),
    ("DISTILL --teacher GOOD/none.pt", "GOOD/none.pt"),
    ("DISTILL --teacher GOOD/student.pt", "holds a student, and a teacher is needed"),
    ("GAN --from GOOD/none.pt", "no student at GOOD/none.pt: python distill.py --preset shapes"),
    ("GAN --from GOOD/teacher.pt", "holds a teacher, and a student is needed"),
    ("GAN --teacher GOOD/other.pt", "this student has another teacher"),
    ("evaluate.py GOOD/none", "GOOD/none/student.pt"),
    ("STUDENT --teacher-kind sit", "says itself what it is: leave out --teacher-kind"),
    ("DISTILL --teacher-kind sit", "says itself what it is: leave out --teacher-kind"),
    ("TRAJECTORIES --teacher-kind sit", "says itself what it is: leave out --teacher-kind"),
    ("evaluate.py GOOD GOOD/student.pt", "two students are called"),
    ("evaluate.py GOOD --teacher GOOD/other.pt", "GOOD/other.pt is not the teacher of GOOD"),
    # what is in the way
    ("STUDENT --out GOOD/text.pt", "GOOD/text.pt cannot be a folder"),
    ("STUDENT --out GOOD/text.pt/deeper", "GOOD/text.pt/deeper cannot be a folder"),
    ("DISTILL --out GOOD/text.pt", "GOOD/text.pt cannot be a folder"),
    ("DISTILL --trajectories GOOD/text.pt", "GOOD/text.pt cannot be a folder"),
    ("DISTILL --trajectories GOOD/notes", "GOOD/notes holds other files"),
    ("DISTILL --lr 0.5", "holds another training: lr is 0.001 there and 0.5 here"),
    ("DISTILL --history-layers 2", "history_layers is 1 there and 2 here"),
    ("DISTILL --teacher GOOD/other.pt", "something else: teacher is"),
    ("TEACHER --preset points --out GOOD/text.pt", "GOOD/text.pt cannot be a folder"),
    ("TEACHER --preset points --out GOOD", "GOOD/teacher.pt holds another training"),
    ("TRAJECTORIES --guidance-scale 3", "guidance_scale is 1.0 there and 3.0 here"),
    # settings
    ("STUDENT --labels 5", "no class '5': give numbers from 0 to 4, or names (ant, bee, cat, dog"),
    ("STUDENT --labels 0 -1", "no class '-1'"),
    ("STUDENT --labels ant wasp", "no class 'wasp'"),
    ("STUDENT --euler-steps 3", "--euler-steps and --guidance-scale are for teachers"),
    ("DISTILL --steps 3", "choose --steps from 1, 2, 4, 8"),
    ("DISTILL --steps 16", "choose --steps from 1, 2, 4, 8"),
    ("DISTILL --accumulate 3 --out GOOD/empty", "a batch of 4 cannot be split evenly"),
    ("DISTILL --on-policy 0.1 --out GOOD/empty", "of a micro-batch of 4 is less than one"),
    ("DISTILL --targets x0", "use --output state, or --targets states"),
    ("DISTILL --history-layers 99", "99 history layers: the network has 6 layers"),
    ("GAN", "other classes than the network's"),
    ("GAN --iterations 100", "the first 200 iterations have no GAN loss"),
    ("GAN --batch 12", "a batch of 12 cannot be split"),
    ("TEACHER --preset points --size N/2", "1 pixels cannot be cut into patches of 2"),
    ("TEACHER --preset points --predicts eps", "use --predicts v, or --noise-path ddpm"),
    ("TRAJECTORIES --kept-steps 3 2 8", "must rise and end with 24, the ODE's last, but they are"),
    # images
    ("GAN --data GOOD/images", "cannot read the image GOOD/images/ant/1.png"),
    ("TEACHER --data GOOD/none", "no such folder of images: GOOD/none"),
    ("TEACHER --data GOOD/empty", "no images in GOOD/empty"),
    ("TEACHER --data GOOD/notes", "no images in GOOD/notes"),
    ("TEACHER --data GOOD/images --image-size 8", "cannot read the image GOOD/images/ant/1.png"),
    ("TEACHER --data GOOD/images --image-size 16", "images are never enlarged"),
    ("TEACHER --data GOOD/images", "cannot read the image GOOD/images/ant/1.png"),
    ("TEACHER --preset cifar10", "this preset needs images: --data DIR"),
    ("evaluate.py GOOD/student.pt", "real images are of other classes than the network's"),
]


@pytest.mark.parametrize("command, says", BAD, ids=[command for command, _ in BAD])
def test_bad_input_is_one_line_and_nothing_is_overwritten(
    good, monkeypatch, tmp_path, command, says
):
    monkeypatch.chdir(tmp_path)
    before = files(good)
    with pytest.raises(UserError, match=re.escape(says.replace("GOOD", str(good)))) as error:
        run(monkeypatch, fill_in(command, good))
    assert "\n" not in str(error.value)
    assert files(good) == before
    assert not files(tmp_path)


@pytest.mark.parametrize(
    "command, says",
    [
        ("sample.py GOOD/cut.pt", "GOOD/cut.pt cannot be read"),
        ("TEACHER --data GOOD/images --image-size 8", "cannot read the image"),
    ],
)
def test_a_script_ends_with_one_line_and_no_traceback(good, tmp_path, command, says):
    before = files(good)
    script, *words = fill_in(command, good).split()
    done = subprocess.run(
        [sys.executable, ROOT / script, *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    *progress, last = done.stderr.splitlines()
    assert done.returncode == 1
    assert last.startswith("error: ") and says.replace("GOOD", str(good)) in last
    assert not any(line.startswith("error") for line in progress)
    assert "Traceback" not in done.stdout + done.stderr
    assert files(good) == before
