"""A tokenizer that prepends its own tokens to every text, for a fused soft prompt.

Plain texts get them from the post-processor; conversations from the chat template, since rendered text is encoded
without special tokens. Needs a tokenizer.json. The model: models.export.fused_soft_prompt.
"""

import copy
import itertools
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import read_json, write_json
from data.tokenizer import transformers_tokenizer

PROBES = ("12 -4", "Who are you?", " a  b\n", "")


class PromptingTokenizer:
    """A copy of a transformers tokenizer with `count` new special tokens, which it prepends once it is saved.

    names, ids: of the new tokens. Raises UserError unless it is a fast tokenizer.
    """

    def __init__(self, tokenizer: Any, count: int):
        if not tokenizer.is_fast:
            raise UserError(
                "the tokenizer has no tokenizer.json, which a fused soft prompt needs; use it with --resume-file"
            )
        self.before = tokenizer
        known = tokenizer.get_vocab()
        # A model may already have a fused soft prompt.
        number = next(number for number in itertools.count() if f"<|soft_prompt_{number}_0|>" not in known)
        self.names = [f"<|soft_prompt_{number}_{index}|>" for index in range(count)]
        self.tokenizer = copy.deepcopy(tokenizer)
        self.tokenizer.add_tokens(self.names, special_tokens=True)
        self.ids: list[int] = self.tokenizer.convert_tokens_to_ids(self.names)
        template, prefix = tokenizer.chat_template, "".join(self.names)
        if isinstance(template, str):
            self.tokenizer.chat_template = prefix + template
        elif template:
            self.tokenizer.chat_template = {name: prefix + text for name, text in template.items()}

    def save_pretrained(self, folder: str | Path) -> None:
        """Save it for AutoTokenizer. Raises UserError if the saved tokenizer does not encode as expected."""
        folder = Path(folder)
        self.tokenizer.save_pretrained(folder)
        content = read_json(folder / "tokenizer.json")
        ids = dict(zip(self.names, self.ids, strict=True))
        write_json(folder / "tokenizer.json", {**content, "post_processor": _prefixed(content["post_processor"], ids)})
        settings = read_json(folder / "tokenizer_config.json")
        # A specific class might rebuild its post-processor and ignore the one in the file.
        settings = {name: value for name, value in settings.items() if name not in ("add_bos_token", "add_eos_token")}
        write_json(folder / "tokenizer_config.json", {**settings, "tokenizer_class": "PreTrainedTokenizerFast"})
        self._check(transformers_tokenizer(folder))

    def _check(self, saved: Any) -> None:
        for text in PROBES:
            conversation = saved.encode("".join(self.names) + text, add_special_tokens=False)
            expected = [self.ids + self.before.encode(text, add_special_tokens=special) for special in (True, False)]
            if [saved.encode(text), conversation] != expected:
                raise UserError(
                    f"the tokenizer encodes {text!r} differently after other tokens, so no soft prompt can be "
                    "fused; use it with --resume-file"
                )


def _prefixed(processor: dict[str, Any] | None, ids: dict[str, int]) -> dict[str, Any]:
    """The post-processor of a tokenizer.json, extended to prepend the tokens."""
    if processor and processor["type"] == "TemplateProcessing":
        pieces = [{"SpecialToken": {"id": name, "type_id": 0}} for name in ids]
        special = {name: {"id": name, "ids": [ids[name]], "tokens": [name]} for name in ids}
        return {
            **processor,
            "single": [*pieces, *processor["single"]],
            "pair": [*pieces, *processor["pair"]],
            "special_tokens": {**processor["special_tokens"], **special},
        }
    if processor and processor["type"] == "Sequence":
        parts = processor["processors"]
        index = next((i for i, part in enumerate(parts) if part["type"] == "TemplateProcessing"), len(parts))
        changed = [*parts[:index], _prefixed(parts[index] if index < len(parts) else None, ids)]
        return {**processor, "processors": [*changed, *parts[index + 1 :]]}
    text, other = ({"Sequence": {"id": part, "type_id": kind}} for part, kind in (("A", 0), ("B", 1)))
    bare = {"type": "TemplateProcessing", "single": [text], "pair": [text, other], "special_tokens": {}}
    template = _prefixed(bare, ids)
    return template if processor is None else {"type": "Sequence", "processors": [processor, template]}
