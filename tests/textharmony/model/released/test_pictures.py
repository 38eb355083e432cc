"""MMFS in the language model's layers and in the UNet against the official code's."""

import pytest
import torch
from closeness import assert_close
from released_miniature import (
    MINIATURE,
    assert_parity,
    golden,
    golden_model,
    load_released,
    miniature_tokenizer,
    weights,
)
from torch import Tensor, nn
from transformers import DynamicCache

import slidelora
from textharmony.model.released.pictures import NEVER, PictureBlock, PictureLayer, Visible, attach_language, seeing
from textharmony.pipeline import TextHarmony


@pytest.fixture(scope="module")
def model() -> TextHarmony:
    torch.manual_seed(0)
    return TextHarmony(MINIATURE, miniature_tokenizer()).eval()


def as_visible(vision: Tensor, mask: Tensor, sizes: list[list[int]]) -> Visible:
    """What a mask (B, T, K) of the official code says, of features (B, K, cells, C)."""
    rows, pictures = vision.shape[:2]
    maps = [
        part.unflatten(1, size).movedim(-1, 1)
        for part, size in zip(vision.flatten(0, 1).split([h * w for h, w in sizes], 1), sizes)
    ]
    seen, columns = mask.bool(), torch.arange(mask.shape[1])[:, None]
    begins = torch.where(seen, columns, NEVER).amin(1)
    ends = torch.where(seen, columns + 1, 0).amax(1)
    ends = torch.where(ends == mask.shape[1], NEVER, ends)
    assert torch.equal((begins[:, None] <= columns) & (columns < ends[:, None]), seen)
    return Visible(maps, torch.arange(rows * pictures).view(rows, pictures), begins, ends)


def test_a_decoder_layer_is_the_official_one(model: TextHarmony) -> None:
    file = golden("llm_layer")
    load_released(model, {f"mm_decoder.layers.0.{name}": tensor for name, tensor in weights(file).items()})
    layer = model.language.model.layers[0]
    assert isinstance(layer, PictureLayer)
    hidden = file["inputs.hidden_states"].requires_grad_(True)
    vision = file["inputs.vision_hidden_states"].requires_grad_(True)
    attention = layer.pictures.attn
    layer.requires_grad_(True)  # experts freeze their host
    attention.ignore_token.requires_grad_(True)
    visible = as_visible(vision, file["inputs.cross_attention_mask"], file["outputs.spatial_shapes"][:3].tolist())
    rotary = model.language.model.rotary_emb(hidden, file["inputs.position_ids"])
    allowed = file["inputs.attention_allowed_4d"]
    with slidelora.gates(model.language, file["inputs.gate"]), seeing([layer], visible):
        found = layer(hidden, attention_mask=allowed, position_embeddings=rotary)
        attended, _ = layer.self_attn(layer.input_layernorm(hidden), rotary, allowed)
        assert_parity(attended, file["outputs.self_attn"])
        assert_parity(layer.pictures(hidden + attended, visible, 0), file["outputs.cross_attn"])
        assert_parity(found, file["outputs.y"])
    # One new token in the last column.
    last = (hidden + attended)[:, -1:]
    if len(hidden) > 1:
        assert_parity(
            layer.pictures(file["outputs.mmfs_query"][:, -1:] * 0 + last, visible, hidden.shape[1] - 1)[:, 0],
            file["outputs.cross_attn"][:, -1],
        )
    if "inputs.grad_output" not in file:
        return
    found.backward(file["inputs.grad_output"])
    assert_parity(hidden.grad, file["grads.hidden_states"], 1e-4)
    assert_parity(vision.grad, file["grads.vision_hidden_states"], 1e-4)
    own = {f"llama_cross_attn.{name}": p.grad for name, p in layer.pictures.named_parameters()}
    own["llama_cross_attn.attn.ignore_token"] = attention.ignore_token.grad
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        module = getattr(layer.self_attn, name)
        own[f"self_attn.{name}.lora_moe_A.default"] = module.lora_A.grad.unflatten(0, (3, -1)).mT
        own[f"self_attn.{name}.lora_moe_B.default"] = module.lora_B.grad.unflatten(0, (3, -1))
    expected = {name.removeprefix("grads."): grad for name, grad in file.items() if name.startswith("grads.")}
    for name, grad in expected.items():
        if name not in ("hidden_states", "vision_hidden_states"):
            assert own[name] is not None, name
            assert_parity(own[name], grad, 1e-4)


def test_slide_lora_is_the_official_one() -> None:
    """alpha / r is 2 in the file, and not applied: as if alpha were r."""
    file = golden("slide_lora")
    host = nn.Sequential(nn.Linear(24, 20, bias=False))
    experts = {"experts": ["image", "text", "shared"], "shared": ["shared"], "r": 4, "lora_alpha": 4, "gate": "given"}
    slidelora.inject(host, target_modules=["0"], **experts).eval()
    with torch.no_grad():
        host[0].base_layer.weight.copy_(file["weights.weight"])
        host[0].lora_A.copy_(file["weights.lora_moe_A.default"].mT.flatten(0, 1))
        host[0].lora_B.copy_(file["weights.lora_moe_B.default"].flatten(0, 1))
    x = file["inputs.x"].requires_grad_(True)
    with slidelora.gates(host, file["inputs.gate"]):
        found = host(x)
        assert_parity(found, file["outputs.y"])
        found.backward(file["inputs.grad_output"])
    assert_parity(x.grad, file["grads.x"], 1e-4)
    assert_parity(host[0].lora_A.grad.unflatten(0, (3, -1)).mT, file["grads.lora_moe_A.default"], 1e-4)
    assert_parity(host[0].lora_B.grad.unflatten(0, (3, -1)), file["grads.lora_moe_B.default"], 1e-4)


def test_a_block_of_the_unet_is_the_official_one() -> None:
    """The first row sees no picture, the second one does."""
    file = golden("unet_mmfs_block3")
    block = PictureBlock(16, 32, 64, 8, 4)
    block.load_state_dict(weights(file, "mmfs_module.mmfs_down_blocks.3."))
    maps = [file[f"inputs.features_c{i}"] for i in range(1, 5)]
    visible = Visible(
        [level[:, 0] for level in maps],
        torch.zeros(2, 1, dtype=torch.long),
        torch.tensor([[NEVER], [0]]),
        torch.full((2, 1), NEVER),
    )
    skip = file["outputs.skip3_in"]
    assert_parity(skip + block(skip, visible), file["outputs.skip3_out"])


def test_the_unet_and_its_skips_are_the_official_ones() -> None:
    file = golden("unet_mmfs")
    model = golden_model()
    unet, pictures = model.image_decoder.unet, model.image_decoder.pictures
    visible = Visible(
        [file[f"inputs.features_c{i}"][:, 0] for i in range(1, 5)],
        torch.arange(2)[:, None],
        torch.where(file["inputs.mmfs_mask"] > 0, 0, NEVER),
        torch.full((2, 1), NEVER),
    )
    seen: dict[str, Tensor] = {}
    for name, block in [*((f"skip{i}", block) for i, block in enumerate(pictures.down)), ("mid", pictures.mid)]:

        def keep(block: nn.Module, args: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
            seen[f"{name}_in"], seen[f"{name}_out"] = args[0], args[0] + output

        block.register_forward_hook(keep)
    read = file["inputs.latents"], file["inputs.timesteps"], file["inputs.encoder_hidden_states"]
    with torch.no_grad():
        assert_parity(unet(*read).sample, file["outputs.prediction_without_mmfs"])
        assert not seen
        with seeing([unet], visible):
            assert_parity(unet(*read).sample, file["outputs.prediction"])
    assert len(seen) == 26
    for name, tensor in seen.items():
        assert_parity(tensor, file[f"outputs.{name}"])


# Of our own


def embedded(model: TextHarmony, *rows: list[int]) -> tuple[Tensor, Tensor, object]:
    generator = torch.Generator().manual_seed(3)
    count = sum(row.count(model.boi_id) for row in rows)
    pixels = torch.rand(count, 3, 32, 32, generator=generator) * 2 - 1 if count else None
    length = max(map(len, rows))
    ids = torch.tensor([row + [97] * (length - len(row)) for row in rows])
    embeds, features, _ = model.embed(ids, pixels)
    return embeds, (ids != 97).long(), features


@pytest.fixture(scope="module")
def open_model() -> TextHarmony:
    """With random numbers where a new model has zeros."""
    torch.manual_seed(1)
    model = TextHarmony(MINIATURE, miniature_tokenizer()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.3)
    return model


IMG = [98, 99, 99, 99, 99]
GATE = torch.tensor([[0.5, 0.0, 0.5]])


@torch.no_grad()
def states(model: TextHarmony, *rows: list[int]) -> Tensor:
    embeds, mask, features = embedded(model, *rows)
    with model.read_under(GATE.expand(len(rows), -1), features):
        return model.hidden_states(embeds, mask)


def test_a_row_is_the_same_alone_and_next_to_others(open_model: TextHarmony) -> None:
    """A row without pictures, too, although no layer has a map to read when it is alone."""
    plain, with_two = [1, 7, 8, 9], [1, *IMG, 5, *IMG, 6]
    together = states(open_model, with_two, plain)
    assert_close(states(open_model, with_two)[0], together[0])
    assert_close(states(open_model, plain)[0], together[1, : len(plain)])


def test_generated_tokens_see_what_the_prompt_saw(open_model: TextHarmony) -> None:
    row = [1, *IMG, 5, 6, 7]
    embeds, mask, features = embedded(open_model, row)
    with torch.no_grad(), open_model.read_under(GATE, features):
        whole = open_model.hidden_states(embeds, mask)
        cache = DynamicCache()
        stack = open_model.language.model
        first = stack(inputs_embeds=embeds[:, :7], attention_mask=mask[:, :7], past_key_values=cache, use_cache=True)
        found = [first.last_hidden_state]
        for end in range(8, len(row) + 1):
            step = stack(inputs_embeds=embeds[:, end - 1 : end], attention_mask=mask[:, :end], past_key_values=cache)
            found.append(step.last_hidden_state)
    assert_close(torch.cat(found, 1), whole)


def test_beams_see_the_pictures_of_their_row(open_model: TextHarmony) -> None:
    embeds, mask, features = embedded(open_model, [1, *IMG, 5], [1, 7, 8, 9, 10, 11, 12])
    with torch.no_grad():
        with open_model.read_under(GATE.expand(2, -1), features):
            expected = open_model.hidden_states(embeds, mask)
        with open_model.read_under(GATE.expand(2, -1), features, repeats=3):
            found = open_model.hidden_states(embeds.repeat_interleave(3, 0), mask.repeat_interleave(3, 0))
        assert_close(found, expected.repeat_interleave(3, 0))
        with pytest.raises(ValueError, match="got 6 rows, expected 2"), open_model.read_under(None, features):
            open_model.hidden_states(embeds.repeat_interleave(3, 0), mask.repeat_interleave(3, 0))


def test_recomputed_layers_see_pictures_after_the_context_ended(open_model: TextHarmony) -> None:
    model, grads = open_model.train(), []
    for recompute in (False, True):
        model.zero_grad()
        if recompute:
            model.language.gradient_checkpointing_enable(slidelora.checkpoint_kwargs(model.language))
            model.image_decoder.unet.enable_gradient_checkpointing()
        torch.manual_seed(0)
        embeds, mask, features = embedded(model, [1, *IMG, 5, 98, 99, 99, 99, 99])
        with model.read_under(GATE, features):
            hidden = model.hidden_states(embeds, mask)
        with model.draw_under(features, [0], torch.tensor([7])):
            drawn = model.image_decoder.unet(torch.ones(1, 4, 8, 8), 5, hidden[:, :7, :32]).sample
        (hidden.sum() + drawn.square().sum()).backward()
        grads.append(
            {name: p.grad for name, p in model.named_parameters() if p.grad is not None and ".pictures" in name}
        )
    model.language.gradient_checkpointing_disable()
    model.image_decoder.unet.disable_gradient_checkpointing()
    model.zero_grad()
    model.eval()
    plain, recomputed = grads
    assert plain.keys() == recomputed.keys() and len(plain) > 100
    for name, grad in plain.items():
        assert_close(recomputed[name], grad, 1e-4)


def test_a_drawing_sees_the_picture_just_before_it_in_its_text(open_model: TextHarmony) -> None:
    rows = [[1, *IMG, 5, *IMG, 6, 98], [1, *IMG, 2, 1, 5, 98], [1, 7, 98]]
    length = max(map(len, rows))
    ids = torch.tensor([row + [97] * (length - len(row)) for row in rows])
    with torch.no_grad():
        features = open_model.embed(ids, torch.zeros(3, 3, 32, 32))[1]
    assert features is not None
    found = features.visible_before([0, 1, 2], [len(row) - 1 for row in rows])
    assert found.pictures[0].tolist() == [1] and found.begins[0].tolist() == [8]
    assert (found.begins[1:] == NEVER).all()  # the picture of the second row is in another text
    assert features.visible_before([0], [7]).pictures.tolist() == [[0]]  # the first picture precedes the second one
    assert features.visible_before([2], [2]).pictures.shape == (1, 0)


def test_another_language_model_is_refused() -> None:
    with pytest.raises(ValueError, match="the language model is Linear, expected a Llama without tied embeddings"):
        attach_language(nn.Linear(2, 2), 32, 16, 4, 2)
