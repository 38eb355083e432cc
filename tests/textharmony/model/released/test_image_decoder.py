"""The context, the image loss and the whole text path against the official code's, with its recorded noise."""

from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
from released_miniature import MINIATURE, assert_parity, golden, golden_model, miniature_tokenizer
from torch import Tensor

from textharmony.model.core import ImageFeatures
from textharmony.model.diffusion import Diffusion
from textharmony.model.released.pictures import NEVER, seeing
from textharmony.pipeline import TextHarmony


@pytest.fixture(scope="module")
def text_path() -> tuple[TextHarmony, dict[str, Tensor]]:
    file = golden("text_path")
    return golden_model(), file


def embed(model: TextHarmony, file: dict[str, Tensor]) -> tuple[Tensor, ImageFeatures]:
    with torch.no_grad():
        embeds, features, _ = model.embed(file["inputs.text_ids"], file["inputs.images"] * 2 - 1)
    assert features is not None
    return embeds, features


def test_ids_and_pictures_to_logits_and_loss(text_path: tuple[TextHarmony, dict[str, Tensor]]) -> None:
    model, file = text_path
    ids, mask = file["inputs.text_ids"], file["inputs.attention_mask"]
    embeds, features = embed(model, file)
    assert_parity(embeds, file["outputs.mm_embeds"])
    visible, columns = features.visible(), torch.arange(ids.shape[1])[:, None]
    seen = (visible.begins[:, None] <= columns) & (columns < visible.ends[:, None])
    assert torch.equal(seen.float(), file["outputs.cross_attention_mask"])
    gates = model.compute_gates(embeds, mask.bool(), ["image" if t == 0 else "text" for t in file["inputs.task_ids"]])
    assert_parity(gates, file["outputs.gate"], 1e-7)
    inputs: list[Tensor] = []
    hooks = [
        layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
        for layer in model.language.model.layers
    ]
    with torch.no_grad(), model.read_under(gates, features):
        hidden = model.hidden_states(embeds, mask)
        logits = model.language.get_output_embeddings()(hidden)
    for hook in hooks:
        hook.remove()
    for number, tensor in enumerate([*inputs, hidden]):
        assert_parity(tensor, file[f"outputs.hidden{number}"])
    assert_parity(hidden, file["outputs.last_hidden_state"])
    assert_parity(logits, file["outputs.logits"])
    # The labels that the official code makes of prompt lengths, pictures, padding and begin tokens.
    targets = file["outputs.gt_text_ids"]
    labels = torch.cat([torch.full((2, 1), -100), targets], 1)
    with torch.no_grad():
        losses = model(
            ids, mask, labels, ["image", "text"], pixel_values=file["inputs.images"] * 2 - 1, losses=("text",)
        )
    assert_parity(losses["text"], file["outputs.loss_txt"])


def test_contexts_of_drawings(text_path: tuple[TextHarmony, dict[str, Tensor]]) -> None:
    """Each picture of the file has its context: a text of its own from its begin token to its begin-of-image token."""
    file = golden("image_conditioning")
    model, _ = text_path
    places = (file["inputs.text_ids"] == model.boi_id).nonzero().tolist()
    rows = [
        file["inputs.hidden_states"][row, bos : column + 1]
        for (row, column), bos in zip(places, file["inputs.nearest_bos_idxs"].tolist(), strict=True)
    ]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    last = torch.tensor([len(row) - 1 for row in rows])
    with torch.no_grad():
        assert_parity(model.image_decoder.read_context(padded, last), file["outputs.queries"])


def test_pictures_before_drawings(text_path: tuple[TextHarmony, dict[str, Tensor]]) -> None:
    file = golden("image_conditioning")
    model, path = text_path
    _, features = embed(model, path)
    places = (file["inputs.text_ids"] == model.boi_id).nonzero().tolist()
    for number, (row, column) in enumerate(places):
        found = features.visible_before([row], [column])
        sees = bool(found.pictures.numel()) and int(found.begins) < NEVER
        assert sees == bool(file["outputs.mmfs_mask"][number])
        if sees:
            source = features.maps[3][found.pictures[0, 0]]
            assert_parity(source, file["outputs.mmfs_source_c4"][number, 0])


class Recorded:
    """A noise schedule that adds the noise of a file."""

    def __init__(self, noisy: Tensor, times: Tensor, noise: Tensor) -> None:
        self.recorded = noisy, times, noise

    def corrupt(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.recorded


def test_image_loss_with_recorded_noise(text_path: tuple[TextHarmony, dict[str, Tensor]]) -> None:
    """Ours is the mean over drawings that count; the official one counts zeros for the others."""
    file = golden("losses")
    model, path = text_path
    decoder = model.image_decoder
    assert_parity(
        decoder.diffusion.training.add_noise(file["inputs.latents"], file["inputs.noise"], file["inputs.timesteps"]),
        file["inputs.noisy"],
    )
    _, features = embed(model, path)
    places = (path["inputs.text_ids"] == model.boi_id).nonzero().tolist()
    counted = (file["inputs.image_loss_mask"] > 0) & (file["inputs.context_lengths"] > 2)
    drawings: Sequence[int] = counted.nonzero().flatten().tolist()
    kept = [
        file[f"inputs.{name}"][counted] for name in ("noisy", "timesteps", "noise", "context_after_unconditional_drop")
    ]
    before = features.visible_before([places[i][0] for i in drawings], [places[i][1] for i in drawings])
    diffusion: Diffusion = decoder.diffusion
    decoder.diffusion = Recorded(*kept[:3])  # type: ignore[assignment]
    decoder.config = SimpleNamespace(**{**vars(decoder.config), "unconditional_share": 0.0})  # type: ignore[assignment]
    decoder.read_context = lambda hidden, last: kept[3]  # type: ignore[method-assign]
    try:
        with torch.no_grad(), seeing([decoder.unet], before):
            predicted = decoder.unet(kept[0], kept[1], encoder_hidden_states=kept[3]).sample
            assert_parity(predicted, file["outputs.prediction"][counted])
            pictures = file["inputs.images_dec"][counted]
            found = decoder.loss(torch.zeros(len(drawings), 1, 64), torch.zeros(len(drawings)), pictures)["image"]
    finally:
        decoder.diffusion = diffusion
        decoder.config = model.config
        del decoder.read_context
    assert_parity(found * len(drawings) / len(counted), file["outputs.loss_img"])
    whole = file["outputs.loss_txt"] + 10 * found * len(drawings) / len(counted)
    assert_parity(whole, file["outputs.loss"])


def test_the_vae_stays_precise_and_samples_in_training() -> None:
    torch.manual_seed(0)
    decoder = TextHarmony(MINIATURE, miniature_tokenizer(), dtype=torch.bfloat16).eval().image_decoder
    assert decoder.vae.dtype == torch.float32 and decoder.unet.dtype == torch.bfloat16
    picture = torch.rand(1, 3, 64, 64)
    assert torch.equal(decoder.encode(picture), decoder.encode(picture))
    decoder.train()
    assert not torch.equal(decoder.encode(picture), decoder.encode(picture))
    assert decoder.encode(picture).dtype == torch.bfloat16
