"""examples/deploy: the files parse, the options in them exist, the dashboard shows figures that there are."""

from __future__ import annotations

import argparse
import configparser
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sllm.cli import status, worker
from sllm.worker.server import Monitoring, Worker

if TYPE_CHECKING:
    from sllm.engine.model import Model

DEPLOY = Path(__file__).parents[1] / "examples" / "deploy"
FILES = ["Containerfile", "README.md", "kubernetes.yaml", "sllm-worker.service"]

# Of Kubernetes' objects the fields that the manifest uses, as the official Python client 37.0 has them, each
# with those inside it: "*" for those of the user, None for a value.
META = {"name": None, "labels": "*", "annotations": "*"}
SELECTOR = {"matchLabels": "*"}
PORT = {"name": None, "port": None, "targetPort": None}
PROBE = {
    "httpGet": {"path": None, "port": None},
    "periodSeconds": None,
    "timeoutSeconds": None,
    "failureThreshold": None,
}
CONTAINER = {
    "name": None,
    "image": None,
    "command": None,
    "args": None,
    "ports": {"name": None, "containerPort": None},
    "startupProbe": PROBE,
    "livenessProbe": PROBE,
    "readinessProbe": PROBE,
    "lifecycle": {"preStop": {"exec": {"command": None}}},
    "resources": {"requests": "*", "limits": "*"},
    "securityContext": {
        "allowPrivilegeEscalation": None,
        "readOnlyRootFilesystem": None,
        "capabilities": {"drop": None},
    },
    "volumeMounts": {"name": None, "mountPath": None, "readOnly": None},
}
POD = {
    "automountServiceAccountToken": None,
    "terminationGracePeriodSeconds": None,
    "topologySpreadConstraints": {
        "maxSkew": None,
        "topologyKey": None,
        "whenUnsatisfiable": None,
        "labelSelector": SELECTOR,
    },
    "securityContext": {
        "runAsNonRoot": None,
        "runAsUser": None,
        "runAsGroup": None,
        "fsGroup": None,
        "seccompProfile": {"type": None},
    },
    "containers": CONTAINER,
    "volumes": {
        "name": None,
        "persistentVolumeClaim": {"claimName": None, "readOnly": None},
        "secret": {"secretName": None, "defaultMode": None},
        "emptyDir": {"sizeLimit": None},
    },
}
KINDS: dict[tuple[str, str], Any] = {
    ("apps/v1", "Deployment"): {
        "minReadySeconds": None,
        "strategy": {"type": None, "rollingUpdate": {"maxSurge": None, "maxUnavailable": None}},
        "selector": SELECTOR,
        "template": {"metadata": META, "spec": POD},
    },
    ("v1", "Service"): {
        "clusterIP": None,
        "type": None,
        "externalTrafficPolicy": None,
        "selector": "*",
        "ports": PORT,
    },
    ("policy/v1", "PodDisruptionBudget"): {"maxUnavailable": None, "selector": SELECTOR},
    ("autoscaling/v2", "HorizontalPodAutoscaler"): {
        "scaleTargetRef": {"apiVersion": None, "kind": None, "name": None},
        "minReplicas": None,
        "maxReplicas": None,
        "metrics": {
            "type": None,
            "pods": {"metric": {"name": None}, "target": {"type": None, "averageValue": None}},
        },
        "behavior": {"scaleDown": {"stabilizationWindowSeconds": None}},
    },
    ("networking.k8s.io/v1", "NetworkPolicy"): {
        "podSelector": SELECTOR,
        "policyTypes": None,
        "ingress": {"ports": {"port": None}, "from": {"namespaceSelector": SELECTOR}},
    },
}
pytestmark = pytest.mark.skipif(not DEPLOY.is_dir(), reason="there is no source tree here")


def options(*modules: Any) -> set[str]:
    parser = argparse.ArgumentParser()
    for module in modules[:1]:
        module.add_arguments(parser)
    found = set(parser._option_string_actions)
    return found | options(*modules[1:]) if modules[1:] else found


@pytest.mark.parametrize("name", FILES)
def test_each_option_exists(name: str) -> None:
    text = (DEPLOY / name).read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if "sllm" in line or line.lstrip().startswith(("--", "- --"))]
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", "\n".join(lines)))
    others = {"--no-cache-dir", "--now", "--from-file", "--cert", "--key", "--read-only", "--cap-drop"}
    others |= {"--security-opt", "--ulimit", "--system", "--from", "--uid", "--home-dir", "--shell"}
    assert named - others - options(worker, status) == set()
    assert named & options(worker, status)


def test_the_service() -> None:
    unit = configparser.ConfigParser(strict=True, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(DEPLOY / "sllm-worker.service")
    service = unit["Service"]
    assert service["Type"] == "notify" and int(service["WatchdogSec"]) > 0
    assert int(service["LimitNOFILE"]) >= 65536
    drain = int(re.findall(r"--drain (\d+)", service["ExecStart"])[0])
    assert int(service["TimeoutStopSec"]) > drain + worker._CLOSING_SECONDS


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd here")
def test_systemd_takes_the_service(tmp_path: Path) -> None:
    program = tmp_path / "sllm"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    unit = tmp_path / "sllm-worker.service"
    text = (DEPLOY / unit.name).read_text(encoding="utf-8")
    unit.write_text(text.replace("/opt/sllm/bin/sllm", str(program)))
    ended = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ended.returncode, ended.stdout + ended.stderr) == (0, "")


def manifest() -> list[dict[str, Any]]:
    yaml = pytest.importorskip("yaml")
    return list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text(encoding="utf-8")))


def unknown(value: Any, fields: Any, path: str = "") -> list[str]:
    """The fields of an object that are not among the known ones."""
    if isinstance(value, list) and isinstance(fields, dict):
        return [name for item in value for name in unknown(item, fields, path)]
    if fields is None:
        return [path] if isinstance(value, dict) else []
    if not isinstance(value, dict):
        return [path]
    if fields == "*":
        return []
    found = [f"{path}.{name}" for name in value if name not in fields]
    return found + [
        name
        for key, inner in value.items()
        if key in fields
        for name in unknown(inner, fields[key], f"{path}.{key}")
    ]


def test_kubernetes_knows_every_field() -> None:
    names = {"apiVersion": None, "kind": None, "metadata": META}
    objects = manifest()
    assert {(one["apiVersion"], one["kind"]) for one in objects} == set(KINDS)
    for one in objects:
        assert unknown(one, {**names, "spec": KINDS[one["apiVersion"], one["kind"]]}, one["kind"]) == []
    wrong: dict[str, Any] = {"spec": {"template": {"spec": {"containers": [{"preStop": {}}]}}}}
    assert unknown(wrong, {"spec": KINDS["apps/v1", "Deployment"]}) == [
        ".spec.template.spec.containers.preStop"
    ]


def test_kubernetes_takes_workers_away_in_good_order() -> None:
    kinds = {one["kind"]: one for one in manifest()}
    deployment = kinds["Deployment"]["spec"]
    assert deployment["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
    pod = deployment["template"]["spec"]
    (container,) = pod["containers"]
    drain = int(next(arg for arg in container["args"] if arg.startswith("--drain=")).partition("=")[2])
    program, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
    readiness = container["readinessProbe"]
    assert program == "sleep"
    assert pod["terminationGracePeriodSeconds"] > int(seconds) + drain + worker._CLOSING_SECONDS
    assert container["livenessProbe"]["httpGet"]["path"] == "/live"
    assert readiness["httpGet"]["path"] == "/health"
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}


def test_kubernetes_shows_clients_every_worker() -> None:
    objects = manifest()
    (deployment,) = [one for one in objects if one["kind"] == "Deployment"]
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    services = {one["metadata"]["name"]: one["spec"] for one in objects if one["kind"] == "Service"}
    assert services["sllm-worker"]["clusterIP"] == "None"  # DNS: the pods' own addresses
    for service in services.values():
        assert service["selector"].items() <= labels.items()
        (port,) = service["ports"]
        # Without an address of its own, a service's port is the pod's.
        assert port["port"] == ports[port["targetPort"]] == 50051
    for kind in ("PodDisruptionBudget", "Deployment"):
        (spec,) = [one["spec"] for one in objects if one["kind"] == kind]
        assert spec["selector"]["matchLabels"].items() <= labels.items()
    (scaler,) = [one["spec"] for one in objects if one["kind"] == "HorizontalPodAutoscaler"]
    assert scaler["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    assert 2 <= scaler["minReplicas"] < scaler["maxReplicas"]
    assert "replicas" not in deployment["spec"]  # each apply would undo what the autoscaler has done


def test_the_dashboard_shows_what_there_is(tmp_path: Path, draft_model: Model) -> None:
    pytest.importorskip("prometheus_client")
    from sllm.worker.metrics import Figures

    board = json.loads((DEPLOY / "grafana.json").read_text(encoding="utf-8"))
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    used = {name for query in queries for name in re.findall(r"\b(?:sllm|process)_\w+", query)}
    manifest = (DEPLOY / "kubernetes.yaml").read_text(encoding="utf-8")
    used |= set(re.findall(r"\bname: (sllm_\w+)", manifest))
    with Worker(
        draft_model, n_ctx=64, state=tmp_path, monitoring=Monitoring(metrics=("127.0.0.1", 0))
    ) as one:
        monitor = one._monitor
        figures = Figures(one._scheduler, monitor.calls, one._health, monitor.watch, None, {})
        there = set()
        for family in figures.collect():
            # A labelled counter has no samples before its first event.
            there |= {sample.name for sample in family.samples} | {
                f"{family.name}_total" if family.type == "counter" else family.name
            }
    there |= {"process_resident_memory_bytes", "process_open_fds", "process_max_fds"}
    assert len(used) > 20
    assert used - there == set()
