"""
CLIP's ResNet (Radford et al. 2021, Section 2.4) as a vision encoder: a stem of three convolutions, strides that average
before they subsample, and attention in place of global pooling. The paper's image tower on CC3M is its RN50. Parameters
are named as in CLIP's and OpenCLIP's checkpoints, without their prefix `visual.`.
"""

import contextlib

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .configuration_amorlip import AmorLIPResNetConfig


class AmorLIPResNetLastNorm(nn.BatchNorm2d):
    """The last norm of a block. Its gain starts at 0, so that blocks start as the identity."""


class AmorLIPResNetBlock(GradientCheckpointingLayer):
    """A bottleneck block: [N, in_channels, H, W] -> [N, 4 channels, H / stride, W / stride]."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(channels, 4 * channels, 1, bias=False)
        self.bn3 = AmorLIPResNetLastNorm(4 * channels)
        self.downsample = None
        if stride > 1 or in_channels != 4 * channels:
            convolution = nn.Conv2d(in_channels, 4 * channels, 1, bias=False)
            self.downsample = nn.Sequential(convolution, nn.BatchNorm2d(4 * channels))

    def forward(self, hidden: Tensor) -> Tensor:
        with frozen_statistics(self) if _is_recomputation() else contextlib.nullcontext():
            shortcut = hidden if self.downsample is None else self.downsample(self.avgpool(hidden))
            hidden = self.bn1(self.conv1(hidden)).relu()
            hidden = self.bn2(self.conv2(hidden)).relu()
            return (self.bn3(self.conv3(self.avgpool(hidden))) + shortcut).relu()


def _is_recomputation() -> bool:
    """Return whether this forward pass runs inside a backward pass, as gradient checkpointing makes it."""
    # What torch.compile recomputes has no side effects.
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


@contextlib.contextmanager
def frozen_statistics(module: nn.Module):
    """Keep a module's running statistics, which a second pass for gradient checkpointing must not count twice."""
    norms = [norm for norm in module.modules() if isinstance(norm, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


class AmorLIPResNetAttentionPool(nn.Module):
    """Multi-head attention over a grid, with the grid's mean as the query: [N, C, H, W] -> [N, output_dim]."""

    def __init__(self, config: AmorLIPResNetConfig):
        super().__init__()
        channels, grid = 32 * config.width, config.image_size // 32
        self.num_heads = config.num_attention_heads
        self.positional_embedding = nn.Parameter(torch.empty(grid**2 + 1, channels))
        self.k_proj = nn.Linear(channels, channels)
        self.q_proj = nn.Linear(channels, channels)
        self.v_proj = nn.Linear(channels, channels)
        self.c_proj = nn.Linear(channels, config.output_dim)

    def forward(self, hidden: Tensor) -> Tensor:
        tokens = hidden.flatten(2).mT
        tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], dim=1) + self.positional_embedding
        query, key, value = (
            projection(inputs).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection, inputs in ((self.q_proj, tokens[:, :1]), (self.k_proj, tokens), (self.v_proj, tokens))
        )
        attended = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.c_proj(attended.flatten(1))


class AmorLIPResNetModel(PreTrainedModel):
    """CLIP's ResNet. Its pooled output is the image embedding: no further projection follows it in CLIP."""

    config_class = AmorLIPResNetConfig
    base_model_prefix = "amorlip_resnet"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["AmorLIPResNetBlock"]
    _input_embed_layer = "conv1"

    def __init__(self, config: AmorLIPResNetConfig):
        super().__init__(config)
        width = config.width
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.avgpool = nn.AvgPool2d(2)
        in_channels = width
        for index, depth in enumerate(config.depths):
            channels, blocks = width * 2**index, []
            for block in range(depth):
                blocks.append(AmorLIPResNetBlock(in_channels, channels, 2 if index and not block else 1))
                in_channels = 4 * channels
            self.add_module(f"layer{index + 1}", nn.ModuleList(blocks))
        self.attnpool = AmorLIPResNetAttentionPool(config)
        self.post_init()

    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool | None = None, return_dict: bool | None = None, **kwargs
    ) -> BaseModelOutputWithPooling | tuple:
        """
        Map [N, 3, image_size, image_size] to `last_hidden_state` [N, 32 width, image_size / 32, image_size / 32] and
        `pooler_output` [N, output_dim]; with `output_hidden_states`, also return what the stem and each block give.

        Raises:
            ValueError: the images have another size than the pool's position embeddings are made for.
        """
        (height, width), size = pixel_values.shape[-2:], self.config.image_size
        if (height, width) != (size, size):
            raise ValueError(f"pixel_values are {height} x {width}; this encoder takes images of {size} x {size}.")
        hidden = self.bn1(self.conv1(pixel_values)).relu()
        hidden = self.bn2(self.conv2(hidden)).relu()
        hidden = self.avgpool(self.bn3(self.conv3(hidden)).relu())
        states = [hidden]
        for stage in ("layer1", "layer2", "layer3", "layer4"):
            for block in self.get_submodule(stage).children():
                hidden = block(hidden)
                states.append(hidden)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        hidden_states = tuple(states) if output_hidden_states else None
        outputs = BaseModelOutputWithPooling(hidden, self.attnpool(hidden), hidden_states)
        return outputs.to_tuple() if return_dict is False else outputs

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # As in CLIP: PyTorch's defaults, except for the blocks' last gains and the pool.
        if isinstance(module, nn.Conv2d):
            init.kaiming_uniform_(module.weight, a=5**0.5)
        elif isinstance(module, nn.Linear):
            bound = module.in_features**-0.5
            init.normal_(module.weight, std=bound)
            init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, AmorLIPResNetAttentionPool):
            init.normal_(module.positional_embedding, std=module.positional_embedding.shape[1] ** -0.5)
        else:
            super()._init_weights(module)
            if isinstance(module, AmorLIPResNetLastNorm):
                init.zeros_(module.weight)
