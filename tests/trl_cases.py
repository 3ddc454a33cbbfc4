"""The 20 random cases in which PPOTrainer is held to TRL 0.11.4, and the recording of TRL's results.

    python benchmarks/ppo_step.py --make-trl-env ~/trl_env                 TRL's environment (1.4 GB), and a benchmark
    python -m tests.trl_cases --trl-python ~/trl_env/bin/python            writes tests/oracles/trl.safetensors anew

A case is three steps on a random Llama of two layers: its weights, those of the reference, TRL's options, and for each
step queries, responses and scores. All are drawn by NumPy's RandomState, whose numbers never change, so that only
results are kept. What TRL leaves to chance is fixed: the order of the rows in an update is ours.

Three faults of TRL are kept out of the cases, and docs/from_trl.md names them: it clips the first gradient of a run
alone, and use_score_scaling raises (trl_oracle.py repairs both); whitening leaves rewards on pads (whitened cases have
rows of one length). Accumulated cases have responses of one length: TRL averages pieces, which we weigh by tokens.
"""

import argparse
import json
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import load_file, save_file

from training import ppo_step
from training.trl_config import PPOConfig

ORACLES = Path(__file__).parent / "oracles" / "trl.safetensors"
ORACLE_SCRIPT = Path(__file__).parent / "trl_oracle.py"
CASES = 20
STEPS = 3
BATCH = 8
VOCABULARY = 24
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
}
LORA: dict[str, Any] = {"r": 2, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj", "down_proj"]}
# The stats that are compared; numbers, per step.
STATS = (
    *("objective/kl", "objective/kl_coef", "objective/entropy", "ppo/mean_non_score_reward", "ppo/mean_scores"),
    *("ppo/std_scores", "ppo/loss/policy", "ppo/loss/value", "ppo/loss/total", "ppo/policy/approxkl"),
    *("ppo/policy/policykl", "ppo/policy/clipfrac", "ppo/val/clipfrac", "tokens/queries_len_mean"),
    *("tokens/queries_len_std", "tokens/responses_len_mean", "tokens/responses_len_std"),
)
# Means over a step's mini batches in TRL, over the whole batch here: equal where a batch is one.
WHOLE_BATCH_STATS = ("ppo/returns/mean", "ppo/returns/var", "ppo/val/mean", "ppo/val/var")


class Step(NamedTuple):
    """What one call of `PPOTrainer.step` is given."""

    queries: list[list[int]]
    responses: list[list[int]]
    scores: list[float]


class Case(NamedTuple):
    """One case. Weights have transformers' names, those of a LoRA peft's."""

    number: int
    lora: bool
    options: dict[str, Any]
    steps: list[Step]
    policy: dict[str, np.ndarray]
    reference: dict[str, np.ndarray]
    adapter: dict[str, np.ndarray]
    head: dict[str, np.ndarray]


def linear_shapes() -> Iterator[tuple[str, tuple[int, int]]]:
    """Every linear layer of a block, with the shape of its weight."""
    hidden, inner = SIZES["hidden_size"], SIZES["intermediate_size"]
    kv = hidden * SIZES["num_key_value_heads"] // SIZES["num_attention_heads"]
    for block in range(SIZES["num_hidden_layers"]):
        for name, out in (("q_proj", hidden), ("k_proj", kv), ("v_proj", kv), ("o_proj", hidden)):
            yield f"model.layers.{block}.self_attn.{name}", (out, hidden)
        for name in ("gate_proj", "up_proj"):
            yield f"model.layers.{block}.mlp.{name}", (inner, hidden)
        yield f"model.layers.{block}.mlp.down_proj", (hidden, inner)


def llama_weights(draw: np.random.RandomState) -> dict[str, np.ndarray]:
    """Weights of a Llama whose logits are far from flat."""
    hidden = SIZES["hidden_size"]
    weights = {f"{name}.weight": 0.4 * draw.normal(size=shape) for name, shape in linear_shapes()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = 0.8 * draw.normal(size=(VOCABULARY, hidden))
    norms = [f"model.layers.{i}.{name}" for i in range(SIZES["num_hidden_layers"])
             for name in ("input_layernorm", "post_attention_layernorm")]  # fmt: skip
    for name in (*norms, "model.norm"):
        weights[f"{name}.weight"] = 1 + 0.1 * draw.normal(size=hidden)
    return {name: weight.astype(np.float32) for name, weight in weights.items()}


def lora_weights(draw: np.random.RandomState) -> dict[str, np.ndarray]:
    """A LoRA with no matrix at its beginning, by peft's names."""
    weights = {}
    for name, (out, into) in linear_shapes():
        if name.rpartition(".")[2] in LORA["target_modules"]:
            weights[f"base_model.model.{name}.lora_A.weight"] = 0.3 * draw.normal(size=(LORA["r"], into))
            weights[f"base_model.model.{name}.lora_B.weight"] = 0.3 * draw.normal(size=(out, LORA["r"]))
    return {name: weight.astype(np.float32) for name, weight in weights.items()}


def options_of(number: int, draw: np.random.RandomState) -> dict[str, Any]:
    """TRL's options of a case: some by its number, so that all kinds come up, the rest at random."""
    pieces = 2 if number % 5 == 4 else 1
    return {
        "seed": number,
        "batch_size": BATCH,
        "mini_batch_size": int(draw.choice([2, 4] if pieces == 2 else [2, 4, 8])),
        "gradient_accumulation_steps": pieces,
        "ppo_epochs": int(draw.randint(1, 4)),
        "learning_rate": float(10 ** draw.uniform(-3.5, -2.5)),
        "kl_penalty": ("kl", "abs", "mse", "full")[number % 4],
        "init_kl_coef": float(draw.uniform(0.05, 0.5)),
        "adap_kl_ctrl": number % 3 != 2,
        "target": float(draw.uniform(0.5, 8.0)),
        "horizon": 100.0,
        "gamma": float(draw.choice([1.0, 0.95])),
        "lam": float(draw.uniform(0.8, 1.0)),
        "cliprange": float(draw.uniform(0.05, 0.3)),
        "cliprange_value": float(draw.uniform(0.05, 0.3)),
        "vf_coef": float(draw.uniform(0.05, 1.0)),
        "whiten_rewards": number % 4 == 1,
        "use_score_scaling": number % 3 > 0,
        "use_score_norm": number % 3 > 1,
        "score_clip": float(draw.uniform(0.5, 1.5)) if number % 2 else None,
        "max_grad_norm": float(draw.uniform(0.2, 1.0)) if number % 7 > 3 else None,
    }


def rows_of(draw: np.random.RandomState, query: int | None, response: int | None) -> Step:
    """One step's batch. query, response: the length of all rows, or None for lengths at random."""

    def row(length: int | None) -> list[int]:
        return draw.randint(0, VOCABULARY, size=length or draw.randint(2, 8)).tolist()

    queries, responses = [row(query) for _ in range(BATCH)], [row(response) for _ in range(BATCH)]
    return Step(queries, responses, (1.5 * draw.normal(size=BATCH)).astype(np.float32).tolist())


def make_case(number: int) -> Case:
    """The case of this number: the first half full fine-tuning, the second LoRA."""
    draw = np.random.RandomState(number)
    options = options_of(number, draw)
    query = 4 if options["whiten_rewards"] else None
    response = 5 if query or options["gradient_accumulation_steps"] > 1 else None
    steps = [rows_of(draw, query, response) for _ in range(STEPS)]
    lora = number >= CASES // 2
    policy = llama_weights(draw)
    drift = {name: weight + 0.05 * draw.normal(size=weight.shape).astype(np.float32) for name, weight in policy.items()}
    head = {
        "weight": 0.3 * draw.normal(size=(1, SIZES["hidden_size"])).astype(np.float32),
        "bias": 0.3 * draw.normal(size=1).astype(np.float32),
    }
    return Case(number, lora, options, steps, policy, policy if lora else drift, lora_weights(draw), head)


def orders(case: Case) -> list[list[int]]:
    """The order of the rows in each epoch of each step, one after another, as training.ppo_step has it."""
    settings = PPOConfig(**case.options).settings()
    found: list[list[int]] = []
    for step in range(STEPS):
        pieces = [rows for _, batch in ppo_step.mini_batches(settings, step) for rows in batch]
        found += np.concatenate(pieces).reshape(settings.ppo_epochs, BATCH).tolist()
    return found


def run_trl(python: str | Path, cases: list[Case]) -> dict[str, np.ndarray]:
    """TRL's results by name, computed in its own environment. Raises CalledProcessError if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        task = [
            {"lora": LORA if case.lora else None, "options": case.options, "orders": orders(case),
             "steps": [step._asdict() for step in case.steps], "prefix": f"{case.number}/"}
            for case in cases
        ]  # fmt: skip
        description = {"sizes": SIZES, "stats": [*STATS, *WHOLE_BATCH_STATS], "cases": task}
        (Path(folder) / "task.json").write_text(json.dumps(description), encoding="utf-8")
        given = {
            f"{case.number}/{kind}/{name}": weight
            for case in cases
            for kind in ("policy", "reference", "adapter", "head")
            for name, weight in getattr(case, kind).items()
        }
        save_file(given, Path(folder) / "given.safetensors")
        subprocess.run([python, ORACLE_SCRIPT, folder], check=True)
        return load_file(Path(folder) / "results.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", required=True, metavar="PATH", help="Python of an environment with TRL 0.11.4")
    args = parser.parse_args()
    results = run_trl(args.trl_python, [make_case(number) for number in range(CASES)])
    save_file(results, ORACLES)
    print(f"{len(results)} arrays of {CASES} cases are in {ORACLES}")


if __name__ == "__main__":
    main()
