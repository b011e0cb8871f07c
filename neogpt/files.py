"""Atomic writes, finding and opening files, locks and free-space checks."""

import errno
import glob
import io
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

# word in the name of a file or folder -> split of a dataset
SPLITS = dict.fromkeys(("val", "valid", "validation", "dev", "eval"), "validation") | {"test": "test"}


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path for the block to write to; then flush that file to disk and rename it to `path`. A reader
    sees the whole old or the whole new file, even after a power failure. Raises OSError if it cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")  # same folder: a rename across file systems is not atomic
    try:
        if path.exists() and not path.is_file():  # renaming would replace a device
            raise OSError("it is not a regular file")
        temporary.unlink(missing_ok=True)  # it can be a symbolic link, which writing would follow
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"cannot write {path} (any old file is unchanged): {error.strerror or error}") from error
    finally:
        with suppress(OSError):  # a second error must not hide the first
            temporary.unlink(missing_ok=True)
    if os.name == "posix":  # make the rename itself durable; Windows cannot open a folder
        folder = os.open(path.parent, os.O_RDONLY)
        with suppress(OSError):  # some network file systems cannot
            os.fsync(folder)
        os.close(folder)


def write_json(path: str | Path, value: object) -> None:
    """Write a value as indented JSON, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


def matches(value: object, example: object) -> bool:
    """Whether a value from a file has the types of an example, at least its keys, and no negative integers."""
    if isinstance(example, dict):
        return isinstance(value, dict) and all(key in value and matches(value[key], example[key]) for key in example)
    if isinstance(example, list):  # of one item
        return isinstance(value, list) and all(matches(item, example[0]) for item in value)
    return type(value) is type(example) and (type(value) is not int or 0 <= value < 2**62)


def has_suffix(path: str | Path, suffixes: tuple[str, ...]) -> bool:
    """Whether a path ends with one of the suffixes; all but .parquet can be followed by .gz or .zst."""
    compressed = tuple(f"{suffix}.{end}" for suffix in suffixes if suffix != ".parquet" for end in ("gz", "zst"))
    return str(path).endswith(suffixes + compressed)


def split_of(name: str) -> str:
    """The split of a dataset to which a file belongs, according to its name or relative path."""
    words = re.split(r"[-_./\\]", name.lower())
    return next((SPLITS[word] for word in words if word in SPLITS), "train")


def find_files(source: str, suffixes: tuple[str, ...], split: str = "train") -> tuple[list[Path], list[Path]]:
    """The files with these suffixes, sorted, and those that are skipped. source: a file, a folder, whose subfolders are
    searched too, or a pattern. If a folder has .parquet or .jsonl files, its other files are skipped, because they can
    be descriptions. Files of another split, according to their name or subfolder, are skipped unless all are.
    """
    is_folder = os.path.isdir(source)
    pattern = glob.escape(source) if os.path.exists(source) else source
    names = glob.glob(os.path.join(pattern, "**") if is_folder else pattern, recursive=True)
    paths = sorted(Path(name) for name in names if has_suffix(name, suffixes) and os.path.isfile(name))
    relative = {path: os.path.relpath(path, source) if is_folder else path.name for path in paths}
    tables = [path for path in paths if has_suffix(path, (".parquet", ".jsonl"))] if is_folder else []
    chosen = [path for path in tables or paths if split_of(relative[path]) == split] or tables or paths
    return chosen, sorted(set(paths) - set(chosen))


def max_unpacked(path: Path) -> int:
    """How many bytes a compressed file may unpack to: 1 GB, or 100 times its size. More is an attack or an error."""
    return max(2**30, 100 * path.stat().st_size)


class BoundedReader(io.RawIOBase):
    """A binary file. Raises OSError if more than `limit` bytes are read."""

    def __init__(self, file: IO[bytes], limit: int) -> None:
        self.file, self.limit, self.n_bytes = file, limit, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        n = self.file.readinto(buffer)
        self.n_bytes += n
        if self.n_bytes > self.limit:
            raise OSError(f"it unpacks to more than {self.limit:,} bytes")
        return n


def open_binary(path: Path) -> IO[bytes]:
    """Open a file for reading; .gz and .zst are decompressed."""
    import pyarrow

    file = pyarrow.input_stream(str(path), compression="detect")
    return io.BufferedReader(BoundedReader(file, max_unpacked(path)), 2**20)


def lock(file: IO, wait: bool = False) -> None:
    """Lock an open file until this process closes it or dies. If another process has locked it: wait, or OSError."""
    if os.name == "posix" and stat.S_ISREG(os.fstat(file.fileno()).st_mode):  # not /dev/null, which several ranks open
        import fcntl

        try:
            fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:  # some file systems have no locks
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise OSError(f"another process writes {file.name}: stop it, or use another --out_dir") from error


def make_folder(folder: str | Path) -> Path:
    """Create a folder and its parents if missing; return it. Raises OSError, whose message has the path."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise OSError(f"cannot write to the folder {folder}: use another one")
    return folder


def require_space(folder: Path, n_bytes: int, purpose: str) -> None:
    """Raise OSError unless the disk that holds `folder` has `n_bytes` bytes free for `purpose`."""
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        raise OSError(f"{purpose} needs {n_bytes / 1e9:,.2f} GB, but {folder} has {free / 1e9:,.2f} GB free")


def one_line(error: BaseException) -> str:
    """An exception's message without line breaks, or the name of its class if the message is empty."""
    return " ".join(str(error).split()) or type(error).__name__
