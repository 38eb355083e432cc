"""The tiny model's tokenizer, the special tokens, and the prompts."""

from __future__ import annotations

import re
import string
from enum import Enum

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

BOI = "<|beginofimage|>"
IMAGE = "<|image|>"
SPECIALS = ("<pad>", "<s>", "</s>", "<unk>", BOI, IMAGE)

# The released prompts (bytedance/TextHarmony). Text answers end in </s>, drawings begin with BOI.
TEXT_PROMPT = "Based on the image, please answer the question. {image}{question} The answer is: "
GENERATION_PROMPT = "Generate an image according to the caption. {caption}"
EDITING_PROMPT = "{image}{question}"
READ_QUESTION = "read all the text"
LOCATE_QUESTION = 'where is "{text}"'
FILL_QUESTION = 'Fill the masked part in this image with "{text}"'


class Task(str, Enum):
    """What a sample asks for; it decides prompt, loss and target modality."""

    GENERATION = "generation"
    EDITING = "editing"
    COMPREHENSION = "comprehension"
    PERCEPTION = "perception"

    @property
    def modality(self) -> str:
        """The modality of the output, "image" or "text"."""
        return "image" if self in (Task.GENERATION, Task.EDITING) else "text"


_WORDS = re.findall(
    r"[A-Za-z]+",
    """Based on the image please answer question The is Generate an according to caption Fill masked part in this
    with read all text where what color ground character how many characters are there sign word a
    black white red green blue yellow orange purple""",
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A character tokenizer whose instruction words, with or without a leading space, are single tokens."""
    words = [prefix + word for word in dict.fromkeys(_WORDS) if len(word) > 1 for prefix in ("", " ")]
    characters = [c for c in string.printable if c not in string.whitespace or c in " \n"]
    vocab = {token: i for i, token in enumerate(dict.fromkeys([*SPECIALS, *characters, " a", *words]))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    longest_first = "|".join(sorted((w for w in dict.fromkeys(_WORDS)), key=len, reverse=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(rf" ?\b(?:{longest_first})\b|[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=[BOI, IMAGE],
        clean_up_tokenization_spaces=False,
    )


def compose(task: Task, prompt: str, visual_tokens: int, bos: str) -> str:
    """The whole prompt of a task, up to where the answer (or BOI, for a picture) follows.

    bos: the token that texts begin with, "" for a tokenizer without. Raises ValueError for a prompt with a picture's
    tokens in it.
    """
    check_plain(prompt)
    image = picture_tokens(visual_tokens)
    if task is Task.GENERATION:
        return bos + GENERATION_PROMPT.format(caption=prompt)
    if task is Task.EDITING:
        return bos + EDITING_PROMPT.format(image=image, question=prompt)
    return bos + TEXT_PROMPT.format(image=image, question=prompt)


def picture_tokens(visual_tokens: int) -> str:
    """What stands for a picture in a prompt."""
    return BOI + IMAGE * visual_tokens


def check_plain(text: str) -> None:
    """Raises ValueError for text with a picture's tokens in it."""
    if BOI in text or IMAGE in text:
        raise ValueError(f"{text!r} holds {BOI} or {IMAGE}, expected text: pictures are given beside it")
