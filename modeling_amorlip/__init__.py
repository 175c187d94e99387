"""AmorLIP for Transformers. Importing this package registers the model with the Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    CLIPProcessor,
)

from .configuration_amorlip import AmorLIPAmortizerConfig, AmorLIPConfig, AmorLIPResNetConfig
from .loss_amorlip import amortization_loss, amortized_contrastive_loss, cross_log_partitions, log_partitions
from .modeling_amorlip import (
    AmorLIPAmortizer,
    AmorLIPForImageClassification,
    AmorLIPModel,
    AmorLIPOutput,
    AmorLIPPreTrainedModel,
    AmorLIPTextModelWithProjection,
    AmorLIPVisionModelWithProjection,
)
from .resnet_amorlip import AmorLIPResNetModel


__version__ = "0.1.0"

MODEL_CLASSES = (
    AmorLIPModel,
    AmorLIPVisionModelWithProjection,
    AmorLIPTextModelWithProjection,
    AmorLIPForImageClassification,
)

AutoConfig.register("amorlip", AmorLIPConfig)
# The class that saved a folder, as its configuration's `architectures` say, or else the first.
AutoModel.register(AmorLIPConfig, MODEL_CLASSES)
AutoModel.register(AmorLIPResNetConfig, AmorLIPResNetModel)
AutoModelForZeroShotImageClassification.register(AmorLIPConfig, AmorLIPModel)
AutoModelForImageClassification.register(AmorLIPConfig, AmorLIPForImageClassification)
AutoProcessor.register(AmorLIPConfig, CLIPProcessor)

# Saved folders carry this code, so that they load with trust_remote_code=True where the package is not installed.
AmorLIPConfig.register_for_auto_class()
AmorLIPModel.register_for_auto_class("AutoModel")
AmorLIPTextModelWithProjection.register_for_auto_class("AutoModel")
AmorLIPVisionModelWithProjection.register_for_auto_class("AutoModel")
AmorLIPForImageClassification.register_for_auto_class("AutoModelForImageClassification")
AmorLIPResNetConfig.register_for_auto_class()
AmorLIPResNetModel.register_for_auto_class("AutoModel")

__all__ = [
    "AmorLIPAmortizer",
    "AmorLIPAmortizerConfig",
    "AmorLIPConfig",
    "AmorLIPForImageClassification",
    "AmorLIPModel",
    "AmorLIPOutput",
    "AmorLIPPreTrainedModel",
    "AmorLIPResNetConfig",
    "AmorLIPResNetModel",
    "AmorLIPTextModelWithProjection",
    "AmorLIPVisionModelWithProjection",
    "amortization_loss",
    "amortized_contrastive_loss",
    "cross_log_partitions",
    "log_partitions",
]
