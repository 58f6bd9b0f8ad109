"""The API reference, generated from the docstrings, has every public name."""

import importlib
import inspect
import re

import api
import pytest

import repairlib


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("api")
    api.write(folder)
    return folder


def public(module):
    """Public names of a module: those it lists, or the functions and classes that it defines."""
    if hasattr(module, "__all__"):
        return module.__all__
    found = inspect.getmembers(module, lambda value: inspect.isfunction(value) or inspect.isclass(value))
    return [name for name, value in found if not name.startswith("_") and value.__module__ == module.__name__]


@pytest.mark.parametrize("name", api.modules())
def test_every_public_name_is_in_the_reference(pages, name):
    page = (pages / f"{name.replace('.', '/')}.html").read_text()
    names = public(importlib.import_module(name))
    assert names and not [each for each in names if f'id="{each}"' not in page]


def test_every_public_name_of_the_package_has_a_docstring():
    assert not [name for name in repairlib.__all__ if not inspect.getdoc(getattr(repairlib, name))]


def test_the_index_links_every_page(pages):
    links = re.findall('href="(.*?)"', (pages / "index.html").read_text())
    assert len(links) == len(api.modules()) and all((pages / link).exists() for link in links)
