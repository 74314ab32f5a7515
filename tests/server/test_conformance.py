"""Every row of docs/compatibility.md, against a real server of a tiny random checkpoint."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests import tiny
from tests.server import conformance_chat, conformance_others
from tests.server.conformance import ROWS, Api, Row
from tests.servers import ServerProcess

assert conformance_chat
assert conformance_others


@pytest.fixture(scope="module")
def api() -> Iterator[Api]:
    """Its own server: `detail` shows only where a picture may have more than 512 x 512 pixels."""
    model = tiny.qwen2_vl(max_pixels=1024 * 1024)
    flags = ["--served-model-name", "tiny", "--allow-private-media", "--admin-api-key", "operator"]
    with ServerProcess([str(model), *flags]) as process:
        process.wait_ready()
        yield Api(process.base_url)
        assert process.terminate() == 0


def test_no_row_is_written_twice() -> None:
    ids = [row.id for row in ROWS]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_row(row: Row, api: Api) -> None:
    row.check(api)
