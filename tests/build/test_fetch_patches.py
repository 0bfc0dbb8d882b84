"""Patches over the fetched llama.cpp: on an archive of our own, and what the real ones are there for."""

from __future__ import annotations

import difflib
import json
import re
from hashlib import sha256
from pathlib import Path

import pytest
from pinned_source import TREE, VENDOR, Pinned, fetch, write_archive

FILE = "src/llama.cpp"
LINES = "".join(f"line {number}\n" for number in range(1, 31))


@pytest.fixture
def pinned(tmp_path: Path) -> Pinned:
    made = Pinned.make(tmp_path)
    made.repin(sha256=write_archive(made.archive, TREE | {FILE: LINES}))
    return made


def diff(old: str, new: str, path: str = FILE) -> str:
    """As git writes it, but for the line that says which blobs."""
    lines = difflib.unified_diff(lines_of(old), lines_of(new), f"a/{path}", f"b/{path}")
    marked = (line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines)
    return f"diff --git a/{path} b/{path}\n" + "".join(marked)


def lines_of(text: str) -> list[str]:
    return re.findall(r"[^\n]*\n|[^\n]+", text)  # str.splitlines() ends a line at a lone carriage return, too


def add_patch(pinned: Pinned, text: str, name: str = "0001-change.patch") -> None:
    folder = pinned.pin_file.parent / "patches"
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(text.encode())


def refill_with(pinned: Pinned, content: str) -> None:
    pinned.repin(sha256=write_archive(pinned.archive, TREE | {FILE: content}))


def found(pinned: Pinned, path: str = FILE) -> str:
    return (pinned.source / path).read_bytes().decode()


# --- applied, and known again ---


def test_a_patch_is_applied_once_and_the_manifest_speaks_of_the_result(pinned: Pinned) -> None:
    changed = (
        LINES.replace("line 4\n", "line four\n")
        .replace("line 25\n", "")
        .replace("line 29\n", "line 29\nmore\n")
    )
    text = "Why it is there.\n\nWhen it goes: soon.\n\n" + diff(LINES, changed)
    add_patch(pinned, text)
    assert pinned.ensure() is True
    assert found(pinned) == changed
    manifest = json.loads((pinned.source / fetch.MANIFEST).read_text())
    assert manifest["patches"] == {"0001-change.patch": sha256(text.encode()).hexdigest()}
    assert manifest["files"]["core"][FILE] == sha256(changed.encode()).hexdigest()
    assert pinned.ensure() is False


def test_patches_are_applied_in_the_order_of_their_names(pinned: Pinned) -> None:
    once = LINES.replace("line 4\n", "line four\n")
    twice = once.replace("line four\n", "line 4.0\n")
    add_patch(pinned, diff(once, twice), "0002-again.patch")
    add_patch(pinned, diff(LINES, once), "0001-change.patch")
    pinned.ensure()
    assert found(pinned) == twice


def test_a_patch_may_change_several_files(pinned: Pinned) -> None:
    text = diff(LINES, "first\n" + LINES) + diff("MIT\n", "MIT, once\n", "LICENSE")
    add_patch(pinned, text + diff("// for the peers\n", "// ours\n", "common/common.cpp"))
    pinned.ensure()
    assert found(pinned).startswith("first\n") and found(pinned, "LICENSE") == "MIT, once\n"
    assert found(pinned, "common/common.cpp") == "// ours\n"
    assert pinned.ensure(peers=True) is False


@pytest.mark.parametrize("change", ["new", "altered", "renamed", "dropped"])
def test_an_intact_fill_with_other_patches_is_replaced(pinned: Pinned, change: str) -> None:
    text = diff(LINES, LINES.replace("line 4\n", "line four\n"))
    if change != "new":
        add_patch(pinned, text)
    pinned.ensure()
    old = pinned.pin_file.parent / "patches" / "0001-change.patch"
    if change in ("renamed", "dropped"):
        old.unlink()
    if change != "dropped":
        text = text.replace("+line four\n", "+line IV\n") if change == "altered" else text
        add_patch(pinned, text, "0002-change.patch" if change == "renamed" else old.name)
    assert pinned.ensure() is True
    expected = {"altered": "line IV\n", "dropped": "line 4\n"}.get(change, "line four\n")
    assert lines_of(found(pinned))[3] == expected
    assert pinned.ensure() is False


def test_a_fill_from_before_there_were_patches_is_intact(pinned: Pinned) -> None:
    pinned.ensure()
    manifest = json.loads((pinned.source / fetch.MANIFEST).read_text())
    del manifest["patches"]
    (pinned.source / fetch.MANIFEST).write_text(json.dumps(manifest))
    assert pinned.ensure() is False


def test_work_in_a_patched_file_is_not_overwritten(pinned: Pinned) -> None:
    pinned.ensure()
    (pinned.source / FILE).write_text("// someone's work\n")
    add_patch(pinned, diff(LINES, "first\n" + LINES))
    with pytest.raises(fetch.FetchError, match=r"src/llama\.cpp was altered"):
        pinned.ensure()


def test_an_sdists_patched_tree_needs_no_archive(pinned: Pinned) -> None:
    add_patch(pinned, diff(LINES, "first\n" + LINES))
    pinned.ensure()
    (pinned.source / "common/common.cpp").unlink()
    (pinned.source / "vendor/stb/stb_image.h").unlink()
    pinned.archive.unlink()
    assert pinned.ensure() is False


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("a\nb\nc", "a\nB\nc"),  # the end without a newline is context
        ("a\nb\nc", "a\nb\nC"),
        ("a\nb\nc", "a\nb\nc\n"),
        ("a\nb\nc\n", "a\nb\nc"),
        ("a\nb\nc", "a\nb\nc\nd"),
        ("a\r\nb\r\nc\r\n", "a\r\nB\r\nc\r\n"),
        ("a\r\nb\nc\r\n", "a\nb\r\nc\r\n"),
        ("a\rb\nc\n", "a\rb\nC\n"),
        ("", "a\n"),
        ("a\n", ""),
        ("a\n\n\nb\n", "a\n\nc\n\nb\n"),
        ("-- a\n", "++ a\n"),  # in the diff, like the head of a file
        ("\N{FORM FEED}a\u2028b\n", "\N{FORM FEED}a\u2028\u4e2d\n"),
    ],
)
def test_the_result_is_what_the_diff_was_made_of(pinned: Pinned, old: str, new: str) -> None:
    refill_with(pinned, old)
    add_patch(pinned, diff(old, new))
    pinned.ensure()
    assert found(pinned) == new


def test_hunks_may_be_without_context(pinned: Pinned) -> None:
    add_patch(
        pinned,
        f"--- a/{FILE}\n+++ b/{FILE}\n@@ -2,0 +3 @@ in a function\n+new\n@@ -4 +4,0 @@\n-line 4\n",
    )
    pinned.ensure()
    assert lines_of(found(pinned))[:5] == ["line 1\n", "line 2\n", "new\n", "line 3\n", "line 5\n"]


# --- refused ---


@pytest.mark.parametrize(
    ("content", "there"),
    [
        (LINES.replace("line 6\n", "line  6\n"), r"'line  6\\n'"),  # no fuzz
        ("line 0\n" + LINES, r"'line 1\\n'"),  # no other place
        (LINES.replace("\n", "\r\n"), r"'line 1\\r\\n'"),
        ("".join(lines_of(LINES)[:5]), r"\(nothing\)"),
        (LINES.replace("line 4\n", "line four\n"), r"'line four\\n'"),  # as if it had been applied
    ],
)
def test_a_patch_that_does_not_apply_is_refused(pinned: Pinned, content: str, there: str) -> None:
    two = LINES.replace("line 4\n", "line four\n")
    add_patch(pinned, diff(LINES, two), "0007-four.patch")
    refill_with(pinned, content)
    with pytest.raises(fetch.FetchError) as caught:
        pinned.ensure()
    message = str(caught.value)
    assert re.search(r"0007-four\.patch does not apply to src/llama\.cpp, hunk 1, line \d:", message)
    assert re.search(there, message) and "drop the patch" in message and "renew it" in message
    assert not pinned.source.exists()


def test_a_fill_stays_when_a_new_patch_does_not_apply(pinned: Pinned) -> None:
    pinned.ensure()
    add_patch(pinned, diff("other\n", "another\n"))
    with pytest.raises(fetch.FetchError, match="does not apply"):
        pinned.ensure()
    assert found(pinned) == LINES
    assert [path.name for path in pinned.source.parent.iterdir()] == ["source"]


HEAD = f"--- a/{FILE}\n+++ b/{FILE}\n"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no change of a file"),
        ("Only words.\n", "no change of a file"),
        (f"--- a/{FILE}\n", r"line 1: expected '\+\+\+ '"),
        (HEAD, r"no hunk for src/llama\.cpp"),
        (HEAD + "@@ nonsense @@\n", "line 3: expected '@@"),
        (HEAD + "@@ -1,2 +1,2 @@\n-line 1\n+line one\n", "line 5: expected a line of the hunk"),
        (HEAD + "@@ -1,2 +1,2 @@\n-line 1\n+line one\n\n", "line 6: expected a line of the hunk"),
        (HEAD + "@@ -1 +1,2 @@\n-line 1\n-line 2\n+line one\n", "line 5: the hunk has more lines"),
        (HEAD + "@@ -1 +1 @@\n-line 1\n+line one\n-- \n2.39.5\n", "line 6: expected '--- '"),
        (HEAD + "@@ -1 +1 @@\n-line 1\n+line one\n" + HEAD + "@@ -2 +2 @@\n-line 2\n+two\n", "a second time"),
        (
            HEAD + "@@ -1 +1 @@\n-line 1\n+line one\n\\ No newline at end of file\n",
            "end of file in its middle",
        ),
        (HEAD + "@@ -5 +5 @@\n-line 5\n+five\n@@ -1 +1 @@\n-line 1\n+one\n", "hunk 2 .* out of place"),
        (HEAD + "@@ -2,0 +3 @@\n+new\n@@ -4 +5,0 @@\n-line 4\n", "hunk 2 .* out of place"),
        (HEAD + "@@ -99,0 +100 @@\n+new\n", "hunk 1 .* out of place"),
        (HEAD + "@@ -0 +0 @@\n-line 1\n+one\n", "does not apply"),
        (HEAD.replace("+++ b/src", "+++ b/lib"), r"renames src/llama\.cpp to lib/llama\.cpp"),
        ("--- /dev/null\n+++ b/src/new.cpp\n@@ -0,0 +1 @@\n+new\n", "line 1: creates or deletes a file"),
        (f"--- a/{FILE}\n+++ /dev/null\n@@ -1 +0,0 @@\n-line 1\n", "line 2: creates or deletes a file"),
        (
            "diff --git a/x b/y\nsimilarity index 100%\nrename from x\nrename to y\n",
            "line 2: expected '--- '",
        ),
        ("diff --git a/x b/x\nold mode 100644\nnew mode 100755\n", "line 2: expected '--- '"),
        ("diff --git a/x b/x\nindex 1..2\nGIT binary patch\n", "line 3: expected '--- '"),
        (HEAD.replace("a/src", "src"), "is no path of a/ or b/"),
        (HEAD.replace("/src", "/../src"), "is no path of a/ or b/"),
        (HEAD.replace("/src", "//src"), "is no path of a/ or b/"),
        (HEAD.replace("/src", "/./src"), "is no path of a/ or b/"),
        (HEAD.replace("src/", "src\\"), "is no path of a/ or b/"),
        (
            HEAD.replace(FILE, "docs/build.md") + "@@ -1 +1 @@\n-for nobody here\n+x\n",
            "not among the files that are kept",
        ),
        (
            HEAD.replace(FILE, "sllm-manifest.json") + "@@ -1 +1 @@\n-{\n+x\n",
            "not among the files that are kept",
        ),
    ],
)
def test_what_is_no_change_of_a_kept_file_is_refused(pinned: Pinned, text: str, reason: str) -> None:
    add_patch(pinned, text)
    with pytest.raises(fetch.FetchError, match=reason) as caught:
        pinned.ensure()
    assert "0001-change.patch" in str(caught.value)
    assert not pinned.source.exists()


# --- the real ones ---

PATCHES = sorted((VENDOR / "patches").glob("*"))


@pytest.mark.parametrize("path", PATCHES, ids=lambda path: path.name)
def test_each_patch_says_why_and_until_when(path: Path) -> None:
    assert re.fullmatch(r"\d{4}-[a-z0-9-]+\.patch", path.name)
    fetch.Patch.load(path)
    head = path.read_text(encoding="utf-8").partition("\ndiff --git ")[0]
    assert re.search(r"^Upstream: ", head, re.M) and re.search(r"^Drop this when ", head, re.M)


@pytest.mark.skipif(
    not (VENDOR / "source" / fetch.MANIFEST).exists(), reason="the pinned sources are not here"
)
def test_the_fill_carries_the_patches() -> None:
    manifest = json.loads((VENDOR / "source" / fetch.MANIFEST).read_text(encoding="utf-8"))
    assert manifest["patches"] == {path.name: sha256(path.read_bytes()).hexdigest() for path in PATCHES}
