"""Transformers' own tests of models and configurations, from the sdist of the installed version, on our classes."""

import os
import subprocess
import sys
import tarfile

import pytest
import transformers

from tests.helpers.checkout import ROOT


@pytest.mark.interop
def test_transformers_own_tests_pass(tmp_path):
    """Needs a package index. tests/helpers/transformers_suite.py lists what does not apply, with reasons."""
    pip = [sys.executable, "-m", "pip", "--quiet"]
    release = f"transformers=={transformers.__version__}"
    options = ["--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--dest", str(tmp_path)]
    subprocess.run([*pip, "download", *options, release], check=True)
    subprocess.run([*pip, "install", "--target", str(tmp_path / "site"), "parameterized"], check=True)
    (archive,) = tmp_path.glob("transformers-*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    suite = tmp_path / archive.name.removesuffix(".tar.gz") / "tests"
    (suite / "__init__.py").touch()
    environment = {
        **os.environ,
        "TRANSFORMERS_TESTS": str(suite),
        "TRANSFORMERS_VERBOSITY": "error",
        "PYTHONPATH": str(tmp_path / "site"),
    }
    command = [sys.executable, "-W", "ignore", "-m", "pytest", "-q", "--tb=short", "-p", "no:warnings"]
    result = subprocess.run(
        [*command, "tests/helpers/transformers_suite.py"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-10_000:]
