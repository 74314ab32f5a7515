"""The dashboard and the alert rules speak of metrics that exist; tests/operations tries them against a real Prometheus."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import yaml

from sightline.dashboard import ALERTS, ROWS
from sightline.server.metrics import DEFINITIONS


def test_every_metric_named_is_exported() -> None:
    exported = {f"sightline_{d.name}" for d in DEFINITIONS}
    exported |= {
        f"sightline_{d.name}_{part}" for d in DEFINITIONS if d.kind == "histogram" for part in ("bucket", "sum")
    }
    expressions = [query.expr for _, panels in ROWS for panel in panels for query in panel.queries]
    expressions += [alert.expr for alert in ALERTS]
    named = {name for text in expressions for name in re.findall(r"sightline_\w+", text)}
    assert len(named) > 30
    assert named <= exported
    told = {name for alert in ALERTS for name in re.findall(r"sightline_\w+", alert.description)}
    assert told <= exported


def test_the_labels_matched_are_the_labels_exported() -> None:
    labels = {f"sightline_{d.name}": {*d.labels, "instance", "le"} for d in DEFINITIONS}
    for _, panels in ROWS:
        for panel in panels:
            for query in panel.queries:
                for name, matchers in re.findall(r"(sightline_\w+)\{([^}]*)\}", query.expr):
                    known = labels[re.sub("_(bucket|sum)$", "", name)]
                    assert set(re.findall(r"(\w+)=", matchers)) <= known, query.expr


def test_the_command_prints_both() -> None:
    def printed(*flags: str) -> str:
        command = [sys.executable, "-m", "sightline", "dashboard", *flags]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout

    dashboard = json.loads(printed())
    graphs = [panel for panel in dashboard["panels"] if panel["type"] == "timeseries"]
    assert len(graphs) == sum(len(panels) for _, panels in ROWS)
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    # Nothing lies over anything else.
    cells = [
        (x, y)
        for panel in dashboard["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
    rules = yaml.safe_load(printed("--alerts"))["groups"][0]["rules"]
    assert [rule["alert"] for rule in rules] == [alert.name for alert in ALERTS]
