"""The free list: never partial, never twice, never foreign."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sightline.cache.page_pool import PagePool
from tests.cache.depth import DEPTH, deep


def test_page_zero_is_never_handed_out():
    pool = PagePool(5)
    assert pool.num_total == pool.num_free == 4
    pages = pool.alloc(4)
    assert pages is not None
    assert sorted(pages) == [1, 2, 3, 4]


def test_alloc_is_all_or_nothing():
    pool = PagePool(5)
    assert pool.alloc(5) is None
    assert pool.num_free == 4
    assert pool.alloc(0) == []
    assert len(pool.alloc(4) or []) == 4
    assert pool.alloc(1) is None


@pytest.mark.parametrize("bad", [[1, 1], [0], [5], [-1], [3]])
def test_wrong_free_raises_and_changes_nothing(bad: list[int]):
    pool = PagePool(5)
    taken = pool.alloc(2)
    assert taken == [1, 2]
    with pytest.raises(AssertionError):
        pool.free([2, *bad] if bad != [1, 1] else bad)
    assert pool.num_free == 2
    pool.free(taken)
    assert pool.num_free == 4
    pool.check_integrity()


def test_a_pool_needs_a_page_beside_the_null_page():
    with pytest.raises(ValueError):
        PagePool(1)


class PoolMachine(RuleBasedStateMachine):
    """Against a set of held pages."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(20)
        self.held: list[int] = []

    @rule(n=st.integers(0, 12))
    def alloc(self, n: int) -> None:
        before = self.pool.num_free
        pages = self.pool.alloc(n)
        assert (pages is None) == (n > before)
        if pages is not None:
            assert len(pages) == n
            assert not set(pages) & set(self.held)
            self.held += pages

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        pages = data.draw(st.lists(st.sampled_from(self.held), unique=True))
        self.pool.free(pages)
        self.held = [p for p in self.held if p not in pages]
        for page in pages[:1]:
            with pytest.raises(AssertionError):
                self.pool.free([page])

    @invariant()
    def counts_agree(self) -> None:
        self.pool.check_integrity()
        assert self.pool.num_free + len(self.held) == self.pool.num_total
        assert len(set(self.held)) == len(self.held)
        assert not any(self.pool.is_free(page) for page in self.held)


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = deep(60)
TestPoolMachine.pytestmark = [pytest.mark.check(21, cases=DEPTH * 60 * 50)]
