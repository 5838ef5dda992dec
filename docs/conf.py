"""How Sphinx makes the documentation: `make docs`, which ends at the first warning."""

import dataclasses
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from docutils import nodes
from transformers import TrainingArguments

import metricopt_hf

project = "metricopt_hf"
author = "the authors of metricopt_hf"
copyright = f"{author}; Apache-2.0"  # in the footer
version = release = metricopt_hf.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"metricopt_hf {version}"
html_copy_source = False
html_static_path, html_css_files = ["_static"], ["phone.css"]

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3  # links to headings, as on GitHub

# The docstrings are written for Google's style, with code in single backticks.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say shapes and units, which types do not
napoleon_use_ivar = True  # attributes of dataclasses are in the docstring alone
napoleon_use_rtype = False


def arguments_table() -> str:
    """The fields that `MetricOptConfig` adds to `TrainingArguments`, from their own help."""
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    lines = ["| argument | default | what it does |", "|---|---|---|"]
    for field in dataclasses.fields(metricopt_hf.MetricOptConfig):
        if field.name not in known:
            text = field.metadata["help"].replace("|", "\\|").replace("<", "&lt;")
            lines.append(f"| `{field.name}` | `{field.default!r}` | {text} |")
    return "\n".join(lines)


def fill_in(app, docname: str, source: list[str]) -> None:
    """What a page takes from the code, and links that lead out of this folder."""
    if docname == "arguments":
        source[0] = source[0].replace("<!-- the table of arguments -->", arguments_table())
    up = "../" * docname.count("/")
    for outside in ("BENCHMARKS", "CHANGELOG", "CONTRIBUTING"):
        source[0] = source[0].replace(f"]({up}../{outside}.md)", f"]({up}{outside.lower()}.md)")


def link_pictures(app, doctree) -> None:
    """A picture is a link to itself: on a phone its text is too small to read."""
    for picture in doctree.findall(nodes.image):
        if not isinstance(picture.parent, nodes.reference):  # a badge
            picture["width"] = "100%"  # Sphinx links pictures that it scales


def for_sphinx(app, what, name, obj, options, lines: list[str]) -> None:
    """Docstrings are written to be read in the source: what reStructuredText would take for markup is text."""
    text = "\n".join(lines)
    text = re.sub(r"^Example:\n(?!\s*>>>)", "Example::\n\n", text, flags=re.M)  # code that is not run
    parts = re.split(r"(`[^`]*`)", text)
    parts[::2] = [re.sub(r"(?<=\w)_(?!\w)|[*|]", r"\\\g<0>", part) for part in parts[::2]]
    lines[:] = "".join(parts).split("\n")


def setup(app) -> None:
    app.connect("source-read", fill_in)
    app.connect("doctree-read", link_pictures)
    app.connect("autodoc-process-docstring", for_sphinx, priority=0)  # before napoleon
