"""The same as `sightline.test_utils`, so that a page runs when only the package's name is changed."""

from sightline.test_utils import is_in_ci

__all__ = ["is_in_ci"]
