"""A network with tokens to attend to, beside diffusers' UNet2DConditionModel."""

import random

import pytest
import torch
from denoisers import assert_published
from diffusers import DDPMScheduler, UNet2DConditionModel, UNet2DModel
from diffusers.models import Transformer2DModel

from unet_diffusion.diffusers_io.configurations import config_from_diffusers, config_to_diffusers
from unet_diffusion.diffusers_io.exporting import to_diffusers
from unet_diffusion.diffusers_io.importing import from_diffusers, import_pipeline
from unet_diffusion.diffusion.schedule import NoiseSchedule
from unet_diffusion.models.attention import SpatialTransformer
from unet_diffusion.models.denoiser_unet import DenoiserUNet
from unet_diffusion.models.embeddings import sinusoids
from unet_diffusion.training.module import DiffusionModule

CROSS_DOWN, DOWN, CROSS_UP, UP = "CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"
STABLE_DIFFUSION_1 = {
    "_class_name": "UNet2DConditionModel",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 768,
    "down_block_types": [CROSS_DOWN, CROSS_DOWN, CROSS_DOWN, DOWN],
    "up_block_types": [UP, CROSS_UP, CROSS_UP, CROSS_UP],
    "upcast_attention": None,  # as newer files have it
}
STABLE_DIFFUSION_2 = STABLE_DIFFUSION_1 | {
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
    "upcast_attention": True,
}
UPSCALER_X4 = {
    "_class_name": "UNet2DConditionModel",
    "attention_head_dim": 8,
    "block_out_channels": [256, 512, 512, 1024],
    "cross_attention_dim": 1024,
    "down_block_types": [DOWN, CROSS_DOWN, CROSS_DOWN, CROSS_DOWN],
    "up_block_types": [CROSS_UP, CROSS_UP, CROSS_UP, UP],
    "in_channels": 7,
    "num_class_embeds": 1000,
    "only_cross_attention": [True, True, True, False],
    "use_linear_projection": True,
}
STABLE_DIFFUSION_XL = {
    "_class_name": "UNet2DConditionModel",
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": [DOWN, CROSS_DOWN, CROSS_DOWN],
    "up_block_types": [CROSS_UP, CROSS_UP, UP],
    "projection_class_embeddings_input_dim": 2816,
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
}
PUBLISHED = [  # numbers of parameters as published
    pytest.param(STABLE_DIFFUSION_1, 859_520_964, id="stable-diffusion-v1-5"),
    pytest.param(STABLE_DIFFUSION_1 | {"in_channels": 9}, 859_535_364, id="stable-diffusion-inpainting"),
    pytest.param(STABLE_DIFFUSION_2, 865_910_724, id="stable-diffusion-2-1"),
    pytest.param(UPSCALER_X4, 473_398_020, id="stable-diffusion-x4-upscaler"),
    pytest.param(STABLE_DIFFUSION_1 | {"cross_attention_dim": 1280}, 872_300_484, id="ldm-text2im-large-256"),
    pytest.param(STABLE_DIFFUSION_XL, 2_567_463_684, id="stable-diffusion-xl-base-1.0"),
]
TINY = {
    "_class_name": "UNet2DConditionModel",
    "block_out_channels": (8, 16),
    "down_block_types": (CROSS_DOWN, DOWN),
    "up_block_types": (UP, CROSS_UP),
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "cross_attention_dim": 6,
    "layers_per_block": 1,
}
REFUSED = [
    ("mid_block_type", {"mid_block_type": "UNetMidBlock2D"}),
    ("mid_block_type", {"mid_block_type": None}),
    ("down_block_types", {"down_block_types": ("SimpleCrossAttnDownBlock2D", DOWN)}),
    ("up_block_types", {"up_block_types": (CROSS_UP, UP)}),
    ("cross_attention_dim", {"cross_attention_dim": (6, 5)}),
    ("layers_per_block", {"layers_per_block": (1, 2)}),
    ("transformer_layers_per_block", {"transformer_layers_per_block": [[1, 2], 1]}),
    ("time_embedding_dim", {"time_embedding_dim": 64}),
    ("norm_num_groups", {"norm_num_groups": None}),
    ("addition_embed_type", {"addition_embed_type": "image"}),
    ("addition_time_embed_dim", {"addition_time_embed_dim": 8}),
    ("class_embed_type", {"class_embed_type": "projection"}),
    ("dual_cross_attention", {"dual_cross_attention": True}),
    ("encoder_hid_dim", {"encoder_hid_dim": 8}),
    ("conv_in_kernel", {"conv_in_kernel": 1}),
    ("time_cond_proj_dim", {"time_cond_proj_dim": 8}),
    ("attention_type", {"attention_type": "gated"}),
]
NUM_CONFIGS = 12


def random_config(rng: random.Random) -> dict:
    """A configuration of UNet2DConditionModel, drawn over every field that is supported."""
    levels = rng.randint(1, 4)
    attended = [rng.random() < 0.6 for _ in range(levels)]
    depths, cross_only = ([rng.choice(values) for _ in range(levels)] for values in ((1, 2), (True, False)))
    with_vector = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 256 + 5,
    }
    heads = [rng.choice([1, 2, 4]) for _ in range(levels)]
    return {
        "in_channels": rng.randint(1, 4),
        "out_channels": rng.randint(1, 4),
        "freq_shift": rng.choice([0, 1]),
        "flip_sin_to_cos": rng.random() < 0.5,
        "down_block_types": tuple(CROSS_DOWN if is_attended else DOWN for is_attended in attended),
        "up_block_types": tuple(CROSS_UP if is_attended else UP for is_attended in reversed(attended)),
        "block_out_channels": tuple(8 * rng.randint(1, 3) for _ in range(levels)),
        "layers_per_block": rng.randint(1, 3),
        "downsample_padding": rng.choice([0, 1]),
        "dropout": rng.choice([0.0, 0.5]),
        "act_fn": rng.choice(["silu", "swish"]),
        "attention_head_dim": rng.choice([heads[0], tuple(heads)]),
        "norm_num_groups": rng.choice([1, 2, 4]),
        "norm_eps": rng.choice([1e-6, 1e-5, 1e-2]),
        "resnet_time_scale_shift": rng.choice(["default", "scale_shift"]),
        "cross_attention_dim": rng.choice([3, 8]),
        "transformer_layers_per_block": rng.choice([depths[0], tuple(depths)]),
        "use_linear_projection": rng.random() < 0.5,
        "only_cross_attention": rng.choice([cross_only[0], tuple(cross_only)]),
        "num_class_embeds": rng.choice([None, 3]),
        "upcast_attention": rng.random() < 0.5,
        **(with_vector if rng.random() < 0.5 else {"addition_embed_type": None}),
    }


def random_size(rng: random.Random, config: dict) -> tuple[int, int]:
    if config["downsample_padding"] == 1:
        return rng.randint(1, 17), rng.randint(1, 17)
    multiple = 2 ** (len(config["block_out_channels"]) - 1)
    return multiple * rng.randint(1, 3), multiple * rng.randint(1, 3)


@torch.no_grad()
def randomise(model: torch.nn.Module) -> torch.nn.Module:
    """Move every parameter off its initial value: a norm's bias of 0 would hide a bias that is not loaded."""
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def tiny_unet(**changes) -> DenoiserUNet:
    torch.manual_seed(0)
    return randomise(DenoiserUNet(**config_from_diffusers({**TINY, **changes}))).eval()


@torch.no_grad()
def assert_same_outputs(ours: DenoiserUNet, theirs: UNet2DConditionModel, size: tuple[int, int]) -> None:
    x, t = torch.randn(3, ours.config["in_channels"], *size), torch.tensor([0.0, 333.25, 999.0])
    context = torch.randn(3, 5, ours.config["context_dim"])
    labels = None if ours.config["num_class_embeds"] is None else torch.tensor([0, 2, 1])
    vector, added = None, None
    if ours.config["vector_dim"] is not None:
        flip, shift = ours.config["flip_sin_to_cos"], ours.config["freq_shift"]
        added = {"text_embeds": torch.randn(3, 5), "time_ids": torch.tensor([[8.0], [64.0], [512.0]])}
        waves = sinusoids(added["time_ids"][:, 0], 256, flip_sin_to_cos=flip, freq_shift=shift)
        vector = torch.cat([added["text_embeds"], waves], dim=1)
    expected = theirs(x, t, context, class_labels=labels, added_cond_kwargs=added).sample
    # float32 rounding: the same operations, fused or ordered otherwise
    torch.testing.assert_close(ours(x, t, labels, context, vector), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("seed", range(NUM_CONFIGS))
def test_network_agrees_with_diffusers_there_and_back(seed):
    torch.manual_seed(seed)
    rng = random.Random(seed)
    config = random_config(rng)
    theirs = randomise(UNet2DConditionModel(**config)).eval()
    ours, size = from_diffusers(theirs), random_size(rng, config)
    assert_same_outputs(ours, theirs, size)
    back = to_diffusers(ours)
    assert_same_outputs(ours, back, size)
    assert from_diffusers(back).config == ours.config
    assert theirs.config.dropout == ours.config["dropout"] == back.config.dropout  # eval mode does not show it


def test_random_configurations_cover_every_supported_field():
    configs = [random_config(random.Random(seed)) for seed in range(NUM_CONFIGS)]
    for field in configs[0].keys() - {"addition_time_embed_dim", "projection_class_embeddings_input_dim"}:
        assert len({config[field] for config in configs}) > 1, field


@pytest.mark.parametrize(("config", "count"), PUBLISHED)
def test_published_configurations_have_the_weights_of_diffusers(config, count):
    assert_published(UNet2DConditionModel, config, count)


@pytest.mark.parametrize(("field", "changes"), REFUSED)
def test_unsupported_configuration_is_refused_by_the_name_of_its_field(field, changes):
    with pytest.raises(ValueError, match=rf"\b{field}\b"):
        config_from_diffusers({**TINY, **changes})


@pytest.mark.parametrize(
    ("name", "options"),
    [("resample", {"resample": "resnet"}), ("mid_attention", {"mid_attention": False})],
)
def test_network_that_diffusers_lacks_is_refused_by_the_name_of_the_argument(name, options):
    unet = DenoiserUNet(3, (8, 16), context_dim=6, norm_num_groups=4, **options)
    with pytest.raises(ValueError, match=name):
        to_diffusers(unet)


def test_vector_without_tokens_has_no_counterpart():
    with pytest.raises(ValueError, match="vector_dim 5"):
        config_to_diffusers(DenoiserUNet(3, (8,), vector_dim=5, norm_num_groups=4).config)


def test_folder_of_the_network_is_imported(tmp_path):
    theirs = randomise(UNet2DConditionModel(**{key: value for key, value in TINY.items() if key[0] != "_"})).eval()
    theirs.save_pretrained(tmp_path)
    assert_same_outputs(from_diffusers(tmp_path), theirs, (7, 5))


def test_folder_of_the_network_is_no_pipeline_that_needs_noise_alone(tmp_path):
    to_diffusers(tiny_unet(), 8).save_pretrained(tmp_path / "unet")
    DDPMScheduler().save_pretrained(tmp_path / "scheduler")
    with pytest.raises(ValueError, match=r"UNet2DConditionModel.*from_diffusers"):
        import_pipeline(tmp_path)


def test_every_parameter_receives_gradient():
    model = tiny_unet(only_cross_attention=[True, False], transformer_layers_per_block=2).train()
    model(torch.randn(2, 4, 8, 8), torch.tensor([10, 900]), context=torch.randn(2, 3, 6)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 1e-7, name


def test_output_depends_on_every_token_and_not_on_their_order():
    model, x, t = tiny_unet(), torch.randn(1, 4, 8, 8), torch.tensor([500])
    tokens = torch.randn(1, 3, 6)
    expected = model(x, t, context=tokens)
    for position in range(3):
        changed = tokens.clone()
        changed[:, position] += 1
        assert (model(x, t, context=changed) - expected).abs().max() > 1e-4, position
    torch.testing.assert_close(model(x, t, context=tokens[:, [2, 0, 1]]), expected, atol=1e-5, rtol=1e-5)


def test_pixels_that_attend_to_the_context_only_do_not_see_each_other():
    torch.manual_seed(0)
    alone = randomise(SpatialTransformer(8, 2, context_dim=6, norm_num_groups=8, cross_only=True))
    alone.norm = torch.nn.Identity()  # it averages over pixels
    x, context = torch.randn(1, 8, 2, 2), torch.randn(1, 3, 6)
    changed = x.clone()
    changed[..., 0, 0] += 1
    same = alone(x, None, context) == alone(changed, None, context)
    assert not same[..., 0, 0].any()
    assert same.flatten(2)[..., 1:].all()


@pytest.mark.parametrize("linear", [True, False])
def test_spatial_transformer_is_that_of_diffusers_in_bfloat16_too(linear):
    torch.manual_seed(0)
    ours = randomise(SpatialTransformer(8, 2, context_dim=6, depth=2, norm_num_groups=4, linear_projection=linear))
    theirs = Transformer2DModel(
        2, 4, 8, num_layers=2, cross_attention_dim=6, norm_num_groups=4, use_linear_projection=linear
    )
    theirs.load_state_dict(ours.state_dict())
    x, context = torch.randn(2, 8, 3, 5), torch.randn(2, 4, 6)
    expected = theirs(x, encoder_hidden_states=context).sample
    torch.testing.assert_close(ours(x, None, context), expected, atol=1e-5, rtol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        low = ours(x, None, context)
    assert (low - expected).norm() < 0.02 * expected.norm()  # bfloat16 rounds to 1 in 256


def test_fresh_network_predicts_zero_and_its_transformers_change_nothing():
    model = DenoiserUNet(3, (8, 16), norm_num_groups=4, attention_levels=(0, 1), context_dim=6)
    context = torch.randn(1, 2, 6)
    assert not model(torch.randn(1, 3, 8, 8), torch.tensor([3]), context=context).any()
    x = torch.randn(1, 8, 4, 4)
    assert torch.equal(model.down_blocks[0].attentions[0](x, None, context), x)


def test_config_rebuilds_the_network():
    model = tiny_unet(only_cross_attention=[True, False], attention_head_dim=(2, 4), num_class_embeds=3)
    again = DenoiserUNet(**model.config).eval()
    again.load_state_dict(model.state_dict())
    arguments = torch.randn(1, 4, 7, 9), torch.tensor([3]), torch.tensor([2]), torch.randn(1, 2, 6)
    assert torch.equal(again(*arguments), model(*arguments))


@pytest.mark.parametrize(
    ("message", "conditions"),
    [
        (r"context_dim 6 and takes context of shape \(B, L, 6\), got none", {}),
        (r"context_dim 6.*got shape \(1, 6\)", {"context": torch.zeros(1, 6)}),
        (r"context_dim 6.*context of shape.*\(1, 2, 5\)", {"context": torch.zeros(1, 2, 5)}),
        (r"takes no vector.*\(1, 4\)", {"context": torch.zeros(1, 2, 6), "vector": torch.zeros(1, 4)}),
    ],
)
def test_conditions_are_wanted_exactly_if_the_network_takes_them(message, conditions):
    with pytest.raises(ValueError, match=message):
        tiny_unet()(torch.zeros(1, 4, 8, 8), torch.tensor([0]), **conditions)


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("num_heads.*without context_dim", {"num_heads": 2}),
        ("linear_projection.*without context_dim", {"linear_projection": True}),
        ("num_heads 2 and head_channels 4", {"context_dim": 6, "num_heads": 2, "head_channels": 4}),
        (r"num_heads must be.*2 positive numbers, one for each level, got \[2\]", {"context_dim": 6, "num_heads": [2]}),
        ("transformer_depth must be.*got 0", {"context_dim": 6, "transformer_depth": 0}),
        ("num_heads 3, got 16", {"context_dim": 6, "num_heads": 3}),
        ("cross_only_levels.*got 2", {"context_dim": 6, "cross_only_levels": [2]}),
    ],
)
def test_impossible_arguments_are_refused(message, options):
    with pytest.raises(ValueError, match=message):
        DenoiserUNet(3, (8, 16), norm_num_groups=4, **options)


def test_odd_sizes_are_for_networks_with_tokens_as_in_diffusers():
    assert tiny_unet().next_size(13) == 13
    assert DenoiserUNet(3, (8, 16), norm_num_groups=4).next_size(13) == 14
    with torch.device("meta"), pytest.raises(RuntimeError, match="Sizes of tensors"):
        UNet2DModel()(torch.zeros(1, 3, 13, 13), 0)


def test_a_network_with_tokens_is_not_trained_without_any():
    with pytest.raises(ValueError, match="must be the same, got"):
        DiffusionModule(tiny_unet(), NoiseSchedule())
