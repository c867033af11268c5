"""Short options of data: those that are not the data module's own belong to its source."""

import inspect

import pytest
import yaml

import unet_diffusion.data
from unet_diffusion.commands.fit_arguments import OWN_ARGUMENTS, SOURCES, check_arguments
from unet_diffusion.data import LabelledSource, Source


@pytest.mark.parametrize("name", OWN_ARGUMENTS)
def test_own_arguments_of_data_modules_are_those_of_their_constructors(name):
    parameters = inspect.signature(getattr(unet_diffusion.data, name)).parameters
    assert set(OWN_ARGUMENTS[name]) == set(parameters)


def test_sources_and_their_arguments_are_those_that_there_are():
    public = (getattr(unet_diffusion.data, name) for name in unet_diffusion.data.__all__)
    classes = (one for one in public if isinstance(one, type) and issubclass(one, Source | LabelledSource))
    arguments = {one.__name__: set(inspect.signature(one).parameters) for one in classes}
    assert {name: set(names) for name, names in SOURCES.items()} == {
        name: names for name, names in arguments.items() if name not in ("Source", "LabelledSource")
    }


def test_no_option_of_a_source_is_hidden_by_one_of_its_data_module():
    for name in SOURCES:
        kind = getattr(unet_diffusion.data, name)
        owner = "SegmentationDataModule" if issubclass(kind, LabelledSource) else "ImageDataModule"
        assert not set(inspect.signature(kind).parameters) & set(OWN_ARGUMENTS[owner]), name


def words(*arguments) -> list[str]:
    return check_arguments(["fit", *arguments, "--print_config"]).words[1:-1]


@pytest.mark.parametrize(
    ("typed", "parsed"),
    [
        ("--data.root=x", "--data.source.root=x"),
        ("--data.init_args.root=x", "--data.source.root=x"),
        ("--data.batch_size=3", "--data.batch_size=3"),
        ("--data.init_args.batch_size=3", "--data.init_args.batch_size=3"),
        ("--data.init_args.source.init_args.root=x", "--data.init_args.source.init_args.root=x"),
        ("--data=Folder", "--data.source=Folder"),
        ("--data=unet_diffusion.data.Folder", "--data.source=unet_diffusion.data.Folder"),
        ("--data=ImageDataModule", "--data=ImageDataModule"),
        ("--data.source=mine.Flowers", "--data.source=mine.Flowers"),
        ("--data.help=Folder", "--data.help=Folder"),
    ],
)
def test_option_of_data_goes_to_its_owner(typed, parsed):
    assert words(typed) == [parsed]


def test_height_and_width_may_stand_apart():
    assert words("--data.image_size", "64", "64") == ["--data.source.image_size", "[64, 64]"]


def test_stretch_belongs_to_tiles_and_to_the_data_module_of_labelled_images():
    assert words("--config", "nuclei_denoiser", "--data.stretch=true")[2:] == ["--data.source.stretch=true"]
    assert words("--config", "nuclei_segment", "--data.stretch=true")[2:] == ["--data.stretch=true"]
    assert words("--task=segment", "--data.images=x")[1:] == ["--data.source.images=x"]


def test_data_module_of_ones_own_keeps_its_options():
    assert words("--data=mine.Data", "--data.root=x") == ["--data=mine.Data", "--data.root=x"]


@pytest.mark.parametrize("option", ["--data.root", "--data.init_args.root", "--data.source.init_args.root"])
def test_short_and_long_options_set_the_same(run_cli, tmp_path, option):
    size = option.replace("root", "image_size")
    batch = "--data.batch_size" if option == "--data.root" else "--data.init_args.batch_size"
    given = [option, tmp_path, f"{size}=[8, 9]", batch, 3, "--data.class_labels", "true", "--data.captions", "true"]
    status, out, err = run_cli("fit", "--config", "folder", *given, "--print_config")
    assert status == 0, err
    data = yaml.safe_load(out)["data"]["init_args"]
    source = data["source"]["init_args"]
    assert (source["root"], source["image_size"], data["batch_size"]) == (str(tmp_path), [8, 9], 3)
    assert source["class_labels"] is source["captions"] is True


def test_source_is_chosen_by_its_bare_name(run_cli, tmp_path):
    for choice in ("--data", "--data.source"):
        given = [choice, "Folder", "--data.root", tmp_path, "--data.batch_size", 2]
        status, out, err = run_cli("fit", "--config", "digits", *given, "--print_config")
        assert status == 0, err
        data = yaml.safe_load(out)["data"]
        assert data["class_path"] == "unet_diffusion.data.ImageDataModule"
        assert data["init_args"]["source"]["class_path"].endswith(".Folder")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("--data.root none", "data.root must be an existing folder or file, got none; set --data.root"),
        ("--data.root {tmp} --data.imagesize 8", "there is no option data.imagesize; did you mean image_size"),
        ("--data.root {tmp} --data.xyz 8", "there is no option data.xyz; it must be one of source, horizontal_flip, "),
        ("--data.root {tmp} --data.batchsize 8", "there is no option data.batchsize; did you mean batch_size"),
        (
            "--data.source Shards --data.root {tmp} --data.semantic_map {tmp}",
            "there is no option data.semantic_map of Shards; choose a source that has it by --data.source: Folder",
        ),
        ("--data Folders", "there is no class Folders; did you mean Folder?"),
        ("--data.source Folders", "there is no class Folders; did you mean Folder?"),
        ("--data.root {tmp} --data.channels x", "channels must be a whole number, got x"),
        ("--data.root {tmp} --data.batch_size x", "batch_size must be a whole number, got x"),
    ],
)
def test_wrong_option_is_told_as_it_was_typed(run_cli, tmp_path, given, said):
    status, _, err = run_cli("fit", "--config", "folder", *given.format(tmp=tmp_path).split())
    assert (status != 0, said in err) == (True, True), err


@pytest.mark.parametrize("option", ["data.unlabelled", "data.synthetic.root"])
def test_missing_folder_beside_labelled_images_is_told_at_once(run_cli, tmp_path, option):
    given = ["--data.images", tmp_path, "--data.labels", tmp_path, f"--{option}", "none"]
    status, _, err = run_cli("fit", "--config", "nuclei_joint", *given)
    assert (status != 0, f"{option} must be an existing folder or file, got none" in err) == (True, True), err
