import json
import random
import shutil

import diffusers
import pytest
import torch
from denoisers import assert_published
from diffusers import DDPMPipeline, DDPMScheduler, EulerDiscreteScheduler, UNet1DModel, UNet2DModel
from safetensors.torch import load_file, save_file

from unet_diffusion.diffusers_io.configurations import config_from_diffusers, schedule_from_diffusers
from unet_diffusion.diffusers_io.exporting import to_diffusers
from unet_diffusion.diffusers_io.importing import from_diffusers, import_pipeline
from unet_diffusion.diffusers_io.segmenter_folder import read_segmenter_folder
from unet_diffusion.models.denoiser_unet import DenoiserUNet

CIFAR10_32 = {
    "attention_head_dim": None,
    "block_out_channels": [128, 256, 256, 256],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
    "sample_size": 32,
}
DDPM_256 = CIFAR10_32 | {
    "block_out_channels": [128, 128, 256, 256, 512, 512],
    "down_block_types": ["DownBlock2D"] * 4 + ["AttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D"] + ["UpBlock2D"] * 4,
    "sample_size": 256,
}
LDM_CELEBAHQ_256 = {
    "attention_head_dim": 32,
    "block_out_channels": [224, 448, 672, 896],
    "down_block_types": ["DownBlock2D"] + ["AttnDownBlock2D"] * 3,
    "up_block_types": ["AttnUpBlock2D"] * 3 + ["UpBlock2D"],
    "sample_size": 64,
}
CONSISTENCY_IMAGENET_64 = {
    "attention_head_dim": 64,
    "attn_norm_num_groups": 32,
    "block_out_channels": [192, 384, 576, 768],
    "down_block_types": ["ResnetDownsampleBlock2D"] + ["AttnDownBlock2D"] * 3,
    "up_block_types": ["AttnUpBlock2D"] * 3 + ["ResnetUpsampleBlock2D"],
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "layers_per_block": 3,
    "num_class_embeds": 1000,
    "resnet_time_scale_shift": "scale_shift",
    "sample_size": 64,
}
PUBLISHED = [  # parameters as published, or counted in diffusers' own model
    (CIFAR10_32, 35_746_307),
    (DDPM_256, 113_673_219),
    (LDM_CELEBAHQ_256, 274_056_163),
    (CONSISTENCY_IMAGENET_64, 295_899_267),
]
TINY = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 4,
    "attention_head_dim": 8,
    "layers_per_block": 1,
    "sample_size": 8,
}
REFUSED = [
    ("center_input_sample", {"center_input_sample": True}),
    ("time_embedding_type", {"time_embedding_type": "fourier"}),
    ("time_embedding_type", {"time_embedding_type": "learned", "num_train_timesteps": 1000}),
    ("time_embedding_dim", {"time_embedding_dim": 64}),
    ("class_embed_type", {"class_embed_type": "timestep"}),
    ("class_embed_type", {"class_embed_type": "identity"}),
    ("act_fn", {"act_fn": "gelu"}),
    ("mid_block_scale_factor", {"mid_block_scale_factor": 2**0.5}),
    ("mid_block_type", {"mid_block_type": None}),
    ("downsample_padding", {"downsample_padding": 2}),
    ("resnet_time_scale_shift", {"resnet_time_scale_shift": "ada_group"}),
    ("norm_num_groups", {"norm_num_groups": None}),
    ("attn_norm_num_groups", {"attn_norm_num_groups": 2}),
    ("attn_norm_num_groups", {"resnet_time_scale_shift": "scale_shift"}),
    ("attention_head_dim", {"attention_head_dim": 5}),
    ("down_block_types", {"down_block_types": ("SkipDownBlock2D", "AttnDownBlock2D")}),
    ("up_block_types", {"up_block_types": ("AttnUpBlock2D", "SkipUpBlock2D")}),
    ("up_block_types", {"up_block_types": ("UpBlock2D", "AttnUpBlock2D")}),
    ("up_block_types", {"up_block_types": ("AttnUpBlock2D",)}),
    ("down_block_types", {"block_out_channels": (8, 16, 16)}),
    ("downsample_type", {"down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D")}),
    ("upsample_type", {"upsample_type": "resnet"}),
    ("_class_name", {"_class_name": "UNet3DConditionModel"}),
]


NUM_CONFIGS = 12


def random_config(rng: random.Random) -> dict:
    """A configuration of UNet2DModel, drawn over every field that is supported."""
    levels = rng.randint(1, 4)
    groups, head_dim = rng.choice([1, 2, 4]), rng.choice([None, 4, 8])
    scale_shift, kind = rng.random() < 0.5, rng.choice(["conv", "resnet"])
    plain_down, plain_up = {
        "conv": ("DownBlock2D", "UpBlock2D"),
        "resnet": ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"),
    }[kind]
    attended = [rng.random() < 0.5 for _ in range(levels)]
    down = ["AttnDownBlock2D" if is_attended else plain_down for is_attended in attended]
    up = ["AttnUpBlock2D" if is_attended else plain_up for is_attended in reversed(attended)]
    if not attended[-1]:  # the last block does not resample, so any kind will do
        down[-1] = rng.choice(["DownBlock2D", "ResnetDownsampleBlock2D", "UNetResDownBlock2D"])
    if not attended[0]:
        up[-1] = rng.choice(["UpBlock2D", "ResnetUpsampleBlock2D", "UNetResUpBlock2D"])
    sides = tuple(rng.choice([1, 2, 3]) * 2 ** (levels - 1) for _ in range(2))
    channels = rng.randint(1, 4)
    return {
        "sample_size": sides,
        "in_channels": channels,
        "out_channels": rng.choice([channels, 2 * channels]),
        "time_embedding_dim": None,
        "freq_shift": rng.choice([0, 1]),
        "flip_sin_to_cos": rng.random() < 0.5,
        "down_block_types": tuple(down),
        "up_block_types": tuple(up),
        "block_out_channels": tuple(8 * rng.randint(1, 3) for _ in range(levels)),
        "layers_per_block": rng.randint(1, 3),
        "downsample_padding": rng.choice([0, 1]),
        "downsample_type": kind,
        "upsample_type": kind,
        "dropout": rng.choice([0.0, 0.5]),
        "act_fn": rng.choice(["silu", "swish"]),
        "attention_head_dim": head_dim,
        "norm_num_groups": groups,
        "attn_norm_num_groups": groups if scale_shift else rng.choice([None, groups]),
        "norm_eps": rng.choice([1e-6, 1e-5, 1e-2]),
        "resnet_time_scale_shift": "scale_shift" if scale_shift else "default",
        "add_attention": rng.random() < 0.7,
        "num_class_embeds": rng.choice([None, 3]),
    }


@torch.no_grad()
def randomise(model: torch.nn.Module) -> torch.nn.Module:
    """Move every parameter off its initial value: a norm's bias of 0 would hide a bias that is not loaded."""
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def tiny_unet2d(**changes) -> UNet2DModel:
    return randomise(UNet2DModel(**{**TINY, **changes})).eval()


@torch.no_grad()
def assert_same_outputs(ours: DenoiserUNet, theirs: UNet2DModel) -> None:
    size = theirs.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    x = torch.randn(3, ours.config["in_channels"], height, width)
    t = torch.tensor([0.0, 333.25, 999.0])
    labels = None if ours.config["num_class_embeds"] is None else torch.tensor([0, 2, 1])
    # float32 rounding: the same operations, fused or ordered otherwise
    torch.testing.assert_close(ours(x, t, labels), theirs(x, t, labels).sample, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("seed", range(NUM_CONFIGS))
def test_network_agrees_with_diffusers_there_and_back(seed):
    torch.manual_seed(seed)
    theirs = randomise(UNet2DModel(**random_config(random.Random(seed)))).eval()
    ours = from_diffusers(theirs)
    assert_same_outputs(ours, theirs)
    back = to_diffusers(ours, sample_size=theirs.config.sample_size)
    assert_same_outputs(ours, back)
    assert from_diffusers(back).config == ours.config
    assert theirs.config.dropout == ours.config["dropout"] == back.config.dropout  # eval mode does not show it


def test_random_configurations_cover_every_supported_field():
    configs = [random_config(random.Random(seed)) for seed in range(NUM_CONFIGS)]
    for field in configs[0].keys() - {"time_embedding_dim"}:
        assert len({config[field] for config in configs}) > 1, field


@pytest.mark.parametrize(("config", "count"), PUBLISHED)
def test_published_configurations_have_the_weights_of_diffusers(config, count):
    assert_published(UNet2DModel, config, count)


@pytest.mark.parametrize(("field", "changes"), REFUSED)
def test_unsupported_configuration_is_refused_by_the_name_of_its_field(field, changes):
    with pytest.raises(ValueError, match=rf"\b{field}\b"):
        config_from_diffusers({**TINY, **changes})


def test_network_of_another_class_is_refused():
    with torch.device("meta"), pytest.raises(ValueError, match="UNet1DModel"):
        from_diffusers(UNet1DModel())
    with pytest.raises(ValueError, match="Linear"):
        to_diffusers(torch.nn.Linear(1, 1))


def test_unknown_field_is_warned_about_and_ignored():
    with pytest.warns(UserWarning, match="colour"):
        assert config_from_diffusers({**TINY, "colour": "red"}) == config_from_diffusers(TINY)


def test_private_fields_are_ignored_silently(recwarn):
    config_from_diffusers({**TINY, "_diffusers_version": "0.0.4", "_name_or_path": "x"})
    assert not recwarn.list


def test_missing_fields_take_the_defaults_of_diffusers():
    with torch.device("meta"):
        theirs = UNet2DModel()
    assert config_from_diffusers({}) == config_from_diffusers(theirs.config)


def test_unet_folder_is_imported(tmp_path):
    theirs = tiny_unet2d()
    theirs.save_pretrained(tmp_path)
    assert_same_outputs(from_diffusers(tmp_path), theirs)
    assert_same_outputs(from_diffusers(str(tmp_path)), theirs)


def test_pipeline_folder_is_imported(tmp_path):
    theirs = tiny_unet2d()
    DDPMPipeline(theirs, DDPMScheduler()).save_pretrained(tmp_path)
    assert_same_outputs(from_diffusers(tmp_path), theirs)


def test_imported_network_is_float32_in_eval_mode(tmp_path):
    tiny_unet2d(dropout=0.5).half().save_pretrained(tmp_path)
    ours = from_diffusers(tmp_path)
    assert not ours.training
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float32}


def test_pickled_weights_are_imported(tmp_path):
    theirs = tiny_unet2d()
    theirs.save_pretrained(tmp_path, safe_serialization=False)
    assert not list(tmp_path.glob("*.safetensors"))
    assert_same_outputs(from_diffusers(tmp_path), theirs)


def test_pickled_weights_of_the_oldest_format_are_imported(tmp_path):
    theirs = tiny_unet2d()
    theirs.save_config(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.bin"
    torch.save(theirs.state_dict(), file, _use_new_zipfile_serialization=False)
    assert_same_outputs(from_diffusers(tmp_path), theirs)


@pytest.mark.parametrize("safe_serialization", [True, False])
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_sharded_weights_are_imported(tmp_path, safe_serialization, variant):
    theirs = tiny_unet2d()
    options = {"safe_serialization": safe_serialization, "variant": variant}
    theirs.save_pretrained(tmp_path, max_shard_size="20KB", **options)
    assert len(list(tmp_path.glob("*-of-*"))) > 1
    assert_same_outputs(from_diffusers(tmp_path), theirs)


def test_shards_of_a_variant_under_their_old_names_are_imported(tmp_path):
    theirs = tiny_unet2d()
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    for shard in tmp_path.glob("*-of-*.safetensors"):
        shard.rename(shard.with_suffix(".fp16.safetensors"))
    assert_same_outputs(from_diffusers(tmp_path), theirs)


def test_half_precision_variant_is_imported_where_there_is_no_other(tmp_path):
    theirs = tiny_unet2d().half()
    theirs.save_pretrained(tmp_path, variant="fp16")
    assert_same_outputs(from_diffusers(tmp_path), theirs.float())


def test_full_precision_is_preferred_to_a_variant(tmp_path):
    theirs = tiny_unet2d()
    tiny_unet2d().save_pretrained(tmp_path, variant="fp16")
    theirs.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    assert_same_outputs(from_diffusers(tmp_path), theirs)


def test_one_of_several_variants_is_not_chosen_silently(tmp_path):
    tiny_unet2d().save_pretrained(tmp_path, variant="fp16")
    tiny_unet2d().save_pretrained(tmp_path, variant="non_ema")
    with pytest.raises(ValueError, match=r"fp16.*non_ema"):
        from_diffusers(tmp_path)


def test_leftover_shards_are_not_mixed_in(tmp_path):
    theirs = tiny_unet2d()
    theirs.save_pretrained(tmp_path)
    shutil.copy(
        tmp_path / "diffusion_pytorch_model.safetensors",
        tmp_path / "diffusion_pytorch_model-00001-of-00002.safetensors",
    )
    with pytest.raises(ValueError, match="each weight once"):
        from_diffusers(tmp_path)


@pytest.mark.parametrize("shards", [1, 2])
def test_old_names_of_attention_and_blocks_are_imported(tmp_path, shards):
    theirs = tiny_unet2d()
    theirs.save_pretrained(tmp_path, max_shard_size="10GB" if shards == 1 else "60KB")
    for file in tmp_path.glob("*.safetensors"):
        save_file({old_name(key): value for key, value in load_file(file).items()}, file)
    config = json.loads((tmp_path / "config.json").read_text())
    for field in ("down_block_types", "up_block_types"):
        config[field] = ["UNetRes" + name for name in config[field]]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_same_outputs(from_diffusers(tmp_path), theirs)


def old_name(key: str) -> str:
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        key = key.replace(f".{new}.", f".{old}.")
    return key


def test_weights_of_another_network_are_refused(tmp_path):
    tiny_unet2d().save_pretrained(tmp_path)
    tiny_unet2d(layers_per_block=2).save_config(tmp_path)
    with pytest.raises(ValueError, match=r"down_blocks\.0\.resnets\.1"):
        from_diffusers(tmp_path)


def test_missing_weight_is_refused(tmp_path):
    tiny_unet2d().save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights["conv_norm_out.bias"]
    save_file(weights, file)
    with pytest.raises(ValueError, match=r"conv_norm_out\.bias"):
        from_diffusers(tmp_path)


def test_damaged_weights_are_refused_by_the_name_of_their_file(tmp_path):
    tiny_unet2d().save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])  # a download that was cut off
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.safetensors is damaged"):
        from_diffusers(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    file.rename(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        read_segmenter_folder(tmp_path)


def test_folder_without_network_or_weights_says_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        from_diffusers(tmp_path)
    tiny_unet2d().save_config(tmp_path)
    with pytest.raises(FileNotFoundError, match="diffusion_pytorch_model"):
        from_diffusers(tmp_path)


def test_pickle_with_code_is_refused_and_the_code_not_run(tmp_path, code):
    tiny_unet2d().save_config(tmp_path)
    torch.save({"conv_in.weight": code(tmp_path / "ran")}, tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="could run code"):
        from_diffusers(tmp_path)
    assert not (tmp_path / "ran").exists()


def save_pipeline(folder, unet=None, **scheduler_fields) -> None:
    DDPMPipeline(unet or tiny_unet2d(), DDPMScheduler(**scheduler_fields)).save_pretrained(folder)


def test_pipeline_is_imported_with_its_schedule_and_image_shape(tmp_path):
    fields = {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "prediction_type": "v_prediction"}
    save_pipeline(tmp_path, tiny_unet2d(in_channels=1, out_channels=1, sample_size=(8, 4)), **fields)
    trained = import_pipeline(tmp_path)
    assert trained.sample_shape == (1, 8, 4)
    assert trained.null_label is None
    assert trained.class_names is None
    assert {key: trained.schedule.config[key] for key in fields} == fields
    assert torch.equal(trained.schedule.alphas_cumprod, DDPMScheduler(**fields).alphas_cumprod)


def test_flat_repository_is_imported_as_a_pipeline(tmp_path):
    theirs = tiny_unet2d()
    theirs.save_pretrained(tmp_path)
    DDPMScheduler(beta_end=0.03).save_pretrained(tmp_path)
    trained = import_pipeline(tmp_path)
    assert trained.schedule.beta_end == 0.03
    assert_same_outputs(trained.unet, theirs)


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler", "PNDMScheduler"])
def test_schedule_of_another_scheduler_is_that_of_its_class(name):
    scheduler = getattr(diffusers, name)()
    schedule = schedule_from_diffusers({"_class_name": name})
    torch.testing.assert_close(schedule.alphas_cumprod, scheduler.alphas_cumprod)


def test_zero_terminal_snr_is_imported():
    config = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    assert schedule_from_diffusers(config).alphas_cumprod[-1] == 0


@pytest.mark.parametrize(
    ("field", "config"),
    [
        ("trained_betas", {"trained_betas": [0.1, 0.2]}),
        ("variance_type", {"variance_type": "learned_range"}),
        ("variance_type", {"variance_type": "learned"}),
        ("beta_schedule", {"beta_schedule": "sigmoid"}),
        ("prediction_type", {"prediction_type": "flow_prediction"}),
        ("use_flow_sigmas", {"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}),
        ("snr_shift_scale", {"_class_name": "CogVideoXDDIMScheduler"}),
        ("_class_name", {"_class_name": "FlowMatchEulerDiscreteScheduler"}),
        ("_class_name", {"_class_name": "NoSuchScheduler"}),
    ],
)
def test_unsupported_scheduler_is_refused_by_the_name_of_its_field(field, config):
    with pytest.raises(ValueError, match=rf"\b{field}\b"):
        schedule_from_diffusers(config)


def test_pipeline_without_scheduler_or_size_says_what_is_missing(tmp_path):
    tiny_unet2d(sample_size=None).save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"scheduler_config\.json"):
        import_pipeline(tmp_path)
    EulerDiscreteScheduler().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="sample_size"):
        import_pipeline(tmp_path)


@pytest.mark.parametrize(
    ("part", "error", "message"),
    [
        ("vqvae", FileNotFoundError, "vqvae must be a local diffusers folder"),
        (
            "text_encoder",
            ValueError,
            "from captions or class tokens to images must have a UNet2DConditionModel, got a UNet2DModel",
        ),
        ("bert", ValueError, "got also bert"),
    ],
)
def test_pipeline_of_more_parts_is_not_taken_for_one_in_pixel_space(tmp_path, part, error, message):
    save_pipeline(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    index[part] = ["somewhere", "Something"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(error, match=message):
        import_pipeline(tmp_path)
