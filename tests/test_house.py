"""Who may know whom: nothing imports upwards, so that each room can be read without those above
it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PRODUCT = [
    path
    for path in sorted(ROOT.rglob("*.py"))
    if path.relative_to(ROOT).parts[0] not in ("tests", "runs", "evals")
    and ".venv" not in path.parts
]
ROOMS = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in PRODUCT}
MAY_IMPORT = {  # of the project
    "errors": set(),
    "grading": set(),
    "entropy": set(),
    "rollout": {"entropy"},
    "reward": {"grading"},
    "data": {"errors", "reward"},
    "engine": {"errors", "data", "entropy", "rollout", "reward"},
    "report": {"errors", "data", "engine", "reward"},
    "edge_grpo": ROOMS - {"results"},
    "eval": ROOMS - {"edge_grpo", "results"},
    "results": ROOMS,
    "examples": ROOMS - {"results"},
}


def imported(path: Path) -> set[str]:
    """The project's rooms that a file imports anywhere in it, its own among them."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            here = path.relative_to(ROOT).parts[: -node.level] if node.level else ()
            found.add(".".join([*here, node.module or ""]).strip("."))
    return {name.split(".")[0] for name in found} & ROOMS


@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_imports_upwards(path):
    room, others = path.relative_to(ROOT).parts[0].removesuffix(".py"), imported(path)
    assert "edge_grpo" not in others, "the method knows them all, and nobody knows it"
    assert others - {room} <= MAY_IMPORT[room]


def test_the_table_is_about_rooms_that_are_there():
    assert MAY_IMPORT.keys() == ROOMS
    assert imported(ROOT / "edge_grpo.py") >= {
        "engine",
        "data",
        "reward",
        "eval",
        "report",
    }
