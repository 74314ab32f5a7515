"""The rules of the house as a checker over source files; `test_architecture.py` runs it on src/ and on planted faults.

An import may only point down the ladder, whether it stands at the top of a module or inside a function. The rest keeps
the HTTP process light and safe: no torch there, no pickle anywhere, one place that opens a URL or a picture.
"""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

PACKAGE = "sightline"

# Lowest first. Layers of one level are strangers to each other, modules of one layer may import each other.
LADDER: tuple[tuple[str, ...], ...] = (
    ("demo",),
    ("base",),
    ("kernels", "parallel", "prompt"),
    ("attention", "cache"),
    ("layers",),
    ("models",),
    ("engine",),
    ("server", "bench"),
    ("serve",),
    ("cli",),
)
LEVEL = {layer: level for level, layers in enumerate(LADDER) for layer in layers}

# The layer of a top-level module or package is its own name, but for these. "" is sightline/__init__.py.
LAYER_OF = {
    **dict.fromkeys(("types", "config", "errors", "registry", "logging", "hub", "version", "foreign_flags"), "base"),
    **dict.fromkeys(
        ("__main__", "launch_server", "catalog", "dashboard", "doctor", "utils", "terminal", "test", "test_utils"),
        "cli",
    ),
    "": "engine",
}

# The HTTP process is made of these: they import no torch, neither themselves nor through others.
TORCH_FREE_LAYERS = {"demo", "base", "prompt", "server", "serve", "cli"}
TORCH_FREE_MODULES = {"sightline", "sightline.engine", "sightline.engine.client", "sightline.bench.serving"} | {
    "sightline.engine.replicas",
    "sightline.engine.routing",
    "sightline.engine.transport",
}

MAY_IMPORT_TORCH_LATE = {"doctor": "reports on the installed torch; the HTTP process does not import it"}

# Whoever may touch the network or decode a picture, with the reason.
HTTP_CLIENTS = {
    "httpx",
    "httpx2",
    "requests",
    "aiohttp",
    "urllib.request",
    "http.client",
    "httpcore",
    "httpcore2",
    "urllib3",
    "niquests",
}
MAY_USE_HTTP = {
    "prompt.media": "fetches pictures, behind the address guard",
    "cli": "is a client of a running server",
    "terminal": "is a client of a running server",
    "bench": "is a client of a running server",
    "utils": "waits for the server that it started",
}
MAY_OPEN_PICTURES = {
    "prompt.decoder": "checks size and format before it decodes",
    "bench": "decodes its own pictures for transformers",
}

UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "jsonpickle"}
UNSAFE_CALLS = {
    "eval": "runs text as code",
    "exec": "runs text as code",
    "compile": "runs text as code",
    "torch.load": "unpickles",
    "torch.save": "pickles",
    "torch.hub.load": "runs code from the network",
    "yaml.load": "builds any object; use yaml.safe_load",
    "yaml.unsafe_load": "builds any object; use yaml.safe_load",
    "os.system": "runs a shell",
}
UNSAFE_METHODS = {"send_pyobj": "pickles", "recv_pyobj": "unpickles"}
RUN_TIME_STRANGERS = {
    "transformers": "is the oracle of the tests, not a run-time dependency",
    "torchvision": "is not a dependency: it has no CPU build beside a CPU torch",
}
MAY_USE_STRANGERS = {"bench": "measures transformers beside sightline, imported when asked for"}

MAX_LINES = 500


class Violation(NamedTuple):
    """One broken rule; printed as an editor can jump to it."""

    rule: str
    path: str
    line: int
    message: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: [{self.rule}] {self.message}"


@dataclass
class Import:
    """One imported name. `eager` imports run when the module is imported; `typing` ones never run."""

    target: str
    line: int
    eager: bool
    typing: bool


@dataclass
class Module:
    """One parsed file."""

    name: str
    path: Path
    tree: ast.Module
    lines: int
    imports: list[Import] = field(default_factory=list)
    aliases: dict[str, str] = field(default_factory=dict)

    @property
    def inner(self) -> str:
        """The name below the package: "prompt.media", or "" for the package itself."""
        return self.name.partition(".")[2]

    @property
    def layer(self) -> str:
        """The rung it stands on."""
        return layer_of(self.name)


def layer_of(name: str) -> str:
    """The layer of a module's full name."""
    top = name.split(".")[1] if "." in name else ""
    return LAYER_OF.get(top, top)


def allowed(module: Module, table: dict[str, str]) -> bool:
    """Whether a table of permissions names this module or a package around it."""
    return any(module.inner == entry or module.inner.startswith(f"{entry}.") for entry in table)


def read_tree(root: Path) -> dict[str, Module]:
    """Parse every file of the package at `root`, then resolve what each imports."""
    modules: dict[str, Module] = {}
    for path in sorted(root.rglob("*.py")):
        parts = [PACKAGE, *path.relative_to(root).with_suffix("").parts]
        if parts[-1] == "__init__":
            parts.pop()
        text = path.read_text(encoding="utf-8")
        name = ".".join(parts)
        modules[name] = Module(name, path, ast.parse(text, str(path)), text.count("\n"))
    for module in modules.values():
        module.imports = list(_imports(module, modules))
    return modules


def _imports(module: Module, modules: dict[str, Module]) -> Iterator[Import]:
    """Every import statement's targets as full module names, and `module.aliases` as a side product."""

    def visit(node: ast.AST, eager: bool, typing: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                bound = alias.asname or alias.name.partition(".")[0]
                module.aliases[bound] = alias.name if alias.asname else bound
                yield Import(alias.name, node.lineno, eager, typing)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(module, node)
            for alias in node.names:
                target = f"{base}.{alias.name}"
                module.aliases[alias.asname or alias.name] = target
                # `from package import name` imports a submodule if there is one, else a name of the package
                ours = base.partition(".")[0] == PACKAGE
                yield Import(base if ours and target not in modules else target, node.lineno, eager, typing)
        for name, value in ast.iter_fields(node):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and name == "body"
                    guarded = isinstance(node, ast.If) and name == "body" and _mentions_type_checking(node.test)
                    yield from visit(child, eager and not function, typing or guarded)

    yield from visit(module.tree, True, False)


def _absolute(module: Module, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    parts = module.name.split(".")
    package = parts if module.path.name == "__init__.py" else parts[:-1]
    base = package[: len(package) - node.level + 1]
    return ".".join([*base, node.module] if node.module else base)


def _mentions_type_checking(test: ast.expr) -> bool:
    return any(getattr(n, "id", getattr(n, "attr", None)) == "TYPE_CHECKING" for n in ast.walk(test))


def check(root: Path, long_files: dict[str, str] | None = None) -> list[Violation]:
    """All violations of the tree at `root`. `long_files`: path below root -> why it may exceed MAX_LINES."""
    modules = read_tree(root)
    found: list[Violation] = []
    for module in modules.values():
        for rule, line, message in itertools.chain(
            _ladder(module), _strangers(module), _unsafe(module), _edges_of_the_world(module)
        ):
            found.append(Violation(rule, str(module.path), line, message))
    found += _torch_free(modules)
    found += _cycles(modules)
    found += _long_files(modules, root, long_files or {})
    return sorted(found, key=lambda v: (v.path, v.line, v.rule))


Finding = tuple[str, int, str]


def _ladder(module: Module) -> Iterator[Finding]:
    level = LEVEL.get(module.layer)
    if level is None:
        yield "ladder", 1, f"{module.name} has no place in the ladder: add {module.layer!r} to tests/architecture.py"
        return
    for item in module.imports:
        if item.target.partition(".")[0] != PACKAGE:
            continue
        other = layer_of(item.target)
        if other == module.layer:
            continue
        if LEVEL.get(other, len(LADDER)) >= level:
            how = "its sibling" if LEVEL.get(other) == level else "above it"
            yield "ladder", item.line, f"{module.layer} imports {item.target}, which is {how}"


def _is(target: str, name: str) -> bool:
    return target == name or target.startswith(f"{name}.")


def _strangers(module: Module) -> Iterator[Finding]:
    for item in module.imports:
        for name, reason in RUN_TIME_STRANGERS.items():
            if _is(item.target, name) and not item.typing:
                if not allowed(module, MAY_USE_STRANGERS):
                    yield "strangers", item.line, f"{name} {reason}"
                elif item.eager:
                    yield "strangers", item.line, f"{name} must be imported where it is used"


def _unsafe(module: Module) -> Iterator[Finding]:
    for item in module.imports:
        if item.target.partition(".")[0] in UNSAFE_MODULES:
            yield "unsafe", item.line, f"{item.target} can run code from data"
    for node in ast.walk(module.tree):
        if not isinstance(node, ast.Call):
            continue
        name = _dotted(node.func, module.aliases)
        if name in UNSAFE_CALLS:
            yield "unsafe", node.lineno, f"{name} {UNSAFE_CALLS[name]}"
        if isinstance(node.func, ast.Attribute) and node.func.attr in UNSAFE_METHODS:
            yield "unsafe", node.lineno, f"{node.func.attr} {UNSAFE_METHODS[node.func.attr]}"
        for keyword in node.keywords:
            if keyword.arg in {"allow_pickle", "shell", "trust_remote_code"} and _is_true(keyword.value):
                yield "unsafe", node.lineno, f"{keyword.arg}=True"


def _is_true(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def _dotted(node: ast.expr, aliases: dict[str, str]) -> str:
    """`Image.open` after `from PIL import Image` is "PIL.Image.open"; "" for what is no dotted name."""
    if isinstance(node, ast.Name):
        return aliases.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        base = _dotted(node.value, aliases)
        return f"{base}.{node.attr}" if base else ""
    return ""


def _edges_of_the_world(module: Module) -> Iterator[Finding]:
    if not allowed(module, MAY_USE_HTTP):
        for item in module.imports:
            if any(_is(item.target, client) for client in HTTP_CLIENTS):
                yield "http", item.line, f"{item.target}: only {', '.join(MAY_USE_HTTP)} may open a URL"
    if not allowed(module, MAY_OPEN_PICTURES):
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Call) and _dotted(node.func, module.aliases) == "PIL.Image.open":
                yield "pictures", node.lineno, f"only {', '.join(MAY_OPEN_PICTURES)} may open a picture"


def _is_torch_free(module: Module) -> bool:
    return module.layer in TORCH_FREE_LAYERS or module.name in TORCH_FREE_MODULES


def _torch_free(modules: dict[str, Module]) -> Iterator[Violation]:
    """No import of torch in the HTTP process's modules, nor in anything that they pull in when imported."""
    direct = {
        name: next((i for i in module.imports if _is(i.target, "torch") and i.eager and not i.typing), None)
        for name, module in modules.items()
    }
    for module in modules.values():
        if not _is_torch_free(module):
            continue
        for item in module.imports:
            if _is(item.target, "torch") and (item.eager or not allowed(module, MAY_IMPORT_TORCH_LATE)):
                yield Violation("torch", str(module.path), item.line, f"{module.name} must stay free of torch")
        parents: dict[str, tuple[str, int]] = {}
        queue = [module.name]
        while queue:
            name = queue.pop()
            if name != module.name and direct[name] is not None and not _is_torch_free(modules[name]):
                chain = [name]
                while chain[-1] in parents:
                    chain.append(parents[chain[-1]][0])
                line = next(line for child, (_, line) in parents.items() if child == chain[-2])
                message = f"imports torch through {' -> '.join(reversed(chain))}"
                yield Violation("torch", str(module.path), line, message)
                break
            for target, line in _pulled_in(modules[name], modules):
                if target not in parents and target != module.name:
                    parents[target] = (name, line)
                    queue.append(target)


def _pulled_in(module: Module, modules: dict[str, Module]) -> Iterator[tuple[str, int]]:
    """Our modules that Python runs while it imports this one: the targets and the packages around them."""
    for item in module.imports:
        if item.eager and not item.typing and item.target.partition(".")[0] == PACKAGE:
            parts = item.target.split(".")
            for end in range(1, len(parts) + 1):
                name = ".".join(parts[:end])
                if name in modules:
                    yield name, item.line


def _cycles(modules: dict[str, Module]) -> Iterator[Violation]:
    """Each import cycle once, named from its alphabetically first module (imports for typing aside)."""
    edges = {
        name: {i.target: i.line for i in module.imports if i.target in modules and not i.typing}
        for name, module in modules.items()
    }
    for start in sorted(modules):
        # a shortest way from start back to itself through modules that sort after it
        ways: list[list[str]] = [[start]]
        seen: set[str] = set()
        for way in ways:
            for target in edges[way[-1]]:
                if target == start:
                    message = f"import cycle: {' -> '.join([*way, start])}"
                    yield Violation("cycle", str(modules[start].path), edges[start][[*way, start][1]], message)
                    ways.clear()
                    break
                if target > start and target not in seen:
                    seen.add(target)
                    ways.append([*way, target])
            else:
                continue
            break


def _long_files(modules: dict[str, Module], root: Path, reasons: dict[str, str]) -> Iterator[Violation]:
    for module in modules.values():
        relative = module.path.relative_to(root).as_posix()
        if module.lines <= MAX_LINES or module.layer == "kernels":
            if relative in reasons:
                message = f"{module.lines} lines: take it off the list of long files"
                yield Violation("length", str(module.path), 1, message)
        elif relative not in reasons:
            message = f"{module.lines} lines; the house's limit is {MAX_LINES}: split it, or list it with a reason"
            yield Violation("length", str(module.path), module.lines, message)
    for relative in reasons:
        if not (root / relative).exists():
            yield Violation("length", str(root / relative), 1, "is on the list of long files and does not exist")
