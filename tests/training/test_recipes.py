"""Recipes are valid, their headers agree with their settings, and they build the paper's encoders."""

import re
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file

from modeling_amorlip import AmorLIPConfig, AmorLIPModel
from tests.helpers.checkout import ROOT
from training.config import build, parse_config
from training.objectives import OBJECTIVES


RECIPES = sorted((ROOT / "training/recipes").glob("*.yaml"))
PARAMETERS = {"cc3m_rn50": (38.32, 63.17), "cc12m_vit_b32": (87.46, 63.17), "datacomp_vit_b16": (85.80, 63.17)}
"""Millions of parameters of the image and text encoders as OpenAI's models have them, without ViT's projections."""
PROCESSES = {"cc3m_rn50": 1, "cc12m_vit_b32": 1, "datacomp_vit_b16": 8}
"""Processes that the numbers of steps in the headers are for."""


def parse_recipe(name):
    return parse_config(["--config", str(ROOT / f"training/recipes/{name}.yaml")])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_valid(path):
    config = parse_recipe(path.stem)
    build(OBJECTIVES[config.objective].Arguments, config.objective_args, "objective_args.")
    assert path.read_text(encoding="utf-8").startswith("# ")


@pytest.mark.parametrize("name", PARAMETERS)
def test_recipe_builds_the_papers_encoders(name):
    config = parse_recipe(name)
    model_config = AmorLIPConfig(
        vision_config=config.vision_config,
        text_config={**config.text_config, "vocab_size": 49408},
        amortizer_config=config.amortizer_config,
        projection_dim=config.projection_dim,
    )
    with torch.device("meta"):
        model = AmorLIPModel(model_config)
    sizes = [sum(p.numel() for p in encoder.parameters()) / 1e6 for encoder in (model.vision_model, model.text_model)]
    assert sizes == pytest.approx(PARAMETERS[name], abs=0.02)


@pytest.mark.parametrize("name", PROCESSES)
def test_header_gives_the_number_of_steps(name):
    config = parse_recipe(name)
    header = (ROOT / f"training/recipes/{name}.yaml").read_text(encoding="utf-8")
    (steps,) = re.findall(r"([\d,]+) steps\.", header)
    pairs = re.findall(r"([\d,]+) pairs,", header)
    samples = config.samples_per_epoch or int(pairs[0].replace(",", ""))
    batch_size = config.per_device_train_batch_size * PROCESSES[name]
    total = samples // batch_size * config.num_train_epochs
    assert total == pytest.approx(int(steps.replace(",", "")), rel=1e-3)
    assert config.warmup_steps < total


@pytest.mark.parametrize(
    "file", sorted((ROOT / "training/accelerate_configs").glob("*.yaml")), ids=lambda p: Path(p).stem
)
def test_accelerate_reads_its_configurations(file):
    config = load_config_from_file(str(file))
    assert config.distributed_type.value == ("FSDP" if file.stem == "fsdp2" else "MULTI_GPU")
    assert config.num_processes % config.num_machines == 0
