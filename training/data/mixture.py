"""Several sources of image-text pairs as one sequence."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from modeling_amorlip.cli_amorlip import UserError
from training.config import PretrainConfig
from training.data.pairs import Pairs
from training.data.remote import expand
from training.data.tables import TABLES, TablePairs, _load_table
from training.data.webdataset import TarPairs


def open_pairs(arguments: PretrainConfig) -> Mixture:
    """Everything that `train_data` names, parts divided by `::`.

    Raises:
        UserError: a source that does not exist, cannot be read, holds no pair or lacks a column.
    """
    names = [name for name in arguments.train_data.split("::") if name]
    weights = arguments.train_data_weights
    if weights and len(weights) != len(names):
        raise UserError(f"train_data_weights has {len(weights)} values for {len(names)} sources in train_data.")
    return Mixture([_open(name, arguments) for name in names])


@dataclass
class Mixture:
    """Several sources, one after the other, as one."""

    parts: list[Pairs]

    def __post_init__(self):
        self.starts = np.cumsum([0, *map(len, self.parts)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def _find(self, index: int) -> tuple[Pairs, int]:
        part = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.parts[part], index - int(self.starts[part])

    def __getitem__(self, index: int) -> dict[str, Any]:
        part, position = self._find(index)
        return part[position]

    def describe(self, index: int) -> tuple[str, str]:
        part, position = self._find(index)
        return part.describe(position)

    def captions(self) -> Iterator[str]:
        return (caption for part in self.parts for caption in part.captions())

    def column(self, name: str) -> list:
        return [value for part in self.parts for value in part.column(name)]


def _open(source: str, arguments: PretrainConfig) -> Pairs:
    found = expand(source)
    if found and all(name.endswith(".tar") for name in found):
        return TarPairs(found, source, arguments)
    if len(found) > 1 or found != [source]:
        kinds = {Path(name).suffix for name in found}
        if len(kinds) != 1 or not kinds <= set(TABLES):
            raise UserError(f"train_data {source}: files must be all .tar or all of one of {', '.join(TABLES)}.")
    return TablePairs(_load_table(source, found, arguments.train_split), source, arguments)
