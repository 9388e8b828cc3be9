"""The notebook of the documentation runs from a clean state and says what it is committed with."""

from __future__ import annotations

import shutil
from pathlib import Path

import nbformat
import pytest

DOCS = Path(__file__).parents[1] / "docs"


def _texts(notebook: nbformat.NotebookNode) -> list[str]:
    """What each cell printed or returned, without pictures."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert all(output.output_type in ("stream", "execute_result", "display_data") for output in outputs)
    return [o.text if o.output_type == "stream" else o.data["text/plain"] for o in outputs]


def _pictures(notebook: nbformat.NotebookNode) -> list[str]:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [o.data["image/svg+xml"] for o in outputs if "image/svg+xml" in o.get("data", {})]


# the client warns of how its own connection to the kernel is set up
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::RuntimeWarning")
def test_the_tour_runs_from_a_clean_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nbclient import NotebookClient

    for name in ("tracing_debug.ipynb", "tracing_debug_model.py"):
        shutil.copy(DOCS / name, tmp_path)
    for variable in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / variable.lower()))
    committed = nbformat.read(tmp_path / "tracing_debug.ipynb", as_version=4)
    again = nbformat.from_dict(committed)
    for cell in again.cells:
        cell.update({"outputs": [], "execution_count": None} if cell.cell_type == "code" else {})
    counts = [cell.execution_count for cell in committed.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1)), "commit it as executed, with its outputs"
    before = _texts(committed)
    executed = NotebookClient(
        again,
        timeout=300,
        kernel_name="python3",
        coalesce_streams=True,
        resources={"metadata": {"path": str(tmp_path)}},
    ).execute()
    assert _texts(executed) == before
    assert [svg.startswith("<svg") for svg in _pictures(executed)] == [True]


def test_nothing_of_a_machine_is_committed() -> None:
    text = (DOCS / "tracing_debug.ipynb").read_text()
    assert not [word for word in ("/home/", "/root", "/tmp/", "/work", "site-packages", "seconds") if word in text]
    assert len(text) < 100_000
