"""Measurements: `sightline bench serve` puts load on a server, `offline` on an engine, `compare` runs beside transformers,
`calibrate` and `capacity` predict what more replicas would do."""

from __future__ import annotations

import importlib
import sys

COMMANDS = {
    "serve": ("sightline.bench.serving", "put load on a running server and report latencies and throughput"),
    "offline": ("sightline.bench.offline", "measure the engine without a server"),
    "capacity": (
        "sightline.bench.capacity",
        "predict what 1 to 1,000 replicas do under a traffic with repeated pictures",
    ),
    "calibrate": ("sightline.bench.calibrate", "measure a server's costs for `capacity`, or check its predictions"),
    "compare": ("sightline.bench.compare", "measure sightline beside transformers generate, in one run"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one benchmark: the first argument names it, the others are its flags. Returns the exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] not in COMMANDS:
        wanted = bool(arguments) and arguments[0] in {"-h", "--help"}
        lines = [f"  {name:9} {text}" for name, (_, text) in COMMANDS.items()]
        print("\n".join(["usage: sightline bench COMMAND [flags]", "", *lines]), file=None if wanted else sys.stderr)
        return 0 if wanted else 2
    module = importlib.import_module(COMMANDS[arguments[0]][0])
    return int(module.main(arguments[1:]))
