"""Figures of tokens in pieces of the positions against the same from whole logits, in PyTorch."""

import math
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from models import torch_token_stats
from models.torch_token_stats import ALIVE, TokenStats, hidden_states, logits_of, token_stats
from models.torch_value_head import forward
from training import ppo

VOCABULARY = 50
COMMON: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "vocab_size": VOCABULARY}
COMMON |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2, "pad_token_id": 0}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": False}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "gemma2": ("gemma2", {"head_dim": 8, "final_logit_softcapping": 3.0}),
    "granite": ("granite", {"logits_scaling": 8.0}),
    "cohere": ("cohere", {"logit_scale": 0.25}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "phi": ("phi", {}),  # its output layer has a bias
    "gpt_neox": ("gpt_neox", {}),
    "gpt2": ("gpt2", {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64}),
}
TOKENS = torch.tensor([[1, 2, 3, 4, 5, 6, 7], [11, 12, 13, 14, 15, 16, 17]])
POSITIONS = torch.tensor([[0, 6, 3], [5, 5, 1]])
TARGETS = torch.tensor([[4, 5, 6], [7, 8, 9]])
TEMPERATURE = 0.7
TWO_ROWS = 2 * ALIVE * 4 * VOCABULARY  # bytes: three pieces of the six positions


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(name, seed=0):
    family, settings = FAMILIES[name]
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**{**COMMON, **settings})).eval()


def whole(logits, ref_logits, targets=TARGETS):
    """The same from logits (B, C, V)."""
    return TokenStats(
        ppo.logprobs_from_logits(logits, targets, TEMPERATURE),
        logits.argmax(dim=-1) == targets,
        ppo.entropy_from_logits(logits, TEMPERATURE),
        ppo.logprobs_from_logits(ref_logits, targets, TEMPERATURE),
        ppo.full_kl(logits, ref_logits, TEMPERATURE),
    )


def in_pieces(model, reference, budget=TWO_ROWS):
    hidden = hidden_states(model, TOKENS, POSITIONS)
    of_reference = (reference, hidden_states(reference, TOKENS, POSITIONS))
    settings: dict[str, Any] = {"correct": True, "entropy": True, "logits_bytes": budget}
    return token_stats(model, hidden, TARGETS, TEMPERATURE, reference=of_reference, **settings)


def close(got, expected, tolerance=1e-5):
    assert got.shape == expected.shape
    if expected.dtype == torch.bool:
        assert torch.equal(got, expected)
        return
    scale = max(1.0, float(expected.detach().abs().max()))
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance * scale)


def gradients(model, stats):
    loss = stats.logprobs[0].sum() - 0.5 * stats.logprobs[1].sum() + 0.3 * stats.entropy.sum() + 2 * stats.kl.sum()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    return torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)


def check(model, reference):
    with torch.no_grad():
        ref_logits, _ = forward(reference, TOKENS, POSITIONS)
    logits, hidden = forward(model, TOKENS, POSITIONS)
    close(hidden_states(model, TOKENS, POSITIONS), hidden)
    close(logits_of(model, hidden.flatten(0, 1)), logits.flatten(0, 1))
    got, expected = in_pieces(model, reference), whole(logits, ref_logits)
    for figure, other in zip(got, expected, strict=True):
        close(figure, other)
    for gradient, other in zip(gradients(model, got), gradients(model, expected), strict=True):
        close(gradient, other)
    assert "forward" not in vars(model.base_model)  # the body is its own again
    close(forward(model, TOKENS, POSITIONS)[0], logits)


@pytest.mark.parametrize("name", FAMILIES)
def test_figures_and_gradients(name):
    check(build(name), build(name, seed=1))


def test_a_lora_on_the_output_layer():
    model = build("llama")
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["lm_head", "q_proj"], init_lora_weights=False)
    inject_adapter_in_model(lora, model)
    check(model, build("llama", seed=1))


def test_bfloat16_states_give_float32_figures():
    model = build("llama").bfloat16()
    hidden = hidden_states(model, TOKENS, POSITIONS).detach().requires_grad_()
    stats = token_stats(model, hidden, TARGETS, entropy=True, logits_bytes=TWO_ROWS)
    logits = forward(model, TOKENS, POSITIONS)[0]
    close(stats.logprobs, ppo.logprobs_from_logits(logits, TARGETS))
    close(stats.entropy, ppo.entropy_from_logits(logits))
    (slope,) = torch.autograd.grad(stats.logprobs.sum(), hidden)
    assert slope.dtype == torch.bfloat16 and slope.abs().sum() > 0


def test_a_token_that_is_ruled_out():
    """Its logit is −inf in policy and reference; the figures are those without it."""
    model = build("phi")
    with torch.no_grad():
        model.lm_head.bias[20] = -math.inf
    hidden = hidden_states(model, TOKENS, POSITIONS).detach().requires_grad_()
    reference = (model, hidden.detach() + 0.1)
    stats = token_stats(model, hidden, TARGETS, entropy=True, reference=reference, logits_bytes=1)
    keep = [token for token in range(VOCABULARY) if token != 20]
    logits, ref_logits = model.lm_head(hidden)[..., keep], model.lm_head(reference[1])[..., keep]
    plain = ppo.entropy_from_logits(logits), ppo.full_kl(logits, ref_logits)
    for figure, other in zip((stats.entropy, stats.kl), plain, strict=True):
        close(figure, other)
    slopes = [torch.autograd.grad(sum(figure.sum() for figure in each), hidden)[0]
              for each in ((stats.entropy, stats.kl), plain)]  # fmt: skip
    close(*slopes)


def test_nothing_as_wide_as_the_vocabulary_is_kept_for_the_backward_pass():
    model = build("llama").requires_grad_(False)
    hidden, targets = torch.randn(64, 32, requires_grad=True), torch.arange(64) % VOCABULARY
    kept = []

    def pack(tensor):
        kept.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ppo.logprobs_from_logits(model.lm_head(hidden), targets)
        assert any(VOCABULARY in shape for shape in kept)
        kept.clear()
        stats = token_stats(model, hidden, targets, entropy=True, logits_bytes=TWO_ROWS)
    assert not any(VOCABULARY in shape for shape in kept)
    torch.autograd.grad(stats.logprobs.sum() + stats.entropy.sum(), hidden)


def test_no_piece_is_larger_than_the_largest_array_of_mps(monkeypatch):
    """However much memory --logits-memory gives."""
    model, shapes = build("llama"), []
    hidden = hidden_states(model, TOKENS, POSITIONS).detach()
    expected = token_stats(model, hidden, TARGETS, logits_bytes=10**12)

    def noted(model, states):
        shapes.append(len(states))
        return logits_of(model, states)

    monkeypatch.setattr(torch_token_stats, "logits_of", noted)
    monkeypatch.setitem(torch_token_stats.LARGEST_ARRAY, "cpu", 4 * 4 * VOCABULARY + 3)
    close(token_stats(model, hidden, TARGETS, logits_bytes=10**12).logprobs, expected.logprobs)
    assert shapes == [1, 4, 2]  # the first for the vocabulary's size
