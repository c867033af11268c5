"""Whether samples show what their captions say: words that are found again, and the cosine of CLIP."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score

from unet_diffusion.evaluation import captions as captions_of
from unet_diffusion.evaluation.captions import (
    WordFinder,
    average_precision,
    caption_section,
    frequent_words,
    has_words,
    train_word_finder,
    word_finder,
)
from unet_diffusion.evaluation.features import features_named
from unet_diffusion.evaluation.samples import samples_in
from unet_diffusion.evaluation.selections import of_images

COLOURS = {"red": (1.0, -1, -1), "green": (-1.0, 1, -1), "blue": (-1.0, -1, 1)}


def squares(count, seed=0, *, noise=0.2):
    """Images of one colour with noise, and captions that name the colour."""
    generator = torch.Generator().manual_seed(seed)
    names = [list(COLOURS)[i % 3] for i in range(count)]
    images = torch.tensor([COLOURS[name] for name in names])[:, :, None, None].expand(-1, -1, 16, 16)
    images = images + noise * torch.randn(images.shape, generator=generator)
    return of_images(images.clamp(-1, 1), captions=[f"a {name} thing, number {i}" for i, name in enumerate(names)])


@pytest.fixture
def few_steps(monkeypatch):
    def train(network, take, has, *, num_steps=60, progress=True):
        train_word_finder(network, take, has, num_steps=60, progress=False)

    monkeypatch.setattr(captions_of, "train_word_finder", train)


def test_frequent_words_are_those_that_tell_captions_apart():
    captions = ["A red-hot dog, wet"] * 20 + ["a CAT"] * 19 + ["a bird"] * 25
    assert frequent_words(captions) == ["bird", "wet"]  # a is everywhere, cat too seldom, dog and red-hot where wet is
    assert has_words(["a bird", "no word"], ["bird", "wet"]).tolist() == [[True, False], [False, False]]
    assert has_words([], ["bird"]).shape == (0, 1)


def test_average_precision_is_that_of_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    scores, has = torch.rand(40, 3, generator=generator), torch.rand(40, 3, generator=generator) < 0.4
    has[:, 2] = False
    has[0, 2] = True  # too seldom to count
    expected = np.mean([average_precision_score(has[:, i], scores[:, i]) for i in range(2)])
    assert average_precision(scores, has) == pytest.approx(expected)
    assert np.isnan(average_precision(scores, torch.zeros(40, 3, dtype=torch.bool)))


def test_words_are_found_in_images_that_show_them_and_not_in_others(few_steps, tmp_path):
    train, held_out = squares(120), squares(40, seed=1)
    good = caption_section(squares(60, seed=2), train, held_out, tmp_path)
    figure = good.figures[0]
    assert figure.key == "words_found"
    assert figure.value > 0.95
    assert figure.real > 0.95
    assert figure.beside["shuffled"] < 0.6
    assert [picture.key for picture in good.pictures] == ["captions"]
    rolled = squares(60, seed=2)
    wrong = of_images(rolled.take(range(60)).roll(1, dims=0), captions=rolled.captions)  # each the colour of the next
    assert caption_section(wrong, train, held_out, tmp_path).figures[0].value < 0.6
    noise = of_images(torch.rand(60, 3, 16, 16) * 2 - 1, captions=rolled.captions)
    assert caption_section(noise, train, held_out, tmp_path).figures[0].value < 0.7


def test_shuffled_captions_are_all_other_captions(few_steps):
    numbers = [i for i in range(60) if i % 3 < 2]  # red and green, with captions that are all of them one of two

    def texts(captions):
        return torch.stack([torch.tensor(COLOURS["red" if "red" in one else "green"]) + 1 for one in captions])

    images = squares(60, seed=2).select(torch.tensor(numbers))
    samples = of_images(images.take(range(40)), captions=["a red thing", "a green thing"] * 20)
    features = texts(samples.captions)
    section = caption_section(samples, squares(120), samples, None, texts=texts, features=(features, features))
    words, cosine = section.figures
    worst = average_precision_score([0] * 20 + [1] * 20, np.arange(40, 0, -1))  # all that lack a word come first
    assert words.beside["shuffled"] == pytest.approx(worst, abs=0.02)
    assert (cosine.value, cosine.beside["shuffled"]) == pytest.approx((1, 0))


def test_nothing_is_shuffled_where_all_captions_are_the_same(few_steps):
    samples = of_images(squares(60).take(range(12)), captions=["a red thing"] * 12)
    section = caption_section(samples, squares(120), squares(40, seed=1), None)
    assert section.figures[0].beside == {}


def test_the_network_is_trained_once_and_read_again(few_steps, tmp_path, monkeypatch):
    train = squares(60)
    first = word_finder(train, ["blue", "red"], tmp_path, progress=False)
    monkeypatch.setattr(captions_of, "train_word_finder", lambda *_, **__: pytest.fail("trained again"))
    again = word_finder(train, ["blue", "red"], tmp_path, progress=False)
    images = train.take(range(5))
    assert torch.equal(first(images), again(images))
    with pytest.raises(pytest.fail.Exception):
        word_finder(squares(60, seed=5), ["blue", "red"], tmp_path, progress=False)


def test_captions_without_frequent_words_have_no_section(tmp_path):
    images = of_images(torch.zeros(30, 1, 8, 8), captions=[f"number {i}" for i in range(30)])
    assert caption_section(images, images, images, tmp_path) is None


@pytest.mark.parametrize("shape", [(1, 8, 8), (4, 16, 24), (5, 200, 130)])
def test_any_channels_and_sizes_are_taken(shape):
    assert WordFinder(shape, 3).eval()(torch.zeros(2, *shape)).shape == (2, 3)


def test_the_cosine_is_that_of_clip(tmp_path, few_steps):
    transformers = pytest.importorskip("transformers")
    from denoisers import text_tokens

    torch.manual_seed(0)
    tokenizer = text_tokens().tokenizer
    size = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "projection_dim": 16,
    }
    text = {**size, "vocab_size": len(tokenizer), "max_position_embeddings": 12, "eos_token_id": tokenizer.eos_token_id}
    config = transformers.CLIPConfig(
        text_config=text, vision_config={**size, "image_size": 224, "patch_size": 28}, projection_dim=16
    )
    model = transformers.CLIPModel(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    train, held_out, samples = squares(60), squares(12, seed=1), squares(9, seed=2)
    made = features_named("clip", str(tmp_path), train, None)
    seen = (made.of(samples, progress=False), made.of(held_out, progress=False))
    section = caption_section(samples, train, held_out, None, texts=made.texts, features=seen, progress=False)
    figure = next(one for one in section.figures if one.key == "clip_cosine")
    tokens = tokenizer(samples.captions, padding="max_length", truncation=True, return_tensors="pt")
    small = samples.take(range(9))
    mean, std = (torch.tensor(values)[:, None, None] for values in ((0.48145466, 0.4578275, 0.40821073),
                                                                    (0.26862954, 0.26130258, 0.27577711)))  # fmt: skip
    pixels = F.interpolate(small, (224, 224), mode="bicubic", antialias=True).clamp(-1, 1) / 2 + 0.5
    with torch.no_grad():
        output = model(pixel_values=(pixels - mean) / std, **tokens)
    logits = output.logits_per_image / model.logit_scale.exp()  # cosines of all pairs
    assert figure.value == pytest.approx(float(logits.diagonal().mean()), abs=1e-5)
    assert figure.interval[0] < figure.value < figure.interval[1]


def test_captions_of_a_folder_are_those_that_sample_drew(tmp_path, run_cli):
    from denoisers import text_denoiser

    import unet_diffusion as ud
    from unet_diffusion.data import ImageDataModule
    from unet_diffusion.inference.record import save_denoiser

    save_denoiser(text_denoiser(tmp_path), tmp_path / "text.ckpt")
    words = ("--captions", "red heart", "face", "--num_images", 5, "--num_inference_steps", 1, "--device", "cpu")
    assert run_cli("sample", tmp_path / "text.ckpt", *words, "--output", tmp_path / "drawn")[0] == 0
    data = ImageDataModule(ud.data.Digits())
    data.setup("fit")
    selection = samples_in(tmp_path / "drawn", data, (3, 16, 16))
    assert selection.captions == ["red heart", "face", "red heart", "face", "red heart"]
    assert selection.select(torch.tensor([3, 0])).captions == ["face", "red heart"]
