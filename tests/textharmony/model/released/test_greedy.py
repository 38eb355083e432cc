"""Greedy generation, with a cache and in a batch, against one row at a time that is computed again for each token."""

import pytest
import torch
from closeness import assert_close
from released_miniature import golden_model, random_miniature
from torch import Tensor

from textharmony.config import GenerationSettings
from textharmony.model.generation import prompt, write
from textharmony.pipeline import TextHarmony

PICTURE = [98, 99, 99, 99, 99]
ROWS = [[1, *PICTURE, 7, 1, 8, *PICTURE, 5, 6, 20], [1, 30, *PICTURE, 31]]  # the first row begins a second text
ENDS, PAD = (2, 98), 97  # an answer ends at the end token, or at the begin-of-image token
STEPS = 8


@pytest.fixture(scope="module", params=[random_miniature, golden_model])
def model(request: pytest.FixtureRequest) -> TextHarmony:
    return request.param().double()


def logits_one_by_one(model: TextHarmony, row: list[int], pixels: Tensor, modality: str, seen: bool) -> Tensor:
    """Choose tokens without a cache, until the text ends; return the logits (steps, V) that chose them.

    New tokens see the pictures that the prompt's last token sees: a begin token among them changes nothing.
    """
    expert = {"text": [0.0, 0.5, 0.5], "image": [0.5, 0.0, 0.5]}[modality]
    embeds, features, _ = model.embed(torch.tensor([row]), pixels)
    words, head = model.language.get_input_embeddings(), model.language.get_output_embeddings()
    found: list[Tensor] = []
    chosen = -1
    with model.read_under(torch.tensor([expert]).double(), features if seen else None):
        while len(found) < STEPS and chosen not in ENDS:
            hidden = model.hidden_states(embeds, torch.ones(embeds.shape[:2], dtype=torch.long))
            found.append(head(hidden[0, -1]))
            chosen = int(found[-1].argmax())
            embeds = torch.cat([embeds, words(torch.tensor([[chosen]]))], 1)
    return torch.stack(found)


@torch.no_grad()
@pytest.mark.parametrize("modality", ["text", "image"])
def test_greedy_generation_is_the_argmax_of_every_step(model: TextHarmony, modality: str) -> None:
    pixels = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
    steps: list[Tensor] = []
    head = model.language.get_output_embeddings()
    hook = head.register_forward_hook(lambda module, args, logits: steps.append(logits[:, -1]))
    # `prompt` pads text on the left; its gates are those of the modality that is written, here of both.
    prompted = prompt(model, ROWS, pixels, "text")
    prompted = prompted._replace(gates=prompt(model, ROWS, pixels, modality).gates)
    written = write(model, prompted, GenerationSettings(max_new_tokens=STEPS))
    hook.remove()
    for i, (row, own) in enumerate(zip(ROWS, (pixels[:2], pixels[2:]), strict=True)):
        expected = logits_one_by_one(model, row, own, modality, seen=True)
        found = torch.stack([step[i] for step in steps])[: len(expected)]
        assert_close(found, expected, 1e-9)
        assert written[i].tolist()[: len(expected)] == expected.argmax(-1).tolist()
        assert (written[i, len(expected) :] == PAD).all()
        blind = logits_one_by_one(model, row, own, modality, seen=False)
        assert (blind[0] - expected[0]).norm() > 1e-3 * expected[0].norm()
