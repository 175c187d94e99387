"""Gradient caching: the whole batch's gradient, and random numbers in order whatever happens."""

import pytest
import torch

from tests.helpers.runs import build
from training.gradient_cache import cached_backward, get_random_state, replay_random_state


def test_random_state_goes_on_after_an_error():
    torch.manual_seed(0)
    state = get_random_state()
    first, second = torch.rand(2), torch.rand(2)
    torch.manual_seed(0)
    torch.rand(2)
    with pytest.raises(RuntimeError), replay_random_state(state):
        assert torch.equal(torch.rand(2), first)
        raise RuntimeError
    assert torch.equal(torch.rand(2), second)


def test_error_in_a_part_leaves_the_random_state_where_it_was(recipe):
    trainer = build(recipe())  # with dropout
    trainer.wrapped.train()
    batch = next(iter(trainer.dataloader))
    batch.pop("bad_samples")
    calls, states = [], []

    def fail_when_encoding_again(module, inputs):
        calls.append(1)
        states.append(torch.get_rng_state())
        if len(calls) == 6:  # four parts of four pairs, then the second of them again
            raise RuntimeError("out of memory")

    trainer.encoder.register_forward_pre_hook(fail_when_encoding_again)
    with pytest.raises(RuntimeError, match="out of memory"):
        cached_backward(trainer.accelerator, trainer.wrapped, trainer.module, batch, 4)
    assert torch.equal(states[5], states[1]), "a part draws the random numbers again that it drew before"
    assert not torch.equal(torch.get_rng_state(), states[5])
    trainer.encoder._forward_pre_hooks.clear()


@pytest.mark.parametrize("micro_batch_size", [1, 5, 16])
def test_gradients_equal_the_whole_batchs(recipe, micro_batch_size):
    vision = {"model_type": "clip_vision_model", "image_size": 32, "patch_size": 16, "hidden_size": 32}
    vision |= {"intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    gradients = []
    for size in (0, micro_batch_size):
        trainer = build(recipe(vision_config=vision, logit_bias_init_value=-1.0))  # no dropout
        batch = next(iter(trainer.dataloader))
        batch.pop("bad_samples")
        if size:
            loss = cached_backward(trainer.accelerator, trainer.wrapped, trainer.module, batch, size).loss
        else:
            loss = trainer.wrapped(**batch).loss
            loss.backward()
        gradients.append({name: p.grad for name, p in trainer.module.named_parameters() if p.requires_grad})
        gradients[-1]["loss"] = loss.detach()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)
