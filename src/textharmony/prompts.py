"""What is asked of the model: the tasks, requests of users, the prompts, and the special tokens of pictures."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING

from textharmony.boxes import Box, check_box
from textharmony.captioning import write_caption
from textharmony.config import LayoutConfig, check_seed
from textharmony.files import quote

if TYPE_CHECKING:
    from textharmony.images import Picture

BOI = "<|beginofimage|>"
IMAGE = "<|image|>"

# The released prompts (bytedance/TextHarmony). A text answer ends in the end-of-text token, a drawing begins with BOI.
TEXT_PROMPT = "Based on the image, please answer the question. {image}{question} The answer is: "
DRAW_PROMPT = "Generate an image according to the caption. {caption}"
EDIT_PROMPT = "{image}{question}"
_LONGEST_TOKEN = 64  # characters; few tokens have more than 20
READ_QUESTION = "read all the text"
LOCATE_QUESTION = 'where is "{text}"'
FILL_QUESTION = 'Fill the masked part in this image with "{text}"'


class Task(str, Enum):
    """What is asked of the model."""

    READ = "read"  # all the text in a picture
    ANSWER = "answer"  # a question about a picture
    LOCATE = "locate"  # the box of a word in a picture
    DRAW = "draw"  # a picture of a caption
    EDIT = "edit"  # a picture whose box is filled with a new text

    @classmethod
    def _missing_(cls, value: object) -> None:
        raise ValueError(f"task is {quote(value)}, expected one of {', '.join(cls)}")

    @property
    def modality(self) -> str:
        """The modality of the output: "text" or "image"."""
        return "image" if self in (Task.DRAW, Task.EDIT) else "text"

    @property
    def paper_class(self) -> str:
        """The paper's class of the task: "perception", "comprehension", "generation" or "editing"."""
        return _PAPER_CLASSES[self]


_PAPER_CLASSES = {
    Task.READ: "perception",
    Task.LOCATE: "perception",
    Task.ANSWER: "comprehension",
    Task.DRAW: "generation",
    Task.EDIT: "editing",
}


@dataclass(frozen=True, eq=False)
class Request:
    """One thing that a user asks for."""

    task: Task
    prompt: str = ""  # to read: the question, "" for the usual one; the question, word, caption, or text to fill in
    image: Picture | None = None  # for all tasks but drawing
    box: Box | None = None  # of an edit, in thousandths of the picture
    seed: int = 0  # of a drawing or an edit

    def __post_init__(self) -> None:
        object.__setattr__(self, "task", Task(self.task))  # "draw" is Task.DRAW

    def completed(self, layout: LayoutConfig | None) -> Request:
        """Check the request and write its prompt out as the whole question, caption or instruction.

        Args:
            layout: Of a model that plans layouts, which draws one quoted word of certain characters.

        Raises:
            ValueError: Something is missing or superfluous, or the model cannot draw the text.
        """
        if not isinstance(self.prompt, str):
            raise ValueError(f"prompt is {quote(self.prompt)}, expected text")
        if (self.image is None) != (self.task is Task.DRAW):
            wanted = "none" if self.task is Task.DRAW else "a picture"
            raise ValueError(f"a request to {self.task.value} has image {quote(self.image)}, expected {wanted}")
        if self.box is not None and self.task is not Task.EDIT:
            raise ValueError(f"a request to {self.task.value} has box {quote(self.box)}, expected none")
        check_plain(self.prompt)
        object.__setattr__(self, "seed", check_seed(self.seed))
        if self.task is Task.READ:
            return replace(self, prompt=self.prompt or READ_QUESTION)
        if self.task is Task.LOCATE:
            if not self.prompt.strip():
                raise ValueError(f"cannot locate {quote(self.prompt)}, expected a word")
            return replace(self, prompt=LOCATE_QUESTION.format(text=self.prompt))
        if self.task is Task.ANSWER:
            if not self.prompt.strip():
                raise ValueError(f"cannot answer {quote(self.prompt)}, expected a question")
            return self
        caption = write_caption(self.prompt, layout)
        if self.task is Task.DRAW:
            return replace(self, prompt=caption)
        word, rest = caption.split('"')[1:] if caption.count('"') == 2 and caption[0] == '"' else (caption, "")
        return replace(self, prompt=FILL_QUESTION.format(text=word) + rest, box=check_box(self.box))


def compose(task: Task, prompt: str, visual_tokens: int, bos: str, released: bool = False) -> str:
    """Compose the whole prompt of a task, up to where the answer (BOI for a drawing) follows.

    Args:
        task: What is asked.
        prompt: The question, the caption or the instruction.
        visual_tokens: How many tokens stand for a picture.
        bos: The token that texts begin with; "" for a tokenizer without one.
        released: Whether the model is the released one: a black picture comes before a caption, a full stop ends an
            instruction, and blanks before a picture and at the end go, as its tokenizer drops them.

    Raises:
        ValueError: The prompt holds a picture's special tokens.
    """
    check_plain(prompt)
    image = image_tokens(visual_tokens)
    if task is Task.DRAW:
        text = (image if released else "") + DRAW_PROMPT.format(caption=prompt)
    elif task is Task.EDIT:
        text = EDIT_PROMPT.format(image=image, question=prompt)
        text += "." if released and not prompt.endswith(".") else ""
    else:
        text = TEXT_PROMPT.format(image=image, question=prompt)
    return bos + (text.replace(f" {BOI}", BOI).rstrip() if released else text)


def quoted_text(text: str) -> str:
    """A text to fill in, in double quotes, within which nothing is taken for a colour or an instruction."""
    return text if '"' in text else f'"{text}"'


def sought_text(question: str) -> str:
    """The text that a LOCATE_QUESTION asks for."""
    before, after = LOCATE_QUESTION.split("{text}")
    return question.removeprefix(before).removesuffix(after)


def image_tokens(visual_tokens: int) -> str:
    """The tokens that stand for a picture in a prompt."""
    return BOI + IMAGE * visual_tokens


def check_length(text: str, tokens: int | None) -> None:
    """Raise ValueError, without a look at it, for a text that cannot have as few as `tokens` tokens; None: no limit."""
    if tokens is not None and len(text) > _LONGEST_TOKEN * tokens:
        raise ValueError(f"{quote(text)} is too long, expected at most {tokens} tokens")


def check_plain(text: str) -> None:
    """Raise ValueError for a text that holds a picture's special tokens."""
    if BOI in text or IMAGE in text:
        raise ValueError(f"{quote(text)} holds {BOI} or {IMAGE}, expected plain text: pass pictures as pictures")
