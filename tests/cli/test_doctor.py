"""``sllm doctor``: what it says of this machine, and of machines on which things are not right."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from processes import interrupt

from sllm.cli import checks as doctor
from sllm.cli import main as cli
from sllm.cli.checks import installation, kernels, machine
from sllm.engine import cpu

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A home folder, and none of the folders that variables name."""
    for name in ("HF_HOME", "SLLM_CACHE", "SLLM_STATE", "XDG_CACHE_HOME", "XDG_STATE_HOME", cpu.VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


# --- this machine ---


def test_this_machine_is_well(
    command: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    """All of it, in a process of its own; what may differ between machines are notes."""
    result = command("doctor", "--json", HOME=str(tmp_path))
    found = json.loads(result.stdout)
    assert result.returncode == (0 if found["ok"] else 1)
    checks = {check["name"]: check for check in found["checks"]}
    assert len(checks) == len(doctor.CHECKS)
    assert all(
        set(check) == {"name", "status", "summary", "details", "advice"}
        and check["status"] in (doctor.OK, doctor.NOTE, doctor.FAILED)
        for check in checks.values()
    )
    for name in ("build", "CPU", "devices", "draft, verify", "worker, TLS", "folders", "packages"):
        assert checks[name]["status"] != doctor.FAILED, checks[name]
    assert checks["draft, verify"]["details"]["plain"] == checks["draft, verify"]["details"]["drafted"]
    assert checks["CPU"]["details"]["variant"] == cpu.choose().variant.name
    assert str(tmp_path) not in result.stdout  # it is the home folder, which is nobody's business
    assert "sllm://" not in result.stdout


def test_what_has_failed_is_named_last(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    well = doctor.Check("this", doctor.OK, "is well")
    poor = doctor.Check("that", doctor.NOTE, "could be better", advice="do better")
    bad = doctor.Check("other", doctor.FAILED, "is not well", advice="mend it")
    monkeypatch.setattr(doctor.examine, "__defaults__", ((lambda: well, lambda: poor), None))
    assert cli.main(["doctor"]) == 0
    assert "Nothing has failed." in capsys.readouterr().out
    monkeypatch.setattr(doctor.examine, "__defaults__", ((lambda: well, lambda: poor, lambda: bad), None))
    assert cli.main(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert "-> mend it" in shown
    assert "-> do better" in shown
    assert shown.splitlines()[-1] == "Failed: other"


def test_lines_fit_a_narrow_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    poor = doctor.Check("that", doctor.NOTE, "could be better " * 5, advice="do better, " * 5)
    monkeypatch.setattr(doctor.examine, "__defaults__", ((lambda: poor,), None))
    monkeypatch.setenv("COLUMNS", "40")
    assert cli.main(["doctor"]) == 0
    assert [len(line) > 40 for line in capsys.readouterr().out.splitlines()] == [True, True, False, False]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("NO_COLOR", "1")
    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 40
    assert lines[0].startswith("note    that  could be better") and len(lines) > 6
    assert [line.index("do") for line in lines if "do better" in line][:2] == [17, 17]


@pytest.mark.parametrize("wrong", ["--jason", "loudly"])
def test_wrong_arguments(refused: Callable[..., str], wrong: str) -> None:
    assert wrong in refused("doctor", wrong)


@pytest.mark.skipif(sys.platform != "linux", reason="sees in /proc when a child is at work")
def test_ctrl_c_ends_it_and_the_child_at_work(start: Callable[..., subprocess.Popen[bytes]]) -> None:
    process = start("doctor")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    patience = time.monotonic() + 120
    while not (at_work := children.read_text(encoding="ascii").split()):
        assert process.poll() is None
        assert time.monotonic() < patience
        time.sleep(0.01)
    interrupt(process)
    # Where the program had to end at once, its child ends by itself.
    while Path(f"/proc/{at_work[0]}").exists():
        assert time.monotonic() < patience
        time.sleep(0.01)


def test_a_check_that_raises_is_a_failed_one() -> None:
    def broken() -> doctor.Check:
        raise RuntimeError("no such thing")

    (check,) = doctor.examine([broken])
    assert (check.name, check.status, check.summary) == (
        "broken",
        doctor.FAILED,
        "RuntimeError: no such thing",
    )


# --- kernels that crash or hang ---


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("SIGILL", "used an instruction that this CPU does not have"),
        ("SIGSEGV", "touched memory that is not its own"),
        ("SIGABRT", "gave up on an assertion"),
        ("SIGKILL", "memory had run out"),
    ],
)
def test_a_crash_is_reported_as_what_it_is(monkeypatch: pytest.MonkeyPatch, name: str, words: str) -> None:
    """The children really die."""
    code = f"import os, signal; os.kill(os.getpid(), signal.{name})"
    monkeypatch.setattr(kernels, "_ROUND", code)
    check = kernels.speculation()
    assert check.status == doctor.FAILED
    assert name in check.summary
    assert words in check.summary
    assert check.advice is not None
    if name == "SIGILL":
        assert "install sllm again" in check.advice or cpu.VARIABLE in check.advice


def test_a_hang_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_CHILD_SECONDS", 0.5)
    monkeypatch.setattr(kernels, "_LINK", "import time; time.sleep(60)")
    check = kernels.link()
    assert check.status == doctor.FAILED
    assert "did not end within 0.5 seconds" in check.summary


def test_an_exception_in_a_child_is_told_in_its_last_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_DEVICES", "raise SystemError('the driver is gone')")
    check = kernels.devices()
    assert check.status == doctor.FAILED
    assert "SystemError: the driver is gone" in check.summary


@pytest.mark.parametrize("printed", ["", "no JSON"])
def test_a_child_that_says_nothing(monkeypatch: pytest.MonkeyPatch, printed: str) -> None:
    monkeypatch.setattr(kernels, "_ROUND", f"print({printed!r})")
    assert "printed nothing that could be read" in kernels.speculation().summary


def test_texts_that_differ_are_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = json.dumps({"plain": "one", "drafted": "two", "acceptance": 0.5})
    monkeypatch.setattr(kernels, "_ROUND", f"print({answer!r})")
    assert kernels.speculation().status == doctor.FAILED
    answer = json.dumps({"remote": "one", "local": "two"})
    monkeypatch.setattr(kernels, "_LINK", f"print({answer!r})")
    assert kernels.link().status == doctor.FAILED


def test_proxies_of_the_environment_are_not_in_the_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "http_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://user:secret@127.0.0.1:9")
    check = kernels.link()
    assert check.status == doctor.OK
    assert "secret" not in repr(check)


# --- the CPU ---


def test_features_that_the_kernels_leave_unused(monkeypatch: pytest.MonkeyPatch) -> None:
    variant = cpu.Variant("generic", ("sse4_2",))
    built = cpu.Build("generic", "GNU 12.2.0", amx=False, tag="", variants=(variant,))
    monkeypatch.setattr(cpu, "build", lambda: built)
    monkeypatch.setattr(cpu, "choose", lambda: cpu.Choice(variant, "the only kernels of this build", ()))
    monkeypatch.setattr(cpu, "features", lambda: ("avx", "avx2", "sse4_2"))
    check = machine.processor()
    assert check.status == doctor.NOTE
    assert check.advice is not None
    assert "avx, avx2" in check.advice
    monkeypatch.setattr(cpu, "features", lambda: ("amx_int8", "amx_tile", "sse4_2"))
    check = machine.processor()
    assert check.status == doctor.OK  # left out on purpose
    assert check.advice is not None
    assert "SLLM_AMX=ON" in check.advice
    monkeypatch.setattr(cpu, "build", lambda: replace(built, kind="system"))
    assert machine.processor().status == doctor.OK


@pytest.mark.parametrize("as_json", [False, True])
def test_where_the_kernels_cannot_run_it_still_answers(
    command: Callable[..., subprocess.CompletedProcess[str]], as_json: bool
) -> None:
    result = command("doctor", *(["--json"] if as_json else []), SLLM_CPU_VARIANT="nosuch")
    assert result.returncode == 1
    assert "SLLM_CPU_VARIANT is 'nosuch'" in result.stdout
    assert "Traceback" not in result.stderr
    if as_json:
        assert json.loads(result.stdout)["ok"] is False


def test_where_the_kernels_cannot_run_other_commands_say_so_in_a_line(
    command: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    result = command("devices", SLLM_CPU_VARIANT="nosuch")
    assert result.returncode == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("sllm: $SLLM_CPU_VARIANT is 'nosuch'")
    assert "sllm doctor" in line


def test_a_core_that_does_not_load_is_a_failed_build() -> None:
    checks = doctor.without_core(ImportError("libcudart.so.13: cannot open shared object file"))
    assert checks[0].status == doctor.FAILED
    assert "libcudart.so.13" in checks[0].summary


# --- threads ---


def test_a_container_with_less_than_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cpu_quota", lambda: 0.5)
    check = machine.threads()
    assert check.status == doctor.NOTE
    assert check.advice is not None
    assert "n_threads=1" in check.advice
    monkeypatch.setattr(machine, "cpu_quota", lambda: None)
    assert machine.threads().status == doctor.OK


# --- folders ---


def test_folders_that_cannot_be_written(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a file, since root may write everywhere else."""
    (home / "file").touch()
    monkeypatch.setenv("SLLM_STATE", str(home / "file" / "state"))
    check = installation.folders()
    assert check.status == doctor.FAILED
    assert "state" in check.summary
    assert "is not a folder" in check.summary
    assert check.details["state"]["writable"] is False
    assert check.details["cache"]["writable"] is True
    assert check.advice is not None
    assert "SLLM_STATE" in check.advice


def test_folders_that_are_not_there_yet_are_not_made(home: Path) -> None:
    check = installation.folders()
    assert check.status != doctor.FAILED
    assert not (home / ".cache").exists()
    assert not (home / ".local").exists()


def test_a_full_disk_is_noted(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(home)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=12_000_000))
    check = installation.folders()
    assert check.status == doctor.NOTE
    assert "12 MB free" in check.summary


# --- the command and the packages ---


def distribution(folder: Path, name: str, *, requires: str = "", top: str | None = None) -> None:
    info = folder / f"{name.replace('-', '_')}-9.9.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.9\n{requires}")
    if top is not None:
        (info / "top_level.txt").write_text(f"{top}\n")


def test_another_package_with_a_module_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    distribution(tmp_path, "serverless-llm", top="sllm")
    monkeypatch.syspath_prepend(str(tmp_path))
    check = installation.command()
    assert check.status == doctor.FAILED
    assert "serverless-llm" in check.summary
    assert check.advice is not None
    assert "pip uninstall serverless-llm" in check.advice


def test_another_command_first_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "sllm"
    script.write_text("#!/usr/bin/python3\nfrom sllm.store import main\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    check = installation.command()
    assert check.status == doctor.NOTE
    assert str(script) in check.summary
    script.write_text(f"#!{sys.executable}\nfrom sllm.cli.main import main\n")
    assert installation.command().status == doctor.OK


def test_no_command_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    check = installation.command()
    assert check.status == doctor.NOTE
    assert "no command sllm" in check.summary


def test_packages_that_are_missing_or_old(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = ["numpy>=1.24", "cffi>=999", "no-such-package>=1", "openai>=999; extra == 'openai'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda _name: needs)
    check = installation.packages()
    assert check.status == doctor.FAILED
    assert "cffi is " in check.summary
    assert "999 or newer is needed" in check.summary
    assert "no-such-package is missing" in check.summary
    assert "openai" not in check.summary
    assert "numpy" not in check.summary


def test_packages_of_extras_may_be_missing_and_may_not_be_old(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = ["numpy>=1.24", "grpcio>=999; extra == 'remote'", 'no-such-package>=1; extra == "hub"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda _name: needs)
    check = installation.packages()
    assert check.status == doctor.FAILED
    assert check.summary.startswith("grpcio is ") and check.summary.endswith("999 or newer is needed")
    assert "no-such-package" not in check.details


@pytest.mark.parametrize(
    ("older", "newer"), [("1.9", "1.10"), ("1.24.4", "2.0.0rc1"), ("0.25", "0.25.1"), ("4", "4.25.0")]
)
def test_versions_are_compared_by_their_numbers(older: str, newer: str) -> None:
    assert installation._release(older) < installation._release(newer)


def test_few_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    resource: Any = pytest.importorskip("resource")
    monkeypatch.setattr(resource, "getrlimit", lambda _what: (256, 4096))
    assert machine.limits().status == doctor.NOTE
