import pytest

from companion.experiments.grids.combine import combined, overview
from companion.runs.models import parse
from companion.runs.train import parse_run


@pytest.mark.parametrize("scale", ["smoke", "quick", "fast", "paper"])
def test_every_scale_names_runs_that_exist(scale):
    found, narrow = combined(scale), combined(scale, width=1)
    for run in (found.resnet, found.tiny):
        assert parse_run(f"{run}/s{found.seeds[0]}").model.norm == "ln"
    assert [parse_run(f"{run}/s1").model.width for run in (narrow.resnet, narrow.tiny)] == [1, 1]
    assert overview()[scale]["tiny"] == found.tiny


def test_the_paper_is_as_printed():
    paper = combined("paper")
    assert parse(paper.resnet.split("/")[1]).width == 32 and parse(paper.tiny.split("/")[1]).width == 16
    assert paper.restarts == 1
    with pytest.raises(ValueError, match="the nearest is 'quick'"):
        combined("quik")
