"""Writing files whole or not at all; checkpoints; and UserError, for what a user can put right.

A checkpoint is one file, a dict:

    kind         "teacher", "student" or "classifier"
    record       what it is and how it came to be: a dataclass of config.py, as a dict
    ema          the averaged weights, which is what one uses
    ...          what training.py needs to continue a training

It is read with `weights_only=True`, so that a file from elsewhere can run no code.
"""

import argparse
import hashlib
import importlib
import json
import os
import secrets
import time
import zipfile
from contextlib import suppress
from pathlib import Path

import torch

from config import ClassifierRecord, StudentRecord, TeacherRecord, from_dict

RECORDS = {"teacher": TeacherRecord, "student": StudentRecord, "classifier": ClassifierRecord}


class UserError(Exception):
    """Something the user can put right; the message says what is wrong and what to do."""


# ---- 1. Files and folders ------------------------------------------------------------------------


def output_folder(path: str | Path, *files: str) -> Path:
    """Make a folder and its parents. Raises UserError where a file stands in its place, where
    nothing can be written into it, and where one of `files`, to be written there, is a folder."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(
            f"{path} cannot be a folder: it, or a part of its path, is a file. Choose another one"
        ) from None
    if not os.access(path, os.W_OK):
        raise UserError(f"nothing can be written into the folder {path}: choose another one")
    for file in files:
        output_file(path / file)
    return path


def output_file(path: str | Path) -> Path:
    """The path of a file that will be written, its folder made. Raises UserError where a folder has
    that name."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder, not a file to write to: choose another name")
    output_folder(path.parent)
    return path


def replace_file(path: str | Path, write):
    """Call write(file) on a temporary file beside `path`, then rename it: a reader sees the old
    file or the whole new one. Temporary files that killed writers left ten minutes ago are
    removed."""
    path = output_file(path)
    for leftover in path.parent.glob(f".{path.name}.*.part"):
        with suppress(FileNotFoundError):
            if time.time() - leftover.stat().st_mtime > 600:
                leftover.unlink()
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except RuntimeError as error:
        # torch.save hides a full disk, or Ctrl-C, behind an error of its own.
        if isinstance(error.__context__, (OSError, KeyboardInterrupt)):
            raise error.__context__ from None
        raise
    finally:
        temporary.unlink(missing_ok=True)


def save_json(path: str | Path, content):
    text = json.dumps(content, indent=1) + "\n"
    replace_file(path, lambda file: file.write(text.encode()))


def first_difference(there: dict, here: dict) -> str:
    """Where two nested dicts differ first, in words."""
    key = next(k for k in here | there if there.get(k, "absent") != here.get(k, "absent"))
    a, b = there.get(key, "absent"), here.get(key, "absent")
    if isinstance(a, dict) and isinstance(b, dict):
        return first_difference(a, b)
    return f"{key} is {str(a)[:100]} there and {str(b)[:100]} here"


def optional_import(name: str, install: str = "-r requirements-imagenet.txt"):
    """A module of a package that only some programs need. Raises UserError where it is missing, and
    where it is there but broken. `install`: what pip has to install."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # a package made for another PyTorch raises all sorts of exceptions
        is_missing = isinstance(error, ModuleNotFoundError)
        culprit = name
        if is_missing and error.name:  # maybe a package that the wanted one needs
            culprit = error.name
        package = culprit.partition(".")[0].replace("_", "-")
        broken = "" if is_missing else f", which is there but broken ({one_line(error)})"
        raise UserError(
            f"this needs the package {package}{broken}: pip install {install}"
        ) from None


def is_lack_of_memory(error: Exception) -> bool:
    """Whether an error says that the main memory, or a GPU's, is used up."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return "allocate memory" in str(error)  # what PyTorch says on a CPU


def one_line(error: Exception) -> str:
    """What an error says, in one line that is not too long."""
    return " ".join(str(error).split())[:200] or type(error).__name__


# ---- 2. Checkpoints ------------------------------------------------------------------------------


def read_checkpoint(path: str | Path) -> dict:
    """What a file holds, whoever wrote it. Raises UserError where it cannot be read."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no such checkpoint: {path}")
    with open(path, "rb") as file:  # not by its name: torch.load would go by the suffix
        try:
            check_archive(file)
            # Public checkpoints also hold the Namespace of their flags.
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file makes torch.load raise all sorts of exceptions
            if is_lack_of_memory(error):
                raise
            raise UserError(
                f"{path} cannot be read: it is no checkpoint, or is damaged. Name another file, or "
                "remove this one and make it again"
            ) from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a checkpoint: it holds a {type(content).__name__}")
    return content


def check_archive(file):
    """Raises ValueError where bits of a checkpoint have changed: torch.load compares no checksums.
    (Files older than PyTorch 1.6 are no archives, and have none.)"""
    if zipfile.is_zipfile(file):
        archive = zipfile.ZipFile(file)
        # An entry that is marked as a folder would be skipped, and its weight be left as it is in
        # uninitialised memory. PyTorch marks none.
        marked = any(entry.external_attr for entry in archive.infolist())
        if marked or archive.testzip():
            raise ValueError("a checksum differs, or an entry is marked as something else")
    file.seek(0)


def load_checkpoint(path: str | Path, *kinds: str) -> dict:
    """A checkpoint of this project of one of these kinds, with its "record" as a dataclass. Raises
    UserError for anything else."""
    content = read_checkpoint(path)
    return check_checkpoint(content, path, *kinds)


def check_checkpoint(content: dict, path, *kinds: str) -> dict:
    """`content`, in which the record has become a dataclass. Raises as load_checkpoint."""
    kind = content.get("kind")
    if kind not in list(RECORDS) or not {"record", "ema"} <= content.keys():
        raise UserError(
            f"{path} is not a checkpoint of this project: its kind, record or ema is missing or "
            "unknown"
        )
    if kind not in kinds:
        raise UserError(f"{path} holds a {kind}, and a {' or '.join(kinds)} is needed")
    for name, kind_of_value in dict(ema=dict, model=dict, iteration=int, losses=list).items():
        if not isinstance(content.get(name, kind_of_value()), kind_of_value):
            raise UserError(f"{path} is damaged: its {name} is no {kind_of_value.__name__}")
    if not all(is_loss(entry) for entry in content.get("losses", [])):
        raise UserError(f"{path} is damaged: its losses are not pairs (iteration, loss)")
    try:
        record = from_dict(RECORDS[kind], content["record"])
        if kind != "classifier":
            check_classes(record)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} describes no {kind} that is known here: {error}") from None
    return content | dict(record=record)


def is_loss(entry) -> bool:
    """Whether it is (iteration, loss), with maybe more numbers."""
    is_pair = isinstance(entry, (list, tuple)) and len(entry) >= 2
    return is_pair and all(isinstance(value, (int, float)) for value in entry)


def check_classes(record: TeacherRecord | StudentRecord):
    """Raises ValueError where the classes of a record contradict one another."""
    count, weights = len(record.classes), record.class_weights
    has_no_names = record.model.reads_text and count == 0  # of encoded prompts
    if count != record.model.classes and not has_no_names:
        raise ValueError(f"{count} names for {record.model.classes} classes")
    if weights and not (len(weights) == count and abs(sum(weights) - 1) < 1e-3):
        raise ValueError(
            f"{len(weights)} frequencies of {count} classes, with the sum {sum(weights):g}"
        )


def load_weights(module: torch.nn.Module, weights: dict, path):
    """Load strictly. Raises UserError that names the first difference."""
    try:
        module.load_state_dict(weights, strict=True)
    except (RuntimeError, AttributeError, TypeError) as error:
        lines = str(error).splitlines()
        reason = lines[min(1, len(lines) - 1)].strip()[:200]
        raise UserError(f"{path} holds the weights of another network: {reason}") from None


def check_finite(weights: dict, path):
    """Raises UserError that names the first weight with a value that is not a finite number."""
    for name, value in weights.items():
        if not torch.is_tensor(value) or not value.isfinite().all():
            raise UserError(f"{path} is damaged: {name} holds values that are not finite numbers")


def export_file(path: str | Path) -> Path:
    """For argparse, too: the path for an exported network. Raises UserError where a file is there:
    nothing is overwritten."""
    path = output_file(path)
    if path.exists():
        raise UserError(f"{path} is there already: export to another file, or remove it")
    return path


def export(path: str | Path, kind: str, record: dict, weights: dict):
    """Write a checkpoint for use only: the weights in float16, no optimizer state."""
    half = {name: weight.half() for name, weight in weights.items()}
    for name, weight in half.items():
        if not weight.isfinite().all():
            raise UserError(f"{name} has values that float16 cannot hold: nothing is exported")
    content = dict(kind=kind, record=record, ema=half)
    replace_file(export_file(path), lambda file: torch.save(content, file))
    print(f"wrote {path}")


def fingerprint(weights: dict) -> str:
    """16 hexadecimal digits that tell these weights from others."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        values = weights[name].detach().float().cpu().contiguous()
        digest.update(name.encode() + values.numpy().tobytes())
    return digest.hexdigest()[:16]
