"""Files are whole or not there; and whatever is wrong with a file is a UserError of one line that
leaves the file as it was."""

import copy
import io
import os
import pickle
import resource
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from tiny import TEACHER

from config import ClassifierRecord, DataConfig, Training
from files import (
    UserError,
    export,
    export_file,
    fingerprint,
    first_difference,
    load_checkpoint,
    load_weights,
    optional_import,
    output_file,
    output_folder,
    replace_file,
)

RECORD = ClassifierRecord(
    data=DataConfig("shapes", image_size=8, channels=3),
    classes=("a", "b"),
    images=9,
    training=Training(iterations=30, batch=4, lr=0.1, ema_decay=0.7),
)
GOOD = dict(kind="classifier", record=asdict(RECORD), ema={"w": torch.ones(1000)})


def saved(content, **options) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


# ---- written whole or not at all -----------------------------------------------------------------


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "file"
    replace_file(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"half of the n")
        file.flush()
        assert path.read_bytes() == b"old"  # what a reader sees in the middle of the writing
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        replace_file(path, fail)
    assert path.read_bytes() == b"old" and list(path.parent.iterdir()) == [path]
    with open(path, "rb") as reader:
        replace_file(path, lambda file: file.write(b"new"))
        assert reader.read() == b"old"  # who had opened it reads on
    assert path.read_bytes() == b"new" and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    "write",
    [
        lambda file: torch.save({"w": torch.ones(1_000_000)}, file),
        lambda file: file.write(bytes(4_000_000)),
    ],
)
@pytest.mark.parametrize("room", [0, 100, 1_000_000, 3_999_999])
def test_a_full_disk_is_an_error_that_says_so(tmp_path, write, room):
    """A limit on the size of files stands in for the full disk."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(OSError):
            replace_file(path, write)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("call", [1, 2, 3])
def test_ctrl_c_while_saving_leaves_nothing_behind(tmp_path, call):
    class Interrupted:
        """A file in whose n-th write Ctrl-C comes."""

        calls = 0

        def __init__(self, file):
            self.file, self.flush = file, file.flush

        def write(self, content):
            self.calls += 1
            if self.calls == call:
                raise KeyboardInterrupt
            return self.file.write(content)

    weights = {"w": torch.ones(1_000_000)}
    with pytest.raises(KeyboardInterrupt):
        replace_file(tmp_path / "file", lambda file: torch.save(weights, Interrupted(file)))
    assert not list(tmp_path.iterdir())


def test_what_a_killed_writer_left_is_removed_after_ten_minutes(tmp_path):
    old = tmp_path / ".file.0a.part"
    new = tmp_path / ".file.0b.part"  # is being written now, for all we know
    another = tmp_path / ".other.0a.part"
    for file in (old, new, another):
        file.touch()
    for file in (old, another):
        os.utime(file, (0, 0))
    replace_file(tmp_path / "file", lambda file: file.write(b"new"))
    assert {*tmp_path.iterdir()} == {tmp_path / "file", new, another}


def test_files_and_folders_in_the_way(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("text")
    for path in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(UserError, match="cannot be a folder"):
            output_folder(path)
    with pytest.raises(UserError, match="is a folder, not a file to write to"):
        output_file(tmp_path)
    assert output_file(tmp_path / "a" / "b" / "c.png").parent.is_dir()
    (tmp_path / "a" / "result.json").mkdir()
    with pytest.raises(UserError, match="result.json is a folder, not a file to write to"):
        output_folder(tmp_path / "a", "result.json")
    monkeypatch.setattr(os, "access", lambda folder, mode: False)  # root may write anywhere
    with pytest.raises(UserError, match="nothing can be written into the folder"):
        output_file(tmp_path / "file.png")


# ---- checkpoints ---------------------------------------------------------------------------------


def flip_a_bit(content: bytes) -> bytes:
    """The same file with one bit of the first of the weights, which are all 1, changed."""
    place = content.index(torch.ones(8).numpy().tobytes())
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def mark_as_folder(content: bytes) -> bytes:
    """The same archive with one bit changed in what it says of its last entry. PyTorch then leaves
    a weight as it finds the memory."""
    place = content.rindex(b"PK\x01\x02") + 38  # the external attributes
    return content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :]


OLD_FORMAT = dict(_use_new_zipfile_serialization=False)
BAD = {  # what the file holds, and what the UserError says
    "nothing there": (None, "no such checkpoint"),
    "empty": (b"", "cannot be read"),
    "text": (b"hello, I am a text file\n", "cannot be read"),
    "text that starts like a pickle": (b"some notes", "cannot be read"),
    "cut at the end": (saved(GOOD)[:-500], "cannot be read"),
    "cut at the start": (saved(GOOD)[:100], "cannot be read"),
    "old format, cut at the end": (saved(GOOD, **OLD_FORMAT)[:-500], "cannot be read"),
    "old format, cut at the start": (saved(GOOD, **OLD_FORMAT)[:28], "cannot be read"),
    "a pickled object": (pickle.dumps(Path("a"), 2), "cannot be read"),
    "a pickled dict": (pickle.dumps(dict(kind="classifier", ema={}), 2), "cannot be read"),
    "a saved object": (saved(Path("a")), "cannot be read"),
    "a saved list": (saved([1, 2, 3]), "is not a checkpoint: it holds a list"),
    "only weights": (saved({"w": torch.ones(3)}), "not a checkpoint of this project"),
    "no record": (saved(dict(kind="classifier", ema={})), "not a checkpoint of this project"),
    "another kind": (saved(GOOD | dict(kind="teacher")), "a teacher, and a classifier is needed"),
    "an unknown kind": (saved(GOOD | dict(kind="critic")), "not a checkpoint of this project"),
    "a list as record": (saved(GOOD | dict(record=[])), "describes no classifier"),
    "an odd record": (saved(GOOD | dict(record=dict(colour="red"))), "no field 'colour'"),
    "a kind that is no word": (saved(GOOD | dict(kind=["classifier"])), "not a checkpoint of this"),
    "a list of weights": (saved(GOOD | dict(ema=[1])), "damaged: its ema is no dict"),
    "an odd iteration": (saved(GOOD | dict(iteration="9")), "damaged: its iteration is no int"),
    "odd losses": (saved(GOOD | dict(losses=None)), "damaged: its losses is no list"),
    "losses in words": (saved(GOOD | dict(losses=[(1, "x")])), "damaged: its losses are not"),
    "losses alone": (saved(GOOD | dict(losses=[0.1])), "damaged: its losses are not"),
    "one bit of a weight": (flip_a_bit(saved(GOOD)), "cannot be read"),
    "an entry that is marked as a folder": (mark_as_folder(saved(GOOD)), "cannot be read"),
    "half a record": (saved(GOOD | dict(record=dict(images=9))), "describes no classifier"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_file_that_is_not_the_checkpoint_wanted(tmp_path, what):
    path, (content, says) = tmp_path / "x.pt", BAD[what]
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=says) as error:
        load_checkpoint(path, "classifier")
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(classes=("a",)), "1 names for 5 classes"),
        (dict(class_weights=(0.5, 0.5)), "2 frequencies of 5 classes"),
        (dict(class_weights=(0.0,) * 5), "with the sum 0"),
        (dict(class_weights=(float("nan"),) * 5), "with the sum nan"),
    ],
)
def test_classes_that_contradict_one_another(tmp_path, change, says):
    content = dict(kind="teacher", record=asdict(TEACHER), ema={})
    (tmp_path / "x.pt").write_bytes(saved(content))
    load_checkpoint(tmp_path / "x.pt", "teacher")
    (tmp_path / "x.pt").write_bytes(saved(content | dict(record=asdict(TEACHER) | change)))
    with pytest.raises(UserError, match=says):
        load_checkpoint(tmp_path / "x.pt", "teacher")


def test_a_good_checkpoint_comes_with_its_record(tmp_path):
    (tmp_path / "x.pt").write_bytes(saved(GOOD))
    content = load_checkpoint(tmp_path / "x.pt", "student", "classifier")
    assert content["record"] == RECORD and torch.equal(content["ema"]["w"], torch.ones(1000))


def test_a_pickle_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "evil",))

    for content in (pickle.dumps(Evil(), 2), saved(GOOD | {"extra": Evil()})):
        (tmp_path / "x.pt").write_bytes(content)
        with pytest.raises(UserError, match="cannot be read"):
            load_checkpoint(tmp_path / "x.pt", "classifier")
    assert not (tmp_path / "evil").exists()


def test_weights_of_another_network(tmp_path):
    layer, other = torch.nn.Linear(3, 4), torch.nn.Linear(3, 5)
    for weights in (other.state_dict(), {}, None, [1], {"weight": "text", "bias": 1}):
        with pytest.raises(UserError, match="x.pt holds the weights of another network: "):
            load_weights(layer, weights, "x.pt")


def test_an_export_holds_the_weights_in_half_precision(tmp_path):
    weights = torch.nn.Linear(3, 4).state_dict()
    export(tmp_path / "x.pt", "classifier", asdict(RECORD), weights)
    content = load_checkpoint(tmp_path / "x.pt", "classifier")
    assert content["record"] == RECORD and content.keys() == {"kind", "record", "ema"}
    for name, weight in weights.items():
        assert torch.equal(content["ema"][name], weight.half())


@pytest.mark.parametrize("content", [saved(GOOD | dict(optimizer={})), saved(GOOD), b"a picture"])
def test_an_export_overwrites_nothing(tmp_path, content):
    path = tmp_path / "x.pt"
    path.write_bytes(content)
    for write in (lambda: export_file(path), lambda: export(path, "classifier", {}, {})):
        with pytest.raises(UserError, match="is there already: export to another file, or remove"):
            write()
    assert path.read_bytes() == content


# ---- small things --------------------------------------------------------------------------------


def test_the_first_difference_is_found_at_any_depth():
    there = dict(a=1, b=dict(c=2, d=(3, 4)), e=5)
    assert first_difference(there, there | dict(e=6)) == "e is 5 there and 6 here"
    other = copy.deepcopy(there)
    other["b"]["d"] = (3, 5)
    assert first_difference(there, other) == "d is (3, 4) there and (3, 5) here"
    assert first_difference(there, there | dict(f=7)) == "f is absent there and 7 here"


def test_a_missing_package_is_named():
    assert optional_import("json").dumps(1) == "1"
    with pytest.raises(UserError, match="the package no-such-package: pip install -r"):
        optional_import("no_such_package.inner")
    with pytest.raises(UserError, match="the package no-such-package: pip install that"):
        optional_import("no_such_package", install="that")


@pytest.mark.parametrize(
    "content, says",
    [
        ("import no_such_package", "the package no-such-package: pip install"),
        ("raise RuntimeError('not\\nthere')", "which is there but broken .not there.: pip"),
        ("raise OSError('lib.so: cannot open')", "broken .lib.so: cannot open.: pip install"),
        ("from json import nothing", "which is there but broken .cannot import name 'nothing'"),
        ("1 +", "which is there but broken .invalid syntax"),
    ],
)
def test_a_broken_package_is_named(tmp_path, monkeypatch, content, says):
    """Such as torchvision, where it was made for another PyTorch."""
    (tmp_path / "broken_one.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=says.replace("broken_one", "broken-one")) as error:
        optional_import("broken_one")
    assert "\n" not in str(error.value)


def test_a_fingerprint_tells_weights_apart():
    torch.manual_seed(0)
    weights = torch.nn.Linear(3, 8).state_dict()
    other = copy.deepcopy(weights)
    assert fingerprint(weights) == fingerprint(dict(reversed(other.items())))
    other["weight"][0, 2] += 1e-6
    assert fingerprint(weights) != fingerprint(other)
    assert fingerprint({"a": weights["bias"]}) != fingerprint({"b": weights["bias"]})


def test_what_float16_cannot_hold_is_not_exported(tmp_path):
    with pytest.raises(UserError, match="values that float16 cannot hold"):
        export(tmp_path / "x.pt", "classifier", {}, {"w": torch.tensor([1e6])})
    assert not (tmp_path / "x.pt").exists()
