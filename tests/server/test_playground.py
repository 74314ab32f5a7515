"""The page at /, as a server's client sees it; tests/browser uses it as people do."""

from __future__ import annotations

import re
from pathlib import Path

import requests

from sightline.server import playground

HTML = {"accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
FOLDER = Path(playground.__file__).parent


def test_the_page_is_open_and_strict(keyed_server: str) -> None:
    page = requests.get(keyed_server, headers=HTML, timeout=5)
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self'" in policy
    assert "unsafe" not in policy
    assert page.headers["x-content-type-options"] == "nosniff"
    assert page.headers["referrer-policy"] == "no-referrer"


def test_everything_that_the_page_names_is_there(keyed_server: str) -> None:
    named = set(re.findall(r"""(?:src|href)="(playground/[^"]+)\"""", (FOLDER / "index.html").read_text()))
    for script in FOLDER.glob("*.js"):
        named |= {f"playground/{name}" for name in re.findall(r'from "\./([^"]+)"', script.read_text())}
    named |= {f"playground/samples/{name}" for name in re.findall(r'\["([\w.]+)", ', (FOLDER / "app.js").read_text())}
    assert len(named) >= 14
    for path in named:
        answer = requests.get(f"{keyed_server}/{path}", timeout=5)
        assert answer.status_code == 200, path
        assert answer.content
        assert "content-security-policy" in answer.headers
    assert (
        requests.get(f"{keyed_server}/playground/app.js", timeout=5)
        .headers["content-type"]
        .startswith("text/javascript")
    )


def test_nothing_comes_from_elsewhere_and_nothing_is_inline() -> None:
    for path in FOLDER.glob("*.*"):
        if path.suffix in (".html", ".js", ".css"):
            text = path.read_text()
            assert not re.search(r"https?://(?!www\.w3\.org/)", text), path.name
            assert not re.search(r"innerHTML|\beval\(|document\.write", text), path.name
    page = (FOLDER / "index.html").read_text()
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", page)


def test_only_the_page_is_open(keyed_server: str) -> None:
    for path in (
        "/playground/__init__.py",
        "/playground/nothing.js",
        "/playground/samples/../../app.py",
        "/playground/",
    ):
        answer = requests.get(keyed_server + path, timeout=5)
        assert answer.status_code == 401, path
        answer = requests.get(keyed_server + path, headers={"authorization": "Bearer alpha"}, timeout=5)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_url")
    assert requests.get(f"{keyed_server}/v1/models", timeout=5).status_code == 401
    assert requests.post(f"{keyed_server}/v1/images/preview", json={"images": []}, timeout=5).status_code == 401


def test_others_get_json(keyed_server: str) -> None:
    answer = requests.get(keyed_server, timeout=5)
    assert answer.headers["vary"] == "accept"
    assert answer.json()["name"] == "sightline"
    for path in (answer.json()["docs"], answer.json()["openapi"], answer.json()["ready"]):
        assert requests.get(keyed_server + path, timeout=5).status_code == 200
