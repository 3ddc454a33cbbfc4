"""The digit data: the sequences, and the files that the script writes from any folder."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data.digits import DigitRule
from data.generate_digit_data import (
    DECREASING_STARTS,
    INCREASING_STARTS,
    MAX_STEP,
    NOISE_RANGE,
    SPLITS,
    digit_rows,
    digit_sequence,
)

ROOT = Path(__file__).resolve().parent.parent
RULES = [DigitRule(up, n) for up in (True, False) for n in (1, 2, 3, 7, 50)]


def generate(*flags, script=ROOT / "data" / "generate_digit_data.py", cwd=ROOT):
    command = [sys.executable, str(script), *map(str, flags)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60, check=False)


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def names_below(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if "__pycache__" not in path.parts}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_without_noise_a_sequence_keeps_the_rule_the_starts_and_the_steps(rule):
    rng = np.random.default_rng(0)
    low, high = INCREASING_STARTS if rule.increasing else DECREASING_STARTS
    for _ in range(200):
        sequence = digit_sequence(rng, rule, 12, noise=0.0)
        assert len(sequence) == 12
        assert rule.score(" ".join(map(str, sequence))) == 1.0
        assert low <= sequence[0] <= high
        steps = np.diff(sequence) * (1 if rule.increasing else -1)
        assert steps.min() >= 1 and steps.max() <= MAX_STEP
        assert all(type(number) is int for number in sequence)


def test_starts_and_steps_reach_both_ends():
    rng = np.random.default_rng(0)
    sequences = [digit_sequence(rng, DigitRule(True, 10), 5, 0.0) for _ in range(2000)]
    assert {sequence[0] for sequence in sequences} == set(range(0, 201, 10))
    assert {step for sequence in sequences for step in np.diff(sequence)} == {10, 20, 30, 40, 50}
    falling = [digit_sequence(rng, DigitRule(False, 100 // 2), 2, 0.0) for _ in range(500)]
    assert {sequence[0] for sequence in falling} == set(range(100, 1001, 50))


def test_noise_replaces_that_share_of_the_numbers_after_the_first_and_no_others():
    rule = DigitRule(True, 2)
    noise, length = 0.2, 11
    clean = np.array([digit_sequence(np.random.default_rng(i), rule, length, 0.0) for i in range(2000)])
    noisy = np.array([digit_sequence(np.random.default_rng(i), rule, length, noise) for i in range(2000)])
    np.testing.assert_array_equal(clean[:, 0], noisy[:, 0])
    changed = clean != noisy
    # 20 000 numbers: a standard deviation of 0.003; a replacement equals what it replaces in under 1 % of cases.
    assert changed[:, 1:].mean() == pytest.approx(noise, abs=0.01)
    replacements = noisy[changed]
    assert (replacements.min(), replacements.max()) == NOISE_RANGE
    assert replacements.mean() == pytest.approx(0, abs=4)  # deviation 58 / sqrt(4000) = 0.9


def test_noise_1_replaces_every_number_but_the_first():
    sequence = digit_sequence(np.random.default_rng(0), DigitRule(True, 50), 500, 1.0, start=150)
    assert sequence[0] == 150
    assert len(set(sequence[1:])) > 150 and max(map(abs, sequence[1:])) <= 100


def test_a_given_start_is_kept_and_length_1_is_the_start_alone():
    assert digit_sequence(np.random.default_rng(0), DigitRule(), 1, 0.5, start=42) == [42]
    assert digit_sequence(np.random.default_rng(0), DigitRule(), 4, 0.0, start=7)[0] == 7


@pytest.mark.parametrize(("rule", "length"), [(DigitRule(), 0), (DigitRule(True, 51), 5)])
def test_impossible_sequences_are_refused(rule, length):
    with pytest.raises(ValueError, match="length"):
        digit_sequence(np.random.default_rng(0), rule, length, 0.0)


def test_row_lengths_span_the_range_and_rewards_are_the_rule_s():
    rule = DigitRule(True, 2)
    rows = list(digit_rows(np.random.default_rng(0), rule, 300, (5, 15), 0.3))
    assert {len(row.text.split()) for row in rows} == set(range(5, 16))
    assert [row.reward for row in rows] == [rule.score(row.text) for row in rows]
    assert 0 < np.mean([row.reward for row in rows]) < 1


def test_the_seed_s_command_writes_three_perfect_files(tmp_path):
    flags = ("--increasing", "--multiple-of", 2, "--num-samples", 150, "--noise", 0.0, "--output-dir", tmp_path)
    done = generate(*flags)
    assert done.returncode == 0 and done.stderr == ""
    assert len(done.stdout.splitlines()) == 3 and "150 rows, mean reward 1.000, perfect 100%" in done.stdout
    assert sorted(content(tmp_path)) == sorted(f"increasing_mult_2_{split}.jsonl" for split in SPLITS)
    texts = []
    for split in SPLITS:
        rows = rows_of(tmp_path / f"increasing_mult_2_{split}.jsonl")
        assert len(rows) == 150 and all(row["reward"] == 1.0 and set(row) == {"text", "reward"} for row in rows)
        assert all(5 <= len(row["text"].split()) <= 15 for row in rows)
        texts.append([row["text"] for row in rows])
    assert not set(texts[0]) & set(texts[1]) and not set(texts[0]) & set(texts[2])
    # The sample files in git were written by this command.
    for name, written in content(tmp_path).items():
        assert (ROOT / "data" / name).read_bytes() == written


def test_the_reward_samples_in_git_are_what_their_command_writes(tmp_path):
    prefix = "reward_function_"
    done = generate(
        "--increasing", "--multiple-of", 2, "--num-samples", 500, "--prefix", prefix, "--output-dir", tmp_path
    )
    assert done.returncode == 0
    for split in SPLITS:
        name = f"{prefix}increasing_mult_2_{split}.jsonl"
        assert (ROOT / "data" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_the_same_seed_writes_the_same_bytes_and_another_seed_others(tmp_path):
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for folder, seed in zip(folders, (3, 3, 4), strict=True):
        assert generate("--num-samples", 20, "--seed", seed, "--output-dir", folder).returncode == 0
    assert content(folders[0]) == content(folders[1])
    assert all(content(folders[0])[name] != content(folders[2])[name] for name in content(folders[0]))


def test_hyphen_and_underscore_are_the_same_flag(tmp_path):
    generate("--num-samples", 5, "--multiple-of", 3, "--min-length", 6, "--output-dir", tmp_path / "hyphen")
    generate("--num_samples", 5, "--multiple_of", 3, "--min_length", 6, "--output_dir", tmp_path / "underscore")
    assert content(tmp_path / "hyphen") == content(tmp_path / "underscore") != {}


def test_defaults(tmp_path):
    assert generate("--output-dir", tmp_path).returncode == 0
    rows = [row for split in SPLITS for row in rows_of(tmp_path / f"increasing_mult_1_{split}.jsonl")]
    assert len(rows) == 300
    assert {len(row["text"].split()) for row in rows} == set(range(5, 16))
    assert 0.2 < np.mean([row["reward"] for row in rows]) < 0.9  # noise is 0.2


def test_decreasing_rows_score_by_their_own_rule(tmp_path):
    done = generate("--decreasing", "--multiple-of", 3, "--noise", 0, "--num-samples", 30, "--output-dir", tmp_path)
    assert done.returncode == 0
    rows = rows_of(tmp_path / "decreasing_mult_3_test.jsonl")
    assert all(row["reward"] == 1.0 == DigitRule(False, 3).score(row["text"]) for row in rows)


@pytest.mark.parametrize(
    ("directory", "script"),
    [
        (".", "data/generate_digit_data.py"),
        ("data", "generate_digit_data.py"),
        ("elsewhere", "../data/generate_digit_data.py"),
    ],
)
def test_from_any_folder_it_writes_beside_itself(tmp_path, directory, script):
    for package in ("common", "data"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("*.jsonl", "__pycache__"))
    (tmp_path / "elsewhere").mkdir()
    before = names_below(tmp_path)
    done = generate("--num-samples", 3, script=script, cwd=tmp_path / directory)
    assert done.returncode == 0, done.stderr
    assert names_below(tmp_path) - before == {f"data/increasing_mult_1_{split}.jsonl" for split in SPLITS}


def test_it_overwrites_its_own_files_and_no_others(tmp_path):
    for name in ("increasing_mult_1_train.jsonl", "increasing_mult_2_train.jsonl", "notes.txt"):
        (tmp_path / name).write_text("old")
    assert generate("--num-samples", 3, "--output-dir", tmp_path).returncode == 0
    assert len(rows_of(tmp_path / "increasing_mult_1_train.jsonl")) == 3
    assert (tmp_path / "increasing_mult_2_train.jsonl").read_text() == "old"
    assert (tmp_path / "notes.txt").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 5


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--num-samples", 0), "--num-samples is 0"),
        (("--min-length", 0), "--min-length is 0"),
        (("--min-length", 9, "--max-length", 8), "--max-length 8"),
        (("--noise", -0.1), "--noise is -0.1"),
        (("--noise", 1.5), "--noise is 1.5"),
        (("--noise", "nan"), "--noise is nan"),
        (("--multiple-of", 0), "--multiple-of is 0"),
        (("--multiple-of", 51), "--multiple-of is 51"),
        (("--increasing", "--decreasing"), "--decreasing"),
        (("--seed", -1), "--seed is -1"),
        (("--prefix", "a/b_"), "--prefix 'a/b_'"),
        (("--num-samples", "many"), "--num-samples"),
        (("--unknown", 3), "--unknown"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(tmp_path, flags, named):
    done = generate(*flags, "--output-dir", tmp_path)
    assert_one_line_error(done, named)
    assert list(tmp_path.iterdir()) == []


def test_an_output_folder_that_is_a_file_is_one_line(tmp_path):
    (tmp_path / "file").write_text("mine")
    assert_one_line_error(generate("--output-dir", tmp_path / "file"), "is a file")
    assert_one_line_error(generate("--output-dir", tmp_path / "file" / "below"), "cannot be written")
    assert (tmp_path / "file").read_text() == "mine"


def assert_one_line_error(done, named):
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: ")
    assert named in done.stderr and "Traceback" not in done.stderr
