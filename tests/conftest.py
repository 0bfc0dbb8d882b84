"""Models, contexts and hypothesis settings for all tests."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import pathlib
import signal
import subprocess
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest
import random_models
from hypothesis import HealthCheck, Phase, settings
from oracles import EXACT
from processes import ENDLESS, ONE, environment, one_line

import sllm
from sllm import embedded
from sllm.cli import main as cli

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

# Reproducible by default, and without shrinking, which could outlast the time limit of a test.
# SLLM_HYPOTHESIS_PROFILE=explore takes other examples every time and shrinks failures; SLLM_TEST_EFFORT=10
# takes ten times as many.
_QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
settings.register_profile(
    "sllm",
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=_QUIET,
)
settings.register_profile("explore", deadline=None, suppress_health_check=_QUIET)
settings.load_profile(os.environ.get("SLLM_HYPOTHESIS_PROFILE", "sllm"))


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """A process for each core, as is the default (None), but one for what is named on the command line: a few
    files are sooner done so, and the builds of ``-m packaging`` take all cores by themselves.
    """
    everything = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    return None if everything and f"-m={config.option.markexpr}" in config.getini("addopts") else 0


@pytest.fixture(scope="session", autouse=True)
def away_from_the_checkout(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Let child interpreters find the installed package: the checkout's has no compiled core."""
    os.chdir(tmp_path_factory.mktemp("cwd"))


@pytest.fixture(scope="module")
def one_core() -> Iterator[None]:
    """One thread for each model: those that wait spin, and would starve what runs beside the tests; on
    another core for another process of tests.
    """
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {sorted(cores)[os.getpid() % len(cores)]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


@pytest.fixture(scope="session")
def target_model() -> Iterator[sllm.Model]:
    """The embedded target."""
    with sllm.Model(embedded.TARGET) as model:
        yield model


@pytest.fixture(scope="session")
def draft_model() -> Iterator[sllm.Model]:
    """The embedded draft: the same vocabulary, cheap, so also the model for tests that need just any."""
    with sllm.Model(embedded.DRAFT) as model:
        yield model


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., pathlib.Path]:
    """Writes a model of a shape once; returns its path."""
    folder = tmp_path_factory.mktemp("random")

    def make(name: str, **changes: Any) -> pathlib.Path:
        path = folder / ("-".join([name, *map(str, changes.values())]).replace(", ", "-") + ".gguf")
        if not path.exists():
            random_models.write(path, dataclasses.replace(random_models.EVERY[name], **changes))
        return path

    return make


@pytest.fixture(scope="session")
def llama(random_model: Callable[..., pathlib.Path]) -> pathlib.Path:
    """A random model for tests where any will do: 4 layers of 64 numbers."""
    return random_model("llama")


@pytest.fixture(scope="session")
def smollm2() -> pathlib.Path:
    """A real model, where it is installed (see benchmarks/smollm2.py); its tests are skipped elsewhere."""
    finder = pathlib.Path(__file__).resolve().parents[1] / "benchmarks" / "smollm2.py"
    if not finder.is_file():
        pytest.skip("there is no source tree here")
    spec = importlib.util.spec_from_file_location("smollm2", finder)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: pathlib.Path | None = module.find()
    if found is None:
        pytest.skip(module.MISSING)
    return found


@pytest.fixture
def make_context() -> Iterator[Callable[..., sllm.Context]]:
    """Makes contexts with the exactness conditions, unless told otherwise; they are closed after the test."""
    with ExitStack() as stack:

        def make(model: sllm.Model, **options: Any) -> sllm.Context:
            return stack.enter_context(model.context(**{"n_ctx": 512, **EXACT, **options}))

        yield make


@pytest.fixture
def command(tmp_path: pathlib.Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs ``sllm`` with arguments to its end, in an empty folder."""

    def run(*args: str, typed: str | bytes = "", **more: str) -> subprocess.CompletedProcess[str]:
        ended = subprocess.run(
            [sys.executable, "-m", "sllm", *args],
            input=typed if isinstance(typed, bytes) else typed.encode(),
            capture_output=True,
            timeout=240,
            cwd=tmp_path,
            env=environment(**more),
            check=False,
        )
        return subprocess.CompletedProcess(
            ended.args, ended.returncode, ended.stdout.decode(), ended.stderr.decode()
        )

    return run


@pytest.fixture
def start(tmp_path: pathlib.Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts ``sllm``; whatever still runs at the end of the test is ended."""
    started: list[subprocess.Popen[bytes]] = []

    def run(*args: str, program: Sequence[str] = ("-m", "sllm"), **more: Any) -> subprocess.Popen[bytes]:
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        env = environment(**more.pop("env", {}))
        process = subprocess.Popen(
            [sys.executable, *program, *args], cwd=tmp_path, env=env, **{**pipes, **more}
        )
        started.append(process)
        return process

    # A handler of our own becomes the default one in a child; a Ctrl-C that is ignored (as it is in the
    # background of a shell script) would stay ignored there.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield run
    finally:
        signal.signal(signal.SIGINT, before)
        for process in started:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    stream.close()


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs ``sllm`` in this process, expects a refusal and returns its one line."""

    def run(*args: str) -> str:
        assert cli.main(args) == 2
        shown = capfd.readouterr()
        assert shown.out == ""
        return one_line(shown.err)

    return run


@pytest.fixture
def endless(tmp_path: pathlib.Path) -> tuple[str, ...]:
    """Arguments of a text that only its context ends."""
    grammar = tmp_path / "endless.gbnf"
    grammar.write_text(ENDLESS, encoding="utf-8")
    return ("run", *ONE, "--draft", "none", "--n-ctx", "16384", "--grammar-file", str(grammar), "Once")
