"""A picture of the routing, for people."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from slidelora.routing_state import Routing, routing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Colour = tuple[float, float, float]


def plot_routing(model: nn.Module, path: str | Path | None = None, sample: int = 0) -> Figure:
    """Draws what the gates of an injected model's last forward did, and returns the figure.

    Of gate="token": each expert's mean weight in each layer, over the batch's valid tokens, and, for one sample, which
    modality-specific expert weighs most for each token in each layer, the stronger its colour the more it weighs.
    Layers that do not see the tokens that most see are left out of the latter. Of other gates: each expert's weight for
    each sample, or, where gates by token were given, for each token of one sample.
    path: where to save it, in the format of its suffix; sample: which of the batch.
    Raises ImportError without matplotlib (pip install "slidelora[plot]"), ValueError before the first forward or for a
    sample that the batch does not have.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('plot_routing needs matplotlib: pip install "slidelora[plot]"') from error
    state = routing(model)
    weights = state.weights
    if weights is None:
        raise ValueError("no gate ran yet, expected a forward of the model before plot_routing")
    if isinstance(weights, Tensor):
        by_token = weights.ndim == 3
        rows = _row(weights, sample, len(weights)) if by_token else weights
        figure = Figure(figsize=(3 + 0.6 * len(state.names), 1.5 + 0.25 * len(rows)), layout="constrained")
        axes: Any = figure.subplots()
        _heat(figure, axes, rows, state.names, [str(row) for row in range(len(rows))])
        axes.set(ylabel="token" if by_token else "sample", title="weight")
    else:
        shapes = [value.shape for value in weights.values() if value.ndim == 3]
        shape = max(shapes, key=shapes.count) if shapes else None
        wide = [3 + 0.5 * len(state.names), *([5 + 0.15 * shape[1]] if shape else [])]
        figure = Figure(figsize=(sum(wide), 1.5 + 0.2 * len(weights)), layout="constrained")
        panels = figure.subplots(1, len(wide), width_ratios=wide, squeeze=False)[0]
        _layers(figure, panels[0], state, weights)
        if shape is not None:
            _tokens(panels[1], state, {name: value for name, value in weights.items() if value.shape == shape}, sample)
    if path is not None:
        figure.savefig(path, dpi=120)
    return figure


def _layers(figure: Figure, axes: Any, state: Routing, weights: dict[str, Tensor]) -> None:
    means = []
    for name, value in weights.items():
        valid = state.records[name][-1].valid
        means.append((value.flatten(0, -2) if valid is None else value[valid]).mean(0).cpu())
    _heat(figure, axes, torch.stack(means), state.names, _short(list(weights)))
    axes.set_title("mean weight")


def _tokens(axes: Any, state: Routing, weights: dict[str, Tensor], sample: int) -> None:
    from matplotlib import colormaps
    from matplotlib.patches import Patch

    names = state.config.specific
    palette = colormaps["tab10" if len(names) <= 10 else "turbo"]
    colours: list[Colour] = [
        palette(column if len(names) <= 10 else column / len(names))[:3] for column in range(len(names))
    ]
    columns = [state.names.index(name) for name in names]
    picture = []
    for name, value in weights.items():
        most, chosen = _row(value, sample, len(value))[:, columns].max(-1)  # (T,)
        valid = state.records[name][-1].valid
        shown = most if valid is None else most * valid[sample]
        pairs = zip(shown.clamp(0, 1).tolist(), chosen.tolist())
        picture.append([[1 - weight * (1 - part) for part in colours[expert]] for weight, expert in pairs])
    axes.imshow(picture, aspect="auto", interpolation="nearest")
    axes.set_yticks(range(len(picture)), _short(list(weights)) if len(weights) < len(state.records) else [], fontsize=8)
    axes.set(xlabel="token", title=f"expert that weighs most, sample {sample}")
    handles = [Patch(color=colour, label=name) for name, colour in zip(names, colours)]
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)


def _heat(figure: Figure, axes: Any, rows: Tensor, columns: Sequence[str], labels: list[str]) -> None:
    image = axes.imshow(rows.detach().float().cpu().tolist(), aspect="auto", cmap="viridis", interpolation="nearest")
    axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right")
    axes.set_yticks(range(len(labels)), labels)
    axes.tick_params(labelsize=8)
    figure.colorbar(image, ax=axes)


def _row(weights: Tensor, sample: int, batch: int) -> Tensor:
    if not 0 <= sample < batch:
        raise ValueError(f"sample is {sample}, expected 0 to {batch - 1}")
    return weights[sample].detach()


def _short(names: list[str]) -> list[str]:
    """Names without the leading parts that all share."""
    parts = [name.split(".") for name in names]
    while len(parts) > 1 and min(map(len, parts)) > 1 and len({part[0] for part in parts}) == 1:
        parts = [part[1:] for part in parts]
    return [".".join(part) for part in parts]
