import pytest

from companion.experiments.triples import agreement_rows, load_triple, transitivity_rows, triangle_rows
from repairlib.interpolate import interpolate_models, mix_states, with_state

RUN = "digits/mlp2-ln-w16/smoke"


@pytest.fixture(scope="module")
def triple():
    return load_triple(RUN, (1, 2, 3), restarts=2)


def test_the_order_of_units_changes_no_network(triple):
    for trained, ordered in zip((triple.a, triple.pair.a, triple.pair.b), triple.through_a.models, strict=True):
        assert triple.pair.evaluate(ordered) == pytest.approx(triple.pair.evaluate(trained), abs=1e-6)


def test_paths_from_b_to_c_share_their_ends_and_go_through_what_they_name(triple):
    rows = transitivity_rows(triple, (alpha for alpha in (0, 0.5, 1)))
    assert [(row["matching"], row["alpha"]) for row in rows] == [
        (matching, alpha) for matching in ("through A", "directly", "none") for alpha in (0, 0.5, 1)
    ]
    ends = [triple.pair.evaluate(model)[0] for model in (triple.pair.a, triple.pair.b)]
    for path in (rows[:3], rows[3:6], rows[6:]):
        assert [path[0]["loss"], path[2]["loss"]] == pytest.approx(ends, abs=1e-5)
    between = [triple.through_a.models[1:], (triple.pair.a, triple.pair.aligned), (triple.pair.a, triple.pair.b)]
    expected = [triple.pair.evaluate(interpolate_models(*models, 0.5))[0] for models in between]
    assert [row["loss"] for row in rows[1::3]] == pytest.approx(expected, abs=1e-5)


def test_the_triangle_has_all_three_networks_in_its_corners(triple):
    rows = triangle_rows(triple, steps=2)
    assert [row["matching"] for row in rows] == ["WM"] * 6 + ["none"] * 6
    models = (triple.a, triple.pair.a, triple.pair.b)
    for matching in ("WM", "none"):
        corners = {w: row["loss"] for row in rows for w in ("w_a", "w_b", "w_c")
                   if row["matching"] == matching and row[w] == 1}  # fmt: skip
        assert list(corners.values()) == pytest.approx([triple.pair.evaluate(model)[0] for model in models], abs=1e-5)
    middle = with_state(triple.a, mix_states([model.state_dict() for model in triple.through_a.models], (0.5, 0.5, 0)))
    assert rows[1]["loss"] == pytest.approx(triple.pair.evaluate(middle)[0], abs=1e-5)


def test_agreement_is_whole_when_all_three_are_one_network():
    assert {row["agreement"] for row in agreement_rows(load_triple(RUN, (1, 1, 1)))} == {1.0}
    rows = agreement_rows(load_triple(RUN, (1, 2, 3)))
    assert {row["units"] for row in rows} == {16} and all(0 <= row["agreement"] <= 1 for row in rows)
