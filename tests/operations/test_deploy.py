"""deploy/ speaks of flags, routes and files that exist. What needs a Docker engine or a cluster is not run: deploy/README.md."""

from __future__ import annotations

import configparser
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from sightline.config import ENV_PREFIX, ServerConfig
from sightline.engine.node_link import check_nodes
from sightline.server.app import MODULES

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
DRAIN = ServerConfig.model_fields["drain_timeout"].default
ROUTES = {route.path for module in MODULES for route in module.router.routes}
DOCKERFILE = (DEPLOY / "docker" / "Dockerfile").read_text()
UNIT = DEPLOY / "systemd" / "sightline.service"


def instructions(text: str) -> list[tuple[str, str]]:
    """(keyword, rest) of a Dockerfile, continued lines joined."""
    joined = re.sub(r"\\\n\s*", " ", re.sub(r"^#.*\n", "", text, flags=re.M))
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line.strip())]


def settings(env: dict[str, Any]) -> dict[str, str]:
    """The settings that environment variables give; every one must exist."""
    ours = {
        name.removeprefix(ENV_PREFIX).lower(): str(value) for name, value in env.items() if name.startswith(ENV_PREFIX)
    }
    assert set(ours) <= set(ServerConfig.model_fields), ours
    return ours


def documents(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def test_every_yaml_file_is_yaml() -> None:
    files = list(DEPLOY.rglob("*.yaml"))
    assert len(files) >= 8
    for path in files:
        assert documents(path), path


def test_the_image() -> None:
    steps = instructions(DOCKERFILE)
    env = " ".join(rest for word, rest in steps if word == "ENV")
    given = settings(dict(pair.split("=", 1) for pair in shlex.split(env)))
    assert given["port"] == "8000"
    assert ("EXPOSE", "8000") in steps
    # The last USER counts, and it is made before.
    assert [rest for word, rest in steps if word == "USER"][-1] == "sightline"
    assert "useradd --uid 1000" in DOCKERFILE
    check = next(rest for word, rest in steps if word == "HEALTHCHECK")
    assert re.search(r"127\.0\.0\.1:8000(/\w+)", check)[1] in ROUTES  # type: ignore[index]
    assert next(rest for word, rest in steps if word == "ENTRYPOINT") == '["sightline", "serve"]'
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    asked = re.findall(r"\.whl\)\[(\w+)\]", DOCKERFILE)
    assert asked
    assert set(asked) <= extras.keys()
    stages = {rest.split(" AS ")[1] for word, rest in steps if word == "FROM" and " AS " in rest}
    assert stages == {"wheel", "cpu", "cuda"}


def test_the_image_copies_what_is_there_and_let_in() -> None:
    lets = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for word, rest in instructions(DOCKERFILE):
        if word == "COPY":
            for source in rest.split()[:-1]:
                assert (ROOT / source).exists(), source
                assert source.split("/")[0] in lets, source


def test_the_wheel_can_be_made_from_what_is_copied(tmp_path: Path) -> None:
    """The first stage, without Docker: the same files, the same command."""
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--wheel-dir",
        str(tmp_path / "wheels"),
        str(tmp_path),
    ]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = (tmp_path / "wheels").iterdir()
    names = subprocess.run(
        [sys.executable, "-m", "zipfile", "-l", str(wheel)], check=True, capture_output=True, text=True
    )
    for name in ("playground/index.html", "sightline-tiny/config.json", "py.typed"):
        assert name in names.stdout


def test_the_healthcheck_tells_ready_from_loading() -> None:
    """The command itself, against a server that is ready and one that is not there."""
    from tests.servers import ServerProcess

    check = next(rest for word, rest in instructions(DOCKERFILE) if word == "HEALTHCHECK")
    command = yaml.safe_load(check.partition("CMD ")[2])
    assert command[:2] == ["python", "-c"]
    with ServerProcess() as server:
        server.wait_ready()
        code = command[2].replace("8000", str(server.port))
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    gone = subprocess.run([sys.executable, "-c", code], check=False, stderr=subprocess.DEVNULL)
    assert gone.returncode != 0


def test_compose() -> None:
    folder = DEPLOY / "compose"
    compose = documents(folder / "compose.yaml")[0]
    server = compose["services"]["sightline"]
    given = settings(server["environment"])
    assert given["api_key_file"] == "/run/secrets/api_key"
    assert int(server["stop_grace_period"].removesuffix("s")) > DRAIN
    assert (folder / server["build"]["context"] / server["build"]["dockerfile"]).is_file()
    head = (folder / "compose.yaml").read_text()
    written = set(re.findall(r"> deploy/compose/(\S+)", head))
    assert written == {
        line.lstrip("/") for line in (folder / ".gitignore").read_text().splitlines() if line.startswith("/")
    }
    sources = [
        volume.split(":")[0] for service in compose["services"].values() for volume in service.get("volumes", ())
    ]
    sources += [secret["file"] for secret in compose["secrets"].values()]
    for source in sources:
        if source.startswith("./"):
            assert (folder / source).exists() or source[2:] in written, source
        else:
            assert source in compose["volumes"], source
    # Nothing is reachable from other machines unless somebody says so.
    for service in compose["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ())), service
    assert set(documents(folder / "gpu.yaml")[0]["services"]) <= set(compose["services"])


def test_prometheus_takes_its_configuration(tmp_path: Path) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed (make test-operations)")
    text = (DEPLOY / "compose" / "prometheus.yaml").read_text()
    rules = subprocess.run(
        [sys.executable, "-m", "sightline", "dashboard", "--alerts"], check=True, capture_output=True
    )
    (tmp_path / "alerts.yaml").write_bytes(rules.stdout)
    (tmp_path / "key").write_text("a")
    text = text.replace("/etc/prometheus/alerts.yaml", str(tmp_path / "alerts.yaml"))
    (tmp_path / "prometheus.yaml").write_text(text.replace("/run/secrets/api_key", str(tmp_path / "key")))
    done = subprocess.run(
        ["promtool", "check", "config", str(tmp_path / "prometheus.yaml")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_unit() -> None:
    unit = configparser.RawConfigParser(strict=False)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(UNIT)
    service = unit["Service"]
    assert service["Type"] == "notify"
    assert int(service["TimeoutStopSec"]) > DRAIN
    command = shlex.split(service["ExecStart"])
    assert command[:3] == ["/opt/sightline/bin/sightline", "serve", "--config"]
    # What starting again cannot mend, by the table of docs/operations.md.
    assert service["RestartPreventExitStatus"].split() == ["2", "3", "4", "5", "6"]
    config = documents(DEPLOY / "systemd" / "sightline.yaml")[0]
    assert set(config) <= set(ServerConfig.model_fields)


def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    # It also wants the program to exist.
    text = UNIT.read_text().replace("/opt/sightline/bin/sightline", sys.executable)
    (tmp_path / "sightline.service").write_text(text.replace("sightline serve", ""))
    done = subprocess.run(
        ["systemd-analyze", "verify", str(tmp_path / "sightline.service")], capture_output=True, text=True
    )
    complaints = [line for line in done.stderr.splitlines() if "sightline.service" in line]
    assert not complaints, complaints


def pods(path: Path) -> list[dict[str, Any]]:
    """The specs of all pods that a manifest describes, those inside custom resources too."""
    found = []

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            if "containers" in value:
                found.append(value)
            for each in value.values():
                walk(each)
        elif isinstance(value, list):
            for each in value:
                walk(each)

    for document in documents(path):
        walk(document)
    return found


MANIFESTS = [*(DEPLOY / "kubernetes").iterdir(), *(DEPLOY / "ray").glob("rayservice*.yaml")]


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_kubernetes_would_take_the_manifests(path: Path) -> None:
    """By its own schemas, where unknown fields are errors. Of custom resources, it is their pods."""
    validator = pytest.importorskip("kubernetes_validate", reason="an extra; `make test-operations` installs it")
    whole = [d for d in documents(path) if d["kind"] not in ("LeaderWorkerSet", "RayService")]
    inside = [{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "spec": spec} for spec in pods(path)]
    assert inside
    for version in ("1.30", "1.37"):
        for document in [*whole, *inside]:
            validator.validate(document, version, strict=True)
    inside[0]["spec"]["containers"][0]["imgae"] = "a"
    with pytest.raises(validator.ValidationError):
        validator.validate(inside[0], "1.37", strict=True)


def test_the_manifest_of_two_nodes() -> None:
    """As the controller of LeaderWorkerSets fills it in: https://lws.sigs.k8s.io/docs/reference/labels-annotations-and-environment-variables/"""
    workload, service = documents(DEPLOY / "kubernetes" / "two-nodes.yaml")
    template = workload["spec"]["leaderWorkerTemplate"]
    leader, worker = template["leaderTemplate"]["spec"], template["workerTemplate"]["spec"]
    for number, spec in enumerate((leader, worker)):
        (container,) = spec["containers"]
        given = " ".join(container["args"]).replace("$(LWS_GROUP_SIZE)", str(template["size"]))
        given = given.replace("$(LWS_WORKER_INDEX)", str(number)).replace("$(LWS_LEADER_ADDRESS)", "first.nodes")
        env = {each["name"]: each.get("value", "0123456789abcdef") for each in container["env"]}
        settings(env)
        config = ServerConfig.load(given.split(), env=env)
        check_nodes(config)
        assert (config.node_rank, config.nnodes) == (number, 2)
        assert container["resources"]["limits"]["nvidia.com/gpu"] == str(config.ranks_per_node)
        assert spec["securityContext"]["runAsNonRoot"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in spec["volumes"]}
        # what is not the server has nothing that a probe could ask
        assert ("readinessProbe" in container) == ("ports" in container) == (number == 0)
        assert spec["terminationGracePeriodSeconds"] > DRAIN + 8
        labels = [template[name]["metadata"]["labels"] for name in ("leaderTemplate", "workerTemplate")]
    index = service["spec"]["selector"].pop("leaderworkerset.sigs.k8s.io/worker-index")
    assert (index, [service["spec"]["selector"]] * 2) == ("0", labels)


def test_the_manifests() -> None:
    by_kind = {document["kind"]: document for document in documents(DEPLOY / "kubernetes" / "sightline.yaml")}
    pod = by_kind["Deployment"]["spec"]["template"]
    spec = pod["spec"]
    (container,) = spec["containers"]
    settings({each["name"]: each["value"] for each in container["env"]})
    config = ServerConfig.load(container["args"], env={})
    assert config.log_format == "json"
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"http": 8000}
    for probe, path in (("startupProbe", "/startupz"), ("readinessProbe", "/readyz"), ("livenessProbe", "/livez")):
        assert container[probe]["httpGet"] == {"path": path, "port": "http"}
        assert path in ROUTES
    pause = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert spec["terminationGracePeriodSeconds"] > DRAIN + pause
    assert spec["securityContext"]["runAsNonRoot"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in spec["volumes"]}
    for kind in ("Service", "PodDisruptionBudget"):
        selector = by_kind[kind]["spec"]["selector"]
        assert selector.get("matchLabels", selector) == pod["metadata"]["labels"]
    assert (
        by_kind["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]["name"]
        == by_kind["Deployment"]["metadata"]["name"]
    )
    (metric,) = by_kind["HorizontalPodAutoscaler"]["spec"]["metrics"]
    from sightline.server.metrics import DEFINITIONS

    assert metric["pods"]["metric"]["name"] in {f"sightline_{d.name}" for d in DEFINITIONS}
    claim = next(v["persistentVolumeClaim"]["claimName"] for v in spec["volumes"] if "persistentVolumeClaim" in v)
    assert by_kind["PersistentVolumeClaim"]["metadata"]["name"] == claim
