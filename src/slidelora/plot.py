"""A figure of the routing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from slidelora.routing_state import Routing, routing

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_routing(model: nn.Module, path: str | Path | None = None, sample: int = 0) -> Figure:
    """Draw what the gates of an injected model's last forward did, and return the figure.

    Where each layer has its own gate, one panel has each expert's mean weight in each layer, over valid tokens. A
    second panel has, for one sample, the modality-specific expert with the largest weight for each token in each layer
    (more colour means more weight), without the layers that see other tokens than most. For other gates the figure has
    each expert's weight for each sample, or for each token of one sample.

    Args:
        model: An injected model, or one that holds it.
        path: Where to save the figure, in the format of the suffix; None does not save it.
        sample: The index of the sample in the batch.

    Raises:
        ImportError: Without matplotlib (pip install "slidelora[plot]").
        ValueError: Before the first forward, or if the batch does not have the sample.
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
        rows = _of_sample(weights, sample) if by_token else weights
        figure = Figure(figsize=(3 + 0.6 * len(state.names), 1.5 + 0.25 * len(rows)), layout="constrained")
        axes: Any = figure.subplots()
        _draw_heatmap(figure, axes, rows, state.names, [str(row) for row in range(len(rows))])
        axes.set(ylabel="token" if by_token else "sample", title="weight")
    else:
        shapes = [value.shape for value in weights.values() if value.ndim == 3]
        shape = max(shapes, key=shapes.count) if shapes else None
        widths = [3 + 0.5 * len(state.names), *([5 + 0.15 * shape[1]] if shape else [])]
        figure = Figure(figsize=(sum(widths), 1.5 + 0.2 * len(weights)), layout="constrained")
        panels = figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0]
        _draw_layers(figure, panels[0], state, weights)
        if shape is not None:
            same_tokens = {name: value for name, value in weights.items() if value.shape == shape}
            _draw_tokens(panels[1], state, same_tokens, sample)
    if path is not None:
        figure.savefig(path, dpi=120)
    return figure


def _draw_layers(figure: Figure, axes: Any, state: Routing, weights: dict[str, Tensor]) -> None:
    means = []
    for name, value in weights.items():
        valid = state.records[name][-1].valid
        means.append((value.flatten(0, -2) if valid is None else value[valid]).mean(0).cpu())
    _draw_heatmap(figure, axes, torch.stack(means), state.names, _without_common_prefix(list(weights)))
    axes.set_title("mean weight")


def _draw_tokens(axes: Any, state: Routing, weights: dict[str, Tensor], sample: int) -> None:
    from matplotlib import colormaps
    from matplotlib.patches import Patch

    names = state.config.specific
    palette = colormaps["tab10" if len(names) <= 10 else "turbo"]
    colours = [palette(index if len(names) <= 10 else index / len(names))[:3] for index in range(len(names))]
    columns = [state.names.index(name) for name in names]
    image = []
    for name, value in weights.items():
        largest, expert = _of_sample(value, sample)[:, columns].max(-1)  # (T,)
        valid = state.records[name][-1].valid
        strength = (largest if valid is None else largest * valid[sample]).clamp(0, 1)
        pixels = zip(strength.tolist(), expert.tolist())
        image.append([[1 - weight * (1 - channel) for channel in colours[index]] for weight, index in pixels])
    axes.imshow(image, aspect="auto", interpolation="nearest")
    labels = _without_common_prefix(list(weights)) if len(weights) < len(state.records) else []
    axes.set_yticks(range(len(image)), labels, fontsize=8)
    axes.set(xlabel="token", title=f"expert with the largest weight, sample {sample}")
    handles = [Patch(color=colour, label=name) for name, colour in zip(names, colours)]
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)


def _draw_heatmap(figure: Figure, axes: Any, rows: Tensor, columns: Sequence[str], labels: list[str]) -> None:
    image = axes.imshow(rows.detach().float().cpu().tolist(), aspect="auto", cmap="viridis", interpolation="nearest")
    axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right")
    axes.set_yticks(range(len(labels)), labels)
    axes.tick_params(labelsize=8)
    figure.colorbar(image, ax=axes)


def _of_sample(weights: Tensor, sample: int) -> Tensor:
    if not 0 <= sample < len(weights):
        raise ValueError(f"sample is {sample}, expected 0 to {len(weights) - 1}")
    return weights[sample].detach()


def _without_common_prefix(names: list[str]) -> list[str]:
    parts = [name.split(".") for name in names]
    while len(parts) > 1 and min(map(len, parts)) > 1 and len({part[0] for part in parts}) == 1:
        parts = [part[1:] for part in parts]
    return [".".join(part) for part in parts]
