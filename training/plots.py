"""Plots of a run, drawn from its `metrics.jsonl`.

python -m training.plots RUN_FOLDER
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from common.files import atomic_file
from training.metrics import read_metrics

# One panel per entry: its title, and the metrics drawn in it by their label.
PANELS: dict[str, dict[str, str]] = {
    "loss": {"train_loss": "train", "valid_loss": "validation"},
    "accuracy": {"train_accuracy": "train", "valid_accuracy": "validation"},
    "implicit rewards": {"train_chosen_reward": "chosen", "train_rejected_reward": "rejected"},
    "score": {"mean_score": "sampled", "true_score": "ground truth"},
    "KL to the reference (nats per completion)": {"kl": "sampled"},
    "KL coefficient": {"kl_coef": "kl_coef"},
    "completion length (tokens)": {"completion_length": "mean"},
    "entropy (nats per token)": {"entropy": "policy"},
    "clipped share": {"clip_fraction": "ratio", "value_clip_fraction": "value"},
    "losses": {"policy_loss": "policy", "value_loss": "value"},
    "explained variance of the returns": {"explained_variance": "values"},
}


def plot_run(folder: str | Path) -> Path | None:
    """Draw every metric of the run that has a panel into `curves.png`; None if there is nothing to draw."""
    rows = read_metrics(folder)
    panels = {}
    for title, names in PANELS.items():
        if title == "score":
            names = names | {name: name.removeprefix("score_") for row in rows[-1:] for name in row if _is_part(name)}
        curves = {label: _points(rows, name) for name, label in names.items()}
        curves = {label: points for label, points in curves.items() if points}
        if curves:
            panels[title] = curves
    if not panels:
        return None
    path = Path(folder) / "curves.png"
    plot_panels(path, panels, Path(folder).name)
    return path


def plot_panels(
    path: str | Path, panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], title: str = "", x_label="step"
) -> None:
    """Draw panels of curves, {title: {label: [(x, y), ...]}}, into one PNG, written atomically."""
    import matplotlib  # here, because its import takes seconds

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(len(panels), 3)
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4.6 * columns, 3.1 * lines), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (name, curves) in zip(axes.flat, panels.items(), strict=False):
        for label, points in curves.items():
            axis.plot(*zip(*points, strict=True), label=label, linewidth=1.3, marker="." if len(points) < 15 else "")
        axis.set_title(name, fontsize=10)
        axis.set_xlabel(x_label, fontsize=9)
        axis.grid(alpha=0.3)
        if len(curves) > 1:
            axis.legend(fontsize=8)
    if title:
        figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=110)
    plt.close(figure)


def _is_part(name: str) -> bool:
    """Whether a metric is the score of one reward of a weighted sum."""
    return name.startswith("score_")


def _points(rows: Sequence[Mapping[str, float]], name: str) -> list[tuple[float, float]]:
    return [(row["step"], row[name]) for row in rows if row.get(name) is not None]


if __name__ == "__main__":
    print(plot_run(sys.argv[1]) or "nothing to draw")
