"""DPO, IPO and ORPO: losses by hand and by TRL 1.16's values, what is trained, the reference policy, whole runs."""

import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

import sft
from data.batching import Example, num_targets
from models.adapters import AdapterConfig, attach_adapter, read_adapter
from models.loading import load
from models.soft_prompt import soft_prompt_ids
from tests.frameworks import FRAMEWORKS
from tests.scripts import call, fails
from training import optimizer, preference_tuning, sft_loop
from training.checkpoint import Trainee
from training.evaluation import completion_logprobs
from training.losses import dpo_losses, ipo_losses, odds_ratio_losses
from training.metrics import read_metrics
from training.objectives import RewardModelling, stacked
from training.preference_tuning import PreferenceTuning, Reference, start_reference
from training.settings import SFTSettings

# Of TRL 1.16.0: DPOTrainer._compute_loss on these logprobs, for label smoothing its "aot" on one pair at a time, and
# ORPOTrainer.odds_ratio_loss on their means. The first half of the texts is chosen, the second rejected.
TRL = json.loads((Path(__file__).parent / "oracles/dpo_cases.json").read_text(encoding="utf-8"))

in_every_framework = pytest.mark.parametrize("framework", FRAMEWORKS, ids=str)
KINDS: dict[str, list[Any]] = {
    "lora": [],
    "dora": ["--fine-tune-type", "dora"],
    "full": ["--fine-tune-type", "full"],
    "soft prompt": ["--prompt-tuning", "--num-prompt-tokens", 5],
    "ipo": ["--loss", "ipo"],
    "orpo": ["--loss", "orpo"],
    "smoothed": ["--label-smoothing", 0.1],
}


# --- the losses ---


@in_every_framework
def test_dpo_by_hand(framework):
    chosen, rejected = framework.array([2.0, 1.0, -300.0]), framework.array([0.0, 1.0, 300.0])
    expected = [math.log1p(math.exp(-1)), math.log(2), 300.0]
    framework.close(dpo_losses(chosen, rejected, 0.5), expected)
    # With a tenth of the labels wrong: the other way round counts a tenth, and overconfidence costs.
    expected = [0.9 * a + 0.1 * b for a, b in zip(expected, [math.log1p(math.exp(1)), math.log(2), 0.0], strict=True)]
    framework.close(dpo_losses(chosen, rejected, 0.5, 0.1), expected)


@in_every_framework
def test_ipo_and_odds_ratio_by_hand(framework):
    framework.close(ipo_losses(framework.array([0.5, 3.0]), framework.array([0.25, -2.0]), 0.1), [4.75**2, 0.0])
    # Odds of 1 and 1/3: log σ(log 3) = log(3 / 4).
    half, quarter = framework.array([math.log(0.5)]), framework.array([math.log(0.25)])
    framework.close(odds_ratio_losses(half, quarter, 0.2), [-0.2 * math.log(0.75)])
    assert np.isfinite(framework.numpy(odds_ratio_losses(framework.array([0.0]), framework.array([-90.0]), 0.1))).all()


@in_every_framework
@pytest.mark.parametrize("case", range(len(TRL)))
def test_losses_are_those_of_trl(framework, case):
    case = TRL[case]
    sums = np.array([sum(text) for text in case["logprobs"]])
    lengths = np.array([len(text) for text in case["logprobs"]])
    ratios, beta = sums - np.array(case["reference"]), case["beta"]

    def halves(values) -> tuple[Any, Any]:
        chosen, rejected = np.split(values, 2)
        return framework.array(chosen), framework.array(rejected)

    framework.close(dpo_losses(*halves(ratios), beta).mean(), case["sigmoid"])
    framework.close(dpo_losses(*halves(ratios), beta, case["label_smoothing"]).mean(), case["smoothed"])
    framework.close(ipo_losses(*halves(ratios / lengths), beta).mean(), case["ipo"])
    framework.close(odds_ratio_losses(*halves(sums / lengths), beta).mean(), case["odds_ratio"])


@in_every_framework
def test_the_gradient_of_dpo_is_the_paper_s(framework):
    """−beta · σ(rejected reward − chosen reward) by the chosen log ratio, and its opposite (below eq. 7)."""
    chosen, rejected = np.array([1.0, -2.0]), np.array([0.5, 1.0])
    by_chosen, by_rejected = framework.gradients(lambda a, b: dpo_losses(a, b, 0.3).sum(), chosen, rejected)
    expected = -0.3 / (1 + np.exp(0.3 * (chosen - rejected)))
    framework.close(framework.array(by_chosen), expected)
    framework.close(framework.array(by_rejected), -expected)


# --- what is trained ---


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def pairs(count, seed):
    """Prompts of even numbers, after which an x is better than y, or than two."""
    rng = random.Random(seed)
    starts = [" ".join(str(2 * rng.randrange(50)) for _ in range(rng.randrange(1, 6))) for _ in range(count)]
    return [{"prompt": start, "chosen": " x", "rejected": " y" * (1 + i % 2)} for i, start in enumerate(starts)]


@pytest.fixture
def loaded(tiny_folder):
    return load(str(tiny_folder))


def tuning(loaded, path, batch_size=4, max_length=2048, **settings):
    prefix = soft_prompt_ids(loaded.model)
    objective = PreferenceTuning(loaded.tokenizer, prefix, batch_size, max_length, 0, **settings)
    objective.read(path)
    return objective


def test_only_completions_and_their_eos_count(loaded, tmp_path):
    row = {"prompt": "2 4", "chosen": " 6 8", "rejected": " 5"}
    objective = tuning(loaded, write_rows(tmp_path / "a.jsonl", [row]))
    texts, _ = objective.batch(0)
    targets, mask, owners = (np.array(array) for array in (texts.ids, texts.mask, texts.owners))
    found = [targets[(mask > 0) & (owners == text)].tolist() for text in (0, 1)]
    ids, start = loaded.tokenizer.encode, len(loaded.tokenizer.encode("2 4"))
    eos = loaded.tokenizer.eos_token_id
    assert found == [[*ids("2 4 6 8")[start:], eos], [*ids("2 4 5")[start:], eos]]


def test_messages_are_rendered_by_the_chat_template(loaded, tmp_path):
    asked = [{"role": "user", "content": "2 4"}]
    row = {"prompt": asked, "chosen": [{"role": "assistant", "content": "6"}], "rejected": "5"}
    plain = {"prompt": "2 4", "chosen": " 6", "rejected": " 5"}  # the embedded model's template adds nothing
    objectives = [tuning(loaded, write_rows(tmp_path / f"{i}.jsonl", [each])) for i, each in enumerate((row, plain))]
    assert objectives[0].examples == objectives[1].examples


def by_hand(loaded, rows, model=None):
    """Logprobs of chosen and rejected completions, each alone: (n, 2)."""
    tokenizer, model = loaded.tokenizer, model or loaded.model
    model.eval()
    found = []
    for row in rows:
        prompt = tokenizer.encode(row["prompt"])
        for name in ("chosen", "rejected"):
            whole = [*tokenizer.encode(row["prompt"] + row[name]), tokenizer.eos_token_id]
            found += completion_logprobs([model], tokenizer, [prompt], [whole[len(prompt) :]])[0].tolist()
    return np.array(found).reshape(-1, 2)


def moved(model, size=0.05):
    """Every trainable weight moved at random."""
    mx.random.seed(3)
    named = [(name, w + size * mx.random.normal(w.shape)) for name, w in tree_flatten(model.trainable_parameters())]
    model.load_weights(named, strict=False)


@pytest.mark.parametrize("limit", [10**9, 16 * 4 * 64 * 3])  # bytes: all logits at once, or of three targets
@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "orpo"])
def test_loss_rewards_and_gradient_are_those_of_texts_alone(loaded, tmp_path, loss, limit):
    """No pad, batch mate or piece of the logits changes them; and the reference is the model before it moved."""
    rows = pairs(4, seed=0)
    attach_adapter(loaded.model, AdapterConfig("full"))
    objective = tuning(loaded, write_rows(tmp_path / "a.jsonl", rows), loss=loss, beta=0.2, logits_bytes=limit)
    before = by_hand(loaded, rows)
    objective.refer_to(Reference(loaded.model, True))
    np.testing.assert_allclose(objective.reference.reshape(-1, 2), before, atol=1e-4)
    moved(loaded.model)
    after, lengths = by_hand(loaded, rows), np.array([[2, 2 + i % 2] for i in range(4)])

    (arrays,) = objective.batches()
    (got, figures), _ = nn.value_and_grad(loaded.model, objective.loss)(loaded.model, *arrays)
    ratios = after / lengths if loss == "orpo" else after - before
    if loss == "ipo":
        expected = np.mean((ratios[:, 0] / lengths[:, 0] - ratios[:, 1] / lengths[:, 1] - 2.5) ** 2)
    elif loss == "sigmoid":
        expected = np.mean(np.log1p(np.exp(-0.2 * (ratios[:, 0] - ratios[:, 1]))))
    else:
        odds = np.exp(ratios) / (1 - np.exp(ratios))
        expected = 0.2 * np.mean(np.log1p(odds[:, 1] / odds[:, 0])) - after[:, 0].sum() / lengths[:, 0].sum()
    assert got.item() == pytest.approx(expected, abs=1e-4)
    total, correct, count, *rewards = stacked(figures).tolist()
    assert total == pytest.approx(4 * expected, abs=1e-3) and count == 4
    assert correct == np.sum(ratios[:, 0] > ratios[:, 1])
    sums = 0.2 * ratios.sum(axis=0)
    assert rewards == pytest.approx([*sums, sums[0] - sums[1]], abs=1e-3)

    # One weight moved a little changes the loss by the gradient.
    (_, gradients), name = nn.value_and_grad(loaded.model, objective.loss)(loaded.model, *arrays), "model.norm.weight"
    gradient = np.array(dict(tree_flatten(gradients))[name])
    weight = loaded.model.model.norm.weight
    direction = mx.array(gradient / np.linalg.norm(gradient))
    ends = []
    for step in (1e-2, -1e-2):
        loaded.model.model.norm.weight = weight + step * direction
        ends.append(objective.loss(loaded.model, *arrays)[0].item())
    assert (ends[0] - ends[1]) / 2e-2 == pytest.approx(np.linalg.norm(gradient), rel=2e-2)


LONG = "2 4 6 8 10 12 14 16 18 20 22"


@pytest.mark.parametrize("loss", ["sigmoid", "orpo"])
@pytest.mark.parametrize("prompts", ["shared", "of one token", "soft"])
def test_a_prompt_that_is_read_once_changes_nothing(loaded, tmp_path, loss, prompts):
    """Loss, figures, gradients and the reference are those of texts with pads; one completion is cut away whole."""
    config = AdapterConfig("soft_prompt", num_prompt_tokens=3) if prompts == "soft" else AdapterConfig("full")
    attach_adapter(loaded.model, config)
    starts = ["2", "4", "6"] if prompts == "of one token" else [LONG, LONG[:8], f"{LONG} {LONG} {LONG}"]
    ends = [(" x" * 20, " y"), (" x", " y y"), (" x", " y")]
    rows = [{"prompt": a, "chosen": b, "rejected": c} for a, (b, c) in zip(starts, ends, strict=True)]
    path, most = write_rows(tmp_path / "a.jsonl", rows), len(loaded.tokenizer.encode(f"{LONG} {LONG}"))
    found = []
    for may_pack in (False, True):
        objective = tuning(loaded, path, max_length=most, loss=loss, may_pack=may_pack)
        objective.refer_to(Reference(loaded.model, False))
        (arrays,) = objective.batches()
        assert (arrays[0].layout is None) != may_pack and (len(arrays[0].tokens) == 1) == may_pack
        arrays = arrays[0], arrays[1] + mx.arange(6) / 10  # else all log ratios are 0
        (value, figures), gradients = nn.value_and_grad(loaded.model, objective.loss)(loaded.model, *arrays)
        gradient = np.concatenate([np.array(array).ravel() for _, array in tree_flatten(gradients)])
        found.append((objective.reference, value.item(), stacked(figures).tolist(), gradient))
    assert len(objective.examples[4].tokens) == len(objective.examples[5].tokens) == most or prompts == "of one token"
    for padded, packed in zip(*found, strict=True):
        np.testing.assert_allclose(packed, padded, atol=2e-4, rtol=1e-4)
    assert np.abs(found[0][3]).max() > 1e-3


def test_what_is_not_trained_within_a_completion_stays_so_end_to_end(loaded, tmp_path):
    row = {"prompt": "2 4 6", "chosen": " 8 10", "rejected": " 9 11"}
    objective = tuning(loaded, write_rows(tmp_path / "a.jsonl", [row] * 4))
    objective.examples = [e._replace(gaps=((e.first_target + 1, e.first_target + 2),)) for e in objective.examples]
    sums = []
    for objective.may_pack in (False, True):
        texts, _ = objective.batch(0)
        total, count, _ = objective._sums(loaded.model, texts, 8)
        assert count.tolist() == [num_targets(objective.examples[i]) for i in (0, 2, 4, 6, 1, 3, 5, 7)]
        sums.append(total)
    assert texts.layout is not None and mx.allclose(*sums, atol=1e-4)


def test_swapping_chosen_and_rejected_turns_the_gradient_round(loaded, tmp_path):
    attach_adapter(loaded.model, AdapterConfig("full"))
    rows = pairs(4, seed=0)
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    found = []
    for index, each in enumerate((rows, swapped)):
        objective = tuning(loaded, write_rows(tmp_path / f"{index}.jsonl", each))
        objective.refer_to(Reference(loaded.model, True))
        (_, figures), gradients = nn.value_and_grad(loaded.model, objective.loss)(loaded.model, *objective.batch(0))
        assert figures.loss.item() == pytest.approx(4 * math.log(2), abs=1e-4)
        found.append(np.array(gradients["model"]["norm"]["weight"]))
    assert np.abs(found[0]).max() > 1e-3
    np.testing.assert_allclose(found[1], -found[0], atol=1e-5)


def test_no_logits_of_prompts_and_no_whole_array_of_logits(loaded, tmp_path, monkeypatch):
    reached: list[int] = []
    plain = preference_tuning.token_stats

    def recorded(model, hidden, *args, **arguments):
        reached.append(len(hidden))
        return plain(model, hidden, *args, **arguments)

    monkeypatch.setattr(preference_tuning, "token_stats", recorded)
    rows = [{"prompt": "2 4 6 8 10 12 14 16 18 20 22", "chosen": " 24", "rejected": " 23"}] * 16
    objective = tuning(loaded, write_rows(tmp_path / "a.jsonl", rows), batch_size=16)
    objective.refer_to(Reference(loaded.model, True))
    texts, reference = objective.batch(0)
    objective.loss(loaded.model, texts, reference)
    targets = sum(map(num_targets, objective.examples))
    assert all(targets <= rows < targets + 32 for rows in reached) and len(reached) == 2
    assert targets < texts.tokens.size // 4


def test_rows_with_rewards_make_pairs_that_are_drawn_anew(loaded, tmp_path):
    rows = [{"text": f"2 {n}", "reward": n} for n in (4, 6, 8, 10)]
    path = write_rows(tmp_path / "a.jsonl", rows)
    objective, model = tuning(loaded, path), RewardModelling(loaded.tokenizer, [], 4, 2048, 0, 0.0)
    model.read(path)
    objective.refer_to(Reference(loaded.model, True))
    drawn = set()
    for step in range(12):
        (texts, reference), tokens = objective.batch(step), model.batch(step)[0]
        assert mx.array_equal(texts.tokens, tokens[:, :-1])  # the pairs are those of a reward model
        known = {tuple(e.tokens): r for e, r in zip(objective.examples, objective.reference.tolist(), strict=True)}
        texts = [tuple(row[: row.index(loaded.tokenizer.eos_token_id) + 1]) for row in tokens.tolist()]
        assert [known[text] for text in texts] == reference.tolist()
        drawn |= set(zip(texts[:4], texts[4:], strict=True))
    assert len(drawn) > 4


# --- the reference policy ---


@pytest.mark.parametrize(("may_pack", "together"), [(True, 8), (False, 0)])
def test_both_texts_of_a_pair_are_read_together_where_their_prompt_is_read_once(
    may_pack, together, loaded, tmp_path, monkeypatch
):  # fmt: skip
    """Else texts of one length are."""
    texts = [(f"{count} 4 6", " 8" * (1 + count), " 9" * (12 - count)) for count in range(8)]
    rows = [dict(zip(("prompt", "chosen", "rejected"), text, strict=True)) for text in texts]
    objective = tuning(loaded, write_rows(tmp_path / "a.jsonl", rows), batch_size=2, may_pack=may_pack)
    read, plain = list[list[Example]](), objective._texts

    def noted(examples):
        read.append(examples)
        return plain(examples)

    monkeypatch.setattr(objective, "_texts", noted)
    objective.refer_to(Reference(loaded.model, True))
    prompts = [[tuple(text.tokens[: text.first_target]) for text in batch] for batch in read]
    assert sum(batch.count(prompt) == 2 for batch in prompts for prompt in set(batch)) == together
    lengths = [len(text.tokens) for batch in read for text in batch]
    assert (sorted(lengths) == lengths) != may_pack
    expected = by_hand(loaded, rows).reshape(-1)
    assert objective.reference == pytest.approx(expected, rel=1e-5, abs=1e-5)


def trainee_of(loaded, adapter):
    return sft_loop.build_trainee(loaded, SFTSettings(dpo=True), adapter)


@pytest.mark.parametrize("kind", ["lora", "dora", "full", "soft_prompt"])
def test_the_reference_of_a_new_adapter_is_the_base(loaded, tiny_folder, tmp_path, kind):
    rows = pairs(6, seed=2)
    trainee = trainee_of(loaded, AdapterConfig(kind, num_prompt_tokens=3))
    objective = tuning(loaded, write_rows(tmp_path / "a.jsonl", rows))
    objective.refer_to(start_reference(trainee))
    expected = by_hand(loaded, rows, load(str(tiny_folder)).model)
    np.testing.assert_allclose(objective.reference.reshape(-1, 2), expected, atol=1e-4)


@pytest.mark.parametrize("kind", ["lora", "soft_prompt"])
def test_a_resumed_adapter_is_its_own_reference(tiny_folder, tmp_path, kind):
    first = load(str(tiny_folder))
    trainee = trainee_of(first, AdapterConfig(kind, num_prompt_tokens=3))
    moved(trainee.model)
    sft.save_adapter(tmp_path / "start", trainee.model, trainee.adapter)
    again = load(str(tiny_folder))
    trainee = trainee_of(again, str(tmp_path / "start"))
    rows = write_rows(tmp_path / "a.jsonl", pairs(6, seed=2))
    objective, base = tuning(again, rows), tuning(load(str(tiny_folder)), rows)
    objective.refer_to(start_reference(trainee))
    base.refer_to(Reference(load(str(tiny_folder)).model, True))
    assert np.abs(objective.reference - base.reference).max() > 0.1
    arrays = next(objective.batches())
    loss, figures = objective.loss(trainee.model, *arrays)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-5)
    assert np.abs(stacked(figures).tolist()[3:]).max() < 1e-4


def test_dropout_is_off_for_the_reference_and_on_afterwards(loaded, tmp_path):
    config = AdapterConfig(lora_parameters={"rank": 4, "scale": 10.0, "dropout": 0.5})
    trainee: Trainee = trainee_of(loaded, config)
    moved(trainee.model, 0.3)
    trainee.model.train()
    objective = tuning(loaded, write_rows(tmp_path / "a.jsonl", pairs(6, seed=2)))
    objective.refer_to(start_reference(trainee))
    first = objective.reference
    objective.refer_to(start_reference(trainee))
    assert np.array_equal(first, objective.reference) and trainee.model.training


# --- whole runs ---


@pytest.fixture
def flags(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sft, "plot_run", lambda folder: None)
    for seed, split in enumerate(("train", "valid", "test")):
        write_rows(tmp_path / f"pairs_{split}.jsonl", pairs(16, seed))

    def build(*more, run="run", **named):
        settings = {
            "model": tiny_folder, "data": tmp_path, "data-base": "pairs_", "iters": 9, "steps-per-report": 3,
            "steps-per-eval": 6, "save-every": 3, "save-file": f"{run}_adapter", "output-dir": run, **named,
        }  # fmt: skip
        return ["--dpo", *(word for name, value in settings.items() for word in (f"--{name}", value)), *more]

    return build


def arrays_of(path):
    return {name: np.array(array).tobytes() for name, array in read_adapter(path).weights.items()}


TIMES = ("steps_per_second", "tokens_per_second", "peak_memory_gb")


def rows_of(run):
    return [{k: v for k, v in row.items() if k not in TIMES} for row in read_metrics(run)]


def curve(run, name):
    return [row[name] for row in read_metrics(run) if name in row]


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_what_is_preferred_and_says_so(flags, kind):
    rate = {"soft prompt": 3e-2, "orpo": 3e-3}.get(kind, 1e-3)
    words = {"iters": 40, "steps-per-eval": 20, "batch-size": 8, "val-batches": -1, "learning-rate": rate}
    call(sft.main, *flags("--train", "--lora-layers", -1, *KINDS[kind], **words))
    losses, accuracy = curve("run", "valid_loss"), curve("run", "valid_accuracy")
    assert losses[-1] < losses[0] and accuracy[-1] == 1.0
    margins = [curve("run", f"{split}_reward_margin") for split in ("valid", "train")]
    assert margins[0][-1] > margins[0][0] and margins[1][-1] > 0
    chosen, rejected = (curve("run", f"valid_{name}_reward")[-1] for name in ("chosen", "rejected"))
    assert chosen - rejected == pytest.approx(margins[0][-1], abs=1e-4)
    if kind not in ("orpo", "ipo", "soft prompt"):
        assert losses[0] == pytest.approx(math.log(2), abs=1e-4) and abs(margins[0][0]) < 1e-4


def test_reports_and_summary_have_speed_and_memory(flags, capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    call(sft.main, *flags("--train"))
    reports = [row for row in read_metrics("run") if "train_loss" in row]
    assert len(reports) == 3 and all(row["tokens_per_second"] > 0 and row["peak_memory_gb"] > 0 for row in reports)
    summary = json.loads(Path("run/summary.json").read_text(encoding="utf-8"))
    assert summary["tokens_per_second"] > 0 and summary["peak_memory_gb"] == reports[-1]["peak_memory_gb"]
    shown = capsys.readouterr().out
    header = next(line for line in shown.splitlines() if line.startswith("  step"))
    assert header.split("  ")[-3:] == [" margin", "tokens/s", "peak GB"]  # where no bar shows them
    assert "  tokens/s  " in shown.partition("Summary")[2] and "  peak GB  " in shown.partition("Summary")[2]


def test_a_test_is_against_the_base_and_after_a_training_against_its_start(flags, capsys):
    call(sft.main, *flags("--train", "--test", **{"learning-rate": 2e-3, "iters": 30}))
    after = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("test_loss"))
    assert float(after.split("test_reward_margin: ")[1]) > 0
    call(sft.main, *flags("--test", "--resume-adapter-file", "run_adapter", run="unused"))
    assert after in capsys.readouterr().out.splitlines()


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


@pytest.mark.parametrize("kind", ["lora", "soft prompt", "orpo", "resumed"])
@pytest.mark.parametrize("killed_after", [2, 5])
def test_a_killed_and_resumed_run_equals_one_never_stopped(flags, monkeypatch, kind, killed_after):
    more = KINDS.get(kind, [])
    if kind == "resumed":
        call(sft.main, *flags("--train", run="start"))
        more = ["--resume-adapter-file", "start_adapter"]
    call(sft.main, *flags("--train", *more, run="whole"))
    real, done = sft_loop.update, []

    def deadly(*args):
        done.append(args)
        if len(done) > killed_after:
            raise Killed
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(sft_loop, "update", deadly)
        with pytest.raises(Killed):
            call(sft.main, *flags("--train", *more, run="cut"))
    if kind == "resumed" and killed_after == 5:
        weights = mx.load("start_adapter/adapters.safetensors")  # the reference of a run does not move with the file
        moved_weights = {name: array + 0.0 for name, array in weights.items()}
        shutil.copytree("start_adapter", "kept")
        mx.save_safetensors("start_adapter/adapters.safetensors", {n: 2 * a for n, a in moved_weights.items()})
    call(sft.main, "--resume", "cut")
    assert arrays_of("cut_adapter") == arrays_of("whole_adapter")
    assert rows_of("cut") == rows_of("whole")


def test_train_sft_is_the_script_without_files(flags, loaded, tmp_path):
    call(sft.main, *flags("--train", "--beta", 0.3))
    settings = SFTSettings(dpo=True, beta=0.3, iters=9, steps_per_report=3, steps_per_eval=6)
    trainee = trainee_of(loaded, AdapterConfig())
    rows = tmp_path / "pairs_train.jsonl", tmp_path / "pairs_valid.jsonl"
    history = sft_loop.train_sft(trainee, loaded.tokenizer, *rows, settings)
    assert [{k: v for k, v in row.items() if k not in TIMES} for row in history] == rows_of("run")


def test_a_compiled_step_is_the_plain_one(flags, monkeypatch):
    call(sft.main, *flags("--train", run="plain"))
    monkeypatch.setattr(optimizer, "compiling_pays", lambda: True)
    call(sft.main, *flags("--train", run="compiled"))
    for name in ("train_loss", "train_reward_margin", "valid_loss"):
        assert curve("compiled", name) == pytest.approx(curve("plain", name), abs=1e-4)


def test_the_default_rate_is_a_fifth_of_sft_s(flags):
    call(sft.main, *flags("--train", run="dpo", iters=1))
    call(sft.main, *flags("--train", "--loss", "orpo", run="orpo", iters=1))
    assert (curve("dpo", "learning_rate"), curve("orpo", "learning_rate")) == (
        [pytest.approx(1e-4)], [pytest.approx(5e-4)],
    )  # fmt: skip


# --- mistakes ---


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--reward-model"], "--dpo and --reward-model are both given"),
        (["--beta", 0], "--beta is 0"),
        (["--label-smoothing", 0.5], "--label-smoothing is 0.5"),
        (["--label-smoothing", 0.1, "--loss", "ipo"], "--label-smoothing does not serve --loss ipo"),
        (["--loss", "hinge"], "--loss"),
        (["--lora-layers", 0], "--lora-layers is 0"),
        (["--max-length", 2], "--max-length 2"),
    ],
)
def test_a_mistake_is_one_line(flags, capsys, tmp_path, words, named):
    assert named in fails(capsys, sft.main, *flags("--train", *words))
    assert not (tmp_path / "run").exists()


def test_settings_of_dpo_without_it_are_refused(flags, capsys):
    words = flags("--train", "--beta", 0.2)[1:]
    assert "--beta 0.2 is a setting of --dpo" in fails(capsys, sft.main, *words)


def test_other_rows_are_not_resumed_with(flags, capsys, tmp_path):
    call(sft.main, *flags("--train"))
    write_rows(tmp_path / "pairs_train.jsonl", pairs(5, seed=9))
    message = fails(capsys, sft.main, "--resume", "run")
    assert "is of other rows than train has now" in message
