"""two-stages: from a folder of images to a latent diffusion model (Rombach et al. 2022).

There are three stages: an autoencoder, the latents of all images, and a denoiser of them
(https://arxiv.org/abs/2112.10752). Each stage runs in a process of its own, so that nothing of it stays in memory, and
leaves what the same command would: runs of `fit`, latents of `encode`. The same command again continues where it was
cut off, within a stage too. A stage that has begun keeps its images and settings; those of the others may change.
"""

import ctypes
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from unet_diffusion.commands.arguments import Folder, check_exists
from unet_diffusion.commands.fit_arguments import check_arguments
from unet_diffusion.commands.recipes import read_settings, recipe_path
from unet_diffusion.data.captions import read_captions
from unet_diffusion.data.described import USUAL, Table, check_used
from unet_diffusion.data.files import ImageFiles, classes_of, find_images
from unet_diffusion.data.fingerprints import Fingerprint, changes, content_hash, fingerprints, folder_hash, hash_of_all
from unet_diffusion.runtime.addresses import absolute_place, place_of
from unet_diffusion.runtime.atomic_files import atomic_write, field_of, read_json, remove_left_behind
from unet_diffusion.runtime.folder_settings import CONTENTS, SETTINGS, refuse_other_settings
from unet_diffusion.runtime.messages import UsageError, first_few
from unet_diffusion.runtime.signals import Interrupted, handled

RECORD = "stages.json"  # per stage that has begun its settings, images and seconds, and which stages are done
PR_SET_PDEATHSIG = 1  # of Linux: sys/prctl.h
INTERRUPTED = (130, 143)  # exit statuses of a stage that a signal ended
TASKS = {"autoencoder": "autoencode", "denoiser": "denoise"}  # of the stages
LABEL_DROPOUT = 0.1  # of classes, for guidance


def two_stages(
    images: Path,
    *,
    output: Folder,
    captions: bool = False,
    class_labels: bool = False,
    autoencoder: Annotated[str, "RECIPE"] = "autoencoder_kl",
    denoiser: Annotated[str, "RECIPE"] | None = None,
    allow: Annotated[list[str], "MODULE"] | None = None,
    traceback: bool = False,
    table: Table = USUAL,
) -> None:
    """Latent diffusion in one command, from images to samples.

        unet-diffusion two-stages images --output run --captions

    The command trains an autoencoder, encodes the images, and trains a denoiser of the latents. DIR/denoiser then holds
    samples.png and the pipeline. The same command again continues where it was cut off.

    Args:
        images: The folder of images, archive.zip, or archive.zip/folder; or a data set, as in pack.
        output: The folder for the runs and the latents.
        captions: Train text to image, with the captions in metadata.csv, metadata.jsonl or NAME.txt, or those of the
            data set.
        class_labels: Use the folders directly below IMAGES as classes, or those of the data set. It excludes
            --captions.
        autoencoder: The recipe of the first stage.
        denoiser: The recipe of the second stage. The default is latents, or latents_text with --captions.
        allow: The modules of your own, or of somebody you trust, that the recipes may name.
        traceback: Show where an error came from, also an error of a stage.
        table: The split, columns or members of a data set that are used.

    Raises:
        UsageError: If captions and class_labels are both given, or a recipe is missing or wrong.
        FileNotFoundError: If there are no such images.
        FileExistsError: If the output folder holds something else, or a stage that has begun with other settings.
        ValueError: If images lack captions, or the recipe takes none.
        RuntimeError: If a stage fails.
    """
    if captions and class_labels:
        raise UsageError("--captions and --class_labels exclude each other; give one of the two")
    check_used(table, class_labels=class_labels, captions=captions)
    first = recipe_path(autoencoder)
    second = recipe_path(denoiser if denoiser is not None else "latents_text" if captions else "latents")
    check_exists("IMAGES", images)
    stages = TwoStages(images, output, first, second, class_labels, captions, table)
    stages.run(
        lambda line: print(line, flush=True),
        options=["--traceback"] if traceback else [],
        options_of_fit=[f"--allow={module}" for module in allow or []],
    )
    text = " --captions TEXT" if captions else ""
    print(f"{output / 'denoiser'} holds samples.png; to draw more: unet-diffusion sample {output / 'denoiser'}{text} "
          "--output DIR")  # fmt: skip


@dataclass(frozen=True)
class TwoStages:
    """The stages of latent diffusion, and the folder that they lie in.

    Args:
        images: The folder of images, archive.zip, or archive.zip/folder.
        output: The folder of the runs and the latents.
        autoencoder: The recipe of the first stage.
        denoiser: The recipe of the second stage.
        class_labels: Folders below images are classes.
        captions: Images have captions.
        table: Which part of a data set is used.
    """

    images: Path
    output: Path
    autoencoder: Path
    denoiser: Path
    class_labels: bool
    captions: bool
    table: Table = USUAL

    def run(self, say: Callable[[str], None], options: Sequence[str] = (), options_of_fit: Sequence[str] = ()) -> None:
        """Carry out the stages that are not done yet.

        Args:
            say: Called with a line before each stage.
            options: Options for every stage, which do not change its results.
            options_of_fit: Options for the stages that train, which do not change their results.

        Raises:
            FileExistsError: If the folder holds something else, or the images or settings of a stage that has begun
                were others.
            FileNotFoundError: If the images are not there.
            ValueError: If images lack captions, or the recipe takes none.
            RuntimeError: If a stage fails; its own error comes before.
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
            # -P: Python does not look for modules in the current folder, which may be that of somebody's images.
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
                raise RuntimeError(f"stage {number}, {name}, failed; the same command again continues from there")

    def _stages(self) -> dict[str, Callable[[], list[str]]]:
        return {"autoencoder": self._autoencoder, "latents": self._latents, "denoiser": self._denoiser}

    def _autoencoder(self) -> list[str]:
        options = replace(self.table, label=None, caption=None).words("--data.")
        return [*self._fit("autoencoder", self.autoencoder, self.images), *options]

    def _latents(self) -> list[str]:
        flags = {"--class_labels": self.class_labels, "--captions": self.captions, "--horizontal_flip": self._flips()}
        source = self._data_of(self.autoencoder).get("source", {}).get("init_args", {})
        return [
            *("encode", str(self.output / "autoencoder"), str(self.images), "--output", str(self.output / "latents")),
            *("--background", source.get("background", "white"), "--on_bad_file", source.get("on_bad_file", "error")),
            *(flag for flag, is_set in flags.items() if is_set),
            *self._table().words(),
        ]

    def _denoiser(self) -> list[str]:
        arguments = self._fit("denoiser", self.denoiser, self.output / "latents")
        if self.class_labels:
            arguments += self._of_classes(len(read_json(self.output / "latents" / "index.json")["class_names"]))
        return arguments

    def _of_classes(self, num_classes: int) -> list[str]:
        """The arguments that the denoiser's run has for classes; none without them."""
        if not self.class_labels:
            return []
        dropout = read_settings(self.denoiser).get("model", {}).get("label_dropout") or LABEL_DROPOUT
        return [f"--model.unet.num_class_embeds={num_classes + 1}",  # and the null label
                f"--model.label_dropout={dropout}"]  # fmt: skip

    def _fit(self, name: str, recipe: Path, root: Path) -> list[str]:
        run = self.output / name
        return ["fit", f"--config={recipe}", f"--data.root={place_of(root)}", f"--trainer.default_root_dir={run}"]

    def _table(self) -> Table:
        """Which part of a data set is used: what is named here, and otherwise in the recipe of the autoencoder."""
        of_recipe = self._data_of(self.autoencoder).get("source", {}).get("init_args", {}).get("table") or {}
        return Table(**{**of_recipe, **self.table.named})

    def _files(self) -> ImageFiles:
        return find_images(self.images, self._table())

    def _flips(self) -> bool:
        return bool(self._data_of(self.denoiser).get("horizontal_flip"))

    def _data_of(self, recipe: Path) -> dict[str, Any]:
        return read_settings(recipe).get("data", {}).get("init_args", {})

    def _check(self, options: Sequence[str]) -> None:
        """Refuse before the first stage what would make a later one fail."""
        for stage, recipe in {"autoencoder": self.autoencoder, "denoiser": self.denoiser}.items():
            if (task := read_settings(recipe).get("task", "denoise")) != TASKS[stage]:
                raise UsageError(f"the recipe of the {stage} must have task {TASKS[stage]}, got {task}")
        check_used(self._table(), class_labels=self.class_labels, captions=self.captions)
        files = self._files()
        num_classes = len(classes_of(files, files.names, self.images)[1]) if self.class_labels else 0
        if self.captions:
            read_captions(files, files.names)
            if not read_settings(self.denoiser).get("model", {}).get("conditions"):
                raise ValueError(f"the recipe {self.denoiser} must have conditions to take captions; use "
                                 "latents_text, or leave --captions out")  # fmt: skip
        autoencoder = self._autoencoder()
        denoiser = [*self._fit("denoiser", self.denoiser, self.images), *self._of_classes(num_classes)]
        runs = {"autoencoder": [*autoencoder, *options], "denoiser": [*denoiser, *options]}
        for words in runs.values():
            check_arguments(words)
        check_runs(runs)

    def settings(self, stage: str, images: Mapping[str, Fingerprint]) -> dict[str, Any]:
        """The settings that a stage keeps once it has begun, as plain values.

        Args:
            stage: The name of the stage.
            images: The fingerprint of each image.
        """
        if stage == "denoiser":
            return {
                f"{CONTENTS}denoiser recipe": _hash(self.denoiser),
                "class_labels": self.class_labels,
                f"{CONTENTS}latents": _hash(self.output / "latents" / "index.json"),
            }
        settings: dict[str, Any] = {
            "images": absolute_place(self.images),
            f"{CONTENTS}images": hash_of_all({name: one[1] for name, one in images.items()}),
            f"{CONTENTS}autoencoder recipe": _hash(self.autoencoder),
            **replace(self._table(), label=None, caption=None).settings(),
        }
        if stage == "latents":
            files = self._files()
            settings |= {
                **self._table().settings(),
                "class_labels": self.class_labels,
                "captions": self.captions,
                f"{CONTENTS}captions": _texts_hash(read_captions(files, files.names).texts if self.captions else []),
                "horizontal_flip": self._flips(),
                f"{CONTENTS}autoencoder": folder_hash(self.output / "autoencoder" / "autoencoder"),
            }
        return settings

    def _record(self, options_of_fit: Sequence[str]) -> dict[str, Any]:
        """The record of the stages, after a check that their settings are those of now."""
        path = self.output / RECORD
        remove_left_behind(self.output, RECORD)
        if not path.exists() and self.output.exists() and any(self.output.iterdir()):
            raise FileExistsError(f"{self.output} holds files of something else; choose another --output")
        empty: dict[str, Any] = {"settings": {}, "images": {}, "seconds": {}, "done": []}
        record = read_json(path) if path.exists() else empty
        for field in empty:
            field_of(record, field, path)
        now = fingerprints(self._files(), record["images"])
        self._refuse_other_settings(record, now)
        self._check(options_of_fit)
        record["images"] = now
        self._write(record)
        return record

    def _has_begun(self, stage: str) -> bool:
        """Whether a stage has left files to continue from; one that failed before that, as by a typo, has not."""
        left = {"latents": SETTINGS}.get(stage, "checkpoints/*.ckpt")
        return any((self.output / stage).glob(left))

    def _refuse_other_settings(self, record: dict[str, Any], images: dict[str, Fingerprint]) -> None:
        before, now = dict[str, Any](), dict[str, Any]()
        for stage, settings in record["settings"].items():
            if stage in record["done"] or self._has_begun(stage):
                before |= settings
                now |= self.settings(stage, images)
        name = f"{CONTENTS}images"
        details = {name: f"{name}: {first_few(changes(record['images'], images))}"}
        fix = "choose another --output, or the settings as they were"
        refuse_other_settings(self.output, before, now, "stages", fix, details)

    def _write(self, record: dict[str, Any]) -> None:
        with atomic_write(self.output / RECORD) as partial:
            partial.write_text(json.dumps(record, indent=1))


def check_runs(runs: dict[str, list[str]]) -> None:
    """Check that the runs of fit can begin, before the first of them is trained.

    Args:
        runs: The arguments of `fit`, by stage.

    Raises:
        UsageError: If a recipe is wrong.
    """
    command = [sys.executable, "-P", "-m", "unet_diffusion.commands.check_runs", json.dumps(runs)]
    done = subprocess.run(command, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    if done.returncode:
        said = done.stderr.rpartition("unet-diffusion: error: ")[2].partition("\n(--traceback")[0].strip()
        raise UsageError(said or f"the recipes could not be built: their process ended with status {done.returncode}")


def _exit_status(command: list[str]) -> int:
    """The exit status of a process; 128 and the number of the signal if a signal ended it, as shells report it.

    The process ends by itself when it is interrupted: SIGTERM is passed on, and a terminal sends SIGINT to both.
    """
    process = subprocess.Popen(command, preexec_fn=_stopped_with_its_parent())
    with handled((signal.SIGINT,), lambda *_: None), handled((signal.SIGTERM,), lambda *_: process.terminate()):
        status = process.wait()
    return status if status >= 0 else 128 - status


def _stopped_with_its_parent() -> Callable[[], object] | None:
    """A function for a new process to call first, so that Linux sends it SIGTERM when this one is killed."""
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)  # the C library
    return lambda: library.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _hash(file: Path) -> str:
    """The hash of the contents of a file; "" if it is not there."""
    return content_hash(file.read_bytes()) if file.is_file() else ""


def _texts_hash(texts: list[str]) -> str:
    return content_hash(json.dumps(texts).encode())
