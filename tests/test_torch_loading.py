"""Opening a model in PyTorch: missing weights are an error, where transformers would initialise them at random."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForSequenceClassification

from common.errors import UserError
from models.torch_loading import load, weight_dtype
from tests.torch_models import random_llama

CPU = torch.device("cpu")


def change_weights(folder, change):
    path = f"{folder}/model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.parametrize("tied", [False, True])
def test_a_whole_folder_is_opened(tmp_path, tied):
    folder = random_llama(tmp_path, tie_word_embeddings=tied)
    weights = load_file(f"{folder}/model.safetensors")
    assert ("lm_head.weight" in weights) != tied
    opened = dict(load(folder, CPU).model.named_parameters())
    assert all(torch.equal(opened[name], weight) for name, weight in weights.items())


def test_an_eos_that_is_no_token_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"has 1000 as eos_token_id, which is none of its .* tokens; correct it"):
        load(random_llama(tmp_path, eos_token_id=1000), CPU)


@pytest.mark.parametrize(("device", "dtype"), [("cpu", torch.float32), ("cuda", "auto"), ("mps", "auto")])
def test_a_gpu_holds_the_weights_as_they_were_saved(device, dtype):
    """In float32 a model of 7 B takes 30 GB, more than most Macs have."""
    assert weight_dtype(torch.device(device)) == dtype


def test_a_folder_that_lacks_weights_is_one_line(tmp_path):
    folder = random_llama(tmp_path, tie_word_embeddings=False)
    change_weights(folder, lambda weights: [weights.pop(name) for name in list(weights) if "layers.1.mlp" in name])
    with pytest.raises(UserError, match=r"lacks 3 of the model's tensors.*model\.layers\.1\.mlp\.down_proj\.weight"):
        load(folder, CPU)


def test_a_weight_of_another_shape_is_one_line(tmp_path):
    folder = random_llama(tmp_path)
    change_weights(folder, lambda weights: weights.update({"model.norm.weight": torch.ones(7)}))
    with pytest.raises(UserError) as caught:
        load(folder, CPU)
    assert folder in str(caught.value) and "\n" not in str(caught.value)


def test_a_classifier_without_its_head_is_one_line(tmp_path):
    policy = random_llama(tmp_path / "policy")
    with pytest.raises(UserError, match=r"lacks 1 of the model's tensors.*score\.weight"):
        load(policy, CPU, classifier=True)
    classifier = random_llama(tmp_path / "classifier", LlamaForSequenceClassification, num_labels=1)
    assert load(classifier, CPU, classifier=True).model.score.weight.shape == (1, 32)
