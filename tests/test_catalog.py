"""`sightline models`: the list, and what it says of a folder beside what the engine then does."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sightline import Engine, catalog
from sightline.engine.describe import _size
from sightline.registry import FAMILIES
from tests import released, tiny, tiny_llava, tiny_mllama


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, dict[str, str], str]:
    """Exit code, the facts, and stderr."""
    code = catalog.main(args)
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return code, {line[:16].strip(): line[17:] for line in out.splitlines()}, err


def test_the_list_names_everything_and_imports_no_torch() -> None:
    code = "import sys; from sightline import catalog; catalog.main([]); sys.exit('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    for name, family in FAMILIES.items():
        assert name in result.stdout
        assert family.name in result.stdout
        assert family.chat_template in result.stdout


@pytest.mark.parametrize(
    ("make", "family", "picture"),
    [
        (tiny.qwen2_vl, "Qwen2-VL (Qwen2VLForConditionalGeneration)", "64 tokens"),
        (tiny_mllama.mllama, "Llama 3.2 Vision (MllamaForConditionalGeneration)", "1 tokens"),
        (
            lambda: tiny_llava.llava("next", text="mistral"),
            "LLaVA-NeXT (LlavaNextForConditionalGeneration)",
            "88 tokens",
        ),
        (tiny_llava.text, "Llama (LlamaForCausalLM)", None),
    ],
)
def test_a_folder_is_described_as_the_engine_finds_it(
    make: Any, family: str, picture: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make()
    code, facts, _ = run(capsys, str(folder), "--device", "cpu", "--max-total-tokens", "4096")
    with Engine(folder, device="cpu", max_total_tokens=4096) as engine:
        plan = engine.plan
    assert code == 0
    assert facts["family"] == family
    assert facts["in memory"] == f"{_size(plan.weights)} of weights in float32"
    assert facts["K/V"].startswith(f"{plan.kv_bytes_per_token} bytes a token")
    assert facts["context"].startswith(f"{plan.context_length} tokens")
    assert facts["fits"] == f"yes, with {plan.num_tokens} tokens of K/V ({_size(plan.kv_cache)})"
    assert "F32" in facts["weights"]
    assert (picture is None) == ("1024x1024" not in facts)
    if picture is not None:
        assert facts["1024x1024"].startswith(picture)


def test_the_authors_layout_names_its_tower(capsys: pytest.CaptureFixture[str]) -> None:
    code, facts, _ = run(capsys, str(tiny_llava.llava("llava", layout="original", tower="beside")), "--device", "cpu")
    assert code == 0
    assert facts["family"] == "LLaVA, authors' layout (LlavaLlamaForCausalLM)"
    assert facts["chat template"] == "vicuna_v1.1, the family's"
    assert "somebody/clip-tiny" in facts["vision tower"]


def test_what_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At full size: nothing is loaded to find out."""
    released.write("llama-3.2-11b-vision", tmp_path)
    flags = ["--load-format", "dummy", "--device", "cpu", "--dtype", "bfloat16"]
    code, facts, _ = run(capsys, str(tmp_path), *flags, "--mem-fraction-static", "0.001")
    assert code == 4
    assert facts["parameters"] == "10.67 billion"
    assert facts["in memory"] == "19.9 GiB of weights in bfloat16"
    assert facts["fits"].startswith("no: ")
    assert "--mem-fraction-static" in facts["fits"]


def test_what_each_of_several_ranks_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Half of the decoder, and the whole tower of 0.7 billion parameters."""
    released.write("qwen2-vl-2b", tmp_path)
    flags = [str(tmp_path), "--load-format", "dummy", "--device", "cpu", "--dtype", "bfloat16"]
    each = [run(capsys, *flags, "--tp-size", size)[1] for size in ("1", "2")]
    assert [facts["parameters"] for facts in each] == ["2.21 billion"] * 2
    assert [facts["in memory"] for facts in each] == [
        "4.1 GiB of weights in bfloat16",
        "2.7 GiB of weights in bfloat16, on each of 2 ranks",
    ]
    assert [facts["K/V"].partition(" bytes")[0] for facts in each] == ["28672", "14336"]
    code, _, err = run(capsys, *flags, "--tp-size", "3")
    assert (code, "valid sizes: 1, 2, 4" in err) == (2, True)


def change(tmp_path: Path, **config: Any) -> Path:
    folder = Path(shutil.copytree(tiny.qwen2_vl(), tmp_path / "model"))
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def test_what_cannot_be_served(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = change(tmp_path, architectures=["Qwen3VLForConditionalGeneration"])
    code, _, err = run(capsys, str(folder))
    assert code == 3
    assert "Qwen3VLForConditionalGeneration is not supported" in err
    assert "nearest that is: Qwen2VLForConditionalGeneration (Qwen2-VL)" in err
    shutil.rmtree(folder)
    code, _, err = run(capsys, str(change(tmp_path, quantization_config={"quant_method": "awq"})))
    assert code == 3
    assert "awq" in err


def test_broken_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = change(tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    code, _, err = run(capsys, str(folder))
    assert (code, "no whole safetensors file" in err) == (3, True)
    weights.unlink()
    code, _, err = run(capsys, str(folder))
    assert (code, "no weights" in err) == (3, True)
    code, _, err = run(capsys, str(tmp_path / "nothing"))
    assert (code, "is no folder" in err) == (2, True)
    (tmp_path / "empty").mkdir()
    code, _, err = run(capsys, str(tmp_path / "empty"))
    assert (code, "config.json" in err) == (3, True)
