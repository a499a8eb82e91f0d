"""Who is where, and who talks to whom."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.errors import InputError
from parallel.mesh import Layout, Mesh

layouts = st.builds(Layout, pp=st.integers(1, 6), cp=st.integers(1, 5))


@given(layout=layouts)
def test_every_rank_has_one_place(layout):
    places = set()
    for rank in range(layout.world_size):
        mesh = Mesh(layout=layout, rank=rank)
        assert mesh.rank_of(mesh.stage, mesh.cp_rank) == rank
        assert rank in mesh.ranks_of(mesh.stage)
        places.add((mesh.stage, mesh.cp_rank))
    assert len(places) == layout.world_size


@given(layout=layouts)
def test_hidden_states_reach_every_rank_and_come_back(layout):
    edges = list(Mesh(layout=layout, rank=0).edges())
    assert len(set(edges)) == len(edges), "a direction between two ranks has one purpose"
    reached, grown = {0}, True
    while grown:
        more = {edge.target for edge in edges if edge.source in reached}
        grown = not more <= reached
        reached |= more
    assert reached == set(range(layout.world_size))
    if layout.world_size > 1:
        assert any(edge.target == 0 for edge in edges)


def test_the_edges_of_two_stages_by_two():
    edges = [(edge.source, edge.target) for edge in Mesh(layout=Layout(pp=2, cp=2), rank=0).edges()]
    assert edges == [(0, 1), (0, 2), (1, 3), (3, 2), (2, 0)]


def test_names():
    assert Mesh(layout=Layout(pp=3), rank=0).name(2) == "rank 2 (stage 2 of 3)"
    assert Mesh(layout=Layout(pp=2, cp=2), rank=0).name(3) == "rank 3 (stage 1 of 2, cp 1 of 2)"


def test_a_wrong_number_of_ranks_is_refused():
    Layout(pp=2, cp=2).check_world(4)
    with pytest.raises(InputError, match=r"--pp 2 x --cp 2 needs 4 ranks, but 3 were started"):
        Layout(pp=2, cp=2).check_world(3)


@pytest.mark.parametrize("figures", [{"pp": 0}, {"cp": -1}])
def test_nobody_cannot_work(figures):
    with pytest.raises(InputError, match="leaves nobody"):
        Layout(**figures)
