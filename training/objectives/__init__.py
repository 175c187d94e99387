"""Training objectives: one file each, one interface (`base.ContrastiveObjective`), one line here."""

from .amorlip import AmorLIPObjective
from .base import ContrastiveObjective, ObjectiveOutput
from .clip import CLIPObjective


OBJECTIVES: dict[str, type[ContrastiveObjective]] = {
    "amorlip": AmorLIPObjective,
    "clip": CLIPObjective,
}

__all__ = ["OBJECTIVES", "AmorLIPObjective", "CLIPObjective", "ContrastiveObjective", "ObjectiveOutput"]
