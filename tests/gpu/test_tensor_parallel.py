"""Two GPUs that hold one model say what transformers says, as one does: through NCCL, with CUDA graphs and overlapped steps."""

from __future__ import annotations

import os

import pytest
import torch

from tests.gpu.families import FAMILIES, Judge, conversations
from tests.gpu.test_families import DTYPES, SIZES, ask, cold_and_cached, ids, start
from tests.servers import ServerProcess, free_port

pytestmark = pytest.mark.skipif(
    os.environ.get("SIGHTLINE_TEST_DEVICE", "cuda") == "cuda" and torch.cuda.device_count() < 2,
    reason="needs two CUDA devices",
)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["Qwen2-VL", "Qwen2.5-VL", "Llama 3.2 Vision", "OneVision", "Llama"])
def test_two_gpus(family: str, dtype: torch.dtype, device: str, report: dict[str, str]) -> None:
    """A batch from cold and the same from the caches; in float32 the ids are those of one GPU."""
    talks = conversations(FAMILIES[family].pictures)
    judge = Judge(family, device, dtype)
    with start(family, device, dtype, tp_size=2) as engine:
        cold, cached, verdict = cold_and_cached(engine, family, judge, talks)
        per_token = engine.plan.kv_bytes_per_token
    if dtype is torch.float32:
        with start(family, device, dtype) as engine:
            assert ids(cold) == ids(cached) == ids(ask(engine, family, talks))
            # the tiny checkpoints have one key head, which both ranks hold
            assert engine.plan.kv_bytes_per_token == per_token
    else:
        report[f"{family}, two GPUs"] = verdict


@pytest.mark.timeout(300)
@pytest.mark.parametrize("family", ["Qwen2-VL", "Llama 3.2 Vision"])
def test_a_gpu_on_each_of_two_nodes(family: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both on this machine, each of which sees one GPU, where it calls it its first: the ids of one GPU, cold and cached."""
    talks = conversations(FAMILIES[family].pictures)
    with start(family, device, torch.float32) as engine:
        expected = ids(ask(engine, family, talks))
    address = f"127.0.0.1:{free_port()}"
    monkeypatch.setenv("SIGHTLINE_DIST_SECRET", "a secret of these tests")
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")
    flags = {"device": device, "dtype": "float32", **SIZES, "tp_size": 2, "nnodes": 2}
    command = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    other = ServerProcess(
        [str(FAMILIES[family].make()), *command, "--node-rank=1", f"--dist-init-addr={address}"],
        {"CUDA_VISIBLE_DEVICES": seen[-1]},
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen[0])
    meeting = {"dist_init_addr": address, "dist_secret": os.environ["SIGHTLINE_DIST_SECRET"]}
    with other:
        with start(family, device, torch.float32, tp_size=2, nnodes=2, **meeting) as engine:
            assert [ids(ask(engine, family, talks)) for _ in range(2)] == [expected] * 2
        assert other.wait_exit(10) == 0


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "settings",
    [
        {"chunked_prefill_size": 27},
        {"disable_radix_cache": True, "vision_cache_gb": 0.0},
        {"disable_cuda_graph": True},
        {"disable_overlap_schedule": True},
    ],
    ids=lambda settings: next(iter(settings)),
)
@pytest.mark.parametrize("family", ["Qwen2-VL", "Llama 3.2 Vision"])
def test_what_the_engine_does_meanwhile_changes_nothing(family: str, settings: dict, device: str) -> None:
    talks = conversations(FAMILIES[family].pictures)
    with start(family, device, torch.float32, tp_size=2, **settings) as engine:
        Judge(family, device, torch.float32).check(engine, talks, ask(engine, family, talks))
