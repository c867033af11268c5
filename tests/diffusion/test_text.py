"""Captions: tokens and encoder against CLIP's own, and trained, saved, continued and drawn from."""

import copy
import functools
import os
import subprocess
import sys

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import CLIPTextConfig, CLIPTextModel

from unet_diffusion.data import ImageDataModule
from unet_diffusion.data.batches import ImageSet
from unet_diffusion.diffusion.conditions.concat import Concat
from unet_diffusion.diffusion.conditions.text import TextTokens, pretrained_text
from unet_diffusion.diffusion.guidance import Guidance
from unet_diffusion.diffusion.sampling import sample
from unet_diffusion.inference.reading import read_denoiser
from unet_diffusion.runtime.pictures import read_images
from unet_diffusion.training import SampleGrid

CAPTIONS = ["red heart", "blue heart", "red star", "a face with tears of joy", "flag: Åland Islands"] * 4
MANY = [f"{one}{other}" for one in "abcdefgh" for other in "stuvwxyz"]  # of equal frequency
SMALL = {"vocab_size": 700, "max_length": 8, "num_layers": 1, "num_heads": 2}


def text(**options) -> TextTokens:
    torch.manual_seed(0)
    return TextTokens(16, **{**SMALL, **options})


@pytest.fixture
def taught() -> TextTokens:
    made = text()
    made.learn_words(CAPTIONS)
    return made


def test_token_ids_spell_the_caption(taught):
    ids = taught.token_ids(["red heart", "blue star"])
    assert ids.shape == (2, 8)
    assert [taught.tokenizer.decode(row, skip_special_tokens=True) for row in ids] == ["red heart", "blue star"]
    assert ids[0, 0] == taught.tokenizer.bos_token_id
    assert ids[0, -1] == taught.tokenizer.pad_token_id


def test_words_of_no_caption_are_spelled_in_bytes(taught):
    ids = taught.token_ids(["zx"])
    assert taught.tokenizer.decode(ids[0], skip_special_tokens=True) == "zx"
    assert taught.tokenizer.unk_token_id == taught.tokenizer.eos_token_id not in ids[0, :3]


def test_long_captions_are_cut_and_keep_their_end(taught):
    ids = taught.token_ids(["red heart " * 20])
    assert ids.shape == (1, 8)
    assert ids[0, -1] == taught.tokenizer.eos_token_id


def test_captions_that_are_cut_and_become_equal_are_counted(taught):
    long = [f"red heart {'red ' * 10}{end}" for end in ("heart", "star")]  # the first six words are the same
    captions = ["red heart", *long, "blue " * 9, "red heart", "Red heart " * 9, "red heart " * 9]
    lengths = [len(ids) for ids in taught.tokenizer(captions, truncation=False).input_ids]
    assert taught.cut(captions) == (sum(length > SMALL["max_length"] for length in lengths), 2) == (5, 2)
    assert taught.cut(["red heart", "red heart", "blue star"]) == (0, 0)


@pytest.mark.slow
def test_every_process_learns_the_same_words():
    code = f"""
from unet_diffusion.diffusion.conditions.text import TextTokens
text = TextTokens(16, **{SMALL})
text.learn_words({CAPTIONS + MANY})
print(bytes(text.get_extra_state().tolist()).hex())
"""
    here = TextTokens(16, **SMALL)
    here.learn_words(CAPTIONS + MANY)
    # Hashes, and so the order of sets, have a seed of their own in each process.
    environment = {**os.environ, "PYTHONHASHSEED": "random"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert bytes(here.get_extra_state().tolist()).hex() == done.stdout.strip()


def test_words_are_learnt_once(taught):
    before = taught.get_extra_state()
    taught.learn_words(["quite other words"])
    assert torch.equal(taught.get_extra_state(), before)


def test_null_is_the_empty_caption(taught):
    ids = taught.token_ids(["red heart", "red star"])
    assert torch.equal(taught.null(ids), taught.token_ids(["", ""]))


def test_state_holds_the_tokenizer(taught):
    other = text()
    other.load_state_dict(copy.deepcopy(taught.state_dict()))
    for captions in (CAPTIONS, ["zx Ωmega 日本"]):
        assert torch.equal(other.token_ids(captions), taught.token_ids(captions))


def test_pretrained_is_the_text_encoder_of_the_folder(tmp_path, taught):
    config = CLIPTextConfig(
        hidden_size=16, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=700,
        max_position_embeddings=8, hidden_act="gelu", bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    torch.manual_seed(1)
    model = CLIPTextModel(config)
    model.save_pretrained(tmp_path / "text_encoder")
    taught.tokenizer.save_pretrained(tmp_path / "tokenizer")
    loaded = pretrained_text(tmp_path)
    ids = taught.token_ids(CAPTIONS[:5])
    assert torch.equal(loaded.token_ids(CAPTIONS[:5]), ids)
    torch.testing.assert_close(loaded(ids), model(ids).last_hidden_state)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_text_encoder_of_another_build_is_refused(tmp_path):
    config = CLIPTextConfig(hidden_size=16, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    config.save_pretrained(tmp_path / "text_encoder")
    (tmp_path / "tokenizer").mkdir()
    with pytest.raises(ValueError, match="intermediate_size of a text encoder must be 64, as in CLIP, got 48"):
        pretrained_text(tmp_path)
    with pytest.raises(FileNotFoundError, match="must be a local folder with text_encoder"):
        pretrained_text(tmp_path / "tokenizer")


# ---------------------------------------------------------------------------------------------------------- in training


@pytest.fixture
def captioned(tiny_images):
    """Tiny images with captions."""

    def make() -> ImageDataModule:
        data = tiny_images(class_names=None)
        load = data.source.load
        data.source.load = lambda **options: ImageSet(load(**options).images, {"captions": CAPTIONS})
        return data

    return make


@pytest.fixture
def text_module(tiny_module, tiny_unet):
    def make(*, condition=None, **options):
        unet = tiny_unet(context_dim=16, attention_levels=[1], num_heads=2)
        return tiny_module(unet=unet, conditions=[condition or text(dropout=0.5)], **options)

    return make


def test_encoder_is_trained_with_the_network_and_averaged(text_module, captioned, quiet_trainer):
    module = text_module(ema_decay=0.5)
    before = copy.deepcopy(module.conditions.state_dict())
    quiet_trainer(max_steps=3).fit(module, captioned())
    weight = "0.encoder.embeddings.token_embedding.weight"
    raw, average = module.conditions.state_dict()[weight], module.ema_conditions.state_dict()[weight]
    assert not torch.equal(raw, before[weight])
    assert not torch.equal(raw, average)
    assert torch.equal(module.ema_conditions[0].token_ids(CAPTIONS), module.conditions[0].token_ids(CAPTIONS))


def test_each_image_has_its_own_caption(text_module, captioned, quiet_trainer):
    seen = []
    module = text_module(condition=text(dropout=0.0))
    module.conditions[0].register_forward_pre_hook(lambda text, args: seen.append(args[0]))
    batches = []

    class Indices(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            batches.append(batch["index"])

    quiet_trainer(max_steps=4, limit_val_batches=0, callbacks=[Indices()]).fit(module, captioned())
    for ids, index in zip(seen, batches, strict=True):
        assert torch.equal(ids, module.conditions[0].token_ids([CAPTIONS[i] for i in index.tolist()]))


def test_captions_are_dropped_to_the_empty_one(text_module, captioned, quiet_trainer):
    seen = []
    module = text_module()
    module.conditions[0].register_forward_pre_hook(lambda text, args: seen.append(args[0]))
    quiet_trainer(max_steps=8, limit_val_batches=0).fit(module, captioned())
    empty = module.conditions[0].token_ids([""])[0]
    share = (torch.cat(seen) == empty).all(dim=1).float().mean()
    assert 0.2 < share < 0.8  # of 32 captions, 0.5 +- 0.09


def test_frozen_encoder_stays_and_is_saved_once(text_module, captioned, quiet_trainer, tmp_path):
    module = text_module(condition=text(frozen=True))
    before = copy.deepcopy(module.conditions.state_dict())
    trainer = quiet_trainer(max_steps=2)
    trainer.fit(module, captioned())
    after = module.conditions.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before if "extra" not in key)
    weight = "encoder.embeddings.token_embedding.weight"
    assert module.ema_conditions[0].get_parameter(weight) is module.conditions[0].get_parameter(weight)


def test_a_run_that_is_continued_is_the_run_in_one_go(text_module, captioned, quiet_trainer, tmp_path):
    def fit(max_steps, **options):
        module = text_module()
        saving = ModelCheckpoint(tmp_path / str(max_steps), every_n_train_steps=1, save_top_k=-1, filename="{step}")
        trainer = quiet_trainer(max_steps=max_steps, limit_val_batches=0, enable_checkpointing=True, callbacks=[saving])
        trainer.fit(module, captioned(), **options)
        return module.state_dict()

    expected = fit(6)
    fit(3)
    got = fit(6, ckpt_path=tmp_path / "3" / "step=3.ckpt")
    assert expected.keys() == got.keys()
    assert [key for key in expected if not torch.equal(expected[key], got[key])] == []


def test_a_continued_run_keeps_its_tokenizer(text_module, captioned, quiet_trainer, tmp_path):
    first, second = text_module(), text_module()
    trainer = quiet_trainer(max_steps=1)
    trainer.fit(first, captioned())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    data = captioned()
    data.setup()
    data.entries["captions"] = [f"{caption} and other words" for caption in CAPTIONS]
    with pytest.warns(UserWarning, match=r"trained on: 20 changed \(0, 1, 2, 3, 4, \.\.\.\)$"):
        quiet_trainer(max_steps=2).fit(second, data, ckpt_path=tmp_path / "half.ckpt")
    assert torch.equal(second.conditions[0].get_extra_state(), first.conditions[0].get_extra_state())


def test_captions_are_those_of_the_data_at_hand(text_module, captioned, quiet_trainer):
    module, other = text_module(), captioned()
    quiet_trainer(max_steps=1).fit(module, captioned())
    other.setup()
    other.entries["captions"] = CAPTIONS[::-1]
    quiet_trainer().validate(module, other, verbose=False)
    entry = module.conditions[0].read({"index": torch.arange(20)})
    assert torch.equal(entry, module.conditions[0].token_ids(CAPTIONS[::-1]))


def test_there_is_one_caption_an_image(tiny_module, tiny_unet):
    unet = tiny_unet(context_dim=16, attention_levels=[1], num_heads=2)
    with pytest.raises(ValueError, match="at most one condition that reads 'captions'"):
        tiny_module(unet=unet, conditions=[text(), text()])


@pytest.fixture
def trained_run(text_module, captioned, quiet_trainer, tmp_path):
    fast = functools.partial(torch.optim.Adam, lr=0.03)  # else predictions stay near the zeros that they begin with
    module, trainer = text_module(optimizer=fast, ema_decay=0.0), quiet_trainer(max_steps=4)
    trainer.fit(module, captioned())
    trainer.save_checkpoint(tmp_path / "text.ckpt")
    return module, tmp_path / "text.ckpt"


def test_checkpoint_gives_the_averaged_network_and_encoder(trained_run):
    module, path = trained_run
    read, wanted = read_denoiser(path), ["red star", "blue heart"]
    given = {"captions": read.conditions[0].token_ids(wanted)}
    assert torch.equal(given["captions"], module.conditions[0].token_ids(wanted))
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([5, 50])
    inputs, expected = read.inputs(given)[0], module.trained.inputs(given)[0]
    torch.testing.assert_close(read.unet(x, t, **inputs), module.ema_unet(x, t, **expected))


def test_grid_shows_validation_captions_and_lists_them(text_module, captioned, quiet_trainer, tmp_path):
    grid = SampleGrid(0, num_images=6, num_inference_steps=2, guidance_scale=2.0)
    module, data = text_module(), captioned()
    quiet_trainer(max_steps=1, callbacks=[grid]).fit(module, data)
    listed = (tmp_path / "captions.txt").read_text().splitlines()
    kept_apart = [CAPTIONS[i] for i in data.val_indices.tolist()]
    assert listed == [kept_apart[i % 4] for i in range(6)]
    assert (tmp_path / "samples.png").exists()


def test_command_draws_what_the_captions_say_in_turn(trained_run, run_cli, tmp_path):
    module, path = trained_run
    options = ["--num_inference_steps=2", "--guidance_scale=3", "--scheduler=DDIMScheduler", "--device=cpu"]
    wanted = ["red star", "blue heart"]
    status, _, err = run_cli(
        "sample", path, "--num_images=3", *options, "--captions", *wanted, "--output", tmp_path / "out"
    )
    assert status == 0, err
    inputs, unconditional = module.trained.inputs(
        {"captions": module.conditions[0].token_ids([wanted[0], wanted[1], wanted[0]])}
    )
    images = sample(
        module.ema_unet, module.schedule, (3, 1, 8, 8), num_inference_steps=2, inputs=inputs,
        unconditional=unconditional, guidance=Guidance(3.0),
    )  # fmt: skip
    drawn = read_images([tmp_path / "out" / f"{i:06d}.png" for i in range(3)])
    torch.testing.assert_close(drawn, images.clamp(-1, 1), atol=1 / 127, rtol=0)  # 8 bits


def test_an_earlier_checkpoint_leads_away(trained_run, run_cli, tmp_path, text_module, captioned, quiet_trainer):
    module, path = trained_run
    earlier, trainer = text_module(ema_decay=0.0), quiet_trainer(max_steps=1)
    trainer.fit(earlier, captioned())
    trainer.save_checkpoint(tmp_path / "earlier.ckpt")
    options = ["--num_images=2", "--num_inference_steps=2", "--scheduler=DDIMScheduler", "--captions", "red star"]
    options += ["--guidance_scale=2", "--autoguidance", tmp_path / "earlier.ckpt"]
    status, _, err = run_cli("sample", path, *options, "--device=cpu", "--output", tmp_path / "out")
    assert status == 0, err
    tokens = {"captions": module.conditions[0].token_ids(["red star"] * 2)}
    inputs, weaker_inputs = (one.trained.inputs(tokens)[0] for one in (module, earlier))

    def led_away(x, t):
        better, worse = module.ema_unet(x, t, **inputs), earlier.ema_unet(x, t, **weaker_inputs)
        return worse + 2 * (better - worse)

    images, plain = (
        sample(one, module.schedule, (2, 1, 8, 8), num_inference_steps=2, inputs=given).clamp(-1, 1)
        for one, given in ((led_away, None), (module.ema_unet, inputs))
    )
    assert (images - plain).abs().max() > 0.1
    drawn = read_images([tmp_path / "out" / f"{i:06d}.png" for i in range(2)])
    torch.testing.assert_close(drawn, images, atol=1 / 127, rtol=0)  # 8 bits


# --------------------------------------------------------------------------------------------------------------- errors


def test_what_to_install_is_said_without_transformers(trained_run, run_cli, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)  # as if it were not there
    status, _, err = run_cli("sample", trained_run[1], "--captions", "red star", "--output", tmp_path / "out")
    assert (status, "pip install unet-diffusion[text]" in err, "whole denoiser" in err) == (1, True, False), err


def test_captions_must_be_given(trained_run, run_cli, tmp_path):
    _, path = trained_run
    status, _, err = run_cli("sample", path, "--output", tmp_path / "out")
    assert (status, "draws from captions; give captions" in err) == (1, True), err
    status, _, err = run_cli("sample", path, "--labels", "1", "--captions", "x", "--output", tmp_path / "out")
    assert (status, "trained without labels" in err) == (1, True), err
    assert not (tmp_path / "out").exists()


def test_data_without_captions_are_refused(text_module, tiny_images, quiet_trainer):
    with pytest.raises(ValueError, match=r"data have none; set data\.captions"):
        quiet_trainer(max_steps=1).fit(text_module(), tiny_images(class_names=None))


def test_network_and_conditions_must_have_the_same_context(tiny_module, tiny_unet):
    unet = tiny_unet(context_dim=8, attention_levels=[1], num_heads=2)
    with pytest.raises(ValueError, match="must be the same, got 8 and 16"):
        tiny_module(unet=unet, conditions=[text()])
    with pytest.raises(ValueError, match="must be the same, got 8 and no condition"):
        tiny_module(unet=unet)
    with pytest.raises(ValueError, match="must be the same, got None and 16"):
        tiny_module(conditions=[text()])


def test_maps_count_among_the_channels_of_the_network(tiny_module, tiny_unet, tiny_images, quiet_trainer):
    module = tiny_module(unet=tiny_unet(in_channels=4, out_channels=1), conditions=[Concat(2)])
    with pytest.raises(
        ValueError, match="images have 1 channels plus 2 channels from conditions and the network takes 4"
    ):
        quiet_trainer(max_steps=1).fit(module, tiny_images(class_names=None))


def test_width_must_divide_into_heads():
    with pytest.raises(ValueError, match="context_dim must be a multiple of num_heads, got 16 and 3"):
        TextTokens(16, num_heads=3)


def test_vocabulary_must_have_room_for_all_bytes():
    with pytest.raises(ValueError, match="vocab_size must be at least 514, for single bytes, got 500"):
        text(vocab_size=500).learn_words(CAPTIONS)
