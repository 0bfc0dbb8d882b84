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


def test_kubernetes() -> None:
    yaml = pytest.importorskip("yaml")
    kinds = {one["kind"]: one for one in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())}
    assert set(kinds) == {"Deployment", "Service", "HorizontalPodAutoscaler", "NetworkPolicy"}
    pod = kinds["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    drain = int(next(arg for arg in container["args"] if arg.startswith("--drain=")).partition("=")[2])
    assert pod["terminationGracePeriodSeconds"] > drain + worker._CLOSING_SECONDS
    assert container["livenessProbe"]["httpGet"]["path"] == "/live"
    assert container["readinessProbe"]["httpGet"]["path"] == "/health"
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}


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
