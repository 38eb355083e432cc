"""How people word captions and questions: patterns for the renderer, some of which are held out for evaluation.

In a pattern, "(a|b)" is a choice. {word} is the text, {ink} and {ground} are colours.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

CANNOT_TELL = "I cannot tell"
NO_BOX = "none"  # where a word to locate is absent

# What a caption names: nothing, the ink, the ground, or both.
CAPTIONS: dict[str, tuple[str, ...]] = {
    "": (
        '"{word}"',
        'the (word|text) "{word}"',
        "(a|one) (sign|label|poster|banner|card|sticker|board|plate) (that says|saying|which says|reading|with) "
        '"{word}"',
        '(write|draw|print|paint|show) "{word}"',
        '(write|draw|print|paint) (the word|the text|a sign that says|a label with) "{word}"',
        '(please|can you|i want you to) (write|draw|make) "{word}"',
        '(make|create|give me) (a|an) (image|picture|sign|logo) (that says|of|with the word) "{word}"',
        '(i want|i need|i would like) (a sign|a picture|an image) (with|that says) "{word}"',
        '"{word}" (in big letters|in large letters|in small letters|as text|on a sign|in a picture)',
        'text: "{word}"',
        '(lettering|letters|writing|inscription|title) "{word}"',
        '(a photo|a picture|an image|a drawing) of (the word|the text|a sign that reads) "{word}"',
    ),
    "ink": (
        '"{word}" in {ink}',
        '"{word}" in {ink} (letters|text|ink|paint|type)',
        '{ink} "{word}"',
        'the (word|text) "{word}" in {ink}',
        'the (word|text) "{word}" (written|painted|printed|drawn) in {ink}',
        '(write|draw|print|paint) "{word}" in {ink}',
        '(write|draw|print|paint) (the word|the text) "{word}" (in|using) {ink}( letters|)',
        '(please|can you) (write|draw) "{word}" in {ink}',
        '(a|one) (sign|label|poster|banner|card) (that says|saying|which says|with) "{word}" in {ink}( letters|)',
        '(make|create) (a|an) (image|picture|sign) (that says|with the word) "{word}" in {ink}',
        '{ink} (letters|text|lettering|writing) (that says|saying|spelling|that spell) "{word}"',
        '(a|the) {ink} (word|text) "{word}"',
        '"{word}", {ink}( letters| text|)',
        'text "{word}", color {ink}',
        '"{word}" with {ink} (letters|text)',
        '(i want|i need|i would like) "{word}" in {ink}',
        'the letters "{word}" colored {ink}',
        '(a photo|a picture|an image) of "{word}" in {ink}',
    ),
    "ground": (
        '"{word}" on {ground}',
        '"{word}" on (a|an) {ground} (ground|background|wall|board|sign|card|surface)',
        "(a|an) {ground} (sign|label|poster|banner|card|board|plate) (that says|saying|which says|reading|with) "
        '"{word}"',
        '(a|an) {ground} (sign|label|board) with the (word|text) "{word}"',
        'the (word|text) "{word}" on {ground}',
        'the (word|text) "{word}" on (a|an) {ground} (ground|background)',
        '(write|draw|print|paint) "{word}" on {ground}',
        '(make|create) (a|an) {ground} (sign|label|card) (that says|with) "{word}"',
        '"{word}", {ground} background',
        '{ground} background, "{word}"',
        '(a picture|an image) with (a|an) {ground} background and the (word|text) "{word}"',
        '(please|can you) (write|draw) "{word}" on {ground}',
    ),
    "both": (
        '"{word}" in {ink} on {ground}',
        '"{word}" in {ink} (letters|text|ink) on {ground}',
        '"{word}" in {ink} on (a|an) {ground} (ground|background|wall|board|sign|card|surface)',
        'the (word|text) "{word}" in {ink} on {ground}',
        'the word "{word}" in {ink} on (a|an) {ground} (ground|background)',
        '(a|an) {ground} sign with the text "{word}" in {ink}',
        '(a|an) {ground} (sign|label|poster|banner|card|board) (that says|saying|with|which says) "{word}" in {ink}'
        "( letters|)",
        '{ink} "{word}" on {ground}',
        '{ink} (letters|text|lettering|writing) "{word}" on (a|an|) {ground} (ground|background|)',
        '{ink} on {ground}: "{word}"',
        '"{word}" {ink} on {ground}',
        '"{word}", {ink} on {ground}',
        '"{word}" ({ink} on {ground})',
        '(write|draw|print|paint) "{word}" in {ink} on {ground}',
        '(write|draw|paint) "{word}" in {ink} on (a|an) {ground} (background|ground|wall)',
        '(please|can you) (write|draw) "{word}" in {ink} on {ground}',
        '(make|create) (a|an) {ground} sign that says "{word}" in {ink}',
        'text "{word}", color {ink}, background {ground}',
        '"{word}" with {ink} (letters|text) on (a|an) {ground} background',
        '{ground} background, {ink} (text|letters) "{word}"',
        '(i want|i need|i would like) "{word}" in {ink} on {ground}',
        '(a photo|a picture|an image) of "{word}" in {ink} on {ground}',
        '{ink} (word|text) "{word}" on (a|an) {ground} (card|sign|label|poster)',
    ),
}
HELD_OUT_CAPTIONS: dict[str, tuple[str, ...]] = {
    "": (
        'an image with the text "{word}"',
        'please make a picture that says "{word}"',
        'i would like the word "{word}"',
        'show me "{word}"',
    ),
    "ink": (
        'paint the letters "{word}" in {ink}',
        'a picture with {ink} text "{word}"',
        'can you make a sign that says "{word}" in {ink} letters',
        'the text "{word}" using {ink} ink',
    ),
    "ground": (
        'i want a {ground} sign that says "{word}"',
        'print the word "{word}" on a {ground} card',
        'an image of "{word}" on a {ground} background',
    ),
    "both": (
        'create a picture of the word "{word}" in {ink} on a {ground} background',
        'a {ground} poster, "{word}" in {ink} letters',
        '{ink} letters that spell "{word}" on {ground}',
        'please paint "{word}" in {ink} on a {ground} board',
        'a sign with {ink} text "{word}" on a {ground} ground',
    ),
}

_IT = "(the (word|text|sign|picture|image)|it|this)"
_IN = "(|in the (word|text|picture|image)|in (it|this|this word|this picture)|here)"
# What is asked, and how. {nth} is "first", "2nd", "third" or the like, {n} a number, {letter} a character.
QUESTIONS: dict[str, tuple[str, ...]] = {
    "position": (
        "what is character {n}",
        f"(what|which) (is|) (the|) {{nth}} (character|letter|symbol) {_IN}",
        f"(what|which) (character|letter|symbol) is {{nth}} {_IN}",
        f"(name|give me|tell me|read|say) the {{nth}} (character|letter|symbol) {_IN}",
        "(which|what) (character|letter) (is at|is in|stands at|comes at) position {n}",
        "character (number|) {n}",
        "letter (number|) {n}",
        f"(what is|tell me) character (number|no) {{n}} {_IN}",
        "the {nth} (character|letter|symbol)",
        "(which|what) (character|letter|symbol) (comes|stands|appears) {nth}",
        "(could you|can you|) (find|read|show me|spell) the {nth} (letter|character|symbol)",
        "(i need|i want) the {nth} (character|letter|symbol)",
        "(which|what) (letter|character|symbol) do you see at (position|place|number) {n}",
        "(what is|tell me|give me|name|read) the (character|letter|symbol) (at|in|on) (position|place|number) {n}",
        "the (character|letter|symbol) (in|at) (position|place) {n}",
        "at (place|number) {n} (stands|comes) (what|which) (letter|symbol)",
        f"(what|which) (character|letter|symbol) does {_IT} have at (position|place) {{n}}",
        "(position|place) {n}",
    ),
    "count": (
        "how many characters are there",
        f"how many (characters|letters|symbols) (are there|are|do you see|can you see|do you count) {_IN}",
        f"how many (characters|letters|symbols) does {_IT} have",
        "how many (characters|letters|symbols)",
        f"(count|please count) the (characters|letters|symbols) {_IN}",
        f"(what is the|tell me the) (number|count) of (characters|letters|symbols) {_IN}",
        f"how long is {_IT}",
        "(what is the length|the length) of (the word|the text|it)",
        f"of how many (characters|letters) is {_IT} made",
        "(what|how large|how big) is the (number|count) of (characters|letters|symbols)",
        f"how many (characters|letters|symbols) (is|has|contains) {_IT}",
        "(tell me|say|give me) how many (letters|symbols|characters) (there are|you see|it has|are there)",
        f"how many (letters|characters|symbols) long is {_IT}",
        "(the|what is the|give me the) (letter|character|symbol) count",
        "the (word|text|sign|picture|image) (has|contains|consists of) how many (letters|characters|symbols)",
        "how many (letters|characters|symbols) (can|do) you (read|find|make out)",
        "(how many|number of) (letters|characters|symbols) in (the|this) (word|text)",
        f"(what|which) length (has|does) {_IT} (|have)",
        "(can you|could you) count the (letters|characters|symbols)",
        "how many (letters|characters|symbols) (make up|form|are used for|spell) (the|this) (word|text)",
    ),
    "ink": (
        "what color is the text",
        "(what|which) (color|colour) (is|are|has|have) the (text|word|letters|writing|ink|characters)",
        "(in|) (what|which) (color|colour) is the (text|word) (written|printed|painted|)",
        "(what is|tell me|name) the (color|colour) of the (text|word|letters|writing|ink|characters)",
        "(color|colour) of the (text|word|letters|ink)",
        "(which|what) (color|colour) do the letters have",
        "(which|what) (color|colour) was used for the (text|word|letters)",
        "(what|which) (color|colour) (are|were) the (letters|characters) (written|printed|painted|drawn|) in",
        "(what|which) (color|colour) of (ink|paint) (is this|is it|do you see|was used)",
        "(say|give me|describe|find) the (color|colour) of the (text|word|letters|ink)",
        "the (text|word|ink|writing) (is|has) (what|which) (color|colour)",
        "(text|word|letter|ink|font) (color|colour)",
        "(what|which|tell me what) is the (text|ink|letter|font) (color|colour)",
        "(tell me|say) (in|) (what|which) (color|colour) the (text|word) is( written|)",
        "(which|what) (color|colour) did (they|someone) (write|print|paint) (it|the word|the text) in",
        "(what|which) (color|colour) (do|are) the (characters|letters) (have|)",
        "the (text|word) was (written|printed) in (what|which) (color|colour)",
        "(what|which) (color|colour) (is|are) (it|they) (written|printed) in",
        "(describe|what about) the (color|colour) of the (ink|font|letters)",
    ),
    "ground": (
        "what color is the ground",
        "(what|which) (color|colour) (is|has) the (ground|background)",
        "(what is|tell me|name) the (color|colour) of the (ground|background)",
        "(color|colour) of the (ground|background)",
        "(which|what) (color|colour) is (behind|around|under) the (text|word|letters)",
        "on (what|which) (color|colour) is the (text|word) (written|printed|painted|)",
        "(which|what) background (color|colour) (is there|do you see|does it have)",
        "(what|which) (color|colour) do you see (around|under|beneath) the (text|word|letters)",
        "the (ground|background) is (what|which) (color|colour)",
        "(the|) (ground|background) (color|colour)",
        "(what|which) is the (ground|background) (color|colour)",
        "(name|describe|say|give me|find) the (ground|background) (color|colour)",
        "the (word|text) (stands|is|was written) on (what|which) (color|colour)",
        "(what|which) (color|colour) (is|has) the (wall|sign|paper|surface|board|picture)"
        "( behind it| behind the word|)",
        "(in|) (what|which) (color|colour) is the (ground|background) (painted|printed|)",
        "(tell me|say) (what|which) (color|colour) the (ground|background|paper) (is|has)",
        "(what|which) (color|colour) (is|lies) (behind|under|around) (it|the writing|the characters)",
        "the (color|colour) (behind|under|around) the (text|word|letters)",
        "(what|which) (color|colour) did (they|someone) (write|print|paint) (it|the word) on",
    ),
    "text": (
        f"what does {_IT} say",
        "what is (written|printed|the text|the word)( here| there| in the picture|)",
        "(what|which) (word|text) (is this|is it|do you see|can you see|is there|is written|is shown)",
        f"(read|please read|can you read) {_IT}",
        "(read|spell) (the|) (text|word|letters)( in the picture| here|)",
        f"what (text|word|writing) is {_IN}",
        "(read|say) (it|this)( aloud| out loud| to me|)",
        "what (can|do) you read( here| there| in the picture|)",
        "what do you see written( here| there|)",
        "(write down|type|transcribe|copy|repeat) (the|this) (text|word|writing)",
        "(give me|show me|say|find) the (word|text|writing)( you see| you read|)",
        "(what|which) (letters|characters) (do you see|are there|are written|are shown|can you read)",
        "(what is|read) the (text|word|writing) (in|on) (the picture|the sign|it|this|the image)",
        "(tell me|say|find out) what (it says|the sign says|the text is|the word is|stands there)",
        "what did (they|someone) write( here| there|)",
        "(which|what) words (do you see|are there|can you read|are written)",
        "what does (the sign|the label|the word|the writing|it) read",
        "how does (the text|the word|it) (read|go)",
        "(can|could) you (tell me|say|repeat|spell) (the text|the word|what it says)",
        "(spell|spell out) (it|the word|this|the text)",
        "what (stands|is|was) (here|there|written)( in letters|)",
    ),
    "says": (
        f'does {_IT} say ("{{word}}"|{{word}})',
        f'(is|) the (word|text) ("{{word}}"|{{word}}) {_IN}',
        f'is there ("{{word}}"|the word "{{word}}"|a word "{{word}}") {_IN}',
        'is it "{word}"',
        f'can you (see|read|find) "{{word}}" {_IN}',
        f'does "{{word}}" (appear|occur|stand) {_IN}',
        'is "{word}" (written|printed|shown) (here|there|in the picture|)',
        'does (the text|the word|the sign|the label) read "{word}"',
        'is "{word}" what (it says|is written|you see|you read)',
        '(is|was) "{word}" the (word|text)( in the picture| here|)',
        f'does {_IT} (show|have|contain|spell) (the word|the text|) "{{word}}"',
        'is (the word|the text) (here|) "{word}"',
        '(it|the text|the sign|the word) (says|is|reads) "{word}", (right|yes or no|is that so)',
        'do you (see|read|find) "{word}" (here|there)',
        'is this the (word|text) "{word}"',
        'is "{word}" (here|there|right|correct)',
        'am i right that it (says|reads|is) "{word}"',
        'do the (letters|characters) (spell|say) "{word}"',
        '(could|can) (it|this) be "{word}"',
        '(did they|did someone) write "{word}"',
    ),
    "any": (
        f"is there (any|some|) (text|writing|word) {_IN}",
        "(do you see|can you see|can you read) (any|some) (text|writing|letters)",
        f"does {_IT} (have|contain|show) (any|some|) (text|writing|letters)",
        f"are there (any|some|) (letters|words|characters) {_IN}",
        "is (anything|something) (written|printed)( here| there| in the picture|)",
        "(do|can) you (find|read|see) (anything|something)( written|)( here| there|)",
        "are there (words|letters|characters|symbols)( here| there| in the picture|)",
        f"does {_IT} (have|contain|show) (words|a word|letters|characters)",
        "is (a word|some text|writing) (written|there|here|visible)",
        "can you (see|read|find) (a word|words|text|writing)( here|)",
        "(text|writing|letters) here, (yes or no|is there any)",
        "is there (anything|something) (to read|written)( here| in the picture|)",
        f"(has|had) {_IT} (any|some|) (text|writing|letters) (in it|)",
        "did (they|someone) write (anything|something)( here|)",
    ),
    "letter": (
        f'is there (a|an|the letter|a letter|the character) ("{{letter}}"|{{letter}}) {_IN}',
        f'does {_IT} (contain|have|include) (a|an|the letter|the character) ("{{letter}}"|{{letter}})',
        f'is the (letter|character) "{{letter}}" {_IN}',
        'does (it|the word|the text) (use|show) (the letter|the character|a|an) ("{letter}"|{letter})',
        'do you (see|find|read) (a|an|the letter|the character) ("{letter}"|{letter})( here| in it| in the word|)',
        'is "{letter}" (in it|in the word|in the text|there|here|used)',
        'is ("{letter}"|{letter}) one of the (letters|characters|symbols)',
        'can you (find|read) (a|an|the letter|the character) "{letter}"',
        'does (the letter|a|an) "{letter}" (occur|appear) (in it|in the word|in the text)',
        'is (a|an|the letter) ("{letter}"|{letter}) (part of|in) (it|the word|the text)',
        '(has|had) (it|the word|the text) (a|an|the letter) "{letter}"',
    ),
    "other": (
        "who (made|painted|wrote|took|owns|designed) (this|it|the picture|the sign)",
        "(what|how) is the weather( today| like|)",
        "(where|when) was (this|it|the picture) (taken|made|painted)",
        "(is|are) there (a|any|some) (dog|cat|person|car|tree|house|people|animals|flowers|bird|face) "
        "(here|there|in the picture|)",
        "how (old|much|heavy|tall|big|expensive) is (it|this|the (man|woman|house|car|tree))",
        "what (time|day|year|month) is it",
        "what (animal|person|city|country|food|brand|car) is (this|it|shown|in the picture)",
        "why is (it|this|the sign) (there|here)",
        "how many (people|cars|dogs|cats|trees|windows|birds|animals) (are there|do you see)",
        "what (happens|happened) (here|next)",
        "(do|would) you like (it|this|the picture)",
        "what (does it mean|does this mean|is the meaning)",
        "(what is|tell me) the (price|name|weight|material|temperature|address) of (it|this|the (house|man|car))",
        "is (it|the picture) (old|new|nice|expensive|dangerous|day|night|real)",
        "what (color|colour) is the (car|dog|house|sky|hat|tree|hair)",
        "what (brand|kind|sort|model) of (car|phone|animal|food|tree) is (this|it)",
        "what (sound|smell|taste) does (it|this) have",
        "(is|was) (he|she|the man|the woman) (happy|old|tall|young|angry)",
        "(how|where) can i (buy|find|get) (it|this|one)",
        "who (is|was) (this|he|she|that|the author|the owner|the painter)",
        "in (which|what) (city|street|year|language|month) (is|was) (this|it)( made| taken|)",
        "(are|were) there (people|cars|dogs|animals|flowers|houses|clouds)( here| in it|)",
        "how (far|fast|loud|deep|warm|cold) is (it|this)",
        "what should i (do|eat|say|buy|wear)",
        "(tell me|give me) a (joke|story|recipe|poem)",
        "what is (two plus two|the capital of france|your name|your job|the news)",
        "(what|which) (phone|camera|artist|printer|company) (is this|is it|was used)",
        "(can|do) (dogs|people|cars|they) (fly|swim|talk|like it)",
        "(what|who) are you",
        "how do i get (there|home|out)",
        "(describe|explain) (the scene|the person|the house|the weather)",
        "(when|where) (is|was) (the party|the meeting|it built|he born)",
        "how many (hours|kilos|doors|legs|years) (is it|has it|are they)",
    ),
}
HELD_OUT_QUESTIONS: dict[str, tuple[str, ...]] = {
    "position": (
        "please tell me the {nth} letter",
        "which symbol is the {nth} one",
        "at position {n} is which character",
    ),
    "count": (
        "how many letters can you count",
        "tell me how many characters the word has",
        "how many symbols is the text long",
    ),
    "ink": (
        "please name the colour of the writing",
        "which color was the word painted in",
        "the letters are what color",
    ),
    "ground": (
        "what colour do you see behind the letters",
        "please tell me the background color",
    ),
    "text": (
        "tell me what is written",
        "please read what it says",
        "what does this text say",
    ),
    "says": (
        'do you see the word "{word}"',
        'is the text in the picture "{word}"',
        'does it read "{word}"',
    ),
    "any": (
        "do you see a word",
        "is any text shown",
    ),
    "letter": (
        'can you see the letter "{letter}"',
        'does the character "{letter}" appear here',
    ),
    "other": (
        "who is the man in the picture",
        "how expensive is this car",
        "in which country is this",
        "are there trees",
    ),
}
# What people say before a question, and after it.
OPENINGS = "(now|so|ok|ok,|well,|hi,|hello,|hey,|and|can you tell me|could you say|do you know|i want to know)"
ENDINGS = "(please|for me|thanks|now|exactly|, please)"
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth", "eleventh")

_CHOICE = re.compile(r"\(([^()]*\|[^()]*)\)")


def word_it(rng: np.random.Generator, pattern: str) -> str:
    """Draw one wording of a pattern: each choice is made at random."""
    while choice := _CHOICE.search(pattern):
        options = choice[1].split("|")
        pattern = pattern[: choice.start()] + options[int(rng.integers(len(options)))] + pattern[choice.end() :]
    return " ".join(pattern.split())


def first_words(pattern: str) -> set[str]:
    """The words with which the wordings of a pattern can begin."""
    if choice := _CHOICE.match(pattern):
        rest = pattern[choice.end() :].lstrip()
        return {word for option in choice[1].split("|") for word in first_words(f"{option} {rest}".lstrip())}
    return {pattern.split()[0]}


def vocabulary(patterns: Iterable[str]) -> list[str]:
    """The words of patterns, each once and in their order, without the names of their fields."""
    text = " ".join(re.sub(r"\{\w+\}", " ", pattern) for pattern in patterns)
    return list(dict.fromkeys(re.findall(r"[A-Za-z]{2,}", text)))
