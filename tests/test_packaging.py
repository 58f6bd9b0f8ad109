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
    lines = (project_root() / "requirements.txt").read_text().splitlines()
    assert direct - {"repairlib"} <= names(line for line in lines if not line.startswith("#"))
