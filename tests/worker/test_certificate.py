"""Renewed certificates are taken while the worker runs; what is no certificate is not."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from certificates import authority
from raw_client import TOKEN, Client, opening, wait_until

from sllm.errors import AuthError
from sllm.wire import auth
from sllm.worker.server import Monitoring, Worker

if TYPE_CHECKING:
    from pathlib import Path

    from sllm.engine.model import Model

QUICK = Monitoring(pass_limit=0.1)  # also looks at the files more often


def write(folder: Path, chain: bytes, key: bytes, mode: int = 0o600) -> tuple[Path, Path]:
    paths = folder / "chain.pem", folder / "key.pem"
    for path, data in zip(paths, (chain, key), strict=True):
        draft = path.with_suffix(".new")
        draft.write_bytes(data)
        draft.chmod(mode)
        draft.replace(path)
    return paths


def test_a_renewed_certificate_is_taken(
    tmp_path: Path, draft_model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = authority(tmp_path), authority(tmp_path)
    paths = write(tmp_path, *first)
    with Worker(draft_model, n_ctx=64, token=TOKEN, certificate=paths, monitoring=QUICK) as worker:
        before = worker.address
        assert before.fingerprint == auth.fingerprint(first[0])
        with Client(before) as old:
            stream = old.generate(opening(max_tokens=8, run_ahead=False))
            wait_until(lambda: worker._scheduler.running())

            # Bad ones: the old one is kept, and said so.
            for chain, key in ((second[0], first[1]), (b"nothing", b""), (second[0][:200], second[1])):
                caplog.clear()
                write(tmp_path, chain, key)
                wait_until(lambda: "the old certificate is kept" in caplog.text)
                assert worker.address == before
                assert "PRIVATE" not in caplog.text
            paths[1].unlink()
            caplog.clear()
            wait_until(lambda: "the old certificate is kept" in caplog.text)
            with Client(before) as client:
                client.info()

            # Permissions alone are a change, too.
            caplog.clear()
            write(tmp_path, *second, mode=0o644)
            wait_until(lambda: "the old certificate is kept" in caplog.text)
            assert worker.address == before
            paths[1].chmod(0o600)
            wait_until(lambda: worker.address != before)
            assert worker.address == replace(before, fingerprint=auth.fingerprint(second[0]))
            assert worker.uri == worker.address.uri
            with Client(worker.address) as new:
                new.info()
            with pytest.raises(AuthError, match="another worker, or somebody"):
                Client(before)
            assert old.status().sessions == 1  # who is connected, stays
            stream.cancel()


def test_the_workers_own_certificate_stays(tmp_path: Path, draft_model: Model) -> None:
    with Worker(draft_model, n_ctx=64, state=tmp_path, monitoring=QUICK) as worker:
        assert worker._certificate is not None
        assert not worker._certificate.reload()
