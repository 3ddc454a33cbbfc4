"""The base model's rollouts over the processes of mlx.launch: rank 0 does all of a command, the others draw with it.

    mlx.launch -n 2 -- python -m synth.pipeline.difficulty --task my_task.yaml --in verified.jsonl ...

A rollout is the same whoever draws it (synth/pipeline/base_model.py). Not here: training, which rank 0 starts alone.
"""

import os
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import asdict
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


def serve(ranks: Ranks) -> None:
    """Do what rank 0 asks for until there is nothing more."""
    model: Completer | None = None
    while (request := ranks.gather([])[0]) is not None:
        if "settings" in request:
            model = _open(request["settings"])
        elif model is not None:
            draw_together(ranks, model, [Draw(*row) for row in request["rows"]])


def open_model(settings: Any) -> Completer:
    """The model of `synth.pipeline.pass_rates.BaseModelSettings`, which all processes of a launch open."""
    ranks, fields = RANKS.get(), {name: _plain(value) for name, value in asdict(settings).items()}
    if ranks.size == 1:
        return _open(fields)
    ranks.gather([{"settings": fields}])
    return SharedModel(ranks, _open(fields), settings.batch_size)


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, os.PathLike) else value


def _open(fields: dict[str, Any]) -> Completer:
    from synth.pipeline.base_model import BaseModel  # takes mlx's time, which other stages need not wait for

    return BaseModel(**fields)


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
