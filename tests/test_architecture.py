"""The rules of the house, read from the source: who imports whom, what is documented, what examples show."""

import ast
import doctest
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_llm

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path for folder in ("lightning_llm", "callbacks", "datamodules") for path in (ROOT / folder).rglob("*.py")
)
PURE = [
    *("lightning_llm/duration.py", "lightning_llm/schedule.py", "lightning_llm/loss.py"),
    *("lightning_llm/ramps.py", "lightning_llm/seesaw.py", "lightning_llm/decay.py", "lightning_llm/noise_scale.py"),
    *(f"lightning_llm/search/{name}.py" for name in ("keys", "space")),
    *("lightning_llm/chunked_loss.py", "lightning_llm/logit_tiles.py", "lightning_llm/pooling.py"),
    "lightning_llm/answer_scores.py",
    *("callbacks/noise/parts.py", "callbacks/noise/watch.py"),
    "callbacks/pruning/masks.py",
    *("callbacks/pieces/limits.py", "callbacks/pieces/cutting.py", "callbacks/pieces/rows.py"),
    *("datamodules/windows.py", "datamodules/packing.py", "datamodules/order.py", "datamodules/collate.py"),
    *(f"datamodules/{name}.py" for name in ("mixture", "document_windows", "token_windows", "rows", "shorter_rows")),
    *(f"datamodules/batches/{name}.py" for name in ("plan", "budget", "budget_plan", "global_batch_plan", "settings")),
    *(f"datamodules/examples/{name}.py" for name in ("records", "class_names", "labels", "store", "dataset", "texts")),
    *(f"datamodules/examples/{name}.py" for name in ("messages", "chat_templates", "chat_tokens", "rendered_chat")),
    *(f"datamodules/examples/{name}.py" for name in ("conversation_rows", "preference_pairs")),
    *("datamodules/examples/token_labels.py", "datamodules/masking.py"),
    *(f"datamodules/questions/{name}.py" for name in ("question_windows", "question_answering", "answers", "scores")),
    "datamodules/examples/long_texts.py",
    *(f"datamodules/multi_task/{name}.py" for name in ("order", "plan", "rows")),
]
MODULES = sorted(
    info.name
    for package in (
        "lightning_llm",
        "lightning_llm.callbacks",
        "lightning_llm.callbacks.noise",
        "lightning_llm.callbacks.pieces",
        "lightning_llm.callbacks.pruning",
        "lightning_llm.callbacks.steps",
        "lightning_llm.context_parallel",
        "lightning_llm.datamodules",
        "lightning_llm.datamodules.batches",
        "lightning_llm.datamodules.examples",
        "lightning_llm.datamodules.multi_task",
        "lightning_llm.datamodules.questions",
        "lightning_llm.datamodules.streams",
        "lightning_llm.multi_task",
        "lightning_llm.planning",
        "lightning_llm.search",
        "lightning_llm.sequence_windows",
        "lightning_llm.tasks",
    )
    for info in pkgutil.iter_modules(importlib.import_module(package).__path__, f"{package}.")
    if not info.name.endswith("__main__")
)


def imports_of(path):
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_packages_meet_only_where_they_may(path):
    names = imports_of(path)
    home = path.relative_to(ROOT).parts[0]
    uses_callbacks = any(name.startswith("lightning_llm.callbacks") for name in names)
    uses_datamodules = any(name.startswith("lightning_llm.datamodules") for name in names)
    if path.name == "cli.py":
        return  # joins them
    if home == "lightning_llm":
        assert not uses_callbacks
        assert not uses_datamodules
    elif home == "callbacks":
        assert not uses_datamodules
        assert not any(name.split(".")[0] in ("transformers", "datasets") for name in names)
    else:
        assert not uses_callbacks


@pytest.mark.parametrize("name", PURE)
def test_pure_files_do_not_know_lightning(name):
    assert not any(module.split(".")[0] == "lightning" for module in imports_of(ROOT / name))


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)


def test_importing_the_callbacks_imports_neither_transformers_nor_datasets():
    """Beyond what Lightning itself imports (torchmetrics looks for transformers); and they work without both."""
    added = run_python(
        "import sys, lightning.pytorch; before = set(sys.modules); import lightning_llm.callbacks\n"
        "print([m for m in set(sys.modules) - before if m.split('.')[0] in ('transformers', 'datasets')])"
    )
    assert added.stdout == "[]\n", added.stderr
    without = run_python(
        "import sys, lightning.pytorch\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('transformers', 'datasets'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "for name in [m for m in sys.modules if m.split('.')[0] in ('transformers', 'datasets')]:\n"
        "    del sys.modules[name]\n"
        "sys.meta_path.insert(0, Absent())\n"
        "import lightning_llm.callbacks as c; print(len(c.__all__) > 0, 'transformers' in sys.modules)"
    )
    assert without.stdout == "True False\n", without.stderr


def test_importing_the_package_is_light():
    done = run_python("import sys, lightning_llm; print('torch' in sys.modules, lightning_llm.__version__)")
    assert done.stdout == f"False {lightning_llm.__version__}\n", done.stderr


def test_unknown_attribute_of_the_package_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Trainer'"):
        lightning_llm.Trainer  # noqa: B018
    assert {"LLMModule", "Duration"} <= set(dir(lightning_llm))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_everything_public_is_documented_and_nothing_is_left_to_do(path):
    text = path.read_text()
    assert not any(word in text for word in ("TODO", "FIXME", "NotImplementedError", "pickle.load"))
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "the module has no docstring"
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            inner = any(
                isinstance(p, ast.FunctionDef) and node in ast.walk(p) and node is not p for p in ast.walk(tree)
            )
            assert inner or ast.get_docstring(node), f"{node.name} has no docstring"


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_are_true(name):
    module = importlib.import_module(name)
    results = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert results.failed == 0


def test_there_are_examples():
    finder = doctest.DocTestFinder()
    tests = [test for name in MODULES for test in finder.find(importlib.import_module(name)) if test.examples]
    assert len(tests) >= 8


def test_torch_load_of_anything_but_weights_is_nowhere():
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "weights_only"):
                assert ast.literal_eval(node.value) is (node.arg == "weights_only"), path


def test_every_folder_of_source_is_in_the_package():
    from setuptools.config.pyprojecttoml import load_file

    settings = load_file(ROOT / "pyproject.toml")["tool"]["setuptools"]
    packages, mapping = settings["packages"], settings["package-dir"]
    folders = {path.parent.relative_to(ROOT) for path in SOURCES}
    for package in packages:
        home, _, rest = package.partition(".")
        folder = mapping.get(package) or f"{mapping[home]}/{rest.replace('.', '/')}"
        folders.discard(Path(folder))
    assert not folders, "packages missing in pyproject.toml"
