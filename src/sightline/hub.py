"""From what the user typed to a checkpoint folder: a local folder as it is, a hub name downloaded with progress and resume.

The hub's environment variables hold (HF_HOME, HF_HUB_CACHE, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE, proxies); its library is
imported only when a name is not a folder, because that import takes longer than loading a small model.
"""

from __future__ import annotations

import fnmatch
import io
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sightline.errors import ModelNotFoundError

Progress = Callable[[float | None, str], None]

# What a checkpoint folder needs; never pickled weights (*.bin, *.pt), nor code (*.py).
ALLOW_PATTERNS = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")
# Weights a second time, in other forms.
IGNORE_PATTERNS = ("original/*", "onnx/*", "openvino/*", "consolidated*.safetensors")


def resolve(
    model: str,
    *,
    revision: str | None = None,
    download_dir: str | Path | None = None,
    on_progress: Progress | None = None,
) -> Path:
    """The folder of a checkpoint. Raises `ModelNotFoundError` with a remedy.

    model: a folder, or a hub name like Qwen/Qwen2-VL-2B-Instruct. revision: branch, tag or commit on the hub.
    download_dir: the hub cache to use instead of its default. on_progress: called with (fraction or None, detail), from
    other threads too.
    """
    folder = Path(model).expanduser()
    if folder.exists() or _is_path(model):
        if revision is not None:
            raise ModelNotFoundError(f"--revision {revision} is for hub names, but {model} is a local path.")
        return _checked(folder)
    return _checked(_download(model, revision, download_dir, on_progress or (lambda fraction, detail: None)))


def find_companion(name: str, model_dir: Path) -> Path | None:
    """The folder of a checkpoint that another one, in `model_dir`, needs beside it; None if it is not on this machine.

    name: as the other's config.json says it. Looked for as a path, inside and beside `model_dir`, and in the hub cache.
    """
    last = name.rstrip("/").rpartition("/")[2]
    model_dir = model_dir.absolute()
    for folder in (Path(name).expanduser(), model_dir / name, model_dir / last, model_dir.parent / last):
        if folder.is_absolute() and (folder / "config.json").is_file():
            return folder
    if _is_path(name):
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def progress_detail(done: int, total: int = 0) -> str:
    """Bytes for people: "1.2 of 15.2 GB"; the total is left out when unknown (0)."""
    unit, divisor = ("GB", 1e9) if max(done, total) >= 1e9 else ("MB", 1e6)
    of = f" of {total / divisor:.1f}" if total else ""
    return f"{done / divisor:.1f}{of} {unit}"


def _is_path(model: str) -> bool:
    """Hub names are `name` or `owner/name`; anything of another form can only be meant as a path."""
    return os.path.isabs(model) or model.startswith((".", "~")) or "\\" in model or model.count("/") > 1


def _checked(folder: Path) -> Path:
    if not folder.exists():
        raise ModelNotFoundError(f"There is no folder {folder}.")
    if not folder.is_dir():
        raise ModelNotFoundError(f"{folder} is a file; name the folder that holds config.json and the weights.")
    if not (folder / "config.json").is_file():
        inner = sorted(p.parent.name for p in folder.glob("*/config.json"))
        hint = (
            f" Did you mean {folder / inner[0]}?" if inner else " A checkpoint folder has one beside its *.safetensors."
        )
        raise ModelNotFoundError(f"{folder} holds no config.json.{hint}")
    return folder.resolve()


def _download(model: str, revision: str | None, download_dir: str | Path | None, on_progress: Progress) -> Path:
    from huggingface_hub import constants, errors, snapshot_download

    on_progress(None, f"looking for {model}")
    where = f"{model} (revision {revision})" if revision else model
    try:
        bars = _bar_class(_total_bytes(model, revision, download_dir), on_progress)
        return Path(
            snapshot_download(
                model,
                revision=revision,
                cache_dir=download_dir,
                allow_patterns=list(ALLOW_PATTERNS),
                ignore_patterns=list(IGNORE_PATTERNS),
                tqdm_class=bars,
            )
        )
    except ModelNotFoundError:
        raise
    except errors.GatedRepoError as error:
        raise ModelNotFoundError(
            f"{where} is gated: accept its terms at {constants.ENDPOINT}/{model}, then set HF_TOKEN to a token of that account."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelNotFoundError(
            f"{where} is neither a folder here nor a model on {constants.ENDPOINT}. Check the spelling (owner/name); if it is "
            "private, set HF_TOKEN."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelNotFoundError(f"{model} has no revision {revision} on {constants.ENDPOINT}.") from error
    except errors.HFValidationError as error:
        raise ModelNotFoundError(f"{model!r} is neither a folder here nor a hub name (owner/name).") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        if constants.HF_HUB_OFFLINE:
            reason, remedy = "HF_HUB_OFFLINE is set", "unset it to download"
        else:
            reason, remedy = f"{constants.ENDPOINT} cannot be reached", "check the network, or HF_ENDPOINT for a mirror"
        raise ModelNotFoundError(
            f"{where} is not in the cache and {reason}: {remedy}, or name a local folder."
        ) from error
    except Exception as error:  # whatever the network library raises; it must not be imported here
        raise ModelNotFoundError(
            f"The download of {where} stopped: {type(error).__name__}: {error}. Run the same command again: finished files stay."
        ) from error


def _total_bytes(model: str, revision: str | None, download_dir: str | Path | None) -> tuple[int, int]:
    """(bytes of all wanted files, bytes of those that the cache has); (0, 0) when the hub does not say.

    Refuses a repository without config.json or safetensors before gigabytes of it are downloaded.
    """
    from huggingface_hub import HfApi, constants, errors, try_to_load_from_cache

    if constants.HF_HUB_OFFLINE:
        return 0, 0
    try:
        info = HfApi().model_info(model, revision=revision, files_metadata=True)
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError):
        raise
    except Exception:  # no network: the cache may still have it
        return 0, 0
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or [] if _wanted(file.rfilename)}
    if sizes and "config.json" not in sizes:
        raise ModelNotFoundError(f"{model} has no config.json, so it is no checkpoint that can be served.")
    if sizes and not any(name.endswith(".safetensors") for name in sizes):
        raise ModelNotFoundError(
            f"{model} has no *.safetensors: only that format is read. Look for a revision or a conversion that has them."
        )
    cached = sum(
        size
        for name, size in sizes.items()
        if isinstance(try_to_load_from_cache(model, name, cache_dir=download_dir, revision=info.sha), str)
    )
    return sum(sizes.values()), cached


def _wanted(name: str) -> bool:
    return any(fnmatch.fnmatch(name, p) for p in ALLOW_PATTERNS) and not any(
        fnmatch.fnmatch(name, p) for p in IGNORE_PATTERNS
    )


def _bar_class(sizes: tuple[int, int], on_progress: Progress) -> type[Any]:
    """A tqdm that draws nothing and reports bytes. The hub's library makes several: for bytes received, for bytes written
    (which begins with what an interrupted download left), and for files; the furthest of the byte bars counts."""
    from tqdm import tqdm

    total, cached = sizes
    lock = threading.Lock()
    furthest = 0

    class Bar(tqdm):  # type: ignore[misc,type-arg,unused-ignore]
        monitor_interval = 0

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "file": io.StringIO(), "disable": False})

        def display(self, *args: Any, **kwargs: Any) -> bool:
            nonlocal furthest
            if self.unit == "B" and self.n:
                with lock:
                    if self.n <= furthest:
                        return True
                    furthest = int(self.n)
                    done = cached + furthest
                fraction = min(done / total, 1.0) if total else None
                on_progress(fraction, progress_detail(done, total))
            return True

    return Bar
