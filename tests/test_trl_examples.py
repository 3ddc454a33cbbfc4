"""Three examples in the shape of TRL 0.11's own: they run here with their import lines changed and nothing else.

With TRL_PYTHON naming the Python of TRL's environment (tests/trl_cases.py), they run there as they are, too.
"""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("datasets")

EXAMPLES = Path(__file__).parent / "trl_examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))
SIDES = {"mlx": "training", "torch": "training.torch_trainer"}


def ported(name, package):
    """The example's text for `package`, and the numbers of the lines that differ."""
    text = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    new = re.sub(r"^from trl(\.core)? import", f"from {package} import", text, flags=re.MULTILINE)
    lines = list(zip(text.splitlines(), new.splitlines(), strict=True))
    return new, [before for before, after in lines if before != after]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run an example on one side; what its module holds in the end."""

    def run(name, side, model):
        text, changed = ported(name, SIDES[side])
        assert changed and all(line.startswith(("from trl import ", "from trl.core import ")) for line in changed)
        script = tmp_path / f"{name}.py"
        script.write_text(text, encoding="utf-8")
        monkeypatch.setattr(sys, "argv", [str(script), str(model), str(tmp_path / "saved")])
        monkeypatch.chdir(tmp_path)
        return SimpleNamespace(**runpy.run_path(str(script)), saved=tmp_path / "saved")

    return run


def finite(history):
    for stats in history:
        for key in ("objective/kl", "ppo/loss/total", "ppo/mean_scores", "ppo/policy/approxkl", "ppo/val/error"):
            assert np.isfinite(stats[key]), key


@pytest.mark.parametrize("side", SIDES)
def test_sentiment_control(run, side, tiny_digits):
    done = run("sentiment_control", side, tiny_digits)
    assert len(done.history) == 2 * (48 // 16)
    finite(done.history)
    assert done.history[0]["objective/kl"] == pytest.approx(0, abs=1e-4)  # model and reference are one at first
    assert abs(done.history[-1]["objective/kl"]) > 1e-3
    assert done.ppo_trainer.kl_ctl.value < done.config.init_kl_coef  # far below the target
    assert {"env/reward_1", "env/reward_2", "objective/kl_dist", "mean_score"} <= done.stats.keys()
    assert all(len(response) == done.RESPONSE_LENGTH for response in done.response_tensors)  # no EOS ends them


@pytest.mark.parametrize("side", SIDES)
def test_detoxifying(run, side, tiny_digits):
    done = run("detoxifying", side, tiny_digits)
    finite(done.history)
    scores = [stats["ppo/mean_scores"] for stats in done.history]
    assert np.mean(scores[-2:]) > np.mean(scores[:2])
    again = type(done.model).from_pretrained(str(done.saved))
    assert abs(again.v_head.bias.tolist()[0]) > 0  # a head that has learned came back
    assert done.tokenizer.encode("4 8") == done.AutoTokenizer.from_pretrained(done.saved).encode("4 8")


@pytest.mark.parametrize("side", SIDES)
def test_best_of_n(run, side, tiny_digits):
    done = run("best_of_n", side, tiny_digits)
    finite(done.history)
    assert done.means["best_of"] > done.means["ref"] and done.means["tuned"] > done.means["ref"]
    assert len(done.ref_responses) == 16 and all(4 <= len(response) <= 7 for response in done.responses)
    assert done.model.is_peft_model and not done.ref_model.is_peft_model


@pytest.mark.parametrize("name", NAMES)
def test_they_run_under_trl_as_they_are(name, tiny_digits, tmp_path):
    python = os.environ.get("TRL_PYTHON")
    if not python:
        pytest.skip("TRL_PYTHON does not name the Python of an environment with TRL 0.11.4")
    model = shutil.copytree(tiny_digits, tmp_path / "model")
    settings = json.loads((model / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # TokenizersBackend is not in transformers of that time
    (model / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    command = [python, EXAMPLES / f"{name}.py", model, tmp_path / "saved"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
