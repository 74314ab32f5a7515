"""Load tools of others, unmodified."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from sightline.demo import model_path
from tests.clients.real.environments import ROOT, output, run_block
from tests.clients.real.test_page import BLOCKS


def test_aiperf(server: str, tmp_path: Path) -> None:
    """The page's command: six requests with pictures, streamed."""
    (tmp_path / "sightline-tiny").symlink_to(model_path())
    ((language, code),) = [(language, code) for where, language, code in BLOCKS if where == "load"]
    run_block("load", language, code, server, tmp_path)
    (report,) = (tmp_path / "artifacts").rglob("profile_export_aiperf.json")
    result = json.loads(report.read_text())
    assert result["request_count"]["avg"] == 6
    assert not result["error_summary"]
    assert result["num_images"]["avg"] == 1
    assert result["time_to_first_token"]["avg"] > 0
    assert result["usage_completion_tokens"]["avg"] > 1
    # more than the sixteen of the text: the pictures' are among them
    assert result["usage_prompt_tokens"]["avg"] > 32


def test_sglang_s_bench_serving(server: str, tmp_path: Path) -> None:
    """The file as it is on PyPI, with a data set of pictures.

    It wants a processor of transformers to count a prompt's tokens, in a folder with the model's name. Qwen2-VL's needs torchvision,
    so the folder has the model's tokenizer and LLaVA's processor; only the count of input tokens is not the server's.
    """
    folder = tmp_path / "sightline-tiny"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).symlink_to(model_path() / name)
    template = json.loads((model_path() / "tokenizer_config.json").read_text())["chat_template"]
    (folder / "chat_template.jinja").write_text(template)
    square = {"height": 96, "width": 96}
    image = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 96}, "crop_size": square}
    (folder / "preprocessor_config.json").write_text(json.dumps({**image, "processor_class": "LlavaProcessor"}))
    llava = {"patch_size": 16, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    (folder / "processor_config.json").write_text(json.dumps({**llava, "image_token": "<|image_pad|>"}))

    (packages,) = (ROOT / ".venv-clients" / "sglang" / "lib").glob("python3*/site-packages")
    options = f"""--backend sglang-oai-chat --base-url {server} --model sightline-tiny --dataset-name image --num-prompts 4
        --image-count 1 --image-resolution 96x96 --image-format png --random-input-len 16 --random-output-len 8
        --output-file {tmp_path / "result.jsonl"} --output-details"""
    # -P: the file's own folder has modules with the names of others
    command = ["env", f"PYTHONPATH={packages}", sys.executable, "-P", packages / "sglang" / "bench_serving.py"]
    printed = output([*command, *options.split()], server, cwd=tmp_path)
    result = json.loads((tmp_path / "result.jsonl").read_text())
    assert result["completed"] == 4
    assert not any(result["errors"])
    assert all(result["generated_texts"])
    assert min(result["ttfts"]) > 0
    assert sum(result["output_lens"]) == result["total_output_tokens"] > 0
    assert "Successful requests:                     4" in printed
