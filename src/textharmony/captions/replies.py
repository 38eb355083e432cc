"""What a reply says besides the model's thoughts, which are never part of a caption."""

from __future__ import annotations

import re

_NAME = r"(?:seed:)?(?:think(?:ing)?|thoughts?|reasoning)"
# How thoughts begin and end: R1, Qwen, GLM and others, Cohere; Magistral; Kimi; gpt-oss; Gemma.
_THOUGHTS = (
    (rf"<\|?(?:begin_of_|start_)?{_NAME}(?:\s[^<>]*)?\|?>", rf"<\|?(?:/|end_of_|end_){_NAME}\|?>"),
    (r"\[think\]", r"\[/think\]"),
    (r"◁think▷", r"◁/think▷"),
    (r"<\|channel\|>(?:analysis|commentary)\b", r"<\|end\|>|(?=<\|start\|>)"),
    (r"<\|channel>thought\b", r"<channel\|>"),
)
_FRAMES = re.compile(r"<\|(?:start|channel)\|>\w*|<\|\w+\|>|</?answer>", re.IGNORECASE)


def spoken_text(content: object) -> str:
    """Extract the text of a reply's content, a text or a list of parts, without thoughts; "" if there is none.

    Thoughts that do not end are the rest of the text. Thoughts that only end began in the prompt.
    """
    if isinstance(content, list):
        content = "".join(map(_part_text, content))
    if not isinstance(content, str):
        return ""
    for begin, end in _THOUGHTS:
        content = re.sub(rf"{begin}.*?(?:{end}|\Z)", "", content, flags=re.DOTALL | re.IGNORECASE)
    for _, end in _THOUGHTS[:3]:
        content = re.split(end, content, flags=re.IGNORECASE)[-1]
    return _FRAMES.sub("", content).strip()


def _part_text(part: object) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict) or part.get("type") not in ("text", "output_text") or part.get("thought"):
        return ""  # a part that thinks, reasons or refuses
    return text if isinstance(text := part.get("text"), str) else ""
