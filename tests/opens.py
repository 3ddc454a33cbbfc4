"""What opens what: the README's table, every cell of which is tested by tests/test_opens.py.

python -m tests.opens        prints it
"""

YES, NO = "yes", "no"
COLUMNS = ("our scripts", "mlx_lm.generate", "mlx_lm.server", "transformers", "peft")
# Row → a cell per column. After "no:" comes the row to use instead, or the flag that produces it.
OPENS: dict[str, tuple[str, ...]] = {
    "LoRA adapter folder": (YES, YES, YES, f"{NO}: `--export-peft`", f"{NO}: `--export-peft`"),
    "DoRA adapter folder": (YES, YES, YES, f"{NO}: `--export-peft`", f"{NO}: `--export-peft`"),
    "adapter as `.npz`": (YES, f"{NO}: `--export-adapter`", f"{NO}: `--export-adapter`", NO, f"{NO}: `--export-peft`"),
    "soft prompt folder": (YES, f"{NO}: fuse it", f"{NO}: fuse it", f"{NO}: fuse it", NO),
    "peft folder": (YES, f"{NO}: `--export-adapter`", f"{NO}: `--export-adapter`", YES, YES),
    "fused model": (YES, YES, YES, YES, NO),
    "fused soft prompt": (YES, YES, YES, YES, NO),
    "fused reward model": ("as a reward model", "without its head", "without its head", "without its head", NO),
    "reward model by `--sequence-classification`": ("as a reward model", NO, NO, "as a classifier", NO),
    "GGUF": (YES, NO, NO, "by `gguf_file=`", NO),
}


def table() -> str:
    """The table in Markdown."""
    head = [f"| | {' | '.join(f'`{name}`' if '.' in name else name for name in COLUMNS)} |", "|---" * 6 + "|"]
    return "\n".join([*head, *(f"| {row} | {' | '.join(cells)} |" for row, cells in OPENS.items())])


if __name__ == "__main__":
    print(table())
