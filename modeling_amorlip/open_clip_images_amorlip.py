"""OpenCLIP's preprocessing of images as an image processor of Transformers, and back."""

from __future__ import annotations

from typing import Any

from transformers import CLIPImageProcessor


RESAMPLING = {"bilinear": 2, "bicubic": 3}  # Pillow's numbers
FIELDS = {"size", "mode", "mean", "std", "interpolation", "resize_mode", "fill_color"}


def image_processor_from_open_clip(preprocess_cfg: dict[str, Any], image_size: int) -> CLIPImageProcessor:
    """
    Return an image processor that does what OpenCLIP's evaluation transform does with a `preprocess_cfg`.

    `resize_mode` `"shortest"` (the default) scales the shortest edge and crops the center, `"squash"` ignores the
    aspect ratio, and `"longest"` scales the longest edge and pads with black.

    Args:
        image_size: height and width that the vision encoder takes; OpenCLIP lets it replace `size`.

    Raises:
        ValueError: Transformers' CLIP image processor cannot do this.
    """
    if unknown := sorted(set(preprocess_cfg) - FIELDS):
        raise ValueError(f"open_clip_config.json: preprocess_cfg sets {unknown}; it is made of {sorted(FIELDS)}.")
    mode, interpolation = preprocess_cfg.get("resize_mode", "shortest"), preprocess_cfg.get("interpolation", "bicubic")
    square = {"height": image_size, "width": image_size}
    sizes = {
        "shortest": {"shortest_edge": image_size},
        "squash": square,
        "longest": {"max_height": image_size, "max_width": image_size},
    }
    _check("resize_mode", mode, tuple(sizes))
    _check("interpolation", interpolation, tuple(RESAMPLING))
    _check("mode", preprocess_cfg.get("mode", "RGB"), ("RGB",))
    if mode == "longest":  # where nothing is padded, the color does not matter
        _check("fill_color", preprocess_cfg.get("fill_color", 0), (0, [0, 0, 0]))
    options: dict[str, Any] = {"size": sizes[mode], "crop_size": square, "resample": RESAMPLING[interpolation]}
    for name in ("mean", "std"):
        if preprocess_cfg.get(name):
            options[f"image_{name}"] = list(preprocess_cfg[name])
    return CLIPImageProcessor(do_convert_rgb=True, **options)


def _check(field: str, value: Any, possible: tuple[Any, ...]) -> None:
    if value not in possible:
        raise ValueError(
            f"open_clip_config.json: preprocess_cfg.{field} is {value!r}; {', '.join(map(repr, possible))} can be "
            "converted."
        )


def open_clip_preprocess(image_processor, image_size: int) -> dict[str, Any]:
    """
    Return the `preprocess_cfg` by which OpenCLIP does what an image processor of Transformers does.

    Args:
        image_size: height and width that the vision encoder takes.

    Raises:
        ValueError: OpenCLIP's transform cannot do this.
    """
    square = {"height": image_size, "width": image_size}
    has_crop = bool(getattr(image_processor, "do_center_crop", False))
    size = _as_dict(image_processor.size) if image_processor.do_resize else None
    if has_crop and _as_dict(image_processor.crop_size) != square:
        raise ValueError(
            f"The image processor crops to {_as_dict(image_processor.crop_size)} and the encoder takes {image_size} "
            "pixels; make them equal."
        )
    if size == square:
        mode = "squash"
    elif size == {"shortest_edge": image_size} and has_crop:
        mode = "shortest"
    elif size == {"max_height": image_size, "max_width": image_size} and has_crop:
        mode = "longest"
    else:
        raise ValueError(
            f"The image processor resizes to {size} {'and crops' if has_crop else 'without a crop'}; OpenCLIP scales "
            f"an edge to the encoder's {image_size} pixels and crops or pads, or squashes."
        )
    interpolation = {number: name for name, number in RESAMPLING.items()}.get(int(image_processor.resample))
    if interpolation is None:
        raise ValueError(f"The image processor's resample is {image_processor.resample}; OpenCLIP has 2 and 3.")
    if not (image_processor.do_rescale and abs(image_processor.rescale_factor * 255 - 1) < 1e-6):
        raise ValueError("The image processor does not rescale by 1 / 255, which OpenCLIP does.")
    normalizes = image_processor.do_normalize
    return {
        "mode": "RGB",
        "mean": list(image_processor.image_mean) if normalizes else [0.0] * 3,
        "std": list(image_processor.image_std) if normalizes else [1.0] * 3,
        "interpolation": interpolation,
        "resize_mode": mode,
        "fill_color": 0,
    }


def _as_dict(size) -> dict[str, int]:
    return {name: value for name, value in dict(size).items() if value is not None}
