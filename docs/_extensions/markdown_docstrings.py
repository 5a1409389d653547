"""Docstrings are written as Markdown is: `code` and $mathematics$.

Sphinx reads reStructuredText there. This turns the one into the other, and a public
name in backticks into a link to its page.
"""

import inspect
import pkgutil
import re
from functools import cache

from sphinx.errors import PycodeError
from sphinx.pycode import ModuleAnalyzer
from sphinx.util import logging
from sphinx.util.inspect import stringify_signature

import keras_moe

logger = logging.getLogger(__name__)

_INLINE = re.compile(r"`(?P<code>[^`]+)`|\$(?P<math>[^$]+)\$", re.S)
_EXAMPLE = re.compile(r"^\s*>>> ")
_NAMED = re.compile(r"\w+: ")


@cache
def _pages():
    """Full name of every public symbol, by each name a docstring may use for it."""
    pages = {}
    for package in keras_moe.__all__:
        module = getattr(keras_moe, package)
        if not inspect.ismodule(module):
            continue
        own = [n for n, v in vars(module).items() if inspect.isclass(v)]
        for name in getattr(module, "__all__", own):
            full = f"keras_moe.{package}.{name}"
            pages[full] = pages[f"{package}.{name}"] = full
            # A name that two packages use needs its package before it.
            pages[name] = None if name in pages else full
    return pages


def _convert(match, text, own_name):
    if match["math"] is not None:
        result = f":math:`{' '.join(match['math'].split())}`"
    else:
        code = " ".join(match["code"].split())
        name = code.split("(")[0]
        page = _pages().get(name)
        # An argument may bear the name of a function, as `load` does: names in lower
        # case are linked where their package stands before them.
        if page and page != own_name and ("." in name or name != name.lower()):
            result = f":py:obj:`{code} <{page}>`"
        else:
            result = f"``{code}``"
    # Inline markup has to stand apart from letters; an escaped space does that.
    before = text[max(match.start() - 1, 0) : match.start()]
    after = text[match.end() : match.end() + 1]
    return "\\ " * before.isalnum() + result + "\\ " * after.isalnum()


def _name_parts_of_a_tuple(lines):
    """Several named parts in `Returns` are laid out as arguments are."""
    for i, line in enumerate(lines):
        if line.strip() != "Returns:":
            continue
        margin = len(line) - len(line.lstrip())
        heads = []
        for text in lines[i + 1 :]:
            indent = len(text) - len(text.lstrip())
            if text.strip() and indent <= margin:
                break
            if text.strip() and indent == margin + 4:
                heads.append(text.strip())
        if len(heads) > 1 and all(_NAMED.match(head) for head in heads):
            lines[i] = line.replace("Returns:", "Returns a tuple:")


@cache
def _comments():
    """The `#:` comment of every constant of the package, by its name."""
    found = {}
    for module in pkgutil.walk_packages(keras_moe.__path__, "keras_moe."):
        try:
            comments = ModuleAnalyzer.for_module(module.name).find_attr_docs()
        except PycodeError:
            continue
        found.update({n: c for (owner, n), c in comments.items() if not owner})
    return found


def process(app, what, name, obj, options, lines):
    """Rewrites the lines of a docstring, outside of its examples."""
    if what == "data":
        lines[:] = _comments().get(name.rpartition(".")[2], [])
        if not lines:
            logger.warning("%s has no `#:` comment that says what it is", name)
    _name_parts_of_a_tuple(lines)
    result: list[str] = []
    paragraph: list[str] = []

    def flush():
        text = "\n".join(paragraph)
        if text:
            text = _INLINE.sub(lambda match: _convert(match, text, name), text)
            result.extend(text.split("\n"))
        paragraph.clear()

    in_example = False
    for line in lines:
        in_example = bool(line.strip()) and (in_example or bool(_EXAMPLE.match(line)))
        if in_example or not line.strip():
            flush()
            result.append(line)
        else:
            paragraph.append(line)
    flush()
    lines[:] = result


def sign(app, what, name, obj, options, signature, return_annotation):
    """Takes a layer's signature from `__init__`: Keras hides it behind `__new__`."""
    if what != "class" or "__init__" not in vars(obj):
        return None
    parameters = inspect.signature(obj.__init__)
    kept = [p for n, p in parameters.parameters.items() if n != "self"]
    parameters = parameters.replace(
        parameters=kept, return_annotation=inspect.Signature.empty
    )
    text = stringify_signature(parameters, unqualified_typehints=True)
    return text.replace("<factory>", "..."), None  # of dataclasses


def skip(app, what, name, obj, skip, options):
    """Leaves out the fields of named tuples, which their class describes."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def setup(app):
    # Before napoleon, whose priority is 500.
    app.connect("autodoc-process-docstring", process, priority=400)
    app.connect("autodoc-process-signature", sign)
    app.connect("autodoc-skip-member", skip)
    return {"parallel_read_safe": True}
