import os
import subprocess
import sys

import pytest
from test_store import Full, tree

from companion.runs import files
from companion.runs.files import atomic_write, write_folder


def test_atomic_write(tmp_path, monkeypatch):
    path = tmp_path / "new" / "table.json"
    atomic_write(path, "old")
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", Full(os.fsync, 0))
        with pytest.raises(OSError, match="No space left"):
            atomic_write(path, "new")
    assert tree(tmp_path / "new") == {"table.json": b"old"}
    atomic_write(path, b"\x00new")
    assert tree(tmp_path / "new") == {"table.json": b"\x00new"}


def test_atomic_write_removes_what_dead_writers_left(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = files.socket.gethostname()
    left = tmp_path / f".table.json.{host}-{dead.pid}.tmp"
    alive = [tmp_path / f".table.json.{host}-1.tmp", tmp_path / f".table.json.elsewhere-{dead.pid}.tmp",
             tmp_path / f".other.json.{host}-{dead.pid}.tmp"]  # fmt: skip
    for path in [left, *alive]:
        path.write_text("half")
    atomic_write(tmp_path / "table.json", "whole")
    assert not left.exists() and all(path.exists() for path in alive)


def test_write_folder_is_whole_or_not_there(tmp_path):
    write_folder(tmp_path / "a", {"x": b"1", "y": b"2"})
    assert tree(tmp_path) == {"a": None, "a/x": b"1", "a/y": b"2"}
    with pytest.raises(FileExistsError):
        write_folder(tmp_path / "a", {"x": b"3"})
    with pytest.raises(TypeError):
        write_folder(tmp_path / "b", {"x": b"1", "y": "no bytes"})
    assert tree(tmp_path) == {"a": None, "a/x": b"1", "a/y": b"2"}
