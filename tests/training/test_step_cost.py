"""Acceptance of the whole step's cost; slow, since the towers are ViT-B/32."""

import time

import pytest

from tests.helpers.checkout import DEMO
from training.build import build_trainer
from training.config import PretrainConfig


@pytest.mark.slow
def test_an_amorlip_step_costs_at_most_two_per_cent_more_than_clips(tmp_path):
    """16 steps each on ViT-B/32 towers, 128 pairs, T_online = 8, in turns, so that other load meets both alike."""
    trainers = {}
    for objective, settings in (("clip", {}), ("amorlip", {"online_every": 8})):
        trainers[objective] = build_trainer(
            PretrainConfig(
                output_dir=str(tmp_path / objective),
                train_data=str(DEMO / "train.parquet"),
                objective=objective,
                objective_args=settings,
                vision_config={"model_type": "clip_vision_model"},
                text_config={"model_type": "clip_text_model"},
                per_device_train_batch_size=128,
            )
        )
        trainers[objective].module.start_epoch(0, 1)
        trainers[objective].wrapped.train()
    batches = iter(trainers["clip"].dataloader)
    seconds = dict.fromkeys(trainers, 0.0)
    for step in range(17):
        batch = next(batches)
        batch.pop("bad_samples")
        for objective, trainer in trainers.items():
            start = time.perf_counter()
            trainer.training_step(batch)
            if step:
                seconds[objective] += time.perf_counter() - start
    print(f"seconds for 16 steps: {seconds}, ratio {seconds['amorlip'] / seconds['clip']:.4f}")
    assert seconds["amorlip"] <= 1.02 * seconds["clip"]
