"""What is wrong with captions: empty ones, ones that are cut, rare words, and variants of one across the split."""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import combinations

from torch import Tensor

from unet_diffusion.checks.findings import Finding, percent
from unet_diffusion.runtime.messages import first_few

WORD = re.compile(r"\w+")
MANY_RARE = 0.5  # of all words
MANY_CUT = 0.01  # of the captions
MANY_EMPTY = 0.05  # of the captions
MANY_VARIANTS = 0.2  # of the captions
WITH_COMMAS = 0.25  # of the captions: more, and commas separate phrases
LEAST_VARIANTS = 5  # of a concept, and of phrases that stand for each other
LEAST_PLACES = 10  # captions in which a phrase must be exchanged for another; and a hundredth of all
EXCHANGED = 0.8  # of the places of the rarer of two phrases, at which the other one stands too


def caption_facts(captions: Sequence[str]) -> list[str]:
    """Lines about the captions: how many and how long."""
    lengths = sorted(len(WORD.findall(text)) for text in captions)
    words = Counter(word for text in captions for word in WORD.findall(text.lower()))
    return [
        f"{len(captions)} captions, {len(set(captions))} of them different; {lengths[0]} to {lengths[-1]} words, half "
        f"of them {lengths[len(lengths) // 2]} or more",
        f"{len(words):,} different words",
    ]


def caption_findings(captions: Sequence[str], train: Tensor, val: Tensor) -> list[Finding]:
    """What is wrong with captions, without a tokenizer.

    Args:
        captions: The caption of each image.
        train: The images to train on, (N,) int64.
        val: The images to validate on, (M,) int64.
    """
    return [*_of_words(captions), *_of_empty(captions), *_of_variants(captions, train, val)]


def cut_findings(num_tokens: Sequence[int], max_length: int) -> list[Finding]:
    """How many captions lose their end.

    Args:
        num_tokens: The number of tokens of each caption.
        max_length: The number that the model reads.
    """
    num_cut, longest = sum(number > max_length for number in num_tokens), max(num_tokens)
    if not num_cut:
        return []
    text = f"{num_cut} of {len(num_tokens)} captions are cut at {max_length} tokens; the longest has {longest}"
    option = f"max_length {longest} of the text condition, or shorter captions"
    return [Finding("advice" if num_cut > MANY_CUT * len(num_tokens) else "note", text, option)]


def _of_words(captions: Sequence[str]) -> list[Finding]:
    words = Counter(word for text in captions for word in WORD.findall(text.lower()))
    rare = sum(number == 1 for number in words.values())
    if not rare:
        return []
    text = f"{rare:,} of {len(words):,} words occur once: a model does not learn what they mean"
    option = "captions of fewer, common words" if rare > MANY_RARE * len(words) else ""
    return [Finding("note", text, option)]


def _of_empty(captions: Sequence[str]) -> list[Finding]:
    num_empty = sum(not text.strip() for text in captions)
    if not num_empty:
        return []
    text = f"{num_empty} of {len(captions)} captions are empty, which is what stands for no caption in guidance"
    return [Finding("advice" if num_empty > MANY_EMPTY * len(captions) else "note", text, "write them")]


def _of_variants(captions: Sequence[str], train: Tensor, val: Tensor) -> list[Finding]:
    found, phrases = concepts(captions)
    sizes = Counter(found)
    many = [concept for concept, number in sizes.items() if number >= LEAST_VARIANTS]
    share = sum(sizes[concept] for concept in many) / len(captions)
    if not phrases or not many:
        return []
    trained = {found[i] for i in train.tolist()}
    leaked = sum(found[i] in trained for i in val.tolist())
    text = (
        f"{len(many)} concepts have {LEAST_VARIANTS} captions or more that differ by a phrase only "
        f"({first_few(sorted(phrases))}), {percent(share)} of all images; of {len(val)} images to validate on {leaked} "
        "are of a concept that is trained on"
    )
    if share < MANY_VARIANTS or not leaked:
        return [Finding("note", text)]
    text += ": the validation measures memory more than learning, and these concepts outweigh the others"
    option = "--data.groups.pattern, where names tell variants apart, with --data.groups.balanced true"
    return [Finding("warning", text, f"{option}; or leave variants out")]


def concepts(captions: Sequence[str]) -> tuple[list[tuple[str, ...]], set[str]]:
    """Each caption without the phrases that are exchanged for one another all over the captions, and these phrases.

    Phrases are what commas separate, or words where few captions have commas.
    """
    by_comma = sum("," in text for text in captions) > WITH_COMMAS * len(captions)
    split = [tuple(unit.strip() for unit in text.split("," if by_comma else None)) for text in captions]
    phrases = exchanged_phrases(split)
    return [tuple(unit for unit in units if unit not in phrases) for units in split], phrases


def exchanged_phrases(captions: Sequence[tuple[str, ...]]) -> set[str]:
    """Phrases of which at least five stand at the same places in otherwise equal captions, such as skin tones.

    Two phrases belong together if, in nearly every caption with the rarer one, the other could replace it and give
    another caption of the set. This must be so at many places: "dog" and "cat" may both follow "a small", which makes
    them no variants of one thing.

    Args:
        captions: The phrases of each caption.
    """
    at = defaultdict(set)  # what stands at a place: a caption without one of its phrases
    for units in set(captions):
        for i, unit in enumerate(units):
            at[units[:i], units[i + 1 :], i].add(unit)
    together = [units for units in at.values() if len(units) > 1]
    places = Counter(unit for units in together for unit in units)
    least = max(LEAST_PLACES, len(captions) // 100)
    common = ([unit for unit in units if places[unit] >= least] for units in together)
    pairs = Counter(pair for units in common for pair in combinations(sorted(units), 2))
    others = defaultdict(set)
    for (one, other), number in pairs.items():
        if number >= EXCHANGED * min(places[one], places[other]):
            others[one].add(other)
            others[other].add(one)
    return {unit for unit, known in others.items() if len(known) + 1 >= LEAST_VARIANTS}
