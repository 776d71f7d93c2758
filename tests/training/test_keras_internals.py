"""What the project uses of Keras beside its public interface exists, is as expected, and is all listed."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterable
from functools import cache
from importlib import import_module
from pathlib import Path

import keras
import pytest

from support.commands import ROOT
from train.training.step.keras_internals import PRIVATE, REPLACED, Member

NAMED_TUPLE = {"_replace", "_asdict", "_fields"}  # public in spite of their names
Sources = list[tuple[str, ast.Module]]  # of modules that import Keras: path and syntax tree


def find_owner(path: str) -> object:
    """The class or module; of keras.Variable an instance, whose attributes the class does not show."""
    if path == "keras.Variable":
        return keras.Variable(0.0)
    try:
        return import_module(path)
    except ModuleNotFoundError:
        module, _, name = path.rpartition(".")
        return getattr(import_module(module), name)


def find_problem(member: Member) -> str | None:
    """What is wrong with a member in the installed Keras, if anything."""
    name = f"{member.owner}.{member.name}"
    try:
        found = getattr(find_owner(member.owner), member.name)
    except (ImportError, AttributeError):
        return f"{name} does not exist"
    parameters = tuple(inspect.signature(found).parameters) if callable(found) and member.parameters else None
    if parameters != member.parameters:
        return f"{name} has the parameters {parameters}, not {member.parameters}"
    return None


@pytest.mark.parametrize("member", [*REPLACED, *PRIVATE], ids=lambda member: f"{member.owner}.{member.name}")
def test_installed_keras_has_the_member(member: Member):
    assert find_problem(member) is None
    assert member.reason.endswith(".")


class Moved:
    """A layer as another version of Keras might have it."""

    def call(self, inputs: object, training: bool = False) -> None: ...


@pytest.mark.parametrize(
    ("member", "problem"),
    [
        (
            ("Moved", "call", ("self", "inputs", "training", "mask")),
            "has the parameters ('self', 'inputs', 'training')",
        ),
        (("Moved", "_flatten_layers", ("self",)), "does not exist"),
        (("Gone", "call", ("self",)), "does not exist"),
    ],
)
def test_a_moved_member_is_named(member: tuple[str, str, tuple[str, ...]], problem: str):
    owner, name, parameters = member
    found = find_problem(Member(f"{__name__}.{owner}", name, parameters, ""))
    assert found
    assert found.startswith(f"{__name__}.{owner}.{name} {problem}")


# ------------------------------------------------------------------------------------------------- all is listed


def imports_keras(tree: ast.Module) -> bool:
    names = [name for node in ast.walk(tree) for name in imported_names(node)]
    return any(name.partition(".")[0] == "keras" for name in names)


def imported_names(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [f"{node.module}.{alias.name}" for alias in node.names] if isinstance(node, ast.ImportFrom) else []


@cache
def all_trees() -> list[tuple[str, ast.Module]]:
    return [(str(path), ast.parse(path.read_text())) for path in sorted(Path(ROOT, "train").rglob("*.py"))]


def keras_sources() -> Sources:
    return [(path, tree) for path, tree in all_trees() if imports_keras(tree)]


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def own_names(trees: Iterable[ast.Module]) -> set[str]:
    """Private names that these modules define: functions, methods, fields and attributes of self."""
    names = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
            names.add(node.attr)
    return {name for name in names if is_private(name)} | NAMED_TUPLE


def is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def foreign_private_names(sources: Sources) -> set[str]:
    """Private attributes that are not the project's own, and imports from `keras.src`.

    An object's own ones may be defined in another module, by a base class; those of other objects in the same one.
    """
    inherited = own_names(tree for _, tree in all_trees())
    names = set()
    for _, tree in sources:
        own = own_names([tree])
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and is_private(node.attr):
                names |= {node.attr} - (inherited if is_self(node.value) else own)
            names |= {name for name in imported_names(node) if name.startswith("keras.src")}
    return names


def replaced_names(sources: Sources) -> set[str]:
    """Attributes that are deleted, which is how a replaced method of an object is restored, or set by name."""
    names = set()
    for _, tree in sources:
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Del):
                names.add(node.attr)
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("setattr", "delattr"):
                names.add(ast.unparse(node))
    return names


def test_every_private_member_of_keras_is_listed():
    listed = {member.owner if member.owner.startswith("keras.src") else member.name for member in PRIVATE}
    assert foreign_private_names(keras_sources()) == listed


def test_every_replaced_member_of_keras_is_listed():
    assert replaced_names(keras_sources()) == {member.name for member in REPLACED}


def test_an_unlisted_member_is_noticed():
    source = "import keras\nfrom keras.src import ops\nsetattr(x, 'apply', x._lock)\nself._unknown\ndel x.train_step\n"
    sources = [("new.py", ast.parse(source))]
    assert foreign_private_names(sources) == {"_lock", "_unknown", "keras.src.ops"}
    assert replaced_names(sources) == {"setattr(x, 'apply', x._lock)", "train_step"}
