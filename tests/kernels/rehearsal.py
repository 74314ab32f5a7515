"""`python rehearsal.py MODEL_DIR [compile]`: a start's launches, on tensors without memory and a driver without a card.

Prints the kernels that were compiled ahead and those that were not, one a line. Without `compile` no compiler runs. A process of
its own: it makes torch believe that tensors of the meta device are on a Hopper card.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from sightline.attention.triton import TritonBackend
from sightline.cache.vision_cache import VisionCache
from sightline.engine.ahead import compiling_ahead, launches_only_compile, rehearse
from sightline.engine.cuda_graph import StepGraphs
from sightline.engine.encoder import Encoder
from sightline.engine.executor import Executor
from sightline.engine.peak import blank_pictures, blank_request, step_cache
from sightline.engine.runner import ModelRunner
from sightline.engine.sampler import Sampler
from sightline.engine.scheduler import ScheduledRow
from sightline.models.loader import architecture, build_model, read_config
from sightline.parallel import SOLO
from sightline.registry import FAMILIES
from sightline.types import SamplingParams

MAX_STEP, MAX_RUNNING, MAX_MIXED, MAX_PAGES = 8192, 256, 768, 2048


class Driver:
    """An H200's, as far as Triton asks before it launches."""

    utils = SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": 232448},
        load_binary=lambda name, kernel, shared, device: (None, None, 0, 0, 1024),
    )

    def launcher_cls(self, *args: Any) -> None:
        """Nothing is launched."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def pretend() -> None:
    """To have a card."""
    triton.runtime.driver.set_active(Driver())
    cuda: Any = torch.cuda
    cuda.current_device = lambda: 0
    cuda.set_device = lambda device: None
    cuda.current_stream = lambda device=None: SimpleNamespace(cuda_stream=1)
    cuda.get_device_capability = lambda device=None: (9, 0)
    cuda.get_device_properties = lambda device=None: SimpleNamespace(multi_processor_count=132)
    tensor: Any = torch.Tensor
    tensor.is_cuda = property(lambda self: True)
    tensor.pin_memory = lambda self, *args: self


def start(executor: Executor, pictures: list[Any]) -> Iterator[None]:
    """What `factory` launches behind the rehearsal: the measurement, graphs, a first request; and some requests' own pictures."""
    sampler = Sampler(executor.model.config.vocab_size, executor.device)
    runner = ModelRunner(executor, vision_cache=VisionCache(0), sampler=sampler, eos_token_ids=())
    # Llama 3.2's tower looks at its weights, which are none here
    for picture in () if executor.cross_attention else pictures:
        yield from executor.encoder.encoding([picture.image] * 3, [picture.pixels] * 3)
    for num_tokens in (MAX_STEP, 15, 700, 3000):
        runner.forward([ScheduledRow(blank_request(runner, num_tokens), 0, num_tokens, True)], 0)
    filters = SamplingParams(max_tokens=1, top_p=0.5, top_k=50, min_p=0.01, logprobs=20)
    requests = [blank_request(runner, 1, filters) for _ in range(MAX_RUNNING)]
    runner.forward([ScheduledRow(request, 0, 1, True) for request in requests], 0)
    graphs = StepGraphs(
        executor.model, executor.cache, executor.backend, max_batch=MAX_RUNNING, max_running=MAX_RUNNING, max_mixed=MAX_MIXED,
        max_pages=MAX_PAGES, num_heads=executor.model.config.num_attention_heads, device=executor.device,
    )  # fmt: skip
    with torch.inference_mode():
        for key in graphs.planned:
            graphs.compute(key)
            yield
    first = blank_request(runner, 15)
    first.output_ids.append(0)
    runner.forward([ScheduledRow(first, 15, 1, True)], 1)


def main() -> None:
    """See the module."""
    pretend()
    model_dir = Path(sys.argv[1])
    name = architecture(read_config(model_dir))
    meta = torch.device("meta")
    model: Any = build_model(model_dir, name, dtype=torch.bfloat16, device=meta)
    executor = Executor(
        model, SOLO, cache=step_cache(model.kv_spec, MAX_STEP, torch.bfloat16, meta), backend=TritonBackend(),
        encoder=Encoder(model, meta), device=meta, features=VisionCache(0).get, threads=None,
    )  # fmt: skip
    compiled: list[str] = []
    compile_kernel = triton.compiler.compile

    def compile_or_not(source: Any, **options: Any) -> Any:
        compiled.append(f"{source.fn.__name__} {source.signature} {source.constants} {source.attrs}")
        return compile_kernel(source, **options) if "compile" in sys.argv else SimpleNamespace(run=None)

    triton.compiler.compile = compile_or_not
    began = time.monotonic()
    pictures = blank_pictures(FAMILIES[name].processor, model_dir)
    names = [name for name, _ in model.named_modules()]
    with compiling_ahead(lambda: rehearse(executor, pictures, max_step=MAX_STEP, max_running=MAX_RUNNING)):
        pass
    assert [name for name, _ in model.named_modules()] == names, "a rehearsal leaves the model as it was"
    print(f"ahead {len(compiled)} {time.monotonic() - began:.2f}")
    num_ahead = len(compiled)
    with launches_only_compile():
        for _ in start(executor, pictures):
            pass
    for line in compiled[num_ahead:]:
        print("late", line)


if __name__ == "__main__":
    main()
