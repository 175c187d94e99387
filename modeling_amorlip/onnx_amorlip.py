"""ONNX files of an exported program: model and towers in one pass, external data, and 8-bit weights."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

import torch
from torch.export import ExportedProgram


TOWERS = {
    "vision_model": (("pixel_values",), "image_embeds"),
    "text_model": (("input_ids", "attention_mask"), "text_embeds"),
}
"""Inputs and output of each tower, which are part of the whole model's."""
DEFAULT_OPSET = 18
EXTERNAL_DATA_BYTES = 1_500_000_000  # protobuf ends at 2 GiB; weights are not all of a file
QUANTIZED_OPERATORS = ["MatMul", "Gemm"]  # not Conv: 8-bit convolutions are missing from many runtimes


def save_onnx(
    program: ExportedProgram,
    folder: Path,
    axes: dict[str, dict[int, str]],
    outputs: list[str],
    *,
    opset: int = DEFAULT_OPSET,
    metadata: dict[str, str] | None = None,
) -> list[Path]:
    """
    Write `model.onnx`, `vision_model.onnx` and `text_model.onnx` into a folder, and return the paths of all files.

    The towers are cut out of the model's graph. Weights of large models lie beside it, in `NAME.onnx_data`.

    Args:
        axes: names of the program's inputs, in order, and of their dynamic axes.
        outputs: names of the program's outputs, in order.
        metadata: entries to store in each file.

    Raises:
        ValueError: the operators cannot be expressed in this opset.
    """
    import onnx_ir

    exported = torch.onnx.export(
        program,
        input_names=list(axes),
        output_names=outputs,
        dynamic_shapes=axes,  # names the axes; the program already has them dynamic
        opset_version=opset,
        dynamo=True,
        verbose=False,
    )
    assert exported is not None  # as torch.onnx.export promises with dynamo
    model = exported.model
    if (actual := model.opset_imports.get("", opset)) != opset:
        raise ValueError(f"The model cannot be written in ONNX opset {opset}, only in {actual}: pass --opset {actual}.")
    graphs = {"model": model.graph}
    for name, (inputs, output) in TOWERS.items():
        graphs[name] = onnx_ir.convenience.extract(model.graph, [i for i in inputs if i in axes], [output])
    paths = []
    for name, graph in graphs.items():
        part = onnx_ir.Model(graph, ir_version=model.ir_version, producer_name="amorlip", metadata_props=metadata)
        paths += _save(part, folder / f"{name}.onnx")
    return paths


def _save(model, path: Path) -> list[Path]:
    import onnx_ir

    size = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    data = path.with_name(f"{path.name}_data")
    data.unlink(missing_ok=True)  # of an earlier export
    if size < EXTERNAL_DATA_BYTES:
        onnx_ir.save(model, path)
        return [path]
    onnx_ir.save(model, path, external_data=data.name)
    return [path, data]


def quantize_onnx(path: Path) -> list[Path]:
    """Write an ONNX file's matrices in 8 bits, as `NAME_quantized.onnx`, and return the paths of all files."""
    import onnx_ir
    from onnxruntime.quantization import QuantType, quantize_dynamic

    has_data = path.with_name(f"{path.name}_data").is_file()
    output = path.with_name(f"{path.stem}_quantized.onnx")
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # it advises on preprocessing that the exporter has done
    try:
        # Written aside first, since onnxruntime names external data otherwise than transformers.js does.
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            raw = Path(folder) / output.name
            quantize_dynamic(
                path,
                raw,
                op_types_to_quantize=QUANTIZED_OPERATORS,
                per_channel=True,
                weight_type=QuantType.QUInt8,  # products with signed weights saturate on processors without VNNI
                use_external_data_format=has_data,
            )
            return _save(onnx_ir.load(raw), output)
    finally:
        logging.disable(disabled)
