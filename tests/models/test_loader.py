"""What the loader takes, and what it refuses with a message that names the matter."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sightline.errors import CheckpointError, ModelNotFoundError
from sightline.models import loader
from sightline.models.loader import architecture, read_config
from tests import tiny
from tests.models.harness import load


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that a test may spoil."""
    return Path(shutil.copytree(tiny.qwen2_vl(config="2024"), tmp_path / "model"))


def change_config(folder: Path, **changes: Any) -> None:
    """Set keys (None deletes); "a.b" is inside a."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for key, value in changes.items():
        *outer, last = key.split("__")
        place = config
        for name in outer:
            place = place[name]
        if value is None:
            place.pop(last, None)
        else:
            place[last] = value
    path.write_text(json.dumps(config))


def change_weights(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_every_parameter_is_filled(folder: Path) -> None:
    def nan(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            tensors[name] = torch.full_like(tensors[name], 0.5)

    change_weights(folder, nan)
    model = load(folder)
    for name, parameter in model.named_parameters():
        expected = 1.0 if name.endswith("patch_embed.proj.weight") else 0.5
        assert (parameter == expected).all(), name
        assert not parameter.requires_grad
    assert not model.training


def test_readers_side_by_side_fill_what_one_fills(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, from several files."""
    model_dir = tiny.qwen2_vl(shards=3)
    expected = load(model_dir).state_dict()
    monkeypatch.setattr(loader, "_num_readers", lambda slots: 4)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    found = load(model_dir).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_first_reader_that_fails_stops_the_others() -> None:
    begun = []

    def work(number: int) -> int:
        begun.append(number)
        if number == 0:
            raise ValueError("no tensor")
        time.sleep(0.02)
        return 1

    with pytest.raises(ValueError, match="no tensor"):
        list(loader._side_by_side([partial(work, number) for number in range(50)], 2))
    assert len(begun) < 10


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_checkpoints_of_other_types_are_widened(dtype: str) -> None:
    narrow = tiny.qwen2_vl(dtype=dtype)
    model = load(narrow)
    weight = load_file(narrow / "model.safetensors")["model.norm.weight"]
    assert weight.dtype is getattr(torch, dtype)
    assert model.model.norm.weight.dtype is torch.float32
    assert torch.equal(model.model.norm.weight, weight.float())
    assert model.model.rotary.inv_freq.dtype is torch.float32


def test_the_default_dtype_is_left_alone(folder: Path) -> None:
    load(folder, dtype=torch.bfloat16)
    assert torch.get_default_dtype() is torch.float32
    change_config(folder, hidden_size=None)
    with pytest.raises(CheckpointError):
        load(folder, dtype=torch.bfloat16)
    assert torch.get_default_dtype() is torch.float32


def test_progress_reaches_one() -> None:
    seen: list[tuple[float, str]] = []
    load(tiny.qwen2_vl(shards=3), on_progress=lambda f, d: seen.append((f, d)))
    fractions = [f for f, _ in seen]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    assert len(fractions) > 3
    assert seen[-1][1] == "1.3 of 1.3 MB"


def test_dummy_weights_need_no_checkpoint(tmp_path: Path) -> None:
    shutil.copy(tiny.qwen2_vl() / "config.json", tmp_path)
    model = load(tmp_path, load_format="dummy")
    hidden = model.embed(torch.arange(10))
    assert 0.05 < hidden.std() < 5
    assert torch.equal(hidden, load(tmp_path, load_format="dummy").embed(torch.arange(10)))
    features = model.encode_images([torch.zeros(28, 56, 3, dtype=torch.uint8)], [(1, 2, 4)])[0]
    assert features.isfinite().all()


def test_missing_tensors_are_named(folder: Path) -> None:
    change_weights(folder, lambda t: [t.pop(n) for n in list(t) if "layers.1.mlp.up_proj" in n or ".norm1." in n])
    with pytest.raises(CheckpointError, match=r"visual\.blocks\.0\.norm1\.weight, .* \(and 2 more\) are missing"):
        load(folder)


def test_unknown_tensors_are_named(folder: Path) -> None:
    change_weights(folder, lambda t: t.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(16)}))
    with pytest.raises(CheckpointError, match=r"q_norm\.weight is unknown to this architecture"):
        load(folder)


def test_old_frequency_buffers_are_skipped(folder: Path) -> None:
    change_weights(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    load(folder)


def test_a_tied_checkpoint_may_repeat_its_head(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny.qwen2_vl(tied=True), tmp_path / "model"))
    change_weights(folder, lambda t: t.update({"lm_head.weight": torch.ones(352, 64)}))
    assert load(folder).lm_head is None


def test_wrong_shape_is_named(folder: Path) -> None:
    change_config(folder, vocab_size=400)
    with pytest.raises(CheckpointError, match=r"has shape \[352, 64\], but config\.json asks for \[400, 64\]"):
        load(folder)


def test_integer_weights_are_refused(folder: Path) -> None:
    change_weights(folder, lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)}))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is of type torch\.int8"):
        load(folder)


def test_truncated_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is no whole safetensors file"):
        load(folder)


def test_missing_shard(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny.qwen2_vl(shards=3), tmp_path / "model"))
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors is missing, of 3 weight files"):
        load(folder)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "model.bin"])
def test_an_index_cannot_name_other_files(tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(tiny.qwen2_vl(shards=3), tmp_path / "model"))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(CheckpointError, match="no safetensors file of this folder"):
        load(folder)


def test_pickles_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*Convert them to safetensors"):
        load(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match="no weights"):
        load(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": None}, "config.json: hidden_size is missing"),
        ({"num_key_value_heads": None}, "config.json: num_key_value_heads is missing"),
        ({"rms_norm_eps": None}, "config.json: rms_norm_eps is missing"),
        ({"hidden_size": "64"}, "hidden_size is '64', where int is expected"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_attention_heads": 5}, "hidden_size is 64, which 5 attention heads do not divide"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', which is not supported (supported: 'silu')"),
        ({"use_sliding_window": True}, "use_sliding_window is True"),
        ({"rope_scaling__type": "yarn"}, "config.json: rope_scaling.rope_type is 'yarn'"),
        ({"rope_scaling__mrope_section": [2, 3, 4]}, "rope_scaling.mrope_section is [2, 3, 4]"),
        ({"rope_scaling__mrope_section": None}, "rope_scaling.mrope_section is missing"),
        ({"rope_scaling": None}, "rope_scaling.mrope_section is missing"),
        ({"vision_config": None}, "config.json: vision_config is missing"),
        ({"vision_config__hidden_size": 32}, "config.json: vision_config.hidden_size is 32, but the decoder's"),
        ({"vision_config__in_chans": 1}, "vision_config.in_channels is 1"),
        ({"vision_config__hidden_act": "relu"}, "vision_config.hidden_act is 'relu'"),
        ({"vision_config__embed_dim": 50}, "vision_config.embed_dim is 50"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config (awq) is not supported"),
    ],
)
def test_config_is_read_strictly(folder: Path, changes: dict[str, Any], words: str) -> None:
    change_config(folder, **changes)
    with pytest.raises(CheckpointError) as error:
        load(folder)
    assert words in str(error.value)


def test_preprocessor_must_agree(folder: Path) -> None:
    path = folder / "preprocessor_config.json"
    path.write_text(path.read_text().replace('"merge_size": 2', '"merge_size": 4'))
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json: merge_size is 4"):
        load(folder)


def test_sparse_nested_config_takes_the_writers_defaults(tmp_path: Path) -> None:
    """Configs of transformers 4.52 and later omit nested values that equal their class's defaults."""
    from sightline.models.qwen2_vl import Qwen2VLConfig

    sparse = {
        "text_config": {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "tie_word_embeddings": True},
        "vision_config": {"hidden_size": 8192},
        "torch_dtype": "bfloat16",
    }
    config = Qwen2VLConfig.from_hf(sparse, {})
    assert (config.text.hidden_size, config.text.num_hidden_layers, config.text.num_key_value_heads) == (8192, 80, 8)
    assert (config.vision.embed_dim, config.vision.depth, config.vision.intermediate_size) == (1280, 32, 5120)
    assert config.tie_word_embeddings
    assert config.dtype == "bfloat16"


def test_unsupported_architecture_names_the_nearest(folder: Path) -> None:
    change_config(folder, architectures=["GPT2LMHeadModel"])
    with pytest.raises(
        ModelNotFoundError, match=r"GPT2LMHeadModel is not supported; the nearest that is: \w+ForCausalLM"
    ):
        architecture(read_config(folder))
    change_config(folder, architectures=None)
    with pytest.raises(ModelNotFoundError, match="architectures is missing"):
        architecture(read_config(folder))


def test_broken_config_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        read_config(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ModelNotFoundError, match=r"no config\.json"):
        read_config(folder)


def test_unknown_load_format(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="load_format is 'pickle'"):
        load(folder, load_format="pickle")


def test_importing_and_loading_needs_no_transformers(folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from sightline.models.loader import build_model, fill_model;"
        "folder = Path(sys.argv[1]); fill_model(build_model(folder, 'Qwen2VLForConditionalGeneration'), folder);"
        "print([m for m in ('transformers', 'huggingface_hub', 'PIL', 'torch._dynamo') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
