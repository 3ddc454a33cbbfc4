"""A run from task to trained model, its flags, and what it says of mistakes before it begins."""

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import fuse
import ppo_training
import sft
from benchmarks.crash import repeated
from common.errors import UserError
from common.files import read_json
from synth import run as module
from synth.offline.server import OfflineTeacher
from synth.pipeline import flags as run_flags
from synth.pipeline import train as training
from synth.pipeline.pass_rates import BaseModelSettings, base_model_settings
from synth.stages import drop, kept, load_rows, new_row, roots_of
from synth.task import load_task
from tests.scripts import ROOT, call, fails, with_words
from tests.test_difficulty import Adder
from tests.test_task import save
from training.metrics import read_metrics, start_run_folder
from training.ppo_loop import PPORun

SUMS = ["--task", "tests/sums.yaml", "--count", 12, "--votes", 4, "--rounds", 1, "--wanted", 8]
SUMS += ["--rollouts", 2, "--max-rollouts", 2, "--concurrency", 4]
TINY = ["--rule", "random", "--max-completion-length", 3, "--num-steps", 2, "--batch-size", 4]
SCRIPTS = {"ppo_training.py": ppo_training, "sft.py": sft, "fuse.py": fuse}


@pytest.fixture
def teacher():
    with OfflineTeacher() as server:
        yield server


@pytest.fixture
def evaluation(tmp_path):
    rows = [{"input": f"{n} + 1 =", "output": str(n + 1)} for n in range(3)]
    path = tmp_path / "evaluation.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def asked_of(server):
    return ["--teacher-url", server.url, "--teacher-model", "m"]


def in_this_process(monkeypatch):
    """Training scripts are called and not started, which would cost seconds each. Returns their command lines."""
    started = []

    def run_script(words, go_on, files=()):
        started.append(list(words))
        call(SCRIPTS[words[0]].main, *words[1:])

    monkeypatch.setattr(training, "run_script", run_script)
    for script in (ppo_training, sft):
        monkeypatch.setattr(script, "plot_run", lambda folder: folder / "curves.png")
    return started


def test_from_task_to_trained_model(tmp_path, tiny_folder, teacher, evaluation, monkeypatch, capsys):
    started, folder = in_this_process(monkeypatch), tmp_path / "run"
    words = [*SUMS, *TINY, *asked_of(teacher), "--base-model", tiny_folder, "--output-dir", folder]
    words += ["--dataset-path", evaluation, "--training-flags=--num-generations 2"]
    call(module.main, *words)
    rows = {name: load_rows(folder / f"{name}.jsonl") for name in ("generate", "verify", "difficulty", "selection")}
    assert len(rows["generate"]) == 12 and all(row["votes"] for row in kept(rows["verify"]))
    assert {row["origin"] for row in rows["difficulty"]} == {"generated", "easier"}
    # What is held out is trained on by none.
    held_out, trained = load_rows(folder / "held_out.jsonl"), kept(rows["selection"])
    roots = roots_of(rows["difficulty"])
    families = [{roots[row["id"]] for row in some} for some in (kept(rows["difficulty"]), held_out, trained)]
    assert len(families[1]) == round(0.2 * len(families[0])) > 0 and not families[1] & families[2]
    assert len(held_out) == sum(roots[row["id"]] in families[1] for row in kept(rows["difficulty"]))
    prompts = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    turns = [[{"role": "user", "content": row["input"]}] for row in trained]
    assert prompts == [{"messages": turn, "answer": row["output"]} for turn, row in zip(turns, trained, strict=True)]
    assert started[0][started[0].index("--answer") + 1] == '{"type": "number"}'
    assert len(read_metrics(folder / "training")) == 2
    checkpoints = read_json(folder / "checkpoints.json")
    assert [row["step"] for row in checkpoints["checkpoints"]] == [0, 1, 2] and checkpoints["held_out"] == len(held_out)
    assert (folder / "adapter" / "adapters.safetensors").is_file()
    result = read_json(folder / "evaluation.json")
    assert (
        result["questions"] == 3 and result["base"]["mean"] == 0.0 and set(result["trained"]) == {"mean", "low", "high"}
    )
    assert read_json(folder / "ledger.json")["total"]["calls"] == teacher.calls
    out = capsys.readouterr().out
    page = (folder / "report.html").read_text()
    assert f"Mean score on {len(held_out)} held-out samples by step" in page and "Mean score by step: training" in page
    assert "Mean score on the 3 questions of the evaluation set" in page and "Not in the run folder" not in page
    assert page.count('"outcome":"held out"') == len(held_out) and "Task: tests/sums.yaml." in page
    for line in ("generate: kept 12 of 12", "verify: kept", "pass rates before:", "pass rates after:", "held out: ",
                 "selection: kept", "checkpoint: step", "evaluation on 3 questions",
                 f"warning: {len(trained)} samples to train on"):  # fmt: skip
        assert line in out

    # Again: nothing is asked, drawn or trained.
    calls = teacher.calls
    monkeypatch.setattr(BaseModelSettings, "open", None)
    call(module.main, "--resume", folder)
    assert teacher.calls == calls and len(started) == 1 and "(finished before:" in capsys.readouterr().out


def tried(row_id, rate, parent=None):
    return {**new_row(row_id, row_id, "1", "generated", parent), "pass_rate": rate, "rollouts": 8}


def settings_of(*words):
    args = with_words(lambda: run_flags.parse_run_args(None), "--task", ROOT / "synth/tasks/arithmetic.yaml", *words)
    return run_flags.run_settings(args, run_flags.task_from(args)), args


@pytest.mark.parametrize("words", [[], ["--held-out-of", "selected"]])
def test_no_sample_is_held_out_whose_twin_is_trained_on(tmp_path, words):
    """g0h is made from g0, g0he from g0h; where g0h itself was dropped, g0he still belongs to g0."""
    rows = []
    for n in range(20):
        rows += [tried(f"g{n}", 0.4), tried(f"g{n}h", 0.5, f"g{n}"), tried(f"g{n}he", 0.6, f"g{n}h")]
    rows[1] = drop(rows[1], "tie")
    for seed in range(5):
        settings, _ = settings_of(*words, "--seed", seed, "--held-out", 0.25)
        held_out, trained = module.split(settings, rows, tmp_path)
        families = [{row["id"].rstrip("he") for row in some} for some in (held_out, trained)]
        assert len(families[0]) == 5 and len(families[1]) == 15 and not families[0] & families[1]
        assert len(held_out) + len(trained) == 59
    settings, _ = settings_of(*words, "--held-out", 0.9)
    assert [len(some) for some in module.split(settings, rows[:6], tmp_path)] in ([2, 3], [3, 2])  # never all of them


def test_the_papers_selection_is_from_all_samples_and_the_default_from_what_is_not_held_out(tmp_path):
    rows = [tried(f"g{n}", n / 20) for n in range(20)]
    lowest = {f"g{n}" for n in range(10)}
    words = ["--rule", "lowest", "--select", 10]
    for of, same in (("selected", True), ("all", False)):
        settings, _ = settings_of(*words, "--held-out-of", of)
        held_out, trained = module.split(settings, rows, tmp_path)
        assert ({row["id"] for row in [*held_out, *trained]} == lowest) is same
        assert len(held_out) == (2 if same else 4)


def test_paper_is_printed_as_the_flags_it_stands_for_and_ones_own_flags_go_before_it(tmp_path):
    settings, args = settings_of("--paper", "--select", 300)
    assert settings.selection.rule == "lowest" and settings.selection.never_solved and settings.selection.count == 300
    assert settings.samples.spread.rewrite == "all" and settings.samples.spread.rounds == 1
    assert (settings.samples.count, settings.samples.voting.votes) == (500, 16) and settings.samples.voting.own
    assert (settings.samples.tries.first, settings.samples.tries.most) == (64, 64)
    assert settings.held_out_of == "selected" and settings.training.script_flags == "--num-generations 16"
    line = run_flags.paper_line(args)
    assert line.endswith("(your own: select)") and "--rule lowest" in line and "--select 300" in line
    assert "--training-flags '--num-generations 16'" in line
    # The line is the run: with these flags and without --paper the settings are the same.
    words = shlex.split(line.removeprefix("--paper: ").removesuffix(" (your own: select)"))
    again = [f"{flag}={value}" for flag, value in zip(words[::2], words[1::2], strict=True)]
    assert settings_of(*again)[0] == settings
    (tmp_path / "own.yaml").write_text("paper: true\ncount: 7\n")
    assert settings_of("-c", tmp_path / "own.yaml")[0].samples.count == 7
    sft, args = settings_of("--paper", "--train-by", "sft")
    assert sft.training.script_flags == "" and "advantage" not in run_flags.paper_line(args)


def test_samples_that_are_all_unsolved_are_trained_on_with_a_warning(tmp_path, capsys):
    settings, _ = settings_of()
    held_out, trained = module.split(settings, [tried(f"g{n}", 0.0) for n in range(5)], tmp_path)
    assert len(held_out) == 1 and len(trained) == 4
    said = capsys.readouterr().out
    assert "warning: of 4 samples the base model solved 4 never and 0 always, in 8 rollouts each" in said
    assert "training on the lowest pass rates instead of --rule band" in said
    _, trained = module.split(settings, [tried("g0", 0.0)], tmp_path)
    assert [row["id"] for row in trained] == ["g0"]


def test_rows_of_ones_own_choose_the_checkpoint_in_place_of_samples(tmp_path, evaluation, capsys):
    settings, args = settings_of("--validation-path", evaluation)
    validation = run_flags.task_from(args).validation
    held_out, trained = module.split(settings, [tried(f"g{n}", 0.4) for n in range(10)], tmp_path, validation)
    assert len(trained) == 10 and [(row["id"], row["input"]) for row in held_out] == [
        ("v1", "0 + 1 ="), ("v2", "1 + 1 ="), ("v3", "2 + 1 =")
    ]  # fmt: skip
    assert "held out: 3 rows of your own" in capsys.readouterr().out


def test_sft_on_the_same_samples(tmp_path, tiny_folder, teacher, monkeypatch):
    started, folder = in_this_process(monkeypatch), tmp_path / "run"
    words = [*SUMS, *TINY, *asked_of(teacher), "--base-model", tiny_folder, "--output-dir", folder, "--train-by", "sft"]
    call(module.main, *words, "--rounds", 0)
    assert started[0][0] == "sft.py" and (folder / "adapter" / "adapters.safetensors").is_file()
    first = json.loads((folder / "sft" / "train.jsonl").read_text().splitlines()[0])
    row = kept(load_rows(folder / "selection.jsonl"))[0]
    assert [turn["content"] for turn in first["messages"]] == [row["input"], row["output"]]
    assert not (folder / "evaluation.json").exists()


def test_a_training_that_was_stopped_goes_on(tmp_path, tiny_folder, teacher, monkeypatch):
    started, folder = in_this_process(monkeypatch), tmp_path / "run"
    words = [*SUMS, *TINY, *asked_of(teacher), "--base-model", tiny_folder, "--output-dir", folder, "--rounds", 0]

    def fail(*_):
        raise UserError("full disk")

    with monkeypatch.context() as patched:
        patched.setattr(ppo_training, "save_adapter", fail)
        with pytest.raises(UserError, match="full disk"):
            call(module.main, *words, "--training-flags=--num-generations 2")
    call(module.main, "--resume", folder)
    assert started[1][:2] == ["ppo_training.py", "--resume"] and (folder / "training" / "summary.json").is_file()


def test_a_folder_of_another_kind_is_no_trainings(tmp_path, tiny_folder, teacher, monkeypatch):
    """A model's folder has a config.json too, which must outlive a mistaken --work-model-paths."""
    words = [*SUMS, *TINY, *asked_of(teacher), "--base-model", tiny_folder, "--output-dir", tmp_path / "run"]
    words += ["--training-flags=--num-generations 2"]
    with pytest.raises(UserError, match="already holds a run or a model"):
        call(module.main, *words, "--work-model-paths", tiny_folder)
    assert teacher.calls == 0
    in_this_process(monkeypatch)
    (tmp_path / "run" / "training").mkdir(parents=True)
    (tmp_path / "run" / "training" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="something other"):
        call(module.main, *words)
    assert (tmp_path / "run" / "training" / "config.json").read_text() == "{}"
    # Its own training, killed before its first checkpoint, begins anew.
    (tmp_path / "run" / "training" / "config.json").unlink()

    def killed(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PPORun, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            call(module.main, "--resume", tmp_path / "run")
    assert (tmp_path / "run" / "training" / "config.json").is_file()
    assert not list((tmp_path / "run" / "training").glob("checkpoints/*"))
    call(module.main, "--resume", tmp_path / "run")
    assert (tmp_path / "run" / "training" / "summary.json").is_file()


def test_with_a_teacher_that_fails_often_the_run_ends_and_says_what_was_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(BaseModelSettings, "open", lambda self: Adder())
    monkeypatch.setattr(module, "split", lambda *_: sys.exit(0))
    with OfflineTeacher(malformed_rate=0.3, refusal_rate=0.2) as server:
        with pytest.raises(SystemExit):
            call(module.main, *SUMS, "--count", 30, *asked_of(server), "--output-dir", tmp_path / "run")
        assert read_json(tmp_path / "run" / "ledger.json")["total"]["calls"] == server.calls
    rows = load_rows(tmp_path / "run" / "generate.jsonl")
    assert [row["id"] for row in rows] == [f"g{n}" for n in range(1, 31)] and len(kept(rows)) > 10
    reasons = {row["dropped"] for row in rows if "dropped" in row}
    assert {"no sample: refusal", "no sample: malformed"} <= reasons
    verdicts = load_rows(tmp_path / "run" / "verify.jsonl")
    assert len(verdicts) == len(kept(rows)) and any("dropped" in row for row in verdicts)


def test_a_dry_run_sends_nothing_and_bounds_what_a_run_costs(tmp_path, teacher, monkeypatch, capsys):
    monkeypatch.setattr(BaseModelSettings, "open", lambda self: Adder())
    monkeypatch.setattr(module, "split", lambda *_: sys.exit(0))
    words = [*SUMS, *asked_of(teacher), "--output-dir", tmp_path / "run", "--price-in", 1, "--price-out", 2]
    call(module.main, *words, "--dry-run")
    assert teacher.calls == 0 and not (tmp_path / "run").exists()
    lines = {line.split("  ")[0]: line.split()[-4:] for line in capsys.readouterr().out.splitlines()}
    with pytest.raises(SystemExit):
        call(module.main, *words)
    ledger = read_json(tmp_path / "run" / "ledger.json")
    pairs = {"total": "total", "generate": "generate", "verify": "verify", "pattern": "pattern"}
    for name, stage in pairs.items():
        calls, asked, told, money = (float(figure.replace(",", "")) for figure in lines[name])
        spent = ledger[stage]
        assert spent["calls"] <= calls and spent["prompt_tokens"] <= asked and spent["completion_tokens"] <= told
        assert money == pytest.approx((asked + 2 * told) / 1e6, rel=1e-3) and spent["money"] <= money


def test_a_limit_holds_for_the_run_and_can_be_raised(tmp_path, monkeypatch):
    monkeypatch.setattr(BaseModelSettings, "open", lambda self: Adder())
    monkeypatch.setattr(module, "split", lambda *_: sys.exit(0))
    folder = tmp_path / "run"
    with OfflineTeacher() as server:
        words = [*SUMS, *asked_of(server), "--output-dir", folder]
        with pytest.raises(UserError, match="limit of 10 calls"):
            call(module.main, *words, "--max-calls", 10)
        with pytest.raises(UserError, match="limit of 10 calls"):
            call(module.main, "--resume", folder)
        assert server.calls == 10
        with pytest.raises(SystemExit):
            call(module.main, "--resume", folder, "--max-calls", 500)
        assert repeated(server) == 0 and read_json(folder / "ledger.json")["total"]["calls"] == server.calls


def test_a_resumed_run_refuses_what_would_change_its_samples_and_says_what_it_takes_anew(tmp_path, capsys):
    parser, folder = run_flags.run_parser(None), tmp_path / "run"
    own = ["--task", "synth/tasks/arithmetic.yaml", "--model", "tiny-digits", "--votes", "5", "--max-calls", "6"]
    args = with_words(lambda: run_flags.parse_run_args(None), *own)
    start_run_folder(str(folder), vars(args))
    config = (folder / "config.json").read_text()

    def resume(*words):
        return with_words(lambda: run_flags.parse_run_args(None), "--resume", folder, *words)

    for words in (["--votes", 4], ["--seed", 1], ["--count", parser.get_default("count") + 1], ["--paper"],
                  ["--model", "tiny-chat"], ["--max-calls", 9, "--learning-rate", "1e-3"]):  # fmt: skip
        with pytest.raises(UserError, match=r"run was begun with other flags: --.* \(the run: .*or change only --dry"):
            resume(*words)
    assert capsys.readouterr().out == ""
    again = resume(*own[:-1], 9, "--dry-run")
    assert (again.max_calls, again.votes, again.base_model, again.dry_run) == (9, 5, "tiny-digits", True)
    assert capsys.readouterr().out == "--max-calls is now 9; the run had 6\n"
    assert (folder / "config.json").read_text() == config


def test_a_base_model_that_is_missing_costs_no_call(tmp_path, teacher):
    words = [*SUMS, *asked_of(teacher), "--output-dir", tmp_path / "run", "--base-model", tmp_path / "none"]
    with pytest.raises(UserError, match="none"):
        call(module.main, *words)
    assert teacher.calls == 0


def test_a_teacher_that_has_moved_is_asked_nothing_again(tmp_path, monkeypatch):
    monkeypatch.setattr(BaseModelSettings, "open", lambda self: Adder())
    monkeypatch.setattr(module, "split", lambda *_: sys.exit(0))
    with OfflineTeacher() as first, OfflineTeacher() as second:
        with pytest.raises(UserError, match="limit"):
            call(module.main, *SUMS, *asked_of(first), "--output-dir", tmp_path / "run", "--max-calls", 10)
        with pytest.raises(SystemExit):
            call(module.main, "--resume", tmp_path / "run", "--teacher-url", second.url, "--max-calls", 500)
        assert first.calls == 10 and not first.asked.keys() & second.asked.keys()


@pytest.mark.parametrize("hyphen", [False, True])
def test_the_published_programs_own_flags_alone_make_a_run(tmp_path, tiny_folder, teacher, monkeypatch, hyphen):
    """All of its flags, no YAML; shortened by flags of ours."""
    started = in_this_process(monkeypatch)
    monkeypatch.chdir(tmp_path)
    arithmetic = load_task(ROOT / "synth/tasks/arithmetic.yaml")
    Path("library.txt").write_text("Addition puts numbers together. The sum of 2 and 2 is 4.")
    rows = [{"Input": "1 + 1 =", "Output": "2"}, {"Input": "2 + 5 =", "Output": "7"}]
    if hyphen:
        Path("data").write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        save(tmp_path / "data", rows)
    words = ["--experiment_name", "exp1", "--target_model_path", "out", "--model", "LLaMa", "--task_name", "sums"]
    words += ["--base_model_path", tiny_folder, "--task_instruction", arithmetic.instruction, "--domain", "arithmetic"]
    words += ["--dataset_path", "data", "--work_model_paths", "work", "--iterations", "1"]
    words += ["--passage_paths", "library.txt", "--demo_examples", "[{'input': '3 + 4 =', 'output': '7'}]"]
    words = [word.replace("_", "-") if hyphen and str(word).startswith("--") else word for word in words]
    own = [*SUMS[2:8], "--wanted", 8, "--rollouts", 2, "--max-rollouts", 2, *TINY, *asked_of(teacher)]
    call(module.main, *words, *own, "--answer", "{type: number}", "--training-flags=--num-generations 2")
    folder = tmp_path / "runs" / "exp1"
    result = read_json(folder / "evaluation.json")
    assert result["model"] == "LLaMa" and result["questions"] == 2
    assert (
        read_json(folder / "task.json")["domain"] == "arithmetic" and read_json(folder / "config.json")["rounds"] == 1
    )
    rows = load_rows(folder / "generate.jsonl")
    assert {row["passage"] for row in rows} == {"library.txt#0"} and kept(load_rows(folder / "verify.jsonl"))
    asked = "\n".join(teacher.asked)
    assert "The sum of 2 and 2" in asked and "3 + 4 =" in asked and "Domain: arithmetic" in asked
    assert (tmp_path / "work" / "summary.json").is_file() and (tmp_path / "out" / "config.json").is_file()
    assert [words[0] for words in started] == ["ppo_training.py", "fuse.py"]
    assert "Mean score by step: work" in (folder / "report.html").read_text()


def test_the_published_programs_task_by_flags(tmp_path, evaluation):
    words = ["--task_name", "MedNLI", "--teacher-url", "http://127.0.0.1:1/v1", "--teacher-model", "m"]
    task = run_flags.task_from(with_words(lambda: run_flags.parse_run_args(None), *words))
    assert (task.name, getattr(task.answer, "name", None)) == ("MedNLI", "label") and task.instruction
    words = ["--task", "synth/tasks/arithmetic.yaml", "--dataset_path", evaluation]
    assert len(run_flags.task_from(with_words(lambda: run_flags.parse_run_args(None), *words)).evaluation) == 3
    words = [*words[:2], "--answer", "{type: choice, choices: ['0', '1']}", "--base-model", "base"]
    args = with_words(lambda: run_flags.parse_run_args(None), *words)
    assert getattr(run_flags.task_from(args).answer, "choices", None) == ("0", "1")
    assert base_model_settings(args, task).name == "base"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no task is named"), (["--task", "synth/tasks/gsm8k.yaml"], "the offline teacher knows"),
        (["--held-out", 1], "--held-out"), (["--select", 0], "--select"), (["--band", 0.5, 0.2], "--band"),
        (["--resume", "nowhere"], "holds no run"), (["--max-money", 1], "prices"),
        (["--batch-size", 10], "--num-generations"), (["--training-flags=--lora-dropout 0.1"], "--lora-dropout"),
        (["--train-by", "sft", "--training-flags=--max-length 0"], "--max-length is 0"),
        (["--train-by", "sft", "--training-flags=--val-batches 0"], "--val-batches"),
        (["--train-by", "sft", "--training-flags=--num-steps 3"], "see sft.py --help"),
        (["--train-by", "sft", "--training-flags=--data elsewhere"], "--training-flags sets --data"),
        (["--training-flags=--output_dir elsewhere"], "--training-flags sets --output-dir"),
        (["--base-model", "./no/such", "--dry-run"], "./no/such is not a model folder"),
        (["--teacher-model", "gpt"], "--teacher-url"), (["--answer", "{type: regex}"], "lacks 'pattern'"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_before_anything_is_made(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    if words[:1] != ["--task"] and words:
        words = ["--task", ROOT / "synth/tasks/arithmetic.yaml", *words]
    words = [ROOT / word if word == "synth/tasks/gsm8k.yaml" else word for word in words]
    monkeypatch.chdir(tmp_path)
    assert message in fails(capsys, module.main, *words)
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_needs_no_teacher_and_calls_an_unknown_cost_unknown(monkeypatch, capsys):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    call(module.main, "--task", ROOT / "synth/tasks/gsm8k.yaml", "--dry-run")
    out = capsys.readouterr().out
    total = next(line for line in out.splitlines() if line.startswith("total"))
    assert total.endswith(" unknown") and "for money give --price-in and --price-out" in out


def test_model_is_the_base_model_unless_that_is_named_too():
    task = load_task(ROOT / "synth/tasks/arithmetic.yaml")
    words = ["--task", "x.yaml", "--model", "mine"]
    args = with_words(lambda: run_flags.parse_run_args(None), *words)
    assert base_model_settings(args, task).name == "mine"
    args = with_words(lambda: run_flags.parse_run_args(None), *words, "--base-model", "base")
    assert base_model_settings(args, task).name == "base" and args.model == "mine"


def test_a_chat_model_is_asked_in_turns_unless_a_reward_sees_the_prompt_or_the_flag_says_no(tiny_folder):
    sums, digits = (load_task(ROOT / f"synth/tasks/{name}.yaml") for name in ("arithmetic", "digits"))
    words = ["--task", "x.yaml", "--base-model", tiny_folder]
    args = with_words(lambda: run_flags.parse_run_args(None), *words)
    plain = with_words(lambda: run_flags.parse_run_args(None), *words, "--ignore-chat-template")
    assert base_model_settings(args, sums).takes_turns
    assert not base_model_settings(args, digits).takes_turns and not base_model_settings(plain, sums).takes_turns


SOURCE = ["--experiment_name", "exp1", "--target_model_path", "./checkpoints/exp1", "--model", "LLaMa-3.1-8B-Instruct",
          "--base_model_path", "./models/llama-3.1-8B-instruct", "--task_name", "MedNLI", "--task_instruction",
          "The domain is Medical. The TASK: Please classify the relationship between the given premise and hypothesis "
          "into one of the following labels: entailment, contradiction, or neutral."]  # fmt: skip


def test_with_openais_key_the_published_command_asks_openai_after_a_question(tmp_path, monkeypatch, capsys):
    """As it is written in the published README; where it would send anything, `start_run_folder` ends it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    monkeypatch.setattr(module, "start_run_folder", lambda name, given: sys.exit(given["teacher_url"]))
    monkeypatch.setattr(BaseModelSettings, "open", lambda self: None)
    said = fails(capsys, module.main, *SOURCE)
    assert said == "gpt-4o at https://api.openai.com/v1 costs money; give --yes, or limits and --yes"
    with pytest.raises(SystemExit, match=r"https://api\.openai\.com/v1"):
        call(module.main, *SOURCE, "--yes", "--teacher-model", "gpt-other")
    out = capsys.readouterr().out
    assert (
        "teacher: gpt-other at https://api.openai.com/v1, as OPENAI_API_KEY is set; another by --teacher-model" in out
    )
    assert "total" in out and "for money give --price-in and --price-out" in out
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("builtins.input", lambda question: " n")
    assert fails(capsys, module.main, *SOURCE) == "not agreed; nothing was sent"
    monkeypatch.setattr("builtins.input", lambda question: "Y")
    with pytest.raises(SystemExit, match="openai"):
        call(module.main, *SOURCE)
    with monkeypatch.context() as patch:
        patch.setattr(module, "check_name", lambda name: None)  # as if the model were there
        call(module.main, *SOURCE, "--dry-run")
    # A task that the offline teacher knows stays offline, and a teacher that is named is not asked about.
    words = ["--task", ROOT / "synth/tasks/arithmetic.yaml"]
    settings, args = settings_of()
    assert settings.teacher.teacher_url is None and not args.by_key
    _, args = settings_of(*words, "--teacher-url", "http://127.0.0.1:1/v1", "--teacher-model", "m")
    assert not args.by_key
    monkeypatch.delenv("OPENAI_API_KEY")
    assert "or set OPENAI_API_KEY" in fails(capsys, module.main, *SOURCE)
    assert list(tmp_path.iterdir()) == []


def test_a_task_that_was_changed_since_the_run_began_is_noticed(tmp_path, teacher, monkeypatch, capsys):
    monkeypatch.setattr(BaseModelSettings, "open", lambda self: Adder())
    path, folder = tmp_path / "mine.yaml", tmp_path / "run"
    text = (ROOT / "tests/sums.yaml").read_text()
    path.write_text(text)
    words = ["--task", path, *SUMS[2:], *asked_of(teacher), "--output-dir", folder, "--max-calls", 5]
    assert "limit of 5 calls" in fails(capsys, module.main, *words)
    path.write_text(text.replace("45 + 38 =", "45 + 39 =").replace("{type: number}", "{type: math}"))
    said = fails(capsys, module.main, "--resume", folder, "--max-calls", 500)
    assert "another demos, scoring_flags than when" in said and str(folder / "task.json") in said and teacher.calls == 5
    path.write_text(f"# a comment changes nothing\n{text}")
    assert "limit of 6 calls" in fails(capsys, module.main, "--resume", folder, "--max-calls", 6)


def test_one_process_at_a_time_in_a_run_folder(tmp_path):
    code = f"import sys, time\nsys.path.insert(0, {str(ROOT)!r})\nfrom pathlib import Path\nimport fcntl\n"
    code += (
        f"lock = open({str(tmp_path / 'lock')!r}, 'w')\nfcntl.flock(lock, fcntl.LOCK_EX)\nprint('held', flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code + "time.sleep(0.5)"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    started = time.monotonic()
    with module.alone(tmp_path):
        assert time.monotonic() - started > 0.3 and process.wait(5) == 0
