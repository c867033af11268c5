import pytest
import torch

from unet_diffusion.evaluation import own_features as own
from unet_diffusion.evaluation.features import features_named
from unet_diffusion.evaluation.own_features import FeatureNetwork, own_features
from unet_diffusion.evaluation.selections import of_images


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setitem(own.SETTINGS, "num_steps", 3)


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize(
    "shape", [(1, 8, 8), (2, 9, 13), (3, 32, 32), (5, 40, 64), (4, 100, 70), (1, 300, 260), (1, 2, 2), (1, 1, 1)]
)
def test_features_are_made_of_any_channels_and_sizes(shape):
    network = FeatureNetwork(shape)
    assert network(noise(3, *shape)).shape == (3, 64)


def test_features_have_mean_0_and_variance_1_over_the_training_images():
    images = of_images(noise(40, 2, 8, 8))
    network, _ = own_features(images, None, progress=False)
    features = network(images.take(range(40)))
    torch.testing.assert_close(features.mean(0), torch.zeros(64), atol=1e-4, rtol=0)
    torch.testing.assert_close(features.std(0), torch.ones(64), atol=1e-4, rtol=0)


@pytest.mark.parametrize("labels", [None, torch.arange(40) % 3])
def test_network_is_trained_once_for_the_same_images_and_settings(tmp_path, monkeypatch, labels):
    images, state = noise(40, 1, 8, 8), torch.get_rng_state()
    first, key = own_features(of_images(images, labels), tmp_path, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert [path.name for path in tmp_path.iterdir()] == [f"features-{key}.safetensors"]
    again, _ = own_features(of_images(images, labels), None, progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(own, "_train", lambda *arguments: pytest.fail("trained again"))
        read, same = own_features(of_images(images, labels), tmp_path, progress=False)
    assert same == key
    for other in (again, read):
        assert torch.equal(other(images), first(images))
    changed = images.clone()
    changed[7, 0, 0, 0] += 0.1
    others = [of_images(changed, labels), of_images(images, torch.arange(40) % 4)]
    monkeypatch.setitem(own.SETTINGS, "num_steps", 2)
    others.append(of_images(images, labels))
    keys = {own_features(one, tmp_path, progress=False)[1] for one in others}
    assert len({key, *keys}) == 4


def test_every_weight_of_the_network_is_trained():
    network = FeatureNetwork((1, 8, 8), num_classes=3)
    images, labels = noise(10, 1, 8, 8), torch.arange(10) % 3
    own._loss(network, images, labels, torch.Generator().manual_seed(0)).backward()
    assert [name for name, weight in network.named_parameters() if not weight.grad.abs().sum() > 0] == []


def test_shifted_images_hold_the_pixels_of_the_image():
    images = torch.arange(16.0).reshape(1, 1, 4, 4).repeat(50, 1, 1, 1)
    shifted = own._shifted(images, torch.Generator().manual_seed(0))
    assert {tuple(image.flatten().tolist()) for image in shifted} >= {tuple(range(16))}
    inner = shifted[:, 0, 1:3, 1:3]
    moves = {(image[0, 0] - 5).item() for image in inner}
    assert moves == {y * 4 + x for y in (-1, 0, 1) for x in (-1, 0, 1)}
    torch.testing.assert_close(inner[:, 1, 1] - inner[:, 0, 0], torch.full((50,), 5.0))


def test_weights_are_asked_for_and_nothing_is_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *arguments, **options: pytest.fail("downloaded"))
    images = of_images(noise(4, 3, 8, 8))
    with pytest.raises(FileNotFoundError, match=r"needs the weights of torch-fidelity.*features_weights"):
        features_named("inception", None, images, None)
    with pytest.raises(FileNotFoundError, match=r"there is no none\.pth"):
        features_named("inception", "none.pth", images, None)
    for name in ("dinov2", "clip"):
        with pytest.raises(FileNotFoundError, match="give its folder, or its name on the hub, with features_weights"):
            features_named(name, None, images, None)
    with pytest.raises(ValueError, match="features_weights is for pretrained features"):
        features_named("own", "weights.pth", images, None)


def test_weights_of_inception_run_no_code(tmp_path, code):
    torch.save(code(tmp_path / "ran"), tmp_path / "weights.pth")
    with pytest.raises(Exception, match="Weights only load failed"):
        features_named("inception", str(tmp_path / "weights.pth"), of_images(noise(4, 3, 8, 8)), None)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("name", ["dinov2", "clip"])
def test_features_of_transformers_are_read_from_a_folder(tmp_path, name, channels):
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 224, "patch_size": 28}
    if name == "dinov2":
        model = transformers.Dinov2Model(transformers.Dinov2Config(**small))
    else:
        config = transformers.CLIPVisionConfig(**small, intermediate_size=16, projection_dim=16)
        model = transformers.CLIPVisionModelWithProjection(config)
    model.save_pretrained(tmp_path)
    images = of_images(noise(3, channels, 8, 8))
    features = features_named(name, str(tmp_path), images, None)
    assert features.of(images, progress=False).shape == (3, 16)
    assert name in features.about
    assert "bicubic" in features.about


def test_pretrained_features_refuse_images_of_other_channels(tmp_path):
    from unet_diffusion.evaluation.features import _as_rgb

    with pytest.raises(ValueError, match="1, 3 or 4 channels, got 2; take features own"):
        _as_rgb(noise(1, 2, 8, 8))
