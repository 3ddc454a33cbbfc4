"""How much memory a run will need, from sizes alone: nothing is loaded, no weight is read.

    outline = outline_of(config_of("Qwen/Qwen3-0.6B", on_gpu=True), AdapterConfig())
    plan = plan_sft(outline, SFTWork(rows=4, validation_rows=4, length=512), on_gpu=True)
    plan.peak, plan.phases["training"]

Every function says where its bytes come from. What is kept was read in mlx's and mlx-lm's sources and is held to
measured peaks by benchmarks/plan.py. Not here: which run the flags ask for, and what to do where it does not fit
(training.planning).
"""

from collections.abc import Mapping
from dataclasses import dataclass

from models.generation import CACHE_STEP, prefill_length
from models.outline import Outline
from models.token_stats import ALIVE_ON_CPU, ALIVE_ON_GPU, LOGITS_BYTES

FLOAT = 4  # bytes of a float32
# Of what a forward pass has in flight: gradients stand beside what they are made of, and what is recomputed, too.
BACKWARD, CHECKPOINTED = 1.4, 2.35
# Arrays (n, V) in float32 that live at once: of a single piece, and where the next are queued before it is done, at
# most so many a piece. With a gradient more are queued, and most where a compiled loss has few operations.
LOGITS, OF_A_PIECE, FORWARD, QUEUED_ON_CPU, QUEUED_ON_GPU = 5, 3, 6, 9.3, 13
SAMPLING_ARRAYS = 5  # arrays (B, V) in float32 of two steps of decoding: logits, log probabilities, noise, their sum


@dataclass(frozen=True)
class SFTWork:
    """What sft.py reads at once. rows: texts in a piece of a batch (of a pair two), each of `length` tokens."""

    rows: int
    validation_rows: int  # in a batch of a validation
    length: int
    moments: int = 2  # of a matrix's weight: Adam's two, Muon's one
    logits_bytes: int = LOGITS_BYTES
    checkpoint: bool = False
    several_pieces: bool = False  # whose gradients are summed
    head: bool = False  # a value head, and no logits


@dataclass(frozen=True)
class PPOWork:
    """What a step of PPO samples and learns from. piece: completions that are scored, and updated on, at once."""

    batch: int
    distinct: int  # prompts, of which each is read once
    piece: int
    prompt: int  # tokens
    completion: int  # tokens
    moments: int = 2
    logits_bytes: int = LOGITS_BYTES
    checkpoint: bool = False
    several_pieces: bool = False
    base_is_reference: bool = False
    head: bool = True
    reward_models: int = 0  # bytes


@dataclass(frozen=True)
class EvaluationWork:
    """What evaluate.py samples and, with a reference, scores."""

    batch: int
    prompt: int
    completion: int
    reference: bool = False
    logits_bytes: int = LOGITS_BYTES
    other_models: int = 0  # bytes of all that are open besides the first


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by what takes them. held: all the time; phases: beyond that, while a phase lasts."""

    held: Mapping[str, int]
    phases: Mapping[str, Mapping[str, int]]

    def peak_of(self, phase: str) -> int:
        """What a phase takes, all that is held included."""
        return sum(self.held.values()) + sum(self.phases[phase].values())

    @property
    def widest(self) -> str:
        """The phase that takes most."""
        return max(self.phases, key=self.peak_of)

    @property
    def peak(self) -> int:
        """What the run takes at most."""
        return self.peak_of(self.widest)


def plan_sft(outline: Outline, work: SFTWork, on_gpu: bool) -> MemoryPlan:
    """The plan of SFT, DPO or a reward model. Without trained weights: of a test."""
    length = work.length + outline.soft_tokens
    held = {**_weights(outline, work.head), "optimizer": optimizer(outline, work.moments)}

    def targets(rows: int) -> int:
        return 0 if work.head else rows * length

    rows = work.validation_rows
    phases = {"validation": _passing(outline, rows * length, length, targets(rows), work.logits_bytes, on_gpu)}
    if outline.trained or work.head:
        rows = work.rows
        phases = {"training": _learning(outline, rows * length, length, targets(rows), work, on_gpu), **phases}
    return MemoryPlan(held, phases)


def plan_ppo(outline: Outline, work: PPOWork, on_gpu: bool) -> MemoryPlan:
    """The plan of PPO: sampling, scoring by policy and reference, update."""
    prompt = work.prompt + outline.soft_tokens
    length = prompt + work.completion - 1  # nothing is predicted from the last token
    tokens, positions = work.piece * length, work.piece * work.completion
    held = {
        **_weights(outline, work.head),
        "optimizer": optimizer(outline, work.moments),
        "reference": reference(outline, work.base_is_reference),
        "reward models": work.reward_models,
    }
    states = {"states of frozen layers": frozen_states(outline, work.batch * length)}
    return MemoryPlan(
        held,
        {
            "sampling": {
                **states,
                **sampling(outline, work.batch, work.distinct, prompt, work.completion, on_gpu),
            },
            "scoring": {
                **states,
                **_passing(outline, tokens, length, positions, work.logits_bytes, on_gpu, models=2),
            },
            "update": {**states, **_learning(outline, tokens, length, positions, work, on_gpu)},
        },
    )


def plan_evaluation(outline: Outline, work: EvaluationWork, on_gpu: bool) -> MemoryPlan:
    """The plan of evaluate.py."""
    prompt = work.prompt + outline.soft_tokens
    length = prompt + work.completion - 1
    phases = {"sampling": sampling(outline, work.batch, work.batch, prompt, work.completion, on_gpu)}
    if work.reference:
        tokens, positions = work.batch * length, work.batch * work.completion
        phases["scoring"] = _passing(outline, tokens, length, positions, work.logits_bytes, on_gpu)
    return MemoryPlan({**_weights(outline, head=False), "other models": work.other_models}, phases)


def _weights(outline: Outline, head: bool) -> dict[str, int]:
    """The base as it is stored, and what is trained on it in float32, with the row of a value head."""
    adapter = 0 if outline.kind == "full" else FLOAT * outline.trained
    return {"weights": outline.weights, "adapter": adapter + FLOAT * outline.hidden * head}


def optimizer(outline: Outline, moments: int) -> int:
    """Adam's two moments of every trained weight, in float32; Muon's one of a matrix, Adam's two of the rest."""
    return FLOAT * (moments * outline.matrices + 2 * (outline.trained - outline.matrices))


def reference(outline: Outline, base_is_reference: bool) -> int:
    """What the reference policy has for itself: the adapter as it was at the start or, where all weights are trained,
    the whole model (which is in float32, unless it is the base)."""
    if outline.kind == "full":
        return outline.base if base_is_reference else outline.weights
    return 0 if base_is_reference else FLOAT * outline.trained


def _learning(
    outline: Outline, tokens: int, length: int, positions: int, work: SFTWork | PPOWork, on_gpu: bool
) -> dict[str, int]:
    """What a step needs from the forward pass to the optimizer's step."""
    gradient = FLOAT * outline.trained
    in_flight = CHECKPOINTED if work.checkpoint else BACKWARD
    passing = _passing(outline, tokens, length, positions, work.logits_bytes, on_gpu, in_flight)
    kept = activations(outline, tokens, length, on_gpu, work.checkpoint)
    # Activations are gone by the time that all gradients are there, and clipping scales these into new arrays.
    beyond = max(2 * gradient - kept - sum(passing.values()), 0)
    return {"gradients": beyond + gradient * work.several_pieces, "kept activations": kept, **passing}


def frozen_states(outline: Outline, tokens: int) -> int:
    """What enters the first trained layer, of all tokens of a rollout, where layers below it are computed once."""
    return tokens * outline.hidden * outline.size if outline.passed_layers < outline.layers else 0


def activations(outline: Outline, tokens: int, length: int, on_gpu: bool, checkpoint: bool) -> int:
    """What the forward pass keeps for the gradient, in all layers from the lowest trained one on."""
    layer = tokens * kept_a_token(outline, length, on_gpu) + kept_a_layer(outline)
    if checkpoint:  # every layer's input, and all of the layer that is computed anew
        return outline.passed_layers * tokens * outline.hidden * outline.size + layer
    return outline.passed_layers * layer


def kept_a_token(outline: Outline, length: int, on_gpu: bool) -> int:
    """Bytes that a layer keeps for the gradient, for each token of texts of `length` tokens."""
    o, queries, keys = outline, outline.heads * outline.head_dim, outline.kv_heads * outline.head_dim
    full, float32 = o.kind == "full", o.size == FLOAT
    # Two RMSNorms keep their input in float32 and, where their own weights are trained, what these multiply.
    norms = FLOAT * (4 if full else 2) * o.hidden + FLOAT * (queries + keys) * o.query_norms
    # Attention keeps queries, keys and values, and the probability of every place that a token could look at.
    attention = o.size * (queries + 2 * keys + o.heads * length)
    # SwiGLU keeps gate and up, the gate's sigmoid and their product; models.cpu.swiglu not the gate.
    swiglu = o.size * o.intermediate * (4 if on_gpu or not float32 else 3)
    return norms + attention + swiglu + _inputs(outline, on_gpu)


def _inputs(outline: Outline, on_gpu: bool) -> int:
    """Bytes a token of the inputs from which the gradients of linear layers and LoRAs are made.

    Layers with the same input share it. A LoRA's input is in float32: one that is not is converted, on CPU for every
    LoRA by itself, while a compiled loss does it once. Dropout gives every LoRA an input of its own.
    """
    shared = outline.kind == "full" or ((on_gpu or outline.size == FLOAT) and not outline.dropout)
    inputs = {layer.source if shared else i: layer.inputs for i, layer in enumerate(outline.adapted)}.values()
    ranks = outline.rank * len(outline.adapted)  # what a LoRA's first matrix gives
    magnitudes = sum(layer.outputs for layer in outline.adapted) if outline.kind == "dora" else 0
    return FLOAT * (sum(inputs) + ranks) + outline.size * magnitudes


def kept_a_layer(outline: Outline) -> int:
    """Bytes that a layer keeps for the gradient whatever the texts: DoRA's weights of a quantized base as numbers."""
    if outline.kind != "dora" or not outline.quantized:
        return 0
    return outline.size * sum(layer.inputs * layer.outputs for layer in outline.adapted)


def _passing(
    outline: Outline,
    tokens: int,
    length: int,
    positions: int,
    logits_bytes: int,
    on_gpu: bool,
    in_flight: float = 1.0,
    models: int = 1,
) -> dict[str, int]:
    """What a pass of so many models over the same tokens needs for a moment.

    in_flight: results that are alive, as a multiple of those of a forward pass; more than 1 is a training's.

    Logits and the layers' results are never there at once, so only what these take beyond the logits is added.
    """
    of_logits = logits(outline, positions, logits_bytes, on_gpu, in_flight > 1) * models
    of_layers = working(outline, tokens, length, on_gpu, in_flight)
    return {"logits": of_logits, "working arrays": max(of_layers - of_logits, 0)}


def working(outline: Outline, tokens: int, length: int, on_gpu: bool, in_flight: float = 1.0) -> int:
    """Results that are alive for a moment: those of the operations that mlx has queued, of about half a layer.

    That is either SwiGLU or attention, whose scores are the largest arrays of long texts. How many arrays of each width
    these are was measured; models.cpu.attention makes several of a token's places.
    """
    o, queries, keys = outline, outline.heads * outline.head_dim, outline.kv_heads * outline.head_dim
    ours = not on_gpu and o.size == FLOAT
    wide = (6 * o.intermediate + 6 * queries + 3 * keys) if ours else 5 * (o.intermediate + queries + keys)
    swiglu = in_flight * (FLOAT * 8 * o.hidden + o.size * wide)
    scores = in_flight * o.size * (3 if ours else 1) * o.heads * length
    attention = FLOAT * 8 * o.hidden + o.size * 4 * (queries + keys) + scores
    return int(tokens * max(swiglu, attention))


def logits(outline: Outline, positions: int, logits_bytes: int, on_gpu: bool, training: bool = False) -> int:
    """Arrays of logits in float32, in pieces of as many positions as --logits-memory allows (models.token_stats). Where
    the table is trained, also the sum of its gradients."""
    row = FLOAT * outline.vocabulary
    pieces = -(-positions // max(1, logits_bytes // (row * (ALIVE_ON_GPU if on_gpu else ALIVE_ON_CPU))))
    most = (QUEUED_ON_GPU if on_gpu else QUEUED_ON_CPU) if training else FORWARD
    arrays = LOGITS if pieces <= 1 else min(most, OF_A_PIECE * pieces)
    return int(arrays * row * positions / max(pieces, 1)) + outline.table * training


def sampling(
    outline: Outline, batch: int, distinct: int, prompt: int, completion: int, on_gpu: bool
) -> dict[str, int]:
    """The KV cache of all completions in flight, a layer's of it twice while it grows, and a step's logits."""
    length = prompt + completion
    grown = -(-length // CACHE_STEP) * CACHE_STEP if length > CACHE_STEP else length
    cache = 2 * (outline.layers + 1) * outline.kv_heads * outline.head_dim * grown * batch * outline.size
    of_logits = SAMPLING_ARRAYS * FLOAT * batch * outline.vocabulary
    read = working(outline, distinct * min(prompt, prefill_length(distinct)), prompt, on_gpu)
    return {"KV cache": cache, "logits": of_logits, "working arrays": max(read - of_logits, 0)}
