"""Rules of the code base that a reader may rely on."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "rho"
FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
CORE = ("errors", "runs", "store", "objective", "selection", "linear_loss")
each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))


def module_name(path: Path) -> str:
    return ".".join(("rho", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


# The one shift


def is_shift(index: ast.expr) -> bool:
    """`1:` or `:-1`."""
    if not isinstance(index, ast.Slice) or index.step is not None:
        return False
    lower, upper = (part and ast.unparse(part) for part in (index.lower, index.upper))
    return (lower, upper) in (("1", None), (None, "-1"))


def shifts(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Subscript)
            and isinstance(node.slice, ast.Tuple)
            and any(map(is_shift, node.slice.elts))
        ):
            found.append(ast.unparse(node))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("roll", "narrow"):
            found.append(ast.unparse(node))
    return found


def test_the_shift_rule_sees_what_it_forbids():
    for code in ("x[:, 1:]", "x[:, :-1]", "x[..., 1:]", "x[..., :-1, :]", "x.roll(1, -1)", "torch.roll(x, -1)"):
        assert shifts(ast.parse(code)), code
    for code in ("x[1:]", "x[:, 0]", "x[:, :n]", "x[:, ::2]", "lines[:-1]"):
        assert not shifts(ast.parse(code)), code


def test_tokens_are_shifted_in_one_place_only():
    found = {module_name(path): shifts(tree) for path, tree in TREES.items() if shifts(tree)}
    assert found == {"rho.objective": ["states_BTX[:, :-1]", "labels_BT[:, 1:]"]}


# Imports


def imports(tree: ast.Module, *, nested: bool) -> set[str]:
    """Modules that a file imports; `nested` also counts imports inside functions."""
    found = set()
    for node in ast.walk(tree) if nested else tree.body:
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            names = {module_name(path) for path in FILES}
            inner = {f"{node.module}.{name.name}" for name in node.names}
            found |= (inner & names) or {str(node.module)}
    return found


def test_objective_is_one_screen_of_torch():
    path = PACKAGE / "objective.py"
    assert imports(TREES[path], nested=True) == {"__future__", "torch", "torch.nn.functional"}
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 150


def test_the_core_names_only_light_packages():
    allowed = {"torch", "numpy", "pyarrow", "filelock", "rho", *sys.stdlib_module_names}
    for name in CORE:
        outside = {found.split(".")[0] for found in imports(TREES[PACKAGE / f"{name}.py"], nested=True)} - allowed
        assert not outside, f"{name}.py imports {outside}"


def loaded_by(statement: str, names: list[str]) -> list[str]:
    """Which of some packages a fresh Python has loaded after a statement."""
    code = f"{statement}\nimport sys\nprint(*(name for name in {names} if name in sys.modules))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def test_importing_the_core_loads_no_heavy_package():
    heavy = [
        "transformers",
        "tokenizers",
        "datasets",
        "accelerate",
        "rich",
        "pydantic",
        "typer",
        "matplotlib",
        "jinja2",
    ]
    assert loaded_by(f"import {', '.join(f'rho.{name}' for name in CORE)}", [*heavy, "torch"]) == ["torch"]


def test_the_command_line_loads_no_heavy_package_before_it_is_needed():
    assert loaded_by("import rho.cli", ["torch", "transformers", "pyarrow", "typer"]) == ["typer"]


def test_modules_import_each_other_in_one_direction():
    graph = {module_name(path): imports(tree, nested=False) for path, tree in TREES.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"import cycle: {' -> '.join((*trail, name))}"
        if name not in done:
            for inner in graph[name] & graph.keys() - {name}:
                visit(inner, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


# Safety and size


def test_nothing_that_runs_code_from_a_file_is_used():
    forbidden = re.compile(
        r"\bpickle\b|torch\.load\(|yaml\.load\(|\beval\(\S|\bexec\(|shell=True|allow_pickle=True|os\.system"
    )
    for path in FILES:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            assert not forbidden.search(line.replace(".eval()", "")), f"{path}:{number}: {line.strip()}"


@each_file
def test_every_public_name_says_what_it_is(path):
    tree = TREES[path]
    if path.name != "__init__.py" or tree.body:
        assert ast.get_docstring(tree), "the module"
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name
            for inner in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_"):
                    assert ast.get_docstring(inner), f"{node.name}.{inner.name}"


@each_file
def test_files_and_functions_stay_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 450
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.FunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            assert lines <= 70, f"{node.name}: {lines} lines"


def test_no_file_names_a_place_on_somebodys_machine():
    kinds = (".py", ".md", ".yaml", ".yml", ".toml", ".txt", ".j2", ".sh")
    places = [ROOT / name for name in ("README.md", "Makefile", "pyproject.toml", "constraints.txt", ".ci/run")]
    for folder in ("src", "docs", "examples", "recipes", "benchmarks"):
        places += [path for path in (ROOT / folder).rglob("*") if path.suffix in kinds]
    for path in filter(Path.is_file, places):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            assert not re.search(r"(?<![\w.])/(work|root|home)/", line), f"{path}:{number}: {line.strip()}"


def test_the_numbers_of_the_readme_are_those_of_the_results():
    readme, results = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/results.md"))
    said = readme.split("## What to expect")[1].split("\n## ")[0]
    numbers = re.findall(r"\d+\.\d+|\d+(?= s )", said)
    assert len(numbers) > 5
    assert [number for number in numbers if number not in results] == []
