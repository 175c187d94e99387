"""Evaluation at full size on 1, 2 and 4 processes; `test_runner.py` has the small form."""

import datasets
import numpy as np
import pytest
from PIL import Image

from tests.helpers.checkout import run
from tests.helpers.models import save_model
from tests.helpers.tasks import encoded, read_json, write_classification, write_task_shards


SAMPLES, INSTANCES, IMAGES = 5_000, 1_000, 500


def write_tasks(folder):
    """Write a task of each kind: 5,000 samples in 2 and 5 shards, and 1,000 instances of 5 images in parquet."""
    generator = np.random.default_rng(0)
    images = [Image.fromarray(generator.integers(0, 255, (32, 32, 3), np.uint8)) for _ in range(IMAGES)]
    files = [encoded(image) for image in images]
    names = [f"class {number}" for number in range(50)]
    repeated = [images[i % IMAGES] for i in range(SAMPLES)]
    write_classification(folder / "wds_classes", repeated, [i % 50 for i in range(SAMPLES)], names)
    captions = [[("png", files[i % IMAGES]), ("txt", f"a {i}\nno {7 * i}".encode())] for i in range(SAMPLES)]
    write_task_shards(folder / "wds_captions", captions, shards=5)
    rows = [
        {
            "cue": f"cue {i}",
            "candidates": list("01234"),
            "associations": ["1", "3"],
            "candidates_images": [{"bytes": files[(5 * i + j) % IMAGES]} for j in range(5)],
        }
        for i in range(INSTANCES)
    ]
    (folder / "winogavil").mkdir()
    table = datasets.Dataset.from_list(rows).cast_column("candidates_images", [datasets.Image()])
    table.to_parquet(folder / "winogavil/test.parquet")
    (folder / "tasks.yaml").write_text(
        "classes: {repositories: [x/wds_classes]}\n"
        "captions: {repositories: [x/wds_captions], kind: retrieval, main_metric: mean_recall@1}\n"
        "cues: {repositories: [x/winogavil], kind: winogavil, main_metric: jaccard_score}\n"
    )
    return folder / "tasks.yaml"


@pytest.mark.slow
@pytest.mark.e2e
def test_results_are_identical_on_one_two_and_four_processes(tmp_path):
    tasks = write_tasks(tmp_path)
    model = save_model(tmp_path / "model")
    results = []
    for launch in (None, 2, 4):
        output = tmp_path / f"{launch}.json"
        options = ["--tasks", tasks, "--data_dir", tmp_path, "--output", output, "--bootstrap", "5"]
        options += ["--scoring", "exact", "amortized", "sinkhorn", "--num_workers", "1" if launch == 2 else "0"]
        result = run("eval/run.py", "--model", model, *options, launch=launch, timeout=1500)
        assert result.returncode == 0, result.stderr
        results.append(read_json(output)["tasks"])
    assert [result["num_samples"] for result in results[0].values()] == [SAMPLES, SAMPLES, INSTANCES]
    assert results[0] == results[1] == results[2]
