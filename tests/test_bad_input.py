# ruff: noqa: E501  (a table)
"""Bad input to every script: exit code 2, one line on stderr with fact, value and remedy, and no file changed.

The mains are called in this process, as starting one takes seconds; what hangs on the process is in tests/test_cli.py
and tests/test_faults.py. Rows, YAML, teachers and rewards have further cases in the tests of their readers.
"""

import hashlib
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.scripts import ROOT, fails

# Every file of ours that is a command, but for one that takes no input.
MODULES = {
    **{f"{name}.py": name for name in ("sft", "ppo_training", "pytorch_ppo_training", "evaluate", "fuse", "talk_to_model", "demo", "demo_real")},
    **{f"data.{name}": f"data.{name}" for name in ("check", "generate_digit_data", "generate_constraint_data")},
    **{f"synth.{name}": f"synth.{name}" for name in ("run", "evolve", "tune")}, "synth.offline": "synth.offline.__main__",
    **{name: f"synth.pipeline.{name}" for name in ("generate", "verify", "difficulty", "selection", "train", "report")},
    **{name: f"training.{name}" for name in ("compare", "plots")},
    **{name: f"models.{name}" for name in ("doctor", "locate", "tiny", "smollm2", "gguf_folder")},
}  # fmt: skip
SCRIPTS = {name: importlib.import_module(module).main for name, module in MODULES.items()}
WITHOUT_YAML = {"demo.py", "synth.tune", "synth.offline", "report", "compare", "plots", "doctor", "locate", "tiny", "smollm2", "gguf_folder"}
WITH_YAML = [name for name in SCRIPTS if name not in WITHOUT_YAML]
TASK = "task.yaml"
REQUIRED = {"generate": ("--task", "--out"), "selection": ("--in", "--out"),
            **dict.fromkeys(("verify", "difficulty"), ("--task", "--in", "--out"))}  # fmt: skip
NAMELESS = {"report": ["run"], "compare": ["run"], "plots": ["run"], "locate": ["model"], "gguf_folder": ["a.gguf"]}

FILES: dict[str, str | bytes] = {
    "unknown.yaml": "no_such_flag: 1", "list.yaml": "- a", "empty.yaml": "", "utf8.yaml": b"seed: \xff",
    "cut.yaml": "seed: [1", "twice.yaml": "seed: 1\nmodel: x\nseed: 2", "digits.yaml": "seed: " + "9" * 5000,
    "deep.yaml": "seed: " + "[" * 50 + "]" * 50, "tag.yaml": "seed: !!python/object/apply:os.system [ls]",
    "bomb.yaml": "a: &a [x,x,x,x,x,x,x,x,x]\n" + "\n".join(
        f"b{n}: &b{n} [{','.join(['*' + (f'b{n - 1}' if n else 'a')] * 9)}]" for n in range(9)),
    "large.yaml": "seed: 1 # " + "x" * 10**6, "null.yaml": 'seed: "\\0"',
    "rows_json.jsonl": '{"prompt": "a", "completion": "b"}\n{"prompt": "a"', "rows_list.jsonl": "[1]",
    "rows_keys.jsonl": '{"a": 1}', "rows_empty.jsonl": "\n", "rows_utf8.jsonl": b'{"prompt": "\xff"}',
    "rows_half.jsonl": '{"prompt": "a\\ud800", "completion": "b", "answer": "c"}', "rows_deep.jsonl": "[" * 5000,
    "rows_type.jsonl": '{"prompt": 1, "completion": "b"}', "rows_digits.jsonl": '{"prompt": ' + "9" * 5000 + "}",
    "rows_role.jsonl": '{"messages": [{"from": ["human"], "value": "a"}]}', "rows_none.jsonl": '{"messages": []}',
    "rows_content.jsonl": '{"messages": [{"role": "user", "content": 1}]}',
    "answers.jsonl": '{"prompt": "2", "answer": "1"}', "good.jsonl": '{"prompt": "2 4 6"}', "two.jsonl": '{"prompt": "2", "answer": "1"}\n{"prompt": "2", "answer": "3"}',
    "rewards.py": """import sys, time
def exits(p, c): sys.exit(0)
def raises(p, c): raise ValueError("two\\nlines")
def few(p, c): return [1.0]
def text(p, c): return "good"
def nan(p, c): return [float("nan")] * len(c)
def large(p, c): return [1e39] * len(c)
def none(p, c): return None
def hangs(p, c):
    while True: time.sleep(1)  # and leaves the other cases the interpreter
number = 3
""",
    "exits.py": "import sys\nsys.exit(0)", "cut.py": "def score(", "words.txt": "no python",
    TASK: "instruction: Add.\nanswer: number\ndemos: [{input: 1 + 1, output: 2}]\nevaluation: [{input: 2 + 2, output: 4}]",
    "instructions_list.json": "{}", "instructions_cut.jsonl": '{"instruction": ', "instructions_empty.txt": "\n",
    "instructions_keys.jsonl": '{"a": 1}', "instructions_deep.jsonl": "[" * 5000, "instructions_utf8.txt": b"\xff",
    "a_file": "text", "adapter/adapter_config.json": "{}",
}  # fmt: skip

YAML = {
    "gone.yaml": "gone.yaml cannot be read (No such file", ".": "cannot be read (Is a directory)",
    "unknown.yaml": "unknown key 'no_such_flag'; known are", "list.yaml": "is not a YAML mapping",
    "empty.yaml": "is not a YAML mapping", "utf8.yaml": "is not UTF-8; save it", "cut.yaml": "line 2 is not valid YAML",
    "twice.yaml": "line 3 cannot be taken (key 'seed' is there twice)", "digits.yaml": "line 1 cannot be taken (integer",
    "deep.yaml": "line 1 cannot be taken (nested more than", "tag.yaml": "line 1 cannot be taken (it has the tag",
    "bomb.yaml": "once aliases are replaced", "large.yaml": "over 1,000,000 characters",
    "null.yaml": "text with a null character",
}  # fmt: skip
ROWS = {
    "rows_json.jsonl": ":2 is not valid JSON", "rows_list.jsonl": ":1 is list, not an object",
    "rows_keys.jsonl": ":1 has the keys ['a']; write", "rows_empty.jsonl": "holds no rows; each line",
    "rows_utf8.jsonl": "is not UTF-8 (byte", "rows_half.jsonl": ":1 is not valid JSON (half of a surrogate pair",
    "rows_deep.jsonl": ":1 is not valid JSON (nested more than 64", "rows_digits.jsonl": ":1 is not valid JSON (Exceeds",
}  # fmt: skip
URLS = ["http://127.0.0.1:99999/v1", "http://127.0.0.1:x/v1", "http://[::1/v1", "http://a..b/v1", "http://a b/v1",
        "ftp://a/v1", "nothing", "http://"]  # fmt: skip
REWARDS = {
    "rewards.py:exits": "failed: SystemExit: 0 (rewards.py, line 2); fix it", "rewards.py:raises": "two lines (rewards",
    "rewards.py:few": "1 scores for 2", "rewards.py:text": "return a list of 2 numbers", "rewards.py:nan": "not finite",
    "rewards.py:large": "too large", "rewards.py:none": "returned None; return a list", "rewards.py": "file.py:name",
    "rewards.py:number": "not a function; name one", "rewards.py:gone": "check the name", "gone.py:f": "check the path",
    "exits.py:f": "cannot be imported: SystemExit: 0 (exits.py, line 2)", "cut.py:score": "SyntaxError", "words.txt:f": "not a .py",
    ":f": "not of the form", "rewards.py:hangs": "has not returned after 0.3 s",
}  # fmt: skip
TASKS = {
    "a: 1": "unknown key 'a'; known are", "instruction: 1\nanswer: number": "has 1 as instruction; it must be text",
    "answer: number": "lacks an instruction; write", "instruction: x": "lacks answer",
    "instruction: x\nanswer: [1]": "as answer; write", "instruction: x\nanswer: what": "answer type 'what' is unknown",
    "instruction: x\nanswer: {type: label}": "lacks", "instruction: x\nreward: {type: a}": "as reward; write",
    "instruction: x\nanswer: number\nreward: a.py:b": "both an answer and a reward; keep one",
    "instruction: x\nanswer: number\nlibrary: gone": "does not exist; check the path",
    f"instruction: x\nanswer: number\nlibrary: {'a' * 300}": "name too long",
    "instruction: x\nanswer: number\ndemos: [{a: 1}]": "write",
    "instruction: x\nanswer: number\nevaluation: [{input: 1, output: z}]": "cannot read; fix it",
    "instruction: x\nanswer: number\nnear_duplicates: a": "it must be a number",
    "instruction: x\nanswer: number\nprompt: none": "without {input}; write where",
    f"instruction: x\nreward: {{type: digits, multiple_of: {2**70}}}": "of more than 64 bits",
    "instruction: x\nreward: exits.py:f": "imported: SystemExit: 0",
    "instruction: x\nanswer: {type: regex, pattern: '('}": "pattern",
    'instruction: x\nanswer: number\nname: "a\\nb"\nlibrary: gone': "does not exist",
}  # fmt: skip
TUNE = {
    "a: 1": "unknown key 'a'; known are", "rl_tuning: {a: 1}": "unknown key 'rl_tuning.a'",
    "rl_tuning: {enable_rl_tuning: false}": "set it to true", "seed: -1": "sets seed to -1", "temperature: hot": "'hot'",
    "templates: [none]": "'none' is not one of", "rl_tuning: {batch_size: 0}": "sets rl_tuning.batch_size to 0",
    "rl_tuning: {enable_rl_tuning: true}": "neither a target nor a task is named; write",
    "rl_tuning: {enable_rl_tuning: true, target_model_path: gone.py:f}": "does not exist; check the path",
    f"task: {TASK}\nsft_flags: '--no-such'\nrl_tuning: {{enable_rl_tuning: true}}": "see sft.py --help",
    f"task: {TASK}\nsft_flags: '\"'\nrl_tuning: {{enable_rl_tuning: true}}": "No closing quotation",
    f"task: {TASK}\nsft_model: ./gone\nrl_tuning: {{enable_rl_tuning: true}}": "gone",
    f"task: {TASK}\nteacher: {{teacher_url: 'http://x:99999', teacher_model: m}}\nrl_tuning: {{enable_rl_tuning: true}}":
        "is not of the form",
    f"task: {TASK}\nteacher: {{concurrency: 0}}\nrl_tuning: {{enable_rl_tuning: true}}": "concurrency",
    f"task: {TASK}\nteacher: {{what: 0}}\nrl_tuning: {{enable_rl_tuning: true}}": "unknown key 'what'",
}  # fmt: skip
PPO = ["--ground-truth-reward", "--num-steps", "1", "--batch-size", "2", "--mini-batch-size", "2"]
DATA = ["--data", str(ROOT / "data"), "--data-base", "increasing_mult_2_"]
SYNTH = ["--task", "arithmetic.yaml"]
OTHERS = [
    ("sft.py", [], "neither --train nor --test is given"), ("sft.py", ["--train", "--data", "gone"], "is not a folder"),
    ("sft.py", ["--train", "--iters", "x"], "--iters is x; it has to be"), ("sft.py", ["--resume", "gone"], "no run"),
    ("sft.py", ["--train", *DATA, "--model", "./gone"], "gone"), ("sft.py", ["--train", "--save-file", "a_file"], "a file, where"),
    ("sft.py", ["--train", *DATA, "--data-base", "a\nb"], "a\\nb"), ("sft.py", ["--train", "--data", "x" * 300], "name too long"),
    ("sft.py", ["--train", "--data", "a_file"], "is not a folder; name the one"),
    ("sft.py", ["--train", *DATA, "--resume-adapter-file", "gone"], "gone"),
    ("ppo_training.py", [], "none of --ground-truth-reward"), ("ppo_training.py", [*PPO, "--model", "./gone"], "gone"),
    ("ppo_training.py", [*PPO, "--save-file", "/dev/null"], "is a device or socket, where"),
    ("ppo_training.py", [*PPO, "--prompts", "gone.jsonl"], "does not exist; check the path"),
    ("ppo_training.py", [*PPO, "--resume-file", "gone"], "gone"), ("ppo_training.py", [*PPO, "--resume", "."], "no run"),
    ("ppo_training.py", ["--answer", "number", "--prompts", "two.jsonl"], "two answers for the prompt '2'; keep one"),
    ("ppo_training.py", ["--answer", "number"], "--answer needs the answers; give"),
    ("ppo_training.py", ["--answer", "[", "--prompts", "answers.jsonl"], "--answer is '['; write a type"),
    ("ppo_training.py", [*PPO, "--reward-weights", "a=b"], "is not NAME=NUMBER"),
    ("ppo_training.py", [*PPO, "--reward-timeout", "-1"], "--reward-timeout"),
    ("pytorch_ppo_training.py", [*PPO, "--model", "./gone"], "gone"), ("pytorch_ppo_training.py", [], "none of --ground"),
    ("pytorch_ppo_training.py", [*PPO, "--device", "tpu"], "invalid choice: 'tpu'"),
    ("evaluate.py", [], "none of --ground"), ("evaluate.py", ["--ground-truth-reward", "--save-samples", "."], "folder"),
    ("evaluate.py", ["--ground-truth-reward", "--against", "tiny-digits"], "is the evaluated model itself; name another"),
    ("evaluate.py", ["--ground-truth-reward", "--save-samples", "/dev/null"], "is a device"),
    ("fuse.py", ["--adapter-file", "gone"], "gone"), ("fuse.py", ["--adapter-file", "a_file"], "a_file"),
    ("fuse.py", ["--adapter-file", "adapter"], "adapter"), ("fuse.py", ["--model", "./gone"], "adapters"),
    ("talk_to_model.py", ["--model", "./gone"], "gone"), ("talk_to_model.py", ["--resume-file", "gone"], "gone"),
    ("talk_to_model.py", ["--compare", "tiny-digits"], "is --model itself; name another"),
    ("demo.py", ["--output-dir", "adapter"], "was not created by the demo"),
    ("data.check", ["--data", "gone"], "is not a folder"), ("data.check", ["--data", "gone.jsonl"], "gone.jsonl"),
]  # fmt: skip

# Where an output cannot go, and what makes one.
PLACES = ["/dev/null", "pipe", "link", "dangling", "a_file/new", "/proc/new", "~nosuchuser/new", "x" * 300, "/dev/null/new"]
OUTPUTS = [
    *((script, [*words, "--save-file"]) for script, words in (
        ("sft.py", ["--train", *DATA]), ("ppo_training.py", PPO), ("pytorch_ppo_training.py", PPO))),
    ("evaluate.py", ["--ground-truth-reward", "--num-samples", "2", "--save-samples"]),
    ("data.generate_digit_data", ["--increasing", "--num-samples", "3", "--output-dir"]),
    ("data.generate_constraint_data", ["--num-samples", "6", "--output-dir"]),
    ("synth.run", [*SYNTH, "--output-dir"]), ("synth.evolve", ["--rounds", "1", "--output-dir"]),
    ("demo.py", ["--output-dir"]), ("demo_real.py", ["--short", "--model", "tiny-digits", "--output-dir"]),
]  # fmt: skip
ADAPTER = {"fine_tune_type": "lora", "num_layers": 1, "model": "tiny-digits",
           "lora_parameters": {"rank": 8, "scale": 1.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]}}  # fmt: skip
CONFIGS: dict[str, tuple[object, str]] = {
    "list": ([], "has something else: input should be an object"), "null": (None, "has None: input should be an object"),
    "type": ({**ADAPTER, "fine_tune_type": 7}, "has 7 as fine_tune_type"),
    "layers": ({**ADAPTER, "num_layers": 10**30}, "as num_layers: input should be less"),
    "keys": ({**ADAPTER, "lora_parameters": {**ADAPTER["lora_parameters"], "keys": [1]}}, "has 1 as lora_parameters.keys.0"),  # type: ignore[dict-item]
    "rank": ({**ADAPTER, "lora_parameters": {**ADAPTER["lora_parameters"], "rank": "8"}}, "has '8' as lora_parameters.rank"),  # type: ignore[dict-item]
    "scale": ({**ADAPTER, "lora_parameters": {**ADAPTER["lora_parameters"], "scale": None}}, "has None as lora_parameters.scale"),  # type: ignore[dict-item]
    "provenance": ({**ADAPTER, "provenance": [{"script": 1}]}, "has 1 as provenance.0.script"),
}  # fmt: skip
WEIGHTS = {"empty": b"", "cut": b"\x10\0\0\0", "huge": b"\xff" * 8 + b"{}", "zero": b"\0" * 64, "text": b"hello world"}
READ_ADAPTERS = [("talk_to_model.py", ["--resume-file"]), ("evaluate.py", ["--ground-truth-reward", "--resume-file"]),
                 ("ppo_training.py", [*PPO, "--resume-file"]), ("pytorch_ppo_training.py", [*PPO, "--resume-file"]),
                 ("sft.py", ["--train", *DATA, "--resume-adapter-file"]), ("fuse.py", ["--adapter-file"]),
                 ("ppo_training.py", ["--num-steps", "1", "--reward-model"])]  # fmt: skip
RUNS = ["", "{", "[]", "3", '{"no_such_flag": 1}', '{"seed": -1}', '{"seed": "7"}', '{"seed": NaN}', '{"model": ["a"]}', "[" * 5000]
RESUMED = ("sft.py", "ppo_training.py", "pytorch_ppo_training.py", "synth.run", "synth.evolve", "synth.tune")
NUMBERS = [
    *((script, flag, text) for script in ("sft.py", "ppo_training.py", "pytorch_ppo_training.py") for flag, text in (
        ("--learning-rate", "inf"), ("--max-grad-norm", "-1"), ("--weight-decay", "-1"), ("--seed", str(2**64)),
        ("--warmup-steps", "-1"), ("--keep-checkpoints", "-1"), ("--lora-scale", "nan"), ("--batch-size", "0"))),
    *((script, flag, text) for script in ("ppo_training.py", "pytorch_ppo_training.py") for flag, text in (
        ("--gamma", "2"), ("--gae-lambda", "5"), ("--ratio-threshold", "0"), ("--temperature", "inf"), ("--num-steps", "1" + "0" * 30))),
    ("evaluate.py", "--temperature", "nan"), ("evaluate.py", "--num-samples", "0"), ("talk_to_model.py", "--seed", "-1"),
    ("fuse.py", "--max-fuse-kl", "nan"), ("synth.run", "--answer-tokens", "0"), ("synth.run", "--concurrency", "0"),
    ("synth.run", "--timeout", "1e400"), ("synth.evolve", "--rounds", "-1"), ("synth.offline", "--port", "-1"),
    ("data.generate_digit_data", "--noise", "2"), ("data.generate_constraint_data", "--num-samples", "0"),
    ("data.check", "--rows", "-1"), ("tiny", "--seed", "nan"), ("demo.py", "--seed", "-1"), ("demo_real.py", "--seed", "x"),
]  # fmt: skip
NOT_THERE = [
    *((name, [*(word for flag in REQUIRED[name] for word in (flag, "gone.jsonl"))], "gone") for name in REQUIRED),
    ("selection", ["--in", "rows_json.jsonl", "--out", "new.jsonl"], "rows_json.jsonl:1 has the keys"),
    ("selection", ["--in", "good.jsonl", "--out", "new.jsonl"], "good.jsonl"), ("train", ["--task", "gone.yaml", "--in", "good.jsonl"], "gone"),
    ("train", ["--task", TASK], "a task and samples are needed; give"),
    ("report", ["gone"], "gone is not a folder"), ("report", ["a_file"], "a_file is not a folder"),
    ("compare", ["gone"], "gone holds no run"), ("compare", ["a_file", "gone"], "holds no run"),
    ("plots", ["gone"], "gone holds no run"), ("plots", ["a_file"], "a_file holds no run"),
    ("gguf_folder", ["gone.gguf"], "gone.gguf is no file"), ("gguf_folder", ["a_file"], "a_file"),
    ("gguf_folder", ["cut.gguf"], "cut.gguf"), ("smollm2", ["--dtype", "int3"], "invalid choice: 'int3'"),
    ("tiny", ["--name", "none"], "invalid choice: 'none'"), ("sft.py", ["--dpo", "--train", "--data", "equal", "--data-base", ""],
                                                             "train.jsonl:1: chosen and rejected are the same; take the row"),
]  # fmt: skip


def cases():
    """(script, words, what the line says) of every case."""
    for name in SCRIPTS:
        required = [word for flag in REQUIRED.get(name, ()) for word in (flag, "good.jsonl")] + NAMELESS.get(name, [])
        yield name, [*required, "--no-such-flag\nof-two-lines"], "--no-such-flag\\nof-two-lines; see"
    for name in WITH_YAML:
        yield from ((name, ["-c", file], said) for file, said in YAML.items())
    for file, said in ROWS.items():
        yield "sft.py", ["--train", "--data", file.removesuffix(".jsonl")], f"train.jsonl{said}" if said[0] == ":" else said
        yield "ppo_training.py", [*PPO, "--prompts", file], said
    for file in ("rows_type", "rows_role", "rows_none", "rows_content"):
        yield "sft.py", ["--train", "--data", file], "train.jsonl:1 has"
    for script in ("ppo_training.py", "pytorch_ppo_training.py", "evaluate.py"):
        words = ["--reward-timeout", "0.3", *(["--num-samples", "2"] if script == "evaluate.py" else ["--num-steps", "1"])]
        for spec, said in REWARDS.items():
            yield script, [*words, "--prompts", "good.jsonl", "--reward-function", spec], said
    for url in URLS:
        yield "synth.run", [*SYNTH, "--teacher-url", url, "--teacher-model", "m"], "is not of the form"
        yield "synth.evolve", ["--teacher-url", url, "--teacher-model", "m", "--instructions", "a_file"], "of the form"
    for number, said in enumerate(TASKS.values()):
        yield "synth.run", ["--task", f"task{number}.yaml"], said
    for number, said in enumerate(TUNE.values()):
        yield "synth.tune", ["--config", f"tune{number}.yaml"], said
    for name in FILES:
        if name.startswith("instructions_"):
            yield "synth.evolve", ["--instructions", name], name
    yield from OTHERS
    for script, words in OUTPUTS:
        for place in PLACES:
            if place != "link" or words[-1] != "--output-dir":  # files may go to a folder by its link
                yield script, [*words, place], place.removesuffix("/new").removeprefix("~")
    for script, words in READ_ADAPTERS:
        yield from ((script, [*words, f"config_{name}"], said) for name, (_, said) in CONFIGS.items())
        yield from ((script, [*words, f"weights_{name}"], "adapters.safetensors cannot be read") for name in WEIGHTS)
    for number in range(len(RUNS)):
        yield from ((script, ["--resume", f"run{number}"], f"run{number}") for script in RESUMED)
    for script, flag, text in NUMBERS:
        needed = {"sft.py": ["--train"], "evaluate.py": PPO[:1], "ppo_training.py": PPO, "pytorch_ppo_training.py": PPO}
        yield script, [*needed.get(script, []), flag, text], f"{flag} is {text}; it has to be a"
    yield from NOT_THERE
    for file, said in ROWS.items():
        yield "pytorch_ppo_training.py", [*PPO, "--prompts", file], said
        yield "evaluate.py", [*PPO[:1], "--prompts", file], said


CASES = list(cases())


@pytest.fixture(scope="module")
def folder(tiny_folder, tmp_path_factory):
    """Every file that a case names."""
    folder = tmp_path_factory.mktemp("bad")
    shutil.copytree(tiny_folder, folder / "model")
    files = dict(FILES)
    files |= {f"task{n}.yaml": text for n, text in enumerate(TASKS)} | {f"tune{n}.yaml": t for n, t in enumerate(TUNE)}
    files["arithmetic.yaml"] = (ROOT / "synth/tasks/arithmetic.yaml").read_text(encoding="utf-8").replace(
        "../../data", str(ROOT / "data"))  # fmt: skip
    for name in [*ROWS, "rows_type.jsonl", "rows_role.jsonl", "rows_none.jsonl", "rows_content.jsonl"]:
        for split in ("train", "valid"):
            files[f"{name.removesuffix('.jsonl')}/increasing_mult_2_{split}.jsonl"] = FILES[name]
    files |= {f"config_{name}/adapter_config.json": json.dumps(content) for name, (content, _) in CONFIGS.items()}
    files |= {f"config_{name}/adapters.safetensors": b"\x02\0\0\0\0\0\0\0{}" for name in CONFIGS}
    files |= {f"weights_{name}/adapter_config.json": json.dumps(ADAPTER) for name in WEIGHTS}
    files |= {f"weights_{name}/adapters.safetensors": content for name, content in WEIGHTS.items()}
    files |= {f"run{number}/config.json": content for number, content in enumerate(RUNS)}
    files |= {f"equal/{split}.jsonl": '{"prompt": "a", "chosen": "b", "rejected": "b"}' for split in ("train", "valid")}
    files["cut.gguf"] = "GGUF"
    os.mkfifo(folder / "pipe")
    (folder / "link").symlink_to("adapter")
    (folder / "dangling").symlink_to("nowhere")
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def tree(folder: Path) -> str:
    """A hash of all names and contents below a folder."""
    found = [(str(path), path.lstat().st_mode, path.read_bytes() if path.is_file() else b"") for path in sorted(folder.rglob("*"))]
    return hashlib.sha256(repr(found).encode()).hexdigest()


def commands():
    """The text of every file with a main of its own, by its name."""
    folders = ("common", "data", "models", "rewards", "training", "synth")
    paths = [*ROOT.glob("*.py"), *(path for folder in folders for path in (ROOT / folder).rglob("*.py"))]
    texts = {str(path.relative_to(ROOT)): path.read_text() for path in paths}
    return {name: text for name, text in texts.items() if re.search(r'^if __name__ == "__main__":\n.*\(', text, re.M)
            and re.search("^def main|import main$", text, re.M)}  # fmt: skip


def test_there_are_enough():
    assert len(CASES) >= 250 and {script for script, _, _ in CASES} == set(SCRIPTS)
    files = {f"{module.replace('.', '/')}.py" for module in MODULES.values()}
    assert files == commands().keys() - {"models/cpu/blas.py"}


def test_every_module_runs_by_its_path_too():
    """python synth/run.py is what python -m synth.run is: the root is on Python's path before anything is imported."""
    for name, text in commands().items():
        ours = re.search(r"^(from|import) (common|data|models|rewards|training|synth)\b", text, re.M)
        if "/" in name and ours:
            assert "    sys.path.insert(0, str(Path(__file__).resolve().parent" in text[: ours.start()], name
    words = ["synth/offline/__main__.py", "--x"]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    said = "error: unrecognized arguments: --x; see python synth/offline/__main__.py --help\n"
    assert (done.returncode, done.stderr) == (2, said)


@pytest.mark.parametrize(("script", "words", "said"), CASES)
def test_is_a_line_and_changes_nothing(folder, monkeypatch, capsys, script, words, said):
    monkeypatch.chdir(folder)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if script == "pytorch_ppo_training.py" and not {"--model", "--resume"} & set(words):
        words = [*words, "--model", "model"]  # by its name a process of its own would find one
    before = tree(folder)
    line = fails(capsys, SCRIPTS[script], *words)
    assert said in line and line.isprintable() and len(line) < 5000
    assert ";" in line  # fact and value, then the remedy
    assert tree(folder) == before
    assert json.dumps(line) and os.getcwd() == str(folder)
