"""How Sphinx builds the documentation; `make docs` calls it. Nothing is fetched: fonts are the system's, no CDN."""

import sys
from pathlib import Path
from typing import Any

from docutils.nodes import SkipNode
from docutils.utils.math.latex2mathml import tex2mathml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

project = "StackWise"
author = "StackWise"
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
templates_path = ["_templates"]

# Pages are Markdown. A heading can be linked to by its text, as on any forge.
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence", "dollarmath"]

# Docstrings are Google's style, with code between single backticks.
default_role = "code"
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
autosummary_generate = True
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
autodoc_class_signature = "separated"
autodoc_inherit_docstrings = False
add_module_names = False
python_use_unqualified_type_names = True

# `stackwise.api` names again what other modules define: a link to `UserError` has two targets, both of them right.
suppress_warnings = ["ref.python"]

html_theme = "furo"
html_title = "StackWise"
html_show_sphinx = False
html_show_copyright = False
html_copy_source = False
html_math_renderer = "mathml"
copybutton_prompt_text = "$ "
pygments_style = "friendly"
pygments_dark_style = "native"


def _block_math(visitor: Any, node: Any) -> None:
    visitor.body.append(f'<div class="math">{tex2mathml(node.astext(), as_block=True)}</div>')
    raise SkipNode


def _inline_math(visitor: Any, node: Any) -> None:
    visitor.body.append(tex2mathml(node.astext()))
    raise SkipNode


def _docstring(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """No docstring of an attribute begins with its type and a colon: napoleon would take its first words for one."""
    if what in ("attribute", "data", "property"):
        lines[:0] = ["..", ""]  # an empty comment


def setup(app: Any) -> None:
    """Formulas as MathML, which browsers draw: Sphinx's own way would fetch a script from a CDN."""
    app.connect("autodoc-process-docstring", _docstring, priority=400)
    app.add_html_math_renderer("mathml", inline_renderers=(_inline_math, None), block_renderers=(_block_math, None))
