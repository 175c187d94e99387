"""Whole models to save and to evaluate: the trained weights or their average, also where they are sharded."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from training.model.construction import TrainingModel
from training.model.encoder import EncoderWithObjective, PairEncoder
from training.model.weight_average import WeightAverage
from training.run.sharded_state import broadcast_whole, gather_tensors, gather_weights


@dataclass(frozen=True)
class WholeModel:
    """A model with all its weights, and the encoder that computes its validation loss."""

    built: TrainingModel
    encoder: PairEncoder


class WholeModels:
    """Provide the model that is trained, and the average of its weights, with the heads that the objective trained.

    A model that is not sharded is used in place. The weights of one that is are gathered in every process, into a
    copy that is freed after use.

    Args:
        built: the model.
        module: the encoder and the objective.
        average: moving average of the weights; None without one.
        empty: copy of the model without weights, see `copy_without_weights`; None if the model is not sharded.
    """

    def __init__(
        self,
        built: TrainingModel,
        module: EncoderWithObjective,
        average: WeightAverage | None,
        empty: TrainingModel | None = None,
    ):
        self._built, self._module, self._empty = built, module, empty
        self.average = average

    def variants(self) -> Mapping[str, Callable[[], contextlib.AbstractContextManager[WholeModel]]]:
        """Return what provides each whole model, by the name of its folder in `output_dir`; "" is the root."""
        return {"": self.current} if self.average is None else {"": self.current, "ema": self.averaged}

    @contextlib.contextmanager
    def current(self) -> Iterator[WholeModel]:
        """Provide the trained weights. All processes must call this."""
        broadcast_whole(self._module.encoder.buffers())  # each process has updated running statistics by itself
        if self._empty is None:
            self._load_amortizer(self._built)
            yield WholeModel(self._built, self._module.encoder)
        else:
            yield self._fill(self._empty, gather_weights(self._built.model))

    @contextlib.contextmanager
    def averaged(self) -> Iterator[WholeModel]:
        """Provide the average of the weights. All processes must call this."""
        assert self.average is not None
        broadcast_whole(self.average.buffers())
        if self._empty is None:
            with self.average.swapped(), self.current() as whole:
                yield whole
        else:
            averages = gather_tensors(self.average.tensors)
            yield self._fill(self._empty, gather_weights(self._built.model) | averages)

    def _fill(self, empty: TrainingModel, weights: dict[str, Tensor]) -> WholeModel:
        """Return a copy of the model with weights; no other process holds parts of it."""
        wrapper: Any = copy.deepcopy(empty.adapted or empty.model)
        model = wrapper if empty.adapted is None else wrapper.get_base_model()
        model.load_state_dict(weights, assign=True)
        encoder = self._module.encoder
        model.to(encoder.mean.device)
        built = dataclasses.replace(empty, model=model, adapted=None if empty.adapted is None else wrapper)
        self._load_amortizer(built)
        plain = PairEncoder(model, (encoder.mean / 255).flatten().tolist(), (encoder.std / 255).flatten().tolist())
        return WholeModel(built, plain.to(encoder.mean.device))

    def _load_amortizer(self, built: TrainingModel) -> None:
        """Copy the heads that the objective has trained into a model."""
        amortizer = self._module.objective.amortizer
        if amortizer is not None:
            built.model.amortizer.load_state_dict(amortizer.state_dict())


def copy_without_weights(built: TrainingModel) -> TrainingModel:
    """Return a copy of a model whose parameters have shapes and no values; buffers are copied."""
    wrapper: Any = built.model if built.adapted is None else built.adapted
    shapes: dict[int, Any] = {
        id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
        for parameter in wrapper.parameters()
    }
    empty: Any = copy.deepcopy(wrapper, shapes)
    if built.adapted is None:
        return dataclasses.replace(built, model=empty)
    return dataclasses.replace(built, model=empty.get_base_model(), adapted=empty)
