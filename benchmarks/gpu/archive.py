"""Many small files as one: a compressed list of their paths and lengths, then their bytes as they are."""

import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath


def join(files: Mapping[str, bytes]) -> bytes:
    """The files as one; `split` gives them back.

    Args:
        files: by relative path.
    """
    head = zlib.compress(json.dumps([[path, len(content)] for path, content in files.items()]).encode())
    return b"".join([len(head).to_bytes(8, "little"), head, *files.values()])


def split(content: bytes) -> Iterator[tuple[str, bytes]]:
    """Path and content of each file, in order.

    Raises:
        ValueError: the archive is not whole, at the first file that is not; or a path would leave the folder.
    """
    start = 8 + int.from_bytes(content[:8], "little")
    try:
        listed = json.loads(zlib.decompress(content[8:start]))
    except (zlib.error, ValueError) as error:
        raise ValueError(f"this is no archive, or not the beginning of one ({error})") from error
    for path, length in listed:
        if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
            raise ValueError(f"{path!r} would be written outside the folder")
        if start + length > len(content):
            raise ValueError(f"the archive ends within {path!r}")
        yield path, content[start : start + length]
        start += length


def halves(folder: Path) -> tuple[bytes, bytes]:
    """All files of a folder in two archives of about equal size, with paths that begin with the folder's name.

    Each has a file `.whole` in that folder: how many files both have together.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    whole, done, parts = sum(path.stat().st_size for path in files), 0, ([], [])
    for path in files:
        parts[2 * done >= whole].append(path)
        done += path.stat().st_size
    count = {f"{folder.name}/.whole": str(len(files)).encode()}
    names = ({path.relative_to(folder.parent).as_posix(): path.read_bytes() for path in part} for part in parts)
    first, second = (join(count | named) for named in names)
    return first, second


def unpack(content: bytes, folder: Path) -> None:
    """Write the files of an archive below a folder."""
    for path, data in split(content):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)


def is_whole(folder: Path) -> bool:
    """Whether a folder holds all files of both `halves`."""
    files = sum(path.is_file() for path in folder.rglob("*") if not path.name.startswith("."))
    return (folder / ".whole").exists() and files == int((folder / ".whole").read_text())
