"""Fits amortizer heads of a finished model to a sample of a gallery, for partition-normalised scoring.

    python eval/apps/calibrate.py outputs/emoji_demo emoji_openmoji --output outputs/calibrated
    python eval/apps/calibrate.py openai/clip-vit-base-patch32 pairs.parquet --output outputs/calibrated
    python eval/run.py --model outputs/calibrated --tasks emoji_openmoji --scoring gallery amortized

DATA is a task of eval/run.py, by name or as FILE.yaml:TASK, or a parquet file with the columns image and caption. The
encoders stay as they are, so a minute or two on a CPU do. CLIP and SigLIP are converted on the way.

Taking a candidate's log-partition over the gallery off its logits helps where some candidates are near to everything.
The exact value needs a pass over the gallery for every candidate; heads fitted to `--samples` images of it answer from
the candidate's embedding alone. Images of the gallery that were not sampled tell, where they have labels, what it
brings: top-1 accuracy over them by cosine, by the exact partition over them, and by the heads before and after.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

from eval.data import TaskData, find_data
from eval.evaluators.classification import build_classifier, top_classes
from eval.models import load_model
from eval.scoring import SCORINGS, log_partition_corrections
from eval.tasks import ROOT, Task, load_task
from modeling_amorlip import AmorLIPAmortizer, AmorLIPModel, amortization_loss
from modeling_amorlip.cli_amorlip import UserError, cli_entry_point
from modeling_amorlip.configuration_amorlip import HEAD_TYPES, AmorLIPAmortizerConfig
from modeling_amorlip.convert_clip_to_amorlip import convert
from modeling_amorlip.embedder_amorlip import encode_images, encode_texts
from modeling_amorlip.tiles_amorlip import log_sum_exps
from training.objectives.base import fit


def fit_amortizer(
    model: AmorLIPModel,
    images: Tensor,
    texts: Tensor,
    config: AmorLIPAmortizerConfig,
    steps: int = 1000,
    batch_size: int = 256,
    learning_rate: float = 1e-3,
) -> None:
    """Gives the model heads of that configuration, fitted to log-partitions over a sample.

    Their size is cut to the number of images or of texts where it is above it. The target of a text is exact, the
    log-mean-exp of its logits with all images of the sample, and the other way round; a step takes `batch_size` texts
    and images, with the conjugate objective. A queue just takes the sample in.

    Args:
        images: [I, d], texts: [T, d], unit norm: embeddings of the sample.
    """
    scale = model.logit_scale.detach().float().exp().cpu()
    bias = torch.zeros(()) if model.logit_bias is None else model.logit_bias.detach().float().cpu()
    log_rows, log_columns = log_sum_exps(images, texts, scale, bias, 0, 1.0, 1024)
    targets = log_rows - torch.tensor(len(texts)).log(), log_columns - torch.tensor(len(images)).log()
    # Rings larger than the sample would hold some of it twice.
    size = min(config.size, len(images), len(texts))
    model.config.amortizer_config = AmorLIPAmortizerConfig(
        head_type=config.head_type, size=size, width_factor=config.width_factor
    )
    heads = AmorLIPAmortizer(model.config)
    for head, others in ((heads.image_head, texts), (heads.text_head, images)):
        if heads.observes:  # in random order: a ring smaller than the sample keeps the last of it
            head.ring.push(others[torch.randperm(len(others))])
    heads.reset_parameters()
    with torch.no_grad():
        predictions = heads(images, texts, scale, bias)
    heads.start_at([target.mean() for target in targets], [prediction.mean() for prediction in predictions])
    if parameters := list(heads.parameters()):
        optimizer = torch.optim.Adam(parameters, lr=learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            rows, columns = (torch.randint(len(side), (batch_size,)) for side in (images, texts))
            wanted = targets[0][rows], targets[1][columns]

            def loss(rows=rows, columns=columns, wanted=wanted) -> Tensor:
                found = heads(images[rows], texts[columns], scale, bias)
                return sum(amortization_loss(h, t, objective="conjugate") for h, t in zip(found, wanted, strict=True))

            fit(heads, optimizer, loss, 1)
            schedule.step()
    model.amortizer = heads.to(model.logit_scale.device)


@dataclass
class Gallery:
    """Embeddings of a task's data: images [I, d] with labels [I], texts [T, d], and the classifier [C, d] if any.

    `owners` [T] says which image a text is a caption of; prompts of classes belong to all images.
    """

    images: Tensor
    labels: Tensor
    texts: Tensor
    owners: Tensor | None
    classifier: Tensor | None


def encode_gallery(model, processor, data: TaskData) -> Gallery:
    labels, captions = [], []

    def images():
        for sample in data.samples():
            labels.append(sample.label)
            captions.append(sample.captions)
            yield sample.decode()[0]

    embeds, owners, classifier = encode_images(model, processor, images()), None, None
    if data.classes:
        texts = [t.replace("{c}", name).replace("{}", name) for t in data.templates for name in data.classes]
        classifier = build_classifier(model, processor, data.classes, data.templates)
    else:
        texts = [caption for lines in captions for caption in lines]
        owners = torch.tensor([row for row, lines in enumerate(captions) for _ in lines])
    return Gallery(embeds, torch.tensor(labels), encode_texts(model, processor, texts), owners, classifier)


def accuracies(model: AmorLIPModel, gallery: Gallery, rows: Tensor) -> dict[str, float]:
    """Top-1 accuracy over some images by each way of scoring, {"cosine", "gallery", "amortized"}."""
    images, labels = gallery.images[rows], gallery.labels[rows]
    taken_off = log_partition_corrections(model, SCORINGS, images, gallery.classifier, "text")
    return {
        scoring: (top_classes(images, gallery.classifier, 1, penalty)[:, 0] == labels).double().mean().item()
        for scoring, penalty in taken_off.items()
    }


def calibrate(
    model: AmorLIPModel, processor, data: TaskData, config: AmorLIPAmortizerConfig, samples: int = 1000, **options
) -> dict[str, float]:
    """Fits the model's heads to a random sample of a task's images.

    Args:
        samples: images to fit to. options: of `fit_amortizer`.

    Returns:
        `accuracies` over the images that were not sampled, with "before" for the heads that were there before; empty
        for data without classes.
    """
    gallery = encode_gallery(model, processor, data)
    torch.manual_seed(0)
    order = torch.randperm(len(gallery.images))
    chosen, others = order[:samples], order[samples:]
    before = accuracies(model, gallery, others) if gallery.classifier is not None and len(others) else {}
    texts = gallery.texts if gallery.owners is None else gallery.texts[torch.isin(gallery.owners, chosen)]
    fit_amortizer(model, gallery.images[chosen], texts, config, **options)
    return before and accuracies(model, gallery, others) | {"before": before["amortized"]}


@cli_entry_point
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub repository of a dual encoder of Transformers")
    parser.add_argument("data", help="task, FILE.yaml:TASK, or parquet with image and caption")
    parser.add_argument("--output", type=Path, required=True, help="folder for the model with its new heads")
    parser.add_argument("--data_dir", type=Path, default=ROOT, help="folder that the task's data is in")
    parser.add_argument("--samples", type=int, default=1000, help="images to fit to")
    parser.add_argument("--head_type", choices=HEAD_TYPES, default="prototype")
    parser.add_argument("--size", type=int, default=256, help="prototypes, random features or embeddings in the queue")
    parser.add_argument("--steps", type=int, default=1000, help="optimiser steps")
    arguments = parser.parse_args()
    for name in ("samples", "size", "steps"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(arguments, name)}.")
    model, processor = load_model(arguments.model)
    if not isinstance(model, AmorLIPModel):
        try:
            model = convert(arguments.model).model.eval()
        except (ValueError, OSError) as error:
            raise UserError(f"{arguments.model} cannot be given heads: {error}") from None
    path = arguments.data_dir / arguments.data
    task = Task(path.stem, kind="retrieval", main_metric="mean_recall@1", data=str(path.absolute()))
    data = find_data(task if path.suffix == ".parquet" else load_task(arguments.data), arguments.data_dir)
    config = AmorLIPAmortizerConfig(head_type=arguments.head_type, size=arguments.size)
    result = calibrate(model, processor, data, config, arguments.samples, steps=arguments.steps)
    model.save_pretrained(arguments.output)
    processor.save_pretrained(arguments.output)
    if result:
        print("accuracy over the other images, %: " + ", ".join(f"{k} {100 * v:.2f}" for k, v in result.items()))
    print(f"{arguments.head_type} heads fitted to {arguments.samples} images: {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
