"""Atomic writes, folders and free-space checks."""

import os
from pathlib import Path

import pyarrow as pa
import pytest

from neogpt import files


def test_atomic_write_flushes_before_it_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(files.os, "fsync", lambda fd: calls.append("fsync") or fsync(fd))
    monkeypatch.setattr(files.os, "replace", lambda a, b: calls.append("replace") or replace(a, b))
    with files.atomic_write(path) as temporary:
        temporary.write_text("new")
        assert temporary.parent == path.parent and path.read_text() == "old"
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a.txt"]
    assert calls[:2] == ["fsync", "replace"]


@pytest.mark.parametrize("failure", [KeyError("x"), KeyboardInterrupt(), OSError(28, "No space left")], ids=repr)
def test_failed_write_leaves_the_old_file(tmp_path: Path, failure: BaseException) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(type(failure)) as error:
        with files.atomic_write(path) as temporary:
            temporary.write_text("ne")
            raise failure
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]
    if isinstance(failure, OSError):
        assert str(path) in str(error.value) and "No space left" in str(error.value)


def test_only_regular_files_are_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        before = os.lstat(tmp_path / name)
        with pytest.raises(OSError, match=f"{name}.*regular file"), files.atomic_write(tmp_path / name) as temporary:
            temporary.write_text("new")
        assert os.lstat(tmp_path / name).st_ino == before.st_ino
    (tmp_path / "other").write_text("other")
    (tmp_path / "a.txt.tmp").symlink_to(tmp_path / "other")
    with files.atomic_write(tmp_path / "a.txt") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "a.txt").read_text() == "new" and (tmp_path / "other").read_text() == "other"
    with pytest.raises(OSError, match="No space left"), files.atomic_write(tmp_path / "a.txt"):
        monkeypatch.setattr(Path, "unlink", lambda *_, **__: (_ for _ in ()).throw(OSError(30, "Read-only")))
        raise OSError(28, "No space left")


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_files_have_a_limit(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / f"a.txt{suffix}"
    with pa.output_stream(str(path), compression="detect") as file:
        file.write(bytes(10**6))
    with files.open_binary(path) as file:
        assert file.read() == bytes(10**6)
    monkeypatch.setattr(files, "max_unpacked", lambda path: 10**5)
    with files.open_binary(path) as file, pytest.raises(OSError, match="100,000"):
        file.read()


def test_files_of_a_folder(tmp_path: Path) -> None:
    (folder := tmp_path / "a[1]").mkdir()
    names = ["a.jsonl", "b/train-0.parquet", "b/test-0.parquet", "notes.txt", "info.json", "x.parquet.gz", "image.png"]
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("")

    def found(source: object, *split: str) -> list[list[str]]:
        both = files.find_files(str(source), (".parquet", ".jsonl", ".json", ".txt"), *split)
        return [[path.relative_to(folder).as_posix() for path in paths] for paths in both]

    rest = ["info.json", "notes.txt"]
    assert found(folder) == [["a.jsonl", "b/train-0.parquet"], ["b/test-0.parquet", *rest]]
    assert found(folder, "test") == [["b/test-0.parquet"], ["a.jsonl", "b/train-0.parquet", *rest]]
    assert found(folder, "validation")[0] == ["a.jsonl", "b/test-0.parquet", "b/train-0.parquet"]  # none is of it
    assert found(f"{tmp_path}/a?1]/*.txt") == [["notes.txt"], []]
    for name in ("b/test-0.parquet", "x.parquet.gz"):
        assert found(folder / name) == [[name] if name[0] == "b" else [], []]
    (folder / "b" / "test-0.parquet").rename(folder / "b" / "Test-0.parquet")
    assert found(folder)[0] == ["a.jsonl", "b/train-0.parquet"]
