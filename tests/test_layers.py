"""The rooms of the package: imports go down, from a room to one on a lower floor."""

import ast
from pathlib import Path

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
ROOMS = {  # modules that are not in a folder of their room yet
    "errors": ("errors",),
    "doors": DOORS,
}

_ROOM = {module: room for room, modules in ROOMS.items() for module in modules}
_FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def _room(path):
    folder, *rest = path.relative_to(PACKAGE).parts
    return folder if rest else _ROOM[path.stem]


def _arrows():
    """(file, file that it imports) of all files of the package, imports inside of functions too."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == PACKAGE.name:
                for name in node.names:
                    places = (f"{node.module}.{name.name}", node.module)
                    files = (PACKAGE.parent.joinpath(*place.split(".")).with_suffix(".py") for place in places)
                    yield from ((path, file) for file in files if file.exists())


def test_imports_go_down():
    arrows = {(source, target) for source, target in _arrows() if _room(source) != _room(target)}
    upward = {
        tuple(str(path.relative_to(PACKAGE)) for path in arrow)
        for arrow in arrows
        if _FLOOR[_room(arrow[0])] >= _FLOOR[_room(arrow[1])]
    }
    assert len(arrows) > 100 and not upward
