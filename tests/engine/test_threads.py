"""Two compute threads keep off each other's core while they work, and nobody else notices."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import pytest

from tests import tiny

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or len(os.sched_getaffinity(0)) < 2, reason="needs Linux and two processors"
)

SCRIPT = """
import json, os, sys, threading
import torch
from sightline.engine.threads import ComputeThreads

seen = {}

def look(name):
    seen[name] = sorted(os.sched_getaffinity(0))

def engine():
    torch.set_num_threads(2)
    threads = ComputeThreads()
    seen["helped"] = threads._other is not None
    look("before")
    with threads.all():
        look("inside")
        if threads._other is not None:
            seen["other"] = sorted(os.sched_getaffinity(threads._other))
        with threads.all():
            torch.ones(1 << 20).add_(1)
        look("still inside")
    look("after")
    thread = threading.Thread(target=look, args=("started after",))
    thread.start()
    thread.join()
    try:
        with threads.all():
            raise ZeroDivisionError
    except ZeroDivisionError:
        look("after an error")
    if threads._other is not None:
        threads._other = 2**22 + 1  # no process has this number
        with threads.all():
            look("helper gone")
    with threads.one():
        seen["one"] = torch.get_num_threads()
    seen["again"] = torch.get_num_threads()

# another pool of the process, as a user's own torch has one
torch.set_num_threads(2)
torch.ones(1 << 20).add_(1)
mine = {int(task): sorted(os.sched_getaffinity(int(task))) for task in os.listdir("/proc/self/task")}
thread = threading.Thread(target=engine)
thread.start()
thread.join()
seen["strangers alike"] = all(sorted(os.sched_getaffinity(task)) == cpus for task, cpus in mine.items())
print(json.dumps(seen))
"""


def run(script: str, *arguments: str, **env: str) -> dict:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_"))}
    command = [sys.executable, "-c", textwrap.dedent(script), *arguments]
    out = subprocess.run(command, env=clean | env, capture_output=True, text=True, timeout=120)
    assert out.returncode == 0, out.stderr
    return json.loads(out.stdout.splitlines()[-1])


def test_two_threads_are_held_apart_while_they_compute() -> None:
    seen = run(SCRIPT)
    everywhere = sorted(os.sched_getaffinity(0))
    assert seen["helped"]
    assert seen["inside"] == seen["still inside"]
    assert seen["inside"]
    assert seen["other"] == [cpu for cpu in everywhere if cpu not in seen["inside"]] != everywhere
    for when in ("before", "after", "started after", "after an error", "helper gone"):
        assert seen[when] == everywhere, when
    assert seen["strangers alike"]
    assert (seen["one"], seen["again"]) == (1, 2)


def test_what_the_user_has_placed_stays() -> None:
    seen = run(SCRIPT, OMP_PROC_BIND="false")
    assert not seen["helped"]
    assert seen["inside"] == seen["before"] == sorted(os.sched_getaffinity(0))


ENGINE = """
import json, os, sys, time
from pathlib import Path
from PIL import Image
from sightline import Engine, SamplingParams

def name_of(task):
    comm = Path("/proc/self/task") / str(task) / "comm"
    try:
        return comm.read_text().strip()
    except OSError:
        return "ended"

before = {int(task) for task in os.listdir("/proc/self/task")}
with Engine(sys.argv[1], num_threads=2, device="cpu") as engine:
    picture = Image.effect_noise((160, 120), 50).convert("RGB")
    content = [{"type": "image", "image": picture}, "What is it?"]
    engine.chat([{"role": "user", "content": content}], SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True))
    held = []
    for task in os.listdir("/proc/self/task"):
        if len(os.sched_getaffinity(int(task))) < len(os.sched_getaffinity(0)):
            held.append(name_of(task))
# the helper ends with the engine's thread, a moment later
deadline = time.monotonic() + 10
left = [None]
while left and time.monotonic() < deadline:
    time.sleep(0.05)
    left = [task for task in before if len(os.sched_getaffinity(task)) < len(os.sched_getaffinity(0))]
    left += [name for name in map(name_of, os.listdir("/proc/self/task")) if name.startswith("sl-omp-")]
print(json.dumps({"held": held, "left": left}))
"""


def test_an_offline_engine_holds_its_helper_alone() -> None:
    seen = run(ENGINE, str(tiny.qwen2_vl()))
    assert len(seen["held"]) == 1
    assert seen["held"][0].startswith("sl-omp-")
    assert seen["left"] == []
