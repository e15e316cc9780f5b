"""Sphinx: the repository's Markdown files are pages where they lie, so that their links hold here as they do there."""

import sphinx.util.inspect

import pallas_qk

project = "pallas-qk"
version = release = pallas_qk.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 2  # links to sections, as repository hosts make them
root_doc = "README"
PAGES = [
    "docs/options",
    "docs/porting",
    "docs/models",
    "docs/training",
    "docs/sharding",
    "docs/kv_cache",
    "docs/serving",
    "docs/generate",
    "docs/api",
    "docs/numerics",
    "docs/numbers",
    "benchmarks/README",
    "docs/testing",
    "docs/tried_and_lost",
    "CONTRIBUTING",
    "CHANGELOG",
]
include_patterns = [f"{page}.*" for page in (root_doc, *PAGES)]
exclude_patterns = [".*", "docs/_build"]

html_theme = "furo"
html_title = f"{project} {release}"
html_show_copyright = html_show_sourcelink = html_copy_source = False
highlight_language = "none"  # blocks that name no language are shell commands and formulas
smartquotes_action = "D"  # dashes alone: "xla" is typed as it is read

# `x` in a docstring is a link where it names something on the API page, and code everywhere else.
default_role = "py:obj"
nitpick_ignore_regex = [
    ("py:obj", ".*"),
    # Types whose pages lie on a network, and one that the function returning it describes.
    ("py:class", r"(collections|jax|numpy|torch)\..*|ArrayLike|DTypeLike|.*\.Choice"),
]

autodoc_typehints_format = "short"
autodoc_type_aliases = {"ArrayLike": "ArrayLike", "DTypeLike": "DTypeLike"}
sphinx.util.inspect.TypeAliasForwardRef.__repr__ = lambda alias: alias.name  # what Sphinx 9.0 shows of one in a union
autodoc_preserve_defaults = True
maximum_signature_line_length = 100
napoleon_custom_sections = ["Numerics", "Derivatives", "Mapping and sharding", "Sharding", "Semantics from"]


def add_toctree(app, docname, source):
    """Gives the first page the toctree that the sidebar is made from; elsewhere README would show it as text."""
    if docname == root_doc:
        source[0] += "\n```{toctree}\n:hidden:\n\n" + "\n".join(PAGES) + "\n```\n"


def setup(app):
    app.connect("source-read", add_toctree)
