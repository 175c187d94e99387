"""Training objectives: one interface (`base.ContrastiveObjective`), one line here each."""

from .amorlip import AmorLIPObjective
from .base import ContrastiveObjective, ObjectiveOutput
from .clip import CLIPObjective, DCLObjective
from .fastclip import FastCLIPObjective, SogCLRObjective
from .neuclip import NeuCLIPObjective
from .siglip import SigLIPObjective


OBJECTIVES: dict[str, type[ContrastiveObjective]] = {
    "amorlip": AmorLIPObjective,
    "clip": CLIPObjective,
    "dcl": DCLObjective,
    "siglip": SigLIPObjective,
    "sogclr": SogCLRObjective,
    "fastclip": FastCLIPObjective,
    "neuclip": NeuCLIPObjective,
}

__all__ = ["OBJECTIVES", "ContrastiveObjective", "ObjectiveOutput"]
