"""Transformers' own tests, from the source distribution of the installed version, on our classes.

The adapters and the list of what does not apply are in tests/helpers/transformers_suite/. Needs a package index.
"""

import importlib
import os
import subprocess
import sys
import tarfile
import unittest

import pytest
import transformers

from tests.helpers.checkout import ROOT


pytestmark = pytest.mark.e2e
HELPERS = ROOT / "tests/helpers/transformers_suite"
FAST_CASES = (
    "clip_AmorLIPModel",
    "resnet_clip_AmorLIPForImageClassification",
)
FAST_TESTS = (
    "test_can_be_initialized_on_meta",
    "test_correct_missing_keys",
    "test_gradient_checkpointing_enable_disable",
    "test_model_get_set_embeddings",
    "test_resize_tokens_embeddings",
    "test_save_load",
    "test_training",
)


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    """Return the folder of Transformers' tests and one with a package that they need."""
    folder = tmp_path_factory.mktemp("transformers")
    pip = [sys.executable, "-m", "pip", "--quiet"]
    release = f"transformers=={transformers.__version__}"
    options = ["--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--dest", str(folder)]
    if subprocess.run([*pip, "download", *options, release]).returncode != 0:
        pytest.skip("no package index has the source distribution")
    subprocess.run([*pip, "install", "--target", str(folder / "site"), "parameterized"], check=True)
    (archive,) = folder.glob("transformers-*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz") / "tests", folder / "site"


@pytest.mark.interop
def test_transformers_own_tests_pass(suite):
    tests, site = suite
    variables = {"TRANSFORMERS_TESTS": str(tests), "TRANSFORMERS_VERBOSITY": "error", "PYTHONPATH": str(site)}
    files = [str(HELPERS / f"{name}.py") for name in ("models", "configurations", "processors", "pipelines")]
    command = [sys.executable, "-W", "ignore", "-m", "pytest", "-q", "--tb=short", "-p", "no:warnings", *files]
    result = subprocess.run(command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-10_000:]


def test_fast_subset_of_transformers_own_tests_passes(suite, monkeypatch):
    tests, site = suite
    monkeypatch.setenv("TRANSFORMERS_TESTS", str(tests))
    monkeypatch.syspath_prepend(str(site))
    models = importlib.import_module("tests.helpers.transformers_suite.models")
    cases = [getattr(models, f"Test_{case}")(test) for case in FAST_CASES for test in FAST_TESTS]
    result = unittest.TestResult()
    unittest.TestSuite(cases).run(result)
    assert result.testsRun == len(cases) and result.wasSuccessful(), [
        text for _, text in result.errors + result.failures
    ]


def test_few_tests_are_left_out(suite, monkeypatch):
    """And none of a cast, a gradient, an embedding, saving or loading."""
    tests, site = suite
    monkeypatch.setenv("TRANSFORMERS_TESTS", str(tests))
    monkeypatch.syspath_prepend(str(site))
    models = importlib.import_module("tests.helpers.transformers_suite.models")
    names = {*models.INAPPLICABLE_TO_DUAL, *models.INAPPLICABLE_TO_RESNET}
    assert len(names) <= 40
    assert not [name for name in names for word in ("dtype", "fp32", "train", "embed", "save", "load") if word in name]
