"""Files that are whole or absent: written under a temporary name, synced, renamed."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from msif_core.errors import InputError

LOCK = ".tmp-lock-"
"""How the names of locks begin."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM)
SHORT_WRITE = re.compile(r"\d+ requested and \d+ written")
"""What NumPy says of a full disk."""


@contextmanager
def told(folder: Path) -> Iterator[None]:
    """Within, say in one sentence that a file could not be written to `folder`, whichever library was to write it.

    Raises:
        InputError: the disk is full, or the folder cannot be written to.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if (problem := hindrance(error, folder)) is None:
            raise
        raise InputError(problem) from error


def hindrance(error: BaseException, folder: Path) -> str | None:
    """The sentence about a full disk, or about a `folder` that cannot be written to, if `error` comes from one.

    Libraries that are not written in Python have error classes of their own; they quote the system's words.
    """
    names = (getattr(error, key, None) for key in ("filename2", "filename"))  # of a copy, the second is what is written
    where = next((Path(name).absolute().parent for name in names if isinstance(name, str)), folder)
    where = folder if where.is_relative_to(folder) else where
    if (words := _words_of(error, FULL)) or SHORT_WRITE.search(str(error)):
        return (
            f"{where}: {words or os.strerror(errno.ENOSPC)}; make room (`msif prune CONFIG` drops what is no longer "
            "used) or lift the limit, then run the same command again: it goes on where it stopped"
        )
    standing = next(part for part in (folder, *folder.absolute().parents) if part.exists())
    if (words := _words_of(error, FORBIDDEN)) and not os.access(standing, os.W_OK):
        return f"{standing}: cannot be written to ({words}); make it writable, or name another folder"
    return None


def _words_of(error: BaseException, numbers: tuple[int, ...]) -> str | None:
    """The system's words for one of these numbers, if the error has the number or the words."""
    known = {number: os.strerror(number) for number in numbers}
    quoted = (words for words in known.values() if words in str(error))
    return known.get(getattr(error, "errno", None) or 0) or next(quoted, None)


def check_room(folder: Path, size: int = 1 << 24) -> None:
    """Refuse a folder, made if need be, where so many bytes cannot be written.

    Raises:
        InputError: says why, and what to do.
    """
    probe = folder / f".tmp-{os.getpid()}-room"
    with told(folder):
        make_folder(folder)
        try:
            with open(probe, "wb") as handle:
                handle.write(bytes(size))
        finally:
            probe.unlink(missing_ok=True)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success sync it and rename it to `path`.

    On an error nothing is left behind; after a kill a `.tmp-` file may remain and is never read.
    """
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    with told(path.parent):
        make_folder(path.parent)
        try:
            yield temporary
            _sync(temporary)
            os.replace(temporary, path)
            _sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """As `atomic_path`, for a folder that is written once; one that stands already is left as it is."""
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    with told(path.parent):
        make_folder(path.parent)
        try:
            yield temporary
            for part in (*temporary.rglob("*"), temporary):
                _sync(part)
            if not path.exists():
                os.rename(temporary, path)
                _sync(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def make_folder(path: Path) -> None:
    """Make a folder that may stand already, and those above it.

    Raises:
        InputError: one of them is a file, the disk is full, or the folder above cannot be written to.
    """
    try:
        with told(path):
            path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        file = next(part for part in (path, *path.parents) if part.is_file())
        raise InputError(f"{file}: a file, where a folder is to be; move it away, or name another folder") from None


def _sync(path: Path) -> None:
    """Have a file's bytes, or a folder's names, on the disk: what is renamed later never gets there earlier."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` as indented JSON with sorted keys, atomically."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True) + "\n")


def read_json(path: Path) -> Any:
    """Parse the JSON file `path`, which msif wrote.

    Raises:
        InputError: it is damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: damaged, not JSON ({error}); remove it and run `msif run CONFIG`") from None


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def fingerprint(*parts: Any) -> str:
    """16 hex digits over the canonical JSON of `parts`: the address of what was built from them."""
    canonical = json.dumps(parts, sort_keys=True, default=str).encode()
    return hashlib.sha256(canonical).hexdigest()[:16]


def build_once(path: Path, build: Callable[[Path], None]) -> Path:
    """Return `path`, calling `build(temporary)` first if it does not stand whole beside its checksum.

    A file whose bytes no longer match the checksum written beside it is rebuilt. Of processes that ask for the
    same file at the same time one builds it, and the others wait, or raise `BusyError` where they are `passing_by`.
    """
    if is_whole(path):
        return path
    with locked(path, wait=_WAITS.get()):
        if is_whole(path):
            return path
        with atomic_path(path) as temporary:
            build(temporary)
            digest = file_digest(temporary)
        write_text(_checksum(path), digest + "\n")
    return path


class BusyError(Exception):
    """Another process, or thread, is at work on the file."""


_WAITS = ContextVar("_WAITS", default=True)


@contextmanager
def passing_by() -> Iterator[None]:
    """Within, nobody waits for a file that somebody else is building: `build_once` raises `BusyError`."""
    token = _WAITS.set(False)
    try:
        yield
    finally:
        _WAITS.reset(token)


def free_first(parts: Iterable[int], build: Callable[[int], object]) -> None:
    """Build every part; those that somebody else is at come last, and are waited for."""
    held = []
    for part in parts:
        try:
            with passing_by():
                build(part)
        except BusyError:
            held.append(part)
    for part in held:
        build(part)


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold the lock of `path` among threads and processes, on machines that share the file system too.

    The system frees it when its holder dies, however that dies. The lock is a file beside `path` with a
    temporary name, removed at the end unless there was an error: whoever waited for it finds `path` done.

    Raises:
        BusyError: somebody else holds it, and this is not to `wait`.
        InputError: the lock cannot be written.
    """
    make_folder(path.parent)
    lock = lock_of(path)
    with told(path.parent):
        lock.touch()
    with open(lock, "ab") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(str(path)) from None
        yield
        lock.unlink(missing_ok=True)


def lock_of(path: Path) -> Path:
    """The file whose lock is that of `path`."""
    return path.with_name(f"{LOCK}{path.name}")


def is_held(lock: Path) -> bool:
    """Whether somebody holds that lock now."""
    try:
        with open(lock, "rb") as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def is_whole(path: Path) -> bool:
    """Whether `path` stands with the bytes that its checksum promises."""
    checksum = _checksum(path)
    return path.exists() and checksum.exists() and checksum.read_text().strip() == file_digest(path)


def _checksum(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")
