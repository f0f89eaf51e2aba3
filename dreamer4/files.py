"""Paths as users give them, and what file systems differ in: locks, links, waiting for the disk, folders to rename."""

import contextlib
import errno
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from dreamer4.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# What network file systems answer to a request that they do not know, be it a lock or to sync a folder. EBADF: NFS
# and CIFS lock and sync only what is open for writing, which a folder never is.
_UNSUPPORTED = {
    errno.ENOLCK,
    errno.ENOSYS,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.EINVAL,
    errno.EBADF,
    errno.EISDIR,
    errno.ENOTTY,
}
_FOUND_IN_EMPTY = {"lost+found", "System Volume Information"}  # of a new file system
_PART = ".part"
_log = logging.getLogger(__name__)


# ----- paths -----


def expanded(path: Path | str) -> Path:
    """``path`` with the folder of the user in place of ``~``. Raises UserError where there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{path}: {error}") from None


def same_path(a: str, b: str) -> bool:
    """Whether two paths, be they relative or absolute, name one file or folder."""
    try:
        return Path(a).expanduser().resolve() == Path(b).expanduser().resolve()
    except (OSError, ValueError, RuntimeError):  # a string that is no path
        return False


def check_linked(path: Path, field: str) -> None:
    """Raises UserError where ``path``, or a folder that it lies in, is a link to what is not there: ``Path.exists``
    reports a dangling link as absent, so output written for it would be lost."""
    for place in (path, *path.parents):
        if place.is_symlink() and not place.exists():
            raise UserError(f"{field}: {place} is a link to {place.readlink()}, which is not there")


def check_new_file(path: Path, field: str) -> None:
    """Raises UserError where no file can be written at ``path``: asked before the work rather than after it."""
    check_linked(path, field)
    if path.is_dir():
        raise UserError(f"{field}: {path} is a folder, a file expected")
    if not path.parent.is_dir():
        raise UserError(f"{field}: {path}: its folder does not exist")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"{field}: {path} cannot be written")


def check_writable(folder: Path) -> None:
    """Makes ``folder`` and raises OSError where nothing can be written in it."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):  # a mounted folder may say that it can be written, and not take anything
        pass


def array_folder(path: Path) -> str:
    """``path`` as tensorstore takes it: absolute, without ``..`` and links. Raises UserError where it is no text, or
    has a backslash, which tensorstore takes for the border of a folder."""
    absolute = str(path.resolve())
    try:
        absolute.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{absolute!r}: arrays cannot be kept in a folder whose name is no UTF-8; choose another"
        ) from None
    if "\\" in absolute:
        raise UserError(f"{absolute}: arrays cannot be kept in a folder with a backslash in its path; choose another")
    return absolute


# ----- writing in one piece -----


def write_atomically(path: Path, text: str) -> None:
    """Puts ``text`` at ``path`` so that a crash leaves either the old file or the new one whole."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def check_free(path: Path, taken: str) -> None:
    """Raises UserError, with the sentence ``taken``, unless a new folder may come to be at ``path``: where there is
    nothing, or an empty folder, such as a volume that was just mounted. What an interrupted ``staging`` left there, or
    what the system keeps there, does not count. Half of what was being published is said, since it can be mended."""
    if not path.is_dir():
        if path.exists():
            raise UserError(taken)
        return
    if all(entry.name in _FOUND_IN_EMPTY or entry.name.startswith(".") for entry in path.iterdir()):
        return
    part = path / _PART
    if part.is_dir() and any(part.iterdir()):
        raise UserError(
            f"{path} holds a part of what a process was putting there when it was interrupted, and {part} the rest:"
            f" move that up into {path} to have all of it, or remove both"
        )
    raise UserError(taken)


def staging(path: Path) -> Path:
    """Where to make the folder that is to appear at ``path``: beside it, or inside an empty folder that is there, which
    may be a mount that nothing can be renamed over."""
    return path / _PART if path.is_dir() else path.with_name(f".{path.name}{_PART}")


def publish(made: Path, path: Path, last: str) -> None:
    """Puts ``made``, a folder in ``staging(path)``'s place, at ``path``: by one rename or, inside an empty folder that
    is there, entry by entry, ``last`` being the file without which the others are nothing."""
    if made.parent == path:
        for entry in sorted(made.iterdir(), key=lambda entry: entry.name == last):
            sync(path)
            entry.rename(path / entry.name)
        made.rmdir()
        sync(path)
    else:
        made.rename(path)
        sync(path.parent)


def claim(folder: Path, shown: Path) -> int:
    """Makes ``folder`` and takes its lock, which is held until the descriptor that it returns is closed.

    Raises UserError, which names ``shown``, where another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        lock(descriptor, shown)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(f"{shown} is being written by another process: wait until it is done") from None
    return descriptor


def clear(folder: Path) -> None:
    """Removes all that lies in ``folder``."""
    for leftover in folder.iterdir():
        shutil.rmtree(leftover) if leftover.is_dir() and not leftover.is_symlink() else leftover.unlink()


@contextlib.contextmanager
def new_folder(path: Path, last: str) -> Iterator[Path]:
    """An empty folder to fill, which appears at ``path`` at the end (see ``publish``) or, after an exception, not.

    Raises UserError where another process is making it.
    """
    folder = staging(path)
    descriptor = claim(folder, path)
    try:
        clear(folder)  # of what one that was killed has left
        yield folder
        publish(folder, path, last)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        os.close(descriptor)


def sync(*paths: Path) -> None:
    """Returns when these files and folders (their entries, not what lies in them) are on the disk.

    Folders are passed over where the file system cannot sync them: what they list is in force by then.
    """
    for path in paths:
        folder = path.is_dir()
        try:
            descriptor = os.open(path, os.O_RDONLY if folder else os.O_RDWR)  # CIFS syncs what is open for writing
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            if not (folder and error.errno in _UNSUPPORTED):
                raise


def can_sync(folder: Path) -> bool:
    """Whether the file system can sync ``folder``; where it cannot, that is said in a warning."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        _log.warning(
            "%s: its file system cannot sync folders (%s): what was just written may not survive a loss of power",
            folder,
            error.strerror,
        )
        return False
    finally:
        os.close(descriptor)
    return True


# ----- locks -----


def lock(descriptor: int, path: Path) -> None:
    """Takes the lock of an open file or folder, which the kernel drops with the process; ``path`` is for the warning.

    Raises BlockingIOError where another holds it. A file system that has no locks is said in a warning.
    """
    if fcntl is None:
        _log.warning("%s: this system has no locks, so see to it that no other process writes there", path)
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        _log.warning(
            "%s: its file system has no locks (%s), so see to it that no other process writes there",
            path,
            error.strerror,
        )
