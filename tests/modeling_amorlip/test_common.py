"""What Transformers' own tests ask of every model, asked of ours: any class, several encoders."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForImageClassification

from modeling_amorlip import (
    AmorLIPConfig,
    AmorLIPForImageClassification,
    AmorLIPModel,
    AmorLIPTextModelWithProjection,
    AmorLIPVisionModelWithProjection,
)
from tests.helpers.checkout import TINY


SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
WORDS = {"vocab_size": 60, "max_position_embeddings": 16, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
CLIP = {
    "vision_config": {**TINY["vision_config"], "attention_dropout": 0.0, "num_hidden_layers": 2},
    "text_config": {**SIZES, **WORDS, "model_type": "clip_text_model", "eos_token_id": 3},
}
DINO_BERT = {
    "vision_config": {**SIZES, "model_type": "dinov2", "image_size": 32, "patch_size": 16},
    "text_config": {
        **SIZES,
        **WORDS,
        "model_type": "bert",
        "hidden_dropout_prob": 0,
        "attention_probs_dropout_prob": 0,
    },
}
RESNET_GPT2 = {
    "vision_config": {
        "model_type": "amorlip_resnet",
        "width": 8,
        "depths": [1, 1, 1, 1],
        "num_attention_heads": 4,
        "image_size": 32,
        "output_dim": 24,
    },
    "text_config": {
        "model_type": "gpt2",
        **WORDS,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 16,
        "resid_pdrop": 0,
        "embd_pdrop": 0,
        "attn_pdrop": 0,
    },
}
PROTOTYPES = {"logit_bias_init_value": -10.0, "amortizer_config": {"head_type": "prototype", "size": 8}}
CASES = {
    "clip": (AmorLIPModel, {**CLIP, **PROTOTYPES}),
    "dinov2-bert": (AmorLIPModel, DINO_BERT),
    "resnet-gpt2": (AmorLIPModel, RESNET_GPT2),
    "classifier": (AmorLIPForImageClassification, {**CLIP, "num_labels": 5}),
}
every_case = pytest.mark.parametrize("case", CASES)
transformers_only = pytest.mark.parametrize("case", [name for name in CASES if name != "resnet-gpt2"])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(model, folder) of a case, made once."""
    made = {}

    def get(case):
        if case not in made:
            torch.manual_seed(0)
            model_class, fields = CASES[case]
            folder = tmp_path_factory.mktemp("model")
            model = model_class(AmorLIPConfig(**fields, projection_dim=24)).eval()
            model.save_pretrained(folder)
            made[case] = model, folder
        return made[case]

    return get


def load(saved, case, **kwargs):
    model, folder = saved(case)
    return type(model).from_pretrained(folder, **kwargs)


def make_inputs(model, number=4):
    """Pictures, with texts of different lengths, padded on either side, or labels."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(number, 3, 32, 32, generator=generator)
    if isinstance(model, AmorLIPForImageClassification):
        return {"pixel_values": pixels, "labels": torch.arange(number)}
    ids, mask = torch.ones(2, number, 9, dtype=torch.long)
    for row in range(number):
        length = 3 + 2 * row % 7
        tokens = torch.tensor([0, *torch.randint(5, 60, (length - 2,), generator=generator), 3])
        place = slice(0, length) if row % 2 else slice(9 - length, 9)
        ids[row, place], mask[row] = tokens, 0
        mask[row, place] = 1
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels, "return_loss": True}


def tensors(output) -> list:
    """All tensors of an output or tuple, at any depth."""
    values = output.values() if hasattr(output, "values") else output
    return [t for v in values for t in ([v] if isinstance(v, torch.Tensor) else tensors(v))]


def assert_same(first, second, **tolerances):
    first, second = tensors(first), tensors(second)
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, **tolerances)


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


# -- saving, loading, initialisation -----------------------------------------------------------------------------------


@every_case
def test_save_and_load(saved, case):
    model, _ = saved(case)
    loaded = load(saved, case)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert_same(loaded(**make_inputs(model)), model(**make_inputs(model)))
    assert loaded.config.to_dict().keys() == model.config.to_dict().keys()


@every_case
def test_weights_that_a_checkpoint_lacks_are_initialised(saved, case, tmp_path):
    """As in a fresh model: none is left as memory happened to be."""
    model, folder = saved(case)
    kept = sorted(model.state_dict())[0]
    save_file({kept: model.state_dict()[kept]}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    torch.use_deterministic_algorithms(True)  # what is allocated and not filled is then NaN
    try:
        loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    finally:
        torch.use_deterministic_algorithms(False)
    # Buffers that are not saved are no concern of a checkpoint.
    assert info["missing_keys"] == set(model.state_dict()) - {kept}
    torch.manual_seed(1)
    fresh = type(model)(model.config)
    for name, tensor in fresh.state_dict().items():
        other = loaded.state_dict()[name]
        assert other.isfinite().all(), name
        if tensor.is_floating_point() and tensor.numel() >= 256:
            assert other.std().item() == pytest.approx(tensor.std().item(), rel=0.25, abs=1e-6), name
        elif name != kept and tensor.numel() > 1 and tensor.unique().numel() == 1:
            assert torch.equal(other, tensor), name
    assert torch.equal(loaded.state_dict()[kept], model.state_dict()[kept])


@pytest.mark.parametrize("device_map", ["cpu", "auto"])
@pytest.mark.parametrize("case", ["dinov2-bert", "classifier"])
def test_device_map(saved, case, device_map):
    model, _ = saved(case)
    loaded = load(saved, case, device_map=device_map)
    assert_same(loaded(**make_inputs(model)), model(**make_inputs(model)))


@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(saved, case, dtype, tmp_path):
    model, _ = saved(case)
    inputs = make_inputs(model)
    loaded = load(saved, case, dtype=dtype)
    assert loaded.vision_model.dtype == dtype
    ours, exact = loaded(**inputs), model(**inputs)
    if "labels" in inputs:
        torch.testing.assert_close(ours.logits.float(), exact.logits, rtol=0, atol=0.05)
    else:
        assert ours.image_embeds.dtype == ours.text_embeds.dtype == dtype
        torch.testing.assert_close(ours.image_embeds.float(), exact.image_embeds, rtol=0, atol=0.02)
        torch.testing.assert_close(ours.text_embeds.float(), exact.text_embeds, rtol=0, atol=0.02)
    ours.loss.backward()
    loaded.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)  # in the dtype that it was saved in
    assert again.vision_model.dtype == dtype
    assert_same(again(**inputs), loaded(**inputs))


# -- the same numbers, however they are computed -----------------------------------------------------------------------


@every_case
def test_tuples_are_the_outputs(saved, case):
    model, _ = saved(case)
    inputs = make_inputs(model)
    options = {"output_hidden_states": True} if case != "resnet-gpt2" else {}
    as_tuple = model(**inputs, **options, return_dict=False)
    assert type(as_tuple) is tuple
    assert_same(as_tuple, model(**inputs, **options))


@transformers_only
def test_hidden_states_and_attentions(saved, case):
    model = load(saved, case, attn_implementation="eager")
    outputs = model(**make_inputs(model), output_hidden_states=True, output_attentions=True)
    sides = [outputs] if "classifier" in case else [outputs.vision_model_output, outputs.text_model_output]
    for side in sides:
        assert len(side.hidden_states) == 3 and len(side.attentions) == 2
        length = side.hidden_states[0].shape[1]
        assert side.hidden_states[-1].shape == (4, length, 32)
        assert side.attentions[0].shape == (4, 2, length, length)
    plain = model(**make_inputs(model))
    assert plain.get("hidden_states") is None and "attentions" not in (plain.get("vision_model_output") or {})


@transformers_only
def test_attention_implementations(saved, case):
    """Outputs and gradients."""
    found = {}
    for name in ("eager", "sdpa"):
        model = load(saved, case, attn_implementation=name)
        assert model.vision_model.config._attn_implementation == name
        outputs = model(**make_inputs(model))
        outputs.loss.backward()
        found[name] = outputs, gradients(model)
    eager, sdpa = found.values()
    # Rows of padding attend to nothing that matters; what the two make of them may differ.
    for key in ("logits", "logits_per_image", "image_embeds", "text_embeds", "loss"):
        if key in eager[0]:
            torch.testing.assert_close(eager[0][key], sdpa[0][key], rtol=1e-4, atol=1e-4)
    assert eager[1].keys() == sdpa[1].keys()
    for name, gradient in eager[1].items():
        torch.testing.assert_close(gradient, sdpa[1][name], rtol=1e-3, atol=1e-5)


@pytest.mark.slow  # test_capabilities.py compiles losses always
@pytest.mark.parametrize("case", ["clip", "dinov2-bert"])
def test_compiled(saved, case):
    model = copy.deepcopy(saved(case)[0])
    inputs = make_inputs(model)
    inputs.pop("return_loss", None)
    compiled = torch.compile(model, backend="aot_eager")
    for number in (4, 3):
        part = {name: tensor[:number] for name, tensor in inputs.items()}
        assert_same(compiled(**part), model(**part), rtol=1e-4, atol=1e-5)


@every_case
def test_one_by_one_is_as_in_a_batch(saved, case):
    model, _ = saved(case)
    inputs = make_inputs(model)
    inputs.pop("return_loss", None)
    with torch.inference_mode():
        together = model(**inputs)
        for row in range(4):
            alone = model(**{name: tensor[row : row + 1] for name, tensor in inputs.items()})
            for key in ("logits", "image_embeds", "text_embeds", "log_partition_per_image", "log_partition_per_text"):
                if key in alone:
                    torch.testing.assert_close(alone[key][0], together[key][row], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["clip", "dinov2-bert", "resnet-gpt2"])
def test_one_modality_alone(saved, case):
    model, folder = saved(case)
    inputs = make_inputs(model)
    pixels = inputs["pixel_values"]
    texts = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    both = model(**texts, pixel_values=pixels)
    image, text = model(pixel_values=pixels), model(**texts)
    for key in ("image_embeds", "log_partition_per_image"):
        torch.testing.assert_close(image[key], both[key])
        assert key not in text
    for key in ("text_embeds", "log_partition_per_text"):
        torch.testing.assert_close(text[key], both[key])
        assert key not in image
    assert "logits_per_image" not in image and "logits_per_text" not in text
    with pytest.raises(ValueError, match="nothing to embed"):
        model()

    vision, info = AmorLIPVisionModelWithProjection.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    features = model.get_image_features(pixels)
    torch.testing.assert_close(vision(pixels).image_embeds, features.pooler_output)
    torch.testing.assert_close(vision(pixels).last_hidden_state, features.last_hidden_state)
    words, info = AmorLIPTextModelWithProjection.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    torch.testing.assert_close(words(**texts).text_embeds, model.get_text_features(**texts).pooler_output)
    assert vision.num_parameters() + words.num_parameters() < model.num_parameters()


# -- embeddings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["clip", "dinov2-bert", "resnet-gpt2"])
def test_resizing_token_embeddings(saved, case, tmp_path):
    model = copy.deepcopy(saved(case)[0])
    inputs = make_inputs(model)
    before = model(**inputs)
    old = model.get_input_embeddings().weight.clone()
    assert model.resize_token_embeddings(70) is model.get_input_embeddings()
    assert model.get_input_embeddings().weight.shape == (70, 32)
    assert torch.equal(model.get_input_embeddings().weight[:60], old)
    assert model.config.text_config.vocab_size == model.text_model.config.vocab_size == 70
    assert_same(model(**inputs), before)
    inputs["input_ids"][:, 1] = 69
    model(**inputs)
    model.save_pretrained(tmp_path)
    assert_same(AutoModel.from_pretrained(tmp_path)(**inputs), model(**inputs))


@pytest.mark.parametrize("case", ["clip", "dinov2-bert", "resnet-gpt2"])
def test_input_embeddings(saved, case):
    model = copy.deepcopy(saved(case)[0])
    table = torch.nn.Embedding(60, 32)
    model.set_input_embeddings(table)
    assert model.get_input_embeddings() is table is model.text_model.get_input_embeddings()
    model(**make_inputs(model)).loss.backward()
    assert table.weight.grad.abs().sum() > 0


# -- classification ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["clip", "dinov2-bert", "resnet-gpt2"])
def test_classifier_on_a_trained_image_encoder(saved, case):
    model, folder = saved(case)
    classifier, info = AutoModelForImageClassification.from_pretrained(folder, num_labels=3, output_loading_info=True)
    assert isinstance(classifier, AmorLIPForImageClassification)
    assert info["missing_keys"] == {"classifier.weight", "classifier.bias"} and not info["unexpected_keys"]
    for name, tensor in model.vision_model.state_dict().items():
        assert torch.equal(classifier.vision_model.state_dict()[name], tensor)
    assert classifier.config.num_labels == 3 and model.config.num_labels == 2


@pytest.mark.parametrize(
    "num_labels, labels, loss",
    [
        (3, torch.tensor([0, 2, 1]), torch.nn.functional.cross_entropy),
        (3, torch.tensor([[1.0, 0, 1], [0, 0, 0], [0, 1, 1]]), torch.nn.functional.binary_cross_entropy_with_logits),
        (1, torch.tensor([0.3, -1, 2]), lambda logits, labels: ((logits[:, 0] - labels) ** 2).mean()),
    ],
    ids=["classes", "several-labels", "regression"],
)
def test_losses_of_the_classifier(num_labels, labels, loss):
    model = AmorLIPForImageClassification(AmorLIPConfig(**CLIP, num_labels=num_labels)).eval()
    outputs = model(torch.randn(3, 3, 32, 32), labels=labels)
    assert outputs.logits.shape == (3, num_labels)
    torch.testing.assert_close(outputs.loss, loss(outputs.logits, labels))
    assert model(torch.randn(3, 3, 32, 32)).loss is None


def test_the_classifier_learns():
    torch.manual_seed(0)
    model = AmorLIPForImageClassification(AmorLIPConfig(**CLIP, num_labels=2))
    labels = torch.tensor([0, 1]).repeat(8)
    pixels = torch.randn(16, 3, 32, 32) + labels.view(-1, 1, 1, 1)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(10):
        optimizer.zero_grad()
        model(pixels, labels=labels).loss.backward()
        optimizer.step()
    assert (model(pixels).logits.argmax(1) == labels).all()


# -- adapters ----------------------------------------------------------------------------------------------------------


def test_lora_on_both_towers(saved, tmp_path):
    torch.manual_seed(0)
    base, folder = saved("clip")
    inputs = make_inputs(base)
    before = base(**inputs)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(AutoModel.from_pretrained(folder), config)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    # Towers, layers, q and v, A and B.
    assert len(trained) == 2 * 2 * 2 * 2 and all("lora_" in name for name in trained)
    assert {name.split(".")[2] for name in trained} == {"vision_model", "text_model"}
    assert_same(model(**inputs), before)

    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), 1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        model(**inputs).loss.backward()
        optimizer.step()
    after = model.eval()(**inputs)
    assert after.loss < before.loss

    model.save_pretrained(tmp_path / "adapter")
    adapter = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert sum(t.numel() for t in adapter.values()) < 0.05 * base.num_parameters()
    again = PeftModel.from_pretrained(AutoModel.from_pretrained(folder), tmp_path / "adapter")
    assert_same(again(**inputs), after)
    merged = again.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    plain = AutoModel.from_pretrained(tmp_path / "merged")
    assert type(plain) is AmorLIPModel
    assert_same(plain(**inputs), after, rtol=1e-4, atol=1e-5)


def test_adapters_through_the_model_itself(saved):
    """`add_adapter`, which Transformers gives every model."""
    model, inputs = load(saved, "clip"), make_inputs(saved("clip")[0])
    before = model(**inputs)
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    assert not torch.allclose(model(**inputs).logits_per_image, before.logits_per_image)
    model.disable_adapters()
    assert_same(model(**inputs), before)


# -- quantisation ------------------------------------------------------------------------------------------------------


@pytest.mark.interop
def test_8_bit(tmp_path):
    from bitsandbytes.nn import Linear8bitLt
    from transformers import BitsAndBytesConfig

    torch.manual_seed(0)
    wide = {**CLIP["vision_config"], "hidden_size": 256, "intermediate_size": 512}
    model = AmorLIPModel(AmorLIPConfig(vision_config=wide, text_config=CLIP["text_config"]))
    model.eval().save_pretrained(tmp_path / "model")
    options = {"quantization_config": BitsAndBytesConfig(load_in_8bit=True), "device_map": "cpu"}
    small = AutoModel.from_pretrained(tmp_path / "model", **options)
    assert isinstance(small.vision_model.encoder.layers[0].self_attn.q_proj, Linear8bitLt)
    assert {parameter.dtype for parameter in small.amortizer.parameters()} == {torch.float32}
    assert small.vision_model.get_memory_footprint() < 0.6 * model.vision_model.get_memory_footprint()
    inputs = make_inputs(model)
    with torch.inference_mode():
        ours, exact = small(**inputs), model(**inputs)
    assert (ours.image_embeds * exact.image_embeds).sum(-1).min() > 0.99
    assert (ours.text_embeds * exact.text_embeds).sum(-1).min() > 0.99
    small.save_pretrained(tmp_path / "small")
    with torch.inference_mode():
        assert_same(AutoModel.from_pretrained(tmp_path / "small")(**inputs), ours)
