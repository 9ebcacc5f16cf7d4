"""What the README and the docs show is true: examples run, links lead somewhere, names exist."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
BLOCK = re.compile(r"(<!-- not run: [^>]+ -->\n)?```python\n(.*?)```", re.DOTALL)


def test_readme_examples_run_one_after_the_other(tmp_path):
    blocks = BLOCK.findall((ROOT / "README.md").read_text())
    run = [code for skip, code in blocks if not skip]
    assert len(run) >= 3
    script = tmp_path / "readme.py"
    script.write_text("\n".join(run) + "\nprint('finished', trainer.global_step)\n")
    done = subprocess.run(
        [sys.executable, script.name], cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "finished 6" in done.stdout
    assert (tmp_path / "export" / "last" / "model.safetensors").exists()


def test_examples_of_the_other_pages_run(tmp_path):
    """All that is not marked: what a page shows begins with the imports that it needs, in the page's order."""
    pages = [page for page in PAGES if page.parent.name == "docs"]
    run = [code for page in pages for skip, code in BLOCK.findall(page.read_text()) if not skip]
    assert len(run) >= 10
    script = tmp_path / "pages.py"
    script.write_text("\n".join(run))
    done = subprocess.run(
        [sys.executable, script.name], cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "\u27e6Use `items[::-1]`.<|im_end|>\u27e7" in done.stdout


def test_examples_that_do_not_run_here_at_least_compile():
    skipped = [code for page in PAGES for skip, code in BLOCK.findall(page.read_text()) if skip]
    assert all(compile(code, "example", "exec") for code in skipped)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_classes_that_are_named_exist(page):
    from lightning_llm import callbacks

    for name in callbacks.__all__:
        assert f"`{name}`" in (ROOT / "docs" / "callbacks.md").read_text(), f"{name} has no card"
    for module, names in re.findall(r"from (lightning_llm[.\w]*) import \(?([\w,\s]+)", page.read_text()):
        for name in re.findall(r"\w+", names.split("\n\n")[0] if "(" in names else names.split("\n")[0]):
            assert hasattr(importlib.import_module(module), name), f"{module} has no {name}"


def test_every_public_name_is_in_the_readme_and_in_the_changelog():
    import lightning_llm
    from lightning_llm import callbacks, datamodules

    names = [name for name in lightning_llm.__all__ if not name.startswith("_")]
    for name in (*names, *callbacks.__all__, *datamodules.__all__):
        assert f"`{name}`" in (ROOT / "README.md").read_text(), name
        assert f"`{name}`" in (ROOT / "CHANGELOG.md").read_text(), name
