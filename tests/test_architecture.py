"""The packages of `train/` import each other as docs/architecture.md says."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import pytest

from support.commands import ROOT

PAGE = (ROOT / "docs/architecture.md").read_text()
COMMANDS = "commands"
CROSSING = {("__main__", "resume"), ("__main__", "sweep")}  # it starts every command
WITHOUT_CONFIG = ("data", "models", "training", "formats")
READS_DEFAULTS = {("train.models", "train.config.schema")}  # for options of `build` that are left out
WHOLE_CONFIG = ("config", "run", "sweep", "__main__")  # and the commands: who may take the whole config
# The places of `Any`, each with its reason beside it.
UNTYPED = {"train.cli.fields": 1, "train.config.schema": 1, "train.storage.json_types": 1, "train.training.tensors": 1}
Sources = dict[str, str]  # of every module, by its dotted name


@cache
def layers() -> list[list[str]]:
    """Packages by layer, the topmost first."""
    [block] = re.findall(r"^```text\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    return [line.split(" | ") for line in block.splitlines()]


@cache
def library_walls() -> dict[str, list[str]]:
    """For each library the modules that may import it."""
    rows = re.findall(r"^\| `(\w+)` \| (`train\..*`) \|$", PAGE, re.MULTILINE)
    return {library: re.findall(r"`([\w.]+)`", modules) for library, modules in rows}


def read_sources(root: Path) -> Sources:
    sources = {}
    for path in sorted((root / "train").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        sources[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text()
    return sources


@cache
def names_of(source: str) -> list[tuple[str, str]]:
    """What a source imports, at any depth: (module, name out of it or ""); a relative import as module `.`."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [("." if node.level else str(node.module), alias.name) for alias in node.names]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            names += [(name, "") for name in re.findall(r"train\.[\w.]*\w", ast.unparse(node.args[0]))]
    return names


def imports_of(source: str, modules: Iterable[str]) -> set[str]:
    """The modules that a source imports."""
    return {f"{module}.{name}" if f"{module}.{name}" in modules else module for module, name in names_of(source)}


def package_of(module: str) -> str:
    """`train.data.decode` -> `data`; a file at the top of train/ is its own name."""
    return module.split(".")[1] if module.count(".") else "train"


def is_command(package: str, sources: Sources) -> bool:
    return not any(module.startswith(f"train.{package}.") for module in sources) and package != "__main__"


def layer_of(package: str, sources: Sources) -> int:
    """Raises: ValueError for a package that the page does not list."""
    name = COMMANDS if is_command(package, sources) else package
    for number, layer in enumerate(layers()):
        if name in layer:
            return number
    raise ValueError(f"{package} is not listed in docs/architecture.md")


def violations(sources: Sources) -> list[str]:
    """Imports that the page does not allow, as `importer -> imported`."""
    forbidden = []
    for module, source in sources.items():
        for imported in imports_of(source, sources):
            if not is_allowed(module, imported, sources):
                forbidden.append(f"{module} -> {imported}")
    return forbidden


def takers_of_the_config(sources: Sources) -> list[str]:
    """The modules that import the class of the whole config, and may not."""
    takers = [module for module, source in sources.items() if ("train.config.schema", "Config") in names_of(source)]
    owners = {module: package_of(module) for module in takers}
    return [module for module, own in owners.items() if own not in WHOLE_CONFIG and not is_command(own, sources)]


def untyped_places(sources: Sources) -> dict[str, int]:
    """How often each module says `Any` in its code."""
    counts = {
        module: sum(getattr(node, "id", getattr(node, "attr", "")) == "Any" for node in ast.walk(ast.parse(source)))
        for module, source in sources.items()
    }
    return {module: count for module, count in counts.items() if count}


def is_allowed(module: str, imported: str, sources: Sources) -> bool:
    library = imported.split(".")[0]
    if not library:
        return False  # a relative import
    if library != "train":
        allowed = library_walls().get(library, [module])
        return any(module == name or module.startswith(f"{name}.") for name in allowed)
    own, other = package_of(module), package_of(imported)
    if own == other or (own, other) in CROSSING or module == "train":
        return True
    if own in WITHOUT_CONFIG and other == "config":
        return (module, imported) in READS_DEFAULTS
    return layer_of(own, sources) < layer_of(other, sources)


def cycles(sources: Sources) -> list[list[str]]:
    """Modules that import each other, directly or through others."""
    graph = {module: imports_of(source, sources) & set(sources) - {module} for module, source in sources.items()}
    while ends := [module for module, imported in graph.items() if not imported & set(graph)]:
        for module in ends:
            del graph[module]
    return [sorted(graph)] if graph else []


@pytest.fixture(scope="module")
def sources() -> Sources:
    return read_sources(ROOT)


def test_every_package_is_listed_once(sources: Sources):
    listed = [name for layer in layers() for name in layer]
    packages = {package_of(module) for module in sources} - {"train"}
    expected = {COMMANDS if is_command(package, sources) else package for package in packages}
    assert sorted(listed) == sorted(expected)
    table = re.findall(r"^\| `(\w+)` \| (?!`train)", PAGE, re.MULTILINE)
    assert sorted(table) == sorted(expected - {COMMANDS, "__main__"})


def test_imports_follow_the_layers(sources: Sources):
    assert violations(sources) == []


def test_no_two_files_import_each_other(sources: Sources):
    assert cycles(sources) == []


def test_only_runs_sweeps_and_commands_take_the_whole_config(sources: Sources):
    assert takers_of_the_config(sources) == []
    name = "train.runtime.setup"
    changed = sources | {name: f"{sources[name]}\nfrom train.config.schema import Config\n"}
    assert takers_of_the_config(changed) == [name]


def test_any_stands_in_the_listed_places_alone(sources: Sources):
    assert untyped_places(sources) == UNTYPED
    name = "train.run.factory"
    changed = sources | {name: f"{sources[name]}\ndef build(step: Any) -> None: ...\n"}
    assert untyped_places(changed) == UNTYPED | {name: 1}


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("train.config.schema", "from train import data"),
        ("train.config.schema", "from train.runtime import jax"),
        ("train.models.blocks", "from train.run import factory"),
        ("train.training.losses", "from train.sweep import search"),
        ("train.data.pipeline", "from train.models import blocks\nfrom train.training import losses"),
        ("train.data.pipeline", "from train.config.schema import Config"),
        ("train.models.vgg16", "from train.config import schema"),
        ("train.models", "from train.config import validation"),
        ("train.tracking.journal", "def write():\n    import train.training.losses"),
        ("train.tracking.journal", "from train.runtime import setup"),
        ("train.evaluation.metrics", "from train.data import decode"),
        ("train.export", "from train import evaluate"),
        ("train.export", "from train.sweep import search"),
        ("train.run.factory", "from train import cost"),
        ("train.runtime.setup", "importlib.import_module(f'train.run.{name}')"),
        ("train.training.loop", "import mlflow"),
        ("train.run.factory", "from hydra import compose"),
        ("train.config.schema", "import hydra.errors"),
        ("train.models.weights", "import tensorflow_datasets"),
        ("train.training.optimizers", "from . import losses"),
    ],
)
def test_an_import_that_is_not_allowed_is_found(sources: Sources, module: str, line: str):
    changed = sources | {module: f"{sources[module]}\n{line}\n"}
    assert violations(changed), line


def test_a_package_that_is_not_listed_is_refused(sources: Sources):
    changed = sources | {"train.helpers": "", "train.helpers.strings": "from train.storage import atomic"}
    with pytest.raises(ValueError, match="helpers is not listed"):
        violations(changed)


def test_files_that_import_each_other_are_found(sources: Sources):
    name = "train.data.fingerprint"
    changed = sources | {name: f"{sources[name]}\ndef late():\n    from train.data import dataset\n"}
    assert name in cycles(changed)[0]
    assert "train.data.dataset" in cycles(changed)[0]


PATH = r"(?<![\w/.])(?:train|tests|scripts|docs|conf|requirements)/[\w/-]+\.(?:py|json|ya?ml|md|sh|csv|lock|html|zip)\b"


def missing_paths(text: str) -> list[str]:
    """Files of this project that a text names and that do not exist."""
    return [path for path in re.findall(PATH, text) if not (ROOT / path).exists()]


def test_files_named_in_texts_exist():
    folders = [ROOT / name for name in ("train", "scripts", "docs", "conf")]
    pages = [ROOT / "README.md", ROOT / "Makefile", ROOT / "data/README.md", ROOT / "pyproject.toml"]
    pages += [path for folder in folders for kind in ("*.py", "*.md", "*.yaml", "*.sh") for path in folder.rglob(kind)]
    assert {str(path): missing for path in pages if (missing := missing_paths(path.read_text()))} == {}


def test_file_that_does_not_exist_is_found():
    assert missing_paths("see train/losses.py and docs/architecture.md") == ["train/losses.py"]
