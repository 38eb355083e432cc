"""A Llava of 26 thousand weights that memorises a caption for each of two images, in the layout of transformers."""

import string
from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

SIGNS = {"red": 'red "HI"', "blue": 'blue "Hi"'}
TURNS = [("system", "s"), ("user", '["HI"]')]
_TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {% for c in m.content %}{% if c.type == 'image' %}<image>"
    "{% else %}{{ c.text }}\n{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
_TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
_LANGUAGE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


def sign(color: str) -> Image.Image:
    return Image.new("RGB", (40, 20), color)


def write(folder: Path) -> None:
    """Train the model and save it, in about a second."""
    specials = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
    vocab = {token: i for i, token in enumerate([*specials, *string.printable])}
    characters = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    characters.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=characters,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_TEMPLATE,
    )
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", "image_size": 16, "patch_size": 8, **_TOWER},
        text_config={"model_type": "llama", "vocab_size": len(tokenizer), "eos_token_id": 2, **_LANGUAGE},
        image_token_index=vocab["<image>"],
        vision_feature_layer=-1,
    )
    model = LlavaForConditionalGeneration(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    batches = []
    for color, caption in SIGNS.items():
        asked = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in TURNS]
        asked[1]["content"].insert(0, {"type": "image"})
        prompt = processor.apply_chat_template(asked, add_generation_prompt=True)
        batch = processor(images=sign(color), text=prompt + caption + "</s>", return_tensors="pt")
        ids = batch["input_ids"]
        labels = ids.masked_fill(torch.arange(ids.shape[1]) < ids.shape[1] - len(caption) - 1, -100)
        batches.append(batch | {"labels": labels})
    for _ in range(1000):
        loss = 0.0
        for batch in batches:
            half = model(**batch).loss
            half.backward()
            loss += half.item()
        optimizer.step()
        optimizer.zero_grad()
        if loss < 0.1:
            break
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 2, 0
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
