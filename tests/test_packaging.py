"""What a wheel holds, and what it asks pip for."""

import ast
import sys
import tomllib
import zipfile
from importlib.metadata import distributions, packages_distributions, requires

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from wheels import REPOSITORY, Elsewhere, build_wheel

IMPORTS_OF_EXTRAS = {
    "segmentation_models_pytorch": ["encoders"],
    "datasets": ["datasets"],
    "gradio": ["explore"],
    "nibabel": ["medical"],
    "onnxruntime": ["onnx"],
    "onnxscript": ["onnx"],
    "peft": ["lora"],
    "pyarrow": ["datasets"],
    "pydicom": ["medical"],
    "timm": ["encoders"],
    "tokenizers": ["text"],
    "transformers": ["text"],
    "wandb": ["wandb"],
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    return zipfile.ZipFile(build_wheel(tmp_path_factory.mktemp("packaging")))


def test_wheel_holds_every_file_of_the_package_and_every_recipe(wheel):
    files = {}
    for folder, target in (("unet_diffusion", "unet_diffusion"), ("configs", "unet_diffusion/configs")):
        for path in (REPOSITORY / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                files[f"{target}/{path.relative_to(REPOSITORY / folder).as_posix()}"] = path.read_bytes()
    assert {"unet_diffusion/configs/digits.yaml", "unet_diffusion/models/kernels.cpp"} <= files.keys()
    inside = {name: wheel.read(name) for name in wheel.namelist() if ".dist-info/" not in name}
    assert inside == files


def imported_packages() -> dict[str, set[str]]:
    """The packages that files of ours import from outside the standard library, and those files."""
    packages: dict[str, set[str]] = {}
    for path in (REPOSITORY / "unet_diffusion").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            else:
                continue
            for name in {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"unet_diffusion"}:
                packages.setdefault(name, set()).add(path.name)
    return packages


def project() -> dict:
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


def requirements(*extras: str) -> list[Requirement]:
    """What pip is asked for, with some extras."""
    optional = project()["optional-dependencies"]
    return [Requirement(line) for line in sum((optional[extra] for extra in extras), project()["dependencies"])]


def test_every_package_that_is_imported_is_declared():
    distributions = packages_distributions()
    imports = imported_packages()
    assert {"torch", "lightning", "aiohttp", "yaml", "PIL"} <= imports.keys()
    for name, files in imports.items():
        installed = {canonicalize_name(distribution) for distribution in distributions[name]}
        declared = {canonicalize_name(line.name) for line in requirements(*IMPORTS_OF_EXTRAS.get(name, ()))}
        assert installed & declared, f"{files} import {name} of {installed}: declare it in pyproject.toml"


def installed_without_extras() -> set[str]:
    """The distributions that pip installs for this package alone."""
    names: set[str] = set()
    waiting = requirements()
    while waiting:
        line = waiting.pop()
        name = canonicalize_name(line.name)
        needed = [Requirement(text) for text in requires(name) or []]
        wanted = [{"extra": extra} for extra in ("", *line.extras)]
        new = [need for need in needed if not need.marker or any(map(need.marker.evaluate, wanted))]
        waiting += [need for need in new if name not in names or line.extras]
        names.add(name)
    return names


@pytest.mark.slow
def test_denoiser_is_trained_and_exported_without_any_extra(tmp_path):
    needed = installed_without_extras() | {"pip"}
    assert "diffusers" in needed
    assert "transformers" not in needed
    files: dict[bool, set[str]] = {True: set(), False: set()}
    for distribution in distributions():
        names = {file.parts[0] for file in distribution.files or []}
        files[canonicalize_name(distribution.name) in needed] |= names
    assert {"transformers", "peft", "wandb", "rich"} <= files[False] - files[True]
    elsewhere = Elsewhere(tmp_path, without=files[False] - files[True])
    elsewhere.run("-m", "pip", "install", "--quiet", "unet-diffusion")
    options = "--trainer.max_steps=2 --trainer.val_check_interval=2 --model.speed=plain --trainer.accelerator=cpu"
    elsewhere.run("-m", "unet_diffusion", "fit", "--config", "digits", *options.split())
    assert (elsewhere.folder / "runs/digits/pipeline/model_index.json").is_file()


def test_every_requirement_has_a_lower_bound():
    lines = requirements(*project()["optional-dependencies"])
    unbounded = [line.name for line in lines if not any(bound.operator == ">=" for bound in line.specifier)]
    assert unbounded == ["unet-diffusion"]  # with some of its extras, in dev


def test_versions_of_lightning_that_an_attacker_published_are_excluded():
    (lightning,) = [line.specifier for line in requirements() if line.name == "lightning"]
    assert [version for version in ("2.6.1", "2.6.2", "2.6.3", "2.6.4") if version in lightning] == ["2.6.1", "2.6.4"]
