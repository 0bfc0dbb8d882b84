"""How Sphinx makes a site of these pages: ``sphinx-build -W --keep-going docs build/docs``.

The pages are Markdown (MyST). The reference comes from the docstrings of the installed package, that of the
commands from what they say for ``--help``, and a few documents of the repository are shown as they are.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from docutils import nodes
from docutils.parsers.rst import Directive
from docutils.utils.math import latex2mathml

import sllm
from sllm.cli import main as cli

if TYPE_CHECKING:
    from sphinx.addnodes import pending_xref
    from sphinx.application import Sphinx
    from sphinx.environment import BuildEnvironment
    from sphinx.writers.html5 import HTML5Translator

PAGES = Path(__file__).parent
ROOT = PAGES.parent

project = "sllm"
author = "the authors of sllm"
version = release = sllm.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
nitpicky = True

html_theme = "furo"
html_math_renderer = "mathml"  # set up below
html_title = "sllm"
html_show_copyright = False

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4  # GitHub's anchors, so that a link to a heading works there and here

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # attributes are listed where the class tells of them, once

SHOWN = {
    ROOT / "README.md": "index",
    ROOT / "README.zh.md": "zh/index",
    ROOT / "benchmarks" / "RESULTS.md": "project/results",
    ROOT / "CHANGELOG.md": "project/changelog",
    ROOT / "CONTRIBUTING.md": "project/contributing",
}
"""Documents of the repository, and the page that stands for each."""


def relinked(text: str, folder: Path, page: Path) -> str:
    """The text of a document with its links to files of the repository made to work from a page.

    Links between pages are left alone. One that leads out of ``docs`` leads to the page that shows the
    document, or else to a copy of the file.
    """

    def relink(match: re.Match[str]) -> str:
        target, anchor = match["target"], match["anchor"] or ""
        path = Path(os.path.normpath(folder / target))
        if "://" in target or (folder == page.parent and path.is_relative_to(PAGES)) or not path.is_file():
            return match[0]
        if path in SHOWN:
            path = PAGES / f"{SHOWN[path]}.md"
        there = Path(os.path.relpath(path, page.parent)).as_posix()
        if path.is_relative_to(PAGES) and path.suffix == ".md":
            return f"{match['label']}({there}{anchor})"
        return f"{{download}}`{match['label'][1:-1].replace('`', '')} <{there}>`"

    link = r"(?P<label>\[[^\[\]]*\])\((?P<target>[^()\s#]+)(?P<anchor>#[^()\s]*)?\)"
    return re.sub(link, relink, text)


def relink_page(app: Sphinx, name: str, source: list[str]) -> None:
    """Mend the links of a page of ours."""
    page = Path(app.env.doc2path(name))
    source[0] = relinked(source[0], page.parent, page)


def relink_document(_app: Sphinx, document: Path, _name: str, content: list[str]) -> None:
    """Mend the links of a document that a page shows."""
    path = Path(os.path.normpath(PAGES / document))
    content[0] = relinked(content[0], path.parent, PAGES / f"{SHOWN[path]}.md")


def find_name(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, shown: nodes.TextElement
) -> nodes.TextElement | None:
    """Find what a docstring calls ``Run``, or by the module that it comes from, where the reference has it.

    Types of other packages, and names that the reference does not have, are shown as they stand.
    """
    if node.get("refdomain") != "py":
        return None
    target = node["reftarget"]
    objects = env.domains.python_domain.objects
    found = [name for name in objects if name.endswith(f".{target}")] or [f"sllm.{target.split('.')[-1]}"]
    entry = objects.get(min(found, key=len))
    if entry is None:
        return shown
    uri = app.builder.get_relative_uri(node["refdoc"], entry.docname)
    return nodes.reference("", "", shown, internal=True, refuri=f"{uri}#{entry.node_id}")


def show_formula(translator: HTML5Translator, node: nodes.math | nodes.math_block) -> None:
    """Write a formula as MathML, which browsers show by themselves: the site needs nothing from elsewhere."""
    block = isinstance(node, nodes.math_block)
    translator.body.append(latex2mathml.tex2mathml(node.astext(), as_block=block))
    raise nodes.SkipNode


class Commands(Directive):
    """``commands``: each command of ``sllm``, and what it says for ``--help``."""

    def run(self) -> list[nodes.Node]:
        """Ask the commands themselves."""
        sections: list[nodes.Node] = []
        for name in cli._COMMANDS:
            said = subprocess.run(
                [sys.executable, "-m", "sllm", *name.split(), "--help"],
                capture_output=True,
                encoding="utf-8",
                env={**os.environ, "COLUMNS": "100"},
                cwd=PAGES,  # not the checkout, whose package may have no compiled core
                check=True,
            ).stdout
            section = nodes.section(ids=[f"sllm-{name.replace(' ', '-')}"], names=[f"sllm {name}"])
            section += [nodes.title("", f"sllm {name}"), nodes.literal_block(said, said, language="text")]
            self.state.document.note_explicit_target(section)
            sections.append(section)
        return sections


def setup(app: Sphinx) -> None:
    """Hook in what stands above."""
    app.connect("source-read", relink_page)
    app.connect("include-read", relink_document)
    app.connect("missing-reference", find_name)
    app.add_html_math_renderer("mathml", (show_formula, None), (show_formula, None))
    app.add_directive("commands", Commands)
