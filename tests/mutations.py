"""Breaks the code on purpose, one fault at a time, and says whether the tests notice: so that fewer tests are not less.

    python tests/mutations.py                       # all, in about 40 minutes on two cores
    python tests/mutations.py --only sampling       # those whose names begin with that
    python tests/mutations.py --list

Each fault is put into a copy of the repository, and the test files that are to notice it run there, to the first
failure. A text that is not found exactly once is an error, as is a fault that keeps the tests from running at all.
"""

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("unet_diffusion", "tests", "configs", "benchmarks", "notebooks", "pyproject.toml", "README.md")
PATIENCE = 600  # seconds of a fault, after which it is an error
CAUGHT, SURVIVED = 1, 0  # pytest's exit status: tests failed, and all passed


class Mutation(NamedTuple):
    """A fault.

    Args:
        name: Room and fault, the room first.
        file: Path below unet_diffusion/.
        old: Text that occurs once in it.
        new: Text in its place.
        tests: Paths below tests/, with spaces between them.
    """

    name: str
    file: str
    old: str
    new: str
    tests: str


MUTATIONS = [
    Mutation("blocks: scale of attention", "models/blocks.py",
             "q.shape[3] ** -0.5", "q.shape[2] ** -0.5", "models/test_blocks.py diffusers_io/test_import.py"),
    Mutation("blocks: scale without 1", "models/blocks.py",
             "h = h * (1 + scale) + shift", "h = h * scale + shift",
             "models/test_blocks.py diffusers_io/test_import.py"),
    Mutation("blocks: gate", "models/blocks.py",
             "value * F.gelu(gate)", "value * F.silu(gate)", "diffusion/test_context.py"),
    Mutation("blocks: crop at a corner", "models/blocks.py",
             "(skip.shape[-2] - height) // 2, (skip.shape[-1] - width) // 2", "0, 0",
             "models/test_segmentation_unet.py models/test_blocks.py"),
    Mutation("blocks: frequencies", "models/blocks.py",
             "steps / (half - freq_shift)", "steps / half", "models/test_blocks.py diffusers_io/test_import.py"),
    Mutation("unet: one head whatever is asked for", "models/unet.py",
             'return width // (config["head_channels"] or width)', "return 1",
             "models/test_unet.py diffusers_io/test_import.py"),
    Mutation("unet: residual blocks begin at random", "models/unet.py",
             "last += [module.conv2 for module in model.modules() if isinstance(module, ResidualBlock)]", "last += []",
             "models/test_unet.py"),
    Mutation("unet: any size", "models/unet.py",
             'takes_any and self.config["context_dim"] is not None', "takes_any",
             "models/test_unet.py diffusion/test_context.py"),
    Mutation("unet: gain of up-convolutions", "models/unet.py",
             "places = 1 if isinstance(module, nn.ConvTranspose2d) else math.prod(module.kernel_size)",
             "places = math.prod(module.kernel_size)", "models/test_segmentation_unet.py"),
    Mutation("unet: smallest bottom", "models/unet.py",
             "smallest_bottom = 5 + 4", "smallest_bottom = 4 + 4", "models/test_segmentation_unet.py"),
    Mutation("schedule: zero terminal SNR moves the first", "diffusion/schedule.py",
             "(sqrt_a - last) * (first / (first - last))", "sqrt_a - last", "diffusion/test_schedule.py"),
    Mutation("schedule: sign of v", "diffusion/schedule.py",
             "return signal * noise - sigma * x0", "return signal * noise + sigma * x0", "diffusion/test_schedule.py"),
    Mutation("schedule: order of a key", "runtime/randomness.py",
             "repr(tuple(map(int, key)))", "repr(sorted(map(int, key)))", "diffusion/test_schedule.py"),
    Mutation("sampling: PNDM ends noisy", "diffusion/sampling.py",
             '{"set_alpha_to_one": True}', "{}", "diffusion/test_sampling.py"),
    Mutation("sampling: leading timesteps", "diffusion/sampling.py",
             '"timestep_spacing": "trailing",', '"timestep_spacing": "leading",', "diffusion/test_sampling.py"),
    Mutation("sampling: zero SNR for all schedulers", "diffusion/sampling.py",
             'if schedule.rescale_betas_zero_snr and "rescale_betas_zero_snr" not in fields:', "if False:",
             "diffusion/test_sampling.py"),
    Mutation("sampling: first state of those in sigma", "diffusion/image_to_image.py",
             "return 0, noise * scheduler.init_noise_sigma", "return 0, noise", "diffusion/test_sampling.py"),
    Mutation("sampling: input of those in sigma", "diffusion/sampling.py",
             "scheduler.scale_model_input(x, t), t)", "x, t)", "diffusion/test_sampling.py"),
    Mutation("sampling: Brownian path of no seed", "diffusion/sampling.py",
             "[int(torch.randint(2**62, (), generator=g)) for g in generators]", "[0 for _ in generators]",
             "diffusion/test_sampling.py diffusion/test_image_to_image.py"),
    Mutation("sampling: steps that round to nan", "diffusion/sampling.py",
             "    _check_finite(schedule, scheduler, num_inference_steps)\n", "", "diffusion/test_sampling.py"),
    Mutation("sampling: never clipped", "diffusion/sampling.py",
             '"clip_sample": clip_sample,', '"clip_sample": False,', "diffusion/test_sampling.py"),
    Mutation("sampling: noise of the batch", "diffusion/sampling.py",
             "image_generators(seed, numbers[part])", "image_generators(seed, range(len(numbers[part])))",
             "diffusion/test_sampling.py"),
    Mutation("sampling: DDIM with any steps", "diffusion/sampling.py",
             "lambda n: num_train % n == 0", "lambda n: True", "diffusion/test_sampling.py"),
    Mutation("guidance: from the better", "diffusion/guidance.py",
             "guided = worse + guidance.scale", "guided = better + guidance.scale", "diffusion/test_conditions.py"),
    Mutation("guidance: rescale the other way", "diffusion/guidance.py",
             "before / spread.clamp(min=TINY)", "spread / before.clamp(min=TINY)", "diffusion/test_conditions.py"),
    Mutation("guidance: end of the interval", "diffusion/guidance.py",
             "(t <= interval[1])", "(t < interval[1])", "diffusion/test_conditions.py"),
    Mutation("conditioning: dropped the other way", "diffusion/conditions/condition.py",
             "(chosen < self.dropout)", "(chosen > self.dropout)",
             "diffusion/test_conditions.py training/test_module.py"),
    Mutation("conditioning: order of what is joined", "diffusion/conditions/condition.py",
             "torch.cat([inputs[name], value], dim", "torch.cat([value, inputs[name]], dim",
             "diffusion/test_conditions.py"),
    Mutation("start: known part a step late", "diffusion/image_to_image.py",
             "else _noised(init_image.image, noise, scheduler, num_calls)",
             "else _noised(init_image.image, noise, scheduler, num_calls - 1)", "diffusion/test_image_to_image.py"),
    Mutation("start: put back halfway", "diffusion/image_to_image.py",
             "if init_image.keep_mask is None or (num_calls % scheduler.order and not is_last):",
             "if init_image.keep_mask is None:",
             "diffusion/test_image_to_image.py"),
    Mutation("start: a straight line", "diffusion/image_to_image.py",
             "(torch.sin((1 - f) * angle) * first + torch.sin(f * angle) * last) / torch.sin(angle)",
             "((1 - f) * first + f * last)", "diffusion/test_image_to_image.py"),
    Mutation("linear solver: weights", "diffusion/linear_solver.py",
             "list(reversed(unit[1 : number + 2]))", "list(unit[1 : number + 2])", "diffusion/test_linear_solver.py"),
    Mutation("windows: one too few", "diffusion/tiling.py",
             "count = 1 + -(-(side - window) // max(int(window * (1 - overlap)), 1))",
             "count = 1 + (side - window) // max(int(window * (1 - overlap)), 1)", "diffusion/test_tiling.py"),
    Mutation("windows: whole maps for each", "diffusion/tiling.py",
             'if name == "concat" else value', 'if name == "nothing" else value', "diffusion/test_tiling.py"),
    Mutation("losses: min-SNR of v", "diffusion/losses.py",
             "return clipped / (snr + 1)", "return clipped / snr", "diffusion/test_losses.py"),
    Mutation("losses: in the type of the prediction", "diffusion/losses.py",
             "F.mse_loss(prediction.float(), target.float(), ", "F.mse_loss(prediction, target, ",
             "diffusion/test_losses.py"),
    Mutation("EMA: no warm-up", "training/base.py",
             "decay = min(self.ema_decay, (1 + n) / (10 + n))", "decay = self.ema_decay",
             "training/test_module.py training/test_autoencoder_module.py"),
    Mutation("EMA: in training mode", "training/base.py",
             "average.eval()\n        return self", "average.train(mode)\n        return self",
             "training/test_module.py"),
    Mutation("training: rate of the first step", "training/optimizers.py",
             "return (step + 1) / num_warmup_steps", "return step / num_warmup_steps", "training/test_module.py"),
    Mutation("training: clipped at twice", "training/optimizers.py",
             "clip_grads_with_norm_(parameters, most, ", "clip_grads_with_norm_(parameters, 2 * most, ",
             "training/test_module.py"),
    Mutation("training: noise of all processes alike", "training/module.py",
             "keyed_generator(self.seed, step, self.global_rank, device=x0.device)",
             "keyed_generator(self.seed, step, device=x0.device)", "test_distributed.py"),
    Mutation("training: timesteps in order", "training/module.py",
             "part = torch.randperm(batch_size, generator=generator, device=device)",
             "part = torch.arange(batch_size, device=device)", "diffusion/test_losses.py"),
    Mutation("training: validated with the raw weights", "training/module.py",
             "errors = self._errors(self.ema_unet, x0, noise, t, inputs)",
             "errors = self._errors(self.unet, x0, noise, t, inputs)", "training/test_module.py"),
    Mutation("training: validation noise of the batch", "training/module.py",
             "generators = image_generators(self.seed, index.tolist())",
             "generators = image_generators(self.seed, range(len(index)))", "training/test_module.py"),
    Mutation("training: validation of one process", "training/module.py",
             'sums, counts = self.trainer.strategy.reduce(self._validation_sums, reduce_op="sum")',
             "sums, counts = self._validation_sums", "test_distributed.py"),
    Mutation("training: dropout of no seed", "training/base.py",
             "torch.default_generator.manual_seed(seed)", "pass", "training/test_resume.py training/test_module.py"),
    Mutation("resume: position within an epoch", "data/batches.py",
             "self._num_handed_out = self.sampler.first_batch", "self._num_handed_out = 0",
             "data/test_batches.py data/test_modules.py training/test_resume.py"),
    Mutation("resume: half a file is left", "runtime/atomic_files.py",
             "partial.unlink(missing_ok=True)", "pass",
             "runtime/test_pictures.py latents/test_latents.py training/test_resume.py"),
    Mutation("resume: nothing is previous", "training/checkpointing.py",
             "_put(last, last.with_name(PREVIOUS))", "pass", "training/test_checkpointing.py training/test_resume.py"),
    Mutation("resume: checksums not looked at", "runtime/safe_loading.py",
             "bad = file.testzip()", "bad = None", "training/test_checkpointing.py training/test_resume.py"),
    Mutation("resume: saved before its validation", "training/checkpointing.py",
             "if self._is_due and not validation_follows(trainer):", "if self._is_due:", "training/test_resume.py"),
    Mutation("resume: losses logged after the checkpoint", "training/lightning_internals.py",
             "    connector.on_batch_end()\n    connector.update_train_step_metrics()\n", "",
             "training/test_checkpointing.py training/test_resume.py"),
    Mutation("resume: stopped within a step", "training/stopping.py",
             "if not is_within_step(trainer) and not validation_follows(trainer):",
             "if not validation_follows(trainer):", "training/test_resume.py"),
    Mutation("resume: status of an interruption", "runtime/signals.py",
             "super().__init__(128 + signum)", "super().__init__(1)",
             "training/test_resume.py commands/test_two_stages.py"),
    Mutation("resume: job not requeued", "training/stopping.py",
             "if self._leaving == _requeue_signal() and trainer.is_global_zero:", "if False:",
             "training/test_resume.py"),
    Mutation("checkpoints: best of stale losses", "training/checkpointing.py",
             'is_stale = str(self.monitor).startswith("val/") and self._validated_at != trainer.global_step',
             "is_stale = False", "training/test_checkpointing.py"),
    Mutation("checkpoints: code in them runs", "runtime/safe_loading.py",
             'map_location="cpu", weights_only=True', 'map_location="cpu", weights_only=False',
             "inference/test_record.py runtime/test_foreign_files.py"),
    Mutation("health: bad steps in a row", "training/health.py",
             "in_a_row = (in_a_row + 1) * bad", "in_a_row = in_a_row + bad", "training/test_health.py"),
    Mutation("stalled: silent ones", "training/stalled.py",
             "return failed or silent or behind", "return failed or behind", "training/test_stalled.py"),
    Mutation("named classes: any function is called", "commands/named_classes.py",
             "if not is_class and path not in FACTORIES", "if False and path not in FACTORIES",
             "commands/test_named_classes.py"),
    Mutation("named classes: all of torch", "commands/named_classes.py",
             '"torch.optim",', '"torch",', "commands/test_named_classes.py"),
    Mutation("named classes: files elsewhere", "commands/named_classes.py",
             'or ".." in path.parts', "", "commands/test_named_classes.py"),
    Mutation("named classes: any placeholder", "commands/named_classes.py",
             'PLACEHOLDER.sub("", value)', '""', "commands/test_named_classes.py"),
    Mutation("named classes: other file systems", "commands/named_classes.py",
             "is_outside or OTHER_FILE_SYSTEM.match(value)", "is_outside", "commands/test_named_classes.py"),
    Mutation("resume: the old optimiser's settings", "training/base.py",
             "put_hyperparameters(checkpoint, self.new_optimizers())", "pass", "training/test_module.py"),
    Mutation("recipes: a name twice", "commands/recipes.py",
             "key.value in names:", "False:", "commands/test_commands.py"),
    Mutation("fit arguments: a number first", "inference/drawing.py",
             "names.index(label) if label in names else int(label) if label.isdecimal() else -1",
             "int(label) if label.isdecimal() else names.index(label) if label in names else -1",
             "commands/test_commands.py"),
    Mutation("named classes: chained addresses", "data/shards.py",
             'if "::" in self.root or (has', "if (has", "data/test_stream.py"),
    Mutation("checkpoint: weights that are no numbers", "inference/record_checks.py",
             'name.startswith("ema_") and not', 'name.startswith("ema ") and not', "inference/test_record.py"),
    Mutation("export: files of others are replaced", "runtime/atomic_files.py",
             "if others := sorted({*_files_below(folder)} - exported):", "if others := []:",
             "diffusers_io/test_export.py"),
    Mutation("sample: images of others are removed", "commands/main.py",
             "for name in present & drawn:", "for name in present:", "commands/test_commands.py"),
    Mutation("fit: files of others are replaced", "commands/run_rules.py",
             'if others and not any((root / CHECKPOINTS).glob("*.ckpt")):', "if False:", "commands/test_commands.py"),
    Mutation("data: mirrored upside down", "data/batches.py",
             "pixels[mirrored][..., ::-1]", "pixels[mirrored][..., ::-1, :]", "data/test_batches.py"),
    Mutation("data: same order each epoch", "data/batches.py",
             "generator = keyed_generator(self.seed, self.epoch)", "generator = keyed_generator(self.seed)",
             "data/test_batches.py data/test_modules.py"),
    Mutation("data: an image to train and to validate on", "data/base.py",
             "return order[num_val:].sort()", "return order[num_val - 1 :].sort()", "data/test_modules.py"),
    Mutation("data: scale of 8 bits", "data/scaling.py",
             "half = 127.5 if", "half = 128.0 if", "data/test_modules.py"),
    Mutation("data: windows of the last image only", "data/segmentation.py",
             "(int(self.images[number % len(self.images)])", "(int(self.images[-1])", "data/test_labelled.py"),
    Mutation("data: what is cropped", "data/folder.py",
             "scales = [min(one / other", "scales = [max(one / other", "data/test_modules.py"),
    Mutation("data: nothing said at the start", "training/callbacks.py",
             "for line in [*data_of(trainer).summary(), *notes]:", "for line in notes:", "commands/test_commands.py"),
    Mutation("fit: among its own images", "commands/run_rules.py",
             "if Path(value).expanduser().resolve() == root.resolve():", "if False:", "commands/test_commands.py"),
    Mutation("text: captions that become equal", "diffusion/conditions/text.py",
             "len(meant[after]) > 1", "len(meant[after]) > 2", "diffusion/test_text.py"),
    Mutation("decoding: colours bleed", "data/decoding.py",
             "        levels[:-1] *= levels[-1:]", "        pass", "data/test_decoding.py"),
    Mutation("stored: orientation", "data/stored.py",
             "numbers = numbers.swapaxes(0, 1)", "numbers = numbers", "data/test_stored.py"),
    Mutation("stored: white is zero", "data/stored.py",
             "is_inverted=photometric == PHOTOMETRIC.MINISWHITE", "is_inverted=False", "data/test_stored.py"),
    Mutation("stored: depth of grey PNG", "data/stored.py",
             "        bits = data[PNG_BIT_DEPTH]", "        bits = 8", "data/test_stored.py"),
    Mutation("stored: planes of a TIFF", "data/stored.py",
             "numbers.transpose(1, 2, 0, 3)", "numbers.transpose(0, 1, 2, 3)", "data/test_stored.py"),
    Mutation("stored: reduced pages", "data/stored.py",
             "page.is_mask or page.is_reduced", "page.is_mask", "data/test_stored.py"),
    Mutation("stored: colour maps of 8 bits", "data/stored.py",
             "colours if colours.max() < 256 else colours >> 8", "colours >> 8", "data/test_stored.py"),
    Mutation("decoding: transparent colour", "data/decoding.py",
             "if image.transparent is not None:", "if False:", "data/test_stored.py"),
    Mutation("decoding: grey palette of a label", "data/decoding.py",
             "if image.palette is not None and (image", "if image.palette is None and (image", "data/test_stored.py"),
    Mutation("decoding: lossy label", "data/decoding.py",
             "    if image.is_lossy:", "    if False:", "data/test_stored.py"),
    Mutation("decoding: white in 16 bits", "data/decoding.py",
             "UINT8_TO_UINT16 = 257", "UINT8_TO_UINT16 = 256", "data/test_decoding.py"),
    Mutation("captions: byte order mark", "data/captions.py",
             '"utf-8-sig"', '"utf-8"', "data/test_captions.py"),
    Mutation("captions: text after a comma", "data/captions.py",
             "elif len(row) > len(head):", "elif False:", "data/test_captions.py"),
    Mutation("captions: quotes as they come", "data/captions.py",
             "strict=True, skipinitialspace", "skipinitialspace", "data/test_captions.py"),
    Mutation("captions: the first of two", "data/captions.py",
             "if before != text:", "if False:", "data/test_captions.py"),
    Mutation("captions: line in which a row ends", "data/captions.py",
             "number = reader.line_num + 1", "number = reader.line_num + 2", "data/test_captions.py"),
    Mutation("files: names that lead outside", "data/files.py",
             'return bool(path.anchor) or ".." in path.parts', "return False",
             "data/test_files.py runtime/test_foreign_files.py"),
    Mutation("files: the later of two of a name", "data/files.py",
             "        if name in seen:\n", "        if False:\n", "data/test_files.py"),
    Mutation("files: links to what holds the root", "data/listing.py",
             "frozenset(root.resolve().parents)", "frozenset()", "data/test_files.py"),
    Mutation("files: names as they are stored", "data/listing.py",
             'unicodedata.normalize("NFC", name)', "name", "data/test_files.py"),
    Mutation("files: outputs are inputs", "data/listing.py",
             "if name.startswith(outputs):", "if False:", "data/test_files.py"),
    Mutation("files: a pipe is listed", "data/listing.py",
             "if os.path.isfile(path):", "if not os.path.isdir(path):", "data/test_files.py"),
    Mutation("stream: checksums of shards", "data/shards.py",
             "if hashlib.sha256(content).hexdigest() != shard.sha256:", "if False:", "data/test_stream.py"),
    Mutation("stream: read once", "data/shards.py",
             "for left in range(self.num_retries, -1, -1):", "for left in range(0, -1, -1):", "data/test_stream.py"),
    Mutation("stream: lanes begin anew", "data/stream.py",
             "num_done = self.batch_size * len(range(lane, self.first_batch, self.num_lanes))", "num_done = 0",
             "data/test_stream.py"),
    Mutation("stream: cuts between lanes", "data/stream.py",
             "first, last = max(start - before, 0), min(stop - before, high - low)",
             "first, last = max(start - before, 0), high - low", "data/test_stream.py"),
    Mutation("labels: edges of others by themselves", "segmentation/labels.py",
             "is_edge = has_larger | has_smaller_object", "is_edge = has_larger | True",
             "segmentation/test_labels.py"),
    Mutation("labels: edges that are wide", "segmentation/labels.py",
             "    is_edge[pieces[least == most]] = False\n", "", "segmentation/test_labels.py"),
    Mutation("labels: of one class", "data/segmentation.py",
             'if what == "train" and len(held) == 1:', "if False:", "data/test_labelled.py"),
    Mutation("labels: wide borders", "segmentation/labels.py",
             "(depth < self.border_width)", "(depth <= self.border_width)", "segmentation/test_labels.py"),
    Mutation("labels: objects without an inside", "segmentation/labels.py",
             "np.where(numbers > 0, numbers + grown.max(), 0)", "0", "segmentation/test_labels.py"),
    Mutation("border weights: sum of squares", "segmentation/border_weights.py",
             "-((nearest + second) ** 2)", "-(nearest**2 + second**2)", "segmentation/test_border_weights.py"),
    Mutation("border weights: second distance", "segmentation/border_weights.py",
             "np.minimum(second[near], np.maximum(nearest[near], distance))", "np.minimum(second[near], distance)",
             "segmentation/test_border_weights.py"),
    Mutation("border weights: balance", "segmentation/border_weights.py",
             "counts.sum() / (occurs.sum() * counts[occurs])", "counts.sum() / counts[occurs]",
             "segmentation/test_border_weights.py"),
    Mutation("tiles: last pixel twice", "segmentation/tiles.py",
             "period = max(2 * (length - 1), 1)", "period = max(2 * length - 1, 1)", "segmentation/test_tiles.py"),
    Mutation("tiles: out of step with pooling", "segmentation/tiles.py",
             "step = (window - 2 * network.margin) // network.stride * network.stride\n        return list",
             "step = window - 2 * network.margin - 1\n        return list", "segmentation/test_tiles.py"),
    Mutation("tiles: views turned the wrong way", "segmentation/tiles.py",
             "torch.rot90(prediction, -turns, (1, 2))", "torch.rot90(prediction, turns, (1, 2))",
             "segmentation/test_tiles.py"),
    Mutation("scores: neighbourhoods", "segmentation/scores.py",
             "1 << (bit + 4) % 8)", "1 << bit)", "segmentation/test_scores.py"),
    Mutation("scores: zeros are one segment", "segmentation/scores.py",
             "np.where(inside > 0, inside, alone)", "inside", "segmentation/test_scores.py"),
    Mutation("scores: IoU before matches", "segmentation/scores.py",
             "matches + ious / (2 * max(1, *ious.shape))", "ious", "segmentation/test_scores.py"),
    Mutation("scores: corners of a neighbourhood", "segmentation/scores.py",
             "corners * np.roll(edges, -1, axis=1)", "corners * np.roll(edges, 1, axis=1)",
             "segmentation/test_scores.py"),
    Mutation("augmentation: scale not symmetric", "segmentation/augmentation.py",
             "(1 + self.scale) ** (2 * size - 1)", "1 + self.scale * (2 * size - 1)",
             "segmentation/test_augmentation.py"),
    Mutation("augmentation: zeros beyond the border", "segmentation/augmentation.py",
             'padding_mode="reflection"', 'padding_mode="zeros"', "segmentation/test_augmentation.py"),
    Mutation("augmentation: labels in between", "segmentation/augmentation.py",
             "_mirrored(places.round(), side).long()", "_mirrored(places, side).long()",
             "segmentation/test_augmentation.py"),
    Mutation("segmenter: pixels without a class count", "training/segmentation.py",
             "counts = classes != NO_VALUE", "counts = classes != NO_VALUE - 1",
             "training/test_segmentation_module.py"),
    Mutation("segmenter: head of the denoiser", "segmentation/transfer.py",
             'HEADS = ("conv_out.", "class_embedding.")', 'HEADS = ("conv_out.",)', "segmentation/test_transfer.py"),
    Mutation("segmenter: all maps enlarged at once", "segmentation/features.py",
             "F.interpolate(next(projections)(features), size=x.shape[-2:], mode=\"bilinear\")",
             "next(projections)(F.interpolate(features, size=x.shape[-2:], mode=\"bilinear\"))",
             "segmentation/test_transfer.py"),
    Mutation("segmenter: Dice without smoothing", "segmentation/losses.py",
             "SMOOTH = 1.0", "SMOOTH = 0.0", "segmentation/test_segmentation_losses.py"),
    Mutation("latents: deviation without noise", "latents/store.py",
             "((squares + variances) / count", "(squares / count", "latents/test_latents.py"),
    Mutation("latents: mirrored upside down", "latents/store.py",
             '"_mirrored": images.flip(3)', '"_mirrored": images.flip(2)', "latents/test_latents.py"),
    Mutation("latents: fingerprint without weights", "latents/space.py",
             "        digest.update(value.detach().contiguous().numpy().tobytes())\n", "", "latents/test_latents.py"),
    Mutation("latents: trained on means", "data/latents.py",
             "mean = mean + std * torch.randn(mean.shape, generator=generator, device=mean.device)", "pass",
             "latents/test_latents.py"),
    Mutation("autoencoder: KL", "training/autoencoder.py",
             "(mean.square() + std.square() - 1) - std.log()", "(mean.square() + std.square() - 1 - std.log())",
             "training/test_autoencoder_module.py"),
    Mutation("autoencoder: weight of the discriminator", "training/adversarial.py",
             "(wanted / (got + GRADIENT_FLOOR))", "(got / (wanted + GRADIENT_FLOOR))",
             "training/test_autoencoder_module.py"),
    Mutation("autoencoder: hinge", "models/discriminator.py",
             "F.relu(1 + fake)", "F.relu(1 - fake)", "training/test_autoencoder_module.py"),
    Mutation("autoencoder: codes of one process", "training/autoencoder.py",
             "keyed_generator(self.seed, RESTART_KEY, self.trainer.global_step,",
             "keyed_generator(self.seed, RESTART_KEY, self.trainer.global_step, self.global_rank,",
             "test_distributed.py"),
    Mutation("maps: the image under the mask", "diffusion/conditions/masked_image.py",
             "encode(images * (1 - mask))", "encode(images)", "diffusion/test_maps.py"),
    Mutation("maps: other maps at each validation", "data/maps.py",
             "keyed_generator(self.seed, MAPS_KEY, index)",
             "keyed_generator(self.seed, MAPS_KEY, id(batch) % 9973)", "diffusion/test_maps.py"),
    Mutation("export: variances without scale", "diffusers_io/interop.py",
             "last.bias -= torch.cat([mean, 2 * std.log()])", "last.bias -= torch.cat([mean, std.log()])",
             "latents/test_latents.py diffusers_io/test_export.py diffusers_io/test_stable_diffusion.py"),
    Mutation("export: what differs is kept", "diffusers_io/interop.py",
             "if not all(one <= EXPORT_TOLERANCE for one in differences.values()):", "if False:",
             "diffusers_io/test_export.py"),
    Mutation("export: norm of attention", "diffusers_io/configurations.py",
             '"attn_norm_num_groups": config["norm_num_groups"] if config["scale_shift"] else None,',
             '"attn_norm_num_groups": None,', "diffusers_io/test_import.py"),
    Mutation("import: old names of attention", "diffusers_io/interop.py",
             '{"query": "to_q", "key": "to_k"', '{"query": "to_k", "key": "to_q"', "diffusers_io/test_import.py"),
    Mutation("import: levels of attention on the way up", "diffusers_io/configurations.py",
             "if levels != levels_up:", "if False:", "diffusers_io/test_import.py"),
    Mutation("pipeline: halves of the doubled batch", "diffusers_io/pipelines/conditional.py",
             "return uncond + guidance_scale * (cond - uncond)", "return cond + guidance_scale * (uncond - cond)",
             "diffusers_io/test_conditional_pipeline.py"),
    Mutation("text: null of zeros", "diffusion/conditions/text.py",
             "return self.empty_caption.expand_as(given)", "return torch.zeros_like(given)", "diffusion/test_text.py"),
    Mutation("text: words not kept", "diffusion/conditions/text.py",
             "if len(state):\n", "if False:\n", "diffusion/test_text.py"),
    Mutation("text: words in the order of a hash", "diffusion/conditions/text.py",
             "special_tokens=single", "special_tokens=list(SPECIAL)", "diffusion/test_text.py"),
    Mutation("pictures: rounded down", "runtime/pictures.py",
             ".clamp(0, 1) * 255).round()", ".clamp(0, 1) * 255)", "runtime/test_pictures.py"),
    Mutation("pictures: grids of every process", "training/callbacks.py",
             "            if trainer.is_global_zero:\n                write_png(picture, path)",
             "            if True:\n                write_png(picture, path)", "test_distributed.py"),
    Mutation("pictures: a picture for each batch of a step", "training/callbacks.py",
             "step % self.every_n_steps == 0 and step != self._drawn_at:", "step % self.every_n_steps == 0:",
             "training/test_callbacks.py"),
    Mutation("log: rows before a new column", "training/csv_log.py",
             "            writer.writerows(rows)\n", "", "training/test_csv_log.py"),
    Mutation("W&B: another run at each start", "training/wandb_run.py",
             "init_args.id = (root / ID_FILE).read_text().strip()", "pass", "training/test_wandb_run.py"),
    Mutation("command line: labels by turns", "inference/drawing.py",
             'given["labels"] = labels[turns % len(labels)]', 'given["labels"] = labels[turns * 0]',
             "commands/test_commands.py"),
    Mutation("command line: another weaker checkpoint", "inference/drawing.py",
             "if _what_is_given(weaker) != _what_is_given(trained):", "if False:", "commands/test_commands.py"),
    Mutation("segment: other settings go on", "runtime/atomic_files.py",
             "if differ:\n", "if False:\n", "inference/test_segment_files.py latents/test_latents.py"),
    Mutation("segment: masks as JPEG", "inference/segment_files.py",
             "keeps = path.suffix.lower() in (PNG, *TIFF_EXTENSIONS)", "keeps = True",
             "inference/test_segment_files.py"),
    Mutation("two stages: done ones again", "commands/two_stages.py",
             'record["done"] += [] if status else [name]', 'record["done"] += []', "commands/test_two_stages.py"),
    Mutation("processes: all do the same", "runtime/processes.py",
             "return items[self.rank :: self.count]", "return items", "test_distributed.py"),
    Mutation("speed: a gain of nothing", "models/speed.py",
             "if taken <= MIN_GAIN * fastest)", "if taken <= fastest)",
             "models/test_speed.py runtime/test_precision.py"),
    Mutation("speed: compiled weights in the state", "models/speed.py",
             "unet._compiled_call_impl = None  # undoes", "pass  # undoes", "models/test_speed.py"),
    Mutation("command line: status of wrong usage", "commands/main.py",
             "        return 2\n", "        return 1\n", "commands/test_commands.py"),
    Mutation("command line: a copied recipe replaces a file", "commands/main.py",
             'with open(options.file, "x", encoding', 'with open(options.file, "w", encoding',
             "commands/test_commands.py"),
    Mutation("fit arguments: path of a class of data that is replaced", "commands/fit_arguments.py",
             'if name in ("data", "data.class_path"):', "if False:", "commands/test_commands.py"),
    Mutation("errors: system's words", "runtime/messages.py",
             "if isinstance(error, OSError) and error.errno is not None:", "if False:", "commands/test_errors.py"),
    Mutation("errors: worker's traceback", "runtime/messages.py",
             'return str(error).rpartition(f"{worker[1]}: ")[2].strip()', "return str(error)",
             "commands/test_errors.py"),
    Mutation("errors: of the parser in all lines", "commands/parser_errors.py",
             "_of_names(line, known) or _of_values(message)", "message", "commands/test_errors.py"),
    Mutation("errors: JSON of another kind", "runtime/atomic_files.py",
             "if not isinstance(content, kind):", "if False:", "commands/test_errors.py"),
    Mutation("errors: an empty path", "runtime/messages.py", "if not text.strip():", "if False:",
             "commands/test_errors.py"),
    Mutation("errors: a device that is not there", "runtime/processes.py",
             "if device not in known:", "if False:", "commands/test_errors.py"),
    Mutation("checkpoint: larger than its weights", "inference/record_checks.py",
             "if made > most:", "if False:", "commands/test_errors.py"),
    Mutation("checkpoint: views that claim memory", "inference/record_checks.py",
             "weight.nbytes > weight.untyped_storage().nbytes()", "False", "commands/test_errors.py"),
    Mutation("checkpoint: a pickle that allocates", "runtime/safe_loading.py",
             "if isinstance(argument, str) and ALLOCATE.fullmatch(argument):", "if False:", "commands/test_errors.py"),
    Mutation("checkpoint: fields of the record", "inference/record_checks.py",
             "if not fits(record[name]):", "if False:", "commands/test_errors.py"),
    Mutation("folders: claimed by two", "runtime/atomic_files.py",
             "fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH | fcntl.LOCK_NB", "commands/test_errors.py"),
    Mutation("folders: cleared of what was there", "runtime/atomic_files.py",
             "if not self._was_empty:", "if False:", "commands/test_errors.py"),
    Mutation("fit: what nothing came of stays", "commands/training_cli.py",
             "self.claimed.clear()  # nothing was trained", "pass", "commands/test_errors.py"),
    Mutation("fit: monitors of what nobody logs", "commands/run_rules.py",
             "if monitor is not None and monitor not in logged:", "if False:", "commands/test_errors.py"),
    Mutation("data: asked for and not used", "data/base.py",
             "if getattr(datamodule, attribute, False) and option not in taken:", "if False:",
             "commands/test_errors.py"),
    Mutation("data: batches of more than there is", "data/base.py",
             "return min(batch_size, num_images)", "return batch_size", "commands/test_errors.py"),
    Mutation("data: large images all at once", "data/checking.py",
             "> LARGE_IMAGE", "> math.inf", "commands/test_errors.py"),
    Mutation("shards: reads without an end", "data/shards.py",
             "ClientTimeout(total=WHOLE,", "ClientTimeout(total=None,", "data/test_stream.py"),
    Mutation("two stages: the second is not looked at first", "commands/two_stages.py",
             "        check_runs(runs)\n", "", "commands/test_two_stages.py"),
    Mutation("fit arguments: sections of files", "commands/fit_arguments.py",
             "in content.items():\n        _check_section", "in ():\n        _check_section",
             "commands/test_commands.py"),
    Mutation("recipes: before a file of the same name", "commands/recipes.py",
             "if Path(name).is_file():", "if Path(name).is_file() and not (folder() / f\"{name}.yaml\").is_file():",
             "commands/test_commands.py"),
    Mutation("usage: all of it with each error", "runtime/messages.py",
             'raise UsageError(f"{message}; ', 'raise UsageError(f"{self.format_help()}{message}; ',
             "commands/test_commands.py"),
    Mutation("usage: similar paths without their folder", "runtime/messages.py",
             "str(path.parent / name) for", "name for", "commands/test_commands.py"),
    Mutation("precision: bfloat16 on every GPU", "runtime/precision.py",
             "torch.bfloat16 if has_bfloat16 else torch.float16", "torch.bfloat16", "runtime/test_precision.py"),
    Mutation("precision: bfloat16 on a processor made narrow", "runtime/precision.py",
             "return has_avx512 and torch.cpu", "return torch.cpu", "runtime/test_precision.py"),
    Mutation("precision: losses of float16 not scaled", "training/precision.py",
             "else MixedPrecision(name, device_type)",
             "else MixedPrecision(name, device_type, torch.amp.GradScaler(enabled=False) if name[0] == '1' else None)",
             "runtime/test_precision.py"),
    Mutation("precision: chosen anew when a run goes on", "training/base.py",
             "precision_before(self.trainer, checkpoint, can_scale_losses=self.can_scale_losses)",
             "possible_precisions(self.trainer)", "runtime/test_precision.py"),
    Mutation("precision: that of the checkpoint not written", "commands/run_settings.py",
             "self.config.trainer.precision = trainer.precision", "pass", "runtime/test_precision.py"),
    Mutation("resume: other numbers of devices go unsaid", "commands/run_settings.py",
             'STEP_SETTINGS = ("devices", "num_nodes", ', 'STEP_SETTINGS = ("num_nodes", ',
             "training/test_checkpointing.py"),
    Mutation("resume: another seed", "commands/run_settings.py",
             'WHAT_IS_TRAINED = ("task", "model", "data", "seed_everything")',
             'WHAT_IS_TRAINED = ("task", "model", "data")', "commands/test_commands.py"),
    Mutation("quick imports: garbage is never collected again", "runtime/imports.py",
             "        gc.enable()\n", "", "test_imports.py"),
    Mutation("quick imports: the rest of torchmetrics", "runtime/imports.py",
             "        spec.loader.exec_module(package)\n", "", "test_imports.py"),
    Mutation("kernels: border of a gradient", "models/kernels.py",
             "weight.new_zeros(x.shape[3]), 2 - ctx.padding)", "weight.new_zeros(x.shape[3]), ctx.padding)",
             "models/test_kernels.py"),
    Mutation("kernels: those of before the source was changed", "models/kernels.py",
             "*_compile_command(), SOURCE.read_text()]", "*_compile_command()]", "models/test_kernels.py"),
    Mutation("kernels: pixels beyond the right border", "models/kernels.cpp",
             "left + x < images.width;", "left + x <= images.width;", "models/test_kernels.py"),
    Mutation("kernels: channels of different means", "models/kernels.cpp",
             "(variance[c] + (mean[c] - of_mean) * (mean[c] - of_mean)) / group_size", "variance[c] / group_size",
             "models/test_kernels.py"),
    Mutation("kernels: gradient of SiLU", "models/kernels.cpp",
             "dz *= gate * (lanes(1) + z * (lanes(1) - gate))", "dz *= gate * (lanes(1) + z * gate)",
             "models/test_kernels.py"),
    Mutation("pack: images in the order of their names", "data/packing.py",
             "torch.randperm(len(files.names), generator=keyed_generator(ORDER_KEY)).tolist()",
             "list(range(len(files.names)))", "data/test_stream.py"),
    Mutation("pack: the index of shards that were replaced", "data/packing.py",
             "if sha256 != before:", "if False:", "data/test_stream.py"),
    Mutation("pack: the smallest image", "data/packing.py",
             "height, width = (min(sides) for", "height, width = (max(sides) for", "data/test_stream.py"),
    Mutation("whole file: a folder whose note was cut off", "runtime/atomic_files.py",
             'path.match(f".{SETTINGS}.*.partial")', "path is None", "data/test_stream.py"),
    Mutation("fingerprints: a copy is another file", "data/fingerprints.py",
             "return files.stamp(name) == stamp != \"\" or _hash_of(files, name) == known != \"\"",
             'return files.stamp(name) == stamp != ""', "data/test_fingerprints.py inference/test_segment_files.py"),
    Mutation("fingerprints: size and date say it all", "data/files.py",
             "{state.st_mtime_ns} {state.st_ctime_ns} {state.st_ino}", "{state.st_mtime_ns}",
             "data/test_fingerprints.py"),
    Mutation("fingerprints: a cut line is glued to the next", "data/fingerprints.py",
             'line = "\\n" + json.dumps([output, made_of])', 'line = json.dumps([output, made_of]) + "\\n"',
             "data/test_fingerprints.py"),
    Mutation("segment: old masks of new images", "inference/segment_files.py",
             "if not is_of(*self.sources[mask], made_of[mask])", "if False", "inference/test_segment_files.py"),
    Mutation("segment: masks of two models", "commands/main.py",
             'settings[f"{CONTENTS}checkpoint"] = contents', "pass", "inference/test_segment_files.py"),
    Mutation("segment: old masks under new settings", "commands/main.py",
             "outputs.made_of.doubt()", "pass", "inference/test_segment_files.py"),
    Mutation("sample: images of two models", "commands/main.py",
             'for name, contents in settings.pop("contents").items()}',
             'for name, contents in settings.pop("contents").items() if not name}', "commands/test_commands.py"),
    Mutation("pack: shards of images that were replaced", "data/packing.py",
             "if record is None or changed or (", "if record is None or (", "data/test_stream.py"),
    Mutation("latents: of images that were replaced", "latents/store.py",
             "if _made_of(path) != _digest(contents, numbers)", "if False", "latents/test_latents.py"),
    Mutation("split: by place and not by name", "data/base.py",
             "sorted(range(len(names)), key=numbers.__getitem__)", "list(range(len(names)))", "data/test_modules.py"),
    Mutation("split: an exact tenth, which grows", "data/base.py",
             "max(sum(number < VAL_SHARE for number in numbers), 1)", "max(len(names) // 10, 1)",
             "data/test_modules.py"),
    Mutation("resume: the newest file and not the last step", "training/checkpointing.py",
             "(step_of(path), path.name == LAST)", "(path.stat().st_mtime_ns, path.name == LAST)",
             "training/test_continued.py"),
    Mutation("two-stages: a killed one leaves its stage", "commands/two_stages.py",
             "preexec_fn=_stopped_with_its_parent()", "preexec_fn=None", "commands/test_two_stages.py"),
    Mutation("resume: settings compared with themselves", "commands/training_cli.py",
             "before = load_plain(path).get(RUN_SETTINGS)",
             'before = yaml.safe_load((root / "config.yaml").read_text())', "training/test_continued.py"),
    Mutation("resume: images that were replaced", "data/known.py",
             "if self.must_be_same and (changed or num_gone or moved):",
             "if self.must_be_same and (num_gone or moved):", "data/test_known.py training/test_continued.py"),
    Mutation("resume: never by itself", "commands/training_cli.py",
             "self.datamodule.must_be_same = self.resumes_by_itself", "pass", "training/test_continued.py"),
    Mutation("resume: validated on what was trained on", "data/known.py",
             "if is_val and content in trained]", "if False]", "data/test_known.py"),
    Mutation("two stages: done before, of other images", "commands/two_stages.py",
             'if stage in record["done"] or self._has_begun(stage)', "if False", "commands/test_two_stages.py"),
    Mutation("two stages: a typo is for ever", "commands/two_stages.py",
             'if stage in record["done"] or self._has_begun(stage)', "if True", "commands/test_two_stages.py"),
]  # fmt: skip


def main() -> None:
    options = parse_options()
    chosen = [one for one in MUTATIONS if any(one.name.startswith(room) for room in options.only or [""])]
    for mutation in chosen:
        check(mutation)
    if options.list:
        print("\n".join(f"{one.name}: {one.file}, by {one.tests}" for one in chosen))
        return
    import_libraries()
    survived = 0
    with repository() as copy:
        for mutation in chosen:
            start = time.monotonic()
            status = tried(mutation, copy)
            survived += status == SURVIVED
            said = {CAUGHT: "caught", SURVIVED: "SURVIVED"}.get(status, f"ERROR: pytest ended with {status}")
            print(f"{said}  {mutation.name} ({time.monotonic() - start:.0f} s)", flush=True)
    print(f"{len(chosen) - survived} of {len(chosen)} faults were caught")
    sys.exit(survived > 0)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="beginnings of the names of the faults")
    parser.add_argument("--list", action="store_true", help="only say which there are")
    return parser.parse_args()


def check(mutation: Mutation) -> None:
    found = (ROOT / "unet_diffusion" / mutation.file).read_text().count(mutation.old)
    if found != 1:
        raise ValueError(f"{mutation.name}: {mutation.old!r} must be once in {mutation.file}, and is {found} times")
    for test in mutation.tests.split():
        if not (ROOT / "tests" / test).is_file():
            raise FileNotFoundError(f"{mutation.name}: there is no tests/{test}")


def import_libraries() -> None:
    """What takes ten seconds, once: the runs of pytest are forks of this process."""
    import diffusers  # noqa: F401
    import lightning.pytorch.cli  # noqa: F401
    import torchvision  # noqa: F401
    from diffusers import AutoencoderKL, DDPMPipeline, UNet2DConditionModel  # noqa: F401


@contextmanager
def repository() -> Iterator[Path]:
    """A copy to break."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for name in COPIED:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
            copy(ROOT / name, Path(folder) / name)
        yield Path(folder)


def tried(mutation: Mutation, copy: Path) -> int:
    """Status of pytest with the fault in the copy, which is whole again afterwards."""
    path = copy / "unet_diffusion" / mutation.file
    whole = path.read_text()
    path.write_text(whole.replace(mutation.old, mutation.new))
    try:
        child = os.fork()
        if child == 0:
            signal.alarm(PATIENCE)
            os._exit(run_pytest(copy, mutation.tests.split()))
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    finally:
        path.write_text(whole)


def run_pytest(copy: Path, tests: list[str]) -> int:
    import pytest

    sys.dont_write_bytecode = True  # a file that is written twice a second would be taken for the same
    os.environ |= {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}  # before what is installed
    os.environ["TORCH_EXTENSIONS_DIR"] = str(copy / "kernels")  # faulty ones are kept nowhere else
    sys.path.insert(0, str(copy))
    os.chdir(copy)
    log = os.open(copy / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    return int(pytest.main(["-n0", "-x", "-q", "-p", "no:cacheprovider", *(f"tests/{test}" for test in tests)]))


if __name__ == "__main__":
    main()
