"""The layers of the code base, read from its imports: `modeling_amorlip` <- `eval` <- `training`."""

import ast
import sys
from pathlib import Path

import pytest

from tests.helpers.checkout import ROOT


LAYERS = {"modeling_amorlip": 0, "eval": 1, "training": 2}
TRAVELING = {
    "configuration_amorlip",
    "modeling_amorlip",
    "encoders_amorlip",
    "resnet_amorlip",
    "amortizer_amorlip",
    "pipeline_amorlip",
}
SCRIPT_FOLDERS = sorted({path.parent for layer in LAYERS for path in (ROOT / layer).rglob("*.py")})


def imported_modules(path: Path) -> set[str]:
    """Return the absolute names of all modules that a file imports, wherever in it."""
    package = path.relative_to(ROOT).parent.parts
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.parametrize("layer", LAYERS)
def test_no_import_points_up(layer):
    files = sorted((ROOT / layer).rglob("*.py"))
    assert files
    allowed = {name for name, level in LAYERS.items() if level <= LAYERS[layer]}
    for path in files:
        layers = {name.split(".")[0] for name in imported_modules(path)} & {*LAYERS, "tests"}
        assert layers <= allowed, f"{path.relative_to(ROOT)} imports {sorted(layers - allowed)}"


def test_imports_are_found_in_every_form(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / "modeling_amorlip/module.py"
    path.parent.mkdir()
    path.write_text(
        "from . import a\nfrom .b import c\n\n\ndef late():\n    import eval.tasks\n    from training import d\n"
    )
    names = imported_modules(path)
    assert {"modeling_amorlip.a", "modeling_amorlip.b", "eval.tasks", "training.d"} <= names


def test_published_modules_import_only_each_other():
    """A saved model carries its modules; Transformers copies what they import relatively."""
    for name in TRAVELING:
        modules = imported_modules(ROOT / f"modeling_amorlip/{name}.py")
        siblings = {module.split(".")[1] for module in modules if module.startswith("modeling_amorlip.")}
        assert siblings <= TRAVELING, f"{name}.py imports {sorted(siblings - TRAVELING)}"


@pytest.mark.parametrize("folder", SCRIPT_FOLDERS, ids=lambda folder: folder.relative_to(ROOT).as_posix())
def test_no_module_hides_a_library(folder):
    """A script's own folder is on `sys.path`, so a module there would be imported in the place of a library."""
    libraries = {*sys.stdlib_module_names, "datasets", "evaluate", "accelerate", "transformers", "torch", "webdataset"}
    scripts = [path for path in folder.glob("*.py") if "__main__" in path.read_text(encoding="utf-8")]
    used = {name.split(".")[0] for path in scripts for name in imported_modules(path)}
    assert not {path.stem for path in folder.glob("*.py")} & used & libraries


def test_files_and_functions_are_short():
    for layer in LAYERS:
        for path in sorted((ROOT / layer).rglob("*.py")):
            text = path.read_text(encoding="utf-8")
            lines = text.count("\n")
            assert lines <= 350, f"{path.relative_to(ROOT)} has {lines} lines"
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    length = node.end_lineno - node.lineno + 1
                    assert length <= 50, f"{path.relative_to(ROOT)}: {node.name} has {length} lines"
            assert "noqa: E402" not in text and "fmt: skip" not in text and "fmt: off" not in text
