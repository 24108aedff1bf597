"""The notebook: it runs from its first cell to its last, and is stored with the outputs of such a run."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

PATH = Path(__file__).parent.parent / "docs" / "tutorial.ipynb"
FIGURES = 4


def figures(notebook: nbformat.NotebookNode) -> int:
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    return sum(bool({"image/png", "image/jpeg"} & output.get("data", {}).keys()) for output in outputs)


@pytest.fixture(scope="module")
def stored() -> nbformat.NotebookNode:
    return nbformat.read(PATH, as_version=4)


@pytest.mark.slow
def test_it_runs(stored):
    notebook = nbformat.from_dict(stored)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    NotebookClient(notebook, timeout=600).execute()
    assert figures(notebook) == FIGURES


def test_it_is_stored_with_its_figures_and_small(stored):
    nbformat.validate(stored)
    assert figures(stored) == FIGURES and PATH.stat().st_size < 500_000
    numbers = [cell.execution_count for cell in stored.cells if cell.cell_type == "code"]
    assert numbers == list(range(1, len(numbers) + 1))


def test_the_quick_start_is_what_the_notebook_runs(stored):
    readme = (PATH.parent.parent / "README.md").read_text(encoding="utf-8")
    snippet = readme.split("```python\n")[1].split("```")[0]
    statements = [
        line.partition("  # ")[0] for line in snippet.splitlines() if " = " in line or line.startswith("print")
    ]
    assert len(statements) == 4
    run = "\n".join(cell.source for cell in stored.cells if cell.cell_type == "code").replace(", progress=False", "")
    for statement in statements:
        assert statement in run
