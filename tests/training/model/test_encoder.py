"""The module that is wrapped for distribution."""

import torch

from modeling_amorlip import AmorLIPModel
from tests.helpers.objectives import make_config
from training.model.encoder import EncoderWithObjective, PairEncoder
from training.objectives.clip import CLIPObjective


def make_module() -> EncoderWithObjective:
    config = make_config()
    encoder = PairEncoder(AmorLIPModel(config), [0.5] * 3, [0.5] * 3)
    return EncoderWithObjective(encoder, CLIPObjective(config, None))


def test_loads_checkpoints_of_version_0_1():
    module, other = make_module(), make_module()
    old = {name.removeprefix("encoder."): weight for name, weight in module.state_dict().items()}
    assert all(name.startswith("model.") for name in old)
    other.load_state_dict(old)
    for name, weight in module.state_dict().items():
        assert torch.equal(other.state_dict()[name], weight), name
