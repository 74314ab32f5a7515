"""A real Prometheus scrapes a real server: every graph has data, every alert can fire and does when it should."""

from __future__ import annotations

import base64
import math
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from sightline import demo
from sightline.dashboard import ALERTS, ROWS, alert_rules
from tests.servers import ServerProcess, free_port

KEY = "a-key-for-prometheus"
QUERIES = [
    pytest.param(query.expr, id=f"{panel.title}: {query.legend}")
    for _, panels in ROWS
    for panel in panels
    for query in panel.queries
]

for tool in ("prometheus", "promtool"):
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed (make test-operations)", allow_module_level=True)


@pytest.fixture(scope="module")
def rules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rules") / "alerts.yaml"
    path.write_text(yaml.safe_dump(alert_rules(), sort_keys=False))
    return path


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with ServerProcess(["--api-key", KEY, "--allow-private-media"]) as process:
        process.wait_ready()
        yield process


@pytest.fixture(scope="module")
def prometheus(server: ServerProcess, rules: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """With what docs/operations.md says to scrape with, every half second."""
    folder = tmp_path_factory.mktemp("prometheus")
    (folder / "key").write_text(KEY)
    config = {
        "global": {"scrape_interval": "500ms", "evaluation_interval": "500ms"},
        "rule_files": [str(rules)],
        "scrape_configs": [
            {
                "job_name": "sightline",
                "authorization": {"credentials_file": str(folder / "key")},
                "static_configs": [{"targets": [f"127.0.0.1:{server.port}"]}],
            }
        ],
    }
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_port()}"
    command = [
        "prometheus",
        f"--config.file={folder / 'prometheus.yaml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={address}",
    ]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_until(lambda: answers(f"http://{address}/-/ready"), "Prometheus is ready")
        wait_until(lambda: values(f"http://{address}", 'up{job="sightline"} == 1'), "the server is scraped")
        traffic(server)
        wait_until(lambda: values(f"http://{address}", "sum(sightline_choices_total) >= 3"), "the traffic is scraped")
        time.sleep(2)
        traffic(server)
        time.sleep(1.5)
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait(20)


def answers(url: str) -> bool:
    try:
        return requests.get(url, timeout=5).status_code == 200
    except requests.ConnectionError:
        return False


def wait_until(condition: Any, what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, f"not within a minute: {what}"
        time.sleep(0.1)


def values(prometheus: str, expr: str) -> list[float]:
    answer = requests.get(f"{prometheus}/api/v1/query", params={"query": expr}, timeout=10).json()
    assert answer["status"] == "success", (expr, answer)
    return [float(sample["value"][1]) for sample in answer["data"]["result"]]


def traffic(server: ServerProcess) -> None:
    """Pictures by data and by URL, the same ones again, mistakes."""
    url = f"{server.base_url}/v1/chat/completions"
    headers = {"Authorization": f"Bearer {KEY}"}

    def ask(picture: str, **fields: object) -> int:
        content = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": "What is it?"}]
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": 12, **fields}
        return requests.post(url, json=body, headers=headers, timeout=60).status_code

    def data(name: str) -> str:
        return f"data:image/png;base64,{base64.b64encode(demo.sample_path(name).read_bytes()).decode()}"

    assert {ask(data(name)) for name in ("shapes.png", "word.png", "shapes.png")} == {200}
    assert ask(f"{server.base_url}/playground/samples/none.png") == 400
    assert ask(data("shapes.png"), model="unknown") == 404
    assert ask("data:image/png;base64,AAAA") == 400


@pytest.mark.parametrize("expr", QUERIES)
def test_every_graph_has_data(prometheus: str, expr: str) -> None:
    concrete = expr.replace("$__rate_interval", "1m").replace("$instance", ".*")
    found = values(prometheus, concrete)
    assert found, concrete
    assert not any(math.isnan(value) for value in found), concrete


def test_the_rules_are_loaded_and_quiet(prometheus: str, rules: Path) -> None:
    subprocess.run(["promtool", "check", "rules", str(rules)], check=True, capture_output=True)
    groups = requests.get(f"{prometheus}/api/v1/rules", timeout=10).json()["data"]["groups"]
    found = {rule["name"]: rule for rule in groups[0]["rules"]}
    assert set(found) == {alert.name for alert in ALERTS}
    assert {rule["health"] for rule in found.values()} == {"ok"}
    assert {name for name, rule in found.items() if rule["state"] == "firing"} == set()


def series(name: str, values: str, **labels: str) -> dict[str, str]:
    matchers = ", ".join(f'{key}="{value}"' for key, value in {"instance": "a:8000", **labels}.items())
    return {"series": f"{name}{{{matchers}}}", "values": values}


# What an hour looks like in which the alert must fire at its end, and one in which it must not.
CASES = {
    "SightlineNotReady": (
        [series("sightline_state", "0x60", state="ready"), series("sightline_state", "1x60", state="loading")],
        [series("sightline_state", "0x10 1x49", state="ready")],
    ),
    "SightlineEngineLost": (
        [series("sightline_engines_alive", "1x60"), series("sightline_engines", "2x60")],
        [series("sightline_engines_alive", "2x60"), series("sightline_engines", "2x60")],
    ),
    "SightlineStandsStill": (
        [series("sightline_requests_running", "3x60", engine="0"), series("sightline_steps_total", "700x60", engine="0")],
        [series("sightline_requests_running", "3x60", engine="0"), series("sightline_steps_total", "0+700x60", engine="0")],
    ),
    "SightlineFailing": (
        [series("sightline_calls_total", "0+5x60", outcome="failed"), series("sightline_calls_received_total", "0+100x60")],
        [series("sightline_calls_total", "0+1x60", outcome="failed"), series("sightline_calls_received_total", "0+100x60")],
    ),
    "SightlineRefusing": (
        [series("sightline_calls_total", "0+10x60", outcome="refused"), series("sightline_calls_received_total", "0+100x60")],
        [series("sightline_calls_total", "0+10x60", outcome="rejected"), series("sightline_calls_received_total", "0+100x60")],
    ),
    "SightlineSlowFirstToken": (
        [series("sightline_time_to_first_token_seconds_bucket", values, le=le) for le, values in (("5", "0+1x60"), ("10", "0+100x60"), ("+Inf", "0+100x60"))],
        [series("sightline_time_to_first_token_seconds_bucket", values, le=le) for le, values in (("5", "0+99x60"), ("10", "0+100x60"), ("+Inf", "0+100x60"))],
    ),
    "SightlineSetBack": (
        [series("sightline_retractions_total", "0+30x60", engine="0")],
        [series("sightline_retractions_total", "0+1x60", engine="0")],
    ),
    "SightlinePagesLost": (
        [series("sightline_kv_pages_lost", "2x60", engine="0"), series("sightline_kv_pages_lost", "0x60", engine="1")],
        [series("sightline_kv_pages_lost", "0x60", engine="0")],
    ),
    "SightlinePicturesUnreachable": (
        [series("sightline_pictures_total", "0+70x60", source="https", result="ok"), series("sightline_pictures_total", "0+30x60", source="https", result="failed_to_download_image")],
        [series("sightline_pictures_total", "0+70x60", source="https", result="ok"), series("sightline_pictures_total", "0+30x60", source="data", result="invalid_base64_image")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert.name)
def test_an_alert_fires_when_it_should_and_only_then(alert: Any, rules: Path, tmp_path: Path) -> None:
    bad, good = CASES[alert.name]
    # promtool wants what is firing in full, texts included: ask it for the count instead.
    firing = f'count(ALERTS{{alertname="{alert.name}", alertstate="firing"}}) or vector(0)'

    def case(inputs: list[dict[str, str]], count: int) -> dict[str, Any]:
        expected = [{"labels": "{}", "value": count}]
        return {
            "interval": "1m",
            "input_series": inputs,
            "promql_expr_test": [{"expr": firing, "eval_time": "59m", "exp_samples": expected}],
        }

    path = tmp_path / "test.yaml"
    tests = [case(bad, 1), case(good, 0)]
    path.write_text(yaml.safe_dump({"rule_files": [str(rules)], "evaluation_interval": "1m", "tests": tests}))
    done = subprocess.run(["promtool", "test", "rules", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
