"""Write files and folders whole or not at all, whatever happens meanwhile."""

import os
import shutil
import socket
import uuid
from collections.abc import Mapping
from pathlib import Path


def project_root() -> Path:
    """The source checkout that holds this package, or the working folder if it is installed elsewhere."""
    checkout = Path(__file__).resolve().parents[2]
    return checkout if (checkout / "pyproject.toml").is_file() else Path.cwd()


def atomic_write(path: str | os.PathLike, content: bytes | str) -> None:
    """Write a file so that it is there whole or as it was before, whatever happens meanwhile."""
    path = Path(path)
    content = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = f"{socket.gethostname()}-{os.getpid()}"
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        if _is_dead(leftover.name.removesuffix(".tmp").removeprefix(f".{path.name}.")):
            leftover.unlink(missing_ok=True)
    temporary = path.with_name(f".{path.name}.{writer}.tmp")
    try:
        _write(temporary, content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def write_folder(folder: str | os.PathLike, files: Mapping[str, bytes]) -> None:
    """Write a new folder of files that is there whole or not at all; FileExistsError if it exists.

    Leftovers of killed writers of the same folder are removed, so hold a lock if there may be two.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} exists and is not overwritten")
    folder.parent.mkdir(parents=True, exist_ok=True)
    for leftover in folder.parent.glob(f".{folder.name}.*"):
        shutil.rmtree(leftover)
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        temporary.mkdir()
        for name, content in files.items():
            _write(temporary / name, content)
        _sync(temporary)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync(folder.parent)


def _write(path: Path, content: bytes) -> None:
    """Write a file down to the disk; an OSError names it."""
    try:
        with open(path, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror} while writing", str(path)) from error


def _sync(folder: Path) -> None:
    """Make a rename within the folder last through a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _is_dead(writer: str) -> bool:
    """Whether `<host>-<pid>` is a process of this machine that no longer runs."""
    host, _, pid = writer.rpartition("-")
    if host != socket.gethostname() or not pid.isdecimal():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass  # it runs, under another user
    return False
