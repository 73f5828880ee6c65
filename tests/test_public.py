"""Every public name and every operator's public function: a docstring in the agreed form, whose example runs.

The agreed form (CONTRIBUTING.md): a first line, then the sections that apply. Not covered: whether the text is true.
"""

import ast
import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import ornith_moe as om

NAMES = [name for name in om.__all__ if name != "__version__"]
MODULES = [
    "backend.cpu",
    "backend.reference",
    "fp8_weights",
    "functional",
    "layer",
    "quant.codecs.gguf",
    "quant.fp8",
    "quant.recipes",
    "routing",
    "sync.engines",
    "sync.served",
]


def run_examples(thing, name, globs):
    tests = doctest.DocTestFinder(recurse=False).find(thing, name, globs=globs)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    return [runner.run(test) for test in tests]


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_is_documented_and_its_example_runs(name):
    public = getattr(om, name)
    text = inspect.getdoc(public)
    assert text and "\n\n" in text, f"{name}: a docstring of more than one line"
    torch.manual_seed(0)
    module = importlib.import_module(public.__module__)
    ran = run_examples(public, name, dict(vars(module)))
    assert sum(result.failed for result in ran) == 0
    if inspect.isfunction(public):
        assert sum(result.attempted for result in ran) > 0, f"{name}: an example"
        parameters = set(inspect.signature(public).parameters)
        if parameters:
            assert "Args:" in text and "Returns" in text
            said = set(re.findall(r"\w+", text[text.index("Args:") :]))
            assert parameters <= said, f"{name}: says nothing of {parameters - said}"
        if "raise " in inspect.getsource(public):
            assert "Raises" in text, name


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_the_modules_below(name):
    module = importlib.import_module(f"ornith_moe.{name}")
    torch.manual_seed(0)
    for own_name, own in vars(module).items():
        if getattr(own, "__module__", None) == module.__name__ and callable(own):
            failed = [result for result in run_examples(own, own_name, dict(vars(module))) if result.failed]
            assert not failed, own_name


def test_type_checkers_know_every_name_by_its_home():
    imports = [node for node in ast.walk(ast.parse(Path(om.__file__).read_text())) if isinstance(node, ast.ImportFrom)]
    known = {name.name: node.module for node in imports if node.module.startswith("ornith_moe.") for name in node.names}
    assert known == {name: f"ornith_moe.{home}" for name, home in om._HOME.items()}


def test_the_list_is_what_the_package_offers():
    """Every name is importable, and every module of the package belongs to us."""
    assert len(set(NAMES)) == len(NAMES)
    found = {module.name for module in pkgutil.iter_modules(om.__path__)}
    assert {"functional", "ops", "routing", "backend", "command"} <= found
