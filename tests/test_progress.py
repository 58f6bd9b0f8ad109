import sys

import pytest

from repairlib import progress


@pytest.mark.parametrize(
    "terminal, session, watched", [(True, None, True), (False, "a.ipynb", True), (False, None, False)]
)
def test_bars_are_for_terminals_and_notebooks_that_are_open(monkeypatch, capsys, terminal, session, watched):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    if session:
        monkeypatch.setenv("JPY_SESSION_NAME", session)
    for show in (True, False):
        with progress.bar(2, "doing", "thing", show) as bar:
            bar.update(2)
        out = capsys.readouterr().out
        assert ("doing: 100%" in out and "2/2" in out) == (watched and show) and (out == "") != (watched and show)
