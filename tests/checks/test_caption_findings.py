"""Findings about captions: cut and empty ones, rare words, and captions that differ by a phrase only."""

import torch

from unet_diffusion.checks.captions import caption_facts, caption_findings, concepts, cut_findings

TONES = [f"modifier type {tone}" for tone in range(5)]
SPORTS = [f"sport{i} person{i}" for i in range(12)]
VARIANTS = [text for sport in SPORTS for text in (sport, *(f"{sport}, {tone}" for tone in TONES))]
OTHERS = [f"animal{i}, at home" if i % 2 else f"plain animal{i}" for i in range(30)]
CAPTIONS = [*VARIANTS, *OTHERS]


def found(captions, severity, num_val=10):
    index = torch.arange(len(captions))
    findings = caption_findings(captions, index[num_val:], index[:num_val])
    return [finding.text for finding in findings if finding.severity == severity]


def test_captions_that_differ_by_a_phrase_are_variants_across_the_split():
    (text,) = found(CAPTIONS, "warning")
    assert "12 concepts have 5 captions or more" in text
    assert "modifier type 0" in text
    assert "70.6 % of all images" in text
    assert "of 10 images to validate on 4 are of a concept that is trained on" in text


def test_variants_have_the_concept_of_their_plain_caption():
    named, phrases = concepts(CAPTIONS)
    assert phrases == set(TONES)
    assert named[:6] == [("sport0 person0",)] * 6
    assert len(set(named)) == 12 + 30


def test_words_of_captions_without_commas_are_phrases():
    captions = [f"{colour} thing{i} here" for i in range(20) for colour in ("red", "blue", "green", "black", "white")]
    named, phrases = concepts(captions)
    assert phrases == {"red", "blue", "green", "black", "white"}
    assert len(set(named)) == 20


def test_captions_of_different_things_are_no_variants():
    captions = [f"a {animal} in {place}" for animal in ("dog", "cat") for place in ("town", "water", "air")] * 5
    assert found(captions, "warning") == []


def test_a_few_variants_are_a_note():
    captions = [*VARIANTS, *(f"thing{i}, other" for i in range(400))]
    assert found(captions, "warning") == []
    assert any("12 concepts" in text for text in found(captions, "note"))


def test_words_that_occur_once_are_counted():
    assert any(text.startswith("2 of 4 words occur once") for text in found(["a b", "A b", "a c d"], "note", 1))
    assert found(["a b", "b a"], "note", 1) == []


def test_empty_captions_are_counted():
    assert any("2 of 4 captions are empty" in text for text in found(["a", "a", "", " "], "advice", 1))


def test_cut_captions_are_counted_with_the_longest():
    (finding,) = cut_findings([5, 24, 25, 30], 24)
    assert "2 of 4 captions are cut at 24 tokens; the longest has 30" in finding.text
    assert cut_findings([5, 24], 24) == []
    assert cut_findings([25] + [5] * 200, 24)[0].severity == "note"


def test_facts_have_the_number_and_the_length_of_captions():
    assert caption_facts(["a b", "a b", "a, b c d"])[0] == (
        "3 captions, 2 of them different; 2 to 4 words, half of them 2 or more"
    )
