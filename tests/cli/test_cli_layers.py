"""``sllm split``, ``audit`` and ``codec-report`` as a user meets them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np
import pytest
from processes import ONE

from sllm import embedded
from sllm.cli import main as cli
from sllm.cli.audit import plot
from sllm.engine.layers import Embedding, LayerRange, open_layers

if TYPE_CHECKING:
    import pathlib
    from collections.abc import Callable

DRAFT, TARGET = str(embedded.DRAFT), str(embedded.TARGET)
TEXT = "Once upon a time a fox called Oscar lived in the forest."


@pytest.fixture
def folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path


@pytest.fixture
def shown(capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs ``sllm`` in this process and returns what it wrote to stdout, and there was nothing else."""

    def run(*args: str) -> str:
        assert cli.main(args) == 0
        told = capfd.readouterr()
        assert told.err == ""
        return told.out

    return run


# ---- sllm split


def test_all_parts(shown: Callable[..., str], folder: pathlib.Path) -> None:
    lines = shown("split", TARGET, "--parts", "6,1,1").splitlines()
    names = [f"target-layers-{r}.gguf" for r in ("0-6", "6-7", "7-8")]
    assert [line.split()[0] for line in lines] == names
    assert "the embedding and layers 0 to 5" in lines[0]
    assert lines[1].endswith("layer 6                          hidden states in and out; no vocabulary")
    assert "layer 7 and the output" in lines[2]
    assert {path.name for path in folder.iterdir()} == {*names, "text.txt"}
    tokens = np.arange(100, 120, dtype=np.int32)
    results = []
    for first, middle, last in ((TARGET, TARGET, TARGET), names):
        with (
            Embedding(open_layers(first)) as embedding,
            LayerRange(first, 0, 6, n_ctx=64, n_threads=1) as head,
            LayerRange(middle, 6, 7, n_ctx=64, n_threads=1) as between,
            LayerRange(last, 7, 8, output=True, n_ctx=64, n_threads=1) as tail,
        ):
            results.append(tail.forward(between.forward(head.forward(embedding.rows(tokens)))))
    assert np.array_equal(results[0], results[1])


def test_one_part_and_json(shown: Callable[..., str], folder: pathlib.Path) -> None:
    found = json.loads(shown("split", DRAFT, "--layers", "0:1", "-o", "head.gguf", "--json"))
    assert found["n_layer"] == 2
    assert found["files"] == [
        {
            "file": "head.gguf",
            "start": 0,
            "stop": 1,
            "bytes": (folder / "head.gguf").stat().st_size,
            "embedding": True,
            "output": False,
            "vocabulary": True,
        }
    ]
    assert open_layers(folder / "head.gguf").layers == range(1)


def test_the_output_alone_and_a_prefix(shown: Callable[..., str], folder: pathlib.Path) -> None:
    (folder / "parts").mkdir()
    shown("split", DRAFT, "--parts", "2,0", "-o", "parts/x")
    assert {path.name for path in (folder / "parts").iterdir()} == {
        "x-layers-0-2.gguf",
        "x-layers-2-2.gguf",
    }


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (
            ["--parts", "1,2"],
            "--parts 1+2 are 3 layers, and draft.gguf has 2: name how many each",
        ),
        (["--parts", "1"], "--parts 1 are 1 layer, and draft.gguf has 2"),
        (["--parts", "0,2"], "a part of 0 layers"),
        (["--parts", "1,-1,2"], "'1,-1,2' is not a list of numbers"),
        (["--parts", "1,,1"], "is not a list of numbers"),
        (["--layers", "1"], "'1' is not a range of layers, expected START:STOP"),
        (["--layers", "a:b"], "is not a range of layers"),
        (["--layers", "1:1"], "layers [1, 1) are not a range of the 2 layers"),
        (["--layers", "0:3"], "layers [0, 3) are not a range of the 2 layers"),
        (["--layers", "0:1", "--parts", "1,1"], "not allowed with"),
        ([], "one of the arguments --layers --parts is required"),
        (["--layers", "0:1", "-o", DRAFT], "is the model itself"),
        (["--layers", "0:1", "-o", "."], "is a directory"),
        (["--parts", "1,1", "-o", "nowhere/x"], "nowhere is not a directory"),
    ],
)
def test_wrong_splits(refused: Callable[..., str], folder: pathlib.Path, args: list[str], words: str) -> None:
    before = embedded.DRAFT.read_bytes()
    assert words in refused("split", DRAFT, *args)
    assert [path.name for path in folder.iterdir()] == ["text.txt"]
    assert embedded.DRAFT.read_bytes() == before


# ---- sllm codec-report


def test_codec_report(shown: Callable[..., str], folder: pathlib.Path) -> None:
    args = ("codec-report", DRAFT, "text.txt", *ONE)
    text = shown(*args)
    assert text.startswith("draft.gguf: 0 + 1 + 1 layers")
    f32 = next(line for line in text.splitlines() if line.startswith("f32"))
    assert f32.split()[1:5] == ["512", "0", "0", "100.00%"]
    found = json.loads(shown(*args, "--json"))
    assert [one["codec"] for one in found["codecs"]] == ["f32", "f16", "q8", "q4"]
    assert found["codecs"][0]["kl"] == 0
    assert found["codecs"][2]["row_bytes"] == 132


def test_text_from_stdin(command: Callable[..., Any]) -> None:
    ended = command("codec-report", DRAFT, "-", "--json", *ONE, typed=TEXT)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert json.loads(ended.stdout)["n_tokens"] > 5


# ---- sllm audit


def test_audit(shown: Callable[..., str], folder: pathlib.Path) -> None:
    args = ("audit", DRAFT, "--text", "text.txt", "--head", "1", "--tail", "0", "--tokens", "8", *ONE)
    text = shown(*args, "--plot", "out.svg")
    assert text.startswith("draft.gguf: 1 + 1 + 0 layers")
    assert "What goes up" in text
    assert "What comes back" in text
    assert "not confidentiality" in " ".join(text.split())
    assert "recovered after 1 layer: Once upon a time" in text
    image = ElementTree.fromstring((folder / "out.svg").read_text(encoding="utf-8"))
    assert image.tag == "{http://www.w3.org/2000/svg}svg"
    words = [item.text for item in image.iter("{http://www.w3.org/2000/svg}text")]
    assert {"head layers", "tail layers", "vocabulary matching", "logit lens", "100%"} <= set(words)
    assert len(list(image.iter("{http://www.w3.org/2000/svg}polyline"))) == 5

    found = json.loads(shown(*args, "--json", "--candidates", "5"))
    assert (found["head"], found["n_tokens"], found["n_candidates"]) == (1, 8, 5)
    assert found["heads"][0]["matched"] == 1


def test_a_plot_of_a_model_with_a_name_of_its_own() -> None:
    from sllm.split.audit import AuditReport, HeadFigures, TailFigures

    heads = tuple(HeadFigures(n, 0.5, 0.4, 0.3, 1.0, 1.0, 1.0, 9.0) for n in (0, 1))
    tails = (TailFigures(0, 1.0, 0.2, 1.0),)
    report = AuditReport("<a&b>\x1b.gguf", 2, 9, 0, 0, "q8", 5, 9, 0.2, "x", "x", heads, tails)
    image = ElementTree.fromstring(plot(report))
    title = image.find("{http://www.w3.org/2000/svg}title")
    assert title is not None
    assert title.text is not None
    assert title.text.startswith("<a&b>")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["audit", DRAFT, "--head", "2"], "head 2 and tail 1 leave none of the 2 layers"),
        (["audit", DRAFT, "--tail", "2"], "leave none of the 2 layers"),
        (["audit", DRAFT, "--text", "missing.txt"], "missing.txt: No such file or directory"),
        (["audit", DRAFT, "--text", "empty.txt"], "empty.txt is empty, expected a text"),
        (["audit", DRAFT, "--text", "latin.txt"], "latin.txt is not UTF-8: "),
        (["audit", DRAFT, "--codec", "q2"], "invalid choice: 'q2'"),
        (["audit", DRAFT, "--tokens", "0"], "--tokens: 0 is out of range"),
        (["audit", DRAFT, "--candidates", "0"], "--candidates: 0 is out of range"),
        (["audit", DRAFT, "--plot", "no/where.svg"], "--plot no/where.svg cannot be written"),
        (["audit", "missing.gguf"], "missing.gguf does not exist, expected a GGUF file"),
        (["audit", "text.txt"], "text.txt is not a GGUF file"),
        (["audit", "other.gguf"], "layers of this rwkv7 model do not run apart"),
        (["codec-report", DRAFT], "the following arguments are required: TEXT"),
        (["codec-report", DRAFT, "missing.txt"], "missing.txt: No such file or directory"),
        (["codec-report", DRAFT, "empty.txt"], "empty.txt is empty"),
        (["codec-report", DRAFT, "short.txt"], "the text has 1 token, expected at least 2"),
        (["codec-report", DRAFT, "text.txt", "--head", "1"], "head 1 and tail 1 leave none"),
        (["codec-report", "other.gguf", "text.txt"], "layers of this rwkv7 model do not run apart"),
        (["split", "missing.gguf", "--layers", "0:1"], "missing.gguf does not exist"),
        (["split", "other.gguf", "--layers", "0:1"], "layers of this rwkv7 model do not run apart"),
    ],
)
def test_wrong_arguments(
    refused: Callable[..., str], folder: pathlib.Path, args: list[str], words: str
) -> None:
    (folder / "empty.txt").write_text(" \n", encoding="utf-8")
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    (folder / "short.txt").write_text("a", encoding="utf-8")
    data = embedded.DRAFT.read_bytes()
    at = data.index(b"llama", data.index(b"general.architecture"))
    (folder / "other.gguf").write_bytes(data[:at] + b"rwkv7" + data[at + 5 :])
    assert words in refused(*args)
