"""What every test starts from: its own folders for runs and figures, one thread, random numbers that do not vary."""

import pytest
import torch


@pytest.fixture(autouse=True)
def fresh_roots(tmp_path_factory, monkeypatch):
    """Empty folders for runs, networks that come with the repository and figures: no test sees the checkout's.

    What the environment says of training and of results is not seen either.
    """
    root = tmp_path_factory.mktemp("roots")
    monkeypatch.setenv("REPAIRLIB_RUNS", str(root / "runs"))
    monkeypatch.setenv("REPAIRLIB_NETWORKS", str(root / "networks"))
    monkeypatch.setenv("REPAIRLIB_FIGURES", str(root / "figures"))
    for variable in ("TRAIN", "GRAPH", "COMMIT"):
        monkeypatch.delenv(f"REPAIRLIB_{variable}", raising=False)


@pytest.fixture(autouse=True)
def reproducible():
    """One thread and a fixed global seed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with one small notebook, whose kernels find this repairlib."""
    import batch  # these here, as few tests need them
    import jobs
    import needs
    from small_notebooks import write_notebook

    from companion.figures import gallery
    from companion.runs.data import project_root

    monkeypatch.setenv("PYTHONPATH", str(project_root()))
    for module in (batch, needs, gallery, jobs):
        monkeypatch.setattr(module, "project_root", lambda: tmp_path)
    write_notebook(tmp_path)
    return tmp_path
