import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from closeness import assert_close
from PIL import Image
from torch import Tensor
from transformers import LlamaForCausalLM

import slidelora

Make = Callable[..., LlamaForCausalLM]


def test_panels_of_token_gates(make_model: Make, input_ids: Tensor, tmp_path: Path) -> None:
    model = make_model(experts=["text", "image", "shared"], gate="token", top_k=1)
    mask = torch.ones_like(input_ids)
    mask[1, :3] = 0
    model(input_ids, attention_mask=mask)
    figure = slidelora.plot_routing(model, tmp_path / "routing.png", sample=1)
    assert Image.open(tmp_path / "routing.png").size[0] > 600
    weights = slidelora.routing(model).weights
    layers, tokens = figure.axes[:2]
    means = np.asarray(layers.images[0].get_array())
    assert means.shape == (14, 3)
    expected = weights["model.layers.1.mlp.up_proj"][mask.bool()].mean(0)
    row = list(weights).index("model.layers.1.mlp.up_proj")
    assert_close(torch.tensor(means[row]), expected, 1e-6)
    assert [label.get_text() for label in layers.get_yticklabels()][row] == "1.mlp.up_proj"
    assert [label.get_text() for label in layers.get_xticklabels()] == ["text", "image", "shared"]
    colours = np.asarray(tokens.images[0].get_array())
    assert colours.shape[:2] == (14, 9) and (colours[:, :3] == 1).all()  # padding is white
    chosen = weights["model.layers.1.mlp.up_proj"][1, 3:, :2].argmax(-1)
    blue = colours[row, 3:, 2] > colours[row, 3:, 0]  # text is blue, image orange
    assert blue.tolist() == (chosen == 0).tolist() and len(set(blue.tolist())) == 2
    assert [text.get_text() for text in tokens.get_legend().get_texts()] == ["text", "image"]
    with pytest.raises(ValueError, match="sample is 3, expected 0 to 2"):
        slidelora.plot_routing(model, sample=3)


def test_the_token_panel_leaves_out_layers_with_other_tokens() -> None:
    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.time, self.block = torch.nn.Linear(4, 4), torch.nn.ModuleList([torch.nn.Linear(4, 4)])
            self.other = torch.nn.Linear(4, 4)

        def forward(self, x: Tensor, pooled: bool = False) -> Tensor:
            one = self.time(x[:, 0])
            return one if pooled else self.other(self.block[0](x + one[:, None]))

    model = slidelora.inject(Two(), experts=["a", "b"], gate="token", r=2)
    x = torch.randn(2, 3, 4)
    model(x)
    layers, tokens = slidelora.plot_routing(model).axes[:2]
    assert len(layers.get_yticklabels()) == 3
    assert [label.get_text() for label in tokens.get_yticklabels()] == ["block.0", "other"]
    model(x, pooled=True)
    assert [axes.get_title() for axes in slidelora.plot_routing(model).axes] == [
        "mean weight",
        "",
    ]  # the second one is the colour bar


def test_panel_of_other_gates(make_model: Make, input_ids: Tensor) -> None:
    model = make_model()
    with pytest.raises(ValueError, match="no gate ran yet"):
        slidelora.plot_routing(model)
    model(input_ids)
    heatmap = np.asarray(slidelora.plot_routing(model).axes[0].images[0].get_array())
    assert_close(torch.tensor(heatmap), slidelora.routing(model).weights, 1e-6)
    weights = torch.rand(3, 9, 3)
    with slidelora.gates(model, weights):
        model(input_ids)
    axes = slidelora.plot_routing(model, sample=2).axes[0]
    assert_close(torch.tensor(np.asarray(axes.images[0].get_array())), weights[2], 1e-6)
    assert axes.get_ylabel() == "token"


def test_only_a_plot_imports_matplotlib() -> None:
    code = (
        "import sys, torch, slidelora\n"
        "sys.modules['matplotlib.figure'] = None\n"
        "model = slidelora.inject(torch.nn.Sequential(torch.nn.Linear(2, 2)), gate='token')\n"
        "model(torch.ones(1, 1, 2))\n"
        "assert 'matplotlib' not in sys.modules\n"
        "slidelora.plot_routing(model)\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert 'ImportError: plot_routing needs matplotlib: pip install "slidelora[plot]"' in found.stderr
