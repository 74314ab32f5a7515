"""Pixels from the HTTP process to the engine, through files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sightline.engine.loop import PixelFiles, read_pixels
from sightline.types import PixelBuffer, Pixels


def _picture(side: int, colour: int) -> Pixels:
    return Pixels(np.full((side, side, 3), colour, dtype=np.uint8))


def _check(folder: Path, buffer: PixelBuffer, sent: Pixels) -> None:
    np.testing.assert_array_equal(read_pixels(folder, buffer).array, sent.array)


def test_a_file_that_was_read_is_written_again(tmp_path: Path) -> None:
    files = PixelFiles(tmp_path)
    inodes = set()
    # also by smaller and by larger pictures
    for colour, side in enumerate((40, 30, 1000, 40), start=1):
        sent = _picture(side, colour)
        buffer = files.write(b"digest", sent)
        inodes.add((tmp_path / buffer.name).stat().st_ino)
        _check(tmp_path, buffer, sent)
    assert len(inodes) == 1
    assert len([*tmp_path.iterdir()]) == 1


def test_what_was_not_read_yet_stays(tmp_path: Path) -> None:
    files = PixelFiles(tmp_path)
    sent = [_picture(20, colour) for colour in range(10)]
    buffers = [files.write(b"digest", pixels) for pixels in sent]
    assert len({buffer.name for buffer in buffers}) == 10
    for buffer, pixels in zip(buffers, sent, strict=True):
        _check(tmp_path, buffer, pixels)
    assert len([*tmp_path.iterdir()]) == 4, "files beyond the few are unlinked"


def test_a_large_one_leaves_nothing(tmp_path: Path) -> None:
    sent = _picture(1500, 7)
    _check(tmp_path, PixelFiles(tmp_path).write(b"digest", sent), sent)
    assert [*tmp_path.iterdir()] == []


def test_a_file_that_is_too_short_is_an_error(tmp_path: Path) -> None:
    buffer = PixelFiles(tmp_path).write(b"digest", _picture(20, 1))
    with (tmp_path / buffer.name).open("r+b") as file:
        file.truncate(100)
    with pytest.raises(EOFError, match="bytes early"):
        read_pixels(tmp_path, buffer)
