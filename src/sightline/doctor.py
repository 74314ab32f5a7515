"""`sightline doctor`: what this machine has, what fits it, what is wrong with it and how to mend that; and whether the
installation answers truthfully. What can be known without torch is said before torch is imported."""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import json
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

_GIB = 2**30
_PACKAGES = (
    "pydantic", "msgspec", "numpy", "tokenizers", "safetensors", "pillow", "pyzmq", "fastapi", "uvicorn", "httpx2", "llguidance",
    "prometheus-client",
)  # fmt: skip
# Weights of the releases in billions of parameters; what serving needs beside them in GiB: activations, pictures, K/V pages.
RELEASES = {
    "Qwen2-VL-2B": 2.21,
    "Qwen2-VL-7B": 8.29,
    "Qwen2.5-VL-7B": 8.29,
    "LLaVA-1.5-7B": 7.06,
    "LLaVA-NeXT-Llama3-8B": 8.36,
    "LLaVA-OneVision-7B": 8.03,
    "Llama-3.2-11B-Vision": 10.67,
}
_BESIDE = 3.0
_MANY_FILES = 4096
_SHARED_MEMORY = 1.0
_DISK = 20.0

Verdict = Literal["ok", "warn", "fail"]


class Finding(NamedTuple):
    """One line of the report. fix: what to do about it, unless it is ok."""

    name: str
    value: str
    verdict: Verdict = "ok"
    fix: str = ""


def findings() -> Iterator[Finding]:
    """All of them, the quick ones first."""
    packages = _packages()
    yield from (_python(), packages, _processor(), _memory(), _shared_memory(), _disk(), _files(), _hub())
    driver, gpus = _driver()
    yield driver
    # What follows imports our own modules, and they the packages.
    if packages.verdict == "fail":
        return
    yield _address()
    torch = _torch(bool(gpus))
    yield torch
    if torch.verdict != "fail":
        yield from _device(gpus)


def report(as_json: bool = False, out: Callable[[str], object] = print) -> bool:
    """Print them as they are found; False when something is wrong that serving needs."""
    found = []
    for finding in findings():
        found.append(finding)
        if not as_json:
            out(f"{finding.name:<13} {finding.value}")
            if finding.verdict != "ok":
                out(f"{'':<13} {'warning' if finding.verdict == 'warn' else 'PROBLEM'}: {finding.fix}")
    ok = all(finding.verdict != "fail" for finding in found)
    if as_json:
        out(json.dumps({"ok": ok, "findings": [finding._asdict() for finding in found]}, indent=2))
    return ok


# -- without torch -----------------------------------------------------------------------------------------------------


def _python() -> Finding:
    import sightline

    value = f"{sightline.__version__}, Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.platform != "linux":
        return Finding("sightline", value, "warn", "only Linux is tested")
    return Finding("sightline", value)


def _processor() -> Finding:
    cores, quota = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1, _cgroup("cpu.max")
    value = f"{cores} cores"
    if quota is not None and quota.split()[0] != "max":
        limit, period = map(int, quota.split())
        value += f", limited to {limit / period:g}"
        if limit / period < 2:
            return Finding(
                "processor", value, "warn", "give the container two cores at least; pictures are decoded on them"
            )
    return Finding("processor", value)


def _memory() -> Finding:
    total, available = _memory_gib()
    value = f"{total:.1f} GiB, {available:.1f} available"
    if available < 2:
        return Finding(
            "memory", value, "warn", "the model in the box needs 1 GiB, others their weights: end other programs"
        )
    return Finding("memory", value)


def _memory_gib() -> tuple[float, float]:
    """(all, available) of this machine or container."""
    facts = (
        dict(re.findall(r"^(\w+):\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.M))
        if sys.platform == "linux"
        else {}
    )
    total, available = (int(facts.get(name, 0)) * 1024 / _GIB for name in ("MemTotal", "MemAvailable"))
    limit = _cgroup("memory.max")
    if limit is not None and limit.isdigit() and int(limit) / _GIB < total:
        used = int(_cgroup("memory.current") or 0) / _GIB
        total, available = int(limit) / _GIB, min(available, int(limit) / _GIB - used)
    return total, available


def _cgroup(name: str) -> str | None:
    try:
        return Path("/sys/fs/cgroup", name).read_text().strip()
    except OSError:
        return None


def _shared_memory() -> Finding:
    if not os.path.isdir("/dev/shm"):
        return Finding("shared memory", "no /dev/shm; pictures travel through the folder for temporary files")
    free = shutil.disk_usage("/dev/shm").free / _GIB
    if free < _SHARED_MEMORY:
        return Finding(
            "shared memory", f"{free:.2f} GiB free in /dev/shm", "warn",
            "large pictures in flight may not fit: docker run --shm-size 4g, or an emptyDir of medium Memory in Kubernetes",
        )  # fmt: skip
    return Finding("shared memory", f"{free:.1f} GiB free in /dev/shm")


def _disk() -> Finding:
    """Where downloads go."""
    home = os.environ.get("HF_HUB_CACHE") or os.path.join(os.environ.get("HF_HOME", "~/.cache/huggingface"), "hub")
    folder = Path(home).expanduser()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free / _GIB
    value = f"{free:.0f} GiB free for downloads in {folder}"
    if not os.access(there, os.W_OK):
        return Finding("disk", value, "warn", f"{there} cannot be written: set HF_HOME to a folder that can")
    if free < _DISK:
        return Finding("disk", value, "warn", "a model of 7 billion parameters takes 16 GiB: make room, or set HF_HOME")
    return Finding("disk", value)


def _files() -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < _MANY_FILES:
        fix = f"each client takes one: ulimit -n {_MANY_FILES}, or LimitNOFILE= in the unit"
        return Finding("open files", f"at most {soft}", "warn", fix)
    return Finding("open files", f"at most {soft}")


def _address() -> Finding:
    from sightline.config import ServerConfig

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            config = ServerConfig.load([])
    except SystemExit:
        words = said.getvalue().strip().splitlines() or ["a setting cannot be read"]
        return Finding("settings", words[-1], "fail", "correct it in the environment (SIGHTLINE_...)")
    host, port = config.host, config.port
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        fix = "a server runs there already, or --host and --port must name an address of this machine"
        return Finding("address", f"{host}:{port}: {error.strerror}", "warn", fix)
    return Finding("address", f"{host}:{port} is free")


def _packages() -> Finding:
    found, missing = [], []
    for package in _PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(package)
    if missing:
        return Finding("packages", ", ".join(found), "fail", f"pip install {' '.join(missing)}")
    return Finding("packages", ", ".join(found))


def _hub() -> Finding:
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    token = "with a token" if os.environ.get("HF_TOKEN") else "without a token: gated models (Llama) need HF_TOKEN"
    return Finding("hub", "offline (HF_HUB_OFFLINE): only what is downloaded already" if offline else token)


def _driver() -> tuple[Finding, list[str]]:
    """The NVIDIA driver's own word, and its GPUs."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except FileNotFoundError:
        return Finding("driver", "no NVIDIA driver; the model runs on the CPU"), []
    except subprocess.TimeoutExpired:
        return Finding("driver", "nvidia-smi does not answer", "warn", "the driver hangs: restart the machine"), []
    if done.returncode != 0:
        said = (done.stdout or done.stderr).strip().splitlines() or ["no word"]
        fix = "the CPU serves; for the GPU nvidia-smi must work: load or reinstall the driver; in a container, start it with --gpus all"
        return Finding("driver", f"nvidia-smi fails: {said[0]}", "warn", fix), []
    gpus = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    version = gpus[0].rpartition(", ")[2] if gpus else "?"
    return Finding("driver", f"NVIDIA {version}, {len(gpus)} GPU{'s' * (len(gpus) != 1)}"), gpus


# -- with torch --------------------------------------------------------------------------------------------------------


def _torch(has_gpu: bool) -> Finding:
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return Finding("torch", "missing", "fail", "install a CPU or CUDA build of torch >= 2.11")
    from sightline.engine.loop import limit_spinning

    limit_spinning()
    try:
        import torch
    except (ImportError, OSError) as error:
        return Finding(
            "torch", f"{version} cannot be loaded: {error}", "fail", "reinstall it: pip install --force-reinstall torch"
        )
    value = f"{version}, built for {f'CUDA {torch.version.cuda}' if torch.version.cuda else 'CPUs alone'}"
    if has_gpu and torch.version.cuda is None:
        fix = "this build cannot use the GPU: install the CUDA build (https://pytorch.org/get-started/locally)"
        return Finding("torch", value, "warn", fix)
    if has_gpu and not torch.cuda.is_available():
        fix = f"torch finds no GPU though the driver does: the driver is too old for CUDA {torch.version.cuda}, or CUDA_VISIBLE_DEVICES hides it"
        return Finding("torch", value, "warn", fix)
    return Finding("torch", value)


def _device(gpus: list[str]) -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        total = _memory_gib()[0]
        yield Finding("device", f"CPU, float32, {torch.get_num_threads()} threads")
        yield _fits(total * 0.8, 4, "of memory in float32")
        return
    for i in range(torch.cuda.device_count()):
        facts: Any = torch.cuda.get_device_properties(i)
        free, total = torch.cuda.mem_get_info(i)
        value = f"{facts.name}, {total / _GIB:.0f} GiB, {free / _GIB:.0f} free, compute capability {facts.major}.{facts.minor}"
        if facts.major < 8:
            fix = "older than Ampere: bfloat16 is slow there; --dtype float16"
            yield Finding(f"device cuda:{i}", value, "warn", fix)
        elif free < total / 2:
            yield Finding(f"device cuda:{i}", value, "warn", "others use half of it or more; nvidia-smi says who")
        else:
            yield Finding(f"device cuda:{i}", value)
    yield _kernels()
    yield _fits(torch.cuda.mem_get_info(0)[0] / _GIB * 0.9, 2, "of cuda:0 in bfloat16")


def _kernels() -> Finding:
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return Finding("kernels", "no triton", "fail", "pip install triton, in the version that torch names")
    if not any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))):
        return Finding(
            "kernels", f"triton {version}, no C compiler", "fail", "triton needs one: apt-get install gcc libc6-dev"
        )
    return Finding("kernels", f"triton {version}")


def _fits(room: float, bytes_each: int, where: str) -> Finding:
    """room: GiB."""
    sizes = {name: billions * 1e9 * bytes_each / _GIB for name, billions in RELEASES.items()}
    fitting = [f"{name} ({size:.0f} GiB)" for name, size in sizes.items() if size + _BESIDE <= room]
    return Finding("fits", f"in {room:.0f} GiB {where}, by its weights: {', '.join(fitting) or 'the model in the box'}")


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
