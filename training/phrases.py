"""How questions are worded. `(a|b)` is a choice, `{x}` a slot; HELD_OUT wordings are only ever used for scoring."""

from __future__ import annotations

import re
from functools import cache
from random import Random

IMG = "(image|image|picture|photo)"
SEE = "(do you see|can you see|are there|are there in the image|are in the picture|are shown|are in this image)"

TRAIN: dict[str, list[str]] = {
    "describe": [
        f"What's in (this|the) {IMG}?",
        f"What is in (this|the) {IMG}?",
        f"(Describe|Please describe|Can you describe) (this|the) {IMG}.",
        f"Describe (this|the) {IMG} in one sentence.",
        f"What (do|can) you see( in (this|the) {IMG})?",
        f"What does (this|the) {IMG} show?",
        f"What is shown (here|in this {IMG})?",
        f"(Give|Write) me a (short )(description|caption) of (this|the) {IMG}.",
        f"(Write|Give) a caption for (this|the) {IMG}.",
        f"Tell me what (is in|you see in) (this|the) {IMG}.",
        "What is (this|it)?",
        f"Explain what (this|the) {IMG} shows.",
        "What am I looking at?",
        f"What (objects|things) {SEE}?",
        "List (all|all the|the) (objects|shapes|things).",
        "Describe what you see.",
    ],
    "count": [
        f"How many {{x}} {SEE}?",
        "How many {x}?",
        "Count the {x}( in the image| for me|).",
        f"What is the number of {{x}}( in (this|the) {IMG})?",
        "(Tell|Can you tell) me how many {x} there are.",
        f"How many {{x}} does (this|the) {IMG} (show|contain|have)?",
        "Please count {x}.",
        "I want to know how many {x} there are.",
    ],
    "color": [
        "What (color|colour) is the {x}?",
        "Which (color|colour) is the {x}?",
        "What is the (color|colour) of the {x}?",
        "What (color|colour) does the {x} have?",
        "Tell me the (color|colour) of the {x}.",
        f"The {{x}} in the {IMG}, what (color|colour) is it?",
        "The {x} is what (color|colour)?",
        "(Name|Say) the (color|colour) of the {x}.",
    ],
    "shape": [
        "What shape is {x}?",
        "What is the shape of the {x} (object|thing)?",
        "Which shape is {x}?",
        "What is the {x} (object|thing|shape)?",
        "What kind of shape is the {x} (one|object)?",
        "Tell me the shape of the {x} (one|object|thing).",
        "What {x} (object|shape) (is there|do you see)?",
    ],
    "single_color": [
        "What (color|colour) is (it|the shape|the object|this|this shape)?",
        "Which (color|colour) is (it|the object|the shape)?",
        "What is the (color|colour) of the (object|shape)?",
        "Tell me the (color|colour).",
    ],
    "single_shape": [
        "What shape is (it|this|this object|the object)?",
        f"What shape (is in|do you see in) (the|this) {IMG}?",
        "Which shape is (it|this|shown)?",
        "(Name|Tell me) the shape.",
        "What is the shape of the object?",
    ],
    "detail": [
        "Describe (this|the) (image|picture) in detail.",
        "Describe the (objects|shapes) and their (places|position|positions).",
        "Where is (everything|each object)?",
        "What is in (this|the) (image|picture) and where?",
        "Describe the (size|size and the position|position and the size) of (everything|each object).",
    ],
    "several_color": [
        "What (color|colour) are {x}?",
        "(Tell me|Name|What are) the (colors|colours) of {x}.",
        "What (colors|colours) do {x} have?",
    ],
    "several_where": ["Where are {x}?", "Tell me where {x} are.", "What are the positions of {x}?"],
    "several_size": ["How (big|large) are {x}?", "What size are {x}?", "Tell me the size of {x}."],
    "size": [
        "What size is the {x}?",
        "How (big|large) is the {x}?",
        "Is the {x} small, medium or large?",
        "What is the size of the {x}?",
        "Tell me the size of the {x}.",
    ],
    "where": [
        "Where is the {x}?",
        f"Where in the {IMG} is the {{x}}?",
        "In which (part|corner|place) is the {x}?",
        "Where can I find the {x}?",
        "What is the position of the {x}?",
        "Tell me where the {x} is.",
        "Where do you see the {x}?",
    ],
    "relation": [
        "Where is the {x} (relative to|compared to|with respect to) the {y}?",
        "What is the position of the {x} relative to the {y}?",
        "Is the {x} left of, right of, above or below the {y}?",
        "On which side of the {y} is the {x}?",
        "Where is the {x} (seen from|from) the {y}?",
        "How is the {x} placed relative to the {y}?",
        "(Can|Could) you tell me where the {x} is relative to the {y}?",
        "Relative to the {y}, where is the {x}?",
        "Where is the {x}, relative to the {y}?",
        "(Tell me|Say) where the {x} is relative to the {y}.",
        "Compared to the {y}, where is the {x}?",
        "Where is the {x} if you look from the {y}?",
        "Is the {x} above, below, left or right of the {y}?",
        "Where does the {x} lie with respect to the {y}?",
        "What is the place of the {x} relative to the {y}?",
    ],
    "is_relation": [
        "Is the {x} {r} the {y}?",
        "(Do you see|Is) the {x} {r} the {y}?",
        "Is it true that the {x} is {r} the {y}?",
        "The {x} is {r} the {y}, (right|correct|true or false|yes or no)?",
        "Does the {x} lie {r} the {y}?",
        "(Would you say|Can you see that|Do you think) the {x} is {r} the {y}?",
        "Can you see the {x} {r} the {y}?",
        "(Is|So is) the {x} really {r} the {y}?",
        "Can you tell me if the {x} is {r} the {y}?",
        "Tell me if the {x} is {r} the {y}.",
        "I think the {x} is {r} the {y}. (Is that right|Is it true|Right)?",
    ],
    "next_to": [
        "What is {r} the {y}?",
        "Which (object|shape|thing) is {r} the {y}?",
        "What (do you see|is there) {r} the {y}?",
        "Tell me what is {r} the {y}.",
        "(Can you tell me what|Name what) is {r} the {y}?",
        "Name the (object|shape) {r} the {y}.",
        "Which one is {r} the {y}?",
    ],
    "exists": [
        "Is there {a}( in (this|the) image|)?",
        "(Do|Can) you see {a}( in (this|the) picture|)?",
        f"Does (this|the) {IMG} (show|contain|have) {{a}}?",
        "Is {a} (shown|there|in the image|visible)?",
        "Are there any {p}( in (this|the) image|)?",
        "Do you see any {p}?",
    ],
    "is_color": [
        "Is the {x} {c}?",
        "Is the (color|colour) of the {x} {c}?",
        "Would you say the {x} is {c}?",
        "Is it true that the {x} is {c}?",
        "The {x} is {c}, (right|correct|true or false|yes or no)?",
    ],
    "more": ["Are there more {p} than {q}?", "Do you see more {p} than {q}?", "Are there more {p} or {q}? More {p}?"],
    "bigger": [
        "Is the {x} (bigger|larger) than the {y}?",
        "Which is (bigger|larger), the {x} or the {y}? Is it the {x}?",
    ],
    "extreme": [
        "(What|Which object|Which shape) is (on the far|furthest to the) {e}?",
        "What is the {e}most (object|shape|thing)?",
        "Which (object|shape|thing) is the {e}most?",
    ],
    "largest": [
        "(What|Which) is the {e} (object|shape|thing)?",
        "Which (object|shape|one) is the {e}?",
        "What is the {e} thing in the image?",
    ],
    "colors": [
        f"(What|Which) (colors|colours) {SEE}?",
        f"(List|Name) (all|all the|the) (colors|colours)( in the {IMG}|).",
        "What are the (colors|colours) of the (shapes|objects)?",
    ],
    "shapes": [
        f"(What|Which) shapes {SEE}?",
        f"Name (all|all the|the) shapes( in the {IMG}|).",
        "Which kinds of shapes are there?",
    ],
    "background": [
        "What (color|colour) is the background?",
        "What is the (color|colour) of the background?",
        "Which (color|colour) is behind?",
    ],
    "read": [
        "What (does it say|does the image say|does the text say)?",
        f"What (text|word|writing) is (in|on|shown in|written in) (this|the) {IMG}?",
        "Read (the text|the word|it|this|the image|what is written)( to me|).",
        "What is written (here|in the image|there|on the picture|)?",
        "(Can|Could) you read (this|the text|the word|it)?",
        "Which (word|text|number) is (shown|written|this|there)?",
        "What is the (word|text|number)?",
        "(Transcribe|Spell|Write down) the (text|word|number).",
        "What (word|number|text) (do|can) you see?",
        "Tell me (what it says|the text|the word|the number).",
        "What (number|word) is (this|it|shown|in the image)?",
    ],
    "read_bare": [
        "(Read|Transcribe|Write) (the text|the word|it|the number)( and answer with the text only|, only the text). Just the text.",
        "What does it say? (Only|Just) (the word|the text|the number)( please|).",
        "What is written here? (Answer|Reply) with (the text|the word) only.",
        "(OCR|Only the text, please): what is written?",
        "Answer with the text only: what does the image say?",
        "Read the text. Answer with the text and nothing else.",
    ],
    "line": [
        "What (is|does) the {o} (line|word|text)( say|)?",
        "Read the {o} line.",
        "What is (written|) (in|on) the {o} line?",
        "Which (word|text|number) is (at the|on the) {o}?",
    ],
    "text_color": [
        "What (color|colour) is the (text|word|writing)?",
        "What is the (color|colour) of the (text|word|letters)?",
        "In which (color|colour) is it written?",
        "Which (color|colour) (are the letters|is the text)?",
    ],
    "json": [
        "(Describe|List) (the objects|the image|everything|the shapes) (as|in) JSON.",
        "(Give|Return|Write) (me |)(a |)(JSON|JSON object|JSON list) (of|with|describing) (the objects|the shapes|what you see).",
        "What is in (this|the) image? Answer in JSON.",
        "What do you see? (Answer|Reply|Respond) (in|with|as) JSON.",
        "(JSON|Only JSON), please: what is in the picture?",
    ],
    "images": [
        "How many (images|pictures) (do you see|did I send|are there|can you see)?",
        "Do you see one or two (images|pictures)? How many?",
    ],
    "pair_describe": [
        "I have two very different images. They are not related at all. Please describe the first image in one sentence,"
        " and then describe the second image in another sentence.",
        f"(Please |)(Describe|describe) the first {IMG} in one sentence(, and| and) then (describe |)the second( one| image|)( in another sentence|).",
        "Describe (both|the two|these|these two) (images|pictures)( in one sentence each|, one sentence each|).",
        "(What is|What's) in (these|the|these two) (images|pictures)?",
        "What do (these|the) two (images|pictures) show?",
        "(Describe|Tell me about) the first image, then the second( image|).",
        "First describe image one, then image two.",
        "What do you see in (each|both) (image|images|of the images|of the pictures)?",
        "What is the difference between (the|these) (two |)(images|pictures)?",
        "How (do|are) (the|these) (two |)(images|pictures) (differ|different)?",
        "Compare the (two |)(images|pictures).",
        "I have two images. (Please describe|Describe) both of them.",
        "(Please tell|Tell|Can you tell) me what the first image shows and what the second image shows.",
        "Here are two images. Describe the first, then the second.",
        "What is in the first (image|picture) and what is in the second( one| image| picture|)?",
        "What (does|do) the first and the second (image|picture) show?",
        "Describe image one and image two.",
        "Tell me what is in (both|the two|each of the|these) (images|pictures).",
        "Here are two (images|pictures). (What do they show|Describe them|What do you see)?",
        "Describe each (image|picture)( in one sentence|).",
        "One sentence for the first image and one sentence for the second( image|), please.",
    ],
    "pair_one": [
        "What (is|do you see|can you see) in the {o} (image|picture|one)?",
        "Describe (only |)the {o} (image|picture|photo).",
        "What does the {o} (image|picture) show?",
        "(And|Now) (describe |)the {o} (image|picture|one)( only|).",
        "Tell me about the {o} (image|picture).",
        "(Can|Could) you tell me what is in the {o} (image|picture)?",
        "Only the {o} (image|picture): what does it show?",
        "Now only the {o} (image|picture).",
        "Please describe the {o} (image|picture).",
    ],
    "pair_which": [
        "Which (image|picture|one) (has|shows|contains) {a}?",
        "In which (image|picture|of the images) (is there|do you see) {a}?",
        "Which of the (two |)(images|pictures) (has|shows|contains) {a}?",
        "Is {a} in the first or (in |)the second (image|picture)?",
        "Where is {a}, in the first or the second (image|picture)?",
        "Can you tell me which (image|picture) has {a}?",
        "Which (image|picture) is the one with {a}?",
        "Tell me which (image|picture) (has|shows) {a}.",
        "(Do|Does) the first or the second (image|picture) (show|have) {a}?",
    ],
    "pair_same": [
        "Are (they|the images|these images|the two images|the pictures|both pictures) (the same|identical|equal)?",
        "(Do|Does) (both|the two) (images|pictures) show the same( objects| thing| things|)?",
        "Is the second (image|picture) the same as the first( one|)?",
        "Are (these|the) (two |)(images|pictures) (the same|identical)?",
        "Would you say the two pictures are the same?",
        "Can you tell me if both (images|pictures) are the same?",
        "Tell me if the (two |)(images|pictures) show the same( objects|).",
    ],
    "pair_more": [
        "Which (image|picture|one) has more (objects|shapes|things)?",
        "In which (image|picture) are there more (objects|shapes)?",
        "Which of the two (images|pictures) (shows|has|contains) more (objects|shapes)?",
        "Can you tell me which picture has more shapes?",
        "Tell me which (image|picture) (has|shows) more objects.",
    ],
    "pair_count": [
        "How many {x} are (there |)in the {o} (image|picture)?",
        "Count the {x} in the {o} (image|picture).",
    ],
    "pair_color": [
        "What (color|colour) is the {x} in the {o} (image|picture)?",
        "In the {o} (image|picture), what (color|colour) is the {x}?",
    ],
    "also": ["And the {x}?", "What about the {x}?", "And {x}?", "How about the {x}?"],
    "also_image": [
        "And (this one|this image|this picture|this|now|here)?",
        "What about this (one|image|picture)?",
        "And what is in this (image|picture|one)?",
    ],
    "it_where": ["Where is it?", "And where is it?", "Where in the image is it?", "Where?"],
    "it_color": ["What (color|colour) is it?", "And its (color|colour)?", "Which (color|colour) is it?"],
    "it_size": ["How (big|large) is it?", "And its size?", "What size is it?"],
    "greet": ["(Hello|Hi|Hey|Good morning|Good evening)( there|)(!|.|)", "Hello, how are you?", "Hi, can you hear me?"],
    "who": [
        "(Who|What) are you?",
        "What is your name?",
        "(Tell|Can you tell) me about yourself.",
        "(What|Which) model (are you|is this)?",
        "What (can|could) you do?",
        "How can you help me?",
        "Introduce yourself.",
        "Are you (a human|an AI|ChatGPT|a robot|GPT|a model)?",
    ],
    "thanks": [
        "Thanks!",
        "Thank you(!|.| very much!| so much!)",
        "(Great|Nice|Good|Perfect), thanks!",
        "(Good|Great) (job|work)!",
        "Bye!",
    ],
    "other": [
        "What is the capital of (France|Spain|Italy|Germany|Japan|Peru)?",
        "(Write|Tell me) a (poem|story|joke|song) about (the sea|a cat|love|a dog|winter).",
        "(Who|What) is (Einstein|the president|Python|the moon made of|an apple|water|machine learning)?",
        "(How|Why) (is the sky blue|do birds fly|do I cook rice|does a car work|do plants grow)?",
        "What is (two|three|12|7|100) plus (two|five|30|9)?",
        "(Translate|Say) (hello|good night|this sentence) (to|in) (French|German|Spanish).",
        "(What time is it|What day is today|How is the weather)?",
        "Explain (gravity|history|quantum physics|the internet)( in simple words|).",
        "(Count|Count up) (to|from one to) (ten|five|100).",
        "Say something (nice|funny|in one sentence).",
        "Complete the sentence: the (dog|cat|sun) (is|was|likes to).",
        "(Help me|I need help) with my (code|homework|garden|letter).",
    ],
}

HELD_OUT: dict[str, list[str]] = {
    "describe": [
        "Please tell me what this image contains.",
        "Describe the photo for me.",
        "In one sentence, what do you see here?",
    ],
    "count": ["Can you count the {x} here?", "What number of {x} do you see?", "How many {x} are visible?"],
    "color": ["Can you tell me which colour the {x} has?", "What would you say is the color of the {x}?"],
    "shape": ["Can you name the shape of the {x} object?", "The {x} thing has what shape?"],
    "single_color": ["What color does this object have?", "Can you tell me the color of this shape?"],
    "single_shape": ["Can you name this shape?", "What is the shape you see?"],
    "where": ["At what place in the picture is the {x}?", "Can you tell me where to find the {x}?"],
    "relation": [
        "In which direction from the {y} is the {x}?",
        "How does the {x} lie relative to the {y}?",
        "Where can I see the {x}, relative to the {y}?",
    ],
    "is_relation": ["Does the {x} appear {r} the {y}?", "Is it right that the {x} is {r} the {y}?"],
    "next_to": ["What can you see {r} the {y}?", "What object do you see {r} the {y}?"],
    "exists": ["Can you find {a}?", "Does it have {a}?", "Is there {a} here?"],
    "is_color": ["Does the {x} have the color {c}?", "Is {c} the color of the {x}?"],
    "read": ["Please read the text in the picture.", "Can you tell me what is written?", "What text do you see here?"],
    "read_bare": ["Please read the word. Reply with the text only."],
    "json": ["Please list what you see in JSON.", "Describe this picture as JSON."],
    "pair_describe": [
        "Tell me about both images, one sentence for each.",
        "What does the first image show, and what does the second one show?",
        "Say what you see in image one and in image two.",
    ],
    "pair_one": ["I want to know what the {o} image shows."],
    "pair_which": ["Find {a}: is it in the first image or in the second?", "Name the image that has {a}."],
    "pair_same": ["Do you think the pictures are the same?", "Is it true that both images are the same?"],
    "pair_more": ["Where do you see more shapes, in the first or in the second image?"],
    "greet": ["Hello, nice to see you!"],
    "who": ["Can you tell me who you are?"],
}

CHOICE = re.compile(r"\(([^()]*)\)")


@cache
def compiled(template: str) -> tuple[str | tuple[str, ...], ...]:
    """Literal pieces and choices in turn; templates have no nested choices left after one innermost pass."""
    parts: list[str | tuple[str, ...]] = []
    last = 0
    for m in CHOICE.finditer(template):
        options = tuple(m.group(1).split("|"))
        parts += [template[last : m.start()], options if len(options) > 1 else (options[0], "")]
        last = m.end()
    return (*parts, template[last:])


def flatten(template: str, rng: Random) -> str:
    """Resolves choices from the inside out; `(word )` with one option is optional."""
    while "(" in template:
        template = "".join(p if isinstance(p, str) else rng.choice(p) for p in compiled(template))
    return template


def ask(key: str, rng: Random, held_out: bool = False, **slots: str) -> str:
    """A wording of the question `key` with its slots filled."""
    template = rng.choice(HELD_OUT[key] if held_out and key in HELD_OUT else TRAIN[key])
    text = flatten(template, rng)
    for name, value in slots.items():
        text = text.replace("{" + name + "}", value)
    text = re.sub(r"  +", " ", text)
    return text.replace(" ?", "?").replace(" .", ".").strip()


POLITE = (
    "Please tell me: ",
    "Hello! ",
    "Hi! ",
    "Hi, ",
    "Look at this. ",
    "Look at the image. ",
    "Question: ",
    "OK. ",
    "Hey, ",
    "Now, ",
)


def noisy(text: str, rng: Random) -> str:
    """Case, punctuation, politeness and typing noise."""
    pick = rng.random()
    if pick < 0.06:
        text = rng.choice(POLITE) + text
    elif pick < 0.12:
        text = text.lower()
    elif pick < 0.14:
        text = text.upper()
    elif pick < 0.17:
        text = text[:-1] + rng.choice((" please", ", please", " thanks")) + text[-1:]
    elif pick < 0.19 and len(text) > 8:  # a typo
        i = rng.randrange(1, len(text) - 2)
        text = text[:i] + rng.choice((text[i + 1] + text[i], "")) + text[i + 2 :]
    pick = rng.random()
    if pick < 0.12 and text[-1:] in "?.!":
        text = text[:-1]
    elif pick < 0.14:
        text += rng.choice(("!", "?", " ", "\n", ".", "?!"))
    if "'" in text and rng.random() < 0.4:
        text = text.replace("'", "\u2019")
    return text
