"""What every command does with bad inputs: exit status, seconds, memory, what is left behind, and what is said.

    python benchmarks/bad_inputs.py
    python benchmarks/bad_inputs.py --only "sample"     # the cases whose names match; the others keep their results

A case is a name and a command line, and most are made from the tables below: the wrong values of an option, the ways to
damage a file, the texts of a configuration. Each runs in a process and a folder of its own, two at a time. The script
fails if a bad input is accepted, takes more than 10 s or 2 GiB, leaves a file behind, or is answered with a traceback,
with the words of Python, torch or the system, or with a page of text. On a machine that others use, too, the seconds
are those of the processor, unless a command waits for something else.
"""

import argparse
import gc
import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from bad_files import make_inputs, write_damaged
from measure import RESULTS, describe, environment, table, write_json

ROOT = Path(__file__).parents[1]
MAX_SECONDS, MAX_GIB, MAX_LINES = 10, 2, 15
MAX_SHARE = 4  # programs on a core: what waits longer than it computes times that does not wait for them
PATIENCE = 60  # seconds, after which a command is stopped: it has accepted its input
AT_ONCE = 2
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "120"}

SAMPLE = "sample {run} --output out --device cpu --num_inference_steps 2 --num_images 2 --speed plain"
SEGMENT = "segment {cells}.ckpt {grey} --output out --device cpu --speed plain"
ENCODE = "encode {autoencoder} {images} --output out --device cpu"
PACK = "pack {images} out"
STAGES = "two-stages {images} --output out"
DENOISE = (
    "fit --config digits --trainer.default_root_dir out --trainer.accelerator cpu --trainer.max_steps 1 "
    "--model.unet.init_args.channels [8,16] --model.unet.init_args.norm_num_groups 4 --model.speed plain "
    "--trainer.precision 32-true --trainer.enable_progress_bar false --samples.num_images 2 "
    "--samples.num_inference_steps 2"
)
FOLDER = (
    f"{DENOISE} --data Folder --data.root {{images}} --data.image_size 16 "
    "--data.channels 1 --data.class_labels true --model.unet.init_args.num_class_embeds 3"
)
STREAM = (
    f"{DENOISE} --data Shards --data.root {{shards}} --data.image_size 16 "
    "--data.channels 1 --data.class_labels true --model.unet.init_args.num_class_embeds 3"
)
CELLS = (
    "fit --config cells --trainer.default_root_dir out --trainer.accelerator cpu --trainer.max_steps 1 "
    "--model.unet.init_args.channels [4,8] --data.num_val 1 --trainer.precision 32-true "
    "--trainer.enable_progress_bar false --data.num_images 4"
)
PAIRS = f"{CELLS} --data.source PairedFiles --data.images {{grey}}"
AUTOENCODE = (
    "fit --config autoencoder_kl --trainer.default_root_dir out --trainer.accelerator cpu --trainer.max_steps 1 "
    "--data.root {images} --data.image_size 16 --trainer.precision 32-true "
    "--trainer.enable_progress_bar false"
)
LATENTS = (
    "fit --config latents --trainer.default_root_dir out --trainer.accelerator cpu --trainer.max_steps 1 "
    "--data.root {latents} --trainer.precision 32-true --trainer.enable_progress_bar false "
    "--model.unet.init_args.channels [32,32] --model.unet.init_args.attention_levels [] "
)

# Of each command, wrong values of its options, those of an option as a shell would part them.
VALUES = {
    SAMPLE: {
        "--num_images": "0 -1 1.5 x '' nan 1000000000 99999999999999999999",
        "--scheduler": "x '' DDIM UnCLIPScheduler FlowMatchEulerDiscreteScheduler 5 os.system",
        "--num_inference_steps": "0 -1 x 1.5 1001 100000000",
        "--labels": "9 -1 bird '' 1.0 cat,dog",
        "--captions": "heart",
        "--guidance_scale": "nan inf -inf 1e30 x ''",
        "--guidance_rescale": "-0.1 1.1 nan x",
        "--guidance_interval": "'5 1' '-1 5' 'x y' 1 '0 2000'",
        "--autoguidance": "nowhere {images} {cells}.ckpt {text} {empty}",
        "--seed": "x 1.5 ''",
        "--image_size": "'0 0' '-8 8' 8 '7 9' 'x y' '1000000 1000000'",
        "--window": "0 -8 x 7",
        "--overlap": "0.5",
        "--image": "nowhere {images} {text} {empty} {cut_png}",
        "--strength": "0.5",
        "--mask": "{png}",
        "--noise_level": "20",
        "--interpolate": "'1 1' 1 'x y'",
        "--autoencoder": "{autoencoder} nowhere",
        "--output": "{text} /proc/nowhere/out {text}/out {drawn} ''",
        "--batch_size": "0 -1 x 1.5",
        "--device": "x '' gpu cuda:0 cpu:x 5 tpu",
        "--precision": "x 16 bf16",
        "--speed": "x '' fastest",
        "--image {png} --strength": "0 1.1 -1 nan x",
        "--image {png} --mask": "nowhere {text} {images} {small_png} {black_png}",
        "--image {png} --scheduler": "PNDMScheduler LMSDiscreteScheduler",
        "--image_size 16 16 --window 8 --overlap": "1 -0.1 nan x",
    },
    SEGMENT: {
        "--window_size": "0 -1 x 1.5",
        "--device": "x cuda:0 tpu",
        "--precision": "x 16",
        "--speed": "x",
        "--output": "{text} /proc/nowhere/out {text}/out {images} ''",
        "--instances": "''",
        "--views": "2",
    },
    ENCODE: {
        "--image_size": "'0 0' '-16 16' '15 15' 'x y' 16 '512 512'",
        "--batch_size": "0 -1 x",
        "--background": "x '' #12 rgb(1,2)",
        "--on_bad_file": "x ''",
        "--device": "x cuda:0",
        "--output": "{text} /proc/nowhere/out {images} ''",
        "--precision": "x",
    },
    PACK: {
        "--shard_images": "0 -1 x 1.5",
        "--image_size": "'0 0' '-1 -1' 'x y' 16 '512 512'",
        "--image_size 16 16 --background": "x '' #12",
        "--channels": "2 0 x",
        "--on_bad_file": "x",
    },
    STAGES: {
        "--autoencoder": "x '' {text} {images} latents digits cells {png}",
        "--denoiser": "x '' {text} {images} autoencoder_kl digits cells {png}",
        "--output": "{text} /proc/nowhere/out {text}/out {images} ''",
        "--captions": "--class_labels",
        "--allow": "'' 1x",
    },
    DENOISE: {
        "--config": "x '' nowhere.yaml {images} {png} {empty} logger cells latents",
        "--ckpt_path": "nowhere {images} {text} {empty} {cells}.ckpt {autoencoder}.ckpt {denoiser}.ckpt http://x/y",
        "--weights_only": "false",
        "--task": "x segment autoencode",
        "--seed_everything": "x -1",
        "--trainer.max_steps": "0 -2 x 1.5 nan",
        "--trainer.max_epochs": "-2 1.5",
        "--trainer.max_time": "x",
        "--trainer.overfit_batches": "1 0.5",
        "--trainer.precision": "x 64-true",
        "--trainer.accelerator": "x gpu",
        "--trainer.devices": "0 -2 x",
        "--trainer.num_nodes": "0",
        "--trainer.strategy": "x",
        "--trainer.logger": "x 5",
        "--trainer.callbacks": "x os.system Callback",
        "--trainer.profiler": "x",
        "--trainer.plugins": "x",
        "--trainer.gradient_clip_val": "-1 nan",
        "--trainer.gradient_clip_algorithm": "x",
        "--trainer.accumulate_grad_batches": "0 1.5",
        "--trainer.log_every_n_steps": "-1",
        "--trainer.val_check_interval": "-1 0 1.5",
        "--trainer.check_val_every_n_epoch": "0 -1",
        "--trainer.limit_train_batches": "-1 1.5 0",
        "--trainer.limit_val_batches": "-1 nan",
        "--trainer.num_sanity_val_steps": "-2",
        "--trainer.default_root_dir": "{text} /proc/nowhere/out {text}/out s3://x/y",
        "--trainer.max_stepz": "5",
        "--trainer.barebones": "true",
        "--trainer.fast_dev_run": "-1",
        "--trainer.deterministic": "x",
        "--trainer.reload_dataloaders_every_n_epochs": "-1",
        "--model.speed": "x graphed",
        "--model.ema_decay": "1 -0.1 nan",
        "--model.lr_warmup_steps": "-1 1.5",
        "--model.lr_decay": "x",
        "--model.loss_weighting": "x",
        "--model.label_dropout": "-0.1 1.1",
        "--model.optimizer": "x os.system torch.nn.Linear",
        "--model.optimizer.init_args.lr": "-1 nan",
        "--model.optimizer.init_args.weight_decay": "-1",
        "--model.optimizer.init_args.betas": "[0.9] [2,2]",
        "--model.optimizer.init_args.nothing": "1",
        "--model.unet": "os.system torch.nn.Linear unet_diffusion.models.unet.NoUNet",
        "--model.unet.init_args.channels": "[] [0,8] [8.5,8] [7,16] [1000000,1000000]",
        "--model.unet.init_args.in_channels": "0 3",
        "--model.unet.init_args.layers_per_block": "0 1000000000",
        "--model.unet.init_args.norm_num_groups": "0 3",
        "--model.unet.init_args.attention_levels": "[5] x",
        "--model.unet.init_args.num_class_embeds": "0 5 1000000000",
        "--model.unet.init_args.dropout": "-1 2",
        "--model.unet.init_args.num_heads": "0 7",
        "--model.schedule.init_args.num_train_timesteps": "0 1000000000 1.5",
        "--model.schedule.init_args.beta_schedule": "x",
        "--model.schedule.init_args.prediction_type": "x",
        "--model.schedule.init_args.beta_end": "2 nan",
        "--model.seed": "x",
        "--model.nothing": "1",
        "--data": "x os.system MNIST",
        "--data.batch_size": "0 -1 x 1.5 nan",
        "--data.num_val": "0 -1 x 100000",
        "--data.num_workers": "-1",
        "--data.nothing": "1",
        "--samples.every_n_steps": "-1",
        "--samples.num_images": "0 1000000000",
        "--samples.num_inference_steps": "0 1001",
        "--samples.guidance_scale": "nan inf",
        "--samples.scheduler": "x UnCLIPScheduler",
        "--checkpoint.every_n_train_steps": "-1",
        "--checkpoint.save_top_k": "-2",
        "--checkpoint.monitor": "nothing val/loss/x",
        "--checkpoint.dirpath": "/elsewhere ../up",
        "--checkpoint.filename": "'' ../x /x a{{b!r}}",
        "--checkpoint.mode": "x",
        "--nothing": "1",
        "--allow": "'' 1x",
        "--modle.speed": "plain",
        "--trainer.callbacks EarlyStopping --trainer.callbacks.monitor": "nothing val/losss",
    },
    FOLDER: {
        "--data.root": "nowhere {text} {empty} {empty_folder} {cut_zip} {zip}/none {shards} /dev/zero",
        "--data.image_size": "0 -1 x 1.5 [16] [16,0] 512 [1000000,1000000]",
        "--data.channels": "0 2 5 x 3",
        "--data.class_labels": "x 2",
        "--data.background": "x #12",
        "--data.on_bad_file": "x",
        "--data.num_val": "0 8 9",
        "--model.unet.init_args.num_class_embeds": "2 1 null",
    },
    STREAM: {
        "--data.root": "nowhere {text} {images} {empty_folder} http://127.0.0.1:9/x reference://x x::y",
        "--data.image_size": "0 512 x",
        "--data.captions": "true",
        "--data.num_lanes": "0",
        "--data.window": "0 -1 x",
    },
    CELLS: {
        "--data.window_size": "0 -1 x 100000 7",
        "--data.num_val": "0 4 5",
        "--data.windows_per_image": "0",
        "--data.targets.label_format": "x classes",
        "--data.targets.border_width": "-1",
        "--data.source": "x PairedFilez",
        "--data.num_images": "0 1 -1 x",
        "--data.augmentation.elastic_sd": "-1 nan x",
        "--data.augmentation.brightness": "-1",
        "--data.augmentation.shuffle": "-1 2 x",
        "--data.object_share": "-1 2 x",
        "--data.num_fit": "-1 100 x",
        "--model.loss": "x",
        "--model.unet.init_args.out_channels": "0 2",
        "--model.unet.init_args.padding": "x",
        "--model.init_from": "nowhere {text} {images} {cells}.ckpt {denoiser}.ckpt {empty}",
        "--ckpt_path": "{denoiser}.ckpt {cells}.ckpt",
    },
    PAIRS: {
        "--data.labels": "nowhere {images} {text} {empty_folder} {small_labels}",
    },
    AUTOENCODE: {
        "--data.image_size": "15 0",
        "--model.autoencoder.init_args.channels": "[] [0] [31,32] x",
        "--model.autoencoder.init_args.latent_channels": "0 -1 x",
        "--model.nothing": "1",
        "--data.class_labels": "true",
        "--data.captions": "true",
    },
    LATENTS: {
        "--data.root": "nowhere {images} {text} {shards}",
        "--model.unet.init_args.in_channels": "3",
        "--model.unet.init_args.num_class_embeds": "3",
    },
    f"{DENOISE.replace('fit', 'validate', 1)} --ckpt_path {{digits}}.ckpt": {
        "--ckpt_path": "'' nowhere {text} {cells}.ckpt best",
        "--config": "cells x",
        "--trainer.limit_val_batches": "-1 x",
    },
}

# Files that are none, or another's: {file} of each is made by `bad_files.write_damaged`.
CHECKPOINTS = (
    *("empty", "text", "cut", "flipped", "compressed", "zip", "png", "json", "code", "huge", "huge old", "list"),
    *("no weights", "fewer weights", "other weights", "nan weights", "wide", "deep", "strided"),
)
TAKE_CHECKPOINTS = {
    "denoiser": "sample {file} --output out --device cpu --num_images 1 --num_inference_steps 2",
    "cells": "segment {file} {grey} --output out --device cpu",
    "autoencoder": "export {file} out",
    "digits": f"{DENOISE} --ckpt_path {{file}}",
}
RECORDS = {  # values of a field that it cannot have; "-" is none at all
    "denoiser": {
        "unet": ("-", None, 5, {}, {"class_path": "os.system", "init_args": {}}, {"class_path": 5, "init_args": {}}),
        "schedule": ("-", None, {}, {"num_train_timesteps": 10**9}, {"num_train_timesteps": "x"}, {"nothing": 1}),
        "sample_shape": ("-", None, [1, 8], [1, 8, -8], [3, 8, 8], ["x", 8, 8], [1, 7, 8], [1, 10**6, 10**6]),
        "null_label": ("-", 3, -1, "x", 1.5),
        "class_names": ("-", ["cat"], "cats", [1, 2], ["cat", "cat"]),
        "settings": ("-", None, 5),
        "latent_space": ("-", 5, {"mean": [1]}),
        "conditions": ("-", None, [5], [{"class_path": "os.system", "init_args": {}}]),
    },
    "cells": {
        "unet": ("-", None, {}),
        "kind": ("-", "x", None, "instances"),
        "class_names": ("-", ["cell"], None, "cells", [1, 2]),
        "timestep": ("-", -1, "x", 1.5),
        "stretch": ("-", "x", None, 2),
        "window_size": ("-", 0, -1, "x", None, 1.5),
        "settings": ("-", None, 5),
        "threshold": ("-", 0.0, 1.0, "x", None),
        "min_size": ("-", 0, "x", None, 1.5),
    },
    "autoencoder": {
        "class_name": ("-", "x", None, 5, "UNet2DModel"),
        "config": ("-", None, {}, {"nothing": 1}, {"block_out_channels": [16000, 16000]}),
        "image_shape": ("-", None, [3, 16], [3, 16, -16], [1, 16, 16], ["x", 16, 16]),
        "settings": ("-", None, 5),
    },
}

CONFIGURATIONS = {
    "empty": "",
    "a list": "- 1",
    "a word": "trainer",
    "no YAML": "a: [1",
    "a tab": "trainer:\n\tmax_steps: 5",
    "a section twice": "model:\n  seed: 1\nmodel:\n  seed: 2",
    "a name twice": "model:\n  seed: 1\n  seed: 2",
    "an unknown section": "modle:\n  seed: 1",
    "an unknown name": "model:\n  sede: 1",
    "an unknown name deeper": "model:\n  unet:\n    init_args:\n      chanels: [8]",
    "no section": "trainer: 5",
    "a section without a value": "model:",
    "a list for a section": "data: [1, 2]",
    "a text for a number": "trainer:\n  max_steps: many",
    "a number for a list": "model:\n  unet:\n    init_args:\n      channels: 8",
    "a number that is a text": "model:\n  optimizer:\n    init_args:\n      lr: 2e-4x",
    "a class that is a list": "model:\n  unet:\n    class_path: [1]",
    "a class without its arguments": "model:\n  unet:\n    class_path: "
    "unet_diffusion.models.segmentation_unet.SegmentationUNet",
    "a class of another kind": "model:\n  unet:\n    class_path: unet_diffusion.diffusion.schedule.NoiseSchedule",
    "code": "model:\n  optimizer: !!python/object/apply:os.system ['id']",
    "an alias of itself": "model: &a\n  unet: *a",
    "aliases that grow": "a: &a [1,1,1,1,1,1,1,1,1]\n"
    + "".join(f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefg", "bcdefgh", strict=True)),
    "two documents": "trainer:\n  max_steps: 1\n---\ntrainer:\n  max_steps: 2",
    "a number for a name": "1: 2",
    "NaN": "model:\n  ema_decay: .nan",
    "infinity": "trainer:\n  max_steps: .inf",
    "a date": "trainer:\n  max_steps: 2020-01-01",
    "a secret in a name": "trainer:\n  default_root_dir: !ENV HOME",
    "deep": "model:\n  unet: " + "[" * 3000 + "]" * 3000,
    "a null byte": "trainer:\n  max_steps: 1\0",
}

TWO_STAGES = ("empty", "no YAML", "an unknown section", "an unknown name", "aliases that grow")  # of them

IMAGES = {  # folders of images with one that is bad
    "an empty file": b"",
    "a text": b"hello",
    "a cut PNG": "cut_png",
    "a PNG of one pixel": "pixel",
}
CAPTIONS = {  # metadata.csv beside the images
    "empty": b"",
    "a cut line": b"file_name,text\ncat/0.png",
    "no names": b"a,b\n1,2\n",
    "UTF-16": "file_name,text\ncat/0.png,x\n".encode("utf-16"),
    "null bytes": b"file_name,text\n\0\0\0,x\n",
    "one image only": b"file_name,text\ncat/0.png,x\n",
    "an open quote": b'file_name,text\ncat/0.png,"x\n' * 3,
    "a field of 200 kB": b"file_name,text\ncat/0.png," + b"x" * 200_000 + b"\n",
}
JSON = {
    "empty": "",
    "cut": '{"a": ',
    "a list": "[1]",
    "null": "null",
    "no fields": "{}",
}
TAKE_JSON = {  # files that a command reads, each in a copy of its folder
    "index of shards": ("shards", "index.json", STREAM.replace("{shards}", "{file}")),
    "settings of shards": ("shards", "settings.json", "pack {images} {file} --class_labels"),
    "index of latents": ("latents", "index.json", LATENTS.replace("{latents}", "{file}")),
    "settings of latents": ("latents", "settings.json", "encode {autoencoder} {images} --output {file} --device cpu"),
    "index of a pipeline": ("pipeline", "model_index.json", "import {file} out.ckpt"),
    "network of a pipeline": ("pipeline", "unet/config.json", "import {file} out.ckpt"),
    "scheduler of a pipeline": ("pipeline", "scheduler/scheduler_config.json", "import {file} out.ckpt"),
    "autoencoder": ("autoencoder", "config.json", "encode {file} {images} --output out --device cpu"),
    "settings of samples": ("drawn", "settings.json", f"{SAMPLE.replace('out', '{file}')} --resume"),
    "settings of masks": ("masks", "settings.json", SEGMENT.replace("out", "{file}")),
    "stages": ("stages", "stages.json", "two-stages {images} --output {file}"),
    "list of exports": ("pipeline", ".exported.json", "export {denoiser}.ckpt {file} --overwrite"),
}

OTHERS = {  # as they are
    "no command": "",
    "an unknown command": "smaple",
    "an option before the command": "--output out sample",
    "recipes show": "recipes show",
    "recipes show nothing": "recipes show x",
    "recipes show a folder": "recipes show {images}",
    "recipes copy nothing": "recipes copy x y.yaml",
    "recipes copy onto a file": "recipes copy digits {text}",
    "recipes copy to nowhere": "recipes copy digits nowhere/y.yaml",
    "recipes copy to a folder": "recipes copy digits {images}",
    "recipes of another action": "recipes list",
    "completion of another shell": "completion fish",
    "completion of none": "completion",
    "sample nothing": "sample",
    "sample from nowhere": "sample nowhere",
    "sample from images": "sample {images} --output out",
    "sample from a segmenter": "sample {cells}.ckpt --output out",
    "sample from an autoencoder": "sample {autoencoder} --output out",
    "sample to overwrite and resume": f"{SAMPLE} --overwrite --resume",
    "sample with an unknown option": f"{SAMPLE} --step 5",
    "segment nothing": "segment",
    "segment with a denoiser": "segment {denoiser}.ckpt {grey} --output out",
    "segment with a pipeline": "segment {pipeline} {grey} --output out",
    "segment without images": "segment {cells}.ckpt --output out",
    "segment images from nowhere": "segment {cells}.ckpt nowhere --output out",
    "segment a text": "segment {cells}.ckpt {text} --output out",
    "segment an empty folder": "segment {cells}.ckpt {empty_folder} --output out",
    "segment objects of classes": f"{SEGMENT} --instances",
    "segment into its input": "segment {cells}.ckpt {grey} --output {grey}",
    "encode with a denoiser": "encode {pipeline}/unet {images} --output out",
    "encode with a checkpoint": "encode {denoiser}.ckpt {images} --output out",
    "encode images from nowhere": "encode {autoencoder} nowhere --output out",
    "encode with captions that are not there": "encode {autoencoder} {grey} --output out --captions",
    "encode with classes that are not there": "encode {autoencoder} {grey} --output out --class_labels",
    "encode without output": "encode {autoencoder} {images}",
    "pack nothing": "pack",
    "pack from nowhere": "pack nowhere out",
    "pack a text": "pack {text} out",
    "pack an empty folder": "pack {empty_folder} out",
    "pack a cut archive": "pack {cut_zip} out",
    "pack onto a file": "pack {images} {text}",
    "pack into a folder of others": "pack {images} {grey}",
    "pack into a file system of no one": "pack {images} /proc/nowhere",
    "pack with classes that are not there": "pack {grey} out --class_labels",
    "pack with captions that are not there": "pack {grey} out --captions",
    "two-stages from nowhere": "two-stages nowhere --output out",
    "two-stages of a text": "two-stages {text} --output out",
    "two-stages with captions that are not there": "two-stages {grey} --output out --captions",
    "two-stages with classes that are not there": "two-stages {grey} --output out --class_labels",
    "export nothing": "export",
    "export from nowhere": "export nowhere out",
    "export a segmenter": "export {cells}.ckpt out",
    "export onto a file": "export {denoiser}.ckpt {text}",
    "export onto a file and overwrite": "export {denoiser}.ckpt {text} --overwrite",
    "export into a folder of others": "export {denoiser}.ckpt {images} --overwrite",
    "export to nowhere": "export {denoiser}.ckpt /proc/nowhere/out",
    "export with an autoencoder": "export {denoiser}.ckpt out --autoencoder {autoencoder}",
    "import nothing": "import",
    "import from nowhere": "import nowhere out.ckpt",
    "import a checkpoint": "import {denoiser}.ckpt out.ckpt",
    "import images": "import {images} out.ckpt",
    "import onto a file": "import {pipeline} {text}",
    "import into the name of its configuration": "import {pipeline} out.yaml",
    "import to nowhere": "import {pipeline} /proc/nowhere/out.ckpt",
    "import into a folder": "import {pipeline} {images}",
    "fit nothing": "fit",
    "fit a word": "fit digits",
    "fit into a folder of others": f"{DENOISE} --trainer.default_root_dir {{foreign}}",
    "fit classes that the network does not take": f"{FOLDER} --model.unet.init_args.num_class_embeds null",
    "fit captions that the network does not take": f"{FOLDER} --data.captions true",
    "validate nothing": "validate",
    "validate random weights": "validate --config digits",
}

RAW = re.compile(  # words that are Python's, torch's or the system's
    r"\[Errno|NoneType|has no attribute|not subscriptable|not iterable|unexpected keyword|positional argument|"
    r"invalid literal|could not convert|not supported between|unsupported operand|by zero|Expecting |Extra data|"
    r"index out of range|out of bounds|Error\(s\) in loading|codec can't|must be real number|object of type|"
    r"is not callable|cannot be interpreted|Invalid device string|RuntimeError|KeyError|TypeError|AttributeError|"
    r"object cannot be|must be str|can't convert|Torch not compiled|Dimension out|mat1 and mat2|expected scalar|"
    r"takes \d+ positional|BytesIO|<class|<function|dictionary update|too many values|not enough values|"
    r"PytorchStreamReader|unhashable|concatenate|Expected one of cpu|Invalid buffer size|division|mmap"
)


work: Callable[[int], dict[str, Any]]  # of the processes of `outcomes`


class Case(NamedTuple):
    """A bad input.

    Args:
        name: Its name.
        command: Words of the command, with the names of inputs in braces.
        prepare: Called with the folder of the case and the inputs, makes {file}; None: there is none.
        may_pass: Whether it may be carried out, within the memory.
    """

    name: str
    command: str
    prepare: Callable[[Path, dict[str, Path]], Path] | None = None
    may_pass: bool = False


@dataclass
class Outcome:
    """What became of a case."""

    status: int
    seconds: float
    cpu_seconds: float
    gib: float
    left: list[str]
    said: str
    may_pass: bool = False

    @property
    def faults(self) -> list[str]:
        """The rules that it breaks."""
        if self.may_pass and self.status == 0:
            return ["memory"] if self.gib > MAX_GIB else []
        lines = (self.message or self.said.strip()).splitlines()
        rules = {
            "accepted": self.status in (0, -signal.SIGKILL),
            "slow": self.seconds > MAX_SECONDS < max(self.cpu_seconds, self.seconds - MAX_SHARE * self.cpu_seconds),
            "memory": self.gib > MAX_GIB,
            "left": bool(self.left),
            "traceback": "Traceback (most recent call last)" in self.said,
            "raw": bool(RAW.search(self.message)) or re.fullmatch(r"'?[\w/]*'?", self.message) is not None,
            "long": len(lines) > MAX_LINES or "usage:" in self.said,
        }
        return [rule for rule, is_broken in rules.items() if is_broken and (self.status or rule != "raw")]

    @property
    def message(self) -> str:
        """The error, without the name of the program."""
        return self.said.rpartition("unet-diffusion: error: ")[2].partition("\n(--traceback")[0].strip()


def all_cases() -> Iterator[Case]:
    """Every case, from the tables."""
    for command, options in VALUES.items():
        start = " ".join(shlex.split(command)[:3]) if command.startswith(("fit", "validate")) else command.split()[0]
        kind = {FOLDER: " folder", STREAM: " stream", PAIRS: " pairs"}.get(command, "")
        for option, values in options.items():
            for value in shlex.split(values):
                yield Case(f"{start}{kind} {option} {value or repr('')}", f"{command} {option} {value or repr('')}")
    for name, text in CONFIGURATIONS.items():
        yield Case(f"fit --config with {name}", f"{DENOISE} --config {{file}}", _file("x.yaml", text.encode()))
        if name in TWO_STAGES:
            command = f"{STAGES} --denoiser {{file}}"
            yield Case(f"two-stages --denoiser with {name}", command, _file("x.yaml", text.encode()))
    for kind, command in TAKE_CHECKPOINTS.items():
        for damage in CHECKPOINTS:
            name = f"{command.split()[0]} a checkpoint of {kind}: {damage}"
            yield Case(name, command, lambda folder, at, k=kind, d=damage: write_damaged(at[k], d, folder / "x.ckpt"))
    for kind, fields in RECORDS.items():
        for field, values in fields.items():
            for value in values:
                name = f"{TAKE_CHECKPOINTS[kind].split()[0]} a {kind} whose {field} is {json.dumps(value)}"
                yield Case(name, TAKE_CHECKPOINTS[kind], _record(kind, field, value))
    for name, content in IMAGES.items():
        yield Case(f"fit an image that is {name}", f"{FOLDER} --data.root {{file}}", _image(content))
        yield Case(f"encode an image that is {name}", ENCODE.replace("{images}", "{file}"), _image(content))
    for name, content in CAPTIONS.items():
        command = f"{FOLDER} --data.captions true --data.root {{file}}"
        yield Case(f"fit captions: {name}", command, _changed("images", "metadata.csv", content))
        yield Case(f"pack captions: {name}", "pack {file} out --captions", _changed("images", "metadata.csv", content))
    for what, (source, file, command) in TAKE_JSON.items():
        for name, text in JSON.items():
            yield Case(f"{command.split()[0]}, {what}: {name}", command, _changed(source, file, text.encode()))
    yield Case("fit wide pictures", f"{FOLDER} --data.root {{wide}}", may_pass=True)
    for name, command in OTHERS.items():
        yield Case(name, command)


def _file(name: str, content: bytes) -> Callable[[Path, dict[str, Path]], Path]:
    def prepare(folder: Path, inputs: dict[str, Path]) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return prepare


def _changed(source: str, file: str, content: bytes) -> Callable[[Path, dict[str, Path]], Path]:
    """A copy of an input in which a file is another."""

    def prepare(folder: Path, inputs: dict[str, Path]) -> Path:
        shutil.copytree(inputs[source], folder / source)
        (folder / source / file).write_bytes(content)
        return folder / source

    return prepare


def _image(content: bytes | str) -> Callable[[Path, dict[str, Path]], Path]:
    def prepare(folder: Path, inputs: dict[str, Path]) -> Path:
        shutil.copytree(inputs["images"], folder / "images")
        data = content if isinstance(content, bytes) else inputs[content].read_bytes()
        (folder / "images" / "cat" / "bad.png").write_bytes(data)
        return folder / "images"

    return prepare


def _record(kind: str, field: str, value: Any) -> Callable[[Path, dict[str, Path]], Path]:
    return lambda folder, inputs: write_damaged(inputs[kind], "record", folder / "x.ckpt", field, value)


def words_of(case: Case, folder: Path, inputs: dict[str, Path]) -> list[str]:
    """The words of the command, in a folder in which its own files have been made."""
    places: dict[str, object] = dict(inputs)
    if case.prepare is not None:
        places["file"] = case.prepare(folder, inputs)
    return [word.format(**places) for word in shlex.split(case.command)]


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Each path below a folder, with size and time."""
    return {
        path.relative_to(folder).as_posix(): (0, 0) if path.is_dir() else (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
    }


def changed(before: dict[str, tuple[int, int]], after: dict[str, tuple[int, int]]) -> list[str]:
    """What is new, gone or another."""
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))


def run(case: Case, inputs: dict[str, Path], start: Callable[[list[str], Path, Path], int]) -> Outcome:
    """Carry out a case in a process of its own.

    Args:
        case: What to run.
        inputs: See `make_inputs`.
        start: Starts the process, `started` or `forked_off`.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder, said = Path(name) / "work", Path(name) / "said"
        folder.mkdir()
        words = words_of(case, folder, inputs)
        before, began = contents(folder), time.monotonic()
        process = start(words, folder, said)
        status, usage = waited_for(process)
        return Outcome(
            os.waitstatus_to_exitcode(status),
            round(time.monotonic() - began, 1),
            round(usage.ru_utime + usage.ru_stime, 1),
            round(usage.ru_maxrss / 2**20, 2),
            changed(before, contents(folder)),
            said.read_text(errors="replace"),
            case.may_pass,
        )


def started(words: list[str], folder: Path, said: Path) -> int:
    """The command in a new process, as a user starts it; its number."""
    with open(said, "wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "unet_diffusion", *words],
            cwd=folder, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True, env=ENVIRONMENT,
        )  # fmt: skip
    process.returncode = 0  # it is waited for elsewhere
    return process.pid


def forked_off(words: list[str], folder: Path, said: Path) -> int:
    """The command in a copy of this process, which has imported everything; its number."""
    import forked

    number = os.fork()
    if number:
        return number
    os.setsid()
    os.chdir(folder)
    file = os.open(said, os.O_RDWR | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    forked._become(["-P", "-m", "unet_diffusion", *words], ENVIRONMENT)
    raise AssertionError("it has ended")


def waited_for(process: int) -> tuple[int, Any]:
    """Status and use of a process, which is stopped when it takes too long."""
    ends = time.monotonic() + PATIENCE
    while True:
        number, status, usage = os.wait4(process, os.WNOHANG)
        if number:
            return status, usage
        if time.monotonic() > ends:
            os.killpg(process, signal.SIGKILL)
            ends = float("inf")
        time.sleep(0.02)


def record_of(case: Case, inputs: dict[str, Path], start: Callable[[list[str], Path, Path], int]) -> dict[str, Any]:
    """What became of a case, plain."""
    outcome = run(case, inputs, start)
    if outcome.faults == ["slow"]:  # others may have been busy
        outcome = min(outcome, run(case, inputs, start), key=lambda one: one.seconds)
    folder = str(inputs["run"].parent)
    said = (outcome.message or outcome.said.strip()).replace(folder, "DIR")
    lines = re.sub(rf"{re.escape(tempfile.gettempdir())}/\w+/work", "WORK", said).splitlines()
    return {
        "status": outcome.status,
        "seconds": outcome.seconds,
        "cpu_seconds": outcome.cpu_seconds,
        "gib": outcome.gib,
        "left": outcome.left[:5],
        "said": (lines or [""])[0][:300],
        "faults": outcome.faults,
    }


def import_everything() -> None:
    """So that a copy of this process need not."""
    sys.path.append(str(ROOT / "tests"))
    import forked
    import torch

    forked.import_everything()
    torch.set_num_threads(1)  # before there are any: a copy has one
    gc.collect()
    gc.freeze()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="regular expression: the cases whose names match it")
    parser.add_argument("--failed", action="store_true", help="only those that broke a rule when they last ran")
    parser.add_argument("--resume", action="store_true", help="only those that have not run yet")
    parser.add_argument("--every", type=int, default=1, help="only every so many of them")
    parser.add_argument("--forked", action="store_true",
                        help="in copies of a process that has imported everything, much faster: the seconds are "
                        "without those of the start, two to five on a machine that does nothing else")  # fmt: skip
    parser.add_argument("--list", action="store_true", help="print the cases and run none")
    parser.add_argument("--output", help="JSON file; default: benchmarks/results/bad_inputs.json")
    options = parser.parse_args()
    path = Path(options.output) if options.output else RESULTS / "bad_inputs.json"
    cases = list(all_cases())
    kept = json.loads(path.read_text())["cases"] if path.exists() else {}
    kept = {case.name: kept[case.name] for case in cases if case.name in kept}
    todo = [case for case in cases if re.search(options.only, case.name)][:: options.every]
    if options.failed:
        todo = [case for case in todo if kept.get(case.name, {}).get("faults")]
    if options.resume:
        todo = [case for case in todo if case.name not in kept]
    if options.list:
        print("\n".join(f"{case.name}\n    {case.command}" for case in todo))
        return 0
    machine = environment()
    print(describe(machine), flush=True)
    if options.forked:
        import_everything()
    start = forked_off if options.forked else started
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, ROOT / "benchmarks" / "bad_files.py", folder], check=True, env=ENVIRONMENT)
        inputs = make_inputs(Path(folder))  # they are there
        before = contents(Path(folder))
        for number, (case, record) in enumerate(outcomes(todo, inputs, start), start=1):
            kept[case.name] = {**record, "forked": options.forked}
            faults = ", ".join(record["faults"]) or "well"
            print(f"{number}/{len(todo)} {case.name} | {faults} | {record['seconds']} s | {record['said']}", flush=True)
            if number % 10 == 0 or number == len(todo):
                ordered = {case.name: kept[case.name] for case in cases if case.name in kept}
                write_json(path, {"environment": machine, "cases": ordered})
        if touched := changed(before, contents(Path(folder))):
            print(f"inputs were changed: {', '.join(touched)}")
    return report(kept, len(cases), bool(touched))


def outcomes(
    cases: list[Case], inputs: dict[str, Path], start: Callable[[list[str], Path, Path], int]
) -> Iterator[tuple[Case, dict[str, Any]]]:
    """Each case with its record, by processes of which each has one thread, so that they can be forked."""
    global work
    work = lambda number: record_of(cases[number], inputs, start)  # noqa: E731  # a fork knows it
    with multiprocessing.get_context("fork").Pool(AT_ONCE, maxtasksperchild=50) as pool:
        yield from zip(cases, pool.imap(_done, range(len(cases))), strict=True)


def _done(number: int) -> dict[str, Any]:
    return work(number)


def report(records: dict[str, dict[str, Any]], num_cases: int, touched: bool) -> int:
    """Print what breaks a rule; the exit status."""
    bad = {name: record for name, record in records.items() if record["faults"]}
    rows = [
        {"case": name, "status": one["status"], "s": one["seconds"], "GiB": one["gib"], "left": len(one["left"]),
         "breaks": ", ".join(one["faults"]), "said": one["said"][:100].replace("|", "\\|")}
        for name, one in bad.items()
    ]  # fmt: skip
    if rows:
        print(table(rows))
    counts = {
        rule: sum(rule in one["faults"] for one in bad.values()) for one in bad.values() for rule in one["faults"]
    }
    slowest = max((one["seconds"] for one in records.values()), default=0)
    largest = max((one["gib"] for one in records.values()), default=0)
    print(f"{len(records)} of {num_cases} bad inputs ran; {len(bad)} break a rule {counts or ''}; "
          f"the slowest took {slowest} s, the largest {largest} GiB")  # fmt: skip
    return 1 if bad or touched else 0


if __name__ == "__main__":
    sys.exit(main())
