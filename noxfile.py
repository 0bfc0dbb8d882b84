"""Checks beside those of ``.ci/run``: the least declared versions, and what is shipped.

``nox -s least`` installs every dependency in the least version that ``pyproject.toml`` declares, for the
least Python, and runs the tests; ``nox -s least -- tests/worker/test_worker.py`` runs some of them. A bound
that nobody has tried is a guess. ``nox -s docs`` makes a site of ``docs/``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nox

nox.options.sessions = ["least", "packaging"]

PYPROJECT: dict[str, Any] = nox.project.load_toml("pyproject.toml")
LEAST_PYTHON = PYPROJECT["project"]["requires-python"].removeprefix(">=")
WITH_TESTS = ("test",)  # the extras that the default tests need
TOOLS = ("scikit-build-core", "cffi", "cmake", "ninja")  # for builds without isolation


def least_versions(pyproject: dict[str, Any]) -> list[str]:
    """``name==version`` for every ``name>=version`` that building, running and testing declare."""
    project = pyproject["project"]
    declared = [*pyproject["build-system"]["requires"], *project["dependencies"]]
    extras = list(WITH_TESTS)
    constraints = set()
    for extra in extras:
        declared += project["optional-dependencies"][extra]
        for requirement in project["optional-dependencies"][extra]:
            own = re.fullmatch(r"sllm\[(.+)\]", requirement)
            if own is not None:
                extras += own[1].split(",")
                declared.remove(requirement)
    for requirement in declared:
        match = re.fullmatch(r"([A-Za-z0-9._-]+)>=([0-9][0-9.]*)", requirement)
        if match is None:
            raise ValueError(f"{requirement!r} declares no least version as name>=version")
        constraints.add(f"{match[1]}=={match[2]}")
    return sorted(constraints)


@nox.session(python=LEAST_PYTHON)
def least(session: nox.Session) -> None:
    """The tests with the least versions of Python and of everything that is declared."""
    constraints = Path(session.create_tmp(), "least.txt")
    constraints.write_text("\n".join(least_versions(PYPROJECT)) + "\n", encoding="utf-8")
    # As variables they hold for the build's own environment, too; pip 25.3 gave that a variable of its own.
    files = {"PIP_CONSTRAINT": str(constraints), "PIP_BUILD_CONSTRAINT": str(constraints)}
    session.install(f".[{','.join(WITH_TESTS)}]", env=files)
    session.run("pytest", *session.posargs)


@nox.session
def packaging(session: nox.Session) -> None:
    """The tests that build an sdist and wheels."""
    session.install(*TOOLS)
    session.install("--no-build-isolation", ".[test,dev]")
    session.run("pytest", "-m", "packaging", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """The site of ``docs/``, in ``build/docs``; whatever it warns of is an error."""
    session.install(".[all,docs,openai]")
    session.run("sphinx-build", "-W", "--keep-going", "docs", "build/docs")
