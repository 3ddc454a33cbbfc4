"""Fusing an adapter into its base, and keeping what was learned where the base is quantized.

Rounding the tuned weights to a few bits anew can lose all of the tuning, since a change smaller than a step of the grid
vanishes in it. So the fused model is compared with the adapter on a few rows, by KL in nats a token, and where that is
too much, the layers that lose most are written in 8 bits, or unquantized if that does not suffice.

Memory: the base with its adapter, and one fused form of each adapted layer; all other weights are shared.

    python -m pytest tests/test_fuse.py tests/test_fuse_kl.py
"""

import math
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
from mlx.utils import tree_map_with_path, tree_unflatten

from data.batching import collate
from models.adapters import fuse_adapter, precision, wrapped
from models.export.measuring_rows import MeasuringRows
from models.loading import LoadedModel, twin
from models.token_stats import token_stats
from models.value_head import forward, standing_in

MAX_KL = 0.02  # nats a token
WIDER = 8  # bits
FULL = 0  # in place of the bits of a layer that is not quantized
GROUP_SIZES = (32, 64, 128)  # of mlx's affine quantization
LEAST_STEP = 1 / 8  # of the adapted layers that get more bits before the KL is measured again


def fuse(loaded: LoadedModel, de_quantize: bool = False) -> None:
    """Fuse the adapter of `loaded` into its weights, in place, in the precision that the base was saved in.

    de_quantize: turn a quantized base into an unquantized one.
    """
    fuse_adapter(loaded.model, de_quantize)

    def as_saved(name: str, weight: mx.array) -> mx.array:
        dtype = loaded.dtypes.get(name, weight.dtype)
        return weight.astype(dtype) if mx.issubdtype(dtype, mx.floating) else weight

    # Full fine-tuning trains in float32.
    loaded.model.update(tree_map_with_path(as_saved, loaded.model.parameters()))
    if de_quantize:
        mlx_lm.utils.dequantize_model(loaded.model)
        loaded.config.pop("quantization", None)
        loaded.config.pop("quantization_config", None)


@dataclass
class FuseReport:
    """How far a fused model is from its adapter.

    plain_kl, kl: nats a token, in the base's own bits and as it is written. plain_kept, kept: layer → share of the
    change by LoRA or DoRA that is left in its weights (1: all, see `share_kept`), likewise; empty for a full fine-tune.
    bits: layer → its bits where they are more than the base's; FULL: not quantized.
    """

    rows: str
    tokens: int
    max_kl: float
    base_bits: int  # FULL: the model is not quantized
    plain_kl: float
    plain_kept: dict[str, float]
    kl: float = 0.0
    kept: dict[str, float] = field(default_factory=dict)
    bits: dict[str, int] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """What to tell the user."""
        form = f"in {self.base_bits} bits" if self.base_bits else "in full precision"
        over = f", above --max-fuse-kl {self.max_kl:g}" if self.bits else ""
        lines = [
            f"fused {form}: KL to the adapter {self.plain_kl:.4f} nats a token on {self.rows}{over}"
            f"{_kept_text(self.plain_kept)}"
        ]
        if self.bits:
            counts = {bits: list(self.bits.values()).count(bits) for bits in (WIDER, FULL)}
            names = {WIDER: f"in {WIDER} bits", FULL: "in full precision"}
            written = " and ".join(f"{count} {names[bits]}" for bits, count in counts.items() if count)
            lines.append(
                f"of {len(self.kept)} adapted layers {written}: KL {self.kl:.4f} nats a token{_kept_text(self.kept)}"
            )
        return lines

    def figures(self) -> dict[str, Any]:
        """For the model's provenance, whole-model figures only."""
        kept = list(self.kept.values())
        shares = {"median_share_kept": _figure(median(kept)), "least_share_kept": _figure(min(kept))} if kept else {}
        widened = {
            "layers_in_8_bits": sum(bits == WIDER for bits in self.bits.values()),
            "layers_in_full_precision": sum(bits == FULL for bits in self.bits.values()),
        }
        kls = {"kl_in_base_bits": _figure(self.plain_kl), "kl": _figure(self.kl), "tokens": self.tokens}
        return {**kls, **shares, **(widened if self.base_bits else {})}

    def layers(self) -> dict[str, dict[str, Any]]:
        """For the model's provenance, by layer."""
        return {
            name: {"share_kept": _figure(share), **({"bits": self.bits[name] or "full"} if name in self.bits else {})}
            for name, share in self.kept.items()
        }


def _figure(value: float) -> float | None:
    """None for what JSON cannot hold, as of a model whose weights are not finite."""
    return round(value, 6) if math.isfinite(value) else None


def _kept_text(kept: dict[str, float]) -> str:
    if not kept:
        return ""
    least = min(kept, key=lambda name: kept[name])
    worst = f"; least {kept[least]:.0%}, {least}" if kept[least] < 0.995 else ""
    return f"; {median(kept.values()):.0%} of a layer's change is kept (median{worst})"


def fuse_measured(
    loaded: LoadedModel, rows: MeasuringRows, max_kl: float = MAX_KL, de_quantize: bool = False
) -> FuseReport:
    """`fuse`, and compare the result with the adapter on `rows`.

    If the model stays quantized and the KL is above `max_kl` (nats a token), the layers that lose most are given more
    bits, in the model and in its config, until it is not.
    """
    adapted = twin(loaded.model)
    fuse(loaded, de_quantize)
    comparison = _Comparison(adapted, loaded.model, rows)
    kept = comparison.kept()
    kl = comparison.kl()
    quantization = loaded.config.get("quantization")
    report = FuseReport(
        rows=rows.source,
        tokens=len(comparison.targets),
        max_kl=max_kl,
        base_bits=quantization["bits"] if quantization else FULL,
        plain_kl=kl,
        plain_kept=kept,
        kl=kl,
        kept=kept,
    )
    if quantization and kl > max_kl:
        _widen(comparison, report)
        report.kept = kept | comparison.kept(report.bits)
        for key in {"quantization", "quantization_config"} & loaded.config.keys():
            loaded.config[key] = _per_layer(quantization, comparison.fused, report.bits)
    return report


def _per_layer(quantization: dict[str, Any], layers: dict[str, nn.Module], bits: dict[str, int]) -> dict[str, Any]:
    """mlx-lm's quantization config with an entry for each layer of other bits; one without scales needs none."""
    own = {
        name: {"group_size": layers[name].group_size, "bits": count, "mode": "affine"}
        for name, count in bits.items()
        if count != FULL
    }
    return {**{key: value for key, value in quantization.items() if key not in bits}, **own}


class _Comparison:
    """A fused model against its adapter.

    layers: by name, the adapter's layers; fused: what has taken their places. losses: by name, how far the output of
    the fused layer, as it first was, is from the adapter's: the mean over tokens of |difference|^2 / |output|^2.
    """

    def __init__(self, adapted: nn.Module, model: nn.Module, rows: MeasuringRows):
        self.adapted, self.model = adapted, model
        self.layers = {name: module for name, module in adapted.named_modules() if hasattr(module, "fuse")}
        modules = dict(model.named_modules())
        self.fused = {name: modules[name] for name in self.layers}
        batches = [collate([example], 0, multiple=1) for example in rows.examples]  # one row each: no pads
        self.tokens = [mx.array(batch.tokens[:, :-1]) for batch in batches]
        self.positions = [mx.array(batch.targets.nonzero()[1][None]) for batch in batches]
        self.targets = mx.concatenate([mx.array(batch.tokens[:, 1:][batch.targets > 0]) for batch in batches])  # (N,)
        self.hidden, self.losses = self._pass_of_adapter()

    def _pass_of_adapter(self) -> tuple[mx.array, dict[str, float]]:
        modules = dict(self.adapted.named_modules())
        probes = {name: _Probe(layer, self.fused[name]) for name, layer in self.layers.items()}
        with ExitStack() as stack:
            for name, probe in probes.items():
                parent, _, key = name.rpartition(".")
                stack.enter_context(standing_in(modules[parent], key, probe))
            hidden = self._hidden(self.adapted, list(probes.values()))
        return hidden, {name: probe.loss.item() for name, probe in probes.items()}

    def _hidden(self, model: nn.Module, probes: Sequence["_Probe"] = ()) -> mx.array:
        """Hidden states (N, H) before the trained tokens of all rows."""
        parts = []
        for tokens, positions in zip(self.tokens, self.positions, strict=True):
            parts.append(forward(model, tokens, positions)[1][0])
            mx.eval(parts[-1], [probe.loss for probe in probes])
        return mx.concatenate(parts)

    def kl(self) -> float:
        """Mean KL of the adapter's next token against the fused model's, in nats."""
        reference = (self.model, self._hidden(self.model))
        stats = token_stats(self.adapted, self.hidden, self.targets, reference=reference)
        return max(stats.kl.mean().item(), 0.0)  # rounding may take it a little below

    def kept(self, names: Iterable[str] | None = None) -> dict[str, float]:
        """`share_kept` by layer, of all layers or of those named."""
        return {name: share_kept(self.layers[name], self.fused[name]) for name in (names or self.layers)}

    def put(self, name: str, layer: nn.Module) -> None:
        """Have `layer` in the fused model."""
        mx.eval(layer.parameters())  # one after the other, so that only one is in full precision at a time
        self.fused[name] = layer
        self.model.update_modules(tree_unflatten([(name, layer)]))


class _Probe:
    """Stands in for an adapted layer and adds up how far the fused layer's outputs are from it (see _Comparison)."""

    def __init__(self, layer: nn.Module, fused: nn.Module):
        self.layer, self.fused = layer, fused
        self.loss = mx.array(0.0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        own = self.layer(x, *args, **kwargs)
        output = own.astype(mx.float32)
        difference = self.fused(x, *args, **kwargs).astype(mx.float32) - output
        squares = [array.square().sum(axis=-1) for array in (difference, output)]
        self.loss = self.loss + (squares[0] / mx.maximum(squares[1], 1e-12)).mean()
        return own


def share_kept(layer: nn.Module, fused: nn.Module) -> float:
    """The share of a LoRA's or DoRA's change D of its weights W that is in the fused weights F: (F - W) . D / D . D."""
    base = _float_weight(wrapped(layer))
    delta = _exact(layer).weight - base
    size = delta.square().sum().item()
    return ((_float_weight(fused) - base) * delta).sum().item() / size if size else 1.0


def _float_weight(layer: nn.Module) -> mx.array:
    """The weight of a layer in float32, dequantized."""
    if "scales" not in layer:
        return layer.weight.astype(mx.float32)
    arrays = [layer.weight, layer.scales, layer.get("biases")]
    return mx.dequantize(*arrays, layer.group_size, layer.bits, layer.mode).astype(mx.float32)


def _exact(layer: nn.Module) -> nn.Module:
    """The fused layer, unquantized, in float32."""
    copy = twin(layer)
    copy.set_dtype(mx.float32)
    return copy.fuse(dequantize=True)


def _widened(layer: nn.Module, bits: int) -> nn.Module:
    """The fused layer in `bits` bits, or FULL, in the precision of its base."""
    base, fused = wrapped(layer), _exact(layer)
    if bits != FULL:
        size = base.group_size if base.group_size in GROUP_SIZES else GROUP_SIZES[0]
        fused = fused.to_quantized(group_size=size, bits=bits)
    fused.set_dtype(precision(base))
    return fused


def _widen(comparison: _Comparison, report: FuseReport) -> None:
    """Give layers more bits until the KL is at most the limit: first those that lose most for their size."""
    losses = comparison.losses
    cost = {name: losses[name] / _size(layer) for name, layer in comparison.fused.items()}
    order = sorted(cost, key=lambda name: -cost[name])
    for bits in (WIDER, FULL):
        left = [name for name in order if _bits(comparison.fused[name]) < (bits or 32)]
        least = max(int(LEAST_STEP * len(left)), 1)
        while left and report.kl > report.max_kl:
            count = max(_enough([losses[name] for name in left], report.max_kl / report.kl), least)
            for name in left[:count]:
                comparison.put(name, _widened(comparison.layers[name], bits))
                report.bits[name] = bits
            left = left[count:]
            report.kl = comparison.kl()


def _bits(layer: nn.Module) -> int:
    return layer.bits if "scales" in layer else 32


def _size(layer: nn.Module) -> int:
    """The number of weights of a layer."""
    return layer.weight.size * 32 // layer.bits if "scales" in layer else layer.weight.size


def _enough(losses: Sequence[float], share: float) -> int:
    """How many of the first layers to take so that the losses of the others are at most `share` of all.

    KL grows with the square of the error, so it is shared out like `losses`; what this misses is measured.
    """
    left, total = sum(losses), sum(losses)
    for count, loss in enumerate(losses):
        if left <= share * total:
            return count
        left -= loss
    return len(losses)
