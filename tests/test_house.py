"""The rules of the house: who may import whom, how long code may be, what must not be called."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
ROOMS = ("decoding", "drafters", "data", "eval", "train")  # left never imports right
LONGEST_FILE, LONGEST_FUNCTION = 350, 60
FORBIDDEN = (
    r"torch\.load\(",
    r"\bimport pickle|from pickle|cloudpickle|\bdill\b|import joblib|joblib\.load",
    r"trust_remote_code\s*=\s*True",
    r"weights_only\s*=\s*False",
    r"allow_pickle\s*=\s*True",
    r"\beval\(|\bexec\(",
    r"shell\s*=\s*True|os\.system\(",
    r"yaml\.(unsafe_load|full_load|load)\(",
)

SOURCES = sorted(p for room in ROOMS for p in (ROOT / room).rglob("*.py"))
YAMLS = sorted([*(ROOT / "conf").rglob("*.yaml"), *(ROOT / "recipes").rglob("*.yaml")])


def imported(source: str) -> Iterator[str]:
    """Every module that a source imports, at its top or inside functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide which room is meant"
            yield node.module or ""
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant):
                yield str(first.value)


def to_the_right(room: str, source: str) -> list[str]:
    later = ROOMS[ROOMS.index(room) + 1 :]
    return [name for name in imported(source) if name.split(".")[0] in later]


def too_long(source: str) -> list[str]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    functions = [n for n in ast.walk(ast.parse(source)) if isinstance(n, kinds)]
    lengths = [(f.name, (f.end_lineno or 0) - f.lineno + 1) for f in functions]
    return [f"{name}: {n} lines" for name, n in lengths if n > LONGEST_FUNCTION]


def without_strings(source: str) -> str:
    """The code alone: docstrings and comments may speak of what code may not do."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node.value = ""
    return ast.unparse(tree)


def test_there_is_something_to_walk():
    rooms = {p.relative_to(ROOT).parts[0] for p in SOURCES}
    assert rooms == set(ROOMS)
    assert len(YAMLS) > 10


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_left(path: Path):
    room = path.relative_to(ROOT).parts[0]
    assert to_the_right(room, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_fit_on_a_few_screens(path: Path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LONGEST_FILE
    assert too_long(text) == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_unpickles_or_runs_foreign_code(path: Path):
    code = without_strings(path.read_text(encoding="utf-8"))
    code = re.sub(r"\.eval\(", ".evaluate(", code)  # nn.Module.eval
    assert [pattern for pattern in FORBIDDEN if re.search(pattern, code)] == []


@pytest.mark.parametrize("path", YAMLS, ids=lambda p: str(p.relative_to(ROOT)))
def test_yaml_is_a_mapping_and_a_recipe_begins_with_its_line_in_help(path: Path):
    text = path.read_text(encoding="utf-8")
    assert isinstance(yaml.safe_load(text), dict)
    if path.is_relative_to(ROOT / "recipes"):
        line = text.splitlines()[0]
        assert re.match(r"# \S.{20,}", line), "--help prints the first line of a recipe"
        from train.__main__ import help_text

        assert re.search(rf"^  {path.stem} +{re.escape(line[2:])}$", help_text(), re.MULTILINE)


def test_every_class_that_a_configuration_names_is_of_this_repository():
    from train.compose import find

    for path in YAMLS:
        for name in re.findall(r"_target_:\s*([^\s,}]+)", path.read_text(encoding="utf-8")):
            assert find(name, str(path)).__module__.split(".")[0] in ROOMS


@pytest.mark.parametrize(
    "bad",
    [
        "import train.plan",
        "def f():\n    from eval import bench",
        "from eval.bench import Bench as B",
        "import importlib\nimportlib.import_module('train.plan')",
    ],
)
def test_the_walk_finds_an_import_to_the_right(bad: str):
    assert to_the_right("data", bad)
    assert not to_the_right("train", bad)


def test_the_walk_finds_long_functions_and_forbidden_calls():
    body = "\n".join(f"    x{i} = {i}" for i in range(LONGEST_FUNCTION))
    assert too_long(f"def f():\n{body}")
    assert not too_long(f"def f():\n{body[: body.rindex(chr(10))]}")
    for bad in ("torch.load(f)", "import pickle", "m(trust_remote_code=True)", "eval(x)"):
        assert any(re.search(p, without_strings(bad)) for p in FORBIDDEN), bad
    assert not any(re.search(p, without_strings("'never torch.load('")) for p in FORBIDDEN)


def test_every_test_that_the_table_of_faults_names_is_there():
    """And those that it calls *soak* are the marked ones."""
    table = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_\w+)`", table))
    found: dict[str, bool] = {}
    for path in (ROOT / "tests").rglob("test_*.py"):
        source = path.read_text(encoding="utf-8")
        whole = "pytestmark = pytest.mark.soak" in source
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                marked = any(ast.unparse(d).endswith("mark.soak") for d in node.decorator_list)
                found[node.name] = whole or marked
    assert len(named) > 50
    assert named <= set(found)
    assert set(re.findall(r"\*soak\* `(test_\w+)`", table)) == {n for n in named if found[n]}
