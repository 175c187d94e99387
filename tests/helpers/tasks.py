"""Write tasks in the public layouts, and run eval/run.py in this process."""

from __future__ import annotations

import io
import json
import sys
import tarfile

import numpy as np


def write_classification(folder, images, labels, classes, templates=("a {c}.", "the {c}"), metadata=None, form="PNG"):
    samples = []
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        samples.append([(form.lower(), encoded(image, form)), ("cls", str(label).encode())])
        if metadata is not None:
            buffer = io.BytesIO()
            np.save(buffer, metadata[i])
            samples[-1].append(("npy", buffer.getvalue()))
    write_task_shards(folder, samples)
    (folder / "classnames.txt").write_text("\n".join(classes))
    (folder / "zeroshot_classification_templates.txt").write_text("\n".join(templates))


def add(tar, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def encoded(image, form="PNG"):
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, form)
    return buffer.getvalue()


def write_task_shards(folder, samples, shards=2, split="test"):
    """`samples` are lists of (extension, content)."""
    (folder / split).mkdir(parents=True)
    for shard in range(shards):
        with tarfile.open(folder / f"{split}/{shard}.tar", "w") as tar:
            for k, members in enumerate(samples[shard::shards]):
                for extension, content in members:
                    add(tar, f"s{shard}_{k:05d}.{extension}", content)
    (folder / f"{split}/nshards.txt").write_text(str(shards))


def run_main(monkeypatch, module, *argv) -> int:
    """Run a command line's `main` in this process and return its exit status."""
    monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, argv)])
    return module.main()


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))
