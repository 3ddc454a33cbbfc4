"""Chat with a model in the terminal, or with two models side by side.

    python talk_to_model.py --model ./sft_fine_tune/ --max-tokens 50 --temp 0.7
    python talk_to_model.py --resume-file adapters --compare tiny-digits

Replies are streamed and the conversation is kept; /help lists the commands. Ctrl-C ends a reply; /quit or Ctrl-D ends
the chat. To serve a model, use mlx_lm.server, which opens the same folders.
"""

from models import cpu

cpu.enable()  # before mlx is imported

import argparse
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, suppress
from dataclasses import replace
from pathlib import Path

import mlx.core as mx

from common.cli import run
from common.errors import UserError
from common.files import atomic_file, expanded, user_cache
from common.parser import Parser
from common.ranges import COUNT, NOT_NEGATIVE, SEED
from models.adapter_base import MODEL_HELP, base_of
from models.adapters import load_adapter
from models.generation import ChatSession, TooLong
from models.loading import LoadedModel, load, resolve, twin
from models.sharding import add_shard_flag, check_shard, files_digest, load_share
from training.mlx_ranks import MLXRanks, launched
from training.ranks import ALONE, Ranks

HELP = """/reset      forget the conversation
/save FILE  append the conversation to FILE.jsonl, as a row for sft.py
/help       show this
/quit       end the chat, as Ctrl-D does; Ctrl-C ends a reply"""
COMMAND = re.compile(r"/[a-z]+")  # the first word of a command, but not "/usr/bin"
HISTORY_LINES = 1000

Sessions = dict[str, ChatSession]  # by the name shown above the replies


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--model", help=MODEL_HELP)
    parser.add_argument(
        "--resume-file", "--adapter-path", help="adapter or soft prompt: a folder, or an .npz or .safetensors file"
    )
    parser.add_argument("--compare", metavar="MODEL", help="also show the replies of this model, such as the base")
    parser.add_argument("--max-tokens", type=COUNT, default=100, help="maximum length of a reply, tokens")
    parser.add_argument(
        "--temp", type=NOT_NEGATIVE, default=0.0, help="sampling temperature; 0: always the most likely token"
    )
    parser.add_argument("--system-prompt", help="system prompt that precedes the conversation")
    parser.add_argument("--seed", type=SEED, default=0, help="seed of sampling")
    add_shard_flag(parser)
    return parser.parse_args()


def open_shares(args: argparse.Namespace, model: str, ranks: Ranks) -> Sessions:
    """The conversations that the flags ask for, with this process's share of each model."""
    assert isinstance(ranks, MLXRanks)  # by check_shard
    named = {args.resume_file or model: (model, args.resume_file)}
    if args.compare:
        named[args.compare] = (args.compare, None)
    sessions: Sessions = {}
    for title, (name, adapter) in named.items():
        share = load_share(name, adapter, args.shard, ranks.group)
        ranks.check_same(model=files_digest(share.path))
        sessions[title] = ChatSession(share.model, share.tokenizer, args.system_prompt, ranks.of_first)
    return sessions


def open_sessions(model: str, adapter: str | None, compare: str | None, system_prompt: str | None) -> Sessions:
    """The conversation with `model` under `adapter`, and that with `compare`. Raises UserError if both are the same."""
    loaded = load(model)
    # Opened before the adapter is attached, so that the base shares its weights with the model that has the adapter.
    other = _open_beside(loaded, adapter, compare) if compare else None
    if adapter:
        saved = load_adapter(loaded.model, adapter)
        if saved.value_head is not None:
            raise UserError(f"{adapter} is a reward model, which cannot chat; name another adapter")
    sessions = {adapter or model: ChatSession(loaded.model, loaded.tokenizer, system_prompt)}
    if compare and other is not None:
        sessions[compare] = ChatSession(other.model, other.tokenizer, system_prompt)
    return sessions


def _open_beside(loaded: LoadedModel, adapter: str | None, compare: str) -> LoadedModel:
    if resolve(compare).resolve() != loaded.path.resolve():
        return load(compare)
    if not adapter:
        raise UserError(f"--compare {compare} is --model itself; name another model, or give --resume-file")
    return replace(loaded, model=twin(loaded.model), name=compare)


def read_line(interactive: bool) -> str:
    """What is typed next; /quit at Ctrl-D, and at the end of the input."""
    try:
        return input("> " if interactive else "").strip()
    except EOFError:
        if interactive:
            print()  # so that the shell's prompt starts on a new line
        return "/quit"
    except KeyboardInterrupt:
        if not interactive:
            return "/quit"
        print("\n/quit or Ctrl-D ends the chat", file=sys.stderr)
        return ""


def chat(sessions: Sessions, max_tokens: int, temperature: float, ranks: Ranks = ALONE) -> None:
    """Read lines and stream replies until /quit, Ctrl-D, or the end of the input.

    ranks: the processes that share the models, of which the first one reads.
    """
    interactive = sys.stdin.isatty()
    while True:
        text = ranks.from_writer(lambda: read_line(interactive))
        if text == "/quit":
            return
        if not text:
            continue
        if COMMAND.fullmatch(text.split()[0]):
            if not ranks.writes and not text.startswith("/reset"):
                continue
            try:
                obey(text, sessions)
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)
            continue
        for name, session in sessions.items():
            if len(sessions) > 1:
                print(f"[{name}]", flush=True)
            try:
                say(session, text, max_tokens, temperature, explain=interactive, alone=ranks.size == 1)
            except TooLong as error:
                print(f"error: {error}", file=sys.stderr)


def say(
    session: ChatSession, text: str, max_tokens: int, temperature: float, explain: bool, alone: bool = True
) -> None:
    """Stream the reply to `text`. Ctrl-C ends it, what was said is kept; or where not alone, it ends all processes.

    explain: why it is empty or was cut.
    """
    reply = session.reply(text, max_tokens, temperature)
    empty = True
    try:
        for piece in reply:
            empty = empty and not piece
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        if not alone:
            raise
        reply.close()
        print(flush=True)
        return
    print(flush=True)
    if explain and session.finish == "length":
        print("(cut at its longest: --max-tokens allows more, and /reset makes room)", file=sys.stderr)
    elif explain and empty:
        print("(empty: the model ended its reply at once; say more, or try --temp 0.7)", file=sys.stderr)


def obey(line: str, sessions: Sessions) -> None:
    """Execute a command line. Raises UserError for an unknown command."""
    command, _, rest = line.partition(" ")
    rest = rest.strip()
    if command == "/help":
        print(HELP, file=sys.stderr)
    elif command == "/reset":
        for session in sessions.values():
            session.reset()
        print("conversation forgotten", file=sys.stderr)
    elif command == "/save":
        if not rest:
            raise UserError("/save needs a file; type, for example, /save talks.jsonl")
        save(expanded(rest), sessions)
    else:
        raise UserError(f"{command} is not a command; type /help for a list")


def save(path: Path, sessions: Sessions) -> None:
    """Append a row for each conversation to a `.jsonl` file, atomically. Raises UserError if that is impossible."""
    rows = [{**session.row(), "model": name} for name, session in sessions.items()]
    if all(session.messages == session.opening for session in sessions.values()):
        raise UserError("there is nothing to save yet; type a message first")
    if path.suffix != ".jsonl":
        raise UserError(f"{path} does not end in .jsonl; type /save {path.with_suffix('.jsonl')}")
    try:
        before = path.read_text(encoding="utf-8") if path.exists() else ""
        before += "\n" if before and not before.endswith("\n") else ""
        with atomic_file(path) as temporary:
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            temporary.write_text(before + text, encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be written ({error}); choose another file") from None
    print(f"{path}: {len(rows)} {'row' if len(rows) == 1 else 'rows'} added", file=sys.stderr)


@contextmanager
def line_editing(history: Path) -> Iterator[None]:
    """Line editing with the history of earlier chats, if Python has readline."""
    try:
        import readline
    except ImportError:
        yield
        return
    with suppress(OSError):  # there is none yet, or it was written by libedit
        readline.read_history_file(history)
    readline.set_history_length(HISTORY_LINES)
    try:
        yield
    finally:
        with suppress(OSError):  # a read-only home directory should not cause an error
            history.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(history)


def greeting(sessions: Sessions) -> str:
    """One line that names the models, with a note on those that only continue text for lack of a chat template."""
    names = " and ".join(sessions)
    plain = [name for name, session in sessions.items() if not session.tokenizer.has_chat_template]
    note = f" ({' and '.join(plain)}: no chat template, so your text is continued)" if plain else ""
    return f"{names}{note}: type a message, or /help; /quit leaves."


def main() -> None:
    # What other ranks than the first print goes nowhere.
    with launched() as ranks, nullcontext() if ranks.writes else redirect_stderr(sys.stdout):
        talk(ranks)


def talk(ranks: Ranks) -> None:
    """What the flags ask for, by all processes of a launch together."""
    args = argparse.Namespace(**ranks.from_writer(lambda: vars(parse_args())))
    check_shard(args.shard, ranks.size, "talk_to_model.py")
    if ranks.size > 1 and not args.shard:
        raise UserError(f"{ranks.size} processes cannot hold one chat with a whole model each; add --shard tensor")
    mx.random.seed(args.seed)
    model = base_of(args.model, args.resume_file, resolve, lambda line: print(line, file=sys.stderr))
    if args.shard:
        sessions = open_shares(args, model, ranks)
    else:
        sessions = open_sessions(model, args.resume_file, args.compare, args.system_prompt)
    print(greeting(sessions), file=sys.stderr)
    with line_editing(user_cache() / "talk_to_model_history") if sys.stdin.isatty() else nullcontext():
        chat(sessions, args.max_tokens, args.temp, ranks)


if __name__ == "__main__":
    run(main)
