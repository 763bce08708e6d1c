"""Execute the notebooks in place, so that their outputs can be read without running them.

``make notebooks`` runs it after a change of one; tests execute all of them again.
"""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

PYTHON = {"name": "python"}
FOLDER = Path(__file__).parents[2] / "notebooks"


def execute(file: Path) -> None:
    """Run a notebook from top to bottom and keep its outputs."""
    book = nbformat.read(file, as_version=4)
    NotebookClient(book, record_timing=False, resources={"metadata": {"path": FOLDER}}).execute()
    nbformat.write(tidy(book), file)


def tidy(book: NotebookNode) -> NotebookNode:
    """Leave out what differs between machines: warnings, progress, versions and ids of runs."""
    for cell in book.cells:
        if cell.cell_type == "code":
            cell.metadata.pop("execution", None)
            cell.outputs = [out for out in cell.outputs if out.get("name") != "stderr"]
    book.metadata = {"kernelspec": book.metadata["kernelspec"], "language_info": PYTHON}
    return book


if __name__ == "__main__":
    for file in [Path(name) for name in sys.argv[1:]] or sorted(FOLDER.glob("*.ipynb")):
        execute(file)
