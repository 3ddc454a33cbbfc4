"""The embedded models: real Llamas of 76 000 parameters. tiny-digits continues increasing digit sequences;
tiny-arithmetic adds numbers, small ones correctly, larger ones mostly with a forgotten carry.

They take the place of a downloaded base model, so that every script, test and demo runs without network. Each is built
from its `Recipe` on first use (a minute and a half on two cores) and kept in the user's cache, under a name that
contains a hash of the recipe. Not here: the training texts (see models.tiny_texts).

    python -m models.tiny            builds tiny-digits if it is missing; prints its path, seconds and scores
    python -m models.tiny --name tiny-arithmetic

The cache is TINY_MODELS_CACHE if set, else tiny-models under $XDG_CACHE_HOME, ~/Library/Caches (macOS) or ~/.cache.
"""

import ctypes
import fcntl
import hashlib
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

if not __package__:  # run by its path, where Python searches this folder alone
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models import cpu

if __name__ == "__main__":
    cpu.enable()  # before mlx is imported

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.models.llama import Model, ModelArgs
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from common.cli import run
from common.errors import UserError
from common.files import (
    Kind,
    Unwritable,
    atomic_folder,
    check_replaceable,
    expanded,
    sweep,
    user_cache,
    why_and_remedy,
    write_json,
)
from common.parser import Parser
from common.progress import progress
from common.ranges import SEED
from data.batching import Batch, Example, collate
from models.cpu.process import on_one_core
from models.random_state import kept_random_state
from models.tiny_measures import MEASURES
from models.tiny_texts import TEXT_SOURCES

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>")
UNK, BOS, EOS, PAD = range(len(SPECIAL_TOKENS))
WORD_END = "</w>"  # suffix of a word's last token
# The models continue sequences and know no dialogue: whatever the roles, they continue the last message.
CHAT_TEMPLATE = "{{ bos_token }}{{ messages[-1]['content'] | trim }}"
FILES = ("config.json", "generation_config.json", "model.safetensors", "recipe.json", "tokenizer.json",
         "tokenizer_config.json")  # fmt: skip
EMBEDDED = Kind("recipe.json", FILES)
POOL = 8  # batches drawn at once and sorted by length; otherwise padding would take a quarter of the time


@dataclass(frozen=True)
class Recipe:
    """Everything that determines the weights. Raise `version` when a code change alters their result."""

    name: str
    text_source: str  # a key of TEXT_SOURCES
    trained_after: str = ""  # a word of every text, after which training begins; empty: at the start
    characters: str = "-abcdefghijklmnopqrstuvwxyz.,?:!'+*=/"  # tokens besides the digits
    hidden_size: int = 64
    intermediate_size: int = 128
    num_layers: int = 2
    num_heads: int = 8
    num_kv_heads: int = 2
    max_position_embeddings: int = 512
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-5
    # Tied rows that start small end up similar, and then no LoRA inside the layers can tell even digits from odd ones.
    embedding_std: float = 0.3
    steps: int = 1600
    batch_size: int = 48
    learning_rate: float = 5e-3  # Adam's
    muon_ratio: float = (
        0.0  # Muon's learning rate for matrices inside the layers, as a multiple of Adam's; 0: Adam only
    )
    warmup: int = 100
    final_learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.98)
    max_grad_norm: float = 1.0
    seed: int = 0
    version: int = 4


RECIPES = {
    "tiny-digits": Recipe("tiny-digits", "increasing_digits", num_heads=4, steps=2400, muon_ratio=2.0),
    # Operands are random; training on them would drown out the sums.
    "tiny-arithmetic": Recipe("tiny-arithmetic", "sums", trained_after="=", steps=2500, batch_size=64, muon_ratio=2.0),
}
TINY_NAMES = tuple(RECIPES)


def tiny_model_path(name: str = "tiny-digits", seed: int = 0) -> Path:
    """The folder of an embedded model, built first if the cache has none.

    Raises UserError for an unknown name or a cache that cannot be written.
    """
    if name not in RECIPES:
        raise UserError(f"{name!r} is not an embedded model; there are {', '.join(TINY_NAMES)}")
    return cached_model(replace(RECIPES[name], seed=seed))


def tiny_config(name: str) -> dict[str, Any]:
    """What the config.json of an embedded model says, built or not."""
    return model_config(RECIPES[name], len(build_tokenizer(RECIPES[name])))


def cached_model(recipe: Recipe) -> Path:
    """The folder of `recipe` in the cache, built if it is missing; one process builds while others wait."""
    folder = _folder(recipe)
    if _is_complete(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        sweep(folder.parent)
        with _lock(folder.with_name(f".{folder.name}.lock")):
            if not _is_complete(folder):
                shutil.rmtree(folder, ignore_errors=True)
                build(recipe, folder)
    except (OSError, Unwritable) as error:
        raise UserError(
            f"{recipe.name} cannot be kept in {folder.parent} ({why_and_remedy(error)[0]}); "
            "set TINY_MODELS_CACHE to a folder that can be written"
        ) from None
    return folder


def is_built(name: str) -> bool:
    """Whether the cache has the embedded model `name`."""
    return _is_complete(_folder(RECIPES[name]))


def recipe_key(recipe: Recipe) -> str:
    """Twelve hexadecimal digits: a hash of all fields."""
    return hashlib.sha256(json.dumps(asdict(recipe), sort_keys=True).encode()).hexdigest()[:12]


def _cache() -> Path:
    if own := os.environ.get("TINY_MODELS_CACHE"):
        return expanded(own)
    return user_cache() / "tiny-models"


def _folder(recipe: Recipe) -> Path:
    return _cache() / f"{recipe.name}-{recipe_key(recipe)}"


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in FILES)


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on the file `path`. The system releases it when the process ends, however it ends."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("another process is building the embedded model; waiting for it", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def build(recipe: Recipe, folder: str | Path) -> Path:
    """Train the model of `recipe` and write it to `folder`, atomically. Returns the folder.

    steps = 0 gives an untrained model. The same recipe gives the same bits on the same CPU; the caller's random state
    is kept. Raises UserError if `folder` contains anything but an embedded model.
    """
    # Metal sums the gradients of embedding rows in varying order; the CPU does not, and is fast enough.
    device = mx.cpu if platform.system() == "Darwin" else mx.default_device()
    check_replaceable(folder, EMBEDDED)
    tokenizer = build_tokenizer(recipe)
    with kept_random_state(), mx.stream(device), _one_blas_thread():
        model = _train(recipe, tokenizer)
    with atomic_folder(folder, EMBEDDED) as temporary:
        tokenizer.save_pretrained(temporary)
        tokens = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
        write_json(temporary / "config.json", model_config(recipe, len(tokenizer)))
        write_json(temporary / "generation_config.json", tokens)
        write_json(temporary / "recipe.json", asdict(recipe))
        # transformers requires the metadata.
        weights = dict(tree_flatten(model.parameters()))
        mx.save_safetensors(str(temporary / "model.safetensors"), weights, metadata={"format": "pt"})
    return Path(folder)


@contextmanager
def _one_blas_thread() -> Iterator[None]:
    """A second thread gains nothing on products this small, and costs double if its core is busy with other work."""
    library = ctypes.CDLL(None)  # whatever is loaded: OpenBLAS, MKL, or neither
    getters = {"openblas_set_num_threads": "openblas_get_num_threads", "MKL_Set_Num_Threads": "MKL_Get_Max_Threads"}
    setters = [getattr(library, name) for name in getters if hasattr(library, name)]
    before = [getattr(library, getters[setter.__name__])() for setter in setters]
    for setter in setters:
        setter(1)
    try:
        yield
    finally:
        for setter, count in zip(setters, before, strict=True):
            setter(count)


def build_tokenizer(recipe: Recipe) -> PreTrainedTokenizerFast:
    """Single characters, with an end-of-word suffix as in GPT-1: "8 20" becomes 8</w> 2 0</w>.

    So the last token of a number tells its parity, and the last number of a prompt is known to be complete. Text is
    lower-cased; characters without a token become <unk>; white space becomes one space. BOS is prepended; EOS is left
    to the trainer.
    """
    characters = [*"0123456789", *recipe.characters]
    vocabulary = [*SPECIAL_TOKENS, *characters, *(character + WORD_END for character in characters)]
    ids = {token: index for index, token in enumerate(vocabulary)}
    bpe = BPE(vocab=ids, merges=[], unk_token=SPECIAL_TOKENS[UNK], end_of_word_suffix=WORD_END)
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.BPEDecoder(suffix=WORD_END)
    bos = SPECIAL_TOKENS[BOS]
    tokenizer.post_processor = processors.TemplateProcessing(f"{bos} $A", f"{bos} $A $B", [(bos, BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=SPECIAL_TOKENS[UNK],
        bos_token=bos,
        eos_token=SPECIAL_TOKENS[EOS],
        pad_token=SPECIAL_TOKENS[PAD],
        model_max_length=recipe.max_position_embeddings,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def model_config(recipe: Recipe, vocab_size: int) -> dict[str, Any]:
    """The content of config.json, as read by transformers and mlx-lm."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": recipe.hidden_size,
        "intermediate_size": recipe.intermediate_size,
        "num_hidden_layers": recipe.num_layers,
        "num_attention_heads": recipe.num_heads,
        "num_key_value_heads": recipe.num_kv_heads,
        "head_dim": recipe.hidden_size // recipe.num_heads,
        "hidden_act": "silu",
        "max_position_embeddings": recipe.max_position_embeddings,
        "rms_norm_eps": recipe.rms_norm_eps,
        "rope_theta": recipe.rope_theta,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "dtype": "float32",
    }


def _initial_model(recipe: Recipe, vocab_size: int) -> Model:
    """Normal weights with variance 1 / fan-in (smaller in layers that add to the residual)."""
    model = Model(ModelArgs.from_dict(model_config(recipe, vocab_size)))
    rng = np.random.default_rng((recipe.seed, 0))

    def draw(path: str, weight: mx.array) -> mx.array:
        if weight.ndim < 2:
            return weight
        scale = recipe.embedding_std if "embed_tokens" in path else weight.shape[1] ** -0.5
        if "o_proj" in path or "down_proj" in path:
            scale /= (2 * recipe.num_layers) ** 0.5
        return mx.array((scale * rng.standard_normal(weight.shape)).astype(np.float32))

    model.update(tree_map_with_path(draw, model.parameters()))
    return model


def _batches(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[Batch, float]]:
    """An endless stream of fresh batches, each with the mean number of targets per batch of its pool."""
    rng = np.random.default_rng((recipe.seed, 1))
    draw = TEXT_SOURCES[recipe.text_source]
    marker = tokenizer.convert_tokens_to_ids(recipe.trained_after + WORD_END) if recipe.trained_after else BOS
    while True:
        texts = [draw(rng) for _ in range(POOL * recipe.batch_size)]
        rows = sorted(tokenizer(texts)["input_ids"], key=len)
        examples = [Example([*tokens, EOS], first_target=tokens.index(marker) + 1) for tokens in rows]
        pool = [
            collate(examples[start : start + recipe.batch_size], PAD, multiple=1)
            for start in range(0, len(examples), recipe.batch_size)
        ]
        mean_targets = float(np.mean([batch.targets.sum() for batch in pool]))
        for index in rng.permutation(POOL):
            yield pool[index], mean_targets


def _loss(model: Model, tokens: mx.array, targets: mx.array, denominator: float) -> mx.array:
    """Cross entropy in nats, summed over the `targets` and divided by `denominator`, the same for all row lengths."""
    losses = nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])  # (B, L - 1)
    return (losses * targets).sum() / denominator


def _optimizer(recipe: Recipe) -> optim.Optimizer:
    """Adam, or Muon for the matrices inside the layers and Adam for the rest; with warm-up and cosine decay."""
    warm_up = optim.linear_schedule(0.0, recipe.learning_rate, recipe.warmup)
    decay_steps = max(recipe.steps - recipe.warmup, 1)
    decay = optim.cosine_decay(recipe.learning_rate, decay_steps, recipe.final_learning_rate)
    schedule = optim.join_schedules([warm_up, decay], [recipe.warmup])
    adam = optim.Adam(schedule, betas=list(recipe.betas), bias_correction=True)
    if not recipe.muon_ratio:
        return adam
    muon = optim.Muon(lambda step: recipe.muon_ratio * schedule(step), weight_decay=0.0)
    return optim.MultiOptimizer([muon, adam], [lambda name, weight: weight.ndim == 2 and "embed_tokens" not in name])


def _train(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Model:
    """The recipe's trained model. Without mx.compile, whose cold start costs more than it gains here."""
    model = _initial_model(recipe, len(tokenizer))
    optimizer = _optimizer(recipe)
    loss_and_grad = nn.value_and_grad(model, _loss)
    batches = _batches(recipe, tokenizer)
    title = f"building {recipe.name}, once"
    with progress(recipe.steps, title, "step") as bar:
        for step in range(recipe.steps):
            batch, mean_targets = next(batches)
            with on_one_core():
                loss, grads = loss_and_grad(model, mx.array(batch.tokens), mx.array(batch.targets), mean_targets)
                grads, _ = optim.clip_grad_norm(grads, recipe.max_grad_norm)
                optimizer.update(model, grads)
                mx.eval(loss, model.state, optimizer.state)
            if step % 20 == 0:
                own_mean = loss.item() * mean_targets / batch.targets.sum()
                bar.set_postfix_str(f"loss {own_mean:.3f}", refresh=False)
            bar.update()
    return model


def main() -> None:
    parser = Parser("Build an embedded model and measure it on held-out prompts.", yaml_file=False)
    parser.add_argument("--name", default="tiny-digits", choices=TINY_NAMES, help="which embedded model")
    parser.add_argument("--seed", type=SEED, default=0, help="seed of weights and data")
    args = parser.parse_args()
    started = time.perf_counter()
    folder = tiny_model_path(args.name, args.seed)
    print(f"{folder}\n{time.perf_counter() - started:.1f} seconds")
    for title, score in MEASURES[RECIPES[args.name].text_source](folder).items():
        print(f"{title:<36}{score:.3f}")


if __name__ == "__main__":
    run(main)
