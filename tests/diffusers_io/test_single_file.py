"""Files of the layouts of latent diffusion and Stable Diffusion, read as the networks of diffusers that they hold."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.loaders import single_file_utils
from safetensors.torch import save_file
from single_files import (
    CLIP,
    FIRST_STAGE,
    LAYOUTS,
    OPEN_CLIP,
    UNET,
    autoencoder_weights,
    classes,
    inpainting,
    parameters,
    pix2pix,
    saved,
    sd1,
    sd2,
    sdxl,
    tiny_text,
    tiny_vae,
    unconditional,
    unconditional_kl,
    unet_weights,
    x4_upscaler,
)

import unet_diffusion as ud
from unet_diffusion.diffusers_io.configurations import config_from_diffusers
from unet_diffusion.diffusers_io.importing import from_diffusers
from unet_diffusion.diffusers_io.single_file.layouts import SD1, SD2, UPSCALER, XL
from unet_diffusion.diffusers_io.single_file.network import unet_config
from unet_diffusion.diffusion.conditions.class_tokens import ClassTokens
from unet_diffusion.diffusion.conditions.low_resolution import LowResolution
from unet_diffusion.diffusion.conditions.masked_image import MaskedImage
from unet_diffusion.diffusion.conditions.paired_image import PairedImage
from unet_diffusion.diffusion.conditions.xl_text import XLText
from unet_diffusion.latents.codec import LatentCodec
from unet_diffusion.models.autoencoders import pretrained_autoencoder

pytest.importorskip("transformers")

CLOSE = {"atol": 1e-5, "rtol": 0}
SCALED = {"beta_schedule": "scaled_linear"}


CAPTIONED = [sd1, sd2, x4_upscaler, sdxl]


@pytest.fixture(params=LAYOUTS, ids=lambda make: make.__name__)
def made(request, tmp_path):
    return saved(request.param, tmp_path)


@torch.no_grad()
def differences(ours: ud.Denoiser, made) -> dict[str, float]:
    """The largest difference from diffusers' models, of each part."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape):
        return torch.randn(shape, generator=generator)

    channels = made.unet.config["in_channels"]
    x, t = noise(2, channels, 8, 8), torch.tensor([3, 700])
    labels = torch.tensor([20, 350]) if made.unet.config["num_class_embeds"] else None
    if made.unet.config.get("cross_attention_dim") is None:
        pairs = {"network": (ours.unet(x, t), made.unet(x, t).sample)}
    else:
        context, vector, added = noise(2, 5, made.unet.config["cross_attention_dim"]), None, None
        if made.unet.config["addition_embed_type"]:
            pooled, sizes = noise(2, 48), torch.tensor([[64, 64, 0, 0, 64, 32]] * 2)
            added = {"text_embeds": pooled, "time_ids": sizes}
            waves = made.unet.add_time_proj(sizes.flatten()).reshape(2, -1)
            vector = torch.cat([pooled, waves], dim=1)
        theirs = made.unet(x, t, encoder_hidden_states=context, class_labels=labels, added_cond_kwargs=added).sample
        pairs = {"network": (ours.unet(x, t, labels, context=context, vector=vector), theirs)}
    latents = noise(1, made.vae.config["latent_channels"], 4, 4)
    autoencoder = ours.codec.autoencoder
    pairs["decoder"] = autoencoder.decode(latents).sample, made.vae.decode(latents).sample
    images = noise(1, 3, 16, 16)
    if hasattr(made.vae.encode(images), "latents"):
        pairs["encoder"] = autoencoder.encode(images).latents, made.vae.encode(images).latents
    else:
        pairs["encoder"] = autoencoder.encode(images).latent_dist.mean, made.vae.encode(images).latent_dist.mean
    return {name: float((mine - other).abs().max()) for name, (mine, other) in pairs.items()}


def without_scaled_input(ours: ud.Denoiser, made) -> ud.Denoiser:
    """InstructPix2Pix gives its network latents that are not scaled; ours takes scaled ones."""
    if made.name == "pix2pix":
        with torch.no_grad():
            ours.unet.conv_in.weight[:, 4:] *= 0.18215
    return ours


def test_file_gives_the_outputs_of_the_models_of_diffusers(made):
    ours = without_scaled_input(ud.load(made.file, **made.told), made)
    assert max(differences(ours, made).values()) < 1e-5


@pytest.mark.parametrize("made", CAPTIONED, indirect=True, ids=lambda make: make.__name__)
def test_captions_are_encoded_as_by_the_models_of_transformers(made):
    condition = ud.load(made.file, **made.told).conditions[0]
    ours = [condition.first, condition.second] if isinstance(condition, XLText) else [condition]
    ids = made.texts[0].token_ids(["a red cat"])
    for mine, theirs in zip(ours, made.texts, strict=True):
        assert mine.config["frozen"]
        torch.testing.assert_close(mine(ids), theirs(ids), **CLOSE)
    if isinstance(condition, XLText):
        torch.testing.assert_close(condition.projection.weight, made.projection, atol=0, rtol=0)


def test_diffusers_reads_the_very_weights_from_the_file(made):
    """The tiny files have the layouts that diffusers' own conversion takes, except attention without a context."""
    config = {**made.unet.config}
    if config.get("cross_attention_dim") is not None:
        converted = single_file_utils.convert_ldm_unet_checkpoint(made.tensors, config)
        assert_same(converted, parameters(made.unet))
    if made.name != "unconditional":  # it has none for attention in a level of the autoencoder either
        converted = single_file_utils.convert_ldm_vae_checkpoint(made.tensors, made.vae.config)
        expected = parameters(made.vae)
        expected.pop("quantize.embedding.weight", None)
        assert_same(converted, expected)
    for text, prefix in zip(made.texts, (OPEN_CLIP, "conditioner.embedders.1.model."), strict=False):
        if any(key.startswith(prefix) for key in made.tensors):
            model = SimpleNamespace(config=SimpleNamespace(hidden_size=64))
            converted = single_file_utils.convert_open_clip_checkpoint(model, made.tensors, prefix=prefix)
            ours = {f"text_model.{key}": value for key, value in parameters(text.encoder).items()}
            assert_same({key: converted[key] for key in ours}, ours)


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, atol=0, rtol=0, msg=key)


DOWN, UP = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3
PUBLISHED = {
    SD1: {"cross_attention_dim": 768, "attention_head_dim": 8, "down_block_types": DOWN, "up_block_types": UP},
    SD2: {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True,
          "down_block_types": DOWN, "up_block_types": UP},
    UPSCALER: {"in_channels": 7, "out_channels": 4, "num_class_embeds": 1000, "cross_attention_dim": 1024,
               "block_out_channels": [256, 512, 512, 1024], "only_cross_attention": [True, True, True, False],
               "attention_head_dim": 8, "use_linear_projection": True,
               "down_block_types": DOWN[::-1], "up_block_types": UP[::-1]},
    XL: {"block_out_channels": [320, 640, 1280], "transformer_layers_per_block": [1, 2, 10],
         "cross_attention_dim": 2048, "attention_head_dim": [5, 10, 20], "use_linear_projection": True,
         "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
         "projection_class_embeddings_input_dim": 2816, "down_block_types": ["DownBlock2D", *DOWN[:2]],
         "up_block_types": [*UP[1:3], "UpBlock2D"]},
}  # fmt: skip


@pytest.mark.parametrize("layout", PUBLISHED, ids=lambda layout: layout.name)
def test_sizes_of_published_networks_are_read_off_their_shapes(layout):
    published = {"_class_name": "UNet2DConditionModel", **PUBLISHED[layout]}
    with torch.device("meta"):
        unet = UNet2DConditionModel(**PUBLISHED[layout])
    weights = {key.removeprefix(UNET): value for key, value in unet_weights(unet).items()}
    ours, expected = (config_from_diffusers(config) for config in (unet_config(weights, layout), published))
    heads = [config.pop("num_heads") for config in (ours, expected)]
    assert ours == expected
    assert heads[0] == heads[1]


EXPECTED = {  # prediction_type, side of images, betas, scaling_factor of the published models
    "sd1": ("epsilon", 512, (0.00085, 0.012), 0.18215),
    "inpainting": ("epsilon", 512, (0.00085, 0.012), 0.18215),
    "pix2pix": ("epsilon", 512, (0.00085, 0.012), 0.18215),
    "sd2": ("v_prediction", 768, (0.00085, 0.012), 0.18215),
    "sd2_inpainting": ("epsilon", 512, (0.00085, 0.012), 0.18215),
    "x4_upscaler": ("v_prediction", 512, (0.0001, 0.02), 0.08333),
    "sdxl": ("epsilon", 1024, (0.00085, 0.012), 0.13025),
    "unconditional": ("epsilon", 256, (0.0015, 0.0195), 1.0),
    "unconditional_kl": ("epsilon", 256, (0.0015, 0.0195), 0.5),
    "classes": ("epsilon", 256, (0.0015, 0.0195), 1.0),
}


def test_what_the_weights_do_not_say_is_as_published(made):
    ours = ud.load(made.file, **made.told)
    prediction_type, size, (start, end), scale = EXPECTED[made.name]
    scheduler = DDPMScheduler(**SCALED, beta_start=start, beta_end=end)
    torch.testing.assert_close(ours.schedule.alphas_cumprod, scheduler.alphas_cumprod)
    assert (ours.schedule.prediction_type, ours.image_shape) == (prediction_type, (3, size, size))
    assert ours.codec.space.scaling_factor == pytest.approx(scale)


@pytest.mark.parametrize(
    ("make", "kinds"),
    [
        (inpainting, [MaskedImage]),
        (pix2pix, [PairedImage]),
        (x4_upscaler, [LowResolution]),
        (classes, [ClassTokens]),
        (unconditional, []),
    ],
)
def test_input_channels_are_the_conditions_of_their_layout(make, kinds, tmp_path):
    made = make()
    save_file(made.tensors, tmp_path / "model.safetensors")
    if made.texts:
        made.texts[0].tokenizer.save_pretrained(tmp_path / "tokenizer")
        made.told["tokenizer"] = tmp_path / "tokenizer"
    ours = ud.load(tmp_path / "model.safetensors", **made.told)
    assert [type(condition) for condition in ours.conditions][len(made.texts) :] == kinds


def test_classes_of_the_file_are_tokens_with_a_null(tmp_path):
    made = saved(classes, tmp_path)
    tokens = ud.load(made.file, **made.told).conditions[0]
    assert (tokens.num_classes, tokens.has_null) == (10, True)
    torch.testing.assert_close(tokens(torch.tensor([3]))[0, 0], made.embedding[3])
    torch.testing.assert_close(tokens(tokens.null(torch.tensor([3])))[0, 0], made.embedding[10])


def test_classes_without_a_null_have_no_guidance(tmp_path):
    made = saved(classes, tmp_path)
    denoiser = ud.load(made.file, num_heads=1, num_classes=11, image_size=16)
    tokens = denoiser.conditions[0]
    assert (tokens.num_classes, tokens.has_null) == (11, False)
    torch.testing.assert_close(tokens(torch.tensor([10]))[0, 0], made.embedding[10])
    with pytest.raises(ValueError, match="guidance_scale"):
        denoiser.sample(1, labels=10, guidance_scale=2.0)


@pytest.mark.parametrize(("rows", "has_null", "words"), [(1001, True, "and a null"), (1000, False, "without a null")])
def test_classes_of_published_models_are_known_by_their_number(tmp_path, run_cli, rows, has_null, words):
    """cin256-v2 has a row more than ImageNet has classes, and cin-ldm-vq-f8 has not."""
    tensors = {**classes().tensors, "cond_stage_model.embedding.weight": torch.randn(rows, 64)}
    save_file(tensors, tmp_path / "model.safetensors")
    tokens = ud.load(tmp_path / "model.safetensors", num_heads=1).conditions[0]
    assert (tokens.num_classes, tokens.has_null) == (1000, has_null)
    options = ["--num_heads", "1", "--image_size", "16"]
    status, out, err = run_cli("import", tmp_path / "model.safetensors", tmp_path / "imported.ckpt", *options)
    assert status == 0, err
    assert f"1000 classes {words}" in out


# ------------------------------------------------------------------------------------------------- files and commands


@pytest.fixture
def tokenizer(tmp_path):
    folder = tmp_path / "tokenizer"
    tiny_text("gelu").tokenizer.save_pretrained(folder)
    return folder


def test_checkpoint_of_a_training_gives_its_averaged_weights(tmp_path):
    made = unconditional()
    averages = {f"model_ema.{key.removeprefix('model.').replace('.', '')}": value + 1
                for key, value in made.tensors.items() if key.startswith(UNET)}  # fmt: skip
    torch.save({"state_dict": {**made.tensors, **averages}, "global_step": 7}, tmp_path / "model.ckpt")
    unet = from_diffusers(tmp_path / "model.ckpt")
    torch.testing.assert_close(unet.conv_in.weight, made.unet.conv_in.weight + 1)


def test_average_of_an_autoencoder_is_read_where_it_is_alone(tmp_path):
    """A denoiser's latents are those of the weights themselves, with which latent diffusion encodes and decodes."""
    vae = tiny_vae("vq", 3, attended=True)
    alone = autoencoder_weights(vae, "")
    averages = {f"model_ema.{key.replace('.', '')}": value + 1 for key, value in alone.items()}
    torch.save({"state_dict": {**alone, **averages}}, tmp_path / "vae.ckpt")
    bias = ud.load(tmp_path / "vae.ckpt").autoencoder.decoder.conv_in.bias
    torch.testing.assert_close(bias, vae.decoder.conv_in.bias + 1)
    beside = {f"{FIRST_STAGE}{key}": value for key, value in averages.items()}
    torch.save({"state_dict": {**unconditional().tensors, **beside}}, tmp_path / "model.ckpt")
    bias = ud.load(tmp_path / "model.ckpt").codec.autoencoder.decoder.conv_in.bias
    torch.testing.assert_close(bias, vae.decoder.conv_in.bias)


def test_names_of_a_network_in_data_parallel_are_read(tmp_path):
    made = unconditional()
    torch.save({f"module.{key}": value for key, value in made.tensors.items()}, tmp_path / "model.ckpt")
    assert max(differences(ud.load(tmp_path / "model.ckpt"), made).values()) < 1e-5


def test_file_that_could_run_code_is_refused(tmp_path):
    torch.save({"state_dict": {}, "callbacks": SimpleNamespace}, tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match=r"model.ckpt was not loaded: it must hold only tensors .* could run code"):
        ud.load(tmp_path / "model.ckpt")


def test_damaged_file_is_named(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"{}")
    with pytest.raises(ValueError, match=r"model.safetensors is damaged or no safetensors file"):
        ud.load(tmp_path / "model.safetensors")


def sigmas_of(scheduler):
    return ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).sqrt()


TABLES = {
    "betas": lambda scheduler: scheduler.betas,
    "alphas_cumprod": lambda scheduler: scheduler.alphas_cumprod,
    "denoiser.sigmas": sigmas_of,
}


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize(("kind", "start", "end"), [("scaled_linear", 0.0012, 0.0195), ("linear", 0.0001, 0.02)])
def test_schedule_is_that_of_the_file(tmp_path, table, kind, start, end):
    made = unconditional()
    scheduler = DDPMScheduler(beta_schedule=kind, beta_start=start, beta_end=end)
    save_file({**made.tensors, table: TABLES[table](scheduler)}, tmp_path / "model.safetensors")
    schedule = ud.load(tmp_path / "model.safetensors").schedule
    torch.testing.assert_close(schedule.alphas_cumprod, scheduler.alphas_cumprod, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("table", TABLES)
def test_tables_of_16_bits_are_those_of_the_published_schedule(tmp_path, table, dtype):
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.0015, beta_end=0.0195)
    tensors = {**unconditional().tensors, table: TABLES[table](scheduler).to(dtype)}
    save_file(tensors, tmp_path / "model.safetensors")
    schedule = ud.load(tmp_path / "model.safetensors").schedule
    torch.testing.assert_close(schedule.alphas_cumprod, scheduler.alphas_cumprod)


@pytest.mark.parametrize("is_marked", [False, True])
@pytest.mark.parametrize("is_rescaled", [False, True])
def test_zero_terminal_snr_is_told_by_the_table_or_by_a_mark(tmp_path, is_marked, is_rescaled):
    known = {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195}
    scheduler = DDPMScheduler(**known, rescale_betas_zero_snr=is_rescaled)
    mark = {"ztsnr": torch.zeros(1)} if is_marked else {}
    tensors = {**unconditional().tensors, "alphas_cumprod": scheduler.alphas_cumprod, **mark}
    save_file(tensors, tmp_path / "model.safetensors")
    schedule = ud.load(tmp_path / "model.safetensors", prediction_type="v_prediction").schedule
    expected = DDPMScheduler(**known, rescale_betas_zero_snr=is_marked or is_rescaled)
    torch.testing.assert_close(schedule.alphas_cumprod, expected.alphas_cumprod, atol=1e-6, rtol=1e-5)


def test_schedules_that_are_not_read_are_refused(tmp_path):
    """One by a formula that is not known, and one whose tables contradict each other."""
    cosine = DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod
    linear = DDPMScheduler(beta_start=1e-4, beta_end=0.02)
    for tables in ({"alphas_cumprod": cosine}, {"betas": linear.betas, "alphas_cumprod": cosine}):
        save_file({**unconditional().tensors, **tables}, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=r"the noise schedule in .*model.safetensors must have even betas"):
            ud.load(tmp_path / "model.safetensors")


@pytest.mark.parametrize("table", ["betas", "alphas_cumprod"])
def test_upscaler_whose_small_images_are_noised_otherwise_is_refused(tmp_path, tokenizer, table):
    made = x4_upscaler()
    for end in (0.02, 0.012):
        scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=1e-4, beta_end=end)
        tensors = {**made.tensors, f"low_scale_model.{table}": TABLES[table](scheduler)}
        save_file(tensors, tmp_path / f"{end}.safetensors")
    ud.load(tmp_path / "0.02.safetensors", tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"tables low_scale_model.* must be those .* upscaler"):
        ud.load(tmp_path / "0.012.safetensors", tokenizer=tokenizer)


def test_half_precision_is_read_as_float32(tmp_path):
    made = unconditional()
    save_file({key: value.half() for key, value in made.tensors.items()}, tmp_path / "model.safetensors")
    ours = ud.load(tmp_path / "model.safetensors")
    assert {parameter.dtype for parameter in ours.unet.parameters()} == {torch.float32}
    assert max(differences(ours, made).values()) < 0.02  # of the rounding of the weights


def without_captions():
    tensors = sd1().tensors
    return {key: value for key, value in tensors.items() if not key.startswith(CLIP)}


UNKNOWN = [
    (without_captions, r"nearest is that of Stable Diffusion 1, but it lacks cond_stage_model.transformer"),
    (lambda: {**sd1().tensors, "control.weight": torch.ones(1)}, r"Stable Diffusion 1, but it also has control.weight"),
    (
        lambda: {
            f"model.diffusion_model.double_blocks.{i}.img_attn.norm.key_norm.scale": torch.ones(1) for i in (0, 1)
        },
        r"has the layout flux-schnell of diffusers, which is not imported",
    ),
    (lambda: {"anything": torch.ones(1)}, r"has no known layout; the nearest is that of .* also has anything"),
    (
        lambda: {**without_captions(), "cond_stage_model.transformer.attn_layers.0.weight": torch.ones(1)},
        r"layout of latent diffusion by captions, which is not imported: its text encoder is BERT's",
    ),
    (lambda: sdxl_with_a_mask(), r"Stable Diffusion XL with 9 channels in and 4 out is not imported"),
]


def sdxl_with_a_mask():
    tensors = sdxl().tensors
    key = f"{UNET}input_blocks.0.0.weight"
    return {**tensors, key: torch.cat([tensors[key], tensors[key], tensors[key][:, :1]], dim=1)}


@pytest.mark.parametrize(("make", "message"), UNKNOWN)
def test_unknown_layout_is_refused_with_the_nearest_one(make, message, tmp_path, tokenizer):
    save_file(make(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        ud.load(tmp_path / "model.safetensors", tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("make", "told", "message"),
    [
        (sd1, {}, r"tokenizer must name the folder of CLIP's tokenizer"),
        (sd2, {"tokenizer": "tokenizer"}, r"prediction_type must be given .* epsilon for the models of 512"),
        (classes, {}, r"num_heads or head_channels must be given for latent diffusion by classes"),
        (classes, {"num_heads": 1}, r"num_classes must be given for .* 10 or 11: its embedding has 11 rows"),
        (classes, {"num_heads": 1, "num_classes": 12}, r"num_classes must be given for .* 10 or 11.* got 12"),
        (sd2, {"tokenizer": "tokenizer", "prediction_type": "sample"}, r"image_size must be given .* predicts sample"),
        (unconditional_kl, {}, r"scaling_factor must be given for .* has no scale_factor"),
    ],
)
def test_what_differs_between_models_is_asked_for(make, told, message, tmp_path, tokenizer):
    tensors = {key: value for key, value in make().tensors.items() if key != "scale_factor"}
    save_file(tensors, tmp_path / "model.safetensors")
    told = {key: tmp_path / value if key == "tokenizer" else value for key, value in told.items()}
    with pytest.raises(ValueError, match=message):
        ud.load(tmp_path / "model.safetensors", **told)


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"scaling_factor": 0}, r"scaling_factor must be above 0, got 0; leave it out"),
        ({"scaling_factor": -0.18}, r"scaling_factor must be above 0, got -0.18"),
        ({"scaling_factor": float("nan")}, r"scaling_factor must be above 0, got nan"),
        ({"image_size": 0}, r"image_size must be at least 1, got 0"),
        ({"num_heads": 2, "head_channels": 32}, r"num_heads and head_channels both set .* 2 and 32; give one"),
        ({"head_channels": 24}, r"head_channels must divide the width of every level with attention, got 24 for 64"),
        ({"prediction_type": "noise"}, r"prediction_type must be one of epsilon, sample, v_prediction, got 'noise'"),
        (
            {"num_classes": 10},
            r"num_classes is for other layouts, .* without conditions; leave it out",
        ),
        ({"tokenizer": "here"}, r"tokenizer is for other layouts, and .* leave it out"),
    ],
)
def test_what_a_user_says_of_a_file_is_used_or_refused(told, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        ud.load(saved(unconditional, tmp_path).file, **told)


def test_head_channels_that_do_not_divide_are_named(tmp_path):
    made = saved(sd1, tmp_path)
    with pytest.raises(ValueError, match=r"head_channels must divide .* got 24 for 32"):
        ud.load(made.file, **made.told, head_channels=24)


def test_scale_of_a_file_must_be_above_0(tmp_path):
    save_file({**unconditional_kl().tensors, "scale_factor": torch.tensor(0.0)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"scale_factor in .*model.safetensors must be above 0, got 0"):
        ud.load(tmp_path / "model.safetensors")


def test_options_for_a_file_are_refused_for_a_folder(tmp_path):
    tiny_vae().save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match=r"image_size is for another program's weights in one file.* leave it out"):
        ud.load(tmp_path / "vae", image_size=64)


@pytest.mark.parametrize("prefix", ["", FIRST_STAGE])
@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_autoencoder_alone_is_an_autoencoder(prefix, kind, tmp_path):
    vae = tiny_vae(kind)
    save_file(autoencoder_weights(vae, prefix), tmp_path / "vae.safetensors")
    ours = ud.load(tmp_path / "vae.safetensors")
    assert ours.image_shape == (3, 256, 256)
    images = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        posterior = vae.encode(images)
        theirs = posterior.latents if kind == "vq" else posterior.latent_dist.mean
    torch.testing.assert_close(ours.encode(images), theirs, **CLOSE)


def test_codec_of_an_autoencoder_in_a_file_needs_its_scale(tmp_path):
    file = tmp_path / "vae.safetensors"
    save_file(autoencoder_weights(tiny_vae(), ""), file)
    assert pretrained_autoencoder(file).config.scaling_factor is None
    with pytest.raises(ValueError, match=r"vae.safetensors does not say by which scaling_factor"):
        LatentCodec(file).sample_shape((3, 16, 16))
    assert LatentCodec(file, scaling_factor=0.18215).sample_shape((3, 16, 16)) == (4, 8, 8)


def test_imported_file_draws_and_is_exported_as_itself(tmp_path, tokenizer, run_cli):
    """From the command line: what it assumed is printed, and the checkpoint finds its autoencoder in the file."""
    made = sd1()
    save_file(made.tensors, tmp_path / "model.safetensors")
    options = ["--tokenizer", tokenizer, "--image_size", "16"]
    status, out, err = run_cli("import", tmp_path / "model.safetensors", tmp_path / "imported.ckpt", *options)
    assert status == 0, err
    assert "layout of Stable Diffusion 1" in out
    assert "prediction_type epsilon, images of 16 pixels, 8 heads, scaling_factor 0.18215" in out
    read, expected = (
        ud.load(tmp_path / "imported.ckpt"),
        ud.load(tmp_path / "model.safetensors", tokenizer=tokenizer, image_size=16),
    )
    drawn = [model.sample(1, captions="a red cat", num_inference_steps=2, seed=1) for model in (read, expected)]
    torch.testing.assert_close(*drawn, atol=0, rtol=0)
    read.export(tmp_path / "pipeline")
    again = ud.load(tmp_path / "pipeline").sample(1, captions="a red cat", num_inference_steps=2, seed=1)
    torch.testing.assert_close(again, drawn[0], atol=1e-4, rtol=0)


def test_model_of_classes_draws_them(tmp_path):
    made = saved(classes, tmp_path)
    denoiser = ud.load(made.file, **made.told, image_size=16)
    images = denoiser.sample(2, labels=[1, 2], guidance_scale=2.0, num_inference_steps=2)
    assert images.shape == (2, 3, 16, 16)
