"""Files and folders that are whole or not there: written beside their place, under a name with the process in it, then
renamed. What a killed process leaves there is swept up when the same thing is written again."""

from __future__ import annotations

import glob
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bdx.errors import UserError


def beside(path: Path, ending: str) -> Path:
    """A name that no other process takes, on this machine or on another that shares the folder."""
    return path.parent / f".{path.name}.{os.getpid()}@{platform.node()}.{ending}"


def remove(path: Path) -> None:
    """A file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def ended(pid: int, host: str | None) -> bool:
    """Whether the process is gone. One of another machine may live; one of our own number was an earlier process."""
    if host not in (None, platform.node()):
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:  # it lives, and is somebody else's
        return False
    return pid == os.getpid()


def sweep(path: Path, *, locked: bool = False) -> None:
    """Remove what writers of `path` have left beside it: those that are dead, or all if a lock says that none can live."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*"):
        name = re.fullmatch(r"\.(\d+)(?:@(.+))?\.(?:tmp|old)", left.name[len(path.name) + 1 :])
        if name and (locked or ended(int(name[1]), name[2])):
            remove(left)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """with whole(path) as tmp: what is written to `tmp`, a file or a folder, becomes `path` at the end of the block.

    A reader sees the old one or the new one, never half of it; if the block raises, the old one stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path)
    tmp, old = beside(path, "tmp"), beside(path, "old")
    try:
        yield tmp
        if path.is_dir():  # a folder cannot be renamed onto another: move the old one away first
            os.replace(path, old)
        os.replace(tmp, path)
        remove(old)
    except Exception as e:
        if number := nameless(e):
            raise OSError(number, os.strerror(number), str(path)) from e
        raise
    finally:
        remove(tmp)


def nameless(e: Exception) -> int | None:
    """The number of an error that says no path, as of a full disk: a write's, or safetensors', which has it in words."""
    if isinstance(e, OSError):
        return e.errno if e.filename is None else None
    said = re.search(r"\(os error (\d+)\)", str(e)) if type(e).__name__ == "SafetensorError" else None
    return int(said[1]) if said else None


def writable(folder: Path, names: str) -> None:
    """Make `folder`, and raise UserError unless files can be made in it. names: what the user may set to name another."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as e:
        raise UserError(f"{folder} cannot be written: {reason(e)}; name another folder by {names}") from None


def of_a_file(e: Exception) -> bool:
    """Whether the file system refused something, which a traceback would not explain better than its path."""
    return isinstance(e, OSError) and e.errno is not None and e.filename is not None


def reason(e: OSError) -> str:
    """In words that fit a path which was meant to be a folder."""
    return "a file stands where a folder is needed" if e.__class__ in (FileExistsError, NotADirectoryError) else e.strerror
