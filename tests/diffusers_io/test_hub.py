"""Models pushed to the hub and loaded from it by name, against a stand-in of the hub on this machine."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from denoisers import save_stable_diffusion
from diffusers import AutoencoderKL, StableDiffusionPipeline
from hub import TOKEN, serve
from huggingface_hub import ModelCard, constants
from PIL import Image
from single_files import saved, sd1, tiny_text
from torch import nn

import unet_diffusion as ud
from unet_diffusion.diffusers_io.publishing import completed_card, publish
from unet_diffusion.diffusion.conditions.semantic_map import SemanticMap
from unet_diffusion.diffusion.schedule import NoiseSchedule
from unet_diffusion.runtime.addresses import is_hub_name
from unet_diffusion.runtime.hub import check_hub_name
from unet_diffusion.runtime.pixel_values import PixelValues

NAME = "someone/model"
ADDRESS = "/{repo_id}/resolve/{revision}/{filename}"


@pytest.fixture(scope="module")
def server():
    with serve() as hub:
        yield hub


@pytest.fixture
def hub(server, tmp_path, monkeypatch):
    """The hub of this process, with an empty cache and a token."""
    monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{server.endpoint}{ADDRESS}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.chdir(tmp_path)
    return server


def denoiser() -> ud.Denoiser:
    torch.manual_seed(0)
    unet = ud.DenoiserUNet(1, (8, 16), norm_num_groups=4)
    settings = {"model": {"optimizer": {"lr": 0.001}}}
    return ud.Denoiser(unet=unet.eval(), schedule=NoiseSchedule(50), sample_shape=(1, 8, 8), settings=settings)


def segmenter() -> ud.Segmenter:
    torch.manual_seed(0)
    unet = ud.SegmentationUNet(1, 2, channels=(4, 8), padding="same", norm="batch").eval()
    options = {"timestep": None, "stretch": True, "window_size": 32, "threshold": 0.4, "min_size": 7}
    return ud.Segmenter(unet=unet, kind="binary", class_names=["background", "cell"], **options)


def test_run_is_pushed_with_its_card_and_loaded_by_its_name(hub, run_cli, tmp_path):
    run = tmp_path / "run"
    denoiser().save(run / "checkpoints" / "last.ckpt")
    (run / "samples.png").write_bytes(b"a picture")
    figure = {"title": "Fréchet distance", "value": 12.5, "interval": [11.0, 14.0], "better": "lower"}
    (run / "evaluation").mkdir()
    (run / "evaluation" / "evaluation.json").write_text(json.dumps({"figures": {"fd": figure}}))
    options = ["--push_to_hub", NAME, "--license", "apache-2.0", "--private"]
    status, *written = run_cli("export", run, tmp_path / "pipeline", *options)
    assert status == 0, written
    assert f"pushed to {hub.endpoint}/{NAME}" in written[0]
    assert NAME in hub.private
    files = hub.repositories[NAME][-1]
    assert files["pictures/samples.png"] == b"a picture"
    weights = tmp_path / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors"
    assert files["unet/diffusion_pytorch_model.safetensors"] == weights.read_bytes()
    card = ModelCard(files["README.md"].decode())
    head = card.data.to_dict()
    assert (head["license"], head["library_name"]) == ("apache-2.0", "diffusers")
    assert {"image-generation", "unconditional", "unet-diffusion"} <= {*card.data.tags}
    for words in (f'from_pretrained("{NAME}")', "lr: 0.001", "| Fréchet distance | 12.5 | 11 to 14 | lower |",
                  "(pictures/samples.png)", "## Licence\napache-2.0"):  # fmt: skip
        assert words in card.text
    assert_nothing_holds_the_token(written, tmp_path, hub)

    # In a process of its own, as huggingface_hub reads its settings when it is imported.
    code = f"import unet_diffusion as ud; ud.load({NAME!r}).save('again.ckpt'); print(ud.load('hf://{NAME}'))"
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    ours, again = denoiser().unet.state_dict(), ud.load(tmp_path / "again.ckpt").unet.state_dict()
    assert all(torch.equal(value, again[key]) for key, value in ours.items())
    assert_nothing_holds_the_token([done.stdout, done.stderr], tmp_path, hub)


def assert_nothing_holds_the_token(printed, folder, hub):
    assert TOKEN not in "".join(printed)
    written = [path for path in folder.rglob("*") if path.is_file()]
    assert not [path for path in written if TOKEN.encode() in path.read_bytes()]
    assert not [path for commits in hub.repositories.values() for files in commits
                for path, content in files.items() if TOKEN.encode() in content]  # fmt: skip


def test_segmenter_is_pushed_and_imported_at_a_revision(hub, run_cli, tmp_path):
    name = "someone/cells"
    segmenter().save(tmp_path / "cells.ckpt")
    status, _, err = run_cli("export", tmp_path / "cells.ckpt", tmp_path / "folder", "--push_to_hub", name)
    assert status == 0, err
    first, _ = hub.files(name, "main")
    card = ModelCard(hub.repositories[name][-1]["README.md"].decode())
    assert "image-segmentation" in card.data.tags
    assert f'ud.load("{name}")' in card.text
    hub.commit(name, {"config.json": b"{}"})  # a later commit, which is not wanted
    status, _, err = run_cli("import", name, tmp_path / "imported.ckpt", "--revision", first)
    assert status == 0, err
    image = torch.rand(1, 16, 16) * 2 - 1
    expected = segmenter().segment(image).probabilities
    assert (ud.load(tmp_path / "imported.ckpt").segment(image).probabilities == expected).all()
    status, _, err = run_cli("import", name, tmp_path / "other.ckpt", "--revision", "nowhere")
    assert status != 0
    assert "someone/cells on the hub has no revision nowhere" in err


def test_cache_serves_without_a_network(hub, tmp_path, monkeypatch):
    name = "someone/offline"
    segmenter().save_pretrained(tmp_path / "made")
    hub.commit(name, files_in(tmp_path / "made"))
    ud.load(name)
    asked = len(hub.seen)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert ud.load(name).record() == segmenter().record()
    assert len(hub.seen) == asked
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    with pytest.raises(
        FileNotFoundError, match=r"no file or folder someone/\w+, and the hub cannot be reached, nor is a model"
    ):
        ud.load(name)


def test_hub_that_does_not_answer_is_said(hub, tmp_path, monkeypatch, run_cli):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    with pytest.raises(
        FileNotFoundError, match=r"no file or folder someone/\w+, and the hub cannot be reached, nor is a model"
    ):
        ud.load("someone/far")
    denoiser().save(tmp_path / "some.ckpt")
    status, _, err = run_cli("export", "some.ckpt", "pipeline", "--push_to_hub", "someone/far")
    assert status != 0
    assert "the hub cannot be reached for someone/far; connect to the network" in err
    assert "pipeline is exported; the same command with --overwrite pushes it" in err
    assert (tmp_path / "pipeline" / "model_index.json").exists()


def test_hub_that_is_silent_is_not_waited_for(hub, tmp_path, monkeypatch):
    segmenter().save_pretrained(tmp_path / "made")
    hub.commit("someone/kept", files_in(tmp_path / "made"))
    ud.load("someone/kept")
    monkeypatch.setattr("unet_diffusion.runtime.hub.PATIENCE", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, and says nothing
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert ud.load("someone/kept").record() == segmenter().record()  # from the cache
        with pytest.raises(
            FileNotFoundError, match="the hub cannot be reached, nor is a model runns/digits in its cache"
        ):
            ud.load("runns/digits")
        with pytest.raises(FileNotFoundError, match="the hub cannot be reached for someone/kept"):
            publish(tmp_path / "made", "someone/kept", run=tmp_path)


def test_error_of_a_name_says_that_it_is_no_path_either(hub):
    both = r"^there is no file or folder runns/digits, and the hub has no model runns/digits that you may use; correct"
    with pytest.raises(FileNotFoundError, match=both):
        ud.load("runns/digits")
    with pytest.raises(FileNotFoundError, match=r"^the hub has no model runns/digits that you may use; correct"):
        ud.load("hf://runns/digits")


def test_path_asks_no_server(hub, run_cli):
    asked = len(hub.seen)
    for path in (Path("./runns/digits"), "./runns/digits"):
        with pytest.raises(FileNotFoundError, match="there is no model at"):
            ud.load(path)
    status, _, err = run_cli("sample", "./runns/digits")
    assert status != 0
    assert "CHECKPOINT must exist" in err
    assert len(hub.seen) == asked


def test_commands_take_names_on_the_hub(hub, run_cli, tmp_path):
    denoiser().export(tmp_path / "pipeline")
    segmenter().save_pretrained(tmp_path / "cells")
    hub.commit("someone/draws", files_in(tmp_path / "pipeline"))
    hub.commit("someone/finds", files_in(tmp_path / "cells"))
    pixels = np.random.default_rng(0).integers(256, size=(24, 24), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    few = ["--num_images", "2", "--num_inference_steps", "2"]
    for name in ("someone/draws", "pipeline"):
        status, _, err = run_cli("sample", name, *few, "--output", f"drawn/{Path(name).name}")
        assert status == 0, err
    assert Path("drawn/draws/000001.png").read_bytes() == Path("drawn/pipeline/000001.png").read_bytes()
    for name in ("someone/finds", "cells"):
        status, _, err = run_cli("segment", name, "image.png", "--output", f"masks/{Path(name).name}")
        assert status == 0, err
    assert Path("masks/finds/image.png").read_bytes() == Path("masks/cells/image.png").read_bytes()
    status, _, err = run_cli("segment", "someone/draws", "image.png", "--output", "none")
    assert status != 0
    assert "someone/draws holds a denoiser, not a segmenter; use unet-diffusion sample" in err
    status, _, err = run_cli("sample", "runns/digits", "--output", "none")
    assert status != 0
    assert "there is no file or folder runns/digits, and the hub has no model" in err


def test_synthesize_takes_names_on_the_hub_for_its_denoiser_and_its_segmenter(hub, run_cli, tmp_path):
    torch.manual_seed(0)
    condition = SemanticMap(3, label_format="instances")
    unet = ud.DenoiserUNet(4, (4, 8), out_channels=1, layers_per_block=1, norm_num_groups=4)
    masks = nn.ModuleList([condition])
    ud.Denoiser(unet, NoiseSchedule(100), (1, 24, 24), conditions=masks).export(tmp_path / "pipeline")
    segmenter().save_pretrained(tmp_path / "cells")
    hub.commit("someone/draws", files_in(tmp_path / "pipeline"))
    hub.commit("someone/finds", files_in(tmp_path / "cells"))
    labels = np.zeros((24, 24), dtype=np.uint8)
    labels[4:12, 6:15] = 1
    (tmp_path / "label").mkdir()
    Image.fromarray(labels).save(tmp_path / "label" / "0.png")
    words = ["--labels", "label", "--num_labels", 1, "--num_images", 2, "--num_inference_steps", 2, "--min_dice", 0]
    for draws, finds in (("someone/draws", "someone/finds"), ("pipeline", "cells")):
        output = f"pairs/{Path(draws).name}"
        status, _, err = run_cli("synthesize", draws, "--segmenter", finds, *words, "--output", output)
        assert status == 0, err
    assert Path("pairs/draws/image/000001.png").read_bytes() == Path("pairs/pipeline/image/000001.png").read_bytes()


def files_in(folder) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_only_safetensors_in_full_precision_are_downloaded(hub, tmp_path):
    name = "someone/crowded"
    denoiser().export(tmp_path / "pipeline")
    files = files_in(tmp_path / "pipeline")
    unwanted = {"model.safetensors": b"1", "model.ckpt": b"2", "unet/diffusion_pytorch_model.fp16.safetensors": b"3",
                "unet/diffusion_pytorch_model.bin": b"4", "pipeline.py": b"5"}  # fmt: skip
    hub.commit(name, {**files, **unwanted})
    ud.load(name)
    asked = {path.rpartition("/")[2] for path in hub.seen if f"/{name}/resolve/" in path}
    assert "diffusion_pytorch_model.safetensors" in asked
    assert not asked & {path.rpartition("/")[2] for path in unwanted}


def test_one_file_of_weights_is_the_model_of_a_repository_and_of_a_folder(hub, run_cli, tmp_path):
    (tmp_path / "one").mkdir()
    made = saved(sd1, tmp_path / "one")
    (tmp_path / "one" / "README.md").write_text("Weights of another program.")
    tiny_text("gelu").tokenizer.save_pretrained(tmp_path / "tokenizer")
    content = made.file.read_bytes()
    hub.commit("someone/onefile", {"README.md": b"of another program", "one.safetensors": content, "one.ckpt": b"1"})
    hub.commit("someone/several", {"small.safetensors": content, "large.safetensors": content})
    options = ["--tokenizer", tmp_path / "tokenizer", "--image_size", "16"]
    names = ["someone/onefile", tmp_path / "one", "hf://someone/several/small.safetensors"]
    for number, name in enumerate(names):
        status, out, err = run_cli("import", name, tmp_path / f"{number}.ckpt", *options)
        assert status == 0, err
        assert "layout of Stable Diffusion 1" in out
        x, t, context = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 5, 64)
        with torch.no_grad():
            theirs = made.unet(x, t, encoder_hidden_states=context).sample
            torch.testing.assert_close(ud.load(tmp_path / f"{number}.ckpt").unet(x, t, context=context), theirs)
    assert not [request for request in hub.seen if request.endswith(("one.ckpt", "large.safetensors"))]


def test_several_files_of_weights_are_named(hub, run_cli, tmp_path):
    files = {"a.safetensors": b"1", "b.safetensors": b"2", "b.fp16.safetensors": b"3", "part/c.safetensors": b"4"}
    hub.commit("someone/many", files)
    for name, content in files.items():
        (tmp_path / "many" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "many" / name).write_bytes(content)
    for place in ("hf://someone/many", tmp_path / "many"):
        status, _, err = run_cli("import", place, tmp_path / "none.ckpt")
        assert status != 0
        assert f"{place} holds 2 files of weights" in err
        assert f"a.safetensors, b.safetensors; name one of them, such as {place}/a.safetensors" in err
    assert not [request for request in hub.seen if "/someone/many/resolve/" in request]  # nothing was downloaded
    with pytest.raises(FileNotFoundError, match=r"many on the hub has no file c.safetensors; its files .* a\.saf"):
        ud.load("hf://someone/many/c.safetensors")


def test_half_precision_is_downloaded_where_there_is_no_other(hub, tmp_path):
    whole = save_stable_diffusion(tmp_path / "whole")
    StableDiffusionPipeline.from_pretrained(whole).to(torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
    files = files_in(tmp_path / "half")
    assert all(".fp16." in name for name in files if name.endswith(".safetensors"))
    vae = {name: content for name, content in files_in(whole).items() if name.startswith("vae/")}
    hub.commit("someone/half", {**files, **vae})
    asked = len(hub.seen)
    model, expected = ud.load("someone/half"), ud.load(whole)
    downloaded = [request for request in hub.seen[asked:] if request.endswith(".safetensors")]
    assert not [request for request in downloaded if "/vae/" in request and ".fp16." in request]
    for ours, theirs in ((model.unet, expected.unet), (model.conditions, expected.conditions)):
        for name, value in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[name], value.half().float()), name
    ud.load(tmp_path / "half").sample(1, captions="a red cat", num_inference_steps=1)  # with the autoencoder of fp16


@pytest.mark.parametrize(
    ("arguments", "token", "message"),
    [
        (["import", "nobody/nothing", "new.ckpt"], TOKEN, "no file or folder nobody/nothing, and the hub has no model"),
        (["export", "some.ckpt", "pipeline", "--push_to_hub", "me/new"], "hf_wrong", "refused me/new (status 401)"),
        (["export", "some.ckpt", "pipeline", "--push_to_hub", "just-a-name"], TOKEN, "must be named as owner/name"),
        (["export", "some.ckpt", "pipeline", "--license", "mit"], TOKEN, "--license and --private are for"),
        (
            ["export", "some.ckpt", "pipeline", "--push_to_hub", "a/b", "--license", "My own"],
            TOKEN,
            "a licence must be",
        ),
        (["export", "some.ckpt", "one.safetensors", "--push_to_hub", "a/b"], TOKEN, "--push_to_hub pushes a folder"),
    ],
)
def test_what_the_hub_does_not_take_is_said_in_a_line(hub, run_cli, tmp_path, monkeypatch, arguments, token, message):
    monkeypatch.setenv("HF_TOKEN", token)
    denoiser().save(tmp_path / "some.ckpt")
    status, out, err = run_cli(*arguments)
    assert status != 0
    assert message in err
    assert "Traceback" not in err
    assert token not in out + err


SECRETS = ("KEY", "SEC", "RET", "SIGNED")
ADDRESSES = ["s3://KEY:SEC/RET@bucket/cells", "https://store/cells?sig=SIGNED", "/KEY/SEC/images"]


def assert_shown(files: dict[str, bytes], folder):
    """The settings are among the files, and say nothing of this machine, nor what opens an address."""
    text = b"\n".join(content for path, content in files.items() if path.endswith((".json", ".md"))).decode()
    for words in ("s3://bucket/cells", "https://store/cells", "- images\n"):
        assert words in text
    assert not [word for word in (*SECRETS, str(folder), '_name_or_path": "/') if word in text]


def test_card_of_a_run_names_no_folder_of_this_machine_and_no_secret(hub, run_cli, tiny_digits, tmp_path):
    run, base = tmp_path / "run", tmp_path / "base.ckpt"
    tiny_unet = {
        "channels": [8, 16],
        "norm_num_groups": 4,
        "layers_per_block": 1,
        "attention_levels": [1],
        "num_class_embeds": 11,
    }
    replace(denoiser(), unet=ud.DenoiserUNet(1, **tiny_unet)).save(base)
    options = ["--trainer.default_root_dir", run, "--model.init_from", base]
    status, _, err = run_cli("fit", *tiny_digits, *options)
    assert status == 0, err
    last = run / "checkpoints" / "last.ckpt"
    assert str(tmp_path) not in (run / "pipeline" / "README.md").read_text()
    assert "init_from: base.ckpt" in (run / "pipeline" / "README.md").read_text()
    made = ud.load(last)
    made.settings["data"]["init_args"]["source"] |= {"init_args": {"root": ADDRESSES}}
    made.save(tmp_path / "drawn.ckpt")
    status, _, err = run_cli("export", tmp_path / "drawn.ckpt", tmp_path / "out", "--push_to_hub", "someone/drawn")
    assert status == 0, err
    for files in (hub.repositories["someone/drawn"][-1], files_in(tmp_path / "out")):
        assert_shown(files, tmp_path)


def test_folder_of_a_segmenter_names_no_folder_of_this_machine_and_no_secret(hub, tmp_path):
    secret = replace(segmenter(), settings={"data": {"root": ADDRESSES}})
    secret.save_pretrained(tmp_path / "folder")
    publish(tmp_path / "folder", "someone/seen", run=tmp_path)
    for files in (hub.repositories["someone/seen"][-1], files_in(tmp_path / "folder")):
        assert_shown(files, tmp_path)
    assert ud.load(tmp_path / "folder").settings == {
        "data": {"root": ["s3://bucket/cells", "https://store/cells", "images"]}
    }


def test_folder_of_an_autoencoder_names_no_folder_of_this_machine_and_no_secret(hub, tmp_path):
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    torch.manual_seed(0)
    AutoencoderKL(block_out_channels=[8, 8], norm_num_groups=4, sample_size=8, **blocks).save_pretrained(
        tmp_path / "kl"
    )
    loaded = ud.load(tmp_path / "kl")
    loaded.settings = {"data": {"root": ADDRESSES}}
    loaded.export(tmp_path / "folder")
    publish(tmp_path / "folder", "someone/encodes", run=tmp_path)
    for files in (hub.repositories["someone/encodes"][-1], files_in(tmp_path / "folder")):
        assert_shown(files, tmp_path)


def test_names_on_the_hub_are_told_from_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert [is_hub_name(name) for name in ("owner/name", "hf://owner/name", "runs/digits", "name", "a/b/c", "./a")] == [
        *(True, True, False, False, False, False),
    ]
    paths = ("./owner/name", "../owner/name", "~/name", "/owner/name", Path("./owner/name"), Path("owner/name"))
    assert not any(map(is_hub_name, paths))
    assert not is_hub_name("missing/last.ckpt")  # a mistyped path asks no server
    assert not is_hub_name("missing/model.safetensors")
    assert check_hub_name("hf://owner/name") == "owner/name"


def test_segmenter_of_save_pretrained_is_the_same(tmp_path):
    segmenter().save_pretrained(tmp_path / "folder")
    for again in (ud.Segmenter.from_pretrained(tmp_path / "folder"), ud.load(tmp_path / "folder")):
        assert again.record() == segmenter().record()
        weights = again.unet.state_dict()
        assert all(torch.equal(value, weights[key]) for key, value in segmenter().unet.state_dict().items())
    of_floats = replace(segmenter(), values=PixelValues("float32", -100, 400))
    of_floats.save_pretrained(tmp_path / "of_floats")
    assert ud.load(tmp_path / "of_floats").values == of_floats.values
    with pytest.raises(FileExistsError, match="exists and is not overwritten"):
        segmenter().save_pretrained(tmp_path / "folder")
    segmenter().save_pretrained(tmp_path / "folder", overwrite=True)


def test_folder_of_a_segmenter_that_is_no_segmenter_is_refused(tmp_path):
    segmenter().save_pretrained(tmp_path / "folder")
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    config["unet"]["class_path"] = "os.system"
    (tmp_path / "folder" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="os"):
        ud.load(tmp_path / "folder")
    with pytest.raises(ValueError, match="must hold a segmenter of save_pretrained"):
        ud.Segmenter.from_pretrained(tmp_path)


def test_card_without_a_licence_keeps_its_words():
    card = "---\nlibrary_name: x\n---\n# A\n\n## Licence\nNot stated.\n"
    figure = {"title": "Dice", "value": 0.9, "interval": None, "better": "higher"}
    nothing = {**figure, "value": None}
    made = completed_card(card, "a/b", licence=None, figures={"dice": figure, "no": nothing}, pictures=[])
    assert made.endswith("## Evaluation\n| figure | value | 95 % interval | better |\n| --- | --- | --- | --- |\n"
                         "| Dice | 0.9 |  | higher |\n\n## Licence\nNot stated.\n")  # fmt: skip
    assert yaml.safe_load(made.split("---\n")[1]) == {"library_name": "x"}
