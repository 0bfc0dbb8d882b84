"""What this build and this machine are, and what is wrong with them.

Each check is a function that returns a :class:`Check`; :func:`examine` runs them all. What runs kernels runs
in a child process, so that one that crashes or hangs is reported as that. Nothing secret is in a result: no
token, and the home folder is written ``~``, since people paste this into reports.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sllm.cli.cpu_quota import cpu_quota
from sllm.engine import cpu
from sllm.errors import UnsupportedCPUError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

__all__ = ["CHECKS", "Check", "examine", "without_core"]

OK, NOTE, FAILED = "ok", "note", "failed"

_CHILD_SECONDS = 120.0
"""What a check in a child process may take; the slowest takes two seconds on an idle machine."""


@dataclass(frozen=True)
class Check:
    """What was found.

    Attributes:
        name: of the check, a word or two.
        status: ``"ok"``, ``"note"`` (works, and could be better) or ``"failed"``.
        summary: a line.
        details: more, in values that JSON has.
        advice: what to do about it, if anything.

    """

    name: str
    status: str
    summary: str
    details: Mapping[str, Any] = field(default_factory=dict)
    advice: str | None = None


def _home_hidden(value: Any) -> Any:
    """``value`` with the user's home folder written ``~``, in all texts that it holds."""
    if isinstance(value, str):
        home = str(Path("~").expanduser())
        return value.replace(home, "~") if len(home) > 1 else value
    if isinstance(value, dict):
        return {key: _home_hidden(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_home_hidden(item) for item in value]
    return value


# --- the build and the CPU ---


def build() -> Check:
    """The version, and what it was compiled with."""
    details = _build_details()
    import sllm

    details["llama.cpp"] = sllm.llama_cpp_commit
    summary = (
        f"sllm {details['sllm']}, {details['kind']} build by {details['compiler']}, llama.cpp"
        f" {details['llama.cpp'][:9]}, Python {details['python']}"
    )
    return Check("build", OK, summary, details)


def _build_details() -> dict[str, Any]:
    built = cpu.build()
    return {
        "sllm": importlib.metadata.version("sllm"),
        "kind": built.kind,
        "compiler": built.compiler,
        "amx": built.amx,
        "python": platform.python_version(),
        "interpreter": sys.executable,
        "platform": platform.platform(),
        "libc": " ".join(platform.libc_ver()).strip(),
    }


def processor() -> Check:
    """Which kernels run on this CPU, why, and what of it they do not use."""
    built = cpu.build()
    details: dict[str, Any] = {
        "cpu": cpu.brand() or platform.processor(),
        "features": list(cpu.features()),
        "variants": [variant.name for variant in built.variants],
    }
    try:
        choice = cpu.choose()
    except UnsupportedCPUError as error:
        return Check("CPU", FAILED, str(error), details)
    unused = sorted(set(cpu.features()) & _SPEED - set(choice.variant.needs))
    details |= {
        "variant": choice.variant.name,
        "reason": choice.reason,
        "passed_over": {variant.name: list(missing) for variant, missing in choice.passed_over},
        "unused": unused,
    }
    summary = f"{details['cpu']}: kernels {choice.variant.name!r}, {choice.reason}"
    amx = [feature for feature in unused if feature.startswith("amx")]
    others = [feature for feature in unused if feature not in amx]
    if built.kind == "system":
        return Check("CPU", OK, f"{summary} (the system's llama.cpp chooses by itself)", details)
    if others:
        advice = f"the kernels leave {', '.join(others)} unused: " + (
            f"unset ${cpu.VARIABLE}"
            if os.environ.get(cpu.VARIABLE)
            else "install sllm again on this machine (pip install --force-reinstall --no-cache-dir .)"
        )
        return Check("CPU", NOTE, summary, details, advice)
    if amx:
        advice = "AMX is left unused, since results would not be exact; SLLM_AMX=ON at build time turns it on"
        return Check("CPU", OK, summary, details, advice)
    return Check("CPU", OK, summary, details)


# What kernels are quicker with; the rest of cpu.features() comes along with these.
_SPEED = {"sse4_2", "avx", "f16c", "fma", "avx2", "bmi2", "avx_vnni", "avx512f", "avx512bw", "avx512vbmi"}
_SPEED |= {"avx512_vnni", "avx512_bf16", "amx_int8", "amx_tile", "asimddp", "asimdhp", "i8mm", "sve"}


def threads() -> Check:
    """How many cores this process may use, and how many threads a model takes by default."""
    from sllm.engine.context import available_cores

    cores, allowed = os.cpu_count() or 1, available_cores()
    quota = cpu_quota()
    details: dict[str, Any] = {"cores": cores, "allowed": allowed, "quota": quota, "default": allowed}
    omp = os.environ.get("OMP_NUM_THREADS")
    if quota is not None and quota < allowed:
        return Check(
            "threads",
            NOTE,
            f"{allowed} threads by default, and a quota of {quota:g} cores for this container",
            details,
            f"pass n_threads={max(1, int(quota))} (--threads): threads that wait for a core by spinning slow"
            " each other down",
        )
    if omp:
        details["OMP_NUM_THREADS"] = omp
    return Check("threads", OK, f"{allowed} of {cores} cores, one thread each", details)


# --- what runs kernels ---

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
    with tempfile.TemporaryDirectory(prefix="sllm-doctor-") as folder:  # not where a folder sllm/ may lie
        try:
            ended = subprocess.run(
                argv, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, timeout=seconds, check=False
            )
        except subprocess.TimeoutExpired:
            return None, f"it did not end within {seconds:g} seconds"
        except OSError as error:
            return None, f"it could not be started: {error}"
    if ended.returncode < 0:
        try:
            name = signal.Signals(-ended.returncode).name
        except ValueError:
            name = f"signal {-ended.returncode}"
        return None, f"it died of {name}" + (f": {_SIGNALS[name]}" if name in _SIGNALS else "")
    if ended.returncode:
        lines = ended.stderr.decode("utf-8", "replace").strip().splitlines()
        return None, lines[-1] if lines else f"it ended with status {ended.returncode}"
    try:
        answer: dict[str, Any] = json.loads(ended.stdout.decode("utf-8").splitlines()[-1])
    except (ValueError, IndexError):
        return None, "it printed nothing that could be read"
    return answer, ""


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


# --- folders, packages, limits ---


def folders() -> Check:
    """Where downloads, vocabularies, keys and tokens go, and whether they can be written there."""
    places = _places()
    found: dict[str, Any] = {}
    wrong = []
    tight = []
    for what, path in places.items():
        reason = _why_not_writable(path)
        free = _free_bytes(path)
        found[what] = {"path": str(path), "writable": reason is None, "free_bytes": free}
        if reason is not None:
            wrong.append(f"{what} ({path}): {reason}")
        elif free is not None and free < 1e9:
            tight.append(f"{what} ({path}): {free / 1e6:.0f} MB free")
    if wrong:
        advice = "make them writable, or name others with HF_HOME, SLLM_CACHE, SLLM_STATE and TMPDIR"
        return Check("folders", FAILED, f"cannot be written: {'; '.join(wrong)}", found, advice)
    if tight:
        return Check("folders", NOTE, f"little room: {'; '.join(tight)}", found, "free some room")
    summary = ", ".join(f"{what} in {path}" for what, path in places.items())
    return Check("folders", OK, summary, found)


def _places() -> dict[str, Path]:
    """The folders by what they are for; without those of parts whose packages are not installed."""
    places = {"temporary files": Path(tempfile.gettempdir())}
    with suppress(ImportError):
        from huggingface_hub import constants

        places["downloads"] = Path(constants.HF_HUB_CACHE)
    with suppress(ImportError):
        from sllm.remote.connection import cache_folder
        from sllm.wire.auth import state_folder

        places |= {"cache": cache_folder(), "state": state_folder()}
    return places


def _existing(path: Path) -> Path:
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def _why_not_writable(path: Path) -> str | None:
    """Why no file can be made in a folder that may not be there yet; looked for by making one."""
    there = _existing(path)
    if not there.is_dir():
        return f"{there} is not a folder"
    try:
        with tempfile.TemporaryFile(dir=there):
            return None
    except OSError as error:
        return error.strerror or str(error)


def _free_bytes(path: Path) -> int | None:
    try:
        return shutil.disk_usage(_existing(path)).free
    except OSError:
        return None


def command() -> Check:
    """Whether ``sllm`` on the path, and the module of that name, are this package's."""
    details: dict[str, Any] = {}
    owners = sorted(set(importlib.metadata.packages_distributions().get("sllm", ())) - {"sllm"})
    details["other_packages"] = owners
    ours = Path(sysconfig.get_path("scripts")) / ("sllm.exe" if os.name == "nt" else "sllm")
    found = shutil.which("sllm")
    details |= {"on_path": found, "expected": str(ours)}
    if owners:
        return Check(
            "command",
            FAILED,
            f"{', '.join(owners)} installs a module named sllm, too, into this environment",
            details,
            f"pip uninstall {' '.join(owners)}, then install sllm again; or use an environment of its own",
        )
    if found is None:
        advice = f"activate the environment, or call {ours} or {sys.executable} -m sllm"
        return Check("command", NOTE, "there is no command sllm on the path", details, advice)
    if not _is_ours(Path(found), ours):
        return Check(
            "command",
            NOTE,
            f"the command sllm on the path is another one, {found}",
            details,
            f"activate the environment, or call {ours}; serverless-llm has a command of that name, too",
        )
    return Check("command", OK, str(found), details)


def _is_ours(found: Path, ours: Path) -> bool:
    if ours.exists() and found.resolve() == ours.resolve():
        return True
    try:
        text = found.read_bytes()[:4096].decode("utf-8", "replace")
    except OSError:
        return False
    return str(sys.executable) in text.partition("\n")[0] and "sllm.cli.main" in text


def packages() -> Check:
    """Whether the packages that sllm needs are here, and new enough."""
    found: dict[str, str | None] = {}
    wrong = []
    for requirement in importlib.metadata.requires("sllm") or ():
        match = re.match(r"([A-Za-z0-9_.-]+)\s*(?:>=\s*([0-9][0-9a-zA-Z.]*))?\s*(;.*)?$", requirement)
        if match is None or "extra" in (match[3] or ""):
            continue
        name, least = match[1], match[2]
        try:
            found[name] = have = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
            wrong.append(f"{name} is missing")
            continue
        if least is not None and _release(have) < _release(least):
            wrong.append(f"{name} is {have}, and {least} or newer is needed")
    if wrong:
        return Check("packages", FAILED, "; ".join(wrong), found, "pip install --upgrade sllm's requirements")
    shown = ", ".join(
        f"{name} {found[name]}" for name in ("numpy", "cffi", "grpcio", "protobuf") if name in found
    )
    return Check("packages", OK, shown, found)


def _release(version: str) -> tuple[int, ...]:
    """The numbers of a version, up to where it is a pre-release or the like."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else ()


def limits() -> Check:
    """How many files and connections this process may have open."""
    try:
        import resource
    except ImportError:  # Windows
        return Check("open files", OK, "no limit is known")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    details = {"soft": soft, "hard": hard}
    if soft < 1024:
        advice = "ulimit -n 4096 before a worker starts: each client takes two or three"
        return Check("open files", NOTE, f"at most {soft}", details, advice)
    return Check("open files", OK, f"at most {soft}", details)


# --- all of it ---

CHECKS: tuple[Callable[[], Check], ...] = (
    build,
    processor,
    threads,
    devices,
    speculation,
    link,
    folders,
    command,
    packages,
    limits,
)


def examine(
    checks: Iterable[Callable[[], Check]] = CHECKS, started: Callable[[str], None] | None = None
) -> list[Check]:
    """Run the checks; one that raises is a failed one.

    Args:
        checks: which.
        started: called with the name of each before it runs.

    """
    found = []
    for check in checks:
        if started is not None:
            started(check.__name__)
        try:
            result = check()
        except Exception as error:  # noqa: BLE001 - what is wrong with the machine may be anything
            result = Check(check.__name__, FAILED, f"{type(error).__name__}: {error}")
        found.append(
            Check(
                result.name,
                result.status,
                _home_hidden(result.summary),
                _home_hidden(dict(result.details)),
                _home_hidden(result.advice),
            )
        )
    return found


def without_core(error: ImportError) -> list[Check]:
    """What can be said where the package cannot be imported, which is what ``error`` says."""
    if isinstance(error, UnsupportedCPUError):
        return examine((processor, command, packages))

    def broken() -> Check:
        advice = "install sllm again with this interpreter, or the library that is missing"
        return Check(
            "build", FAILED, f"the compiled core cannot be loaded: {error}", _build_details(), advice
        )

    return examine((broken, processor, command, packages))
