"""Threads that decode pictures come after the others of their process, whatever its own priority is."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import asyncio, os, sys, threading
from sightline.prompt.decode_budget import DecodeBudget

os.nice(int(sys.argv[1]))

def niceness():
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

async def main():
    budget = DecodeBudget(100)
    inside = await budget.run(10, niceness)
    print(inside - niceness(), inside)
    budget.close()

asyncio.run(main())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere threads have no priority of their own")
@pytest.mark.parametrize("own", [0, 5, 15])
def test_decoding_threads_give_way(own: int) -> None:
    out = subprocess.run([sys.executable, "-c", SCRIPT, str(own)], capture_output=True, text=True, check=True)
    lower, absolute = map(int, out.stdout.split())
    assert lower == 10 or absolute == 19
