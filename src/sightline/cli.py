"""The command line: serve, ask, chat, batch, bench, models, dashboard, doctor, version. Imports are late, so that `--help` is immediate."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

_USAGE = """usage: sightline COMMAND [flags]

  serve [MODEL]               start the server; without a model, the bundled sightline-tiny
  ask PICTURE... "QUESTION"   one answer in the terminal, without a server
  chat                        a conversation with pictures in the terminal
  batch REQUESTS -o RESULTS   answer a file of requests in OpenAI's batch form; run again, it goes on
  bench serve|offline|compare measure a running server, the engine alone, or this machine beside transformers
  models [FOLDER]             list what can be served; say what a checkpoint is and whether it fits this machine
  dashboard [--alerts]        print a Grafana dashboard, or alert rules for Prometheus
  doctor [--selftest]         say what this machine has; prove the installation with the bundled model
  version                     print the version, and those of Python and torch

Each command has its own --help."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (docs/operations.md)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    commands: dict[str, Callable[[list[str]], int]] = {
        "serve": _serve,
        "ask": _ask,
        "chat": _chat,
        "batch": _batch,
        "bench": _bench,
        "models": _models,
        "dashboard": _dashboard,
        "doctor": _doctor,
        "version": _version,
    }
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_USAGE)
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        return _version([])
    command = commands.get(arguments[0])
    if command is None:
        near = difflib.get_close_matches(arguments[0], commands, n=1)
        hint = f"; did you mean {near[0]}?" if near else "; see sightline --help"
        print(f"sightline: unknown command {arguments[0]!r}{hint}", file=sys.stderr)
        return 2
    try:
        return command(arguments[1:])
    except KeyboardInterrupt:
        return 130


def _serve(argv: list[str]) -> int:
    from sightline.config import ServerConfig

    config = ServerConfig.load(argv)
    from sightline.server.serve import serve

    return serve(config)


def _bench(argv: list[str]) -> int:
    from sightline import bench

    return bench.main(argv)


def _chat(argv: list[str]) -> int:
    from sightline.terminal import chat

    return chat.main(argv)


def _batch(argv: list[str]) -> int:
    from sightline.terminal import batch

    return batch.main(argv)


def _models(argv: list[str]) -> int:
    from sightline import catalog

    return catalog.main(argv)


def _dashboard(argv: list[str]) -> int:
    from sightline import dashboard

    return dashboard.main(argv)


def _version(argv: list[str]) -> int:
    import importlib.metadata
    import platform

    import sightline

    try:
        torch = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        torch = "missing"
    print(f"sightline {sightline.__version__} (Python {platform.python_version()}, torch {torch})")
    return 0


def _ask(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="sightline ask", description="Ask a question about pictures.")
    parser.add_argument("inputs", nargs="+", metavar="PICTURE... QUESTION", help="picture files, then the question")
    parser.add_argument("--model", help="folder or hub name; the bundled sightline-tiny by default")
    parser.add_argument("--max-tokens", type=int, default=512, metavar="TOKENS")
    parser.add_argument("--temperature", type=float, default=0.0)
    options = parser.parse_args(argv)
    *pictures, question = options.inputs
    missing = [p for p in pictures if not Path(p).is_file()]
    if missing:
        print(f"sightline ask: no such picture: {missing[0]}", file=sys.stderr)
        return 2
    from sightline.engine.offline import Engine
    from sightline.errors import RequestError, StartupError
    from sightline.types import SamplingParams

    content: list[dict[str, object]] = [{"type": "image", "image": Path(p)} for p in pictures]
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]
    try:
        with Engine(options.model) as engine:
            sampling = SamplingParams(max_tokens=options.max_tokens, temperature=options.temperature)
            for delta in engine.stream(messages, sampling):
                print(delta.text, end="", flush=True)
            print()
    except StartupError as error:
        print(f"sightline ask: {error}", file=sys.stderr)
        return error.exit_code
    except RequestError as error:
        print(f"sightline ask: {error.message}", file=sys.stderr)
        return 2
    return 0


def _doctor(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="sightline doctor",
        description="Say what this machine has, what fits it, and what is wrong and how to mend it. Exit code 1 when something "
        "is wrong that serving needs.",
    )
    parser.add_argument("--selftest", action="store_true", help="ask the bundled model every golden question")
    parser.add_argument("--json", action="store_true", help="the findings as JSON, without the self-test's table")
    options = parser.parse_args(argv)
    from sightline import doctor

    if options.json and options.selftest:
        parser.error("--json and --selftest do not go together")
    ok = doctor.report(options.json)
    return 0 if ok and (not options.selftest or doctor.selftest()) else 1
