"""The wheel of this repository, made as pip makes it, and machines that have it and not the repository."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
from collections.abc import Collection
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
SOURCES = ["pyproject.toml", "README.md", "LICENSE", "configs", "unet_diffusion"]
OURS = re.compile(r"unet_diffusion|__editable__|.+\.pth$")  # a clone that was installed to be edited has such files


def build(kind: str, source: Path, target: Path) -> Path:
    """The archive that setuptools makes of a source folder, as pip and build ask it to."""
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(target)!r})"
    target.mkdir()
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    (archive,) = target.iterdir()
    return archive


def build_wheel(root: Path) -> Path:
    """A wheel, made of a source archive, which is made of a copy of this repository, all within the folder `root`."""
    for name in SOURCES:
        if (REPOSITORY / name).is_dir():
            shutil.copytree(REPOSITORY / name, root / "clone" / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            (root / "clone").mkdir(exist_ok=True)
            shutil.copy(REPOSITORY / name, root / "clone")
    with tarfile.open(build("sdist", root / "clone", root / "sdist")) as archive:
        archive.extractall(root, filter="data")
        (unpacked,) = {root / name.split("/")[0] for name in archive.getnames()}
    return build("wheel", unpacked, root / "wheel")


class Elsewhere:
    """A new environment with links to the packages of this one, and with ours as a wheel that pip finds.

    Args:
        root: An empty folder.
        without: Names in the folder of packages that get no link.
    """

    def __init__(self, root: Path, without: Collection[str] = ()) -> None:
        wheel = build_wheel(root)
        venv.create(root / "environment", with_pip=False, symlinks=True)
        self.folder = root / "empty"
        self.folder.mkdir()
        self.python = root / "environment" / "bin" / "python"
        (packages,) = (root / "environment" / "lib").glob("python*/site-packages")
        for package in Path(sysconfig.get_path("purelib")).iterdir():
            if not OURS.match(package.name) and package.name not in without:
                (packages / package.name).symlink_to(package)
        self._variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self._variables |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheel.parent)}

    def run(self, *arguments: str) -> str:
        """What Python prints that runs in an empty folder with this environment."""
        options = {"cwd": self.folder, "env": self._variables, "text": True, "check": True}
        return subprocess.run([self.python, *arguments], stdout=subprocess.PIPE, **options).stdout
