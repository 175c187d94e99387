"""Fit the amortizer heads of a finished model to a sample of a gallery, for partition-normalized scoring.

    python eval/apps/calibrate.py outputs/emoji_demo emoji_openmoji --output outputs/calibrated
    python eval/apps/calibrate.py openai/clip-vit-base-patch32 pairs.parquet --output outputs/calibrated
    python eval/run.py --model outputs/calibrated --tasks emoji_openmoji --scoring exact amortized

DATA is a task of eval/run.py (its name, or FILE.yaml:TASK) or a parquet file with the columns image and caption. The
encoders stay unchanged, so a minute or two on a CPU are enough. CLIP and SigLIP models are converted first.

Subtracting a candidate's log-partition over the gallery from its logits helps where some candidates are close to
everything. The exact value needs a pass over the gallery for each candidate; heads fitted to --samples images of the
gallery estimate it from the candidate's embedding alone. Where the data has labels, the images that were not sampled
show the effect: top-1 accuracy by cosine, by the exact partition over them, and by the heads before and after.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from PIL import Image
from torch import Tensor

from eval.apps.image_files import describe_error
from eval.apps.outputs import check_writable, printable, user_path
from eval.data import TaskData, find_data
from eval.evaluators.classification import build_classifier, top_classes
from eval.models import load_model
from eval.scoring import SCORINGS, log_partition_corrections
from eval.tables import fill_template
from eval.tasks import ROOT, Task, load_task
from modeling_amorlip import AmorLIPAmortizer, AmorLIPModel, amortization_loss
from modeling_amorlip.cli_amorlip import UserError, cli_entry_point
from modeling_amorlip.configuration_amorlip import HEAD_TYPES, AmorLIPAmortizerConfig
from modeling_amorlip.convert_clip_to_amorlip import convert
from modeling_amorlip.embedder_amorlip import encode_images, encode_texts
from modeling_amorlip.loss_amorlip import cross_log_partitions


@dataclass
class Gallery:
    """Embeddings of a task's data: images [I, d] with labels [I], texts [T, d], and the classifier [C, d] if any.

    `text_owners` [T] is the row of the image that a caption belongs to; None for class prompts, which belong to all.
    """

    images: Tensor
    labels: Tensor
    texts: Tensor
    text_owners: Tensor | None
    classifier: Tensor | None


def encode_gallery(model: Any, processor: Any, data: TaskData) -> Gallery:
    """Encode all images of a task, and its class prompts or captions.

    Raises:
        UserError: an image cannot be decoded, or there are no images or texts.
    """
    labels: list[int] = []
    captions: list[list[str]] = []

    def images() -> Iterator[Image.Image]:
        for sample in data.samples():
            try:
                image = sample.decode()[0]
            except Exception as error:  # Pillow raises many kinds
                reason = describe_error(error)
                raise UserError(f"{data.task.name}: image {len(labels)} cannot be decoded: {reason}.") from None
            labels.append(sample.label)
            captions.append(sample.captions)
            yield image

    stream = images()
    if (first := next(stream, None)) is None:
        raise UserError(f"{data.task.name} has no images.")
    image_embeds = encode_images(model, processor, itertools.chain([first], stream))
    owners, classifier = None, None
    if data.classes:
        texts = [fill_template(template, name) for template in data.templates for name in data.classes]
        classifier = build_classifier(model, processor, data.classes, data.templates)
    else:
        texts = [caption for lines in captions for caption in lines]
        owners = torch.tensor([row for row, lines in enumerate(captions) for _ in lines])
    if not texts:
        raise UserError(f"{data.task.name} has no captions.")
    return Gallery(image_embeds, torch.tensor(labels), encode_texts(model, processor, texts), owners, classifier)


def exact_targets(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-mean-exps [I], [T] of each image's logits with all texts, and of each text's with all images."""
    log_z_image, log_z_text = cross_log_partitions(images, texts, scale, logit_bias=bias, tile_size=1024)
    return log_z_image - torch.tensor(len(texts)).log(), log_z_text - torch.tensor(len(images)).log()


def fit_amortizer(
    model: AmorLIPModel,
    images: Tensor,
    texts: Tensor,
    config: AmorLIPAmortizerConfig,
    steps: int = 1000,
    batch_size: int = 256,
    learning_rate: float = 1e-3,
) -> None:
    """Replace the model's heads by new ones, fitted to the log-partitions over a sample.

    The target of an image is exact, the log-mean-exp of its logits with all texts of the sample, and vice versa. Each
    step takes `batch_size` images and texts, with the conjugate objective (paper Section 3.2). A queue has no
    parameters: it only stores the sample. A size above the number of images or texts is reduced to it.

    Args:
        images: embeddings [I, d] of the sample, unit norm.
        texts: embeddings [T, d] of the sample, unit norm.
    """
    scale = model.logit_scale.detach().float().exp().cpu()
    bias = torch.zeros(()) if model.logit_bias is None else model.logit_bias.detach().float().cpu()
    targets = exact_targets(images, texts, scale, bias)
    heads = _new_heads(model, images, texts, config)
    with torch.no_grad():
        predictions = heads(images, texts, scale, bias)
    heads.start_at([target.mean() for target in targets], [prediction.mean() for prediction in predictions])
    parameters = list(heads.parameters())
    if parameters:
        optimizer = torch.optim.Adam(parameters, lr=learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            rows, columns = (torch.randint(len(embeds), (batch_size,)) for embeds in (images, texts))
            outputs = heads(images[rows], texts[columns], scale, bias)
            loss_image = amortization_loss(outputs[0], targets[0][rows], objective="conjugate")
            loss_text = amortization_loss(outputs[1], targets[1][columns], objective="conjugate")
            optimizer.zero_grad()
            (loss_image + loss_text).backward()
            optimizer.step()
            schedule.step()
        optimizer.zero_grad()
    model.amortizer = heads.to(model.logit_scale.device)


def _new_heads(model: AmorLIPModel, images: Tensor, texts: Tensor, config: AmorLIPAmortizerConfig) -> AmorLIPAmortizer:
    """Return heads of a configuration, initialized from a sample, and set it in the model's configuration."""
    size = min(config.size, len(images), len(texts))  # a larger queue would hold some embeddings twice
    model_config: Any = model.config
    model_config.amortizer_config = AmorLIPAmortizerConfig(
        head_type=config.head_type, size=size, width_factor=config.width_factor
    )
    heads = AmorLIPAmortizer(model_config)
    if heads.observes:
        for modality, others in (("image", texts), ("text", images)):
            ring: Any = getattr(heads, f"{modality}_head").ring
            ring.push(others[torch.randperm(len(others))])  # a ring smaller than the sample keeps the last ones
    heads.reset_parameters()
    return heads


def measure_accuracy(model: AmorLIPModel, gallery: Gallery, rows: Tensor) -> dict[str, float]:
    """Return the top-1 accuracy over some images of a labeled gallery for each way of scoring."""
    images, labels, classifier = gallery.images[rows], gallery.labels[rows], gallery.classifier
    assert classifier is not None
    corrections = log_partition_corrections(model, SCORINGS, images, classifier, "text")
    return {
        scoring: (top_classes(images, classifier, 1, correction)[:, 0] == labels).double().mean().item()
        for scoring, correction in corrections.items()
    }


def calibrate(
    model: AmorLIPModel,
    processor: Any,
    data: TaskData,
    config: AmorLIPAmortizerConfig,
    num_samples: int = 1000,
    steps: int = 1000,
) -> dict[str, float]:
    """Fit the model's heads to a random sample of a task's images.

    Returns:
        Accuracies over the images that were not sampled, by scoring, and under "before" the accuracy with the previous
        heads; empty for data without classes.
    """
    gallery = encode_gallery(model, processor, data)
    torch.manual_seed(0)
    order = torch.randperm(len(gallery.images))
    sample, held_out = order[:num_samples], order[num_samples:]
    measurable = gallery.classifier is not None and len(held_out) > 0
    before = measure_accuracy(model, gallery, held_out) if measurable else {}
    owners = gallery.text_owners
    texts = gallery.texts if owners is None else gallery.texts[torch.isin(owners, sample)]
    fit_amortizer(model, gallery.images[sample], texts, config, steps)
    return measure_accuracy(model, gallery, held_out) | {"before": before["amortized"]} if measurable else {}


def load_amorlip(name: str) -> tuple[AmorLIPModel, Any]:
    """Load a model and its processor, converted to AmorLIP; raises `UserError` where that is impossible."""
    model, processor = load_model(name)
    if isinstance(model, AmorLIPModel):
        return model, processor
    try:
        return convert(name).model.eval(), processor
    except (ValueError, OSError) as error:
        raise UserError(f"{name} cannot be given heads: {error}") from None


def find_gallery(name: str, data_dir: Path) -> TaskData:
    """Find the data of a task, or of a parquet file with image and caption; raises `UserError` where there is none."""
    path = data_dir / name
    if path.suffix == ".parquet":
        task = Task(path.stem, kind="retrieval", main_metric="mean_recall@1", data=str(path.absolute()))
    else:
        task = load_task(name)
        if task.kind == "winogavil":
            raise UserError(f"{name} has neither classes nor captions to fit heads to; name another task.")
    return find_data(task, data_dir)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line; raises `UserError` for values that cannot work."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", help="folder or Hub repository of a dual encoder of Transformers")
    add("data", help="task, FILE.yaml:TASK, or parquet file with the columns image and caption")
    add("--output", type=user_path, required=True, help="folder to save the model with its new heads in")
    add("--data_dir", type=user_path, default=ROOT, help="folder that holds the task's data (default: the checkout)")
    add("--samples", type=int, default=1000, help="number of images to fit to (default: %(default)s)")
    add("--head_type", choices=HEAD_TYPES, default="prototype", help="type of the heads (default: %(default)s)")
    add("--size", type=int, default=256, help="number of prototypes, features or stored embeddings (default: 256)")
    add("--steps", type=int, default=1000, help="number of optimizer steps (default: %(default)s)")
    arguments = parser.parse_args()
    for name in ("samples", "size", "steps"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(arguments, name)}.")
    return arguments


def _make_output_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {printable(folder)} cannot be created: {error.strerror}.") from None
    check_writable(folder / "model.safetensors", "--output")


@cli_entry_point
def main() -> None:
    arguments = parse_arguments()
    model, processor = load_amorlip(arguments.model)
    data = find_gallery(arguments.data, arguments.data_dir)
    _make_output_folder(arguments.output)
    config = AmorLIPAmortizerConfig(head_type=arguments.head_type, size=arguments.size)
    accuracies = calibrate(model, processor, data, config, arguments.samples, arguments.steps)
    model.save_pretrained(arguments.output)
    processor.save_pretrained(arguments.output)
    if accuracies:
        values = ", ".join(f"{scoring} {100 * accuracy:.2f}" for scoring, accuracy in accuracies.items())
        print(f"accuracy over the other images, %: {values}")
    print(f"{arguments.head_type} heads fitted; the model is in {arguments.output}")


if __name__ == "__main__":
    sys.exit(main())
