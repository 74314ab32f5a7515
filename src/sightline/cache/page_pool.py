"""The free list of K/V pages."""

from __future__ import annotations

from collections.abc import Iterable


class PagePool:
    """Hands out page numbers 1 .. num_pages - 1. Page 0 is the null page, where padding may write.

    A page is free (here), or owned by exactly one request or by the prefix cache. The pool knows only free or not; a
    page freed twice, or one that it never had, is a bug and raises AssertionError before anything changes.
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages < 2:
            raise ValueError(f"a pool of {num_pages} pages has none beside the null page")
        self.num_total = num_pages - 1
        # A stack: the page freed last is used first, while it is still warm.
        self._free = list(range(num_pages - 1, 0, -1))
        self._is_free = bytearray(b"\1" * num_pages)
        self._is_free[0] = 0

    @property
    def num_free(self) -> int:
        return len(self._free)

    def alloc(self, n: int) -> list[int] | None:
        """n pages, or None and nothing taken when fewer are free."""
        assert n >= 0
        if n > len(self._free):
            return None
        split = len(self._free) - n
        pages = self._free[split:][::-1]
        del self._free[split:]
        for page in pages:
            self._is_free[page] = 0
        return pages

    def free(self, pages: Iterable[int]) -> None:
        """Take pages back."""
        pages = list(pages)
        assert len(set(pages)) == len(pages), f"a page is freed twice in one call: {pages}"
        for page in pages:
            assert 0 < page <= self.num_total, f"page {page} is not of this pool"
            assert not self._is_free[page], f"page {page} is freed twice"
        for page in reversed(pages):
            self._is_free[page] = 1
            self._free.append(page)

    def is_free(self, page: int) -> bool:
        """For integrity checks."""
        return bool(self._is_free[page])

    def check_integrity(self) -> None:
        """Assert that list and flags agree."""
        assert len(set(self._free)) == len(self._free), "a page is listed twice"
        assert sum(self._is_free) == len(self._free), "flags and list differ"
        assert all(self._is_free[page] for page in self._free), "a listed page is flagged as used"
        assert not self._is_free[0], "the null page is free"
