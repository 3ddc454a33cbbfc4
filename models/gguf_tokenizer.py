"""The tokenizer that a GGUF file's metadata describes, as a fast tokenizer of transformers.

Serves byte-level BPE (`gpt2` in the metadata) with the pre-tokenizers in SPLITS, and SentencePiece's BPE (`llama`).
Another pre-tokenizer than the file's would cut texts otherwise than the model learned, so unknown ones are refused.
transformers has a converter of its own, which is not used: it needs torch, and takes every pre-tokenizer that it does
not know, SmolLM's among them, for GPT-2's.
"""

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from models.gguf_reader import GGUFFile

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # the file's kinds of tokens
SPACE = "▁"  # how SentencePiece writes a space

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN_SPLIT = (  # Mistral's since Nemo
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _by(pattern: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _digits() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


# The pre-tokenizer that each name in the metadata stands for.
SPLITS = {
    "gpt-2": _gpt2,
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r"), _digits),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), lambda: _by(LLAMA3_SPLIT)),
    "tekken": lambda: _by(TEKKEN_SPLIT),
}
# With these a word that is a token of its own is taken whole, whatever the merges say, and a text begins with BOS
# unless the file says otherwise.
WHOLE_WORDS = {"llama-bpe", "llama3", "llama-v3", "tekken"}


def split_of(inner: Tokenizer) -> str | None:
    """The name in SPLITS of a tokenizer's pre-tokenizer, or None where it is none of them."""
    own = inner.pre_tokenizer and inner.pre_tokenizer.__getstate__()
    return next((name for name, make in SPLITS.items() if make().__getstate__() == own), None)


def tokenizer_of(file: GGUFFile) -> PreTrainedTokenizerFast:
    """The file's tokenizer, with its special tokens and chat template. Raises UserError for a kind not served."""
    kind = _setting(file, "model")
    if kind not in ("gpt2", "llama"):
        raise file.refuse(f"its tokenizer is of the kind {kind}, neither gpt2 nor llama")
    tokens = _setting(file, "tokens") or []
    if not 0 < len(tokens) <= file.config["vocab_size"]:
        raise file.refuse(f"it has {len(tokens)} tokens for {file.config['vocab_size']} rows of embeddings")
    inner = _byte_level(file, tokens) if kind == "gpt2" else _sentence_piece(file, tokens)
    inner.add_tokens(_added(file, tokens))
    return _wrapped(file, inner, tokens, _setting(file, "pre") in WHOLE_WORDS if kind == "gpt2" else True)


def _setting(file: GGUFFile, key: str, default: Any = None) -> Any:
    return file.metadata.get(f"tokenizer.ggml.{key}", default)


def _byte_level(file: GGUFFile, tokens: list[str]) -> Tokenizer:
    split, merges = _setting(file, "pre"), _setting(file, "merges")
    if split not in SPLITS:
        raise file.refuse(f"its pre-tokenizer {split} is none of {', '.join(SPLITS)}")
    if not merges:
        raise file.refuse("its tokenizer has no merges")
    ids = _ids(file, tokens)
    inner = Tokenizer(BPE(vocab=ids, merges=_pairs(merges), ignore_merges=split in WHOLE_WORDS))
    inner.pre_tokenizer = SPLITS[split]()
    inner.decoder = decoders.ByteLevel()
    return inner


def _sentence_piece(file: GGUFFile, tokens: list[str]) -> Tokenizer:
    ids = _ids(file, tokens)
    unknown = _token(file, tokens, "unknown") or next(iter(_of_kind(file, tokens, UNKNOWN)), None)
    merges = _setting(file, "merges")
    pairs = _pairs(merges) if merges else _merges_by_score(file, tokens, ids)
    inner = Tokenizer(BPE(vocab=ids, merges=pairs, unk_token=unknown, byte_fallback=True, fuse_unk=True))
    prefix = _setting(file, "add_space_prefix", True)
    spaces = normalizers.Replace(" ", SPACE)
    inner.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if prefix else spaces
    parts: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    inner.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if prefix else parts)
    return inner


def _merges_by_score(file: GGUFFile, tokens: list[str], ids: dict[str, int]) -> list[tuple[str, str]]:
    """All pairs of tokens that make a token, best score first: SentencePiece joins what scores best."""
    scores, kinds = _setting(file, "scores"), _setting(file, "token_type")
    if not scores or len(scores) != len(tokens):
        raise file.refuse("its tokenizer has neither merges nor a score for every token")
    pairs = []
    for index, token in enumerate(tokens):
        if kinds and kinds[index] != NORMAL:
            continue
        halves = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        pairs += [(-scores[index], ids[a], ids[b], a, b) for a, b in halves if a in ids and b in ids]
    return [(a, b) for *_, a, b in sorted(pairs)]


def _ids(file: GGUFFile, tokens: list[str]) -> dict[str, int]:
    ids = {token: index for index, token in enumerate(tokens)}
    if len(ids) < len(tokens):
        raise file.refuse(f"{len(tokens) - len(ids)} of its tokens occur twice")
    return ids


def _pairs(merges: list[str]) -> list[tuple[str, str]]:
    """Merges as the file writes them; a token may hold spaces itself, but does not begin with one."""
    return [(merge[: (cut := merge.index(" ", 1))], merge[cut + 1 :]) for merge in merges]


def _of_kind(file: GGUFFile, tokens: list[str], kind: int) -> list[str]:
    return [token for token, other in zip(tokens, _setting(file, "token_type") or (), strict=False) if other == kind]


def _added(file: GGUFFile, tokens: list[str]) -> list[AddedToken]:
    """Tokens that are found whole in a text: the control tokens, which decoding may leave out, and the user's own."""
    control = set(_of_kind(file, tokens, CONTROL))
    whole = control | set(_of_kind(file, tokens, USER_DEFINED))
    return [AddedToken(token, special=token in control, normalized=False) for token in tokens if token in whole]


def _token(file: GGUFFile, tokens: list[str], name: str) -> str | None:
    index = _setting(file, f"{name}_token_id")
    if index is None:
        return None
    if not 0 <= index < len(tokens):
        raise file.refuse(f"its {name} token {index} is none of its {len(tokens)} tokens")
    return tokens[index]


def _wrapped(file: GGUFFile, inner: Tokenizer, tokens: list[str], begins: bool) -> PreTrainedTokenizerFast:
    """begins: whether a text begins with BOS where the file does not say."""
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    named = {ours: token for ours, theirs in names.items() if (token := _token(file, tokens, theirs)) is not None}
    adds_bos = bool(_setting(file, "add_bos_token", begins)) and "bos_token" in named
    adds_eos = bool(_setting(file, "add_eos_token", False)) and "eos_token" in named
    # A slow class would build another tokenizer of its own from the vocabulary, so the name of the class matters.
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        **named,
        add_bos_token=adds_bos,
        add_eos_token=adds_eos,
        model_max_length=file.config["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
        chat_template=file.metadata.get("tokenizer.chat_template"),
    )
