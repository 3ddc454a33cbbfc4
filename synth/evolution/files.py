"""Policies by name, and their files: policy.safetensors (a policy's whole state) and policy.json (its settings)."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from common.errors import UserError
from common.files import Kind, atomic_folder, write_json
from common.schemas import Schema, read_as
from synth.evolution.features import size_of
from synth.evolution.gradient import PPO, Reinforce
from synth.evolution.operators import ACTIONS
from synth.evolution.policy import DEFAULT, Constant, LinUCB, OperatorPolicy, PolicySettings

FORMAT = 1
ARRAYS, SETTINGS = "policy.safetensors", "policy.json"
LOG, PROGRESS = "choices.jsonl", "progress.json"  # of a policy in training
POLICY = Kind(SETTINGS, (ARRAYS, SETTINGS, LOG, PROGRESS), lambda content: "format" in content)
KINDS: dict[str, type[OperatorPolicy]] = {kind.kind: kind for kind in (Constant, LinUCB, Reinforce, PPO)}


def make_policy(kind: str, settings: PolicySettings = DEFAULT, names: Sequence[str] = ACTIONS) -> OperatorPolicy:
    """An untrained policy that chooses from `names`, of which the last is stop; "uniform" is a constant one."""
    made = KINDS["constant" if kind == "uniform" else kind](settings, len(names), size_of(names[:-1]))
    made.names = tuple(names)
    return made


class SavedPolicy(Schema):
    """policy.json."""

    format: int
    kind: str
    actions: list[str]
    features: int
    learning: PolicySettings


def write_policy(folder: Path, policy: OperatorPolicy) -> None:
    """Write policy.safetensors and policy.json into an existing folder."""
    save_file({name: np.array(array, order="C") for name, array in policy.arrays().items()}, folder / ARRAYS)
    kind = {"format": FORMAT, "kind": policy.kind, "actions": list(policy.names), "features": policy.size}
    write_json(folder / SETTINGS, {**kind, "learning": asdict(policy.settings)})


def save_policy(path: str | Path, policy: OperatorPolicy) -> None:
    """Write a policy's folder, atomically."""
    with atomic_folder(path, POLICY) as temporary:
        write_policy(temporary, policy)


def load_policy(path: str | Path, names: Sequence[str] = ACTIONS) -> OperatorPolicy:
    """The policy of a folder, bit for bit. Raises UserError if there is none, or it has other actions than `names`."""
    saved = read_as(SavedPolicy, Path(path) / SETTINGS, "train the policy again")
    if saved.format != FORMAT or saved.kind not in KINDS:
        raise UserError(f"{path} holds no policy of format {FORMAT}; train one with synth.evolve")
    if saved.actions != list(names) or saved.features != size_of(names[:-1]):
        raise UserError(f"{path} was made for other operators or features than this run's; train it again")
    policy = make_policy(saved.kind, saved.learning, names)
    try:
        found = load_file(Path(path) / ARRAYS)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} has no readable {ARRAYS} ({error}); train the policy again") from None
    expected = {name: array.shape for name, array in policy.arrays().items()}
    if {name: array.shape for name, array in found.items()} != expected:
        raise UserError(f"{path} holds other arrays than its {SETTINGS} says; train the policy again")
    policy.restore(found)
    return policy
