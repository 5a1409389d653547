"""Settings of the documentation site.

    python -m sphinx -W --keep-going docs docs/site

builds it into `docs/site`, without access to a network. Warnings are errors.
"""

import os
import shutil
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_extensions"))

from keras_moe import __version__  # noqa: E402  (the variable comes first)

project = "keras_moe"
author = "The keras_moe authors"
copyright = author
release = version = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "markdown_docstrings",
    "mathml",
]
templates_path = ["_templates"]
exclude_patterns = ["site", "_templates", "_extensions"]

# Pages of the API are made from `__all__` of the packages, see `api/index.md`. What
# an earlier build has made goes first, or a symbol that is gone would keep its page.
shutil.rmtree(HERE / "api" / "generated", ignore_errors=True)
autosummary_generate = True
autosummary_ignore_module_all = False
autosummary_imported_members = False
autodoc_inherit_docstrings = False  # Keras' own words on `call` and `build`
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
add_module_names = False
maximum_signature_line_length = 80
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_attr_annotations = False
napoleon_custom_sections = [
    ("Call arguments", "params_style"),
    ("Returns a tuple", "params_style"),  # see `markdown_docstrings`
    "Input shape",
    "Output shape",
    "Losses and state",
    "Reference",
]

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True

html_theme = "furo"
html_title = f"keras_moe {__version__}"
html_static_path: list[str] = []
html_theme_options = {"navigation_with_keys": True}
html_math_renderer = "mathml"
