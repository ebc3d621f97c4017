"""Shards: whole or not at all, the same from any writer, and never another folder's."""

import json
from functools import partial

import numpy as np
import pytest

import shards
from files import UserError
from shards import Shards, open_shard, shard_file, start_shards, write_shard

RECORD = np.dtype([("label", "<i4"), ("x", "<f2", (2, 3))])
META = dict(shape=(2, 3), name="a")


def columns(count: int, seed=0):
    rng = np.random.default_rng(seed)
    return dict(label=rng.integers(9, size=count), x=rng.standard_normal((count, 2, 3)))


def test_what_is_written_is_read(tmp_path):
    """Shards may have different lengths."""
    written = [columns(5, 0), columns(3, 1), columns(1, 2)]
    for number, content in enumerate(written):
        write_shard(tmp_path, number, RECORD, **content, unknown=[])
    folder = Shards(tmp_path, RECORD, 3)
    labels = np.concatenate([content["label"] for content in written])
    x = np.concatenate([content["x"] for content in written]).astype(np.float16)
    assert len(folder.column("label")) == 9 and (folder.column("label") == labels).all()
    for i in (8, 0, 4, 5, 7, 3):
        assert folder.value("label", i) == labels[i]
        assert np.array_equal(folder.value("x", i), x[i])
    assert len(Shards(tmp_path, RECORD, 2).column("x")) == 8


def test_a_large_folder_opens_few_files_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "OPEN_FILES", 4)
    for number in range(40):
        write_shard(tmp_path, number, RECORD, **columns(1, number))
    folder = Shards(tmp_path, RECORD, 40)
    assert [folder.value("label", i) for i in range(40)] == folder.column("label").tolist()
    assert folder.open.cache_info().currsize == 4


@pytest.mark.parametrize("damage", [
    lambda shard: shard[: len(shard) // 2],  # a wrong length
    lambda shard: shard + shard,
    lambda shard: b"",
    lambda shard: bytes(40) + shard[40:],  # a wrong header
    lambda shard: shard[:40] + bytes(len(shard) - 40),
    lambda shard: b"PK\x03\x04" + shard[4:],
])
def test_a_damaged_shard_is_noticed(tmp_path, damage, capsys):
    for number in range(3):
        write_shard(tmp_path, number, RECORD, **columns(5, number))
    file = shard_file(tmp_path, 1)
    assert open_shard(file, RECORD) is not None
    file.write_bytes(damage(file.read_bytes()))
    assert open_shard(file, RECORD) is None
    with pytest.raises(UserError, match="00001.npy is missing or damaged: run the program that"):
        Shards(tmp_path, RECORD, 3)
    (tmp_path / "meta.json").write_text(json.dumps(META))
    assert start_shards(tmp_path, META, RECORD, 3) == [1]
    assert f"{file} is damaged: writing it again\nwriting 1 of 3" in capsys.readouterr().out


@pytest.mark.parametrize("other", [
    lambda shard: shard.replace(b"<f2", b"<i2", 1),
    lambda shard: shard.replace(b"(5, 2, 3)", b"(5, 3, 2)", 1),
])
def test_a_shard_of_other_records_is_left_alone(tmp_path, other):
    write_shard(tmp_path, 0, RECORD, **columns(5))
    (tmp_path / "meta.json").write_text(json.dumps(META))
    file = shard_file(tmp_path, 0)
    content = other(file.read_bytes())
    file.write_bytes(content)
    for attempt in (partial(start_shards, tmp_path, META), partial(Shards, tmp_path)):
        with pytest.raises(UserError, match="00000.npy holds other items than meta.json says"):
            attempt(RECORD, 1)
    assert file.read_bytes() == content


@pytest.mark.parametrize("change", ["swapped", "of another folder", "with another meta"])
def test_a_shard_in_the_wrong_place_is_not_read(tmp_path, change):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "meta.json").write_text(json.dumps(META | dict(name=name)))
        for number in range(2):
            write_shard(tmp_path / name, number, RECORD, **columns(5, number))
    Shards(tmp_path / "a", RECORD, 2).column("x")
    if change == "swapped":
        shard_file(tmp_path / "a", 0).rename(tmp_path / "c")
        shard_file(tmp_path / "a", 1).rename(shard_file(tmp_path / "a", 0))
        (tmp_path / "c").rename(shard_file(tmp_path / "a", 1))
    elif change == "of another folder":
        shard_file(tmp_path / "b", 0).rename(shard_file(tmp_path / "a", 0))
    else:
        (tmp_path / "a" / "meta.json").write_text(json.dumps(META | dict(name="c")))
    with pytest.raises(UserError, match="00000.npy is damaged, or does not belong there"):
        Shards(tmp_path / "a", RECORD, 2).column("x")


@pytest.mark.parametrize("name", ["label", "x", "crc32"])
def test_a_changed_value_is_not_read(tmp_path, name):
    """In another place than the one that is asked for, too. Other shards can still be read."""
    for number in range(2):
        write_shard(tmp_path, number, RECORD, **columns(5, number))
    shard = np.load(shard_file(tmp_path, 1))
    shard[name][1] += 1
    np.save(shard_file(tmp_path, 1), shard)
    folder = Shards(tmp_path, RECORD, 2)
    wanted = "x" if name == "crc32" else name
    folder.value(wanted, 4)
    message = "00001.npy is damaged, or does not belong there: remove it, and run the program that"
    with pytest.raises(UserError, match=message):
        folder.value(wanted, 5)
    with pytest.raises(UserError, match=message):
        folder.column(wanted)


def test_a_missing_permission_is_no_damage(tmp_path, monkeypatch):
    def refuse(*words, **more):
        raise PermissionError

    monkeypatch.setattr(np, "load", refuse)
    with pytest.raises(PermissionError):
        open_shard(tmp_path / "00000.npy", RECORD)


def test_workers_and_processes_share_the_shards(tmp_path, monkeypatch):
    write_shard(tmp_path / "a", 3, RECORD, **columns(5))
    (tmp_path / "a" / "meta.json").write_text(json.dumps(META))
    shares = [start_shards(tmp_path / "a", META, RECORD, 8, (i, 3)) for i in range(3)]
    assert shares == [[0, 6], [1, 4, 7], [2, 5]]
    monkeypatch.setattr(shards, "wait_for_all", lambda: None)
    monkeypatch.setattr(shards, "world_size", lambda: 2)
    for rank, share in enumerate(([1, 7], [4])):  # two processes of the second worker
        monkeypatch.setattr(shards, "rank", lambda rank=rank: rank)
        assert start_shards(tmp_path / "a", META, RECORD, 8, (1, 3)) == share


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("notes")
    write_shard(tmp_path / "lost", 0, RECORD, **columns(5))
    with pytest.raises(UserError, match="lost holds other files and no meta.json: choose another"):
        start_shards(tmp_path / "lost", META, RECORD, 1)
    with pytest.raises(UserError, match="notes holds other files: choose another folder"):
        start_shards(tmp_path / "notes", META, RECORD, 1)
    assert [file.name for file in (tmp_path / "notes").iterdir()] == ["a.txt"]

    folder = tmp_path / "shards"
    assert start_shards(folder, META, RECORD, 2) == start_shards(folder, META, RECORD, 2) == [0, 1]
    with pytest.raises(UserError, match="something else: name is a there and b here. Choose an"):
        start_shards(folder, META | dict(name="b"), RECORD, 2)
    with pytest.raises(UserError) as error:
        start_shards(folder, META | dict(name=["x"] * 1000), RECORD, 2)
    assert len(str(error.value)) < 400
    for content in ("{", "[1, 2]", "\xff\xfe", "3"):
        (folder / "meta.json").write_text(content, encoding="latin1")
        with pytest.raises(UserError, match="meta.json is damaged, or was written by another pro"):
            start_shards(folder, META, RECORD, 2)
        assert (folder / "meta.json").read_text(encoding="latin1") == content
    with pytest.raises(UserError, match="a.txt cannot be a folder"):
        start_shards(tmp_path / "notes" / "a.txt", META, RECORD, 2)
