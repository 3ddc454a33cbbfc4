"""README.md and docs/ against the code: their tables, their links, and all their commands.

A command is an indented line that begins with python, make, pip, echo, cat or for. All are run, on few rows and steps
(SHORTER), the PyTorch script's too: first the README's walkthrough, then each page's in the folder it leaves. Those of
NOT_RUN are parsed by the script's own parser and not run: they need a network, a server or a run to go on with (tested
in test_upload, test_hub, test_smollm2, test_run, test_tasks_page, test_kill_resume), serve for ever, or take minutes
(benchmarks; the recipes; demo.py, which is that walkthrough; demo_real.py, synth.run, evolve and tune in full, which
have tests of their own). For make the target has to be there, for pip the file and the pinned version.
"""

import importlib
import io
import itertools
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys

import pytest

from synth.offline.server import OfflineTeacher
from tests.flag_tables import MARKED, PAGES, PARSERS, ROOT, TABLES, with_tables
from tests.scripts import call, with_words
from tests.test_tasks_page import printed

COMMAND = re.compile(r"^ {4}((?:python|make|pip|echo|cat) .*|for .*; do .*)$", flags=re.MULTILINE)
NOT_RUN = re.compile(
    r"RUN_FOLDER|smollm2-|USER/REPO|OWNER/NAME|MODEL|runs/(?:mine|support)|:8080/v1|benchmarks/|synth/offline|demo(?:_real)?\.py"
    r"|synth/evolve|synth/tune|my_questions|^synth/run.py --task synth/tasks/arithmetic.yaml$"
)
SCRIPT_S = r"# `[^`]+`.*\n(?s:.*)<!-- table: flags of "  # the page of one script
# What is appended to a script's flags: of two equal ones the later counts.
PPO = ("--num-steps", 1, "--batch-size", 8, "--mini-batch-size", 8, "--max-completion-length", 6)
SHORTER = {
    "data.generate_digit_data": ("--num-samples", 20, "--output-dir", "data"),
    "data.generate_constraint_data": ("--num-samples", 12),
    "sft": ("--iters", 2, "--val-batches", 1),
    "ppo_training": PPO,
    "pytorch_ppo_training": PPO,
    "evaluate": ("--num-samples", 6, "--max-completion-length", 8),
    "talk_to_model": ("--max-tokens", 4),
}
NAMED = "Qwen/Qwen3-0.6B"  # of the README's first commands, which are run with tiny-digits in its place
PAGE = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}
ROWS = {
    "my_data/": [
        {"messages": [{"role": "user", "content": f"{n}"}, {"role": "assistant", "content": f"{n + 2} {n + 4}"}]}
        for n in range(1, 9)
    ],
    "my_data/my_": [{"prompt": f"{n} ", "completion": f"{n + 2} {n + 4}"} for n in range(1, 9)],
    "my_data/my_pairs_": [{"prompt": f"{n}", "chosen": f" {n + 2}", "rejected": f" {n - 1}"} for n in range(1, 9)],
    "my_data/asked_": [{"question": f"{n} ", "reply": f"{n + 2} {n + 4}"} for n in range(1, 9)],
}
FILES: dict[str, list[dict[str, object]]] = {
    "my_sums.jsonl": [{"prompt": f"{n} + 2 =", "answer": n + 2} for n in range(4)],
    "my_choices.jsonl": [{"prompt": f"{n}?", "answer": "AB"[n % 2]} for n in range(4)],
    "my_prompts.jsonl": [{"prompt": f"{n} "} for n in range(4)],
}


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def teacher_url():
    with OfflineTeacher() as server:
        yield server.url


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_digits):
    """A folder with the project's data, and a user's own under the names that the pages give it."""
    folder = tmp_path_factory.mktemp("docs")
    shutil.copytree(ROOT / "data", folder / "data", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    (folder / "synth").symlink_to(ROOT / "synth")
    (folder / "my_data").mkdir()
    for base, examples in ROWS.items():
        for split in ("train", "valid", "test"):
            (folder / f"{base}{split}.jsonl").write_text(lines(examples))
    for name, rows in FILES.items():
        (folder / name).write_text(lines(rows))
    _, function = PAGE["docs/custom_data.md"].split("    def score", 1)
    for name in ("support.yaml", "support_test.jsonl"):
        (folder / name).write_text(printed(name))
    (folder / "my_reward.py").write_text("def score" + function.split("\n\n")[0].replace("\n    ", "\n"))
    return folder


@pytest.fixture(scope="module")
def walked(world, teacher_url):
    """The folder after the README's walkthrough: the other pages take its models up."""
    run_page("README.md", world, teacher_url)
    return world


def run_page(page, world, teacher_url):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world)
        for script in ("sft", "ppo_training", "pytorch_ppo_training"):
            patch.setattr(f"{script}.plot_run", lambda folder: folder / "curves.png")
        for command in COMMAND.findall(PAGE[page].replace(NAMED, "tiny-digits")):
            run_command(command.replace("URL", teacher_url) if not NOT_RUN.search(command) else command, patch)


def run_command(command, patch):
    program, *words = shlex.split(command, comments=True)
    if program == "make":
        assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    elif program == "pip":
        pinned, named = re.findall(r"==\S+|-r \S+", command)
        assert pinned in (ROOT / named.split()[1]).read_text()
    elif program in ("for", "cat"):
        subprocess.run(["bash", "-c", command], check=True)
    else:
        typed, _, command = command.rpartition("| ")
        run_python(shlex.split(command, comments=True)[1:], patch, shlex.split(typed)[1] if typed else "2 4")


def module_path(module):
    """The file that `python -m MODULE` runs."""
    path = module.replace(".", "/")
    return f"{path}/__main__.py" if (ROOT / path).is_dir() else f"{path}.py"


def run_python(words, patch, typed):
    if words[:2] == ["-m", "pytest"]:
        assert all((ROOT / name).is_file() for name in words[2:])
        return
    path = module_path(words[1]) if words[0] == "-m" else words[0]
    words = words[2:] if words[0] == "-m" else words[1:]
    name = path.removesuffix(".py").replace("/", ".")
    assert (ROOT / path).is_file()
    if NOT_RUN.search(" ".join([path, *words])):
        if path.startswith("benchmarks/"):
            with_words(importlib.import_module(name).parse_args, *words)
        else:
            PARSERS[path]().parse_args(words)
    elif name.startswith("tests."):
        assert callable(importlib.import_module(name).table)
    else:
        patch.setattr(sys, "stdin", io.StringIO(f"{typed}\n"))
        shorter = ("--val-batches", 1) if "--epochs" in words else SHORTER.get(name, ())
        call(importlib.import_module(name).main, *words, *shorter)


def test_the_readme_s_commands(walked):
    for made in ("sft_fine_tune", "reward_model", "ppo_adapters", "ppo_learned_adapters"):
        assert (walked / made).is_dir()


@pytest.mark.parametrize("page", [page for page in PAGE if page != "README.md"])
def test_a_page_s_commands(page, walked, teacher_url):
    if "my_saved" in PAGE[page]:
        datasets = pytest.importorskip("datasets")
        datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS["my_data/my_"])}).save_to_disk(
            walked / "my_saved"
        )
    run_page(page, walked, teacher_url)


@pytest.mark.parametrize(("page", "made"), [("sft", "my_adapters"), ("ppo_training", "my_ppo_adapters")])
def test_a_page_s_python_runs_as_printed(page, made, world, monkeypatch):
    _, section = PAGE[f"docs/{page}.md"].split("## From Python\n\n")
    code = itertools.takewhile(lambda line: not line[:4].strip(), section.splitlines())
    (world / "example.py").write_text("\n".join(line[4:] for line in code))
    monkeypatch.chdir(world)
    found = runpy.run_path("example.py")
    assert len(found["history"]) > 1
    assert (world / made / "adapters.safetensors").is_file()


def test_the_tables_are_what_the_code_makes():
    for name, text in PAGE.items():
        assert with_tables(text) == text, f"{name}: run python -m tests.flag_tables"


def test_every_table_stands_on_one_page_and_every_script_has_one():
    found = [table for text in PAGE.values() for table in re.findall(r"<!-- table: (.+?) -->", text)]
    assert sorted(found) == sorted(TABLES) == sorted(table for text in PAGE.values() for table in MARKED.findall(text))
    folders = [ROOT, *(ROOT / name for name in ("data", "synth", "synth/pipeline", "synth/offline"))]
    scripts = [
        path for folder in folders for path in folder.glob("*.py") if '__name__ == "__main__"' in path.read_text()
    ]
    assert {str(path.relative_to(ROOT)) for path in scripts} == set(PARSERS)


@pytest.mark.parametrize("page", [page for page, text in PAGE.items() if re.match(SCRIPT_S, text)])
def test_a_script_s_page_opens_with_use_commands_and_traps_and_ends_with_flags(page):
    title, use, commands, *rest = PAGE[page].split("\n\n")
    assert title.startswith("# `") and not use.startswith(" ")
    assert commands.count("\n") == 2 and len(COMMAND.findall(commands)) == 3
    assert rest[0] == "**Traps**" and rest[1].startswith("- ")
    assert PAGE[page].endswith("<!-- end -->\n") and "\n## Flags\n" in PAGE[page]


@pytest.mark.parametrize("page", PAGE)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", PAGE[page]):
        file, _, anchor = target.partition("#")
        linked = (ROOT / page).parent / file if file else ROOT / page
        assert linked.exists(), target
        headings = re.findall(r"^#+ (.*)$", linked.read_text(), flags=re.MULTILINE) if anchor else []
        assert not anchor or anchor in [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings], target


def test_every_page_is_on_the_index():
    index = PAGE["docs/README.md"]
    assert all(f"({page.name})" in index for page in PAGES if page.name != "README.md")
    assert sum(len(COMMAND.findall(text)) for text in PAGE.values()) > 40
