"""Docstrings are held to the code: arguments, defaults, examples."""

import doctest
import inspect
import re

import keras
import numpy as np
import pytest

import keras_moe
from keras_moe import conversion


@pytest.mark.parametrize("name", conversion.__all__)
def test_docstring_states_every_argument_and_its_example_runs(name):
    function = getattr(conversion, name)
    doc = inspect.getdoc(function)
    for section in ("Args:", "Returns:", "Raises:", "Example:"):
        assert section in doc, section
    args = doc.split("Args:\n")[1].split("\n\n")[0]
    entries = {
        m[1]: m[0]
        for m in re.finditer(r"^ {4}(\w+): (?:.|\n(?! {4}\w+:))*", args, re.M)
    }
    parameters = inspect.signature(function).parameters
    assert entries.keys() == parameters.keys()
    for argument, parameter in parameters.items():
        stated = re.search(r"Defaults\s+to\s+`([^`]*)`", entries[argument])
        if parameter.default is inspect.Parameter.empty:
            assert stated is None, argument
        else:
            names = {"MoE": keras_moe.layers.MoE}
            assert eval(stated[1], names) == parameter.default, argument
    if "safetensors" in doc:
        pytest.importorskip("safetensors")
    names = {"keras_moe": keras_moe, "keras": keras, "np": np}
    test = doctest.DocTestParser().get_doctest(doc, names, name, None, 0)
    assert test.examples
    assert doctest.DocTestRunner().run(test).failed == 0


def test_the_three_for_models_stand_at_the_top():
    for name in ("upcycle", "prune_experts", "merge_experts"):
        assert name in keras_moe.__all__
        assert getattr(keras_moe, name) is getattr(conversion, name)
