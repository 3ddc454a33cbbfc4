"""The base model's rollouts over the processes of mlx.launch: rank 0 does all of a command, the others draw with it.

    mlx.launch -n 2 -- python -m synth.run --task my_task.yaml ...

A rollout is the same whoever draws it (synth/pipeline/base_model.py). Only rank 0 needs the files of the run: an
adapter is sent to the others. Not here: training, which rank 0 starts alone, while the others wait.
"""

import os
import tempfile
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common.cli import Stopped
from data.batching import in_order
from synth.pipeline.rollouts import Completer, Draw
from training.ranks import ALONE, Ranks

RANKS: ContextVar[Ranks] = ContextVar("ranks", default=ALONE)
ROUND = 4  # times the completions in flight that each process draws between two exchanges


def with_all(main: Callable[[], None]) -> None:
    """Call a command's main: alone, or in a launch on rank 0, which the others serve until it ends."""
    if "MLX_RANK" not in os.environ:
        main()
        return
    from training.mlx_ranks import launched  # takes mlx's time, which not every command needs

    with launched() as ranks:
        if not ranks.writes:
            serve(ranks)
            return
        RANKS.set(ranks)
        try:
            main()
        except Stopped:
            ranks.gather([None])
            raise
        ranks.gather([None])


def continued_by(command: str) -> None:
    """The command that goes on where this run ends, which the rank says that is left should one be lost."""
    ranks, words = RANKS.get(), command.removeprefix("python ")
    if ranks.size > 1:
        ranks.gather([{"continued_by": words}])
        ranks.continued_by(words)


def serve(ranks: Ranks) -> None:
    """Do what rank 0 asks for until there is nothing more."""
    model: Completer | None = None
    while (request := ranks.gather([])[0]) is not None:
        if "settings" in request:
            model = _open_sent(ranks, **request)
        elif "continued_by" in request:
            ranks.continued_by(request["continued_by"])
        elif model is not None:
            draw_together(ranks, model, [Draw(*row) for row in request["rows"]])


def open_model(settings: Any) -> Completer:
    """The model of `synth.pipeline.pass_rates.BaseModelSettings`, which all processes of a launch open."""
    from synth.pipeline.base_model import BaseModel  # takes mlx's time, which other stages need not wait for

    ranks = RANKS.get()
    if ranks.size > 1:
        _send(ranks, {name: _plain(value) for name, value in asdict(settings).items()})
    model = BaseModel(**asdict(settings))
    return model if ranks.size == 1 else SharedModel(ranks, _same(ranks, model), settings.batch_size)


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, os.PathLike) else value


def _send(ranks: Ranks, settings: dict[str, Any]) -> None:
    """Have the others open the model, with the weights of its adapter, which lies where rank 0 is."""
    from models.adapters import read_adapter
    from training.mlx_ranks import from_first

    path = settings.pop("adapter")
    if not path:
        ranks.gather([{"settings": settings, "adapter": None, "shapes": {}}])
        return
    saved = read_adapter(path)
    shapes = {name: weight.shape for name, weight in saved.weights.items()}
    ranks.gather([{"settings": settings, "adapter": vars(saved.config), "shapes": shapes}])
    from_first(ranks, saved.weights)


def _open_sent(
    ranks: Ranks, settings: dict[str, Any], adapter: dict[str, Any] | None, shapes: dict[str, list[int]]
) -> Completer:
    """The model that rank 0 opens, as `_send` says."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from models.adapters import AdapterConfig, write_adapter
    from synth.pipeline.base_model import BaseModel
    from training.mlx_ranks import from_first

    if adapter is None:
        return _same(ranks, BaseModel(**settings))
    weights = dict(tree_flatten(from_first(ranks, {name: mx.zeros(shape) for name, shape in shapes.items()})))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter"
        write_adapter(path, weights, AdapterConfig(**adapter))
        return _same(ranks, BaseModel(**settings, adapter=path))


def _same(ranks: Ranks, model: Any) -> Any:
    """The model, which all ranks have opened. Raises UserError where they are not the same."""
    from training.mlx_ranks import weights_digest

    ranks.check_same(base_model=weights_digest(model.model))
    return model


def draw_together(ranks: Ranks, model: Completer, rows: Sequence[Draw]) -> list[str]:
    """The completions of `rows`, of which each process draws its share."""
    own = ranks.share(len(rows))
    texts = [""] * (own.stop - own.start)
    if texts:
        model.sample(rows[own], texts.__setitem__)
    return ranks.gather(texts)


class SharedModel:
    """A base model of which every process of a launch has a copy."""

    def __init__(self, ranks: Ranks, model: Completer, batch_size: int):
        self.ranks, self.model, self.identity = ranks, model, model.identity
        self.round = ROUND * batch_size * ranks.size

    def sample(self, wanted: Sequence[Draw], done: Callable[[int, str], None]) -> None:
        """As `Completer` says, some rounds of completions in flight at a time."""
        for indices in in_order(len(wanted), self.round):
            rows = wanted[indices.start : indices.stop]
            self.ranks.gather([{"rows": rows}])
            for index, text in zip(indices, draw_together(self.ranks, self.model, rows), strict=True):
                done(index, text)
