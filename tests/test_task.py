"""Tasks: the shipped files, tasks by flags, data in every form, and one line for every mistake."""

import json
import re
import sys
import types
from typing import Any

import pytest

import synth.pipeline.reasoning_gym_tasks as gym
from common.errors import UserError
from data import sources
from data.digits import DigitRule
from data.sources import INSTALL_ARROW
from rewards.function import load_reward_function
from synth.examples import read_examples
from synth.pipeline.tasks import open_task
from synth.task import KNOWN_KEYS, SHIPPED, load_task, task_from_flags

NAMES = (
    *("arithmetic", "cfa", "cqa", "digits", "gpqa", "gsm8k", "library_facts", "logiqa", "math", "mednli", "medqa"),
    "reviews",
)
MINIMAL = "instruction: Add.\nanswer: {type: number}\n"


@pytest.fixture
def write(tmp_path):
    """Write a task file (and others beside it) and return its path."""

    def write_task(text, **others):
        for name, content in others.items():
            (tmp_path / name.replace("__", ".")).write_text(content)
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        return path

    return write_task


def one_line_error(function, *args, **options):
    with pytest.raises(UserError) as caught:
        function(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_shipped_task_is_named_here():
    assert tuple(sorted(path.stem for path in SHIPPED.glob("*"))) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_task_loads_and_its_own_demos_score_full(name):
    task = load_task(SHIPPED / f"{name}.yaml")
    assert task.name == name and task.instruction and task.output_format and task.domain
    assert (task.answer is None) == (name == "digits")
    assert "some input" in task.prompt("some input") and "{" not in task.prompt("some input").replace("\\boxed{}", "")
    for row in (*task.demos, *task.evaluation):
        assert task.score(row["input"], " " + row["output"], row["output"]) == 1.0
        assert task.score(row["input"], "", row["output"]) < 1.0


def test_what_counts_as_a_near_duplicate_is_the_tasks(write):
    assert {load_task(SHIPPED / f"{name}.yaml").near_duplicates for name in ("arithmetic", "library_facts")} == {1.0}
    assert load_task(SHIPPED / "gsm8k.yaml").near_duplicates == 0.7
    assert load_task(write(MINIMAL + "near_duplicates: 1\nbase_model: mine\n")).near_duplicates == 1.0
    assert load_task(write(MINIMAL + "near_duplicates: 1\nbase_model: mine\n")).base_model == "mine"
    for wrong in ("0", "1.5", "many", "true"):
        assert "mine.yaml" in (error := one_line_error(load_task, write(MINIMAL + f"near_duplicates: {wrong}\n"))) or (
            "threshold" in error
        )


def test_no_shipped_output_format_holds_an_answer():
    """The prompt's own example never counts: not even to a reader that is given the prompt."""
    for name in NAMES:
        task = load_task(SHIPPED / f"{name}.yaml")
        if task.answer is not None and task.answer.name in ("number", "math"):
            assert task.answer.extract(task.output_format) is None, name


@pytest.mark.parametrize(
    ("name", "completion", "truth"),
    [
        ("gsm8k", "3 * 24 = 72\n#### 72", "Natalia sold 72 clips.\n#### 72"), ("math", r"so \boxed{\frac14}", "0.25"),
        ("gpqa", "<answer>(c)</answer>", "C"), ("medqa", "The answer is E. foo", "E"),
        ("cqa", "<answer>No.</answer>", "no"),
        ("mednli", "<answer>\nNeutral\n</answer>", "neutral"), ("cfa", "B) foo", "B"), ("arithmetic", " 19", "19"),
        ("logiqa", "#### D", "D"), ("library_facts", " in 1473.", "1473"),
    ],
)  # fmt: skip
def test_shipped_tasks_read_usual_answers(name, completion, truth):
    task = load_task(SHIPPED / f"{name}.yaml")
    assert task.score("input", completion, truth) == 1.0
    assert task.answer is not None and task.answer.readable(truth)
    assert task.score("input", "", truth) == 0.0


def test_the_embedded_models_see_the_bare_input():
    assert load_task(SHIPPED / "arithmetic.yaml").prompt("12 + 7 =") == "12 + 7 ="
    digits = load_task(SHIPPED / "digits.yaml")
    assert digits.prompt("8") == "8"
    assert digits.score("8", " 20 22 31 36", "") == DigitRule(True, 2).score("8 20 22 31 36") == 0.6


def test_the_facts_are_invented_distinct_and_in_the_passages(tmp_path):
    task = load_task(SHIPPED / "library_facts.yaml")
    facts = dict(re.findall(r"town of (\w+) was founded in (\d{4})", passage)[0] for passage in task.passages)
    assert len(facts) == len(set(facts.values())) == len(task.passages) == 40
    for row in task.evaluation:
        assert facts[re.findall(r"When was (\w+) founded", row["input"])[0]] == row["output"]
    (path,) = task.write_library(tmp_path / "run")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [row["text"] for row in rows] == task.passages
    assert load_task(SHIPPED / "gsm8k.yaml").write_library(tmp_path) == []


def test_the_prompt_is_the_same_text_for_all_and_takes_braces_as_they_are(write):
    plain = load_task(write(MINIMAL + "input_format: Two numbers.\noutput_format: 'A number in \\boxed{}.'\n"))
    assert plain.prompt("\\frac{1}{2}") == "Add.\n\nTwo numbers.\n\n\\frac{1}{2}\n\nA number in \\boxed{}."
    path = write(MINIMAL + "prompt: 'Q: {input} {x} \\boxed{}\\n{instruction}'\n")
    assert load_task(path).prompt("{instruction} {0}") == "Q: {instruction} {0} {x} \\boxed{}\\nAdd."


def test_a_whole_task_file(write, tmp_path):
    path = write(
        "name: sums\n" + MINIMAL + "domain: maths\nlibrary: [facts.md, .]\ndemos: demos.jsonl\n"
        "evaluation:\n  - {input: 2 + 2, output: 4}\n  - {Input: '0 + 0', Output: 0}\n",
        facts__md="# Facts",
        demos__jsonl='{"prompt": "1 + 1", "answer": "2"}\n\n{"Input": "5", "Output": "so #### 5"}\n',
    )
    task = load_task(path)
    assert task.name == "sums" and task.library == [tmp_path / "facts.md", tmp_path]
    assert task.demos == [{"input": "1 + 1", "output": "2"}, {"input": "5", "output": "so #### 5"}]
    assert task.evaluation == [{"input": "2 + 2", "output": "4"}, {"input": "0 + 0", "output": "0"}]
    assert load_task(write(MINIMAL)).name == "mine"


def test_a_custom_reader_and_a_reward_lie_beside_the_task_file(write):
    code = (
        "def read(text):\n    return text.strip() or None\n"
        "def score(prompts, completions):\n    return [2.0] * len(prompts)\n"
    )
    task = load_task(write("instruction: Do.\nanswer: {type: custom, reader: 'mine.py:read'}\n", mine__py=code))
    assert task.score("in", " yes ", "yes") == 1.0
    task = load_task(write("instruction: Do.\nreward: mine.py:score\n"))
    assert task.answer is None and task.score("in", "out", "") == 2.0


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("answer: {type: number}", "lacks an instruction"), ("instruction: Add.", "lacks answer"),
        (MINIMAL + "demo: []", "unknown key 'demo'"), (MINIMAL + "domain: 5", "has 5 as domain; it must be text"),
        ("- a", "not a YAML mapping"), ("a: [", "not valid YAML"), (MINIMAL + "library: gone.txt", "does not exist"),
        (MINIMAL + "library: 5", "it must be a list"), (MINIMAL + "library: [5]", "it must be a path"),
        (MINIMAL + "demos: gone.jsonl", "gone.jsonl as demos, which does not exist"),
        (MINIMAL + "demos: [{input: a}]", r"demos of .*mine\.yaml, row 1 has the keys \['input'\]"),
        (MINIMAL + "demos: [5]", "row 1 is 5"), (MINIMAL + "demos: []", "holds no rows"),
        (MINIMAL + "demos: [{input: a, output: [1]}]", r"has \[1\] as 'output'"),
        (MINIMAL + "demos: [{input: a, output: b}]", "answer type cannot read"),
        (MINIMAL + "evaluation: bad.jsonl", r"bad\.jsonl:3 has the keys \['input'\]"),
        (MINIMAL + "evaluation: worse.jsonl", r"worse\.jsonl:1 is not valid JSON"),
        (MINIMAL + "prompt: Add", "without {input}"), (MINIMAL + "passages: [{a: b}]", "as passages"),
        (MINIMAL + "reward: {type: digits}", "both an answer and a reward"),
        ("instruction: a\nanswer: {type: numbers}", "mine.yaml: answer type 'numbers' is unknown"),
        ("instruction: a\nanswer: [number]", "as answer"), ("instruction: a\nanswer: {choices: [A, B]}", "as answer"),
        ("instruction: a\nanswer: {type: label, labels: [yes, no]}", "quote it"),
        ("instruction: a\nanswer: {type: custom, reader: 'gone.py:f'}", "does not exist"),
        ("instruction: a\nreward: {type: other}", "as reward"), ("instruction: a\nreward: gone.py:f", "does not exist"),
        ("instruction: a\nreward: {type: digits, n: 2}", "unknown reward option 'n'"),
        ("instruction: a\nreward: {type: digits, multiple_of: 0}", "1 or more"),
    ],
)  # fmt: skip
def test_a_wrong_task_file_is_one_line(write, text, fact):
    path = write(text, bad__jsonl='{"input": "a", "output": "1"}\n\n{"input": "a"}\n', worse__jsonl="{")
    assert re.search(fact, one_line_error(load_task, path))


def test_missing_files_and_wrong_encodings_are_one_line(tmp_path):
    assert "cannot be read" in one_line_error(load_task, tmp_path / "gone.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"instruction: \xff")
    assert "not UTF-8" in one_line_error(load_task, tmp_path / "latin.yaml")


def test_a_task_by_flags_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wiki.txt").write_text("text")
    (tmp_path / "test.jsonl").write_text('{"Input": "a", "Output": "Yes"}\n')
    task = task_from_flags(
        "mine", "Say yes or no.", labels=["yes", "no"], domain="talk", passage_paths=["wiki.txt"],
        dataset_path="test.jsonl", demo_examples="[{'input': 'b', 'output': 'no'}]", output_format="One word.",
    )  # fmt: skip
    assert (task.name, task.domain, task.output_format) == ("mine", "talk", "One word.")
    assert task.answer is not None and task.answer.name == "label" and task.score("a", "Yes.", "yes") == 1.0
    assert task.evaluation == [{"input": "a", "output": "Yes"}] and task.demos == [{"input": "b", "output": "no"}]
    assert [path.name for path in task.library] == ["wiki.txt"]
    flags: list[dict[str, Any]] = [{}, {"answer": "{type: choice, choices: [A, B]}"}, {"answer": "math"}]
    kinds = [getattr(task_from_flags("x", "y", **given).answer, "name", None) for given in flags]
    assert kinds == ["exact", "choice", "math"]
    assert "no instruction" in one_line_error(task_from_flags, "unheard_of")
    assert "does not exist" in one_line_error(task_from_flags, "x", "y", dataset_path="gone")
    assert "--demo-examples, line 2 is not valid YAML" in one_line_error(task_from_flags, "x", "y", demo_examples="[{")


def test_the_seeds_example_takes_the_shipped_reader():
    task = task_from_flags("MedNLI", "The domain is Medical. Classify the relationship.")
    shipped = load_task(SHIPPED / "mednli.yaml")
    assert task.instruction == "The domain is Medical. Classify the relationship." and task.name == "MedNLI"
    assert (task.answer, task.output_format) == (shipped.answer, shipped.output_format)
    assert task_from_flags("GSM8K").answer == load_task(SHIPPED / "gsm8k.yaml").answer


LETTERS = dict(zip("ABCDE", "abcde", strict=True))
PAIRS = [{"key": "A", "value": "x"}, {"key": "B", "value": "y"}]
NATIVE: dict[str, list[tuple[dict[str, Any], str, str]]] = {
    "gsm8k": [({"question": "Two and two?", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"}, "Two and two?", "4")],
    "math": [({"problem": "What is $1+1$?", "solution": "It is $\\boxed{2}$.", "level": "1"}, "What is $1+1$?", "2")],
    "medqa": [
        (
            {"question": "Which?", "answer": "b", "options": LETTERS, "answer_idx": "B"},
            "Which?\nA. a\nB. b\nC. c\nD. d\nE. e",
            "B",
        ),
        (
            {"question": "Which?", "options": PAIRS, "answer_idx": "A"},
            "Which?\nA. x\nB. y",
            "A",
        ),
    ],
    "mednli": [
        ({"sentence1": "Ill.", "sentence2": "Well.", "gold_label": "contradiction"},
         "Premise: Ill.\nHypothesis: Well.", "contradiction"),
        ({"premise": "Ill.", "hypothesis": "Sick.", "label": "entailment"},
         "Premise: Ill.\nHypothesis: Sick.", "entailment"),
    ],
    "logiqa": [
        ({"context": "All a are b.", "query": "So?", "options": ["w", "x", "y", "z"], "correct_option": 2},
         "All a are b.\nSo?\nA. w\nB. x\nC. y\nD. z", "C"),
        ({"context": "All.", "question": "So?", "choices": ["w", "x", "y", "z"], "label": "d"},
         "All.\nSo?\nA. w\nB. x\nC. y\nD. z", "D"),
    ],
    "cqa": [({"index": "0", "contract": "We may.", "question": "May they?", "answer": "Yes"},
             "Contract: We may.\nQuestion: May they?", "yes")],
    "cfa": [({"query": "Read. Q: What? CHOICES: A: x,B: y,C: z Answer:", "text": "Q: What? CHOICES: A: x,B: y,C: z",
              "choices": ["A", "B", "C"], "answer": "B", "gold": 1}, "Q: What? CHOICES: A: x,B: y,C: z", "B"),
            ({"question": "What?", "choices": ["x", "y", "z"], "answer": "z"}, "What?\nA. x\nB. y\nC. z", "C")],
}  # fmt: skip


@pytest.mark.parametrize("name", NATIVE)
def test_the_columns_that_data_sets_have_on_the_hub_are_read(name, tmp_path):
    for row, text, truth in NATIVE[name]:
        (tmp_path / "d.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({"Input": "a", "Output": truth}) + "\n")
        task = task_from_flags(name, dataset_path=str(tmp_path / "d.jsonl"))
        assert [row["input"] for row in task.evaluation] == [text, "a"] and not task.demos
        assert task.answer is not None and task.answer.normalise(task.evaluation[0]["output"]) == truth


def test_gpqas_options_are_shuffled_by_the_question_and_the_right_one_is_found(tmp_path):
    names = ["Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"]
    rows = [{"Question": f"Question {n}?", **dict(zip(names, "rstu", strict=True))} for n in range(40)]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = task_from_flags("gpqa", dataset_path=str(tmp_path / "d.jsonl")).evaluation
    assert task_from_flags("gpqa", dataset_path=str(tmp_path / "d.jsonl")).evaluation == found
    for n, row in enumerate(found):
        question, *options = row["input"].split("\n")
        assert question == f"Question {n}?" and [line[:3] for line in options] == ["A. ", "B. ", "C. ", "D. "]
        assert sorted(line[3:] for line in options) == list("rstu") and f"{row['output']}. r" in options
    assert {row["output"] for row in found} == set("ABCD")  # its place in the file tells nothing


def test_columns_and_a_function_of_ones_own(write, tmp_path):
    columns = "columns: {input: 'Sum of {a} and {b}', output: c}\n"
    path = write(MINIMAL + columns + "evaluation: d.jsonl\n", d__jsonl='{"a": 1, "b": 2, "c": 3}\n')
    assert load_task(path).evaluation == [{"input": "Sum of 1 and 2", "output": "3"}]
    code = "def halves(rows):\n    return [{'input': r['q'], 'output': r['n'] / 2} for r in rows if r['n'] > 1]\n"
    code += "def broken(rows):\n    return rows[0]['none']\n"
    files = {"d__jsonl": '{"q": "a", "n": 1}\n{"q": "b", "n": 4}\n', "own__py": code}
    assert load_task(write(MINIMAL + "rows: own.py:halves\nevaluation: d.jsonl\n", **files)).evaluation == [
        {"input": "b", "output": "2.0"}
    ]
    said = one_line_error(load_task, write(MINIMAL + "rows: own.py:broken\nevaluation: d.jsonl\n", **files))
    assert "the rows function broken failed: KeyError: 'none' (own.py, line 4)" in said
    assert "columns: {input: question" in one_line_error(load_task, write(MINIMAL + "columns: {input: a}\n"))
    for more in ("answer: c", "options: null", "options: 3", "options: {a: b}", f"options: [{'a, ' * 27}]"):
        broken = f"columns: {{input: a, output: b, {more}}}\n"
        assert "as columns" in one_line_error(load_task, write(MINIMAL + broken)), more
    said = one_line_error(load_task, write(MINIMAL + columns + "evaluation: [{x: 1}]\n"))
    assert "or the columns a, b, c" in said and "`columns: {input: ..., output: ...}`" in said
    wrong = "columns: {input: q, options: o, output: r}\nevaluation: [{q: a, o: [x, y], r: z}]\n"
    assert "none of its 2 options" in one_line_error(load_task, write("instruction: A.\nanswer: exact\n" + wrong))
    assert "as options" in one_line_error(
        load_task, write("instruction: A.\nanswer: exact\n" + wrong.replace("[x, y]", "x"))
    )


def test_the_training_rows_of_a_data_set_give_demos_and_what_was_taken_is_said(tmp_path):
    rows = [{"Input": f"{n} + 1", "Output": str(n + 1)} for n in range(8)]
    save(tmp_path / "data" / "train", rows)
    save(tmp_path / "data" / "test", rows[6:])
    (tmp_path / "data" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    data = str(tmp_path / "data")
    task = task_from_flags("sums", "Add.", answer="number", dataset_path=data)
    assert [row["input"] for row in task.demos] == [f"{n} + 1" for n in range(5)] and len(task.evaluation) == 2
    assert task.taken == (
        f"evaluation: 2 rows of {data} (test)", f"demos: 5 rows of {data} (train), the first of 8"
    )  # fmt: skip
    own = task_from_flags(
        "sums", "Add.", answer="number", dataset_path=data, demo_examples="[{input: 9 + 9, output: 18}]"
    )
    assert [row["input"] for row in own.demos] == ["9 + 9"] and own.taken == task.taken[:1]
    # Training rows serve as demos and for validation, never test rows.
    also = task_from_flags("sums", "Add.", answer="number", demo_examples=data, validation_path=data)
    assert len(also.demos) == len(also.validation) == 8 and not also.evaluation
    assert also.taken == (f"demos: 8 rows of {data} (train)", f"validation: 8 rows of {data} (train)")


def test_a_name_on_the_hub_is_a_data_set(monkeypatch, tmp_path):
    splits = {"train": [{"question": "a?", "answer": "#### 1"}] * 9, "test": [{"question": "b?", "answer": "#### 2"}]}
    monkeypatch.setattr(sources, "_downloaded", lambda data: splits)
    monkeypatch.chdir(tmp_path)
    task = task_from_flags("GSM8K", dataset_path="openai/gsm8k:main", demo_examples="openai/gsm8k:main")
    assert (task.evaluation[0]["input"], task.demos[0]["input"]) == ("b?", "a?")
    assert task.taken[1] == "evaluation: 1 rows of openai/gsm8k:main (test)"


def test_a_folder_without_pyarrow_and_foreign_folders_are_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "state.json").write_text('{"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}')
    assert INSTALL_ARROW in one_line_error(read_examples, tmp_path, "evaluation")
    (tmp_path / "foreign").mkdir()
    assert "save_to_disk" in one_line_error(read_examples, tmp_path / "foreign", "evaluation")
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["other"]}')
    assert "['other']" in one_line_error(read_examples, tmp_path, "evaluation")


def save(folder, rows):
    """A folder as datasets' save_to_disk writes it."""
    arrow = pytest.importorskip("pyarrow")
    folder.mkdir(parents=True)
    table = arrow.Table.from_pylist(rows)
    with arrow.ipc.new_stream(str(folder / "data-00000-of-00001.arrow"), table.schema) as writer:
        writer.write_table(table)
    (folder / "state.json").write_text('{"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}')


def test_folders_that_datasets_saved(tmp_path):
    save(tmp_path / "both" / "train", [{"Input": "a", "Output": "1"}])
    save(tmp_path / "both" / "test", [{"Input": "b", "Output": "2"}, {"Input": "c", "Output": "0"}])
    (tmp_path / "both" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert [row["input"] for row in read_examples(tmp_path / "both", "x")] == ["b", "c"]
    assert read_examples(tmp_path / "both" / "train", "x") == [{"input": "a", "output": "1"}]
    save(tmp_path / "bad", [{"Input": "a", "Wrong": "1"}])
    assert "bad, row 1 has the keys ['Input', 'Wrong']" in one_line_error(read_examples, tmp_path / "bad", "x")
    (tmp_path / "bad" / "data-00000-of-00001.arrow").write_bytes(b"no arrow")
    assert "cannot be read as Arrow" in one_line_error(read_examples, tmp_path / "bad", "x")


class StandIn:
    """Sums, with a scorer of its own, as a data set of reasoning-gym."""

    def __getitem__(self, index):
        return {"question": f"{index} + 1?", "answer": str(index + 1), "metadata": {"index": index}}

    def score_answer(self, answer, entry):
        return 1.0 if int(answer) == entry["metadata"]["index"] + 1 else 0.1


@pytest.fixture
def stand_in(monkeypatch):
    def create_dataset(name, size, seed):
        if name != "sums":
            raise ValueError(f"Dataset '{name}' not registered")
        return StandIn()

    monkeypatch.setitem(sys.modules, "reasoning_gym", types.SimpleNamespace(create_dataset=create_dataset))


def test_reasoning_gym_gives_rows_and_scores(stand_in):
    task = open_task("reasoning_gym:sums")
    assert task.source is not None
    rows = task.source(50, 3)
    assert rows == task.source(50, 3) != task.source(50, 4)
    seen = [row["input"] for row in (*rows, *task.demos, *task.evaluation)]
    assert len(set(seen)) == len(seen) == 50 + 3 + gym.EVALUATION
    for row in (rows[0], task.evaluation[0]):
        assert task.score(row["input"], f"so <answer>{row['output']}</answer>", "") == 1.0
        assert task.score(row["input"], "<answer>-5</answer>", row["output"]) == 0.1
        assert task.score(row["input"], "<answer>", row["output"]) == 0.0
        assert task.score(row["input"], "its scorer raises on this", row["output"]) == 0.0
    # What ppo_training.py is told to score by is the same scorer.
    assert task.scoring_flags[0] == "--reward-function" and task.scoring_flags[1].endswith(":sums")
    reward = load_reward_function(task.scoring_flags[1])
    assert reward([task.prompt(rows[0]["input"])] * 2, [f"<answer>{rows[0]['output']}</answer>", "-5"]) == [1.0, 0.1]
    assert "not a problem of" in one_line_error(task.score, "made up", "1", "1")
    assert "at most" in one_line_error(task.source, gym.ROWS, 0)


def test_reasoning_gym_left_out_unknown_and_missing_are_one_line(stand_in, monkeypatch):
    for name in ("game_of_life_halting", "list_functions", "prime_factorization", "n_queens", "puzzle24"):
        assert "is excluded" in one_line_error(open_task, f"reasoning_gym:{name}")
    assert "not registered" in one_line_error(open_task, "reasoning_gym:nonsense")
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    assert "pip install reasoning-gym" in one_line_error(open_task, "reasoning_gym:sums")


def test_the_real_reasoning_gym():
    pytest.importorskip("reasoning_gym")
    for name in ("chain_sum", "letter_counting", "spell_backward", "maze"):
        task = open_task(f"reasoning_gym:{name}")
        assert task.source is not None
        for row in (*task.source(3, 1), task.evaluation[0]):
            assert task.score(row["input"], f"<answer>{row['output']}</answer>", "") == 1.0
    assert "without a text answer" in one_line_error(open_task, "reasoning_gym:graph_color")


def test_the_known_keys_are_those_of_the_docs():
    assert set(KNOWN_KEYS) >= {"instruction", "answer", "reward", "library", "passages", "demos", "evaluation"}
