"""Folders of shards on disk: for trajectories, latents and encoded prompts, which may not fit into
memory.

    meta.json     what the items in this folder are, and what they depend on
    00000.npy     a shard: the first SHARD items, as columns, such as label (n,) and x_T (n, …)
    00001.npy     the next SHARD items
    …

A shard is written whole or not at all. What it holds depends only on the meta, on its number and,
for latents, on the images. So a writer that was stopped can continue, and several processes and
machines can write into one folder. Shards are memory-mapped when they are read. After its columns,
a shard stores their checksums. A column is checked when it is first read.
"""

import io
import json
import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np

from files import UserError, first_difference, output_folder, replace_file, save_json
from machine import rank, wait_for_all, world_size

SHARD = 256  # items
OPEN_FILES = 256  # a large folder has more shards than a process may open

# ---- 1. One shard --------------------------------------------------------------------------------


def shard_dtype(item: np.dtype, count: int) -> np.dtype:
    """The dtype of a shard of `count` items: each field of an item becomes a column. After the
    columns come their checksums."""
    columns = []
    for name in item.names:
        field = item[name]
        columns.append((name, field.base, (count, *field.shape)))
    return np.dtype([*columns, ("crc32", "<u4", len(columns))])


def shard_file(folder: str | Path, number: int) -> Path:
    return Path(folder) / f"{number:05d}.npy"


def open_shard(file: Path, item: np.dtype):
    """A memory-mapped shard, in which shard["label"] is the column of labels. None where the file
    is missing, cut short, or damaged at its head. (Values are not checked here.) Raises UserError
    where it holds other items: that file is not overwritten."""
    try:
        shard = np.load(file, mmap_mode="r")
        is_whole = file.stat().st_size == shard.offset + shard.nbytes
    except FileNotFoundError:
        return None
    except OSError:  # such as a missing permission: writing the shard again would not help
        raise
    except Exception:  # a damaged header makes np.load raise all sorts of exceptions
        return None
    if not is_whole:
        return None
    names = shard.dtype.names or ()
    count = shard["label"].size if "label" in names else 0
    if shard.shape != () or shard.dtype != shard_dtype(item, count):
        raise UserError(
            f"{file} holds other items than meta.json says: choose another folder, or remove that "
            "file"
        )
    return np.asarray(shard)


def checksum(folder: str | Path, number: int, name: str, column) -> int:
    """A checksum of a column's values, and of where they belong: the folder's meta, the shard's
    number and the column's name. So a shard that was moved is noticed."""
    meta = json.dumps(read_meta(folder), sort_keys=True)
    return zlib.crc32(column, zlib.crc32(f"{meta} {number} {name}".encode()))


def write_shard(folder: Path, number: int, item: np.dtype, **columns):
    """Write a shard of columns, which are arrays or CPU tensors of equal length. Those that an item
    does not have are left out."""
    shard = np.zeros((), shard_dtype(item, len(columns["label"])))
    for name in item.names:
        shard[name] = columns[name]
    shard["crc32"] = [checksum(folder, number, name, shard[name]) for name in item.names]
    # First into memory: when numpy writes into a file, it does not say that the disk is full.
    content = io.BytesIO()
    np.save(content, shard)
    replace_file(shard_file(folder, number), lambda file: file.write(content.getbuffer()))


# ---- 2. Writing a folder -------------------------------------------------------------------------


def read_json(file: Path) -> dict | None:
    """The dict in a JSON file, or None where there is no such file. Raises UserError where the file
    is damaged, or is none of ours."""
    try:
        return dict(json.loads(file.read_text()))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError, RecursionError):
        raise UserError(
            f"{file} is damaged, or was written by another program: choose another folder, or put "
            "that file right"
        ) from None


def read_meta(folder: str | Path) -> dict | None:
    """What meta.json says of a folder of shards; None where there is none."""
    return read_json(Path(folder) / "meta.json")


def start_shards(
    folder: Path,
    meta: dict,
    item: np.dtype,
    shards: int,
    worker: tuple[int, int] = (0, 1),
) -> list[int]:
    """Make a folder for so many shards, or check that it was made with the same meta. Returns the
    numbers of those shards that this process has to write.

    `worker` = (i, k): this program is worker i of k, counted from 0, and writes the shards i,
    i + k, i + 2k, … Under torchrun, its processes divide these among themselves. Raises UserError
    where the folder holds something else."""
    folder = output_folder(folder)
    meta = json.loads(json.dumps(meta))  # tuples become lists, as in the file
    there = read_meta(folder)
    if there is None:
        others = [file for file in folder.iterdir() if file.name[0] != "."]
        if others and others != [folder / "meta.json"]:  # another worker may have written it now
            note = " and no meta.json" if shard_file(folder, 0) in others else ""
            raise UserError(f"{folder} holds other files{note}: choose another folder")
        save_json(folder / "meta.json", meta)
    elif there != meta:
        raise UserError(
            f"{folder} was written for something else: {first_difference(there, meta)[:200]}. "
            "Choose another folder, or remove that one"
        )
    missing = []
    first, every = worker
    for number in range(first, shards, every):
        file = shard_file(folder, number)
        if open_shard(file, item) is None:
            missing.append(number)
            if file.exists():
                print(f"{file} is damaged: writing it again")
    if missing:
        print(f"writing {len(missing):,} of {shards:,} shards of {SHARD} items into {folder}")
    wait_for_all()  # no process may write before all have seen what is missing
    return missing[rank() :: world_size()]


# ---- 3. Reading a folder -------------------------------------------------------------------------


class Shards:
    """The items of the first shards of a folder. Raises UserError where a shard is missing."""

    def __init__(self, folder: str | Path, item: np.dtype, shards: int):
        def open_number(number: int):
            return open_shard(shard_file(folder, number), item)

        self.folder, self.names = folder, item.names
        self.open = lru_cache(OPEN_FILES)(open_number)
        self.numbers = range(shards)
        self.checked = set()  # (number of a shard, name of a column)
        lengths = []
        for number in self.numbers:
            shard = self.open(number)
            if shard is None:
                raise UserError(
                    f"{shard_file(folder, number)} is missing or damaged: run the program that "
                    "writes this folder to its end"
                )
            lengths.append(len(shard["label"]))
        self.ends = np.cumsum(lengths)  # number of items up to the end of each shard

    def column(self, name: str):
        """A column of all shards, in memory."""
        return np.concatenate([self.column_of(number, name) for number in self.numbers])

    def value(self, name: str, index: int):
        """What a column holds of one item. It is read from the disk when it is used."""
        number = int(np.searchsorted(self.ends, index, side="right"))
        column = self.column_of(number, name)
        return column[index - self.ends[number]]  # counted from the end of the shard

    def column_of(self, number: int, name: str):
        """A column of one shard. When it is first used, it is compared with its checksum. Raises
        UserError where they differ."""
        shard = self.open(number)
        if (number, name) not in self.checked:
            found = checksum(self.folder, number, name, shard[name])
            if found != shard["crc32"][self.names.index(name)]:
                raise UserError(
                    f"{shard_file(self.folder, number)} is damaged, or does not belong there: "
                    "remove it, and run the program that writes this folder again"
                )
            self.checked.add((number, name))
        return shard[name]
