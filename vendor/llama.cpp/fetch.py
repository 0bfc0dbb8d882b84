"""Fill ``source/`` beside this file with the llama.cpp that ``pin.json`` names.

The Python package index carries llama.cpp's whole tree inside the source distribution of llama-cpp-python, so
pip brings it in wherever pip itself works, mirrors and proxies included. The project's own commits hold the
pin and this script, never the tree.

CMake runs this at every configure, so the common case (all is there and as pinned) is quick, and nothing is
ever half done: the tree is laid out in a temporary folder and renamed into place, with a manifest of every
file's hash. What is found there decides what happens:

* absent or empty, or an intact fill of another pin: it is filled anew;
* intact and of this pin: nothing to do;
* anything else (files missing or altered, or not ours): refused, since someone's work may be in it.
  ``--force`` says otherwise.

Only the standard library is used: the script runs before anything is installed.
"""

from __future__ import annotations

import argparse
import enum
import hashlib
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

HERE = Path(__file__).resolve().parent
PIN_FILE = HERE / "pin.json"
SOURCE_DIR = HERE / "source"
MANIFEST = "sllm-manifest.json"

# What the library is built from; this is also what the sdist carries.
CORE = ("CMakeLists.txt", "LICENSE", "licenses", "cmake", "include", "src", "ggml", "vendor/hash")
# What the benchmarks' peers (llama-bench, llama-speculative-simple, rpc-server) and models need besides.
PEERS = (
    "common",
    "examples/speculative-simple",
    "models/ggml-vocab-qwen2.gguf",
    "tools/llama-bench",
    "tools/rpc",
    "vendor",
)


class FetchError(Exception):
    """The source tree could not be made what the pin says; the message says what to do about it."""


class State(enum.Enum):
    """What state ``source/`` is in, as far as the pin is concerned."""

    COMPLETE = "complete"
    ABSENT = "absent"
    STALE = "stale"
    BROKEN = "broken"


@dataclass(frozen=True)
class Pin:
    """The upstream commit, and the source package that carries it."""

    commit: str
    version: str
    rpc_protocol: str
    package: str
    package_version: str
    sha256: str

    @classmethod
    def load(cls, path: Path = PIN_FILE) -> Pin:
        """Read ``pin.json``; every field is required, none is ignored."""
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise FetchError(f"{path} is not a readable pin: {error}") from error

    @property
    def archive_name(self) -> str:
        """The file name that the package index gives the source distribution."""
        return f"{self.package.replace('-', '_')}-{self.package_version}.tar.gz"

    @property
    def archive_root(self) -> str:
        """Where llama.cpp lies inside the archive."""
        return self.archive_name.removesuffix(".tar.gz") + "/vendor/llama.cpp/"

    @property
    def archive_head(self) -> str:
        """Where the archive says which commit that is, as long as it is packed with git's own files."""
        return self.archive_name.removesuffix(".tar.gz") + "/.git/modules/vendor/llama.cpp/HEAD"


def _under(path: str, roots: Iterable[str]) -> bool:
    return any(path == root or path.startswith(root + "/") for root in roots)


def group_of(path: str) -> str | None:
    """``"core"``, ``"peers"``, or None for a file of the upstream tree that nothing here needs."""
    if _under(path, CORE):
        return "core"
    pure = PurePosixPath(path)
    if pure.parts[0] == "vendor" and pure.name == "CMakeLists.txt":
        return "core"  # upstream's top CMakeLists.txt enters each of these folders, whatever is built
    return "peers" if _under(path, PEERS) else None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        # hashlib.file_digest() came with Python 3.11
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def inspect(source: Path, pin: Pin, groups: Sequence[str] = ("core",)) -> tuple[State, list[str]]:
    """What state ``source`` is in, and for BROKEN what is wrong with it."""
    if not source.exists():
        return State.ABSENT, []
    if not source.is_dir():
        return State.BROKEN, [f"{source} is not a folder"]
    if not any(source.iterdir()):
        return State.ABSENT, []
    try:
        manifest = json.loads((source / MANIFEST).read_text(encoding="utf-8"))
        ours = manifest["pin"] == asdict(pin)
        wanted: list[Mapping[str, str]] = [dict(manifest["files"][group]) for group in groups]
    except (OSError, ValueError, KeyError, TypeError):
        return State.BROKEN, [f"{MANIFEST} is missing or unreadable"]
    problems = []
    left_out = False
    for files in wanted:
        missing = [path for path in files if not (source / path).is_file()]
        if len(missing) == len(files) and files is not wanted[0]:
            left_out = True  # an unpacked sdist: it never had the peers' sources
            continue
        present = sorted(files.keys() - set(missing))
        problems += [f"{path} is missing" for path in missing]
        problems += [f"{path} was altered" for path in present if _sha256(source / path) != files[path]]
    if problems:
        return State.BROKEN, problems
    if left_out:
        return State.ABSENT, []
    return (State.COMPLETE if ours else State.STALE), []


def download(pin: Pin, folder: Path) -> Path:
    """Let pip bring the source distribution into ``folder``, with its hash required."""
    lockfile = folder / "llama.cpp.lock"
    requirement = f"{pin.package}=={pin.package_version} --hash=sha256:{pin.sha256}\n"
    lockfile.write_text(requirement, encoding="utf-8")
    # Not --no-binary :all:, which would hold for what pip needs to read the package's metadata, too: it then
    # compiles CMake.
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--no-binary", pin.package, "--require-hashes", "-r", str(lockfile)]
    command += ["--dest", str(folder)]
    _say(f"fetching llama.cpp {pin.commit[:9]} ({pin.package} {pin.package_version}, 77 MB) with pip")
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    archive = folder / pin.archive_name
    if result.returncode == 0 and archive.is_file():
        return archive
    if "No module named pip" in result.stderr:
        reason = f"{sys.executable} has no pip"
    else:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if "ERROR" in line] or lines
        reason = "pip download failed:\n" + "\n".join(f"  {line}" for line in errors[-6:])
    raise FetchError(
        f"llama.cpp's sources could not be fetched: {reason}\n"
        "With a network (or pip's usual settings for a mirror or proxy), run:\n"
        f"  python {_shown(Path(__file__))}\n"
        f"Without one, bring {pin.archive_name} here and name it:\n"
        f"  python {_shown(Path(__file__))} --archive PATH      (or set SLLM_LLAMA_CPP_ARCHIVE=PATH)\n"
        "or build from an existing llama.cpp checkout with SLLM_LLAMA_CPP_SOURCE_DIR=PATH."
    )


def _check_archive(archive: Path, pin: Pin) -> None:
    try:
        found = _sha256(archive)
    except OSError as error:
        message = f"{archive} cannot be read ({error.strerror}); expected a copy of {pin.archive_name}"
        raise FetchError(message) from error
    if found != pin.sha256:
        raise FetchError(
            f"{archive} is not the pinned archive: sha256 {found}, expected {pin.sha256}\n"
            f"Name a copy of {pin.archive_name} (the source distribution of {pin.package}), or leave "
            "SLLM_LLAMA_CPP_ARCHIVE unset so that pip fetches it."
        )


def _members(archive: Path, pin: Pin) -> Iterator[tuple[str, str, bytes]]:
    """(path, group, content) of every file to keep; links and odd names cannot leave the folder."""
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            if not member.isfile():
                continue
            if member.name == pin.archive_head:
                path, group = "HEAD", "git"
            elif member.name.startswith(pin.archive_root):
                path = member.name.removeprefix(pin.archive_root)
                group = group_of(path) or ""
            else:
                continue
            if ".." in PurePosixPath(path).parts or path.startswith("/"):
                raise FetchError(f"{archive} holds a file outside its folder: {member.name}")
            content = tar.extractfile(member) if group else None
            if content:
                yield path, group, content.read()


def _check_tree(tree: Path, head: str, pin: Pin) -> None:
    """What the archive says of itself must be what the pin says."""

    def numbers(file: str, pattern: str) -> str:
        text = (tree / file).read_text(encoding="utf-8")
        found = [re.search(pattern.format(part), text) for part in ("MAJOR", "MINOR", "PATCH")]
        return ".".join(match.group(1) if match else "?" for match in found)

    version = numbers("CMakeLists.txt", r"LLAMA_VERSION_{}\s+(\d+)")
    rpc_protocol = numbers("ggml/include/ggml-rpc.h", r"RPC_PROTO_{}_VERSION\s+(\d+)")
    found = {"commit": head or pin.commit, "version": version, "rpc_protocol": rpc_protocol}
    for name, value in found.items():
        expected = getattr(pin, name)
        if value != expected:
            raise FetchError(f"pin.json says {name} {expected}, the archive holds {value}: correct the pin")


def unpack(archive: Path, source: Path, pin: Pin) -> None:
    """Lay the tree out beside ``source`` and rename it into place, so it is never half filled."""
    _check_archive(archive, pin)
    source.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".source-", dir=source.parent) as scratch:
        tree, old = Path(scratch, "new"), Path(scratch, "old")
        files: dict[str, dict[str, str]] = {"core": {}, "peers": {}}
        head = ""
        for path, group, content in _members(archive, pin):
            if group == "git":
                head = content.decode(errors="replace").strip()
                continue
            target = tree / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
            files[group][path] = hashlib.sha256(content).hexdigest()
        if not files["core"]:
            raise FetchError(f"{archive} holds no {pin.archive_root}: correct the pin")
        _check_tree(tree, head, pin)
        manifest = {"pin": asdict(pin), "files": files}
        (tree / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        if source.exists():
            os.replace(source, old)
        try:
            os.replace(tree, source)
        except OSError:
            # another configure may have been quicker, which is as good
            if inspect(source, pin, ("core", "peers"))[0] is not State.COMPLETE:
                raise


def ensure(
    source: Path = SOURCE_DIR,
    pin_file: Path = PIN_FILE,
    *,
    archive: Path | None = None,
    force: bool = False,
    peers: bool = False,
) -> bool:
    """Make ``source`` what the pin says; True when it had to be filled."""
    pin = Pin.load(pin_file)
    state, problems = inspect(source, pin, ("core", "peers") if peers else ("core",))
    if state is State.COMPLETE and not force:
        return False
    if state is State.BROKEN and not force:
        shown = "\n".join(f"  {problem}" for problem in problems[:5])
        more = f"\n  and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise FetchError(
            f"{_shown(source)} is not the llama.cpp that the pin names:\n{shown}{more}\n"
            "To fill it anew (what is in it is lost), run:\n"
            f"  python {_shown(Path(__file__))} --force\n"
            "To build from your own copy of llama.cpp, set SLLM_LLAMA_CPP_SOURCE_DIR=PATH."
        )
    with tempfile.TemporaryDirectory(prefix="sllm-fetch-") as scratch:
        unpack(archive or download(pin, Path(scratch)), source, pin)
    _say(f"llama.cpp {pin.commit[:9]} is in {_shown(source)}")
    return True


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def _shown(path: Path) -> str:
    """As it would be typed from the project's root, where that is where we are."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def main(argv: list[str] | None = None) -> int:
    """Run from the command line or by CMake; 0 when ``source/`` is as pinned."""
    parser = argparse.ArgumentParser(description="Fill source/ from the package that pin.json names.")
    parser.add_argument(
        "--archive",
        type=Path,
        default=os.environ.get("SLLM_LLAMA_CPP_ARCHIVE") or None,
        help="use this copy of the source package instead of fetching it (the hash is checked)",
    )
    parser.add_argument("--force", action="store_true", help="fill anew, whatever is there")
    parser.add_argument("--peers", action="store_true", help="require the benchmarks' peers' sources, too")
    parser.add_argument("--source", type=Path, default=SOURCE_DIR, help="the folder to fill")
    parser.add_argument("--pin", type=Path, default=PIN_FILE, help="the pin to fill it from")
    options = parser.parse_args(argv)
    try:
        ensure(options.source, options.pin, archive=options.archive, force=options.force, peers=options.peers)
    except FetchError as error:
        _say(str(error))
        return 1
    except OSError as error:
        _say(f"{_shown(options.source)} could not be filled: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
