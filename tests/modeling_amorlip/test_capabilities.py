"""What users of Transformers do with any model: compile, export, replicate, accumulate, checkpoint, save and load."""

import copy
import functools
import json

import peft
import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoProcessor, CLIPConfig, CLIPModel, Trainer, TrainingArguments

from modeling_amorlip import (
    AmorLIPForImageClassification,
    AmorLIPModel,
    AmorLIPTextModelWithProjection,
    AmorLIPVisionModelWithProjection,
)
from modeling_amorlip.amortizer_amorlip import infonce_loss
from tests.helpers import distributed_trainer, hub_server, models
from tests.helpers.checkout import run
from tests.helpers.towers import (
    IMAGE,
    SIZES,
    TOWERS,
    WORDS,
    collate_pairs,
    make_config,
    make_inputs,
    make_rows,
    replicate,
    without_dropout,
)


CLASSES = (
    AmorLIPModel,
    AmorLIPVisionModelWithProjection,
    AmorLIPTextModelWithProjection,
    AmorLIPForImageClassification,
)
slow = pytest.mark.slow
every_pair = pytest.mark.parametrize("towers", TOWERS)


def make_model(towers, model_class=AmorLIPModel, layers=1, **fields):
    torch.manual_seed(0)
    return model_class(make_config(towers, layers=layers, **fields)).eval()


class Loss(nn.Module):
    """A model's loss as a function of tensors alone."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, pixel_values):
        return self.model(input_ids, pixel_values, attention_mask, return_loss=True).loss


@pytest.mark.e2e  # compilation and export take long
@pytest.mark.parametrize(
    "towers", [name if name in ("resnet-clip", "vit-gpt2") else pytest.param(name, marks=slow) for name in TOWERS]
)
def test_loss_compiles_as_one_graph_and_is_exported(towers):
    model = make_model(towers)
    inputs, loss = make_inputs(), Loss(model)
    expected = loss(**inputs)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(loss, backend="aot_eager", fullgraph=True)(**inputs), expected)
    program = torch.export.export(loss, (), kwargs=inputs)
    torch.testing.assert_close(program.module()(**inputs), expected)


@every_pair
def test_functional_gradients(towers):
    model = make_model(towers)
    loss, inputs = Loss(model), make_inputs()
    loss(**inputs).backward()
    weights = {name: parameter.detach() for name, parameter in loss.named_parameters()}
    gradients = torch.func.grad(lambda weights: torch.func.functional_call(loss, weights, (), inputs))(weights)
    for name, parameter in loss.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad)


def test_heads_learn_from_the_loss_without_changing_it():
    """The gradient of the heads is that of a regression on the batch's log-means; nothing else sees it."""
    model, inputs = make_model("clip", layers=2), make_inputs(8)
    outputs = model(**inputs, return_loss=True)
    labels, cross_entropy = torch.arange(8), nn.functional.cross_entropy
    logits = outputs.logits_per_image
    expected = (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2
    torch.testing.assert_close(outputs.loss, expected)
    towers = [*model.vision_model.parameters(), *model.text_model.parameters(), model.logit_scale]
    ours = torch.autograd.grad(outputs.loss, towers, retain_graph=True)
    for gradient, reference in zip(ours, torch.autograd.grad(expected, towers), strict=True):
        torch.testing.assert_close(gradient, reference)
    optimizer = torch.optim.Adam(model.amortizer.parameters(), 1e-2)
    scale, logits = model.logit_scale.exp(), logits.detach()
    for _ in range(400):
        predicted = model.amortizer(outputs.image_embeds, outputs.text_embeds, scale)
        optimizer.zero_grad()
        infonce_loss(logits, *predicted).backward()
        optimizer.step()
    target = logits.logsumexp(1) - torch.tensor(8.0).log()
    torch.testing.assert_close(predicted[0], target, rtol=0, atol=0.1)


def test_loss_of_different_numbers_names_them():
    inputs = make_inputs()
    with pytest.raises(ValueError, match="2 images and 3 texts"):
        make_model("clip")(inputs["input_ids"], inputs["pixel_values"][:2], return_loss=True)


@every_pair
def test_replicas_of_data_parallel(towers):
    model = make_model(towers)
    loss = replicate(model)(**make_inputs(), return_loss=True).loss
    torch.testing.assert_close(loss, model(**make_inputs(), return_loss=True).loss)
    loss.backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    classifier = make_model(towers, AmorLIPForImageClassification)
    replicate(classifier)(make_inputs()["pixel_values"], labels=torch.tensor([0, 1, 0])).loss.backward()
    assert classifier.classifier.weight.grad.any()


@pytest.mark.parametrize("reentrant", [False, True])
@every_pair
def test_gradient_checkpointing(towers, reentrant):
    model = without_dropout(make_model(towers)).train()
    checkpointed = copy.deepcopy(model)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        checkpointed.enable_input_require_grads()
    losses = [one(**make_inputs(), return_loss=True).loss for one in (model, checkpointed)]
    torch.testing.assert_close(losses[1], losses[0])
    sum(losses).backward()
    for (name, parameter), other in zip(model.named_parameters(), checkpointed.parameters(), strict=True):
        if parameter.requires_grad:
            torch.testing.assert_close(other.grad, parameter.grad, msg=lambda text, name=name: f"{name}: {text}")
    for (name, buffer), other in zip(model.named_buffers(), checkpointed.buffers(), strict=True):
        if "running" in name:
            torch.testing.assert_close(other, buffer)


@pytest.mark.parametrize("model_class", CLASSES)
@every_pair
def test_a_folder_means_the_class_that_saved_it(towers, model_class, tmp_path):
    make_model(towers, model_class).save_pretrained(tmp_path)
    loaded, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is model_class and not info["missing_keys"] and not info["unexpected_keys"]
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModel"] == f"modeling_amorlip.{model_class.__name__}"


@pytest.mark.parametrize("model_class", CLASSES)
@every_pair
def test_input_embeddings(towers, model_class):
    model = make_model(towers, model_class)
    encoder = model.text_model if hasattr(model, "text_model") else model.vision_model
    assert model.get_input_embeddings() is encoder.get_input_embeddings()
    replacement = copy.deepcopy(model.get_input_embeddings())
    model.set_input_embeddings(replacement)
    assert model.get_input_embeddings() is replacement


@every_pair
def test_flags_of_the_configuration(towers):
    config = make_config(towers)
    config.output_hidden_states = True
    outputs = AmorLIPModel(config).eval()(**make_inputs())
    assert outputs.vision_model_output.hidden_states and outputs.text_model_output.hidden_states
    config = make_config(towers)
    config.return_dict = False
    assert type(AmorLIPModel(config).eval()(**make_inputs())) is tuple
    model = AmorLIPModel._from_config(make_config(towers, layers=1), attn_implementation="eager").eval()
    outputs = model(**make_inputs(), output_attentions=True)
    assert len(outputs.text_model_output.attentions) == 1
    assert towers == "resnet-clip" or len(outputs.vision_model_output.attentions) == 1


# -- other encoders' configurations and weights ------------------------------------------------------------------------


@pytest.fixture
def clip_config():
    return CLIPConfig(vision_config={**SIZES, **IMAGE}, text_config={**SIZES, **WORDS, "eos_token_id": 3})


def test_from_encoders_takes_the_tower_of_a_dual_configuration(clip_config):
    before = clip_config.to_dict()
    for source in (clip_config, before):
        model = AmorLIPModel.from_encoders(source, source)
        assert model.config.vision_config.model_type == "clip_vision_model"
        assert model.config.text_config.model_type == "clip_text_model"
        assert model.config.vision_config.hidden_size == 32
    assert clip_config.to_dict() == before


def test_from_encoders_leaves_its_sources_untouched(clip_config):
    source = CLIPModel._from_config(clip_config, attn_implementation="eager").half()
    weights = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    config = source.config.to_dict()
    model = AmorLIPModel.from_encoders(source, source)
    nn.init.zeros_(model.get_input_embeddings().weight)
    assert model.dtype == torch.float32
    assert source.config.to_dict() == config
    assert source.vision_model.config._attn_implementation == source.config._attn_implementation == "eager"
    assert all(torch.equal(tensor, weights[name]) for name, tensor in source.state_dict().items())


# -- Trainer -----------------------------------------------------------------------------------------------------------


LABELS = {
    "single_label_classification": torch.tensor([0, 2, 1, 0, 1, 2, 2, 0]),
    "multi_label_classification": torch.tensor([[1.0, 0, 1], [0, 0, 0], [0, 1, 1], [1, 1, 1]] * 2),
    "regression": torch.tensor([[0.3, 1, 2], [-1, 0, 1], [2, 2, 2], [0, 1, 0]] * 2),
}


@pytest.mark.parametrize("problem_type", LABELS)
@every_pair
def test_gradient_accumulation_gives_the_gradient_of_one_step(towers, problem_type, tmp_path, monkeypatch):
    # Statistics of a batch would differ from those of its parts.
    monkeypatch.setattr(nn.BatchNorm2d, "train", lambda self, mode=True: nn.Module.train(self, False))
    pixels = make_inputs(8)["pixel_values"]
    rows = [{"pixel_values": p, "labels": y} for p, y in zip(pixels, LABELS[problem_type], strict=True)]
    results = []
    for steps in (1, 2, 4):
        fields = {"num_labels": 3, "problem_type": problem_type}
        model = without_dropout(make_model(towers, AmorLIPForImageClassification, **fields))
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=8 // steps,
            gradient_accumulation_steps=steps,
            max_steps=1,
            logging_steps=1,
            max_grad_norm=0.0,
            optim="sgd",
            lr_scheduler_type="constant",
            learning_rate=1.0,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        before = model.classifier.weight.detach().clone()
        trainer = Trainer(model, arguments, train_dataset=rows)
        trainer.train()
        results.append((trainer.state.log_history[0]["loss"], before - model.classifier.weight.detach()))
    for loss, gradient in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-3)
        torch.testing.assert_close(gradient, results[0][1], rtol=1e-3, atol=1e-5)


@pytest.mark.e2e
@pytest.mark.parametrize("option", ["torch_compile", "bf16_full_eval", "gradient_checkpointing"])
def test_trainer_with_the_models_own_loss(option, tmp_path):
    rows = make_rows(8)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        max_steps=2,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        prediction_loss_only=True,
        **{option: True},
        **({"torch_compile_backend": "aot_eager"} if option == "torch_compile" else {}),
    )
    trainer = Trainer(make_model("clip"), arguments, train_dataset=rows, eval_dataset=rows, data_collator=collate_pairs)
    trainer.can_return_loss = True
    if option != "bf16_full_eval":
        trainer.train()
    assert 0 < trainer.evaluate()["eval_loss"] < 10


def test_distributed_training_with_gradient_checkpointing(tmp_path):
    """A gradient arrives for every parameter, so that DistributedDataParallel does not wait."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = make_model("clip").train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        wrapped = nn.parallel.DistributedDataParallel(model)
        for _ in range(2):  # the second step is where a missing gradient raises
            wrapped(**make_inputs(), return_loss=True).loss.backward()
    finally:
        torch.distributed.destroy_process_group()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


@pytest.fixture(scope="module")
def trained_by_two_processes(tmp_path_factory):
    output = tmp_path_factory.mktemp("distributed") / "weights.pt"
    result = run("tests/helpers/distributed_trainer.py", output, launch=2)
    assert result.returncode == 0, result.stderr
    return torch.load(output)


@pytest.mark.e2e
@pytest.mark.parametrize("checkpointing", distributed_trainer.CHECKPOINTING)
@every_pair
def test_trainer_in_two_processes_takes_the_steps_of_one(towers, checkpointing, trained_by_two_processes):
    """Each process has half of the pairs; a step takes the mean of their gradients."""
    model = distributed_trainer.make_model(towers)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), distributed_trainer.LEARNING_RATE)
    rows = make_rows(distributed_trainer.PAIRS)
    for _ in range(distributed_trainer.STEPS):
        for half in (rows[:4], rows[4:]):
            (model(**collate_pairs(half)).loss / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        moved = trained_by_two_processes[towers, checkpointing][name] - before[name]
        torch.testing.assert_close(moved, parameter.detach() - before[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("targets", ["all-linear", ["fc1", "fc2"]])
def test_adapters_reach_the_heads(targets):
    """Names of CLIP's layers are names of the heads' too."""
    model = peft.get_peft_model(make_model("clip"), peft.LoraConfig(r=2, target_modules=targets))
    before = model(**make_inputs()).log_partition_per_image
    nn.init.ones_(model.base_model.model.amortizer.image_head.fc1.lora_B.default.weight)
    outputs = model(**make_inputs(), return_loss=True)
    assert not torch.allclose(outputs.log_partition_per_image, before)
    outputs.loss.backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


def test_dynamic_quantization():
    model = make_model("clip")
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    ours, exact = quantized(**make_inputs()), model(**make_inputs())
    torch.testing.assert_close(ours.image_embeds, exact.image_embeds, rtol=0, atol=0.1)
    torch.testing.assert_close(ours.log_partition_per_image, exact.log_partition_per_image, rtol=0, atol=0.1)


def test_a_class_of_a_notebook_is_saved_as_what_it_derives_from(tmp_path):
    """Its own code cannot be saved."""

    class Derived(AmorLIPTextModelWithProjection):
        __module__ = "__main__"

    model = Derived(make_config("clip", layers=1))
    model.save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModel"] == "modeling_amorlip.AmorLIPTextModelWithProjection"


def test_adapters_of_a_task_type():
    """PEFT's model for feature extraction passes `inputs_embeds=None`."""
    model, inputs = make_model("clip"), make_inputs()
    expected = model(**inputs).logits_per_image
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="FEATURE_EXTRACTION")
    assert torch.equal(peft.get_peft_model(model, config)(**inputs).logits_per_image, expected)


def test_adapters_save_the_embeddings(tmp_path):
    make = functools.partial(peft.LoraConfig, r=2, target_modules=["q_proj"])
    for model_class in (AmorLIPModel, AmorLIPTextModelWithProjection):
        model = peft.get_peft_model(make_model("clip", model_class), make())
        model.save_pretrained(tmp_path, save_embedding_layers=True)
        loaded = peft.PeftModel.from_pretrained(make_model("clip", model_class), tmp_path)
        assert torch.equal(loaded.get_input_embeddings().weight, model.get_input_embeddings().weight)


# -- the Hub -----------------------------------------------------------------------------------------------------------


def test_push_to_hub(tmp_path, monkeypatch):
    """Model and processor with their code; a model from the Hub is pushed with the same code again."""
    hub = hub_server.Hub()
    try:
        hub_server.connect(monkeypatch, hub, tmp_path)
        model, processor = models.make_model()
        pixels = make_inputs()["pixel_values"]
        model.push_to_hub("user/model")
        processor.push_to_hub("user/model")
        loaded = AutoModel.from_pretrained("user/model")
        assert torch.equal(loaded(pixel_values=pixels).image_embeds, model(pixel_values=pixels).image_embeds)
        assert type(AutoProcessor.from_pretrained("user/model")) is type(processor)
        loaded.push_to_hub("user/again")
        first, again = (hub.repositories[f"user/{name}"].at("main")[1] for name in ("model", "again"))
        code = {name for name in first if name.endswith(".py")}
        assert "modeling_amorlip.py" in code and all(again[name] == first[name] for name in code)
        AmorLIPVisionModelWithProjection(model.config).push_to_hub("user/vision")
        assert type(AutoModel.from_pretrained("user/vision")) is AmorLIPVisionModelWithProjection
    finally:
        hub.close()
