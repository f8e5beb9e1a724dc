"""The rooms of the package: imports go down, from a room to one on a lower floor."""

import ast
from pathlib import Path

from rae_jax.config import checks

PACKAGE = Path(__file__).parents[1] / "rae_jax"

# From the roof down; rooms of one floor do not know each other.
FLOORS = (
    ("doors",),
    ("cli",),
    ("ui", "profiling"),
    ("inference",),
    ("build",),
    ("training", "weights", "data", "config"),
    ("models", "diffusion"),
    ("runtime",),
    ("errors",),
)
DOORS = ("__init__", "main", "convert", "pack_latents", "report", "api")

_FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def _room(path):
    folder, *rest = path.relative_to(PACKAGE).parts
    if rest:
        return folder
    return "errors" if path.stem == "errors" else "doors"


def _arrows():
    """(file, file that it imports) of all files of the package, imports inside of functions too."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            yield from ((path, file) for places in _imported(node) if (file := _file(places)))


def _imported(node):
    """Yield, for each name that a statement imports, the modules that it may be."""
    match node:
        case ast.Import():
            yield from ((alias.name,) for alias in node.names)
        case ast.ImportFrom():
            assert not node.level, "a relative import"
            yield from ((f"{node.module}.{alias.name}", node.module) for alias in node.names)


def _file(places):
    """The file of the first module that is one of the package; None for other packages."""
    paths = [PACKAGE.parent.joinpath(*place.split(".")) for place in places if place.split(".")[0] == PACKAGE.name]
    files = (file for path in paths for file in (path.with_suffix(".py"), path / "__init__.py"))
    return next((file for file in files if file.exists()), None)


def test_imports_go_down():
    arrows = {(source, target) for source, target in _arrows() if _room(source) != _room(target)}
    upward = {
        tuple(str(path.relative_to(PACKAGE)) for path in arrow)
        for arrow in arrows
        if _FLOOR[_room(arrow[0])] >= _FLOOR[_room(arrow[1])]
    }
    assert len(arrows) > 100 and not upward


def _reads_of_choices(path):
    """Yield the lines where a file compares a key of the config that has choices, or matches on it."""
    keys = {key.split(".")[-1] for table in (checks.CHOICES, checks.TRAIN_CHOICES) for key in table}

    def is_choice(node):
        return isinstance(node, ast.Attribute) and node.attr in keys

    def is_name(node):
        if isinstance(node, (ast.Tuple, ast.List, ast.Set)):
            return any(map(is_name, node.elts))
        return isinstance(node, ast.Constant) and isinstance(node.value, str)

    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Match) and is_choice(node.subject):
            yield node.lineno
        if isinstance(node, ast.Compare):
            sides = (node.left, *node.comparators)
            if any(map(is_choice, sides)) and any(map(is_name, sides)):
                yield node.lineno


def test_only_build_knows_the_names_of_the_config():
    found = {room: set() for room in _FLOOR}
    for path in sorted(PACKAGE.rglob("*.py")):
        found[_room(path)] |= {f"{path.relative_to(PACKAGE)}:{line}" for line in _reads_of_choices(path)}
    assert len(found.pop("build")) > 20 and found.pop("config")
    assert not set().union(*found.values())


def test_nothing_below_build_sees_the_config():
    below = [room for room in _FLOOR if _FLOOR[room] > _FLOOR["build"] and room != "config"]
    for path in sorted(PACKAGE.rglob("*.py")):
        if _room(path) in below:
            names = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
            assert "config" not in names and "ConfigDict" not in names, path


def test_the_root_has_doors_alone():
    assert {path.stem for path in PACKAGE.glob("*.py")} == {*DOORS, "errors"}


def test_files_and_functions_are_read_in_one_sitting():
    for folder in ("rae_jax", "configs", "launch", "tests"):
        for path in sorted((PACKAGE.parent / folder).rglob("*.py")):
            text = path.read_text()
            assert text.count("\n") <= 320, path
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.FunctionDef):
                    assert node.end_lineno - node.lineno < 70, (path, node.name)
