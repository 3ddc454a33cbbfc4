"""PPO's held-out scores in MLX and PyTorch: which prompts, that training knows nothing of them, the best adapter."""

import json
from pathlib import Path

import pytest

import ppo_training
import pytorch_ppo_training
from models.adapters import read_adapter
from tests.scripts import call, fails
from tests.torch_models import random_llama
from training import ppo_flags, ppo_loop
from training.best import Best
from training.metrics import read_metrics

SCRIPTS = {"mlx": ppo_training, "torch": pytorch_ppo_training}
in_both = pytest.mark.parametrize("framework", SCRIPTS)


def test_the_best_is_the_first_of_equals_and_never_nan():
    loss, score = Best(), Best(higher=True)
    assert [loss.see(step, value) for step, value in enumerate([2.0, float("nan"), 1.0, 1.0, 3.0])] == [
        True, False, True, False, False,
    ]  # fmt: skip
    assert (loss.value, loss.step, loss.stale) == (1.0, 2, 2) and loss.exhausted(2) and not loss.exhausted(3)
    assert not loss.exhausted(0)
    assert [score.see(step, value) for step, value in enumerate([0.5, 0.4, 0.6])] == [True, False, True]


def prompts_of(tmp_path, *words):
    args = ppo_flags.ppo_parser("PPO.").parse_args(["--ground-truth-reward", *map(str, words)])
    return ppo_flags.hold_out(args, ppo_flags.choose_prompts(args, None))


def test_what_is_held_out_is_never_trained_on(tmp_path):
    trained, held_out = prompts_of(tmp_path, "--steps-per-eval", 5)
    assert held_out and not set(held_out) & set(trained)
    assert trained == prompts_of(tmp_path)[0] and prompts_of(tmp_path)[1] == []
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": str(n % 25)}) + "\n" for n in range(50)))
    trained, held_out = prompts_of(tmp_path, "--prompts", path, "--steps-per-eval", 5)
    assert len(held_out) == 3 and len(trained) == 44 and not set(held_out) & set(trained)
    assert prompts_of(tmp_path, "--prompts", path, "--steps-per-eval", 5, "--seed", 9)[1] == held_out


@pytest.fixture
def flags(framework, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = SCRIPTS[framework]
    monkeypatch.setattr(script, "plot_run", lambda folder: None)
    model = tiny_folder if framework == "mlx" else random_llama(tmp_path / "base")

    def build(*more, run="run", **named):
        settings = {
            "model": model, "batch-size": 4, "mini-batch-size": 4, "num-steps": 4, "max-completion-length": 6,
            "save-every": 3, "save-file": f"{run}_adapter", "output-dir": run, "lr-schedule": "constant",
            "init-kl-coef": 0.1, "learning-rate": 1e-3, **named,
        }  # fmt: skip
        words = [word for name, value in settings.items() for word in (f"--{name}", value)]
        return ["--ground-truth-reward", *words, *(["--device", "cpu"] if framework == "torch" else []), *more]

    return build


def weights(path):
    return {name: array.tolist() for name, array in read_adapter(path).weights.items()}


def rows_of(run):
    return [{k: v for k, v in row.items() if "second" not in k and "memory" not in k} for row in read_metrics(run)]


@in_both
def test_to_score_held_out_prompts_changes_nothing_else(flags, framework):
    main = SCRIPTS[framework].main
    call(main, *flags(run="plain"))
    call(main, *flags("--steps-per-eval", 3, run="scored"))
    scored = rows_of("scored")
    assert [row["step"] for row in scored if "held_out_score" in row] == [3, 4]
    assert [{k: v for k, v in row.items() if k != "held_out_score"} for row in scored] == rows_of("plain")
    assert weights("scored_adapter") == weights("plain_adapter")


@in_both
def test_the_best_adapter_is_saved_also_after_a_stop_and_an_early_end(flags, framework, monkeypatch, capsys):
    """Scores after steps 1, 2 and on: the best is after step 2. Stopped after step 1, whose best no longer counts."""
    main = SCRIPTS[framework].main
    call(main, *flags(run="two", **{"num-steps": 2}))
    told = iter([0.3, 0.5, 0.4, 0.45])
    monkeypatch.setattr(ppo_loop, "held_out_score", lambda *args: next(told))
    call(main, *flags("--steps-per-eval", 1, "--save-best", "--early-stopping", 2, run="best", **{"num-steps": 9}))
    said = capsys.readouterr().out
    assert "stopped early: none of the last 2 held-out scores was better than that of step 2" in said
    assert "the adapter saved is that of step 2" in said
    assert weights("best_adapter") == weights("two_adapter")
    assert [row["held_out_score"] for row in rows_of("best")] == [0.3, 0.5, 0.4, 0.45]
    summary = json.loads(Path("best/summary.json").read_text(encoding="utf-8"))
    assert (summary["steps"], summary["best_step"], summary["best_held_out_score"]) == (4, 2, 0.5)
    assert [path.name for path in Path("best/best").iterdir()] == ["000002"]
    # It is over: to resume it samples nothing and saves the same adapter.
    call(main, "--resume", "best")
    assert weights("best_adapter") == weights("two_adapter")


@pytest.mark.parametrize("framework", ["mlx"])
@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--save-best"], "--save-best goes by held-out scores; add --steps-per-eval"),
        (["--early-stopping", 2], "--early-stopping goes by held-out scores"),
        (["--steps-per-eval", -1], "--steps-per-eval is -1"),
        (["--steps-per-eval", 1, "--prompts", "one.jsonl"], "no prompt to hold out"),
    ],
)
def test_a_mistake_is_one_line(flags, framework, capsys, words, named):
    Path("one.jsonl").write_text('{"prompt": "2"}\n', encoding="utf-8")
    assert named in fails(capsys, ppo_training.main, *flags(*words))
    assert not Path("run").exists()
