"""What an installation asks for and puts where."""

import re

import pytest

from companion.runs.data import project_root

tomllib = pytest.importorskip("tomllib")  # from Python 3.11 on


def read(path):
    return tomllib.loads((project_root() / path).read_text())


def names(requirements):
    return {re.match(r"[\w.-]+", line)[0].lower() for line in requirements}


def test_repairlib_asks_for_five_packages_and_installs_one():
    settings = read("pyproject.toml")
    assert names(settings["project"]["dependencies"]) == {"torch", "numpy", "scipy", "tqdm", "jaxtyping"}
    assert settings["tool"]["setuptools"]["packages"] == ["repairlib"]


def test_the_companion_is_another_distribution():
    settings = read("companion/pyproject.toml")
    assert settings["project"]["dependencies"] == ["repairlib[companion]"]
    assert settings["tool"]["setuptools"]["packages"]["find"]["include"] == ["companion", "companion.*"]
    folders = {path.parent for path in (project_root() / "companion").rglob("*.py")}
    assert not [folder for folder in folders if not (folder / "__init__.py").exists()]  # else it would be left out


def test_every_dependency_is_pinned():
    settings = read("pyproject.toml")["project"]
    direct = names(settings["dependencies"]).union(*map(names, settings["optional-dependencies"].values()))
    text = (project_root() / "requirements.txt").read_text()
    pins = re.findall(r"^\w.*(?:\n    --hash=sha256:[0-9a-f]{64}(?: \\)?)+$", text, re.MULTILINE)
    assert direct - {"repairlib"} <= names(pins)
    assert len(pins) == len(re.findall(r"^\w", text, re.MULTILINE))  # pip wants hashes of all or of none
