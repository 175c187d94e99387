"""From samples to a batch of tensors."""

from __future__ import annotations

import math

import torch


class Collator:
    """Samples -> {pixel_values uint8 [N, 3, H, W], input_ids, attention_mask [N, longest], lengths, sample_ids [N]}.

    `bad_samples` stands beside them, and nothing else when a pair could not even be replaced. Texts are padded to the
    longest of the batch, rounded up to `multiple`, or to `max_length` when that is -1; `lengths` are what each would be
    padded to by itself. A tokenizer without attention masks (SigLIP's) says that its encoder reads padding as text:
    then all texts are padded to `max_length`.
    """

    def __init__(self, tokenizer, max_length: int, multiple: int = 1):
        self.has_masks = "attention_mask" in tokenizer.model_input_names
        self.tokenizer, self.max_length, self.multiple = tokenizer, max_length, multiple if self.has_masks else -1

    def __call__(self, samples):
        images, captions, indices, bad = zip(*samples, strict=True)
        bad_samples = [entry for entries in bad for entry in entries]
        if any(image.numel() == 0 for image in images):
            return {"bad_samples": bad_samples}
        text = self.tokenizer(list(captions), truncation=True, max_length=self.max_length)
        lengths = [self._padded(len(tokens)) for tokens in text["input_ids"]]
        text = self.tokenizer.pad(
            text, padding="max_length", max_length=max(lengths), padding_side="right", return_tensors="pt"
        )
        return {
            "pixel_values": torch.stack(images),
            "input_ids": text["input_ids"],
            "attention_mask": text["attention_mask"] if self.has_masks else torch.ones_like(text["input_ids"]),
            "lengths": lengths,
            "sample_ids": torch.tensor(indices),
            "bad_samples": bad_samples,
        }

    def _padded(self, length: int) -> int:
        if self.multiple < 0:
            return self.max_length
        return min(math.ceil(length / self.multiple) * self.multiple, self.max_length)
