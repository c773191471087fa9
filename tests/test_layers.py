"""The layers: flows → tasks → models, never back; and what must not be imported where."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def imports(layer: str) -> Iterator[tuple[str, str]]:
    """(file, module) for every import statement of a layer, those inside functions too."""
    for path in sorted((ROOT / layer).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            name = str(path.relative_to(ROOT))
            if isinstance(node, ast.Import):
                yield from ((name, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{name} uses a relative import: write from which layer it imports"
                yield name, node.module or ""


@pytest.mark.parametrize(
    ("layer", "never"),
    [
        pytest.param("models", {"tasks", "flows", "prefect", "fsspec", "s3fs", "botocore", "cyclopts"}, id="models"),
        pytest.param("tasks", {"flows", "cyclopts"}, id="tasks"),
        pytest.param("flows", {"fsspec", "s3fs", "botocore", "torch", "duckdb"}, id="flows"),
    ],
)
def test_imports_never_go_back(layer, never):
    wrong = [f"{file}: {module}" for file, module in imports(layer) if module.split(".")[0] in never]
    assert not wrong


def test_only_storage_knows_fsspec_and_only_the_server_knows_prefect():
    outside = {
        (file, module)
        for file, module in imports("tasks")
        if module.split(".")[0] in {"fsspec", "s3fs", "prefect"}
        and file not in {"tasks/storage.py", "tasks/storage_local.py", "tasks/storage_s3.py", "tasks/server.py"}
    }
    assert not outside


def imported_by(statements: str) -> set[str]:
    """The top-level modules that a new interpreter holds after these statements."""
    code = f"import sys\n{statements}\nprint('modules:', *sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.rpartition("modules:")[2].split())


HEAVY = {"torch", "torchvision", "prefect", "pyarrow", "duckdb", "onnxruntime", "PIL", "numpy", "botocore", "fsspec"}


@pytest.mark.parametrize(
    ("statements", "never"),
    [
        pytest.param("from flows.__main__ import main; main(['--help'])", HEAVY, id="help"),
        pytest.param("from flows.__main__ import main; main(['predict', '--help'])", HEAVY, id="help of predict"),
        pytest.param("from flows.__main__ import main; main(['predcit'])", HEAVY, id="unknown command"),
        pytest.param("import flows.predict", {"torch", "torchvision", "skimage", "sklearn"}, id="flow"),
        pytest.param("import flows.backfill", {"torch", "torchvision", "skimage", "sklearn"}, id="backfill"),
        pytest.param("import flows.order", {"torch", "torchvision", "prefect"}, id="without Prefect"),
        pytest.param(
            "import tasks.slot, tasks.pipeline, models.runtime.predictor",
            {"torch", "torchvision", "prefect", "skimage", "sklearn"},
            id="slot",
        ),
        pytest.param("import tasks.query, tasks.inventory, tasks.verify", {"torch", "prefect"}, id="query"),
    ],
)
def test_what_is_never_imported(statements, never):
    assert not imported_by(statements) & never
