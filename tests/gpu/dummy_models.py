"""The releases at full size with random weights: do they load, what memory do they plan, do they answer about a picture?

    python -m tests.gpu.dummy_models                 # all of tests/released.py, one process after the other
    python -m tests.gpu.dummy_models qwen2-vl-7b

Prints one JSON line for each. What is said is noise; that it has the asked length is the point. Not a test: it takes minutes
and a card with 40 GB.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests import released

_GIB = 2**30


def measure(kind: str, device: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Load, ask the same question cold and from the caches."""
    from sightline import Engine, SamplingParams, demo

    sampling = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)
    content = [
        {"type": "image", "image": demo.sample_path("photo.jpg")},
        {"type": "text", "text": "What is in this picture?"},
    ]
    with tempfile.TemporaryDirectory() as folder:
        released.write(kind, Path(folder))
        began = time.perf_counter()
        with Engine(folder, device=device, load_format="dummy", dtype="bfloat16", **settings) as engine:
            loaded = time.perf_counter()
            line: dict[str, Any] = {"kind": kind, "load_s": round(loaded - began, 2), **plan(engine)}
            for name in ("cold", "cached"):
                began = time.perf_counter()
                answer = engine.chat([{"role": "user", "content": content}], sampling)
                line[f"{name}_s"] = round(time.perf_counter() - began, 3)
                assert not isinstance(answer, list)
            tokens = answer.outputs[0].token_ids
            assert len(tokens) == 64
            return line | {
                "prompt_tokens": answer.num_prompt_tokens,
                "image_tokens": answer.num_image_tokens,
                "cached_tokens": answer.num_cached_tokens,
                "answer_tokens": len(tokens),
                "distinct_tokens": len(set(tokens)),
            }


def plan(engine: Any) -> dict[str, Any]:
    memory = engine.plan
    return {
        "weights_gib": round(memory.weights / _GIB, 2),
        "vision_cache_gib": round(memory.vision_cache / _GIB, 2),
        "kv_gib": round(memory.kv_cache / _GIB, 2),
        "kv_tokens": memory.num_tokens,
        "kv_bytes_per_token": memory.kv_bytes_per_token,
        "context_length": memory.context_length,
    }


def main() -> int:
    """Exit code 1 if any of them failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", choices=[[], *released.RELEASES], default=[])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--settings", default="{}", help="further fields of EngineConfig, as JSON")
    parser.add_argument("--here", action="store_true", help="in this process (one kind)")
    args = parser.parse_args()
    if args.here:
        print(json.dumps(measure(args.kinds[0], args.device, json.loads(args.settings))), flush=True)
        return 0
    failed = []
    for kind in args.kinds or released.RELEASES:
        # a process of its own gives all memory back
        options = [kind, "--here", "--device", args.device, "--settings", args.settings]
        if subprocess.run([sys.executable, "-m", "tests.gpu.dummy_models", *options]).returncode:
            failed.append(kind)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
