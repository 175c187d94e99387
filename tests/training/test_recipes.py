"""Recipes say what they are meant to, and build the paper's models."""

from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from modeling_amorlip import AmorLIPConfig, AmorLIPModel
from tests.helpers.checkout import ROOT
from training.config import parse_config
from training.objectives import OBJECTIVES


RECIPES = sorted(set((ROOT / "training/recipes").glob("*.yaml")) - set((ROOT / "training/recipes").glob("study*")))
MILLIONS = {"cc3m_rn50": (38.32, 63.17), "cc12m_vit_b32": (87.46, 63.17), "datacomp_vit_b16": (85.80, 63.17)}
"""Parameters of the encoders as OpenAI's models have them, without ViT's projections."""


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_valid(recipe):
    arguments = parse_config(["--config", str(recipe)])
    objective = OBJECTIVES[arguments.objective]
    objective.Arguments(**arguments.objective_args)
    assert "# " in recipe.read_text().splitlines()[0], "it says what it is and what it costs"
    if recipe.stem not in MILLIONS:
        return
    assert arguments.text_config["bos_token_id"] == 49406
    text = {**arguments.text_config, "vocab_size": 49408}
    config = AmorLIPConfig(
        vision_config=arguments.vision_config,
        text_config=text,
        amortizer_config=arguments.amortizer_config,
        projection_dim=arguments.projection_dim,
    )
    with torch.device("meta"):
        model = AmorLIPModel(config)
    sizes = [sum(p.numel() for p in m.parameters()) / 1e6 for m in (model.vision_model, model.text_model)]
    assert sizes == pytest.approx(MILLIONS[recipe.stem], abs=0.02)


def test_the_papers_hyperparameters():
    cc3m, cc12m = (
        yaml.safe_load((ROOT / f"training/recipes/{n}.yaml").read_text()) for n in ("cc3m_rn50", "cc12m_vit_b32")
    )
    assert (cc3m["num_train_epochs"], cc3m["per_device_train_batch_size"]) == (30, 1024)
    assert (cc12m["num_train_epochs"], cc12m["per_device_train_batch_size"]) == (33, 2048)
    assert (float(cc3m["learning_rate"]), float(cc12m["learning_rate"])) == (1e-3, 4e-4)
    for recipe, every, ema, width, rho in ((cc3m, 8, 0.999, 0.5, (6.5, -8.0)), (cc12m, 1, 0.92, 1.0, (8.5, -8.5))):
        settings = recipe["objective_args"]
        papers = {"amortization": "l2_log", "reinitialize": True, "beta": 0.8, "beta_decay_epochs": 10}
        assert settings.items() >= (papers | {"online_every": every, "ema_decay": ema}).items()
        assert recipe["amortizer_config"]["width_factor"] == width
        assert (settings["rho"], settings["rho_final"]) == rho


@pytest.mark.parametrize(
    "file", sorted((ROOT / "training/accelerate_configs").glob("*.yaml")), ids=lambda p: Path(p).stem
)
def test_accelerate_reads_its_configurations(file):
    config = load_config_from_file(str(file))
    assert config.distributed_type.value == "MULTI_GPU" and config.num_processes % config.num_machines == 0
