"""Training objectives by name. Each has a file and a line here; `base.ContrastiveObjective` is their interface."""

from training.objectives.amorlip import AmorLIPObjective
from training.objectives.base import ContrastiveObjective, ObjectiveOutput
from training.objectives.clip import CLIPObjective, DCLObjective
from training.objectives.fastclip import FastCLIPObjective, SogCLRObjective
from training.objectives.neuclip import NeuCLIPObjective
from training.objectives.siglip import SigLIPObjective


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
