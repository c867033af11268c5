"""`run_python` is subprocess.run for Python programs that need what training needs, without 10 seconds of imports each.

One process imports everything and does nothing else; it forks what it is told to run, and so do those that it forked,
where they would start Python again: a rank of Lightning's or torchrun's, a stage of `two-stages`. They are processes
like all others, with folders, environments, sessions and signals of their own. What is about the start of a process
itself (its memory, its modules, the seed of its hashes) wants a fresh one.
"""

import atexit
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
import traceback
import types
import weakref
from pathlib import Path
from typing import Any

HAS_GPU = Path("/dev/nvidiactl").exists()  # a process that trained has threads of autograd's then: it is not forked
OPTIONS = ("-u", "-P", "-m", "-c")  # of Python's that a fork knows; with others it is Python that starts
PROGRAM = "/unet-diffusion"  # is Python, too
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # as a fork has no other


def run_python(
    command: list[str], *, cwd: Path | str = ".", env: dict[str, str] | None = None, timeout: float = 600
) -> subprocess.CompletedProcess:
    """What the program wrote, and its status, when it and all that it started have ended."""
    process, command = _server(), [str(argument) for argument in command]
    environment = {**(os.environ if env is None else env), **ONE_THREAD}
    process.stdin.write(json.dumps([command, str(Path(cwd).resolve()), environment, timeout]) + "\n")
    process.stdin.flush()
    status, out, err = json.loads(process.stdout.readline())
    if status is None:
        raise subprocess.TimeoutExpired(command, timeout, out, err)
    return subprocess.CompletedProcess(command, status, out, err)


@functools.cache
def _server() -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, __file__],
        env={**os.environ, **ONE_THREAD},
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,  # Ctrl+C is not for it; it ends with its stdin
    )
    atexit.register(process.stdin.close)
    return process


class Forked(subprocess.Popen):
    """subprocess.Popen, but that a Python program is a fork of this process, where one can be."""

    def __init__(self, args: Any, *rest: Any, env: dict[str, str] | None = None, **options: Any) -> None:
        is_python = isinstance(args, list | tuple) and args[0] == sys.executable
        if is_python and (args[1] in OPTIONS or args[1].endswith((".py", PROGRAM))) and not HAS_GPU:
            # Popen has forked, and set folder, session and streams, when it calls this: which does not come back.
            options["preexec_fn"] = functools.partial(_become, [str(argument) for argument in args[1:]], env)
        super().__init__(args, *rest, env=env, **options)


_PARENTS: list[tuple] = []  # streams


def _become(arguments: list[str], environment: dict[str, str] | None) -> None:
    """The program `python ARGUMENTS`, to its end."""
    os.closerange(3, 1024)  # as exec would; Popen waits for one of them
    _PARENTS.append((sys.stdin, sys.stdout, sys.stderr))  # kept open, and what they have not written is not for here
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)  # as with -u, nearly
    weakref.finalize._registry.clear()  # type: ignore[attr-defined]  # temporary folders are the parent's to remove
    if environment is not None:
        os.environ.clear()
        os.environ.update(environment)
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)
    os._exit(_ended(arguments))


def _ended(arguments: list[str]) -> int:
    """Exit status of the program."""
    status: Any = 0
    try:
        _execute(arguments)
    except SystemExit as exit:
        status = exit.code or 0
        if not isinstance(status, int):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()  # waits for threads, as the interpreter does at its end
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def _execute(arguments: list[str]) -> None:
    at = next(i for i, argument in enumerate(arguments) if argument not in ("-u", "-P"))
    is_safe = "-P" in arguments[:at]  # modules are not looked for in the current folder
    kind, *rest = arguments[at:]
    path = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry] + INSTALLED
    if kind == "-m":
        sys.argv, sys.path[:] = rest, ([] if is_safe else [os.getcwd()]) + path
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv, sys.path[:] = ["-c", *rest[1:]], ["", *path]
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), sys.modules["__main__"].__dict__)
    else:
        sys.argv, sys.path[:] = [kind, *rest], [os.path.dirname(os.path.abspath(kind)), *path]
        runpy.run_path(kind, run_name="__main__")


def import_everything() -> None:
    """What programs import where they use it."""
    parts = ("commands.main", "commands.training_cli", "data.standard", "diffusers_io.exporting")
    for part in (*parts, "training.autoencoder", "training.module", "training.segmentation"):
        importlib.import_module(f"unet_diffusion.{part}")
    import torch.distributed.run
    import transformers

    _ = torch.distributed.run, transformers.CLIPTextModel, transformers.CLIPTokenizer  # imported when they are named


def _begin_autocast(self: Any, begin: Any, device_type: str, dtype: Any = None, enabled: bool = True, **options: Any):
    """Autocast, but none to bfloat16 on a processor that emulates it: a convolution would take 50 times as long."""
    is_emulated = device_type == "cpu" and str(dtype) == "torch.bfloat16"
    begin(self, device_type, dtype=dtype, enabled=enabled and not is_emulated, **options)


def _serve() -> None:
    """Runs programs that stdin names, one after the other."""
    import warnings

    subprocess.Popen = Forked  # type: ignore[misc]  # before anybody takes the name
    import_everything()
    import torch

    from unet_diffusion.runtime.precision import cpu_has_bfloat16

    warnings.filterwarnings("ignore", "'.*' found in sys.modules", RuntimeWarning)  # of runpy, about what is imported
    if not cpu_has_bfloat16():
        torch.autocast.__init__ = functools.partialmethod(_begin_autocast, torch.autocast.__init__)  # type: ignore
    gc.collect()
    gc.freeze()  # what is here stays, shared, and closes nothing in another process
    for line in sys.stdin:
        command, folder, environment, timeout = json.loads(line)
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = Forked(command, cwd=folder, env=environment, start_new_session=True, **streams)
        try:
            out, err = process.communicate(timeout=timeout)
            status = process.returncode
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
            status = None
        print(json.dumps([status, out, err]), flush=True)


INSTALLED = [  # of sys.path: neither the folder of this file nor what PYTHONPATH adds
    entry for entry in sys.path[1:] if entry not in os.environ.get("PYTHONPATH", "").split(os.pathsep)
]

if __name__ == "__main__":
    _serve()
