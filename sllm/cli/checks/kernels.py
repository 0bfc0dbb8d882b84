"""Checks that run kernels, each in a child process, so that one that crashes or hangs is reported as that."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from sllm.cli.checks.check import FAILED, NOTE, OK, Check
from sllm.cli.signals import uninterrupted
from sllm.engine import cpu

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["devices", "link", "speculation"]

_CHILD_SECONDS = 120.0
"""What a check in a child process may take; the slowest takes two seconds on an idle machine."""

_DEVICES = """
import json
from sllm.engine import backends
from sllm.engine._ffi import unusable_backends
from sllm.engine.devices import devices
devices()
print(json.dumps({
    "unusable": unusable_backends,
    "modules": [[m.name, m.origin, m.error] for m in backends.load()],
    "devices": [[d.name, d.description, d.type, d.memory_free, d.memory_total] for d in devices()],
}))
"""

_ROUND = """
import json
import sllm
from sllm import embedded
from sllm.engine import exact
with sllm.LocalTarget(embedded.TARGET, n_ctx=256, n_threads=1, **exact.SETTINGS) as target, \\
     sllm.Model(embedded.DRAFT) as draft:
    options = dict(max_tokens=32, sampling=sllm.SamplingParams(temperature=0.7, seed=1))
    plain = sllm.generate(target, "Once upon a time", **options).text()
    drafted = sllm.generate(target, "Once upon a time", draft=draft, **options)
    text = drafted.text()
print(json.dumps({"plain": plain, "drafted": text, "acceptance": drafted.stats.acceptance}))
"""

_LINK = """
import json, tempfile
import sllm
from sllm import embedded
from sllm.engine import exact
with tempfile.TemporaryDirectory(prefix="sllm-doctor-") as state, \\
     sllm.Worker(embedded.DRAFT, state=state, n_ctx=128, n_threads=1, **exact.SETTINGS) as worker, \\
     sllm.connect(worker.address.uri, on_loss="raise") as remote, \\
     sllm.LocalTarget(embedded.DRAFT, n_ctx=128, n_threads=1, **exact.SETTINGS) as local:
    options = dict(max_tokens=12, sampling=sllm.SamplingParams(temperature=0.0))
    there = sllm.generate(remote.target(), "Once upon a time", **options).text()
    here = sllm.generate(local, "Once upon a time", **options).text()
print(json.dumps({"remote": there, "local": here}))
"""

_SIGNALS = {
    "SIGILL": "it used an instruction that this CPU does not have",
    "SIGSEGV": "it touched memory that is not its own",
    "SIGBUS": "it touched memory that could not be had: a truncated file, or the memory had run out",
    "SIGABRT": "it gave up on an assertion of llama.cpp's or of the C library's",
    "SIGKILL": "it was killed, most likely since the memory had run out",
    "SIGFPE": "it divided by zero",
}


def _in_child(
    code: str, seconds: float | None = None, command: Sequence[str] = ()
) -> tuple[dict[str, Any] | None, str]:
    """What ``code`` printed as JSON in a process of its own, or None and what became of it."""
    seconds = _CHILD_SECONDS if seconds is None else seconds
    argv = [*(command or (sys.executable, "-X", "faulthandler")), "-c", code]
    # The folder is not one in which a folder sllm/ may lie.
    with tempfile.TemporaryDirectory(prefix="sllm-doctor-") as folder, ExitStack() as stack:
        try:
            with uninterrupted():
                child = stack.enter_context(
                    subprocess.Popen(
                        argv,
                        cwd=folder,
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.PIPE,
                        stderr=subprocess.PIPE,
                    )
                )
                stack.callback(_end, child)
            stdout, stderr = child.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            return None, f"it did not end within {seconds:g} seconds"
        except OSError as error:
            return None, f"it could not be started: {error}"
    if child.returncode < 0:
        try:
            name = signal.Signals(-child.returncode).name
        except ValueError:
            name = f"signal {-child.returncode}"
        return None, f"it died of {name}" + (f": {_SIGNALS[name]}" if name in _SIGNALS else "")
    if child.returncode:
        lines = stderr.decode("utf-8", "replace").strip().splitlines()
        return None, lines[-1] if lines else f"it ended with status {child.returncode}"
    try:
        answer: dict[str, Any] = json.loads(stdout.decode("utf-8").splitlines()[-1])
    except (ValueError, IndexError):
        return None, "it printed nothing that could be read"
    return answer, ""


def _end(child: subprocess.Popen[bytes]) -> None:
    """Popen's own end waits a quarter of a second after a Ctrl-C, and no longer."""
    child.kill()
    child.wait()


def _crash_advice(what: str) -> str:
    if "SIGILL" in what:
        return (
            f"set ${cpu.VARIABLE} to an older variant ({', '.join(v.name for v in cpu.build().variants)}),"
            " and please report this"
            if cpu.build().kind == "portable"
            else "install sllm again on this machine (pip install --force-reinstall --no-cache-dir .), and if"
            " that does not help, please report this"
        )
    return "please report this, with all of this output"


def devices() -> Check:
    """The backends of this build and the devices that they find."""
    found, what = _in_child(_DEVICES)
    if found is None:
        return Check("devices", FAILED, f"listing the devices failed: {what}", {}, _crash_advice(what))
    shown = [
        f"{name} ({description}, {kind}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free)"
        for name, description, kind, free, total in found["devices"]
    ]
    broken = [f"{name} of {origin}: {error}" for name, origin, error in found["modules"] if error]
    broken += [f"{name} finds no device: {why}" for name, why in found["unusable"].items()]
    details = {"devices": found["devices"], "modules": found["modules"]}
    if not shown:
        return Check("devices", FAILED, "there is nothing to compute on", details, "install sllm again")
    if broken:
        return Check(
            "devices",
            NOTE,
            ", ".join(shown),
            details,
            f"a backend cannot be used: {'; '.join(broken)}",
        )
    return Check("devices", OK, ", ".join(shown), details)


def speculation() -> Check:
    """The embedded pair writes a text with a draft and one without."""
    found, what = _in_child(_ROUND)
    if found is None:
        return Check("draft, verify", FAILED, f"a text failed: {what}", {}, _crash_advice(what))
    if not found["plain"] or found["plain"] != found["drafted"]:
        return Check(
            "draft, verify",
            FAILED,
            "the text with a draft is not the text without",
            found,
            "please report this: the kernels of this build are not exact on this CPU",
        )
    share = found["acceptance"] or 0.0
    summary = f"the same text with a draft and without, {share:.0%} of the drafted tokens accepted"
    return Check("draft, verify", OK, summary, found)


def link() -> Check:
    """A worker and a client on loopback, with TLS and a token; proxies of the environment play no part, since
    connections to workers do not use them.
    """
    if importlib.util.find_spec("grpc") is None:
        summary = "not installed: workers, connections to them, and splits by layers"
        return Check("worker, TLS", NOTE, summary, {}, "pip install 'sllm[remote]', if you want them")
    found, what = _in_child(_LINK)
    if found is None:
        advice = "look at what it says; a firewall on loopback may be in the way"
        return Check("worker, TLS", FAILED, f"a worker on loopback failed: {what}", {}, advice)
    if found["remote"] != found["local"]:
        return Check(
            "worker, TLS", FAILED, "the worker's text is not this machine's", found, "please report this"
        )
    return Check("worker, TLS", OK, "a text from a worker on loopback, over TLS with a token", found)
