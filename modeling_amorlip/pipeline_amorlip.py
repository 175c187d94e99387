"""Texts padded as their encoder was trained, and Transformers' zero-shot image classification with them."""

from transformers import ZeroShotImageClassificationPipeline
from transformers.image_utils import load_image
from transformers.pipelines import PIPELINE_REGISTRY


def pads_to_context(text_config) -> bool:
    """Return whether a text encoder was made for texts padded to its context: SigLIP's reads its last position."""
    return getattr(text_config, "model_type", "").startswith("siglip")


def tokenize_texts(tokenizer, text_config, texts: list[str], **options):
    """Tokenize texts [T, length] for a text encoder, truncated to its context.

    Padding goes to the longest text, or to the whole context if the encoder was trained that way (SigLIP) or no
    attention mask tells it where texts end. `options` override what the tokenizer is called with.
    """
    positions = getattr(text_config, "max_position_embeddings", None)
    has_mask = "attention_mask" in getattr(tokenizer, "model_input_names", ("attention_mask",))
    # RoBERTa's tokenizer knows the shorter length, CLIP's may know none, and T5 has no positions to run out of.
    context = min(positions or 1_000_000, getattr(tokenizer, "model_max_length", 1_000_000))
    padding = "max_length" if positions and (pads_to_context(text_config) or not has_mask) else True
    defaults = {"padding": padding, "truncation": True, "max_length": context, "return_tensors": "pt"}
    return tokenizer(texts, **defaults | options)


class AmorLIPZeroShotImageClassificationPipeline(ZeroShotImageClassificationPipeline):
    """
    Transformers' pipeline with two differences for AmorLIP models: texts are padded and truncated as the text encoder
    was trained, and a model with a logit bias, trained with a sigmoid loss, scores every label by itself.
    """

    def preprocess(self, image, candidate_labels=None, hypothesis_template="This is a photo of {}.", **options):
        if self.model.config.model_type != "amorlip":
            return super().preprocess(image, candidate_labels, hypothesis_template, **options)
        image = load_image(image, timeout=options.get("timeout"))
        inputs = self.image_processor(images=[image], return_tensors="pt").to(self.dtype)
        texts = [hypothesis_template.format(label) for label in candidate_labels]
        tokenizer_kwargs = options.get("tokenizer_kwargs") or {}
        inputs["candidate_labels"] = candidate_labels
        text_inputs = tokenize_texts(self.tokenizer, self.model.config.text_config, texts, **tokenizer_kwargs)
        inputs["text_inputs"] = [text_inputs]
        return inputs

    def postprocess(self, model_outputs):
        if getattr(self.model, "logit_bias", None) is None or self.model.config.model_type != "amorlip":
            return super().postprocess(model_outputs)
        scores = model_outputs["logits"][0].sigmoid().tolist()
        ranked = sorted(zip(scores, model_outputs["candidate_labels"], strict=True), key=lambda pair: -pair[0])
        return [{"score": score, "label": label} for score, label in ranked]


def register_pipeline() -> None:
    """Let `pipeline("zero-shot-image-classification")` make this class, which serves other models as before."""
    # The entry is edited, since registering it again would warn.
    task = PIPELINE_REGISTRY.supported_tasks["zero-shot-image-classification"]
    task["impl"] = AmorLIPZeroShotImageClassificationPipeline
