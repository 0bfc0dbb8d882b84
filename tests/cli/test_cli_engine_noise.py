"""``sllm run --noise --experimental``: the engine's own stream, as a user asks for it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from fake_engine import FakeEngine
from oracles import PLAIN

from sllm import embedded
from sllm.cli import main as cli

if TYPE_CHECKING:
    import sllm

PROMPT = "Once upon a time"


@pytest.mark.parametrize("api", ["vllm", "sglang"])
def test_run_shows_what_the_engine_streams(
    target_model: sllm.Model, capfd: pytest.CaptureFixture[str], api: str
) -> None:
    with FakeEngine(target_model, api, n_ctx=320) as engine:
        sampling = replace(PLAIN, noise=api, temperature=0.8, top_k=16, seed=5)
        prompt = target_model.vocab.encode(PROMPT).tolist()
        tokens = list(engine.drawn(prompt, 16, [], sampling))
        arguments = [
            "--engine",
            engine.url,
            "--noise",
            api,
            "--experimental",
            "--draft",
            "none",
            "--seed",
            "5",
        ]
        arguments += ["--temperature", "0.8", "--top-k", "16", "--top-p", "1", "--min-p", "0", "-n", "16"]
        assert cli.main(["run", *arguments, PROMPT]) == 0
        assert capfd.readouterr().out.strip() == target_model.vocab.decode(tokens, goes_on=True).strip()
        assert sum(bool(body.get("stream")) for body in engine.bodies) == 1


def test_what_does_not_go_together(capfd: pytest.CaptureFixture[str]) -> None:
    for arguments, complaint in (
        (["--experimental"], "--experimental needs --engine"),
        (["--noise", "sglang"], "min_p=0"),
        (["--noise", "llama"], "invalid choice"),
    ):
        status: object
        try:
            status = cli.main(["run", "--target", str(embedded.TARGET), *arguments, "x"])
        except SystemExit as error:
            status = error.code
        assert status == 2
        assert complaint in capfd.readouterr().err
