"""Chat with a model in the terminal.

    python talk_to_model.py --model ./sft_fine_tune/ --max-tokens 50 --temp 0.7
    python talk_to_model.py --resume-file adapters

The reply streams; the conversation is kept. Ctrl-C ends a reply, or at the prompt the chat; so does Ctrl-D.
Leaves out batches (models.generation.sample) and serving (mlx_lm.server opens the same folders).
"""

import argparse
import sys

import models.fast_blas  # noqa: F401  (before mlx)
from data.errors import UserError
from models.adapters import load_adapter
from models.generation import ChatSession
from models.loading import load
from training import config
from training.cli import run

import mlx.core as mx


def parse_args() -> argparse.Namespace:
    parser = config.Parser(__doc__)
    parser.add_argument("--model", default="tiny-digits", help="tiny-digits, a folder, or a Hugging Face name")
    parser.add_argument(
        "--resume-file", "--adapter-path", help="adapter or soft prompt: a folder, or an .npz or .safetensors file"
    )
    parser.add_argument("--max-tokens", type=int, default=100, help="longest reply, tokens")
    parser.add_argument("--temp", type=float, default=0.0, help="sampling temperature; 0: the most likely token")
    parser.add_argument("--system-prompt", help="what the model is told before the conversation")
    parser.add_argument("--seed", type=int, default=0, help="seed of sampling")
    return parser.parse_args()


def chat(session: ChatSession, max_tokens: int, temperature: float) -> None:
    """Read lines and stream replies until Ctrl-C or Ctrl-D at the prompt, or the end of the input."""
    interactive = sys.stdin.isatty()
    while True:
        try:
            text = input("> " if interactive else "").strip()
        except (EOFError, KeyboardInterrupt):
            if interactive:
                print()  # so that the shell's prompt begins a line
            return
        if not text:
            continue
        reply = session.reply(text, max_tokens, temperature)
        try:
            for piece in reply:
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            reply.close()
        print(flush=True)


def main() -> None:
    args = parse_args()
    config.positive("max-tokens", args.max_tokens)
    config.positive("temp", args.temp, zero=True)
    mx.random.seed(args.seed)
    loaded = load(args.model)
    if args.resume_file:
        saved = load_adapter(loaded.model, args.resume_file)
        if saved.value_head is not None:
            raise UserError(f"{args.resume_file} is a reward model: it scores and does not talk; name another adapter")
    print(f"{args.model}: type a message; Ctrl-D or Ctrl-C leaves.", file=sys.stderr)
    chat(ChatSession(loaded.model, loaded.tokenizer, args.system_prompt), args.max_tokens, args.temp)


if __name__ == "__main__":
    run(main)
