"""Transformers' own tests, importable from the unpacked source distribution that TRANSFORMERS_TESTS names.

A source distribution holds the mixins (`tests/test_*.py`) without the folders beside them, which stand-ins replace.
"""

from __future__ import annotations

import importlib
import os
import sys
import types
from pathlib import Path


def _stand_in(name: str, **members: object) -> None:
    module = types.ModuleType(name)
    vars(module).update(members)
    sys.modules[name] = module


def load(name: str) -> types.ModuleType:
    """Import a module of Transformers' tests, such as `"test_modeling_common"`."""
    if "suite" not in sys.modules:
        Path(os.environ["TRANSFORMERS_TESTS"], "__init__.py").touch()  # which the tests of configurations import
        _stand_in("suite", __path__=[os.environ["TRANSFORMERS_TESTS"]])
        for package in ("exporters", "generation", "utils"):
            _stand_in(f"suite.{package}")
        _stand_in("suite.exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
        _stand_in("suite.generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))
        _stand_in("suite.utils.test_configuration_utils", config_common_kwargs={})
        _stand_in("fetch_hub_objects_for_ci", url_to_local_path=str)
    return importlib.import_module(f"suite.{name}")
