"""Files that appear whole or not at all: written beside their place, forced to the disk, then renamed into it.

Several files at once are all written before the first is renamed, so that a full disk leaves every old one as it was.
A killed process can leave a `NAME.unfinished` behind; the next write of that file takes it over.
"""

import contextlib
import errno
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import BinaryIO

from .errors import CheckpointError

Content = bytes | Callable[[BinaryIO], None]  # what a file is to hold, or what writes it

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def replace_files(contents: Mapping[pathlib.Path, Content]) -> None:
    """Write files whole, renamed into place in the order given.

    Raises: CheckpointError if one cannot be written; then the files of before are still there and nothing is left over.
    """
    unfinished: dict[pathlib.Path, pathlib.Path] = {}  # where a file is to be -> where it is for now
    path = pathlib.Path()
    try:
        for path, content in contents.items():
            unfinished[path] = path.with_name(path.name + ".unfinished")
            _write(unfinished[path], content)
        for path in contents:
            unfinished[path].replace(path)
            del unfinished[path]
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        for waiting in unfinished.values():
            with contextlib.suppress(OSError):
                waiting.unlink()
    for folder in {path.parent for path in contents}:
        _sync_folder(folder)


def write_text(path: pathlib.Path, text: str) -> None:
    """One small file in UTF-8.  Raises: CheckpointError as `replace_files` does."""
    replace_files({path: text.encode()})


def make_folder(path: pathlib.Path) -> None:
    """Create a folder and its parents where they do not exist, and make sure that files can be written into it.

    Raises: CheckpointError if that is not allowed or a file is in the way.
    """
    probe = path / ".writable"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise cannot_write(path, error) from error


def check_writable(path: pathlib.Path) -> None:
    """Make sure that this file, whatever is there now, can be written.  Raises: CheckpointError if it cannot."""
    probe = path.with_name(path.name + ".unfinished")
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise cannot_write(path, error) from error


def cannot_write(path: pathlib.Path, error: OSError) -> CheckpointError:
    """The two lines for a file or folder that the system does not let us write."""
    cure = "free some space" if error.errno in NO_ROOM else "choose a folder you may write to"
    return CheckpointError(f"cannot write {path}: {error.strerror or error}", f"{cure}; what was there is unchanged")


def _write(path: pathlib.Path, content: Content) -> None:
    with path.open("wb") as file:
        if callable(content):
            content(file)
        else:
            file.write(content)
        file.flush()
        os.fsync(file.fileno())  # a full disk may be noticed only here


def _sync_folder(folder: pathlib.Path) -> None:
    """Make renames survive a power cut, where the file system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
