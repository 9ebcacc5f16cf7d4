"""Every notebook runs from start to end, with small parameters, and keeps its pictures in the file."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
SMALL = {
    "01_quickstart": {"max_steps": 8, "vocab_size": 300, "max_length": 64, "hidden_size": 32},
    "03_dynamic_batch_scaling": {
        "max_steps": 6,
        "global_batch": 8,
        "vocab_size": 300,
        "max_length": 32,
        "hidden_size": 32,
        "budgets": {0: None, 2: 400, 4: None},
    },
    "02_exact_accumulation": {"max_steps": 4, "global_batch": 8, "num_rows": 30, "vocab_size": 300, "hidden_size": 16},
    "04_long_sequences_data": {
        "max_steps": 10,
        "vocab_size": 300,
        "long_length": 256,
        "max_length": 64,
        "hidden_size": 32,
        "validation_fraction": 0.1,
        "num_rows": 20_000,
    },
    "05_long_sequences": {
        "max_steps": 4,
        "vocab_size": 300,
        "max_length": 64,
        "window": 16,
        "hidden_size": 32,
        "lengths": [128],
        "measured_vocab_size": 300,
    },
    "06_batch_size": {
        "num_tokens": 3000,
        "seeds": (0,),
        "sweep": (8, 16),
        "vocab_size": 300,
        "max_length": 16,
        "hidden_size": 16,
        "eval_batches": 1,
    },
    "07_tasks": {
        "per_package": 4,
        "min_per_package": 4,
        "max_packages": 2,
        "max_windows": 2,
        "epochs": 1,
        "learning_rates": (1e-3,),
        "seeds": (0,),
        "num_steps": 6,
        "shared_seeds": (0,),
        "num_labelled": 64,
        "vocab_size": 300,
        "max_length": 32,
        "hidden_size": 16,
    },
    "08_images": {"max_epochs": 2, "batch_size": 48, "width": 4, "piece_sizes": (48, 20)},
}
WRITTEN = {"01_quickstart": "huggingface/last/model.safetensors"}


def notebooks():
    return sorted(NOTEBOOKS.glob("*.ipynb"))


def with_parameters(notebook, values):
    """Put assignments behind the cell that is tagged `parameters`."""
    (index,) = [i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])]
    source = "\n".join(f"{name} = {value!r}" for name, value in values.items())
    notebook.cells.insert(index + 1, nbformat.v4.new_code_cell(source))
    return notebook


@pytest.mark.parametrize("path", notebooks(), ids=lambda path: path.stem)
@pytest.mark.timeout(300)
def test_notebook_runs_with_small_parameters(path, tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_LLM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text").mkdir()
    for index in range(40):
        (tmp_path / "text" / f"{index}.txt").write_text(f"Document number {index} says a few words. " * (1 + index))
    notebook = nbformat.read(path, as_version=4)
    values = {**SMALL[path.stem], "data": str(tmp_path / "text"), "output_folder": str(tmp_path / "run")}
    client = NotebookClient(with_parameters(notebook, values), timeout=240, resources={"metadata": {"path": tmp_path}})
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 3
    if path.stem in WRITTEN:
        assert (tmp_path / "run" / WRITTEN[path.stem]).exists()


@pytest.mark.parametrize("path", notebooks(), ids=lambda path: path.stem)
def test_notebook_is_stored_executed_with_its_pictures_and_without_errors(path):
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in cells)
    outputs = [output for cell in cells for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 3
    assert not any(output.output_type == "error" for output in outputs)
