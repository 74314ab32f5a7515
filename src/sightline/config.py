"""Every setting, declared once: the field is the flag, the environment variable, the key of the file and the row of the docs.

`ServerConfig.load(argv)` reads, in this order of precedence: command line, `SIGHTLINE_*` environment, the YAML file of
`--config`, defaults. Both vLLM's and SGLang's spellings of a flag are accepted. Imports no torch.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NoReturn, Self, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sightline.foreign_flags import FOREIGN_FLAGS, ForeignFlag

ENV_PREFIX = "SIGHTLINE_"
_FOREIGN = "foreign:"


class Flag(NamedTuple):
    """Other spellings of a setting's flag, without dashes in front; the first one is canonical when it is not the field."""

    names: tuple[str, ...]
    metavar: str | None = None


def setting(default: Any, help: str, *names: str, metavar: str | None = None, **constraints: Any) -> Any:
    """A pydantic field with its flag spellings and help text."""
    field = Field(default, description=help, **constraints)
    field.metadata.append(Flag(names, metavar))
    return field


class EngineConfig(BaseModel):
    """What the engine needs to know; the keywords of the offline `Engine`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = setting(
        "", "Folder or hub name of the model; the bundled sightline-tiny when none is given.", "model-path"
    )
    revision: str | None = setting(None, "Branch, tag or commit of a hub model.")
    download_dir: str | None = setting(None, "Where hub models are kept; the hub's own cache by default.")
    load_format: Literal["auto", "safetensors", "dummy"] = setting(
        "auto", "`dummy` fills the model with random numbers without reading weights, for benchmarks."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto", "Type of weights and activations; auto is bfloat16 on a GPU and float32 on a CPU."
    )
    device: Literal["auto", "cpu", "cuda"] = setting(
        "auto", "Where the model runs; auto takes the GPU if there is one."
    )
    context_length: int | None = setting(
        None, "Longest prompt plus answer in tokens; the model's own, or what fits, by default.", "max-model-len", ge=32
    )
    mem_fraction_static: float | None = setting(
        None,
        "Part of the device's memory for weights, pictures and K/V; by default 0.5 on a CPU, and on a GPU all but a step's measured peak and 3 GiB.",
        "gpu-memory-utilization",
        gt=0,
        le=1,
    )
    max_total_tokens: int | None = setting(None, "Tokens of K/V cache; what the memory allows by default.", ge=32)
    max_running_requests: int | None = setting(
        None, "Requests computed at once; 256 on a GPU, 32 on a CPU by default.", "max-num-seqs", ge=1
    )
    chunked_prefill_size: int | None = setting(
        None,
        "Tokens of one step; on a GPU 8192 by default, and 768 while others decode (up to 3584 with LLaVA-OneVision); on a CPU 2048.",
        "max-num-batched-tokens",
        ge=1,
    )
    disable_overlap_schedule: bool = setting(
        False, "On a GPU, wait for the tokens of each step before the next one is prepared."
    )
    attention_backend: Literal["auto", "triton", "torch"] = setting(
        "auto", "Kernels of attention; auto is triton on a GPU and torch on a CPU."
    )
    sampling_backend: Literal["auto", "pytorch"] = setting("auto", "Sampling has one implementation, in PyTorch.")
    disable_cuda_graph: bool = setting(
        False, "On a GPU, launch the kernels of a decode step one by one.", "enforce-eager"
    )
    cuda_graph_max_bs: int | None = setting(
        None, "Largest batch that has a CUDA graph; all that can occur by default.", ge=1
    )
    disable_radix_cache: bool = setting(False, "Compute every prompt in full, without the prefix cache.")
    vision_cache_gb: float | None = setting(
        None, "Budget of encoded pictures in GiB; 4 on a GPU, 0.25 on a CPU by default.", ge=0
    )
    random_seed: int | None = setting(None, "Seed of requests that name none; random by default.", "seed")
    num_threads: int | None = setting(None, "Threads of the engine on a CPU; one for each core by default.", ge=1)
    tp_size: int = setting(
        1,
        "GPUs that hold one model together, each a share of it and of the K/V (tensor parallelism); processes, on a CPU.",
        "tensor-parallel-size",
        "tp",
        ge=1,
        le=64,
    )
    nnodes: int = setting(
        1, "Machines that hold one model together, each an equal part of --tp-size; each runs the same command.", ge=1
    )
    node_rank: int = setting(0, "Which of --nnodes this machine is; 0 is the server.", ge=0)
    dist_init_addr: str | None = setting(None, "HOST:PORT of node 0, where it waits for the others.", "nccl-init-addr")
    dist_secret: str = setting(
        "",
        "What the nodes know each other by, 16 characters or more; in SIGHTLINE_DIST_SECRET, no list of processes shows it.",
    )
    dist_timeout: float = setting(600.0, "Seconds that nodes wait for each other at the start.", gt=0)
    dp_size: int = setting(
        1,
        "Engines behind one port, each with the whole model; on GPUs each has its own, on a CPU they share cores and memory.",
        "data-parallel-size",
        "dp",
        ge=1,
        le=64,
    )
    decode_log_interval: int = setting(40, "Decode steps between two lines of the log.", ge=1)

    @property
    def num_ranks(self) -> int:
        """Processes that share the machine's cores and memory on a CPU: the ranks of all engines."""
        return self.ranks_per_node * self.dp_size

    @property
    def ranks_per_node(self) -> int:
        """Ranks of one engine on each machine."""
        return self.tp_size // self.nnodes


class ServerConfig(EngineConfig):
    """Everything that `sightline serve` takes."""

    host: str = setting("127.0.0.1", "Address to listen on.")
    port: int = setting(8000, "Port to listen on; 0 takes a free one.", ge=0, le=65535)
    served_model_name: str | None = setting(None, "Name of the model in the API; as given, by default.")
    chat_template: str | None = setting(
        None,
        "Name of a built-in template, a .jinja file, or a .json file in SGLang's form; the checkpoint's by default.",
    )
    tool_call_parser: Literal["auto", "hermes", "llama3"] = setting(
        "auto", "How the model writes calls of tools; auto reads it from the chat template."
    )
    api_key: tuple[str, ...] = setting(
        (), "Key that clients must send; may be given several times. Each key is a tenant with caches of its own."
    )
    api_key_file: str | None = setting(None, "File of keys, one a line, which the list of processes does not show.")
    admin_api_key: tuple[str, ...] = setting(
        (), "Key of operators; without one, the routes that control the server do not exist."
    )
    allowed_origins: tuple[str, ...] = setting(
        (),
        "Web page whose scripts may call the API in a browser, such as `https://example.org`; `*` is any. None by default.",
    )
    enable_playground: bool = setting(True, "The page at / to try the model in a browser.")
    log_level: Literal["debug", "info", "warning", "error"] = setting("info", "Least severe lines of the log.")
    log_format: Literal["text", "json"] = setting("text", "`json` writes one object a line.")
    metrics: bool = setting(True, "Serve `/metrics` for Prometheus; with keys, it needs one.", "enable-metrics")
    metrics_compat: Literal["none", "vllm", "sglang"] = setting(
        "none", "Add to `/metrics` what routers read, under the names that vLLM or SGLang give it."
    )
    enable_trace: bool = setting(
        False,
        "Send OpenTelemetry spans of each request where the OTEL_* variables say; needs `pip install 'sightline[otel]'`.",
    )
    allowed_media_domains: tuple[str, ...] = setting(
        (), "Hosts that pictures may come from; any public one by default."
    )
    allowed_local_media_path: str | None = setting(None, "Folder from which file: URLs of pictures may be read.")
    allow_private_media: bool = setting(False, "Fetch pictures from private and loopback addresses too.")
    max_images_per_request: int = setting(16, "Pictures in one request.", ge=0)
    max_image_mb: float = setting(20.0, "Megabytes of one encoded picture.", gt=0)
    max_image_megapixels: float = setting(36.0, "Million pixels of one picture.", gt=0)
    media_timeout: float = setting(5.0, "Seconds to fetch a picture, everything included.", gt=0)
    media_redirects: int = setting(3, "Redirects followed for a picture; each is checked like the first URL.", ge=0)
    max_body_mb: float = setting(32.0, "Megabytes of one request's body.", gt=0)
    max_queued_requests: int = setting(512, "Requests in flight before new ones are answered 503.", ge=1)
    max_queued_tokens: int | None = setting(
        None, "Prompt tokens in flight before new requests are answered 503; unbounded by default.", ge=1
    )
    max_queued_mb: float = setting(1024.0, "Megabytes of bodies and encoded pictures in flight, likewise.", gt=0)
    queue_timeout: float = setting(60.0, "Seconds that a request may wait for its turn.", gt=0)
    request_timeout: float = setting(600.0, "Seconds before a request is ended.", gt=0)
    client_timeout: float = setting(
        60.0, "Seconds that a client may take to send a request, or to read on when the answer waits for it.", gt=0
    )
    stream_keep_alive: float = setting(
        15.0, "Seconds of silence before a stream gets a comment line; 0 sends none.", ge=0
    )
    stall_timeout: float | None = setting(
        None, "Seconds that a busy engine may be silent before it is ended; 60 on a GPU, 600 on a CPU by default.", gt=0
    )
    load_balance_method: Literal["cache_aware", "round_robin", "shortest_queue", "auto"] = setting(
        "cache_aware",
        "Which of several engines gets a prompt: the one whose caches hold most of it, unless it has too much to do; each "
        "in turn; or the one with the fewest requests. auto is cache_aware.",
    )
    drain_timeout: float = setting(30.0, "Seconds that running requests get after SIGTERM.", ge=0)

    def engine_config(self) -> EngineConfig:
        """The engine's part."""
        return EngineConfig(**{name: getattr(self, name) for name in EngineConfig.model_fields})

    @classmethod
    def load(cls, argv: Sequence[str], *, prog: str = "sightline serve", env: Mapping[str, str] = os.environ) -> Self:
        """Read all sources. Ends the process with exit code 2 and a message when a value is wrong."""
        parser = _parser(cls, prog)
        given = vars(parser.parse_args(argv))
        path = given.pop("config", None)
        model = given.pop("positional", None)
        if model is not None:
            given["model"] = model
        values = {**(_read_file(cls, Path(path), parser) if path else {}), **_read_env(cls, env, parser), **given}
        for foreign in foreign_flags(cls):
            name = _FOREIGN + foreign.names[0]
            if name in values and (why := foreign.refusal(values.pop(name), values.get("model"))):
                parser.error(f"{foreign.options[0]}: {why}")
        try:
            return cls(**values)
        except ValidationError as error:
            first = error.errors()[0]
            parser.error(f"--{'-'.join(str(first['loc'][0]).split('_'))}: {first['msg']}, not {first['input']!r}")


def declared(cls: type[BaseModel]) -> list[tuple[str, tuple[str, ...], str, str, Any]]:
    """(field, flag spellings, type, help, default) of every setting, in order: the rows of docs/configuration.md."""
    rows = []
    for name, field in cls.model_fields.items():
        rows.append(
            (name, _spellings(name, field), _type_name(field.annotation), field.description or "", field.default)
        )
    return rows


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments:"):
            known = [o for a in self._actions if a.help != argparse.SUPPRESS for o in a.option_strings]
            flag = message.split()[2].split("=")[0]
            near = difflib.get_close_matches(flag, known, n=1)
            message = f"unknown flag {flag}" + (f"; did you mean {near[0]}?" if near else "")
        self.exit(2, f"{self.prog}: {message}\n")


def _parser(cls: type[BaseModel], prog: str) -> argparse.ArgumentParser:
    usage = f"{prog} [MODEL] [flags]"
    parser = _Parser(
        prog=prog, usage=usage, description=cls.__doc__, allow_abbrev=False, argument_default=argparse.SUPPRESS
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings; keys are the long flags.")
    for name, field in cls.model_fields.items():
        options = _spellings(name, field)
        help = (field.description or "").replace("%", "%%")
        kind = _plain(field.annotation)
        if kind is bool:
            parser.add_argument(*options, dest=name, action=argparse.BooleanOptionalAction, help=help)
        elif get_origin(kind) is tuple:
            parser.add_argument(*options, dest=name, action="append", metavar="VALUE", help=help)
        elif get_origin(kind) is Literal:
            parser.add_argument(*options, dest=name, choices=get_args(kind), help=help)
        else:
            parser.add_argument(*options, dest=name, metavar=name.rpartition("_")[2].upper(), help=help)
    for foreign in foreign_flags(cls):
        how: dict[str, Any] = {"action": "store_const", "const": "true"}
        if not foreign.switch:
            how = {"nargs": None if foreign.accepted else "+"}
        parser.add_argument(*foreign.options, dest=_FOREIGN + foreign.names[0], help=argparse.SUPPRESS, **how)
    parser.add_argument("positional", nargs="?", metavar="MODEL", help="the same as --model")
    return parser


def foreign_flags(cls: type[BaseModel]) -> list[ForeignFlag]:
    """Flags of SGLang and vLLM that no setting of `cls` has."""
    ours = {option for name, field in cls.model_fields.items() for option in _spellings(name, field)}
    return [foreign for foreign in FOREIGN_FLAGS if not ours.intersection(foreign.options)]


def _spellings(name: str, field: Any) -> tuple[str, ...]:
    flag = next((m for m in field.metadata if isinstance(m, Flag)), Flag(()))
    short = (f"-{n}" for n in flag.names if len(n) <= 2)
    return (*(f"--{n}" for n in (name.replace("_", "-"), *flag.names)), *short)


def _plain(annotation: Any) -> Any:
    """The type inside `X | None`."""
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) in (Union, types.UnionType):
        return next(a for a in get_args(annotation) if a is not type(None))
    return annotation


def _type_name(annotation: Any) -> str:
    kind = _plain(annotation)
    if get_origin(kind) is Literal:
        return ", ".join(f"`{v}`" for v in get_args(kind))
    if get_origin(kind) is tuple:
        return "text, repeatable"
    return {str: "text", int: "whole number", float: "number", bool: "switch"}[kind]


def _read_env(cls: type[BaseModel], env: Mapping[str, str], parser: argparse.ArgumentParser) -> dict[str, Any]:
    values: dict[str, Any] = {}
    known = {ENV_PREFIX + name.upper(): name for name in cls.model_fields}
    foreign = {
        ENV_PREFIX + n.replace("-", "_").upper(): _FOREIGN + f.names[0] for f in foreign_flags(cls) for n in f.names
    }
    for variable, raw in env.items():
        name = known.get(variable)
        if name is not None:
            is_list = get_origin(_plain(cls.model_fields[name].annotation)) is tuple
            values[name] = tuple(v.strip() for v in raw.split(",") if v.strip()) if is_list else raw
        elif variable in foreign:
            values[foreign[variable]] = raw
        elif variable.startswith(ENV_PREFIX) and (near := difflib.get_close_matches(variable, known, n=1, cutoff=0.9)):
            parser.error(f"{variable}: unknown setting; did you mean {near[0]}?")
    return values


def _read_file(cls: type[BaseModel], path: Path, parser: argparse.ArgumentParser) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        parser.error(f"--config: {error}")
    if not isinstance(content, dict):
        parser.error(f"--config: {path.name} holds no mapping of settings")
    by_flag = {o.lstrip("-"): name for name, f in cls.model_fields.items() for o in _spellings(name, f)}
    by_foreign = {name: _FOREIGN + f.names[0] for f in foreign_flags(cls) for name in f.names}
    values = {}
    for key, value in content.items():
        flag = str(key).replace("_", "-")
        name = by_flag.get(flag) or by_foreign.get(flag)
        if name is None:
            near = difflib.get_close_matches(str(key), by_flag, n=1)
            parser.error(f"--config: unknown setting {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        values[name] = tuple(value) if isinstance(value, list) else value
    return values


def dump_public(config: ServerConfig) -> dict[str, Any]:
    """The configuration without secrets and without this machine's paths and addresses, for /server_info."""
    private = {"model", "download_dir", "chat_template", "allowed_local_media_path", "api_key_file", "dist_init_addr"}
    secrets = {"api_key", "admin_api_key", "dist_secret"}
    values: dict[str, Any] = json.loads(config.model_dump_json(exclude=private | secrets))
    return {**values, "num_api_keys": len(config.api_key)}
