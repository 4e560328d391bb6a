"""The notebooks: made from their twins, set up alike anywhere, and running from top to bottom."""

import ast
import importlib
import json
import os
import subprocess
import sys

import jupytext
import pytest

from tests.conftest import ROOT

TWINS = sorted((ROOT / "colab").glob("*.py"))
NAMES = [twin.stem for twin in TWINS]
# Programs this small take longer to compile than to run.
HASTE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def cells(twin) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in jupytext.read(twin).cells]


def setup(twin) -> str:
    return next(source for kind, source in cells(twin) if kind == "code")


def run(source: str, folder, **environment) -> subprocess.CompletedProcess:
    line = [sys.executable, "-c", source]
    return subprocess.run(line, cwd=folder, env=os.environ | environment, capture_output=True, text=True)


def test_there_are_three():
    assert NAMES == ["01_quickstart", "02_own_model", "03_theory"]


@pytest.mark.parametrize("twin", TWINS, ids=NAMES)
def test_a_notebook_is_what_jupytext_makes_of_its_twin(twin):
    path = twin.with_suffix(".ipynb")
    told = json.loads(path.read_bytes())["cells"]
    found = [(cell["cell_type"], "".join(cell["source"])) for cell in told]
    assert found == cells(twin), "jupytext --to ipynb --execute colab/*.py"
    assert path.stat().st_size < 300_000
    pictures = [output for cell in told for output in cell.get("outputs", ()) if "image/png" in output.get("data", ())]
    assert len(pictures) == sum(source.count("plt.show()") for _, source in found)


@pytest.mark.parametrize("twin", TWINS, ids=NAMES)
def test_what_a_notebook_takes_from_the_package_is_there(twin):
    taken = {}
    for node in ast.walk(ast.parse(twin.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] in ("bibau_jax", "configs"):
            for alias in node.names:
                taken[alias.name] = _found(node.module, alias.name)
    assert len(taken) > 4
    for node in ast.walk(ast.parse(twin.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in taken:
            assert hasattr(taken[node.value.id], node.attr), f"{node.value.id}.{node.attr}"


def _found(module: str, name: str):
    home = importlib.import_module(module)
    return getattr(home, name) if hasattr(home, name) else importlib.import_module(f"{module}.{name}")


# --- the first cell


def test_every_notebook_is_set_up_alike():
    assert len({setup(twin) for twin in TWINS}) == 1


def test_in_a_checkout_nothing_is_cloned_or_installed():
    refused = "import subprocess\nsubprocess.run = None\n"
    done = run(f"{refused}{setup(TWINS[0])}\nprint(os.getcwd(), sys.path[0])", ROOT / "colab")
    assert done.stdout.split() == [str(ROOT), str(ROOT)], done.stderr


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_anywhere_else_the_repository_is_cloned_once(tmp_path):
    source = setup(TWINS[0]).replace("https://github.com/bibau-jax/bibau_jax", ROOT.as_uri())
    for _ in range(2):
        done = run(f"{source}\nprint(os.getcwd())", tmp_path)
        assert done.stdout.strip() == str(tmp_path / "bibau_jax"), done.stderr
    assert (tmp_path / "bibau_jax" / "configs" / "digits.py").exists()


def test_a_package_that_changed_under_a_running_python_asks_for_a_restart():
    done = run(f"import jax\njax.__version__ = '0.7.2'\n{setup(TWINS[0])}", ROOT)
    assert done.returncode == 1 and done.stderr.strip() == (
        "An older jax is still loaded: restart the session and run all cells again."
    )


# --- all cells


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("compiled"))


def run_through(twin, folder, **environment) -> None:
    shared = {"MPLBACKEND": "Agg", "TMPDIR": str(folder), "PYTHONWARNINGS": "error::DeprecationWarning:__main__"}
    environment = os.environ | shared | environment
    done = subprocess.run([sys.executable, str(twin)], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


FIRST, *FURTHER = TWINS  # the further ones take half a minute each even so


@pytest.mark.parametrize("twin", [FIRST, *(pytest.param(twin, marks=pytest.mark.slow) for twin in FURTHER)], ids=NAMES)
def test_a_notebook_runs_top_to_bottom_at_a_fraction_of_its_size(twin, compiled, tmp_path):
    # One device: where tests share the cores, devices wait for each other in vain.
    quick = {"BIBAU_QUICK": "1", "JAX_NUM_CPU_DEVICES": "1", "XLA_FLAGS": HASTE}
    run_through(twin, tmp_path, JAX_COMPILATION_CACHE_DIR=compiled, **quick)


@pytest.mark.slow
@pytest.mark.parametrize("twin", TWINS, ids=NAMES)
def test_a_notebook_runs_top_to_bottom(twin, compiled, tmp_path):
    run_through(twin, tmp_path, JAX_COMPILATION_CACHE_DIR=compiled)
