"""Replies of thinking models, in the forms that their makers document."""

import pytest

from textharmony.captions.replies import spoken_text

SIGN = 'A red sign that says "SALE".'


@pytest.mark.parametrize(
    "reply",
    [
        SIGN,
        f"\n{SIGN} ",
        f"<think>It says SALE.\n\nOr <b>?</b></think>\n\n{SIGN}",  # DeepSeek R1, Qwen, GLM
        f"It says SALE.</think>{SIGN}",  # the template began the thoughts
        f"<think></think>{SIGN}",
        f"<THINKING>no</THINKING> {SIGN} <thinking>done</thinking>",
        f"<thought>a</thought>{SIGN}<reasoning>b</reasoning>",
        f"<think>a<think>b</think>c</think>{SIGN}",
        f"<think>the tag <think> begins thoughts</think>{SIGN}",
        f'<think effort="low">a</think>{SIGN}',
        f"<seed:think>a</seed:think>{SIGN}",
        f"<think>a</think><answer>{SIGN}</answer>",
        f"[THINK]a[/THINK]{SIGN}",  # Magistral
        f"◁think▷a◁/think▷{SIGN}",  # Kimi
        f"<|begin_of_thought|>a<|end_of_thought|>{SIGN}",
        f"<|START_THINKING|>a<|END_THINKING|><|START_RESPONSE|>{SIGN}<|END_RESPONSE|>",  # Cohere
        f"<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>{SIGN}<|return|>",
        f"<|channel>thought\na<channel|>{SIGN}",  # Gemma
        f"<|begin_of_box|>{SIGN}<|end_of_box|>",
        [{"type": "text", "text": SIGN}],
        [{"type": "reasoning", "text": "a"}, {"type": "output_text", "text": SIGN}],
        [{"type": "text", "text": "a", "thought": True}, {"type": "text", "text": SIGN}],
        ["A red sign ", {"type": "text", "text": 'that says "SALE".'}],
        [{"type": "text", "text": "<think>a"}, {"type": "text", "text": f"b</think>{SIGN}"}],
    ],
)
def test_what_is_said_is_kept_without_thoughts(reply: object) -> None:
    assert spoken_text(reply) == SIGN


@pytest.mark.parametrize(
    "reply",
    [
        "<think>It says SALE.",
        f"<think>{SIGN}</think>",
        f"{SIGN}</think>",
        f"[THINK]{SIGN}",
        f"◁think▷{SIGN}",
        f"<|channel|>analysis<|message|>{SIGN}",
        f"<|channel>thought\n{SIGN}",
        [{"type": "thinking", "thinking": [{"type": "text", "text": SIGN}]}],
        [{"type": "refusal", "refusal": SIGN}],
        [{"type": "text", "text": None}, 3],
        [],
        {"text": SIGN},
        None,
        7,
        "",
    ],
)
def test_a_reply_of_thoughts_alone_says_nothing(reply: object) -> None:
    assert spoken_text(reply) == ""


def test_words_of_a_sign_are_no_marks() -> None:
    caption = 'A wall says "THINK", "[sale]", "<3", "Reasoning < acting" and "a </b> c".'
    assert spoken_text(caption) == caption
