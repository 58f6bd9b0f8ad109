"""Notebooks show every picture that they make, and none of them twice."""

from pathlib import Path

import pytest

jupytext = pytest.importorskip("jupytext")
nbclient = pytest.importorskip("nbclient")
NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"


def pictures_of(notebook: str, monkeypatch, folder: Path) -> list[str]:
    """The pictures (base64) that the outputs of a notebook hold after it was executed at smoke."""
    monkeypatch.setenv("REPAIRLIB_SCALE", "smoke")
    monkeypatch.setenv("REPAIRLIB_FIGURES", str(folder))
    book = jupytext.read(NOTEBOOKS / f"{notebook}.py")
    nbclient.NotebookClient(book, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()
    outputs = [output for cell in book.cells for output in cell.get("outputs", [])]
    return [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]


@pytest.mark.filterwarnings("ignore")  # of the kernel's own start
@pytest.mark.parametrize("notebook", ["00_quickstart", "repair/05_3_width_depth"])
def test_every_picture_is_shown_once(notebook, monkeypatch, tmp_path):
    shown = pictures_of(notebook, monkeypatch, tmp_path)
    saved = list(tmp_path.rglob("*.png"))
    assert len(shown) == len(set(shown)) >= max(1, len(saved)), (len(shown), saved)
