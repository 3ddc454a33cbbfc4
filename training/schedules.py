"""How the learning rate changes over a run, as a share of the highest rate; without mlx and torch."""

import math

SCHEDULES = ("constant", "linear", "cosine", "wsd")
DECAY_SHARE = 0.2  # of a run's updates, over which wsd decays (warm-up, stable, decay: arXiv:2404.06395)


def schedule_share(update: int, total_updates: int, kind: str = "constant", warmup: int = 0) -> float:
    """The share, 0..1, at an update (from 0): it rises from 0 over the warm-up, then stays, or decays to 0 at the end.

    linear and cosine decay from the warm-up on, wsd over the last `DECAY_SHARE` of the run. Source: mlx-lm,
    `tuner.utils.build_schedule`, which holds the full rate for the two updates after the warm-up.
    """
    if warmup and update <= warmup:
        return update / warmup
    if kind == "wsd":
        return min(1.0, max(total_updates - update, 0) / (DECAY_SHARE * total_updates))
    past = min(update - (warmup + 1 if warmup else 0), max(total_updates - warmup, 1)) / max(total_updates - warmup, 1)
    return {"constant": 1.0, "linear": 1 - past, "cosine": 0.5 * (1 + math.cos(math.pi * past))}[kind]
