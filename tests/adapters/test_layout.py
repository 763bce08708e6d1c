"""Layouts: which column is which number, against an independent listing."""

import json

import numpy as np
import pytest
from factories import sd15_layers
from hypothesis import example, given
from hypothesis import strategies as st

from lora_ws.adapters import LayerSpec, Layout
from lora_ws.errors import LayoutError

SIZES = st.integers(1, 9)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
LAYERS = st.lists(
    st.builds(LayerSpec, NAMES, SIZES, SIZES, st.integers(1, 3)),
    min_size=1,
    max_size=8,
    unique_by=lambda layer: layer.name,
)


def test_sd15_equals_an_independent_listing():
    layout = Layout.sd15_qv()
    assert [(x.name, x.in_features, x.out_features) for x in layout.layers] == sd15_layers()
    assert (len(layout.layers), len(layout.matrices)) == (64, 128)
    assert layout.size == 99_648 == 7 * 12_480 + 16 * 768


@pytest.mark.parametrize("rank", [2, 4])
def test_size_grows_with_the_rank(rank: int):
    assert Layout.sd15_qv(rank).size == rank * 99_648


def test_order_is_natural():
    names = [f"up_blocks.{k}.to_q" for k in (10, 2, 9, 1)]
    layout = Layout.from_layers(LayerSpec(name, 2, 2) for name in names)
    assert [x.name for x in layout.layers] == [f"up_blocks.{k}.to_q" for k in (1, 2, 9, 10)]


@given(LAYERS)
@example([LayerSpec("a1²", 1, 1)])
def test_columns_tile_the_vector(layers: list[LayerSpec]):
    layout = Layout.from_layers(layers)
    covered = np.concatenate([np.arange(layout.size)[m.columns] for m in layout.matrices])
    np.testing.assert_array_equal(covered, np.arange(sum(x.size for x in layers)))
    for matrix in layout.matrices:
        assert matrix.columns.stop - matrix.columns.start == np.prod(matrix.shape)


@given(LAYERS, st.integers(1, 3))
@example([LayerSpec("b", 2, 3, 2), LayerSpec("c", 2, 3), LayerSpec("a", 2, 3, 2)], 2)
def test_groups_gather_the_factors_of_every_module(layers: list[LayerSpec], adapters: int):
    layout = Layout(tuple(layers))
    rng = np.random.default_rng(0)
    down = [rng.standard_normal((adapters, x.rank, x.in_features)) for x in layers]
    up = [rng.standard_normal((adapters, x.out_features, x.rank)) for x in layers]
    flat = [m.reshape(adapters, -1) for pair in zip(down, up, strict=True) for m in pair]
    rows = np.concatenate(flat, axis=1)
    groups = layout.groups()
    for group in groups:
        assert group.layers == tuple(layers[place] for place in group.places)
        assert len({(x.in_features, x.out_features, x.rank) for x in group.layers}) == 1
        np.testing.assert_array_equal(
            rows[:, group.down], np.stack([down[place] for place in group.places], axis=1)
        )
        np.testing.assert_array_equal(
            rows[:, group.up], np.stack([up[place] for place in group.places], axis=1)
        )
    # Each module is in one group, groups and their modules in the layout's order.
    assert sorted(place for group in groups for place in group.places) == list(range(len(layers)))
    assert all(list(group.places) == sorted(group.places) for group in groups)
    assert [group.places[0] for group in groups] == sorted(group.places[0] for group in groups)
    # One group per shape, or the gathers would be more than they need be.
    assert len(groups) == len({(x.in_features, x.out_features, x.rank) for x in layers})


def test_groups_are_made_once_and_cannot_be_changed():
    layout = Layout.sd15_qv()
    assert layout.groups() is layout.groups()
    with pytest.raises(ValueError, match="read-only"):
        layout.groups()[0].down[0] = 0


def test_repr_is_one_short_line():
    text = repr(Layout((LayerSpec("a", 2, 3, 4), LayerSpec("b", 2, 3, 1))))
    assert text.startswith("Layout(2 layers, ranks 1 to 4, 25 parameters, ")
    assert repr(Layout((LayerSpec("a", 2, 3),))).startswith("Layout(1 layer, rank 1, 5 parameters,")


@given(LAYERS, st.randoms())
def test_order_of_arrival_does_not_matter(layers: list[LayerSpec], random):
    shuffled = random.sample(layers, len(layers))
    assert Layout.from_layers(shuffled) == Layout.from_layers(layers)


@given(LAYERS)
def test_json_round_trip(layers: list[LayerSpec]):
    layout = Layout(tuple(layers))
    again = Layout.from_dict(json.loads(json.dumps(layout.to_dict())))
    assert again == layout
    assert again.fingerprint == layout.fingerprint
    assert layout.difference(again) == ""


@pytest.mark.parametrize("field", ["in_features", "out_features", "rank", "name"])
@pytest.mark.parametrize("at", [0, 31, 63])
def test_fingerprint_changes_with_any_field(field: str, at: int):
    data = Layout.sd15_qv().to_dict()
    data["layers"][at][field] += "x" if field == "name" else 1
    assert Layout.from_dict(data).fingerprint != Layout.sd15_qv().fingerprint


A, B, C = LayerSpec("a", 2, 3), LayerSpec("b", 2, 3), LayerSpec("c", 4, 5)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ((A, B, C), ""),
        ((A,), "no layer `b` (and 1 more missing)"),
        ((A, B), "no layer `c`"),
        ((A, B, C, LayerSpec("d", 1, 1)), "extra layer `d`"),
        ((A, B, LayerSpec("c", 4, 5, 4)), "layer `c` has rank 4, expected rank 1"),
        ((A, LayerSpec("b", 9, 3), C), "layer `b` maps 9 to 3, expected 2 to 3"),
        ((B, A, C), "the same layers stand in another order"),
    ],
)
def test_difference_says_what_differs(other: tuple[LayerSpec, ...], message: str):
    assert Layout((A, B, C)).difference(Layout(other)) == message


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({}, "at least one layer"),
        ({"a": {"down": (1, 2)}}, "layer `a` has no `up`"),
        ({"a": {"up": (2, 1)}}, "layer `a` has no `down`"),
        ({"a": {"down": (1, 2), "up": (2, 1, 1, 1)}}, "`up` to be a matrix"),
        ({"a": {"down": (1, 2), "up": (3, 4)}}, "rank 1 (shape 1x2) but up has rank 4"),
        ({"a": {"down": (0, 2), "up": (3, 0)}}, "positive sizes"),
    ],
)
def test_impossible_shapes_are_refused(shapes: dict, message: str):
    with pytest.raises(LayoutError) as error:
        Layout.from_shapes(shapes)
    assert message in str(error.value)


def test_repeated_layer_is_refused():
    with pytest.raises(LayoutError, match="`a` more than once"):
        Layout((A, A))


def test_unknown_layout_lists_the_known():
    with pytest.raises(LayoutError, match="sd15_qv, tiny_sd_qv, got layout `sdxl`"):
        Layout.known("sdxl")
