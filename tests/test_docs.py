"""What the documents show is what happens: their blocks of Python and their commands run, page by page."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import pkgutil
import pydoc
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from documents import RUN, SHOWN, Block, blocks, commands, read
from page_session import PageSession

import sllm

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[1]
CHINESE = {
    "README.md": "README.zh.md",
    "docs/faq.md": "docs/zh/faq.md",
    "docs/tutorials/chat.md": "docs/zh/tutorials/chat.md",
    "docs/tutorials/tunnel.md": "docs/zh/tutorials/tunnel.md",
}
"""Documents that there are in two languages."""
PAGES = [
    path
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    if path not in [ROOT / other for other in CHINESE.values()]
]
pytestmark = [
    pytest.mark.usefixtures("one_core"),
    pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="no source tree here"),
]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.skipif(sys.platform != "linux", reason="pages use several addresses of the loopback network")
@pytest.mark.parametrize("path", [path for path in PAGES if read(path)], ids=name)
def test_what_a_page_shows_happens(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = read(path)
    monkeypatch.chdir(tmp_path)
    with PageSession(name(path), tmp_path) as session:
        n_run = session.run(found)
    assert n_run == sum(block.language in RUN and block.reason is None for block in found)


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_every_block_says_what_it_is(path: Path) -> None:
    """A block without a language, or with one that nobody knows, would be run by nobody."""
    strange = [
        f"line {block.line}: {block.language!r}" for block in read(path) if block.language not in RUN + SHOWN
    ]
    assert strange == []


def test_a_block_that_is_not_run_has_a_reason() -> None:
    without = [
        f"{name(path)}, line {block.line}: {block.reason!r}"
        for path in PAGES
        for block in read(path)
        if block.reason is not None and not re.search(r"\w+ \w+ \w+", block.reason)
    ]
    assert without == []


def test_most_blocks_are_run() -> None:
    every = [block for path in PAGES for block in read(path) if block.language in RUN]
    assert len(every) > 30
    assert sum(block.reason is not None for block in every) < len(every) / 4


@pytest.mark.parametrize("page", CHINESE)
def test_the_chinese_document_has_the_same_blocks(page: str) -> None:
    """With the same comments before them, so that what holds of the one holds of the other."""
    english, chinese = (
        [
            (block.language, block.content, block.reason, block.before, block.here)
            for block in read(ROOT / file)
        ]
        for file in (page, CHINESE[page])
    )
    assert english == chinese


def test_every_public_name_is_in_the_reference() -> None:
    pages = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "reference").glob("*.md"))
    shown = set(re.findall(r"^\.\. auto\w+:: sllm\.(\w+)$", pages, flags=re.MULTILINE))
    # The exceptions are shown with their module.
    errors = {
        name for name in sllm.__all__ if getattr(getattr(sllm, name), "__module__", "") == "sllm.errors"
    }
    assert set(sllm.__all__) - errors <= shown
    assert "errors" in shown


_OF_NO_PAGE = {
    # Each target's own, of which callers need what Generation says.
    *("EngineGeneration", "IsolatedGeneration", "LocalGeneration", "RemoteGeneration"),
    *("SplitGeneration", "StreamedGeneration"),
    "Heads",  # for generate(draft="mtp") alone
    "StatusReply",  # a message of sllm.proto
    "WorkerLink",  # what SplitTarget takes of a connection
}


def in_the_reference() -> dict[str, Any]:
    """What the pages of the reference show, by its full name."""
    pages = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "reference").glob("*.md"))
    found = re.findall(r"^\.\. auto(?:class|function):: (sllm\.[\w.]+)$", pages, flags=re.MULTILINE)
    modules = re.findall(r"^\.\. automodule:: (sllm\.[\w.]+)$", pages, flags=re.MULTILINE)
    found += [f"{name}.{one}" for name in modules for one in importlib.import_module(name).__all__]
    return {name: pydoc.locate(name) for name in found}


def own_types() -> set[str]:
    """The names of all classes of the package, but for those of its commands."""
    found = set()
    for module in pkgutil.walk_packages(sllm.__path__, "sllm."):
        if not module.name.startswith(("sllm.cli", "sllm.__main__", "sllm.triage.data")):
            with contextlib.suppress(ImportError):  # of an extra that is not installed
                found |= {
                    name
                    for name, one in vars(importlib.import_module(module.name)).items()
                    if inspect.isclass(one) and one.__module__.startswith("sllm.")
                }
    return found


def returned(shown: Any) -> Iterator[str]:
    """How a function, or the public methods and attributes of a class, are annotated with what they give."""
    if inspect.isfunction(shown):
        yield str(shown.__annotations__["return"])
    if not inspect.isclass(shown):
        return
    for name, kind in inspect.get_annotations(shown).items():
        if not name.startswith("_"):
            yield str(kind)
    for name in dir(shown):
        found = inspect.getattr_static(shown, name)
        found = found.fget if isinstance(found, property) else getattr(found, "__func__", found)
        if not name.startswith("_") and inspect.isfunction(found) and found.__module__.startswith("sllm."):
            yield str(found.__annotations__.get("return", ""))


def test_every_type_that_a_public_name_gives_is_in_the_reference() -> None:
    """So that whoever annotates with it knows where it is."""
    pages, types = in_the_reference(), own_types()
    assert None not in pages.values()
    names = {name.rpartition(".")[2] for name in pages}
    given = {word for one in pages.values() for text in returned(one) for word in re.findall(r"\w+", text)}
    assert {"Remote", "TextStream", "WorkerInfo", "Device"} <= given & types
    assert (given & types) - names == _OF_NO_PAGE


# ---- what finds and runs them

PAGE = """
```python
a = 1
```

<!-- not run: it needs a machine with a GPU -->
```console
$ sllm run
```

<!-- before
b = 2
-->
<!-- here: 0.0.0.1 = 127.0.0.1 -->
```python
c = a + b
```

A comment that is not right before a block says nothing of it.

<!-- remark: of the author -->

- in a list

  ```console
  $ echo one \\
    two
  one two
  other$ false
  [exit 1]
  ```

```{toctree}
a
```
"""


def test_blocks_of_a_document() -> None:
    python, gpu, sum_, shell = blocks(PAGE)
    assert python == Block("python", "a = 1\n", 3)
    assert (gpu.language, gpu.reason) == ("console", "it needs a machine with a GPU")
    assert (sum_.before, sum_.here) == ("b = 2\n", (("0.0.0.1", "127.0.0.1"),))
    assert shell.line == 26
    first, second = commands(shell)
    assert (first.machine, first.text, first.output) == ("", "echo one \\\n  two", "one two\n")
    assert (second.machine, second.text, second.output, second.line) == ("other", "false", "[exit 1]\n", 29)


def test_a_comment_that_nothing_reads_is_no_mark() -> None:
    with pytest.raises(ValueError, match=r"line 4: a comment before a block says 'nor run'"):
        blocks("\n<!-- nor run: a slip -->\n```python\n```\n")


def test_a_page_that_is_wrong_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with PageSession("page", tmp_path) as session:
        assert session.run(blocks(PAGE)) == 3
        with pytest.raises(NameError):
            session.run([Block("python", "d = e\n", 1)])
        with pytest.raises(AssertionError, match="page, line 1: false"):
            session.run([Block("console", "$ false\n", 1)])
        with pytest.raises(pytest.fail.Exception, match="written:\none"):
            session.run([Block("console", "$ echo one\ntwo\n", 1)])
        with pytest.raises(AssertionError, match="ended, or wrote nothing"):
            session.run([Block("console", "$ sllm worker nothing.gguf\n", 1)])
