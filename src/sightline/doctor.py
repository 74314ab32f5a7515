"""`sightline doctor`: what this machine has, and whether the installation answers truthfully."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
import time


def report() -> bool:
    """Print the facts that a bug report needs; False when something is missing that serving needs."""
    import sightline

    ok = True
    print(f"sightline   {sightline.__version__}")
    print(
        f"python      {platform.python_version()} on {platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    )
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        print("torch       missing; install a CPU or CUDA build of torch >= 2.11")
        return False
    from sightline.engine.loop import limit_spinning

    limit_spinning()
    try:
        import torch
    except (ImportError, OSError) as error:
        print(f"torch       {version} cannot be loaded: {error}")
        return False
    cuda = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none; the model runs on the CPU"
    print(f"torch       {version}")
    print(f"gpu         {cuda}")
    for package in ("tokenizers", "safetensors", "pillow", "pyzmq", "fastapi", "uvicorn"):
        try:
            print(f"{package:<11} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"{package:<11} missing")
            ok = False
    return ok


def selftest() -> bool:
    """Ask the bundled model every golden question through the production path, compare, and print a table."""
    from sightline import demo
    from sightline.engine.offline import Engine
    from sightline.types import SamplingParams

    started = time.monotonic()
    failures = 0
    with Engine(None) as engine:
        print(f"bundled     {demo.MODEL_ID}, loaded in {time.monotonic() - started:.1f} s")
        for entry in demo.golden():
            answer = engine.chat(entry.messages, SamplingParams(temperature=0.0, max_tokens=128)).text
            good = answer.strip() == entry.answer.strip()
            failures += not good
            print(f"{'ok  ' if good else 'FAIL'}        {entry.name}: {answer.strip()}")
            if not good:
                print(f"            expected: {entry.answer.strip()}", file=sys.stderr)
    print(f"selftest    {'failed' if failures else 'passed'} in {time.monotonic() - started:.1f} s")
    return not failures
