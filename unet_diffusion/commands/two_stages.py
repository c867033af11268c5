"""Latent diffusion from a folder of images to samples: each stage a command of its own, and all of them resumable.

Rombach et al. 2022 (https://arxiv.org/abs/2112.10752): an autoencoder, the latents of all images, a denoiser of them.
Each stage runs in a process of its own, so that nothing of it stays in memory, and leaves what the same command
would: runs of `fit`, latents of `encode`. Run again, it goes on where it was cut off, within a stage too. A stage that
has begun keeps its images and settings; those of one that has not may still be changed.
"""

import ctypes
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unet_diffusion.commands.fit_arguments import check_arguments
from unet_diffusion.commands.recipes import read_settings
from unet_diffusion.data.captions import read_captions
from unet_diffusion.data.files import class_names_of, find_images
from unet_diffusion.data.fingerprints import Fingerprint, changes, content_hash, fingerprints, folder_hash, hash_of_all
from unet_diffusion.runtime.atomic_files import atomic_write, field_of, read_json, remove_left_behind
from unet_diffusion.runtime.folder_settings import CONTENTS, SETTINGS
from unet_diffusion.runtime.messages import UsageError, first_few
from unet_diffusion.runtime.signals import Interrupted, handled

RECORD = "stages.json"  # settings of each stage that has begun, of which images, its seconds, and which are done
PR_SET_PDEATHSIG = 1  # of Linux: sys/prctl.h
INTERRUPTED = (130, 143)  # exit statuses of a stage that a signal ended
TASKS = {"autoencoder": "autoencode", "denoiser": "denoise"}  # of the stages
LABEL_DROPOUT = 0.1  # of classes, for guidance


@dataclass(frozen=True)
class TwoStages:
    """What is to be made, and where.

    Args:
        images: a folder, archive.zip, or archive.zip/folder.
        output: folder of the runs and the latents.
        autoencoder: recipe of the first stage.
        denoiser: recipe of the second stage.
        class_labels: whether folders below images are classes.
        captions: whether images have captions.
    """

    images: Path
    output: Path
    autoencoder: Path
    denoiser: Path
    class_labels: bool
    captions: bool

    def run(self, say: Callable[[str], None], options: Sequence[str] = (), options_of_fit: Sequence[str] = ()) -> None:
        """Carry out what is not done yet.

        Args:
            say: called with a line before each stage.
            options: Options of every stage, that do not change what it makes.
            options_of_fit: Likewise, of those that train.

        Raises:
            FileExistsError: if the folder holds something else, or the images or settings of a stage that has begun
                were others.
            FileNotFoundError: if the images are not there.
            ValueError: if images lack captions, or the recipe takes none.
            RuntimeError: if a stage fails; its own error comes before.
        """
        record = self._record(options_of_fit)
        for number, (name, command) in enumerate(self._stages().items(), start=1):
            if name in record["done"]:
                say(f"stage {number} of 3, {name}: done before, in {record['seconds'][name]:.0f} s")
                continue
            say(f"stage {number} of 3, {name}")
            record["settings"][name] = self.settings(name, record["images"])
            self._write(record)
            start = time.monotonic()
            # -P: modules are not looked for in the current folder, which may be that of somebody's images.
            stage = [*command(), *options]
            stage += options_of_fit if stage[0] == "fit" else ()
            status = _exit_status([sys.executable, "-P", "-m", "unet_diffusion", *stage])
            record["seconds"][name] = round(record["seconds"].get(name, 0.0) + time.monotonic() - start, 1)
            record["done"] += [] if status else [name]
            self._write(record)
            if status in INTERRUPTED:
                raise Interrupted(status - 128)
            if not record["done"] and list(self.output.iterdir()) == [self.output / RECORD]:
                shutil.rmtree(self.output)  # nothing was made
            if status:
                raise RuntimeError(f"stage {number}, {name}, failed; the same command again goes on from there")

    def _stages(self) -> dict[str, Callable[[], list[str]]]:
        return {"autoencoder": self._autoencoder, "latents": self._latents, "denoiser": self._denoiser}

    def _autoencoder(self) -> list[str]:
        return self._fit("autoencoder", self.autoencoder, self.images)

    def _latents(self) -> list[str]:
        flags = {"--class_labels": self.class_labels, "--captions": self.captions, "--horizontal_flip": self._flips()}
        source = self._data_of(self.autoencoder).get("source", {}).get("init_args", {})
        return [
            *("encode", str(self.output / "autoencoder"), str(self.images), "--output", str(self.output / "latents")),
            *("--background", source.get("background", "white"), "--on_bad_file", source.get("on_bad_file", "error")),
            *(flag for flag, is_set in flags.items() if is_set),
        ]

    def _denoiser(self) -> list[str]:
        arguments = self._fit("denoiser", self.denoiser, self.output / "latents")
        if self.class_labels:
            arguments += self._of_classes(len(read_json(self.output / "latents" / "index.json")["class_names"]))
        return arguments

    def _of_classes(self, num_classes: int) -> list[str]:
        """Arguments of the denoiser's run; none without classes."""
        if not self.class_labels:
            return []
        dropout = read_settings(self.denoiser).get("model", {}).get("label_dropout") or LABEL_DROPOUT
        return [f"--model.unet.init_args.num_class_embeds={num_classes + 1}",  # and the null label
                f"--model.label_dropout={dropout}"]  # fmt: skip

    def _fit(self, name: str, recipe: Path, root: Path) -> list[str]:
        run = self.output / name
        return ["fit", f"--config={recipe}", f"--data.root={root}", f"--trainer.default_root_dir={run}"]

    def _flips(self) -> bool:
        return bool(self._data_of(self.denoiser).get("horizontal_flip"))

    def _data_of(self, recipe: Path) -> dict[str, Any]:
        return read_settings(recipe).get("data", {}).get("init_args", {})

    def _check(self, options: Sequence[str]) -> None:
        """What would fail after the first stage, or be found to be missing after the last."""
        files = find_images(self.images)
        num_classes = len(class_names_of(files.names, self.images)) if self.class_labels else 0
        if self.captions:
            read_captions(files, files.names)
            if not read_settings(self.denoiser)["model"].get("conditions"):
                raise ValueError(f"the recipe {self.denoiser} must have conditions to take captions; use "
                                 "latents_text, or leave --captions out")  # fmt: skip
        autoencoder = self._fit("autoencoder", self.autoencoder, self.images)
        denoiser = [*self._fit("denoiser", self.denoiser, self.images), *self._of_classes(num_classes)]
        runs = {"autoencoder": [*autoencoder, *options], "denoiser": [*denoiser, *options]}
        for stage, words in runs.items():
            if (task := check_arguments(words).task) != TASKS[stage]:
                raise UsageError(f"the recipe of the {stage} must have task {TASKS[stage]}, got {task}")
        check_runs(runs)

    def settings(self, stage: str, images: Mapping[str, Fingerprint]) -> dict[str, Any]:
        """What may not change of a stage once it has begun, plain values.

        Args:
            stage: Its name.
            images: The fingerprint of each image.
        """
        if stage == "denoiser":
            return {
                "denoiser": _hash(self.denoiser),
                "class_labels": self.class_labels,
                f"{CONTENTS}latents": _hash(self.output / "latents" / "index.json"),
            }
        settings: dict[str, Any] = {
            "images": str(self.images.resolve()),
            f"{CONTENTS}images": hash_of_all({name: one[1] for name, one in images.items()}),
            "autoencoder": _hash(self.autoencoder),
        }
        if stage == "latents":
            files = find_images(self.images)
            settings |= {
                "class_labels": self.class_labels,
                "captions": self.captions,
                f"{CONTENTS}captions": _texts_hash(read_captions(files, files.names).texts if self.captions else []),
                "horizontal_flip": self._flips(),
                f"{CONTENTS}autoencoder": folder_hash(self.output / "autoencoder" / "autoencoder"),
            }
        return settings

    def _record(self, options_of_fit: Sequence[str]) -> dict[str, Any]:
        """What is done, after a look whether it is what is asked for now."""
        path = self.output / RECORD
        remove_left_behind(self.output, RECORD)
        if not path.exists() and self.output.exists() and any(self.output.iterdir()):
            raise FileExistsError(f"{self.output} holds files of something else; choose another --output")
        empty: dict[str, Any] = {"settings": {}, "images": {}, "seconds": {}, "done": []}
        record = read_json(path) if path.exists() else empty
        for field in empty:
            field_of(record, field, path)
        now = fingerprints(find_images(self.images), record["images"])
        self._refuse_other_settings(record, now)
        self._check(options_of_fit)
        record["images"] = now
        self._write(record)
        return record

    def _has_begun(self, stage: str) -> bool:
        """Whether it has left what it would go on from; one that failed before, as by a typo, has not."""
        left = {"latents": SETTINGS}.get(stage, "checkpoints/*.ckpt")
        return any((self.output / stage).glob(left))

    def _refuse_other_settings(self, record: dict[str, Any], images: dict[str, Fingerprint]) -> None:
        differ = {
            name: ""
            for stage, before in record["settings"].items()
            if stage in record["done"] or self._has_begun(stage)
            for name, value in self.settings(stage, images).items()
            if before.get(name) != value
        }
        if f"{CONTENTS}images" in differ:
            differ[f"{CONTENTS}images"] = f": {first_few(changes(record['images'], images))}"
        if differ:
            raise FileExistsError(
                f"{self.output} was begun with other settings "
                f"({', '.join(f'{name}{more}' for name, more in differ.items())}); choose another --output, "
                "or the settings as they were"
            )

    def _write(self, record: dict[str, Any]) -> None:
        with atomic_write(self.output / RECORD) as partial:
            partial.write_text(json.dumps(record, indent=1))


def check_runs(runs: dict[str, list[str]]) -> None:
    """See whether the runs of fit can begin, before the first of them is trained.

    Args:
        runs: The arguments of fit, by stage.

    Raises:
        UsageError: If a recipe is wrong.
    """
    command = [sys.executable, "-P", "-m", "unet_diffusion.commands.check_runs", json.dumps(runs)]
    done = subprocess.run(command, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    if done.returncode:
        said = done.stderr.rpartition("unet-diffusion: error: ")[2].partition("\n(--traceback")[0].strip()
        raise UsageError(said or f"the recipes could not be built: their process ended with status {done.returncode}")


def _exit_status(command: list[str]) -> int:
    """Of a process that ends by itself when interrupted: SIGTERM is passed on, the terminal sends SIGINT to both.

    Of one that a signal ended, as shells report it: 128 and the number of the signal.
    """
    process = subprocess.Popen(command, preexec_fn=_stopped_with_its_parent())
    with handled((signal.SIGINT,), lambda *_: None), handled((signal.SIGTERM,), lambda *_: process.terminate()):
        status = process.wait()
    return status if status >= 0 else 128 - status


def _stopped_with_its_parent() -> Callable[[], object] | None:
    """What a new process calls first to be sent SIGTERM when this one is killed, and can pass nothing on; on Linux."""
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)  # that of C
    return lambda: library.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _hash(file: Path) -> str:
    """Of the contents of a file; "" if it is not there."""
    return content_hash(file.read_bytes()) if file.is_file() else ""


def _texts_hash(texts: list[str]) -> str:
    return content_hash(json.dumps(texts).encode())
