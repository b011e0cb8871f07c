"""Files written whole or not at all, their folders, and room for them: for everything that writes to disk."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends well it is flushed to disk and renamed to
    `path`.

    A reader therefore sees the old file or the new one, never a part, whenever the process or the machine
    dies. If the block raises, the temporary file is removed, and an OSError (a full disk, say) ends in a
    `SystemExit`.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")  # same folder: a rename across file systems is not atomic
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise SystemExit(
                f"cannot write {path}: {error.strerror or error}; nothing was left half-written"
            ) from error
        raise
    if os.name == "posix":  # make the rename itself durable; Windows cannot open a folder
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, if they are missing; SystemExit where it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"cannot make the folder {folder}: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise SystemExit(f"cannot write to the folder {folder}")


def one_line(error: BaseException) -> str:
    """An error's message without its line breaks, or its kind if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def require_space(folder: Path, n_bytes: int, what: str) -> None:
    """End with a message unless the disk that holds `folder` has `n_bytes` bytes free for `what`."""
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        raise SystemExit(
            f"{what} needs {n_bytes / 1e9:,.2f} GB, but the disk of {folder} has {free / 1e9:,.2f} GB free"
        )
