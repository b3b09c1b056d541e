"""The layers of the package hold: data flows one way, and every heavy library has its place."""

import ast
import itertools
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "psp_jax"

# From the top to the bottom: a module imports only from the rows below its own. A folder is one entry and may import
# within itself; nothing else imports from its own row.
ROWS: tuple[tuple[str, ...], ...] = (
    # commands
    (
        *("main", "prepare", "predict", "export", "import_weights", "score", "compare", "ablate"),
        *("check_data", "new_dataset", "plan", "replay", "doctor"),
    ),
    ("train", "evaluate"),
    ("loop",),
    ("api", "validation", "recorder", "ablation", "planning", "bundle", "health"),  # assembled pieces of the rows below
    ("sliding", "tiling", "report", "results", "deploy"),
    ("inference", "checkpoint", "precise_bn", "build", "run_record"),
    ("train_step", "class_weights", "goodput", "agreement", "integrity", "tally"),
    # Parts, independent of each other.
    (
        *("models", "data", "weights", "losses", "optimizer", "metrics", "progress", "workdir"),
        *("protocols", "cityscapes", "dotplot", "watchdog"),
    ),
    ("checks", "config_file", "resized_sum"),
    (  # leaves
        *("command", "config", "parallel", "processes", "classes", "visualize", "interpolation", "download"),
        *("region_losses", "ablation_text", "atomic", "walltime", "preemption", "compile_cache"),
    ),
    ("rendezvous",),
)
ROW_OF = {entry: row for row, entries in enumerate(ROWS) for entry in entries}
# Data workers are processes of their own: JAX in them costs memory, start-up time and, on accelerators, the device.
NO_JAX = ("data", "classes", "visualize", "progress", "protocols", "cityscapes", "report", "download")
NO_JAX += ("check_data", "new_dataset", "walltime", "goodput")
JAX_LIBRARIES = {"jax", "jaxlib", "flax", "optax", "orbax"}
MAX_FILE_LINES, MAX_FUNCTION_LINES = 300, 60
TABLES = {(Path("psp_jax/config.py"), "defaults")}  # functions that are lists of values without logic: any length

MODULES = sorted(path.relative_to(ROOT) for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
SOURCES = sorted(
    path.relative_to(ROOT) for folder in ("psp_jax", "configs", "tests") for path in (ROOT / folder).rglob("*.py")
)


def entry(module: str) -> str:
    """psp_jax.data.pipeline -> data."""
    return module.split(".")[1]


def dotted(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, known: set[str]) -> set[str]:
    """Every module that a file imports, at the top or inside a function, by its full dotted name."""
    package = ".".join(path.parts[:-1])
    found = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parent = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parent, *([node.module] if node.module else [])])
            names = {f"{base}.{alias.name}" for alias in node.names}
            # `from psp_jax import classes` imports a module, `from psp_jax import __version__` does not.
            found |= (names & known) or {base}
            found |= {base} if names - known and base != "psp_jax" else set()
    return found


KNOWN = {dotted(path) for path in MODULES}
IMPORTS = {dotted(path): imports(path, KNOWN) for path in MODULES}
OURS = {module: {name for name in names if name.startswith("psp_jax.")} for module, names in IMPORTS.items()}


def reachable(module: str) -> set[str]:
    """The module and all modules of the package that it leads to."""
    seen, todo = set(), [module]
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo += OURS.get(name, ())
    return seen


def test_imports_are_read_in_every_form(tmp_path, monkeypatch):
    folder = tmp_path / "psp_jax" / "data"
    folder.mkdir(parents=True)
    (folder / "x.py").write_text(
        "import psp_jax.losses\nfrom psp_jax import classes, __version__\nfrom . import y\nfrom ..train import go\n"
        "def f():\n    from orbax import checkpoint\n"
    )
    monkeypatch.setattr("test_layers.ROOT", tmp_path)
    known = {"psp_jax.classes", "psp_jax.losses", "psp_jax.train", "psp_jax.data.y"}
    assert imports(Path("psp_jax/data/x.py"), known) == known | {"orbax"}


@pytest.mark.parametrize("module", sorted(KNOWN))
def test_module_imports_only_from_rows_below(module):
    own = entry(module)
    assert own in ROW_OF, f"{module} has no row: add it to ROWS, at the lowest row that its imports allow."
    for name in sorted(OURS[module]):
        other = entry(name)
        assert other == own or ROW_OF[other] > ROW_OF[own], f"{module} imports {name}, which is not in a row below it."


def test_data_side_never_leads_to_jax():
    for module in sorted(KNOWN):
        if entry(module) in NO_JAX:
            for name in sorted(reachable(module)):
                heavy = {imported.split(".")[0] for imported in IMPORTS[name]} & JAX_LIBRARIES
                assert not heavy, f"{module} leads to {name}, which imports {heavy}."


def test_only_checkpoint_imports_orbax():
    users = {module for module, names in IMPORTS.items() if any(name.split(".")[0] == "orbax" for name in names)}
    assert users <= {"psp_jax.checkpoint"}


def test_nothing_imports_tensorflow():
    for module, name in itertools.chain.from_iterable(((m, n) for n in names) for m, names in IMPORTS.items()):
        assert name.split(".")[0] not in ("tensorflow", "clu"), f"{module} imports {name}, which needs TensorFlow."


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_files_and_functions_are_short(path):
    text = (ROOT / path).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_FILE_LINES, f"{path} is too long: split it by concept."
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (path, node.name) not in TABLES:
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= MAX_FUNCTION_LINES, f"{path}:{node.lineno} {node.name} has {lines} lines: split it."
