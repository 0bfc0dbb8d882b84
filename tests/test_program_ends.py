"""Programs that end with something open: every handle, at each of the ways a program ends.

One process imports sllm, forks a child for each case before it has threads, and reports how they ended. It
adopts orphans, so that what a child leaves behind is found.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import random_models

from sllm.engine.mtp import has_mtp

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork()")

FORKER = """
import ctypes, gc, json, os, signal, socket, sys, threading, time, traceback
import numpy as np
import sllm
from sllm.draft.drafters import ModelDrafter
from sllm.embedded import DRAFT, TARGET
from sllm.engine.layers import LayerRange
from sllm.engine.mtp import Heads
from sllm.rpc import RPCServer
from sllm.triage.hybrid import Hybrid
from sllm.triage.scorer import ContextScorer
from sllm.wire import auth
from pathlib import Path

SECONDS = 30
folder, bodies, mtp_path = Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
os.environ["SLLM_STATE"] = os.environ["SLLM_CACHE"] = os.environ["HF_HOME"] = str(folder)
silent = socket.create_server(("127.0.0.1", 0), backlog=64)  # takes connections and says nothing
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{silent.getsockname()[1]}"
import cryptography.x509, huggingface_hub  # once, and not in every child
auth.load_or_make_certificate(folder)
OPTIONS = {"n_ctx": 256, "n_threads": 1}
GREEDY = sllm.SamplingParams(temperature=0.0)

def opened(target):
    generation = target.open(np.array([5, 6], np.int32), GREEDY, 200)
    next(generation)
    return generation

def background(call):
    begun = threading.Event()
    def work():
        begun.set()
        try:
            call()
        except Exception:
            pass
    threading.Thread(target=work, daemon=True).start()
    begun.wait()

signal.signal(signal.SIGINT, signal.default_int_handler)
libc = ctypes.CDLL(None)
adopts = hasattr(libc, "prctl") and libc.prctl(36, 1, 0, 0, 0) == 0  # PR_SET_CHILD_SUBREAPER
waiting = [(name, how) for name in bodies for how in ("end", "exception", "interrupt")]
running, ended, case = {}, {}, None
gc.freeze()  # so that children copy fewer pages
while waiting or running:
    while waiting and len(running) < 4:
        name, how = waiting.pop(0)
        pid = os.fork()
        if pid == 0:
            case = name, how
            break
        running[pid] = name, how, time.monotonic() + SECONDS
    if case:
        break
    for pid, (name, how, until) in list(running.items()):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            del running[pid]
            ended[f"{name}, {how}"] = os.waitstatus_to_exitcode(status)
        elif time.monotonic() > until:
            os.kill(pid, signal.SIGKILL)
    time.sleep(0.005)
if case is None:
    left, until = adopts, time.monotonic() + 10
    while left and time.monotonic() < until:
        try:
            os.waitpid(-1, os.WNOHANG)
            time.sleep(0.02)
        except ChildProcessError:
            left = False
    print(json.dumps([ended, left]))
else:
    errors = os.open(folder / f"{case[0]}, {case[1]}", os.O_WRONLY | os.O_CREAT, 0o600)
    os.dup2(errors, 2)
    os.dup2(errors, 1)
    exec(bodies[case[0]])
    if case[1] == "exception":
        raise RuntimeError("the end")
    if case[1] == "interrupt":
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(SECONDS)
"""

BODIES = {
    "Model": "model = sllm.Model(TARGET)",
    "Context": """
model = sllm.Model(DRAFT)
context = model.context(n_ctx=4096, n_threads=1)
background(lambda: context.decode([7] * 4000))
""",
    "LocalTarget": """
model = sllm.Model(DRAFT)
stream = sllm.generate(sllm.LocalTarget(model, **OPTIONS), "Once", draft=model)
next(stream)
""",
    "LocalTarget, isolated": """
target = sllm.LocalTarget(DRAFT, isolated=True, **OPTIONS)
generation = opened(target)
""",
    "ModelDrafter": """
model = sllm.Model(DRAFT)
drafter = ModelDrafter(model, **OPTIONS)
drafter.open([5, 6], GREEDY)
""",
    "Worker": "worker = sllm.Worker(DRAFT, **OPTIONS)",
    "Worker, with sessions": """
worker = sllm.Worker(TARGET, pass_seconds=0.05, **OPTIONS)
remotes = [sllm.connect(worker.uri) for _ in range(3)]
generations = [opened(remote.target()) for remote in remotes]
""",
    "Worker, in a cycle": """
class Holder: pass
holder = Holder()
holder.self, holder.worker = holder, sllm.Worker(DRAFT, **OPTIONS)
holder.remote = sllm.connect(holder.worker.uri)
holder.generation = opened(holder.remote.target())
del holder
""",
    "Remote": """
worker = sllm.Worker(DRAFT, **OPTIONS)
remote = sllm.connect(worker.uri)
remote.vocab
""",
    "RemoteTarget, drafted": """
model = sllm.Model(DRAFT)
worker = sllm.Worker(TARGET, pass_seconds=0.05, **OPTIONS)
stream = sllm.generate(sllm.connect(worker.uri).target(), "Once", draft=model)
next(stream)
""",
    "a score under way": """
worker = sllm.Worker(TARGET, pass_seconds=1.0, **OPTIONS)
remote = sllm.connect(worker.uri)
background(lambda: remote.score(np.array([5, 6, 7], np.int32), 1))
time.sleep(0.1)
""",
    "SplitTarget": """
worker = sllm.Worker(TARGET, layers=(2, 7), pass_seconds=0.05, **OPTIONS)
remote = sllm.connect(worker.uri)
target = sllm.SplitTarget(TARGET, head=2, tail=1, middle=remote, **OPTIONS)
generation = opened(target)
""",
    "Worker, layers": "worker = sllm.Worker(TARGET, layers=True, **OPTIONS)",
    "LayerRange": "layers = LayerRange(TARGET, 0, 2, **OPTIONS)",
    "Hybrid": """
small, large = sllm.Model(DRAFT), sllm.Model(TARGET)
hybrid = Hybrid(small, large, n_ctx=512, n_threads=1, max_tokens=100)
background(lambda: hybrid.ask([{"role": "user", "content": "Once upon a time"}]))
""",
    "Vault": """
vault = sllm.Vault()
vault.mask("13800138000")
""",
    "ContextScorer": """
model = sllm.Model(DRAFT)
scorer = ContextScorer(model, **OPTIONS)
""",
    "RPCServer": "server = RPCServer(n_threads=1, cache=False)",
    "Heads": """
model = sllm.Model(mtp_path)
context = model.context(**OPTIONS)
heads = Heads(context)
""",
    "a download": """
background(lambda: sllm.hub.download("owner/repo", "model.gguf"))
""",
    "everything at once, in a thread of its own": """
held = []
def make():
    held.append(sllm.Worker(TARGET, pass_seconds=0.05, **OPTIONS))
    held.append(sllm.connect(held[0].uri))
    held.append(opened(held[1].target()))
making = threading.Thread(target=make)
making.start()
making.join()
""",
    "a thread that goes on after the main one": """
worker = sllm.Worker(TARGET, **OPTIONS)
def late():
    threading.main_thread().join()
    with sllm.connect(worker.uri) as remote:
        opened(remote.target()).close()
        print("still served", flush=True)
threading.Thread(target=late).start()
""",
}
HOWS = {"end": 0, "exception": 1, "interrupt": -2}


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, int], dict[str, str], bool]:
    """How each case ended, what it printed, and whether a process was left behind."""
    folder: Path = tmp_path_factory.mktemp("ends")
    bodies, mtp = dict(BODIES), folder / "mtp.gguf"
    if has_mtp():
        random_models.make_agreeing(replace(random_models.HEADS["glm4moe, head"], routers="q8_0")).write(mtp)
    else:
        del bodies["Heads"]
    printed = folder / "printed"
    printed.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", FORKER, str(printed), json.dumps(bodies), str(mtp)],
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )
    statuses, left = json.loads(done.stdout)
    return statuses, {case: (printed / case).read_text() for case in statuses}, left


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("name", BODIES)
def test_a_program_ends_with(ends: tuple[dict[str, int], dict[str, str], bool], name: str, how: str) -> None:
    if name == "Heads" and not has_mtp():
        pytest.skip("this build cannot draft with MTP heads")
    statuses, printed, _ = ends
    text = printed[f"{name}, {how}"]
    status = statuses[f"{name}, {how}"]
    if name.startswith("a thread that goes on") and how == "interrupt":
        # Python forgets that it was interrupted where another thread calls exec() meanwhile, as imports do.
        assert status in (HOWS[how], 1), text
    else:
        assert status == HOWS[how], text
    assert text.count("Traceback") == (how != "end"), text
    assert "Exception ignored" not in text and "Fatal" not in text
    if name.startswith("a thread that goes on"):
        assert "still served" in text


def test_nothing_is_left_behind(ends: tuple[dict[str, int], dict[str, str], bool]) -> None:
    assert not ends[2]
