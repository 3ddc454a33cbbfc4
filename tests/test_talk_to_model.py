"""Chat: replies are the model's, with its adapter; the conversation is kept; the exit is clean."""

import io
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from itertools import islice

import mlx.core as mx
import pytest

import models.generation
import talk_to_model
from common.errors import UserError
from data.examples import LANGUAGE_ROWS, language_examples
from data.records import read_rows
from models.adapters import AdapterConfig, adapter_weights, attach_adapter, save_adapter
from models.generation import ChatSession, TooLong, sample
from models.loading import load
from models.value_head import new_value_head
from tests.architectures import build
from tests.scripts import ROOT, call, fails

# A dialogue in words of the tiny tokenizer.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
SPREAD = {"embed_tokens": 0.3, "o_proj": 0.5, "down_proj": 0.5}


@pytest.fixture(scope="module")
def folder(tiny_folder, tmp_path_factory):
    """A random model whose greedy replies vary from token to token, without a chat template."""
    path = shutil.copytree(tiny_folder, tmp_path_factory.mktemp("chat") / "model")
    (path / "chat_template.jinja").unlink()
    mx.random.seed(1)
    weights = {
        name: mx.random.normal(w.shape) * SPREAD.get(name.split(".")[-2], w.shape[-1] ** -0.5) if w.ndim > 1 else w
        for name, w in mx.load(str(path / "model.safetensors")).items()
    }
    mx.save_safetensors(str(path / "model.safetensors"), weights, metadata={"format": "pt"})
    return path


@pytest.fixture(scope="module")
def template_folder(folder):
    path = shutil.copytree(folder, folder.parent / "template")
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


@pytest.fixture(params=["plain", "template"])
def loaded(request, folder, template_folder):
    return load(str(folder if request.param == "plain" else template_folder))


@pytest.fixture
def read(monkeypatch):
    """The number of tokens processed before each reply."""
    counts: list[int] = []
    original = models.generation.stream_generate

    def counting(model, tokenizer, prompt, **settings):
        counts.append(len(prompt))
        return original(model, tokenizer, prompt, **settings)

    monkeypatch.setattr(models.generation, "stream_generate", counting)
    return counts


def save_trained(path, folder, kind="lora", with_head=False):
    """An adapter in `folder`'s model with weights as if trained."""
    config = AdapterConfig(kind, -1, {"rank": 4, "scale": 2.0, "dropout": 0.5}, 3, model=str(folder))
    model = load(str(folder)).model
    attach_adapter(model, config)
    mx.random.seed(5)
    moved = [(name, w + 0.3 * mx.random.normal(w.shape)) for name, w in adapter_weights(model).items()]
    model.load_weights(moved, strict=False)
    save_adapter(path, model, config, new_value_head(model) if with_head else None)
    return model


def greedy(loaded, ids, max_tokens):
    """The model's continuation of `ids`, by the sampler of training."""
    (completion,) = sample(loaded.model, [ids], loaded.tokenizer.eos_token_ids, max_tokens, temperature=0)
    return [token for token in completion if token not in loaded.tokenizer.eos_token_ids]


def text_of(loaded, tokens):
    return loaded.tokenizer.decode(tokens).removeprefix(" ")


def say(session, text, max_tokens=10, **settings):
    return "".join(session.reply(text, max_tokens, **settings))


# the session


@pytest.mark.parametrize("text", ["2 4", "10", "7 8 9", "300", "a b"])
def test_a_reply_is_all_that_the_model_says(loaded, text):
    """The first token is not dropped."""
    session = ChatSession(loaded.model, loaded.tokenizer)
    pieces = list(session.reply(text, 12))
    tokens = greedy(loaded, session_ids(loaded, text), 12)
    assert "".join(pieces).strip() == text_of(loaded, tokens).strip()
    assert len(tokens) == 12 and len("".join(pieces)) > 4
    assert len(pieces) > 6  # it streams


def session_ids(loaded, *turns):
    session = ChatSession(loaded.model, loaded.tokenizer)
    roles = ("user", "assistant")
    session.messages = [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]
    return session.prompt_ids()


def test_the_conversation_is_kept(loaded):
    session = ChatSession(loaded.model, loaded.tokenizer)
    first = say(session, "2 4")
    assert session.messages == [{"role": "user", "content": "2 4"}, {"role": "assistant", "content": first}]
    before = session_ids(loaded, "2 4", first)
    second = say(session, "7 8")
    ids = session_ids(loaded, "2 4", first, "7 8")
    text = loaded.tokenizer.decode(ids)
    assert "2 4" in text and first.strip() in text and "7 8" in text
    shared = len(before) - (1 if not loaded.tokenizer.has_chat_template else len(loaded.tokenizer.encode("assistant:")))
    assert ids[:shared] == before[:shared]
    assert second.strip() == text_of(loaded, greedy(loaded, ids, 10)).strip()
    assert second != say(ChatSession(loaded.model, loaded.tokenizer), "7 8")  # it does matter


def test_what_is_read_already_is_not_read_again_and_changes_nothing(loaded, read):
    session, earlier = ChatSession(loaded.model, loaded.tokenizer), 0
    for text in ("2 4", "7 8", "a b", "7 8"):
        fresh = ChatSession(loaded.model, loaded.tokenizer)
        fresh.messages = [dict(message) for message in session.messages]
        assert list(session.reply(text, 10)) == list(fresh.reply(text, 10))
        # At least the tokens before the previous reply; also that reply, if its text is encoded as it was sampled.
        assert read[-2] <= read[-1] - earlier
        earlier = read[-1]
    assert earlier > 30


def test_a_reply_is_not_read_again_where_its_text_is_encoded_as_it_was_sampled(template_folder, read, monkeypatch):
    loaded = load(str(template_folder))
    four = loaded.tokenizer.encode("4")[1:]
    monkeypatch.setattr(models.generation, "make_sampler", lambda *_: lambda logprobs: mx.array(four))
    session = ChatSession(loaded.model, loaded.tokenizer)
    assert say(session, "2") == "4 4 4 4 4 4 4 4 4 4"
    say(session, "7")
    assert read == [len(session_ids(loaded, "2")), len(loaded.tokenizer.encode("4\nuser: 7\nassistant:")[2:])]


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "mamba", "jamba", "qwen3_5", "mixtral"])
def test_any_kind_of_cache_is_reused_or_made_anew(folder, name, read):
    """gemma3's window of 16 rolls over; mamba's state cannot be trimmed."""
    tokenizer = load(str(folder)).tokenizer
    # A row for each token: what mlx reads for an id beyond the table differs from pass to pass (0.32.4, Linux CPU).
    model = build(name, vocab_size=len(tokenizer.get_vocab()))
    tokenizer.eos_token_ids = []  # so that no reply ends early, and the conversation outgrows the window
    session = ChatSession(model, tokenizer)
    for text in ("2", "7", "a b"):
        fresh = ChatSession(model, tokenizer)
        fresh.messages = [dict(message) for message in session.messages]
        assert list(session.reply(text, 10)) == list(fresh.reply(text, 10))
        session.messages[-1]["content"] = session.messages[-1]["content"][1:]  # so that the reply has to be cut off
    assert read[-1] > 16


@pytest.mark.parametrize("interrupted", ["closed by the reader", "between tokens", "amid a pass"])
def test_a_reply_that_is_broken_off_joins_the_conversation(loaded, monkeypatch, interrupted):
    session = ChatSession(loaded.model, loaded.tokenizer)
    if interrupted == "closed by the reader":
        reply = session.reply("2 4", 50)
        pieces = list(islice(reply, 4))
        reply.close()
    else:
        pieces = []
        amid = loaded.model.layers[1 if interrupted == "amid a pass" else 0]
        stop_in_pass(monkeypatch, amid, passes=5)
        with pytest.raises(KeyboardInterrupt):
            pieces.extend(session.reply("2 4", 50))  # keeps what came before the stop
        monkeypatch.undo()
    assert session.messages[-1] == {"role": "assistant", "content": "".join(pieces)} and len(pieces) > 1
    fresh = ChatSession(loaded.model, loaded.tokenizer)
    fresh.messages = [dict(message) for message in session.messages]
    assert list(session.reply("7 8", 10)) == list(fresh.reply("7 8", 10))


def stop_in_pass(monkeypatch, layer, passes):
    """Raise Ctrl-C before `layer` in the given pass, after the layers below it."""
    kind, seen = type(layer), 0
    original = kind.__call__

    def call_or_stop(self, *args, **kwargs):
        nonlocal seen
        if self is layer:
            seen += 1
            if seen == passes:
                raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(kind, "__call__", call_or_stop)


def test_the_system_prompt_comes_first(loaded):
    session = ChatSession(loaded.model, loaded.tokenizer, "count in twos")
    reply = say(session, "2 4")
    assert session.messages[0] == {"role": "system", "content": "count in twos"}
    text = loaded.tokenizer.decode(session.prompt_ids())
    assert text.index("count in twos") < text.index("2 4")
    assert reply != say(ChatSession(loaded.model, loaded.tokenizer), "2 4")
    assert ChatSession(loaded.model, loaded.tokenizer).messages == []


def test_the_template_is_the_models_own(template_folder):
    loaded = load(str(template_folder))
    expected = loaded.tokenizer.encode("user: 2 4\nassistant:")
    assert session_ids(loaded, "2 4") == expected


def test_a_reply_ends_with_eos_or_at_its_limit(loaded):
    session = ChatSession(loaded.model, loaded.tokenizer)
    tokens = greedy(loaded, session_ids(loaded, "2 4"), 12)
    end = next(index for index in range(2, 12) if tokens[index] not in tokens[:index])
    loaded.tokenizer.eos_token_ids = [tokens[end]]
    expected = tokens[:end]
    assert say(session, "2 4", 12).strip() == text_of(loaded, expected).strip()
    fresh = ChatSession(loaded.model, loaded.tokenizer)
    fresh.messages = [dict(message) for message in session.messages]
    assert say(session, "7") == say(fresh, "7")
    assert say(ChatSession(loaded.model, loaded.tokenizer), "2 4", 1).strip() == text_of(loaded, tokens[:1]).strip()


def test_temperature_samples_and_the_seed_decides(loaded):
    def draw(seed, temperature):
        mx.random.seed(seed)
        return say(ChatSession(loaded.model, loaded.tokenizer), "2 4", 20, temperature=temperature)

    assert draw(1, 1.0) == draw(1, 1.0) != draw(2, 1.0)
    assert draw(1, 0.0) == draw(2, 0.0)


# the script


@pytest.fixture
def talk(monkeypatch, capsys):
    """Run the script in this process on piped lines. Returns its output without the greeting."""

    def run_script(lines, *words, notices=""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        capsys.readouterr()
        call(talk_to_model.main, *words)
        printed = capsys.readouterr()
        greeting, rest = printed.err.split("\n", 1)
        assert greeting.endswith(": type a message, or /help; /quit leaves.") and rest == notices
        return printed.out

    return run_script


@pytest.mark.parametrize(("kind", "form"), [("lora", "a"), ("lora", "a.npz"), ("dora", "a"), ("full", "a"),
                                            ("soft_prompt", "a"), ("soft_prompt", "a.safetensors")])  # fmt: skip
def test_the_adapter_speaks(folder, tmp_path, talk, kind, form):
    """The adapter takes effect, soft prompts included."""
    base = talk("2 4\n", "--model", folder, "--max-tokens", 12)
    adapted = load(str(folder))
    adapted.model = save_trained(tmp_path / form, folder, kind)
    got = talk("2 4\n", "--model", folder, "--resume-file", tmp_path / form, "--max-tokens", 12)
    assert got != base
    expected = text_of(adapted, greedy(adapted, adapted.tokenizer.encode("2 4"), 12))
    assert got.strip() == expected.strip()


def test_turns_build_on_each_other_and_blank_lines_are_none(folder, talk):
    loaded = load(str(folder))
    session = ChatSession(loaded.model, loaded.tokenizer, "count")
    expected = "".join(say(session, text, 6) + "\n" for text in ("2 4", "7"))
    got = talk("2 4\n\n   \n  7  \n", "--model", folder, "--max_tokens", 6, "--system_prompt", "count")
    assert got == expected


@pytest.mark.parametrize("kind", [None, "lora", "soft_prompt"])
def test_the_seed_decides_what_is_sampled_with_an_adapter_and_without(folder, tmp_path, talk, kind):
    words = ["--model", folder, "--temp", 1.0, "--max-tokens", 30]
    if kind:
        save_trained(tmp_path / "a", folder, kind)
        words += ["--resume-file", tmp_path / "a"]
    assert talk("2\n", *words, "--seed", 1) == talk("2\n", *words, "--seed", 1) != talk("2\n", *words, "--seed", 2)


def test_a_users_mistake_is_one_line(folder, tmp_path, capsys):
    assert "is not a model folder" in fails(capsys, talk_to_model.main, "--model", "./missing")
    words = ("--model", folder, "--resume-file")
    assert "does not exist" in fails(capsys, talk_to_model.main, *words, tmp_path / "missing")
    save_trained(tmp_path / "reward", folder, with_head=True)
    assert "is a reward model" in fails(capsys, talk_to_model.main, *words, tmp_path / "reward")
    assert "--max-tokens is 0" in fails(capsys, talk_to_model.main, "--max-tokens", 0)
    assert "--temp is -1" in fails(capsys, talk_to_model.main, "--temp", -1)


@pytest.mark.parametrize("kind", ["lora", "soft_prompt"])
def test_an_adapter_beside_its_base_says_what_each_says_alone(template_folder, tmp_path, talk, monkeypatch, kind):
    save_trained(tmp_path / "a", template_folder, kind)
    flags, adapter = ("--max-tokens", 8, "--model", template_folder), ("--resume-file", tmp_path / "a")
    turns = "2 4\n7 8\n"
    alone = [talk(turns, *flags, *adapter).splitlines(), talk(turns, *flags).splitlines()]
    opened: list[str] = []
    original = talk_to_model.load

    def counting(name):
        opened.append(name)
        return original(name)

    monkeypatch.setattr(talk_to_model, "load", counting)
    got = talk(turns, *flags, *adapter, "--compare", f"{template_folder}/").splitlines()
    labels = [f"[{tmp_path / 'a'}]", f"[{template_folder}/]"]
    assert got == [
        line for pair in zip(*alone, strict=True) for both in zip(labels, pair, strict=True) for line in both
    ]
    assert alone[0] != alone[1] and len(got) == 8
    assert opened == [str(template_folder)]  # once


def test_two_models_side_by_side(folder, template_folder, talk, capsys):
    got = talk("2 4\n", "--model", folder, "--compare", template_folder, "--max-tokens", 5).splitlines()
    assert got[::2] == [f"[{folder}]", f"[{template_folder}]"]
    assert got[1] == talk("2 4\n", "--model", folder, "--max-tokens", 5).rstrip("\n")
    assert got[3] == talk("2 4\n", "--model", template_folder, "--max-tokens", 5).rstrip("\n")
    words = ("--model", folder, "--compare", folder)
    assert "is --model itself" in fails(capsys, talk_to_model.main, *words)


def test_what_is_forgotten_is_no_part_of_the_conversation(loaded, folder, talk):
    session = ChatSession(loaded.model, loaded.tokenizer, "count")
    first = say(session, "2 4")
    say(session, "7")
    session.reset()
    assert session.messages == [{"role": "system", "content": "count"}]
    assert say(session, "2 4") == first
    got = talk("2 4\n/reset\n2 4\n", "--model", folder, "--max-tokens", 9, notices="conversation forgotten\n")
    first, second = got.splitlines()
    assert first == second


def test_a_saved_conversation_is_what_sft_takes(folder, template_folder, tmp_path, talk):
    """As messages if there is a chat template, else as the continued text; no row is lost."""
    file = tmp_path / "my_train.jsonl"
    file.write_text('{"text": "1 2"}')  # no end of line
    lines, words = f"2 4\n7\n/save {file}\n", ("--max-tokens", 4, "--system-prompt", "count")
    note = f"{file}: 1 row added\n"
    replies = talk(lines, "--model", template_folder, *words, notices=note).splitlines()
    plain = talk(lines, "--model", folder, *words, notices=note).splitlines()
    said = [("system", "count"), ("user", "2 4"), ("assistant", replies[0]), ("user", "7"), ("assistant", replies[1])]
    messages = [{"role": role, "content": content} for role, content in said]
    assert [json.loads(line) for line in file.read_text().splitlines()] == [
        {"text": "1 2"},
        {"messages": messages, "model": str(template_folder)},
        {"text": "\n".join(["count", "2 4", plain[0], "7", plain[1]]), "model": str(folder)},
    ]
    rows = read_rows(file, LANGUAGE_ROWS, chat=True)
    tokenizer = load(str(template_folder)).tokenizer
    (example,) = language_examples(tokenizer, rows[1])
    trained = tokenizer.decode(example.tokens[example.first_target :])
    assert trained.strip().startswith(replies[0].strip()) and "count" not in trained
    both = f"2\n/save {file}\n"
    flags = ("--model", folder, "--compare", template_folder, "--max-tokens", 3)
    talk(both, *flags, notices=f"{file}: 2 rows added\n")
    assert [json.loads(line)["model"] for line in file.read_text().splitlines()[3:]] == [
        str(folder),
        str(template_folder),
    ]


@pytest.mark.parametrize(("line", "notice"), [
    ("/save", "error: /save needs a file; type, for example, /save talks.jsonl"),
    ("/save a.jsonl", "error: there is nothing to save yet; type a message first"),
    ("/forget all", "error: /forget is not a command; type /help for a list"),
    ("/help", talk_to_model.HELP),
])  # fmt: skip
def test_a_command_is_never_said_to_the_model(folder, talk, line, notice):
    assert talk(f"{line}\n", "--model", folder, notices=f"{notice}\n") == ""


def test_a_save_that_cannot_be_leaves_the_chat_and_the_file(folder, tmp_path, talk):
    (tmp_path / "notes.md").write_text("mine")
    (tmp_path / "d.jsonl").mkdir()
    notes = f"error: {tmp_path}/notes.md does not end in .jsonl; type /save {tmp_path}/notes.jsonl\n"
    got = talk(f"2\n/save {tmp_path}/notes.md\n7\n", "--model", folder, "--max-tokens", 3, notices=notes)
    assert len(got.splitlines()) == 2 and (tmp_path / "notes.md").read_text() == "mine"
    session = ChatSession((loaded := load(str(folder))).model, loaded.tokenizer)
    say(session, "2", 2)
    with pytest.raises(UserError, match="cannot be written"):
        talk_to_model.save(tmp_path / "d.jsonl", {"a": session})


def test_a_path_is_no_command(folder, talk):
    assert talk("/2/4 8\n", "--model", folder, "--max-tokens", 3).strip()


def test_what_is_longer_than_the_context_is_refused_and_left_out(loaded):
    session = ChatSession(loaded.model, loaded.tokenizer)
    session.context = 8
    with pytest.raises(TooLong, match=r"would have [0-9]+ tokens, and the model reads 8; type less, or /reset"):
        list(session.reply("2 4 6 8 10 12 14 16 18 20", 5))
    assert session.messages == []
    session.messages = [{"role": "user", "content": "2"}]
    session.context = len(session.prompt_ids()) + 3
    session.messages = []
    assert "".join(session.reply("2", 50)) == "".join(ChatSession(loaded.model, loaded.tokenizer).reply("2", 3))


def test_quit_ends_the_chat(folder, talk):
    assert talk("/quit\n2 4\n", "--model", folder) == ""


def test_a_template_that_refuses_a_system_prompt_is_one_line(folder, tmp_path, capsys, monkeypatch):
    path = shutil.copytree(folder, tmp_path / "strict")
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}hi"
    (path / "chat_template.jinja").write_text(refusing)
    monkeypatch.setattr(sys, "stdin", io.StringIO("2\n"))
    with pytest.raises(UserError, match=r"cannot render the messages .*no system"):
        call(talk_to_model.main, "--model", path, "--system-prompt", "count")


def test_a_model_without_a_template_is_said_to_go_on(folder, template_folder):
    def greeting(path):
        loaded = load(str(path))
        return talk_to_model.greeting({"m": ChatSession(loaded.model, loaded.tokenizer)})

    assert "no chat template, so your text is continued" in greeting(folder)
    assert "chat template" not in greeting(template_folder)


# the script as a process


PROMPT = "\n> "  # on a line of its own: a reply may hold "<unk> "


class Terminal:
    """The script on a pseudo-terminal."""

    def __init__(self, cache, *words):
        self.master, slave = pty.openpty()
        command = [sys.executable, "talk_to_model.py", *map(str, words)]
        environment = {**os.environ, "TERM": "dumb", "XDG_CACHE_HOME": str(cache)}
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=slave, stdout=slave, stderr=slave, env=environment,
            # Shells start background jobs with SIGINT ignored, which children inherit.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        os.close(slave)
        self.seen = ""

    def wait_for(self, text, start=0, seconds=60):
        """Read until `text` is printed after position `start`. Returns the position after it."""
        deadline = time.monotonic() + seconds
        while text not in self.seen[start:]:
            ready, _, _ = select.select([self.master], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"no {text!r} in {self.seen[start:]!r}"
            try:
                self.seen += os.read(self.master, 4096).decode()
            except OSError:  # the other side is closed
                pytest.fail(f"it ended without {text!r}: {self.seen!r}")
        return self.seen.index(text, start) + len(text)

    def type(self, text):
        os.write(self.master, text.encode())

    def end(self):
        """Wait for the script's end; returns its exit code."""
        try:
            code = self.process.wait(timeout=60)
            while select.select([self.master], [], [], 0)[0]:
                self.seen += os.read(self.master, 4096).decode()
        except OSError:
            pass
        finally:
            self.process.kill()
            os.close(self.master)
        return code


def test_on_a_terminal_ctrl_c_ends_the_reply_and_not_the_chat(folder, tmp_path):
    """The reply would take minutes, so visible parts were streamed."""
    terminal = Terminal(tmp_path, "--model", folder, "--max-tokens", 1_000_000)
    at = terminal.wait_for(PROMPT)
    terminal.type("2 4\n")
    loaded = load(str(folder))
    start = text_of(loaded, greedy(loaded, loaded.tokenizer.encode("2 4"), 12)).split("\n")[0].strip()
    at = terminal.wait_for(start, at)
    terminal.process.send_signal(signal.SIGINT)
    at = terminal.wait_for(PROMPT, at)
    assert terminal.process.poll() is None
    time.sleep(0.2)  # the prompt is printed just before the script begins to read
    terminal.process.send_signal(signal.SIGINT)
    at = terminal.wait_for("/quit or Ctrl-D ends the chat", at)
    at = terminal.wait_for(PROMPT, at)
    assert terminal.process.poll() is None
    terminal.type("/quit\n")
    assert terminal.end() == 0
    assert "Traceback" not in terminal.seen and "Interrupt" not in terminal.seen


def test_on_a_terminal_ctrl_d_leaves_and_what_was_typed_is_kept(folder, tmp_path):
    """The arrow key recalls the input of an earlier chat."""
    (tmp_path / "talk_to_model_history").write_text("2 4\n")
    terminal = Terminal(tmp_path, "--model", folder, "--max-tokens", 5)
    at = terminal.wait_for(PROMPT)
    terminal.type("\x1b[A 6\n")
    terminal.wait_for(PROMPT, at)
    terminal.type("\x04")
    assert terminal.end() == 0
    assert "Traceback" not in terminal.seen and terminal.seen.endswith("\n")
    assert (tmp_path / "talk_to_model_history").read_text().splitlines() == ["2 4", "2 4 6"]


def test_a_history_that_cannot_be_written_ends_nothing(tmp_path):
    (tmp_path / "file").touch()
    with talk_to_model.line_editing(tmp_path / "file" / "history"):
        pass
