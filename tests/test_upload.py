"""Uploading: the folder arrives complete and private; an error leaves it intact and says how to continue."""

import hashlib
import os
import shlex
import subprocess
import sys
from pathlib import Path

import huggingface_hub.utils._http
import pytest
import yaml
from huggingface_hub import ModelCard, constants

import fuse
import sft
from common.cli import run
from common.errors import UserError
from common.files import read_json, write_json
from models.export.model_card import FUSE, PROVENANCE_FILE, provenance_of, write_card
from rewards.function import function_label
from tests.flag_tables import parser_of
from tests.scripts import call, fails, with_words
from tests.upload_server import HubServer
from training.metrics import provenance

TOKEN = "hf_secret_of_the_test"
NAME = "alice/digits"


@pytest.fixture(scope="module")
def adapter(tiny_folder, tmp_path_factory):
    """An adapter of a run of three steps."""
    folder = tmp_path_factory.mktemp("run")
    words = ("--model", tiny_folder, "--train", "--iters", 3, "--val-batches", 1, "--lora-rank", 2)
    call(sft.main, *words, "--save-file", folder / "adapters", "--output-dir", folder / "run")
    return folder / "adapters"


@pytest.fixture
def at_home(monkeypatch, tmp_path):
    """A function that makes a server this process's hub, with a token as login."""
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-login"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", lambda seconds: None)  # between its own retries

    def connect(hub, token=TOKEN):
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        if token:
            monkeypatch.setenv("HF_TOKEN", token)

    return connect


def words(tiny_folder, adapter, tmp_path, *flags):
    save_to = ("--save-path", tmp_path / "out", "--upload-name", NAME)
    return ["--model", tiny_folder, "--adapter-file", adapter, *save_to, *flags]


def content_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("public", [False, True])
def test_every_byte_arrives_where_it_should(tiny_folder, adapter, tmp_path, at_home, capsys, public):
    with HubServer(token=TOKEN) as hub:
        at_home(hub)
        call(fuse.main, *words(tiny_folder, adapter, tmp_path, *["--public"] * public))
        assert hub.repos == {NAME: not public}  # name → private
        assert hub.files == content_of(tmp_path / "out") and "model.safetensors" in hub.files
    output = "".join(capsys.readouterr())
    assert f"uploaded: {hub.url}/{NAME}\n" in output and TOKEN not in output
    assert not any(TOKEN.encode() in content for content in content_of(tmp_path).values())


@pytest.mark.parametrize(
    ("refuse", "why"),
    [({"repos/create": 401}, "401"), ({"repos/create": 403}, "403"), ({"preupload": 500}, "500"),
     ({"objects/batch": 403}, "403"), ({"lfs-object": 0}, "model.safetensors"), ({"/commit/": 500}, "500"),
     ({"/commit/": 0}, "disconnected")],
    ids=str,
)  # fmt: skip
def test_a_broken_upload_leaves_the_folder_whole(tiny_folder, adapter, tmp_path, at_home, capsys, refuse, why):
    with HubServer(refuse, TOKEN) as hub:
        at_home(hub)
        with pytest.raises(SystemExit) as stopped:
            with_words(lambda: run(fuse.main), *words(tiny_folder, adapter, tmp_path))
        assert stopped.value.code == 2 and not hub.files
    output = capsys.readouterr()
    line = output.err.splitlines()[-1]
    assert line.startswith(f"error: the upload to {NAME} failed (") and why in line
    assert line.endswith(f"{tmp_path}/out is complete; continue with: hf upload {NAME} {tmp_path}/out . --private")
    assert "Traceback" not in output.err and TOKEN not in output.err + output.out
    call(fuse.main, *words(tiny_folder, adapter, tmp_path)[:4], "--save-path", tmp_path / "alone")
    written, alone = content_of(tmp_path / "out"), content_of(tmp_path / "alone")
    assert {name for name in written if written[name] != alone[name]} == {"README.md"}  # which has the name


def test_the_command_it_names_goes_on(tiny_folder, adapter, tmp_path, at_home, capsys):
    """In a separate process, as typed by a user."""
    with HubServer({"/commit/": 500}, TOKEN) as hub:
        at_home(hub)
        with pytest.raises(SystemExit):
            with_words(lambda: run(fuse.main), *words(tiny_folder, adapter, tmp_path))
        command = shlex.split(capsys.readouterr().err.splitlines()[-1].partition("continue with: ")[2])
        hub.refuse = {}
        own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
        tool = Path(sys.executable).parent / command[0]
        done = subprocess.run(
            [tool, *command[1:]], env={**os.environ, **own}, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
        assert hub.files == content_of(tmp_path / "out") and hub.repos == {NAME: True}


def test_ctrl_c_says_how_to_go_on(tiny_folder, adapter, tmp_path, at_home, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(fuse, "upload", interrupted)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(SystemExit) as stopped:
        with_words(lambda: run(fuse.main), *words(tiny_folder, adapter, tmp_path))
    assert stopped.value.code == 130
    assert f"continue with: hf upload {NAME} {tmp_path}/out . --private" in capsys.readouterr().err


def test_a_public_repository_gets_nothing_that_is_to_be_private(tiny_folder, adapter, tmp_path, at_home, capsys):
    with HubServer(token=TOKEN) as hub:
        at_home(hub)
        hub.repos[NAME] = False
        with pytest.raises(SystemExit):
            with_words(lambda: run(fuse.main), *words(tiny_folder, adapter, tmp_path))
        assert "and is public, so nothing was uploaded" in capsys.readouterr().err
        assert not hub.files and (tmp_path / "out" / "model.safetensors").is_file()
        call(fuse.main, *words(tiny_folder, adapter, tmp_path, "--public"))
        assert hub.files == content_of(tmp_path / "out")


def test_what_cannot_work_is_said_before_the_base_is_opened(
    tiny_folder, adapter, tmp_path, at_home, capsys, monkeypatch
):
    monkeypatch.setattr(fuse, "load", lambda name: pytest.fail("the base was opened"))
    assert "set HF_TOKEN, or run: hf auth login" in fails(capsys, fuse.main, *words(tiny_folder, adapter, tmp_path))
    for name in ("digits", "a/b/c", "a b/c", "https://huggingface.co/a/b"):
        line = fails(
            capsys, fuse.main, "--adapter-file", adapter, "--upload-name", name, "--save-path", tmp_path / "out"
        )
        assert f"--upload-name is {name!r}; give USER/REPO" in line
    assert not (tmp_path / "out").exists()


# --- the model card ---


def yaml_blocks(text):
    return [yaml.safe_load(block.partition("```")[0]) for block in text.split("```yaml\n")[1:]]


def test_the_card_says_what_made_the_model(tiny_folder, adapter, tmp_path):
    call(fuse.main, "--model", tiny_folder, "--adapter-file", adapter, "--save-path", tmp_path / "first")
    text = (tmp_path / "first" / "README.md").read_text()
    card = ModelCard(text).data.to_dict()
    assert card["library_name"] == "mlx" and "base_model" not in card  # a folder here is none on the hub
    assert "tuned from `tiny-random`" in text and "`increasing_mult_2_train.jsonl`" in text
    assert "| steps | 3 |" in text and "| valid loss | " in text
    assert str(tiny_folder.parent) not in text and str(adapter) not in text

    # its command reproduces the flags of the run, except for paths
    (flags,) = yaml_blocks(text)
    (tmp_path / "run1.yaml").write_text(yaml.safe_dump(flags))
    again = vars(parser_of(sft.parse_args).parse_args(["-c", str(tmp_path / "run1.yaml")]))
    run_flags = read_json(adapter.parent / "run" / "config.json")
    same = run_flags.keys() - {"model", "save_file", "output_dir", "config", "blas"}
    assert {name: again[name] for name in same} == {name: run_flags[name] for name in same}
    assert again["model"] == "tiny-random"


def test_a_model_of_two_runs_names_both_and_its_first_base(adapter, tmp_path):
    base, second = tmp_path / "base", tmp_path / "second"
    base.mkdir()
    second.mkdir()
    first = {
        "script": "sft.py",
        "flags": {"model": "org/base", "data_base": "a_", "train": True},
        "figures": {"steps": 1},
    }
    write_json(base / PROVENANCE_FILE, [first])
    ppo = {
        "script": "ppo_training.py",
        "flags": {"model": "/home/alice/base", "answer": "number", "prompts": "p.jsonl"},
    }
    runs = provenance_of(base, [{**ppo, "figures": {"mean_score": 0.5}}])
    write_card(second, "alice/model", "/home/alice/base", runs, is_reward_model=False)
    text = (second / "README.md").read_text()
    assert ModelCard(text).data.to_dict()["base_model"] == "org/base" and "/home" not in text
    assert "1. `python sft.py -c run1.yaml` on `a_train.jsonl`" in text
    assert "2. `python ppo_training.py -c run2.yaml` on the prompts of `p.jsonl`, scored by the rows' answers" in text
    assert "| mean score | 0.5 |" in text and read_json(second / PROVENANCE_FILE) == runs


def test_no_local_path_of_a_function_or_model_is_published(tmp_path):
    mine, reward = tmp_path / "mine.py", str(tmp_path / "reward")
    mine.write_text("def long(prompts, completions):\n    return [1.0] * len(prompts)\n")
    flags = {"model": "org/base", "reward_function": [f"{mine}:long"], "reward_model": [reward]}
    run = provenance("ppo_training.py", flags, {"steps": 1})
    label = f"long (sha256 of its file: {hashlib.sha256(mine.read_bytes()).hexdigest()[:16]})"
    assert run["flags"]["reward_function"] == [label] and function_label(label) == label
    assert flags["reward_function"] == [f"{mine}:long"]  # the run's own config keeps it, to be resumed
    old = {"script": "ppo_training.py", "flags": flags, "figures": {}}  # of an adapter by an earlier version
    runs = provenance_of(tmp_path, [run, old])
    assert [one["flags"]["reward_function"] for one in runs] == [[label], ["long"]]
    assert [one["flags"]["reward_model"] for one in runs] == [["reward"]] * 2
    write_card(tmp_path, "alice/model", "org/base", runs, is_reward_model=False)
    for name in ("README.md", PROVENANCE_FILE):
        assert str(tmp_path) not in (tmp_path / name).read_text()
    mine.unlink()
    assert function_label(f"{mine}:long") == "long"


HOSTILE = "a` | <script>alert(1)</script>\n\n# A heading\n```\n[a](http://b) **c** \u2028<img src=x>"


def test_a_stranger_s_run_is_shown_as_text(tmp_path):
    """Read by markdown-it, nothing that the run says is an element, a heading or a cell."""
    markdown = pytest.importorskip("markdown_it").MarkdownIt("commonmark", {"html": True}).enable("table")
    flags = {"model": HOSTILE, "data": HOSTILE, "data_base": HOSTILE, HOSTILE: HOSTILE}
    for script in (HOSTILE, FUSE):
        run = {"script": script, "flags": flags, "figures": {HOSTILE: -1.5e-05, "plain_loss": 2.0}}
        prompts = {**run, "flags": {"prompts": HOSTILE}}
        write_card(tmp_path, "alice/model", "org/base", [run, prompts], is_reward_model=False)
        card = ModelCard((tmp_path / "README.md").read_text(encoding="utf-8"))
        assert "base_model" not in card.data.to_dict()
        tokens = markdown.parse(card.text)
        inner = [token for outer in tokens for token in (outer, *(outer.children or []))]
        kinds = [token.type for token in inner]
        assert not {"html_block", "html_inline", "link_open", "image", "strong_open", "code_block"} & set(kinds)
        assert kinds.count("heading_open") == 3 and kinds.count("table_open") == 2
        assert kinds.count("td_open") == 2 * 4  # two figures of each run, in two cells each
        assert "-1.5e-05" in [token.content for token in inner] and "plain loss" in [token.content for token in inner]
        blocks = [yaml.safe_load(token.content) for token in inner if token.info == "yaml"]
        assert blocks == ([] if script == FUSE else [flags, {"prompts": HOSTILE}])


@pytest.mark.parametrize("content", [{}, [1], [{"script": "sft.py"}], [{"script": "a", "flags": [], "figures": {}}],
                                     [{"script": "a", "flags": {}, "figures": {"a": "<b>"}}]])  # fmt: skip
def test_a_base_s_provenance_that_is_none_is_one_line(tmp_path, content):
    write_json(tmp_path / PROVENANCE_FILE, content)
    with pytest.raises(UserError, match=r"provenance\.json .*; restore it, or delete it"):
        provenance_of(tmp_path, [])


def test_a_reward_model_and_an_adapter_of_unknown_making_have_cards(tmp_path):
    write_card(tmp_path, "judge", "a/" + "b" * 300, [], is_reward_model=True)  # a name that no file can have
    write_card(tmp_path, "judge", "tiny-digits", [], is_reward_model=True)
    text = (tmp_path / "README.md").read_text()
    assert ModelCard(text).data.to_dict()["pipeline_tag"] == "text-classification" and "How it was made" not in text
    assert "ppo_training.py --reward-model judge" in text
