"""Checks of this installation: the build, its folders, the command on the path, and packages."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import sys
import sysconfig
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from sllm.cli.checks.check import FAILED, NOTE, OK, Check
from sllm.engine import cpu
from sllm.folders import cache_folder, state_folder

__all__ = ["broken_build", "build", "command", "folders", "names", "packages"]


def build() -> Check:
    """The version, and what it was compiled with."""
    details = _build_details()
    import sllm
    from sllm.engine.mtp import has_mtp

    details["llama.cpp"] = sllm.llama_cpp_commit
    details["mtp"] = has_mtp()
    summary = (
        f"sllm {details['sllm']}, {details['kind']} build by {details['compiler']}, llama.cpp"
        f" {details['llama.cpp'][:9]}, Python {details['python']}"
    )
    if not details["mtp"]:
        summary += "; without drafts by MTP heads, which this installed llama.cpp does not export"
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
        # platform.platform() would start `uname -p`, which a Ctrl-C may leave behind.
        "platform": f"{platform.system()}-{platform.release()}-{platform.machine()}",
        "libc": " ".join(platform.libc_ver()).strip(),
    }


def broken_build(error: ImportError) -> Check:
    """The build, where the compiled core cannot be loaded, which is what ``error`` says."""
    advice = "install sllm again with this interpreter, or the library that is missing"
    return Check("build", FAILED, f"the compiled core cannot be loaded: {error}", _build_details(), advice)


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
    return places | {"cache": cache_folder("vocabularies"), "state": state_folder()}


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


_OWN_EXTRAS = ("hub", "privacy", "remote")
"""Those whose packages parts of sllm itself are written for; the others are for plugins and for tests."""


def packages() -> Check:
    """Whether the packages that sllm needs are here, and new enough; those of an extra that is not installed
    need not be here.
    """
    found: dict[str, str | None] = {}
    wrong = []
    for requirement in importlib.metadata.requires("sllm") or ():
        match = re.match(r"([A-Za-z0-9_.-]+)\s*(?:>=\s*([0-9][0-9a-zA-Z.]*))?\s*(;.*)?$", requirement)
        if match is None:
            continue
        extra = re.search(r"\bextra == ['\"]([\w-]+)", match[3] or "")
        if extra is not None and extra[1] not in _OWN_EXTRAS:
            continue
        name, least = match[1], match[2]
        try:
            found[name] = have = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            if extra is not None:
                continue
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


def names() -> Check:
    """Whether names in prose are found that nothing announces: by what the extra ``names`` brings."""
    from sllm.privacy.names import census, lac

    weights, lists = lac.installed(), census.installed()
    details = {"weights": str(weights) if weights else None, "lists": str(lists) if lists else None}
    missed = [what for what, found in (("Chinese", weights), ("English", lists)) if found is None]
    if missed:
        said = "names are masked only where a label, a title or 'my name is' announces them"
        summary = f"{' and '.join(missed)} {said}"
        return Check("names", NOTE, summary, details, "pip install 'sllm[names]'")
    return Check("names", OK, "a tagger for Chinese names and lists of English ones", details)


def _release(version: str) -> tuple[int, ...]:
    """The numbers of a version, up to where it is a pre-release or the like."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else ()
