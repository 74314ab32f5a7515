"""The import ladder and the other rules of docs/architecture.md hold, and each rule catches a planted fault."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from tests.architecture import MAX_LINES, check, read_tree
from tests.architecture import _is_torch_free as is_torch_free

ROOT = Path(__file__).resolve().parent.parent / "src" / "sightline"

# path below src/sightline -> why it may be longer than the limit
LONG_FILES: dict[str, str] = {}


def test_the_house_keeps_its_rules() -> None:
    violations = check(ROOT, LONG_FILES)
    assert not violations, "\n" + "\n".join(map(str, violations))


def test_the_http_process_imports_no_torch() -> None:
    """What the checker derives from the source, asked of Python itself."""
    names = sorted(name for name, module in read_tree(ROOT).items() if is_torch_free(module) and "__main__" not in name)
    assert "sightline.errors" in names
    if importlib.util.find_spec("ray") is None:
        # It says at its import that the extra is missing.
        names.remove("sightline.serve.ray")
    code = (
        "import importlib, sys\n"
        f"for name in {names!r}:\n"
        "    importlib.import_module(name)\n"
        "    assert 'torch' not in sys.modules, f'{name} imports torch'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def plant(root: Path, files: dict[str, str]) -> Path:
    """Write a package of these files, with the empty __init__.py of every folder."""
    package = root / "sightline"
    for relative, text in files.items():
        path = package / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for folder in [package, *(p for p in package.rglob("*") if p.is_dir())]:
        (folder / "__init__.py").touch()
    return package


CLEAN = {
    "types.py": "import numpy\n",
    "errors.py": "def f():\n    from sightline.types import X\n",
    "demo/__init__.py": "from pathlib import Path\n",
    "prompt/media.py": "import httpx2\n",
    "prompt/decoder.py": "from PIL import Image\n\ndef f(b):\n    return Image.open(b)\n",
    "prompt/qwen2_vl.py": "from PIL import Image\nfrom . import media\n\ndef f(i):\n    return Image.fromarray(i)\n",
    "models/qwen2.py": "import torch\nfrom sightline.layers.norm import Norm\nimport re\nP = re.compile('x')\n",
    "layers/norm.py": "import torch\nfrom ..attention import backend\n",
    "attention/backend.py": "import torch\nfrom sightline import errors\n",
    "engine/core.py": "import torch\nfrom sightline.models.qwen2 import Q\nfrom sightline.prompt import qwen2_vl\n",
    "engine/client.py": "def f():\n    from sightline.engine.core import main\n",
    "server/app.py": "from sightline.engine.client import C\nfrom sightline.demo import path\n",
    "bench/compare.py": "def f():\n    import transformers\n",
    "cli.py": "import httpx2\nfrom sightline.server import app\nfrom sightline.bench import compare\n",
    "doctor.py": "def f():\n    import torch\n",
    "__main__.py": "from sightline.cli import main\n",
    "kernels/rope.py": "x = 1\n" * (MAX_LINES + 1),
}


def test_a_clean_tree_passes(tmp_path: Path) -> None:
    assert check(plant(tmp_path, CLEAN)) == []


def faults() -> list[pytest.param]:
    """(rule, files, a piece of the message): each breaks exactly that rule when added to the clean tree."""
    table: list[tuple[str, str, str, str]] = [
        # rule, file, text, piece of the message
        ("ladder", "engine/core.py", "from sightline.server import app\n", "engine imports sightline.server.app"),
        ("ladder", "models/qwen2.py", "from sightline.engine import core\n", "above it"),
        ("ladder", "layers/norm.py", "import sightline.models.qwen2\n", "above it"),
        ("ladder", "attention/backend.py", "from sightline import layers\n", "above it"),
        ("ladder", "cache/radix.py", "from sightline.attention import backend\n", "its sibling"),
        ("ladder", "prompt/late.py", "def f():\n    from sightline.kernels import rope\n", "its sibling"),
        ("ladder", "prompt/late.py", "def f():\n    import sightline.models.qwen2 as q\n", "above it"),
        ("ladder", "models/qwen2.py", "from ..cli import main\n", "above it"),
        ("ladder", "bench/compare.py", "from sightline.server import app\n", "its sibling"),
        ("ladder", "types.py", "from sightline.prompt.media import f\n", "above it"),
        ("ladder", "types.py", "from sightline import Engine\n", "above it"),
        ("ladder", "demo/__init__.py", "from sightline.errors import E\n", "above it"),
        ("ladder", "errors.py", "from sightline.unheard import x\n", "above it"),
        ("ladder", "helpers/misc.py", "", "no place in the ladder"),
        ("torch", "server/app.py", "import torch\n", "must stay free"),
        ("torch", "prompt/qwen2_vl.py", "def f():\n    from torch import nn\n", "must stay free"),
        ("torch", "types.py", "import torch.nn as nn\n", "must stay free"),
        ("torch", "config.py", "from torch.nn import functional\n", "must stay free"),
        ("torch", "doctor.py", "import torch\n", "must stay free"),
        ("torch", "engine/client.py", "from sightline.engine.core import main\n", "through sightline.engine.client"),
        ("torch", "server/app.py", "from sightline.models import qwen2\n", "-> sightline.models.qwen2"),
        ("torch", "engine/__init__.py", "from sightline.engine.core import main\n", "-> sightline.engine.core"),
        ("unsafe", "engine/core.py", "import pickle\n", "pickle"),
        ("unsafe", "engine/core.py", "def f():\n    from dill import loads\n", "dill"),
        ("unsafe", "models/qwen2.py", "import marshal as m\n", "marshal"),
        ("unsafe", "hub.py", "import shelve\n", "shelve"),
        ("unsafe", "models/qwen2.py", "import torch as t\n\ndef f(p):\n    return t.load(p)\n", "torch.load"),
        ("unsafe", "models/qwen2.py", "from torch import load as read\n\nread('x')\n", "torch.load"),
        ("unsafe", "cli.py", "eval('1')\n", "eval"),
        ("unsafe", "cli.py", "def f(s):\n    exec(s)\n", "exec"),
        ("unsafe", "engine/client.py", "def f(socket):\n    return socket.recv_pyobj()\n", "unpickles"),
        ("unsafe", "models/qwen2.py", "import numpy as np\nnp.load('x', allow_pickle=True)\n", "allow_pickle"),
        ("unsafe", "config.py", "import yaml\nyaml.load('x')\n", "safe_load"),
        ("http", "server/app.py", "import httpx2\n", "may open a URL"),
        ("http", "prompt/qwen2_vl.py", "from urllib.request import urlopen\n", "may open a URL"),
        ("http", "prompt/mediator.py", "from urllib import request\n", "may open a URL"),
        ("http", "hub.py", "def f():\n    import requests\n", "may open a URL"),
        ("pictures", "prompt/qwen2_vl.py", "from PIL import Image as I\n\nI.open('x')\n", "may open a picture"),
        ("pictures", "server/app.py", "import PIL.Image\n\nPIL.Image.open('x')\n", "may open a picture"),
        ("pictures", "cli.py", "from PIL.Image import open as o\n\no('x')\n", "may open a picture"),
        ("strangers", "prompt/qwen2_vl.py", "import transformers\n", "oracle"),
        ("strangers", "bench/compare.py", "from transformers import AutoModel\n", "where it is used"),
        ("strangers", "prompt/media.py", "import torchvision\n", "no CPU build"),
        ("cycle", "types.py", "from sightline.errors import E\n", "sightline.errors -> sightline.types"),
        (
            "cycle",
            "layers/norm.py",
            "def f():\n    from sightline.layers import norm\n",
            "norm -> sightline.layers.norm",
        ),
        ("length", "cli.py", "x = 1\n" * (MAX_LINES + 1), "split it"),
    ]
    return [pytest.param(*row, id=f"{row[0]}-{row[1]}-{i}") for i, row in enumerate(table)]


@pytest.mark.parametrize(("rule", "file", "text", "piece"), faults())
def test_a_planted_fault_is_found(tmp_path: Path, rule: str, file: str, text: str, piece: str) -> None:
    violations = check(plant(tmp_path, {**CLEAN, file: text}))
    # an import up the ladder often closes a cycle too
    rules = {v.rule for v in violations} - ({"cycle"} if rule == "ladder" else set())
    assert rules == {rule}, "\n".join(map(str, violations))
    # what imports the faulty module can be named too, but the fault's own file is among the findings
    assert any(piece in v.message for v in violations), "\n".join(map(str, violations))
    if rule != "cycle":
        assert any(v.path.endswith(file) for v in violations)


def test_imports_for_typing_are_no_cycle_but_obey_the_ladder(tmp_path: Path) -> None:
    guarded = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from sightline.{} import X\n"
    assert check(plant(tmp_path / "a", {**CLEAN, "types.py": guarded.format("errors")})) == []
    assert [v.rule for v in check(plant(tmp_path / "b", {**CLEAN, "types.py": guarded.format("prompt.media")}))] == [
        "ladder"
    ]


def test_the_list_of_long_files_does_not_go_stale(tmp_path: Path) -> None:
    root = plant(tmp_path, {**CLEAN, "cli.py": "x = 1\n" * (MAX_LINES + 1)})
    assert check(root, {"cli.py": "a reason"}) == []
    stale = check(root, {"cli.py": "a reason", "errors.py": "short", "gone.py": "gone"})
    assert [(v.rule, Path(v.path).name) for v in stale] == [("length", "errors.py"), ("length", "gone.py")]
