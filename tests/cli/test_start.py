"""How ``sllm`` starts: it imports the command that was named and nothing else, and says what is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from processes import environment, one_line

from sllm.cli import main as cli

if TYPE_CHECKING:
    import pathlib

# Seconds of start-up time, or packages that an extra brings.
HEAVY = (
    "cryptography",
    "google.protobuf",
    "grpc",
    "huggingface_hub",
    "jinja2",
    "phonenumbers",
    "sllm.privacy",
    "sllm.remote",
    "sllm.worker",
    "stdnum",
)

LOADED = """
import sys
from sllm.cli.main import main
status = main(sys.argv[1:])
sys.stderr.write("\\n".join(sys.modules))
sys.exit(status)
"""

HIDDEN = """
import sys
hidden, *argv = sys.argv[1:]

class Hides:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == hidden:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hides())
from sllm.cli import main
main._COMMANDS["needy"] = ("needy", "A command that needs an extra.")
sys.exit(main.main(argv))
"""

NEEDY = """
from sllm.extras import needs
with needs("remote"):
    import grpc
"""

INTERRUPTED = """
import os, signal
try:
    os.kill(os.getpid(), signal.SIGINT)
    while True:
        pass
except KeyboardInterrupt:
    raise ImportError("as NumPy's core does, of whatever its own imports raise")
"""


def child(code: str, *args: str, folder: pathlib.Path) -> subprocess.CompletedProcess[str]:
    """What became of ``code`` in a process that finds modules in ``folder``, too."""
    folders = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.run(
        [sys.executable, "-c", code, *args],
        capture_output=True,
        encoding="utf-8",
        env=environment(PYTHONPATH=os.pathsep.join(folders)),
        cwd=folder,
        timeout=120,
        check=False,
    )


def loaded_by(*args: str, folder: pathlib.Path) -> set[str]:
    """The modules that a command line has imported at its end."""
    ended = child(LOADED, *args, folder=folder)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout
    return set(ended.stderr.splitlines())


@pytest.mark.parametrize("args", [["--version"], ["--help"], ["devices"], ["split", "--help"]])
def test_nothing_heavy_is_imported_where_it_is_not_needed(args: list[str], tmp_path: pathlib.Path) -> None:
    loaded = loaded_by(*args, folder=tmp_path)
    assert "sllm.cli.main" in loaded
    assert not loaded & set(HEAVY)
    if args[0].startswith("--"):
        assert "numpy" not in loaded


def test_a_text_on_this_machine_needs_no_network(tmp_path: pathlib.Path) -> None:
    args = ("run", "--threads", "1", "-n", "1", "--temperature", "0", "Once upon a time")
    loaded = loaded_by(*args, folder=tmp_path)
    assert not loaded & {"cryptography", "google.protobuf", "grpc", "sllm.privacy", "sllm.remote"}


@pytest.mark.parametrize("name", ["run", "inspect", "doctor"])
def test_only_the_named_command_is_imported(name: str, tmp_path: pathlib.Path) -> None:
    loaded = loaded_by(name, "--help", folder=tmp_path)
    of_commands = {module for module, _ in cli._COMMANDS.values()}
    assert loaded & of_commands == {cli._COMMANDS[name][0]}


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for name, (_, summary) in cli._COMMANDS.items():
        assert cli.main([name, "--help"]) == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert shown.startswith(f"usage: sllm {name} ")
        assert summary in shown


def test_a_missing_extra_is_named_in_one_line(tmp_path: pathlib.Path) -> None:
    (tmp_path / "needy.py").write_text(NEEDY, encoding="utf-8")
    for args in (["needy"], ["needy", "--help"]):
        ended = child(HIDDEN, "grpc", *args, folder=tmp_path)
        assert (ended.returncode, ended.stdout) == (2, "")
        told = one_line(ended.stderr)
        assert "the package grpc is missing, for a worker, " in told
        assert told.endswith("pip install 'sllm[remote]'")
        assert "unexpected" not in told


def test_a_ctrl_c_that_an_import_takes_for_a_failure(tmp_path: pathlib.Path) -> None:
    (tmp_path / "needy.py").write_text(INTERRUPTED, encoding="utf-8")
    ended = child(HIDDEN, "nothing", "needy", folder=tmp_path)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "")


@pytest.mark.parametrize(
    ("hidden", "extra", "args"),
    [
        ("grpc", "remote", ["ping", "sllm://127.0.0.1:1#insecure"]),
        ("grpc", "remote", ["run", "x", "--remote", "sllm://127.0.0.1:1#insecure"]),
        ("grpc", "remote", ["worker", "--listen", "127.0.0.1:0"]),
        ("grpc", "remote", ["demo"]),
        ("phonenumbers", "privacy", ["ask", "hi"]),
        ("huggingface_hub", "hub", ["inspect", "hf://owner/repo/file.gguf"]),
    ],
)
def test_a_command_without_its_package_ends_in_one_line(
    hidden: str, extra: str, args: list[str], tmp_path: pathlib.Path
) -> None:
    ended = child(HIDDEN, hidden, *args, folder=tmp_path)
    assert (ended.returncode, ended.stdout) == (2, "")
    told = one_line(ended.stderr)
    assert f"the package {hidden} is missing, for " in told and told.endswith(f"'sllm[{extra}]'")


@pytest.mark.parametrize("hidden", ["grpc", "huggingface_hub", "phonenumbers"])
def test_other_commands_work_without_the_package(hidden: str, tmp_path: pathlib.Path) -> None:
    ended = child(HIDDEN, hidden, "devices", folder=tmp_path)
    assert (ended.returncode, ended.stderr) == (0, "")
