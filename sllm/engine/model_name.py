"""What a user calls a model by: a path, a ``file://`` URI, a name of the Hugging Face hub in one of the
forms that the hub's pages, llama.cpp and ollama show, or one of ModelScope.

This module looks at the text alone (and whether a file of that name exists); :mod:`sllm.engine.hub`
downloads.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import parse_qs, unquote, unquote_to_bytes, urlsplit

from sllm.errors import ModelLoadError

__all__ = ["EXPECTED", "PART", "QUANT", "HubName", "looks_like_model", "parse", "suggestion"]

EXPECTED = (
    "expected hf://owner/repo[@revision]/[folder/]file.gguf or owner/repo:QUANT (ms:// in place of hf:// for"
    " ModelScope)"
)

PART = re.compile(r"(?P<stem>.+)-(?P<index>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)
"""The name of one file of a model in several: llama.cpp is given the first, and opens the others beside it
(``llama_split_path``)."""

# The two kinds of revision that hold a slash and are written as they are; any other slash is written %2F.
_SLASHED = r"refs/(?:pr/\d+|convert/[\w.-]+)"
_URI = re.compile(
    rf"(?P<owner>[^/]*)/(?P<name>[^/@:]*)(?:@(?P<revision>{_SLASHED}|[^/:]*))?"
    r"(?:/(?P<file>.*)|:(?P<tag>[^/]*))?",
    re.ASCII | re.DOTALL,
)
_REVISION_AND_FILE = re.compile(rf"(?P<revision>{_SLASHED}|[^/]+)(?:/(?P<file>.*))?", re.ASCII | re.DOTALL)

_OWNER_AND_REPO = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
_BARE = re.compile(rf"{_OWNER_AND_REPO}(?:@[\w.%-]+)?:(?P<tag>[\w.-]+)", re.ASCII)
_BARE_REPO = re.compile(_OWNER_AND_REPO, re.ASCII)
_BARE_FILE = re.compile(rf"{_OWNER_AND_REPO}/.+\.gguf", re.ASCII | re.IGNORECASE)

QUANT = r"(?:UD-)?(?:I?Q\d\w*|TQ\d\w*|B?F16|F32|MXFP\d\w*|NVFP\d\w*)"
"""What names of quantisations look like (``llama_ftype``, and what publishers of GGUF files add)."""

_TAG = re.compile(rf"{QUANT}|latest", re.ASCII | re.IGNORECASE)
"""A tag where nothing but its look says that a hub is meant."""

# ``file:/x`` is what RFC 8089 allows, and what a pathlib.Path makes of any scheme's two slashes.
_SCHEME = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+):/(?P<second>/?)(?P<rest>.*)", re.DOTALL)

_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
_KINDS = ("datasets", "spaces", "kernels", "buckets")
_VIEWS = ("resolve", "blob", "raw", "tree")


@dataclass(frozen=True)
class HubName:
    """A model on a hub.

    Attributes:
        repo_id: ``"owner/repo"``.
        filename: the file's path in the repository; None: one of its GGUF files, which ``tag`` and ``folder``
            choose.
        revision: a branch, tag or commit; None: the main branch.
        tag: a quantisation, such as ``"Q4_K_M"``, or a file's name; None: any.
        folder: where the file is; empty: anywhere.
        hub: ``"hf"``, the Hugging Face hub, or ``"ms"``, ModelScope.

    """

    repo_id: str
    filename: str | None
    revision: str | None = None
    tag: str | None = None
    folder: str = ""
    hub: str = "hf"

    @property
    def uri(self) -> str:
        """The name as an ``hf://`` or ``ms://`` URI."""
        at = ""
        if self.revision is not None:
            plain = re.fullmatch(_SLASHED, self.revision, re.ASCII)
            at = "@" + (self.revision if plain else self.revision.replace("/", "%2F"))
        inside = "" if self.filename is None else "/" + self.filename
        return f"{self.hub}://{self.repo_id}{at}{inside}" + ("" if self.tag is None else ":" + self.tag)

    def of(self, filename: str) -> HubName:
        """The file with this path in the same repository."""
        return replace(self, filename=filename, tag=None, folder="")


def parse(path: str | os.PathLike[str]) -> Path | HubName:
    """Understand what a user gave as a model; nothing is downloaded.

    ============================================================ =============================================
    ``hf://owner/repo[@revision]/[folder/]file.gguf``            that file
    ``hf://owner/repo[@revision][:QUANT]``                       the file of that quantisation
    ``hf.co/owner/repo[:QUANT]``, ``owner/repo:QUANT``           the same
    ``https://huggingface.co/owner/repo/resolve/main/file.gguf`` that file; ``/blob/``, ``/raw/`` too
    ``https://huggingface.co/owner/repo[/tree/main[/folder]]``   a file of that repository, or of that folder
    ``ms://owner/repo[@revision]/file.gguf``                     on ModelScope, in the forms of ``hf://``
    ``~/file.gguf``                                              below the home directory
    ``file:///folder/my%20file.gguf``                            a path of this machine
    ============================================================ =============================================

    ``hf.co`` and ``huggingface.co`` stand for the same hub, and so does the host of ``HF_ENDPOINT``. A file
    of this machine that has such a name counts more than the hub, where no scheme is written. Everything else
    is a path, returned as it is, whether it exists or not.

    Raises:
        ModelLoadError: a URI that names no model, or of a kind that is not understood; says what is.
        TypeError: neither str nor path-like.

    Examples:
        >>> from sllm.engine import model_name
        >>> model_name.parse("owner/repo:Q4_K_M")
        HubName(repo_id='owner/repo', filename=None, revision=None, tag='Q4_K_M', folder='', hub='hf')
        >>> model_name.parse("https://hf.co/owner/repo/resolve/main/a%20b.gguf?download=true").filename
        'a b.gguf'

    """
    text = os.fsdecode(path)
    found = _SCHEME.fullmatch(text)
    # A str with one slash is a relative path, but for file:/ of RFC 8089.
    if found and (found["second"] or not isinstance(path, str) or found["scheme"].lower() == "file"):
        return _with_scheme(text, found["scheme"].lower(), found["second"], found["rest"])
    if _exists(text):
        return Path(text)
    if text.startswith("~"):
        try:
            return Path(text).expanduser()
        except RuntimeError as error:
            raise ModelLoadError(f"cannot load {text!r}: {error}; name the whole path") from None
    host, slash, rest = text.partition("/")
    if slash and host.lower() in _hub_hosts():
        return _from_web(text, rest)
    bare = _BARE.fullmatch(text)
    if bare and _TAG.fullmatch(bare["tag"]):
        return _from_uri(text, text)
    return Path(text)


def looks_like_model(text: str) -> bool:
    """Whether a text that is not expected to be a model names one: a GGUF file, or one on the hub.

    Examples:
        >>> from sllm.engine import model_name
        >>> [model_name.looks_like_model(text) for text in ("x.gguf", "owner/repo:Q8_0", "What is x.gguf?")]
        [True, True, False]

    """
    if "\n" in text or (len(text.split()) > 1 and not _exists(text)):
        return False
    text = text.strip()
    if text.lower().endswith(".gguf") or text.lower().startswith(("hf://", "ms://")):
        return True
    try:
        found = parse(text)
        if isinstance(found, HubName):
            return True
        if not found.is_file():
            return False
        with found.open("rb") as file:
            head = file.read(8)
        return head[:4] == b"GGUF" and head[5:] == bytes(3)  # a small version, so not a text on GGUF
    except (ModelLoadError, OSError, ValueError):
        return False


def suggestion(path: Path) -> str:
    """What to say after "does not exist, expected a GGUF file" where the path may have meant the hub."""
    text = str(path)
    if _BARE_FILE.fullmatch(text) or (_BARE_REPO.fullmatch(text) and not text.lower().endswith(".gguf")):
        return f"; one on the Hugging Face hub is named hf://{text}"
    if ":" in text:
        return f"; one on the Hugging Face hub: {EXPECTED}"
    return ""


def _exists(text: str) -> bool:
    try:
        return bool(text) and os.path.lexists(text)
    except (OSError, ValueError):
        return False


def _hub_hosts() -> tuple[str, ...]:
    endpoint = urlsplit(os.environ.get("HF_ENDPOINT", "")).netloc.lower()
    return (*_HOSTS, endpoint) if endpoint else _HOSTS


def _with_scheme(text: str, scheme: str, second: str, rest: str) -> Path | HubName:
    if scheme in ("hf", "ms"):
        return replace(_from_uri(text, rest), hub=scheme)
    if scheme == "file":
        return _from_file_uri(text, rest if second else "/" + rest)
    if scheme == "sllm":  # not shown: it holds the worker's token
        raise ModelLoadError(
            "an sllm:// line names a worker, expected a model; workers are what --remote and sllm.connect()"
            " take"
        )
    host = rest.partition("/")[0].rpartition("@")[2]
    if scheme in ("http", "https"):
        if host.lower() in _hub_hosts():
            return _from_web(text, rest.partition("/")[2])
        raise ModelLoadError(
            f"cannot load {scheme}://{host}/...: sllm downloads from the Hugging Face hub and ModelScope"
            f" alone; download the file and name its path; {EXPECTED}"
        )
    raise ModelLoadError(f"cannot load {scheme}://...: no such kind of address is known; {EXPECTED}")


def _from_file_uri(text: str, rest: str) -> Path:
    """RFC 8089: ``file:///path``, percent-encoded; the host may be ``localhost``."""
    host, slash, path = rest.partition("/")
    if host.lower() not in ("", "localhost") or not slash or not path:
        raise ModelLoadError(
            f"cannot load {text!r}: it names no file of this machine; expected file:///folder/file.gguf, with"
            " three slashes"
        )
    return Path(os.fsdecode(b"/" + unquote_to_bytes(path)))


def _from_uri(text: str, rest: str) -> HubName:
    """Cut ``owner/repo[@revision][:tag]`` or ``owner/repo[@revision]/file`` apart."""
    kind, _, inside = rest.partition("/")
    if kind in _KINDS:
        raise ModelLoadError(
            f"cannot load {text!r}: it names one of the hub's {kind}, not a model; {EXPECTED}"
        )
    if kind == "models" and "/" in inside:  # the long form of the same URI
        rest = inside
    found = _URI.fullmatch(rest)
    if not found or "" in (found["owner"], found["name"], found["file"], found["tag"]):
        raise ModelLoadError(f"cannot load {text!r}: owner, repository or file is missing; {EXPECTED}")
    revision = found["revision"]
    return HubName(
        f"{found['owner']}/{found['name']}",
        found["file"],
        None if revision is None else unquote(revision),
        found["tag"],
    )


def _from_web(text: str, rest: str) -> HubName:
    """Cut what follows the host in the address of one of the hub's pages or files."""
    rest, _, _fragment = rest.partition("#")
    rest, _, query = rest.partition("?")
    pieces = [unquote(piece) for piece in rest.strip("/").split("/")]
    if len(pieces) < 3:
        name = _from_uri(text, "/".join(pieces))
        shown = parse_qs(query).get("show_file_info")  # the page that shows what is in a GGUF file
        return name.of(shown[0]) if shown and name.tag is None else name
    name = _from_uri(text, "/".join(pieces[:2]))
    view, inside = pieces[2], pieces[3:]
    if view not in _VIEWS:
        return name.of("/".join(pieces[2:]))
    found = _REVISION_AND_FILE.fullmatch("/".join(inside))
    revision, filename = (found["revision"], found["file"] or "") if found else ("", "")
    if view == "tree" and revision and not filename.lower().endswith(".gguf"):
        return replace(name, revision=revision, folder=filename)
    if not filename:
        raise ModelLoadError(f"cannot load {text!r}: the file after /{view}/ is missing; {EXPECTED}")
    return replace(name, filename=filename, revision=revision)
