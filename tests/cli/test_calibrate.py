"""``sllm calibrate`` as a user meets it: rows in, profile, table and plot out, and what bad rows are told."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from typing import TYPE_CHECKING, Any

import pytest
from processes import ONE

import sllm
from sllm import embedded
from sllm.cli import calibrate as calibrate_command
from sllm.cli.console import Output
from sllm.cli.labelled import read_labelled
from sllm.engine import gguf
from sllm.triage.calibration import Evaluation, Measured, Profile, Threshold
from sllm.triage.policy import Policy

if TYPE_CHECKING:
    import pathlib
    from collections.abc import Callable


def lines(*rows: Any) -> str:
    return "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)


def test_rows_become_a_profile_a_table_and_a_plot(
    command: Callable[..., Any], tmp_path: pathlib.Path
) -> None:
    rows = [
        {"prompt": f"What is {i} + 1?", "correct": i % 9 > 0, "answer": f"{i} + 1 = {i + 1}", "label": "easy"}
        for i in range(40)
    ]
    rows += [
        {
            "messages": [{"role": "user", "content": f"证明定理{i}。"}],
            "correct": False,
            "answer": "好",
            "label": "hard",
        }
        for i in range(20)
    ]
    (tmp_path / "rows.jsonl").write_text(lines(*rows) + "\n", encoding="utf-8")
    model = embedded.DRAFT
    ended = command(
        *("calibrate", str(model), "rows.jsonl", "-o", "p.json", "--alpha", "0.3", "--plot", "p.svg", *ONE)
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == "sllm: scoring 60 rows with draft.gguf\n"
    shown = ended.stdout.splitlines()
    assert shown[0].split() == ["score", "AUROC", "coverage", "error", "upper", "bound"]
    assert any(line.startswith("length alone (control)") for line in shown)
    assert any(line.startswith("tier 1: ") for line in shown)
    profile = Profile.load(tmp_path / "p.json")
    assert shown[-1] == f"profile: {profile.id}"
    assert profile.model_id == gguf.model_id(model)
    assert profile.policy_id == Policy().id
    assert (profile.n, profile.alpha, profile.delta) == (60, 0.3, 0.05)
    assert profile.hard is not None
    assert any(line.startswith("tier 2, answered by draft.gguf: ") for line in shown)
    assert any(line.startswith("tier 2: ") for line in shown)
    assert sum(line.startswith("length alone (control)") for line in shown) == 2
    ET.fromstring((tmp_path / "p.svg").read_text(encoding="utf-8"))


def test_the_model_answers_where_there_is_a_reference(
    command: Callable[..., Any], tmp_path: pathlib.Path
) -> None:
    rows = [
        {"prompt": "Why is the sky blue?", "reference": ["nothing", "x"]},
        {"prompt": "你好", "reference": []},
    ]
    (tmp_path / "rows.jsonl").write_text(lines(*rows * 11), encoding="utf-8")
    args = ("calibrate", str(embedded.DRAFT), "rows.jsonl", "-o", "p.json", "--max-tokens", "8", *ONE)
    ended = command(*args, "--alpha", "0.2")
    assert ended.returncode == 0, ended.stderr
    assert "wrong: 100.0% of those" in ended.stdout
    assert "tier 1: never" in ended.stdout and "tier 3: never" in ended.stdout
    assert Profile.load(tmp_path / "p.json").tier1 is None
    few = command(*args)
    assert few.returncode == 2
    assert few.stderr.splitlines()[-1].startswith("sllm: 22 labelled rows, expected at least 88")


def test_the_local_main_model_answers_too(command: Callable[..., Any], tmp_path: pathlib.Path) -> None:
    """MODEL is wrong and LOCAL is right, so what LOCAL is sure of needs no verification."""
    prompts = [f"Tell me a story about {i} foxes." for i in range(45)]  # long enough to tell them apart
    said: dict[str, list[str]] = {}
    for path in (embedded.DRAFT, embedded.TARGET):
        with sllm.Model(path) as model, sllm.LocalTarget(model, n_threads=1) as target:
            said[path.name] = [
                sllm.generate(
                    target,
                    model.chat([{"role": "user", "content": prompt}]),
                    sampling=sllm.SamplingParams(temperature=0),
                    max_tokens=24,
                ).text()
                for prompt in prompts
            ]
    names = embedded.DRAFT.name, embedded.TARGET.name
    rows = [
        # Where both say the same, the rows would say that both are right.
        {"prompt": prompt, "reference": local if local != ours else "neither"}
        for prompt, ours, local in zip(prompts, said[names[0]], said[names[1]], strict=True)
    ]
    (tmp_path / "rows.jsonl").write_text(lines(*rows), encoding="utf-8")
    right = sum(row["reference"] != "neither" for row in rows)
    args: tuple[str, ...] = ("calibrate", str(embedded.DRAFT), "rows.jsonl", "-o", "p.json", *ONE)
    args += ("--max-tokens", "24")
    args += ("--alpha", "0.4", "--verify-alpha", "0.9")
    ended = command(*args, "--local", str(embedded.TARGET))
    assert ended.returncode == 0, ended.stderr
    assert "tier 1: never" in ended.stdout
    assert "\ntier 2, answered by target.gguf: 30 rows, " in ended.stdout
    profile = Profile.load(tmp_path / "p.json")
    assert profile.tier1 is None
    assert right > 20, "the two models say the same"
    assert profile.verify is not None
    assert profile.verify_model_id == gguf.model_id(embedded.TARGET)
    assert (profile.verify.alpha, profile.verify.n_tested) == (0.9, 30)
    assert "of its answers need no verification, at most " in ended.stdout
    ended = command(*args)  # MODEL itself, which is wrong
    assert ended.returncode == 0, ended.stderr
    assert "\ntier 2, answered by draft.gguf: 30 rows, 100.0% wrong\n" in ended.stdout
    assert "tier 2: every answer is to be verified; no confidence is shown" in ended.stdout
    assert Profile.load(tmp_path / "p.json").verify is None


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("{", "not JSON"),
        ("[]", "a list, expected an object"),
        ("{}", "expected either prompt or messages"),
        ('{"prompt": "a", "messages": []}', "expected either prompt or messages"),
        ('{"prompt": 1, "correct": true}', "prompt is 1"),
        ('{"messages": 1, "correct": true}', "messages is 1"),
        ('{"prompt": "a"}', "expected either correct or reference"),
        ('{"prompt": "a", "correct": true, "reference": "b"}', "expected either correct or reference"),
        ('{"prompt": "a", "correct": "yes"}', "correct is 'yes'"),
        ('{"prompt": "a", "correct": true, "answer": 3}', "answer is"),
        ('{"prompt": "a", "reference": [3]}', r"reference is [3]"),
        ('{"prompt": "a", "correct": true, "label": "difficult"}', "label is 'difficult'"),
        ('{"prompt": "a", "correct": true, "lable": "hard"}', "unknown field 'lable'"),
        ('{"prompt": "", "correct": true}', "line 2: a request cannot be scored: there is no text"),
        ('{"messages": [1], "correct": true}', "line 2: messages[0] is an int"),
    ],
)
def test_bad_rows_are_named(refused: Callable[..., str], tmp_path: pathlib.Path, row: str, said: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f"\n{row}\n", encoding="utf-8")
    with pytest.raises(Exception, match=r".") as caught:
        labelled = read_labelled(path)
        if "line 2" in said:
            with _scorer() as (triage, scorer):
                calibrate_command._score(labelled, triage, scorer, scorer.model, _args(path), None, Output())  # type: ignore[arg-type]
    assert said in str(caught.value)
    assert "line 2" in str(caught.value)
    assert refused("calibrate", str(embedded.DRAFT), str(tmp_path / "none"), "-o", "x").endswith(
        "No such file or directory"
    )


def _scorer() -> Any:
    from contextlib import contextmanager

    from sllm.triage.scorer import ContextScorer
    from sllm.triage.triage import Triage

    @contextmanager
    def opened() -> Any:
        with sllm.Model(embedded.DRAFT) as model, ContextScorer(model, n_threads=1) as scorer:
            yield Triage(scorer), scorer

    return opened()


def _args(path: pathlib.Path) -> Any:
    import argparse

    return argparse.Namespace(rows=path, threads=1, max_tokens=8)


def test_other_refusals(refused: Callable[..., str], tmp_path: pathlib.Path) -> None:
    path = tmp_path / "rows.jsonl"
    args = ("calibrate", str(embedded.DRAFT), str(path), "-o", str(tmp_path / "p.json"))
    path.write_bytes(b"\n\n")
    assert refused(*args).endswith("is empty, expected labelled requests, JSON lines")
    path.write_bytes(b"\xff")
    assert "is not UTF-8" in refused(*args)
    assert "--alpha: 1.5 is out of range" in refused(*args, "--alpha", "1.5")
    assert "--delta: 'x' is not a number" in refused(*args, "--delta", "x")
    path.write_text('\n{"prompt": "a", "correct": true}\n')
    assert "line 2: with --local a row needs a reference" in refused(*args, "--local", str(embedded.TARGET))
    assert not (tmp_path / "p.json").exists()


@pytest.mark.parametrize("error", [0.0, 0.02, 0.6, 1.0])
def test_the_plot_is_well_formed(error: float) -> None:
    curve = tuple((i / 100, error) for i in range(1, 101))
    proved = Threshold(0.0, None, 0.05, 0.05, 100, 80, 0)
    scores = (
        Measured("grade", 0.5, proved, curve),
        Measured("answer's confidence", 0.5, None, curve),
        Measured("grade and answer", float("nan"), proved),
        Measured("length alone (control)", 0.5, None, curve),
    )
    root = ET.fromstring(calibrate_command.plot(Evaluation(100, error, scores), 0.05))
    space = "{http://www.w3.org/2000/svg}"
    texts = [element.text for element in root.iter(f"{space}text")]
    assert {"grade", "answer's confidence", "length alone (control)", "alpha 0.05"} <= set(texts)
    assert len(list(root.iter(f"{space}circle"))) == 1
