"""Write docs/reliability.md from what the tests reported: `make soak`, or `python scripts/write_reliability.py REPORT.json ...`.

A row that the reports have no test of stays as it is in docs/reliability.json, with the day and the commit of its run.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reliability.md"
DATA = PAGE.with_suffix(".json")

CHECKS = {
    1: ("clients cut off at random points", 2000),
    2: ("a closed socket reaches the scheduler within 1 s", 500),
    3: ("a client that goes closes the outbound fetch within 1 s", 200),
    4: ("kill -9: clients know within 2 s, exit 7, nothing is left", 50),
    5: ("a stopped engine is found out (here on a CPU)", 1),
    6: ("SIGTERM with requests in flight drops none", 64),
    7: ("SIGTERM and streams that would not end", 2),
    8: ("faults at start: exit code of the docs, no traceback", 20),
    9: ("probes through start, service and drain", 1),
    10: ("ten times too much load", 6000),
    11: ("refused before any fetch or decode", 500),
    12: ("deadlines of the queue and of the run", 200),
    13: ("readers that stop; silent streams", 100),
    14: ("four times the K/V memory changes no answer", 400),
    15: ("prompts longer than everything", 100),
    16: ("poisoned requests among strangers", 5000),
    17: ("special tokens typed by a user", 42),
    18: ("pages at idle: free + cached = total", 1),
    19: ("the same at every step (in the simulation)", None),
    21: ("state machines of pool, radix tree and vision cache", 100_000),
    22: ("simulated engines, and planted bugs that they find", 10_000),
    27: ("hostile URLs, and the host checked is the host dialled", 10_060),
    28: ("redirects off the allow-list", 20),
    29: ("resolvers that change their minds", 20),
    30: ("fetching: the limit is wall clock", 4),
    31: ("fetching: the limit is bytes", 5),
    32: ("no client's path is ever opened", 12),
    33: ("bad pictures: 4xx, no address, no path", 400),
    34: ("bombs inside the pixel limit; memory of decoding", 32),
    35: ("odd pictures, the same by every way", 40),
    36: ("every route without a key", 500),
    37: ("small requests that ask for much", 60),
    38: ("hostile schemas and regular expressions", 40),
    39: ("noise and smuggling on the wire", 20_000),
    40: ("tenants' caches; strangers on the engine's socket", 200),
}

HEAD = """# Reliability

<!-- Written by `make soak` from what the tests reported. -->

What the server survives, and the tests that show it. The tests run in `make test` at a tenth of the counts; `make soak` runs them at
`SCALE=1` and writes this page. Each row says of which day and commit it is, and `reliability.json` beside this page has the seeds too. A
check that failed is listed as failing, one without a test as not shown. Times are those of the machine named, which other work may have
slowed.

| check | | cases | of | result | run | measured |
|---|---|---|---|---|---|---|
"""

TAIL = """
What a row passes is what its tests assert, which is less than the full check where this list says so:

- 10: ten minutes at the full counts. Before and after are taken beside as many invalid requests, which the engine never sees.
- 34: of text requests meanwhile the median is bounded, by a fifth and 10 ms more than alone. The p99 is not: on two cores it is several times that.
- 35: the pixels of each mode are asserted by tests/prompt/test_media.py, here that every way gives the same answer.
- 38: others' gaps meanwhile are measured, not bounded: finding what a hostile grammar allows next may take a fifth of a second.
- 39: changed, doubled and cut bytes of one request; requests generated from the schema are tests/server/test_openapi.py.
- 40: an area under the curve of 0.5 has a standard deviation of 0.04 for 200 samples; the bound is four of them.
- 5 stops a process on a CPU, not a device. 20, 23, 24, 25 and 26 need a device or days and are not here.
"""


def rows(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Number of the check -> its row, for those that the report has tests of."""
    groups: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for name, test in report["tests"].items():
        for number in test["checks"]:
            groups[number].append({**test, "name": name})
    # The simulation asks both after each step.
    if simulations := [test for test in groups.get(22, ()) if "every_answer" in test["name"]]:
        groups[19] = simulations
    found = {}
    for number, tests in groups.items():
        failed = [test["name"].rpartition("::")[2] for test in tests if not test["passed"]]
        found[str(number)] = {
            "cases": sum(int(test["cases"]) for test in tests),
            "result": f"**fails**: {', '.join(failed)}" if failed else "passes",
            "measured": "; ".join(sorted({str(test["measured"]) for test in tests if test.get("measured")})),
            **report["about"],
        }
    return found


def page(known: dict[str, dict[str, Any]]) -> str:
    """The page for the rows of the last reports."""
    lines = []
    for number, (title, full) in CHECKS.items():
        row = known.get(str(number))
        cells: list[object] = [number, title, "", full or "", "not shown", "", ""]
        if row is not None:
            run = ", ".join(filter(None, (row["date"], row.get("commit"), row["machine"])))
            run += "" if row["scale"] == 1 else f", scale {row['scale']:g}"
            cells = [
                number,
                title,
                row["cases"] or "",
                full or "",
                row["result"],
                run,
                row["measured"].replace("|", "/"),
            ]
        lines.append(f"| {' | '.join(map(str, cells))} |\n")
    return HEAD + "".join(lines) + TAIL


if __name__ == "__main__":
    known = json.loads(DATA.read_text()) if DATA.exists() else {}
    for path in sys.argv[1:]:
        known |= rows(json.loads(Path(path).read_text()))
    DATA.write_text(json.dumps({number: known[number] for number in sorted(known, key=int)}, indent=1) + "\n")
    PAGE.write_text(page(known))
