"""Every benchmark runs, with settings that only make it small, and writes what it says that it measures."""

import argparse
import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import cifar10
import conditions
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from features import frechet_distance, label_entropy
from forked import run_python
from latents_against_pixels import compile_ahead
from PIL import Image
from scaling import BYTES_HELD, Cluster, predict_ddp, predict_fsdp2, ring_bytes
from test_configs import write_fashion_mnist, write_pairs
from until_time import STEPS, UntilTime

from unet_diffusion.diffusion.conditions.box_tokens import BoxTokens
from unet_diffusion.diffusion.conditions.low_resolution import LowResolution
from unet_diffusion.diffusion.conditions.masked_image import MaskedImage
from unet_diffusion.diffusion.conditions.paired_image import PairedImage
from unet_diffusion.diffusion.conditions.semantic_map import SemanticMap
from unet_diffusion.diffusion.schedule import NoiseSchedule
from unet_diffusion.evaluation.following import measure_of
from unet_diffusion.inference.denoiser import Denoiser
from unet_diffusion.inference.record import save_denoiser
from unet_diffusion.inference.segmenter import Segmenter
from unet_diffusion.models.denoiser_unet import DenoiserUNet
from unet_diffusion.models.segmentation_unet import SegmentationUNet

ROOT = Path(__file__).parents[1]
DIGITS = ["--config", "digits", "--model.speed", "plain", "--trainer.precision", "32-true"]
TINY_FIT = [
    *["--config", str(ROOT / "configs" / "digits.yaml")],
    *["--trainer.precision", "32-true", "--trainer.accelerator", "cpu", "--model.speed", "plain"],
    *["--model.unet.init_args.channels", "[8,16]", "--model.unet.init_args.norm_num_groups", "4"],
    *["--data.batch_size", "8", "--samples.num_images", "2", "--samples.num_inference_steps", "2"],
]


def printed(command: list, **options) -> str:
    """What the script says; it must end well."""
    done = run_python(command, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run(script: str, *arguments: object, output: Path) -> dict:
    """What the script wrote; it prints a table too."""
    command = [sys.executable, ROOT / "benchmarks" / script, *arguments, "--output", output]
    assert "| --- |" in printed(command, cwd=output.parent)
    return json.loads(output.read_text())


def test_formats(tmp_path):
    cases = run("formats.py", output=tmp_path / "formats.json")["cases"]
    assert {case["largest difference"] for case in cases} == {0.0}


@pytest.mark.slow
def test_loading(tmp_path):
    report = run("loading.py", "--size", "tiny", "--turns", 1, "--folder", tmp_path, output=tmp_path / "loading.json")
    assert all(turn["seconds"] > 0 and turn["MiB"] > 0 for turns in report["turns"].values() for turn in turns)


@pytest.mark.slow
def test_train_step(tmp_path):
    report = run(
        "train_step.py", "--network", "tiny", "--contenders", "unet_diffusion", "diffusers",
        "--ours", "plain", "--blocks", 2, "--steps", 1, "--device", "cpu", output=tmp_path / "train_step.json",
    )  # fmt: skip
    for contender in ("unet_diffusion", "diffusers"):
        assert all(taken > 0 for taken in report["contenders"][contender]["seconds_per_step"])
        assert report["contenders"][contender]["peak_mib"] > 0
    # the same network needs the same operations
    assert report["contenders"]["unet_diffusion"]["forward_flops"] == report["contenders"]["diffusers"]["forward_flops"]
    assert torch.__version__.startswith(report["environment"]["versions"]["torch"])


@pytest.mark.slow
def test_sample(tmp_path):
    schedulers = ["DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"]
    report = run(
        "sample.py", "--network", "tiny", "--contenders", "unet_diffusion", "diffusers", "--scheduler", *schedulers,
        "--batch_size", 2, "--ours", "plain", "--blocks", 2, "--device", "cpu", output=tmp_path / "sample.json",
    )  # fmt: skip
    assert [record["scheduler"] for record in report["contenders"]] == [name for name in schedulers for _ in range(2)]


@pytest.mark.slow
def test_gpu_on_a_cpu(tmp_path):
    ours, theirs = "unet_diffusion:plain", "diffusers"
    cases = [f"{task}:tiny:2:{contender}" for task in ("train", "sample") for contender in (ours, theirs)]
    cases.append(f"fit:tiny:2:{ours}")
    report = run("gpu.py", "--cases", *cases, "--minutes", 3, "--device", "cpu", output=tmp_path / "gpu.json")
    found = {(record["task"], record["contender"]) for record in report["contenders"] if len(record["seconds"]) == 3}
    assert len(found) == 5
    # Of two timings so short either may be the longer one: only that the share was measured is certain.
    assert next(record["of_the_bare_step"] for record in report["contenders"] if record["task"] == "fit") > 0


@pytest.mark.slow
def test_fit(tmp_path):
    report = run(
        "fit.py", *TINY_FIT, "--trainer.max_steps", 4, "--blocks", 2, "--steps", 1, output=tmp_path / "fit.json"
    )
    assert len(report["step_seconds"]) == 3  # between four
    assert 0 < report["start_seconds"][0] < report["whole_seconds"]


@pytest.mark.slow
def test_start_of_fit(tmp_path):
    report = run("fit.py", "--start_only", *TINY_FIT, "--repeats", 1, output=tmp_path / "start.json")
    assert len(report["start_seconds"]) == 1


@pytest.mark.slow
def test_time_to_quality(tmp_path):
    write_fashion_mnist(tmp_path / "data", num_images=700)
    command = [sys.executable, str(ROOT / "benchmarks" / "time_to_quality.py"), "--root", str(tmp_path / "data")]
    command += ["--minutes", "0.2", "--num_images", "10", "--contenders", "diffusers_tuned", "ours"]
    command += ["--calibration_steps", "1", "5", "--work", str(tmp_path / "work"), "--json", str(tmp_path / "t.json")]
    command += ["--model.unet.init_args.channels=[32,32,32]", "--samples.num_inference_steps=2"]
    command += ["--model.speed=plain"]  # nothing is compiled
    printed(command)
    results = json.loads((tmp_path / "t.json").read_text())["results"]
    assert {result["contender"] for result in results} == {"diffusers_tuned", "ours"}
    assert all(result["distance"] > 0 and result["steps"] > 0 for result in results)
    assert (tmp_path / "time_to_quality_ours_0.2.png").exists()
    seconds = [result["seconds"] for result in results]
    printed(command)  # finds them, and measures nothing again
    assert [result["seconds"] for result in json.loads((tmp_path / "t.json").read_text())["results"]] == seconds
    judging = [*command[:4], "--num_images", "10", "--work", str(tmp_path / "work")]
    judging += ["--judge", str(tmp_path / "work" / "ours_0.2_0")]
    ours = next(result for result in results if result["contender"] == "ours")
    guidance_scale = str(ours["guided"]["guidance_scale"])
    for options, expected in (([], ours), (["--guidance_scale", guidance_scale], ours["guided"])):
        (distance,) = re.findall(r"distance ([\d.]+), label entropy", printed([*judging, *options]))
        assert float(distance) == pytest.approx(expected["distance"], abs=0.01)
    said = printed([*judging, "--scheduler", "DDIMScheduler", "--num_inference_steps", "4"])
    assert "10 images of seed 0 by 4 steps of DDIMScheduler, guidance 1, in" in said


def test_options_of_judging_and_of_training_are_not_mixed(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "time_to_quality.py"), "--root", str(tmp_path)]
    for options, said in (
        (["--judge", "run", "--model.loss", "l1"], "--judge trains nothing, and takes no --model.loss l1"),
        (["--guidance_scale", "2"], "--guidance_scale is for --judge RUN"),
    ):
        done = run_python([*command, *options])
        assert done.returncode == 2
        assert said in done.stderr


PAINTS = {"blue": (0, 0, 200), "green": (0, 200, 0), "red": (200, 0, 0)}


@pytest.fixture(scope="module")
def paints(tmp_path_factory):
    """The folders of CIFAR-10 with three classes of noise on a colour; of each 20 to train and 5 to test."""
    root = tmp_path_factory.mktemp("cifar10")
    for part, number in {"train": 20, "test": 5}.items():
        for name, colour in PAINTS.items():
            (root / part / name).mkdir(parents=True)
            noise = np.random.default_rng(number).integers(56, size=(number, 32, 32, 3)) + np.array(colour)
            for index, pixels in enumerate(noise.astype(np.uint8)):
                Image.fromarray(pixels).save(root / part / name / f"{index:04d}.png")
    return root


def test_classifier_of_photographs_learns_and_training_that_is_cut_off_is_that_of_one_go(paints, tmp_path, monkeypatch):
    train, test = (cifar10.read(paints, part) for part in ("train", "test"))
    assert (train.class_names, train.images.shape) == (list(PAINTS), (60, 3, 32, 32))
    options = {"num_epochs": 30, "width": 4}
    whole = cifar10.trained_network(train, tmp_path / "whole.pt", **options)
    assert torch.equal(cifar10.classes(whole, test.images), test.targets)

    keep, epochs = cifar10._keep, []

    def cut_off(path, state):
        keep(path, state)
        epochs.append(state["epoch"])
        if len(epochs) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(cifar10, "_keep", cut_off)
    with pytest.raises(KeyboardInterrupt):
        cifar10.trained_network(train, tmp_path / "cut.pt", **options)
    continued = cifar10.trained_network(train, tmp_path / "cut.pt", **options)
    torch.testing.assert_close(continued.state_dict(), whole.state_dict(), rtol=0, atol=0)
    cifar10.trained_network(train, tmp_path / "cut.pt", **options)  # which is done
    assert epochs == list(range(1, 31))
    with pytest.raises(SystemExit, match="holds a classifier of other images or settings"):
        cifar10.trained_network(train, tmp_path / "cut.pt", **options, seed=1)
    others = replace(train, images=train.images.flip(0))
    with pytest.raises(SystemExit, match="holds a classifier of other images or settings"):
        cifar10.trained_network(others, tmp_path / "cut.pt", **options)


def test_images_are_moved_by_four_pixels_at_most_and_half_of_them_mirrored():
    image = torch.arange(32 * 32.0).view(1, 1, 32, 32)
    padded = F.pad(image, (4, 4, 4, 4), mode="reflect")
    possible = [
        part for one in (padded, padded.flip(3)) for part in one.unfold(2, 32, 1).unfold(3, 32, 1)[0, 0].flatten(0, 1)
    ]
    changed = cifar10.changed(image.expand(400, -1, -1, -1), torch.Generator().manual_seed(0))[:, 0]
    which = [next(i for i, one in enumerate(possible) if torch.equal(one, found)) for found in changed]
    assert len(set(which)) > 100  # of 2 * 9 * 9
    assert 160 < sum(number < 81 for number in which) < 240


@pytest.mark.slow
def test_label_agreement_of_photographs(paints, tmp_path):
    torch.manual_seed(0)
    unet = DenoiserUNet(3, [8, 8], attention_levels=[], mid_attention=False, norm_num_groups=4, num_class_embeds=4)
    names = list(PAINTS)
    for file, class_names in {"run.ckpt": names, "others.ckpt": ["a", "b", "c"]}.items():
        denoiser = Denoiser(unet, NoiseSchedule(10), (3, 32, 32), null_label=3, class_names=class_names)
        save_denoiser(denoiser, tmp_path / file)
    command = [sys.executable, str(ROOT / "benchmarks" / "label_agreement.py"), "--data", "cifar10"]
    command += ["--root", str(paints), "--classifier", str(tmp_path / "c.pt"), "--classifier_epochs", "30"]
    command += ["--num_images", "6", "--num_inference_steps", "2"]
    said = printed([*command, str(tmp_path / "run.ckpt")])
    assert "classifier: 100.0% right on held-out real images" in said
    assert "guidance 1.5: " in said
    (counts,) = re.findall(r"unconditional samples found in each class: \[(\d+), (\d+), (\d+)\]", said)
    assert sum(map(int, counts)) == 6
    assert "epoch" not in printed([*command, str(tmp_path / "run.ckpt")])  # the classifier is there
    done = run_python([*command, str(tmp_path / "others.ckpt")])
    assert done.returncode == 1
    assert "the classifier knows the classes blue, green, red, and the run draws a, b, c" in done.stderr


def test_frechet_distance_of_gaussians_is_that_of_its_closed_form():
    x = torch.randn(1000, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.linalg.solve_triangular(torch.linalg.cholesky(x.T.cov()), (x - x.mean(0)).T, upper=False).T  # N(0, 1)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    # means 3 apart in each of 4 dimensions, deviations 1 and 2: 4 * (3^2 + (2 - 1)^2)
    assert frechet_distance(x, 2 * x + 3) == pytest.approx(40)


def test_label_entropy_of_equal_classes_is_log_of_their_number():
    assert label_entropy(torch.arange(50) % 10) == pytest.approx(2.302585)
    assert label_entropy(torch.zeros(5, dtype=torch.int64)) == pytest.approx(0, abs=1e-9)


@pytest.mark.slow
def test_latents_against_pixels(tmp_path):
    (tmp_path / "images").mkdir()
    rows = ["file_name,text"]
    for number in range(100):
        pixels = np.random.default_rng(number).integers(256, size=(32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
        rows.append(f"{number}.png,{('red', 'green')[number % 2]} noise {number}")
    (tmp_path / "images" / "metadata.csv").write_text("\n".join(rows))
    command = [sys.executable, str(ROOT / "benchmarks" / "latents_against_pixels.py"), "--size", "tiny", "--together"]
    command += ["--images", str(tmp_path / "images"), "--minutes", "0.4", "--num_images", "20"]
    command += ["--work", str(tmp_path / "work"), "--json", str(tmp_path / "l.json")]
    done = run_python(command)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "l.json").read_text())
    assert [result["diffusion of"] for result in record["results"]] == ["latents", "pixels"]
    assert all(result["steps"] > 0 and result["distance"] > 0 for result in record["results"])
    assert record["results"][0]["autoencoder"]["psnr"] > 5
    assert all((tmp_path / f"l_{name}.png").exists() for name in ("latents", "pixels", "autoencoder"))


@pytest.mark.slow
def test_denoiser_of_latents_is_tried_before_there_are_latents(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]))
    compile_ahead(argparse.Namespace(size="tiny", device="cpu", work=tmp_path, seed=0))
    assert (tmp_path / "compiled" / STEPS).read_text() == "3"


def test_run_whose_time_is_over_before_it_begins_fails():
    with pytest.raises(RuntimeError, match=r"the time was over .* s before the first step"):
        UntilTime(end=1.0).on_train_start(None, None)


TINY_SEGMENTER = [
    "--trainer.accelerator=cpu",
    "--trainer.precision=32-true",
    "--model.speed=plain",
    "--data.window_size=32",
    "--data.batch_size=2",
]


@pytest.mark.slow
def test_isbi2012(tmp_path):
    write_pairs(tmp_path / "train", channels=1, instances=False, num=9)
    command = [sys.executable, str(ROOT / "benchmarks" / "isbi2012.py"), "--root", str(tmp_path)]
    command += ["--contenders", "modern", "--minutes", "0.05", "--work", str(tmp_path / "work")]
    command += [
        "--json",
        str(tmp_path / "i.json"),
        *TINY_SEGMENTER,
        "--model.unet.init_args.channels=[4,8]",
    ]
    printed(command)
    results = json.loads((tmp_path / "i.json").read_text())["results"]
    assert [result["views"] for result in results] == [False, True]
    assert all(0 <= result["v_rand"] <= 1 and 0 <= result["pixel_error"] <= 1 for result in results)


@pytest.mark.slow
def test_label_efficiency_resumes(tmp_path):
    write_pairs(tmp_path, channels=3, instances=True)
    command = [sys.executable, str(ROOT / "benchmarks" / "label_efficiency.py"), "--root", str(tmp_path)]
    command += ["--num_test", "2", "--seeds", "0", "--steps", "2", "--denoiser_steps", "1", "--tile_size", "32"]
    command += ["--work", str(tmp_path / "work"), "--json", str(tmp_path / "l.json"), *TINY_SEGMENTER]
    command += ["--channels", "4", "4", "4", "4"]
    methods = ["alone", "slow", "features", "joint"]
    printed([*command, "--num_labelled", "2", "--methods", *methods])
    first = json.loads((tmp_path / "l.json").read_text())["results"]
    assert [(one["method"], one["labelled"]) for one in first] == [("classical", 0), *((name, 2) for name in methods)]
    printed([*command, "--num_labelled", "2", "3", "--methods", "alone"])
    then = json.loads((tmp_path / "l.json").read_text())["results"]
    assert then[:5] == first
    assert [(result["method"], result["labelled"]) for result in then[5:]] == [("alone", 3)]


@pytest.mark.slow
def test_synthetic_pairs(tmp_path):
    write_pairs(tmp_path, channels=3, instances=True)
    command = [sys.executable, str(ROOT / "benchmarks" / "synthetic_pairs.py"), "--root", str(tmp_path)]
    command += ["--denoiser", str(tmp_path / "denoiser"), "--denoiser_steps", "1", "--masks_steps", "1"]
    command += ["--num_pairs", "2", "--min_dice", "0", "--num_labelled", "2", "--seeds", "0", "--num_test", "2"]
    command += ["--tile_size", "32", "--image_size", "32"]
    command += ["--work", str(tmp_path / "work"), "--json", str(tmp_path / "s.json")]
    printed([*command, *TINY_SEGMENTER, "--trainer.max_steps=3", "--model.unet.init_args.channels=[8,8,8]"])
    results = json.loads((tmp_path / "s.json").read_text())["results"]
    assert [result["method"] for result in results] == ["classical", "alone", "drawn", "copied"]
    assert [(result["pairs"], result["kept"]) for result in results[2:]] == [(2, 2), (2, 2)]


@pytest.mark.slow
def test_drawn_masks(tmp_path):
    write_pairs(tmp_path, channels=3, instances=True)
    command = [sys.executable, str(ROOT / "benchmarks" / "drawn_masks.py"), "--root", str(tmp_path), "--num_test", "2"]
    command += ["--side", "16", "--steps", "2", "--batch_size", "2", "--num_val", "4"]
    command += ["--num_draws", "2", "--num_inference_steps", "2"]
    printed([*command, "--work", str(tmp_path / "work"), "--json", str(tmp_path / "d.json")])
    results = json.loads((tmp_path / "d.json").read_text())["results"]
    assert [result["method"] for result in results] == ["one draw", "mean of 2 draws", "segmenter"]
    scores = ("dice", "calibration_error", "calibrated", "errors_in_doubt")
    assert all(0 <= result[score] <= 1 for result in results for score in scores)
    with Image.open(tmp_path / "d.png") as sheet:
        assert sheet.height > sheet.width


@pytest.mark.slow
def test_alignment_changes_what_is_trained(tmp_path):
    write_pairs(tmp_path, channels=3, instances=True)
    unet = SegmentationUNet(3, 4, channels=(4, 4, 4, 4, 4), padding="same")
    names = ["background", "nucleus", "border"]
    Segmenter(unet, "instances", names, timestep=None, stretch=True, window_size=32).save(tmp_path / "segmenter.ckpt")
    command = [sys.executable, str(ROOT / "benchmarks" / "alignment.py"), "--root", str(tmp_path)]
    command += ["--segmenter", str(tmp_path / "segmenter.ckpt"), "--json", str(tmp_path / "a.json"), "--seeds", "0"]
    printed([*command, "--steps", "1", "3", "--batch_size", "2", "--tile_size", "32", "--num_images", "16"])
    alone, aligned = json.loads((tmp_path / "a.json").read_text())["results"]
    assert [alone["method"], aligned["method"]] == ["alone", "aligned"]
    assert alone["distances"].keys() == aligned["distances"].keys() == {"1", "3"}
    assert alone["distances"]["3"] != aligned["distances"]["3"]


@pytest.mark.slow
def test_nuclei(tmp_path):
    write_pairs(tmp_path, channels=3, instances=True)
    command = [sys.executable, str(ROOT / "benchmarks" / "nuclei.py"), "--root", str(tmp_path), "--num_test", "2"]
    command += ["--run", str(tmp_path / "run"), "--json", str(tmp_path / "n.json"), "--data.num_fit=1"]
    printed([*command, *TINY_SEGMENTER, "--trainer.max_steps=2", "--model.unet.init_args.channels=[8,8,8]"])
    results = json.loads((tmp_path / "n.json").read_text())["results"]
    assert [result["method"] for result in results] == ["classical", "nuclei_segment", "nuclei_segment, eight views"]
    assert all(0 <= result["all"]["ap_50"] <= 1 and result["all"]["images"] == 2 for result in results)
    printed([*command, *TINY_SEGMENTER, "--run", str(tmp_path / "scaled"), "--trainer.max_steps=2",
             "--model.unet.init_args.channels=[8,8,8]", "--data.targets.object_diameter=8"])  # fmt: skip
    scaled = [result["method"] for result in json.loads((tmp_path / "n.json").read_text())["results"]]
    assert scaled[3:] == [f"{name}, known diameters" for name in scaled[1:3]]


@pytest.mark.slow
def test_segmentation_speed(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "segmentation_speed.py"), "--blocks", "1", "--slices", "1"]
    printed([*command, "--side", "64", "--json", str(tmp_path / "s.json")])
    rows = json.loads((tmp_path / "s.json").read_text())["results"]
    assert {row["network"] for row in rows} >= {"unet_diffusion, padded, 44 to 704", "unet_diffusion, paper"}
    assert all(row["megapixels/s"] > 0 for row in rows)


@pytest.mark.slow
def test_streaming(tmp_path):
    write_pairs(tmp_path, 3, False, num=30)
    sizes = ["--image_size", 16, "--batch_size", 2, "--shard_images", 4, "--epochs", 1]
    rows = run("streaming.py", "--images", tmp_path / "image", *sizes, output=tmp_path / "streaming.json")["results"]
    assert [row["images from"] for row in rows[:2]] == ["memory", "the folder"]
    assert all(row["images/s"] > 0 for row in rows)
    assert {row["resumed order"] for row in rows[:6]} == {"the same"}


@pytest.mark.slow
def test_decoding(tmp_path):
    write_pairs(tmp_path, 3, False, num=12)
    sizes = ["--image_size", 16, "--batch_size", 2, "--num_images", 10, "--epochs", 1]
    report = run("decoding.py", "--images", tmp_path / "image", *sizes, output=tmp_path / "decoding.json")
    assert [row["library"] for row in report["results"]] == [
        *("Pillow", "Pillow", "tifffile", "numpy", "webdataset", "datasets", "datasets", "webdataset")
    ]
    assert all(row["images/s"] > 0 and row["its images/s"] > 0 for row in report["results"])


@pytest.mark.parametrize("num_processes", [1, 2, 5])
def test_ring_sums_and_sends_as_many_bytes_as_its_formula(num_processes):
    """An all-reduce done by hand: chunks go round to be summed, and once more as sums."""
    n, values = num_processes, torch.randn(num_processes, num_processes, 3)  # (process, chunk, 3)
    expected, sent = values.sum(dim=0).expand(n, n, 3), 0
    for turn in range(2 * (n - 1)):
        chunks = [(rank - turn) % n for rank in range(n)]  # that each process sends on
        moving = [values[rank, chunk].clone() for rank, chunk in enumerate(chunks)]
        for rank, (chunk, moved) in enumerate(zip(chunks, moving, strict=True)):
            there = values[(rank + 1) % n, chunk]
            there.copy_(there + moved if turn < n - 1 else moved)
        sent += moving[0].nbytes
    torch.testing.assert_close(values, expected)
    assert sent == pytest.approx(2 * ring_bytes(values[0].nbytes, n))


def test_bytes_held_are_those_of_a_network_in_training():
    network, average = torch.nn.Linear(100, 100), torch.nn.Linear(100, 100)
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.ones(1, 100)).sum().backward()
    optimizer.step()
    moments = [v for state in optimizer.state.values() for v in state.values() if v.numel() > 1]  # a step is one number
    held = [*network.parameters(), *average.parameters(), *(p.grad for p in network.parameters()), *moments]
    assert sum(value.nbytes for value in held) == sum(BYTES_HELD.values()) * (100 * 100 + 100)


def test_one_gpu_sends_nothing():
    for one in (predict_ddp(1.0e9, 0.5, Cluster(1, 1, 100, 100)), predict_fsdp2(1.0e9, 0.5, Cluster(1, 1, 100, 100))):
        assert (one.sent_bytes, one.communication_seconds, one.seconds) == (0, 0, 0.5)


def test_step_is_that_of_the_slower_of_network_and_backward_pass():
    slow, fast = Cluster(2, 2, 800, 8), Cluster(2, 2, 8000, 8000)  # the former: 1 GB/s between two nodes
    # 4 GB of gradients, half of them sent twice: 4 s, of which two thirds of a second are hidden
    assert predict_ddp(1.0e9, 1.0, slow).seconds == pytest.approx(1 / 3 + 4)
    assert predict_ddp(1.0e9, 1.0, slow, gradient_bytes=2).seconds == pytest.approx(1 / 3 + 2)
    assert predict_fsdp2(1.0e9, 1.0, slow).seconds == pytest.approx(3 * 2)  # each longer than what it hides behind
    assert predict_ddp(1.0e9, 1.0, fast).seconds == pytest.approx(
        1 + 25 * 2**20 / 1e12
    )  # 4 ms, hidden but for a bucket
    assert predict_fsdp2(1.0e9, 1.0, fast).seconds == pytest.approx(1 + 2 * 0.002 / 32)
    with pytest.raises(ValueError, match="multiple of nodes"):
        Cluster(9, 2, 800, 8)


def test_table_of_the_page_is_that_of_the_formulas():
    page = (ROOT / "configs" / "trainer" / "README.md").read_text()
    rows = re.findall(r"^\| (\d+) M \| (.*) \|$", page, flags=re.MULTILINE)
    assert len(rows) == 3
    clusters = (Cluster(8, 1, 1, 1), Cluster(64, 8, 1, 1))
    for millions, cells in rows:
        parameters = float(millions) * 1e6
        ddp = [predict_ddp(parameters, 1, one) for one in clusters]
        bf16 = [predict_ddp(parameters, 1, one, gradient_bytes=2) for one in clusters]
        fsdp2 = [predict_fsdp2(parameters, 1, one) for one in clusters]
        held = [one.memory_bytes for one in (ddp[0], *fsdp2)]
        sent = [one.sent_bytes for one in (*ddp, *bf16, *fsdp2)]
        assert [float(cell) for cell in cells.split(" | ")] == [round(value / 1e9, 2) for value in (*held, *sent)]


def test_predictions_are_printed():
    command = [sys.executable, str(ROOT / "benchmarks" / "scaling.py"), "--gpus", "64", "--nodes", "8"]
    assert "| FSDP2 | 0.27 |" in printed(command)


@pytest.mark.slow
def test_bandwidth_is_measured_between_two_processes():
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*torchrun, str(ROOT / "benchmarks" / "scaling.py"), "--measure"]
    table = printed(command, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    processes, nodes, gbps, option = [cell.strip() for cell in table.splitlines()[2].strip("|").split("|")]
    assert (processes, nodes, option) == ("2", "1", "--intra_gbps")
    assert float(gbps) > 0


def test_adapters(tmp_path):
    pytest.importorskip("peft")
    pytest.importorskip("transformers")
    options = ["--network", "tiny", "--side", 8, "--blocks", 1]
    report = run("adapters.py", *options, output=tmp_path / "adapters.json")
    weights = [row["trained weights"] for row in report["results"]]
    assert weights[0] == weights[1] > weights[2] == weights[3] > weights[4] == 128
    assert all(row["seconds a step"] > 0 for row in report["results"])


def test_checkpoints(tmp_path):
    report = run("checkpoints.py", "--network", "tiny", "--repeats", 2, output=tmp_path / "checkpoints.json")
    sizes = report["mib"]
    assert sizes["moving average"] == sizes["weights"]
    parts = sizes["weights"] + sizes["moving average"] + sizes["optimiser's moments"]
    assert parts < sizes["the file"] < 1.5 * parts  # names and settings, of a tiny network
    assert all(taken > 0 for times in report["seconds"].values() for taken in times)


@pytest.mark.slow
def test_conditions(tmp_path):
    write_fashion_mnist(tmp_path / "data", num_images=40)
    command = [sys.executable, str(ROOT / "benchmarks" / "conditions.py"), "--root", str(tmp_path / "data")]
    command += ["--num_images", "40", "--num_val", "12", "--num_samples", "12", "--num_inference_steps", "2"]
    command += ["--work", str(tmp_path / "work"), "--json", str(tmp_path / "c.json")]
    command += ["--trainer.max_steps=2", "--trainer.val_check_interval=2", "--model.speed=plain", "--data.batch_size=4"]
    kinds = ["class", "boxes", "enlarging"]  # captions need more images
    printed([*command, "--kinds", *kinds])
    results = json.loads((tmp_path / "c.json").read_text())["results"]
    assert [result["condition"] for result in results] == kinds
    assert all(result["shuffled"] >= 0 and result["seconds"] > 0 for result in results)
    assert [list(result["beside"]) for result in results] == [["real images"], ["real images"], ["bicubic"]]
    with Image.open(tmp_path / "c.png") as sheet:
        assert sheet.size == (conditions.SHEET, conditions.PART[1])
        lefts = (0, conditions.PART[0] + conditions.GAP)
        assert all(sheet.convert("L").crop((left, 20, left + 90, 400)).getextrema()[0] < 128 for left in lefts)
    (tmp_path / "c.json").unlink()
    (tmp_path / "work" / "class" / "evaluation" / "evaluation.html").unlink()
    printed([*command, "--kinds", "class"])  # is trained
    again = json.loads((tmp_path / "c.json").read_text())["results"]
    assert again == results[:1]
    (tmp_path / "c.json").unlink()
    with pytest.raises(AssertionError, match="class was trained with other options; delete"):
        printed([*command, "--kinds", "class", "--trainer.max_steps=3"])


def test_figures_of_conditions_are_those_of_evaluate():
    made = {
        "map": SemanticMap(2, num_classes=2),
        "boxes": BoxTokens(context_dim=8, num_classes=1, max_boxes=1),
        "pairs": PairedImage(1),
        "enlarging": LowResolution(channels=1),
        "inpainting": MaskedImage(channels=2),
    }
    assert {kind: measure_of(condition, None).key for kind, condition in made.items()} == {
        kind: key for kind, key in conditions.FIGURES.items() if kind not in ("class", "text")
    }


@pytest.mark.slow
def test_processes(tmp_path):
    small = [argument for argument in TINY_FIT if argument not in ("--model.speed", "plain")]
    report = run("processes.py", *small, "--steps", 3, "--repeats", 1, output=tmp_path / "processes.json")
    assert report["ratio"] == report["images_per_second"]["2"][0] / report["images_per_second"]["1"][0]


def test_house_is_counted(tmp_path):
    counts = json.loads(printed([sys.executable, ROOT / "benchmarks" / "house.py"], cwd=tmp_path))
    assert counts["files in circles"] == counts["folders in circles"] == 0
    assert counts["lines"] > counts["longest file"][0] > 100


@pytest.mark.slow
def test_checks_keeps_findings_and_those_of_other_data(tmp_path):
    (tmp_path / "checks.json").write_text('{"others": {"seconds": 1.0, "findings": []}}')
    text = printed([sys.executable, ROOT / "benchmarks" / "checks.py", "digits", "--output", tmp_path / "checks.json",
                    *DIGITS, "--data.horizontal_flip", "true"])  # fmt: skip
    stored = json.loads((tmp_path / "checks.json").read_text())
    assert set(stored) == {"others", "digits"}
    assert stored["digits"]["seconds"] > 0
    said = [finding["text"] for finding in stored["digits"]["findings"]]
    assert any("mirrored" in text for text in said), text
