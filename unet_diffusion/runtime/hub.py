"""Models on the Hugging Face Hub: downloaded into its cache by name, and pushed from a folder.

huggingface_hub finds the token of the user by itself (`hf auth login`, or HF_TOKEN). Nothing here reads, prints or
saves it. HF_HUB_OFFLINE=1 takes models from the cache alone, and HF_ENDPOINT names another server.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

PREFIX = "hf://"
NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
FILES = (".bin", ".ckpt", ".onnx", ".pt", ".pth", ".safetensors")  # a name that ends so is that of a file
MOST_CONNECTIONS = 4  # files that are downloaded at once
PLAIN = ["*.json", "*.txt", "*.md"]  # small files, which say what a repository holds
WEIGHTS = ["*.safetensors", "*.json", "*.txt"]
OTHER_WEIGHTS = ["*.fp16.*", "*.bf16.*", "*.non_ema.*", "*onnx*", "*openvino*", "*flax*"]  # of the same model


def is_hub_name(path: object) -> bool:
    """Return whether a path is the name of a model on the hub.

    Args:
        path: A path, hf://owner/name, or owner/name, which is a path if there is a folder owner or if it ends as a file
            of weights does.
    """
    text = _text(path)
    if text.startswith(PREFIX):
        return True
    if Path(text).suffix in FILES:
        return False
    return bool(NAME.fullmatch(text)) and not Path(text).exists() and not Path(text).parent.exists()


def check_hub_name(name: str) -> str:
    """Return owner/name without the prefix hf://.

    Raises:
        ValueError: If it is no name of a model or data set on the hub.
    """
    bare = name.removeprefix(PREFIX)
    if not NAME.fullmatch(bare):
        raise ValueError(f"what lies on the hub must be named as owner/name, got {name!r}")
    return bare


def download(path: object, revision: str | None = None) -> Path:
    """Return the folder of a model in the cache of the hub; what is missing there is downloaded.

    Code in the repository is not downloaded, and of several sets of weights only safetensors in full precision.

    Args:
        path: owner/name, or hf://owner/name.
        revision: Branch, tag or commit; None: the main branch.

    Raises:
        FileNotFoundError: If there is no such model, or it is not in the cache and the hub cannot be reached.
    """
    from huggingface_hub import snapshot_download

    name = check_hub_name(_text(path))
    options: dict[str, Any] = {"max_workers": MOST_CONNECTIONS}
    with _explained(name, revision):
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=PLAIN, **options))
        # A pipeline's folders hold its weights; the same in one file often lies beside them.
        nested = [f"*/{pattern}" for pattern in WEIGHTS] if (folder / "model_index.json").is_file() else WEIGHTS
        snapshot_download(  # the folder has the name of its commit
            name, revision=folder.name, allow_patterns=[*PLAIN, *nested], ignore_patterns=OTHER_WEIGHTS, **options
        )
    return folder


def push(name: str, files: Mapping[str, Path | bytes], *, private: bool = False) -> str:
    """Push files to a model on the hub in one commit, make the model if there is none, and return its address.

    Args:
        name: owner/name.
        files: Each file, or its content, by its path in the repository.
        private: Whether a new repository is private.

    Raises:
        FileNotFoundError: If the hub cannot be reached, or refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    name, api = check_hub_name(name), HfApi()
    with _explained(name, None):
        api.create_repo(name, private=private, exist_ok=True)
        operations = [
            CommitOperationAdd(path, content if isinstance(content, bytes) else str(content))
            for path, content in files.items()
        ]
        api.create_commit(name, operations, commit_message="Export from unet-diffusion")
    return f"{api.endpoint}/{name}"


@contextmanager
def _explained(name: str, revision: str | None) -> Iterator[None]:
    """Turn errors of the hub and of the network into an error that says what to do; they name no token."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    network_error = cast(type[Exception], HfHubHTTPError.__bases__[0])  # of the HTTP client of huggingface_hub
    try:
        yield
    except RevisionNotFoundError as error:
        raise FileNotFoundError(f"{name} on the hub has no revision {revision}; leave it out, or name a branch, tag or "
                                "commit") from error  # fmt: skip
    except GatedRepoError as error:
        raise FileNotFoundError(f"{name} is open only to users who accept its conditions; accept them on its page, and "
                                "log in with: hf auth login") from error  # fmt: skip
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(f"there is no folder {name}, and no model of this name on the hub that you may use; "
                                "log in with: hf auth login") from error  # fmt: skip
    except (LocalEntryNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(f"there is no folder {name}, and the hub cannot be reached, nor is the model in its "
                                "cache; connect to the network, or copy the model here") from error  # fmt: skip
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "no answer")
        raise FileNotFoundError(f"the hub refused {name} (status {status}); log in with a token that may do this: hf "
                                "auth login") from error  # fmt: skip
    except network_error as error:
        raise FileNotFoundError(f"the hub cannot be reached for {name}; connect to the network") from error


def _text(path: object) -> str:
    """Return a path or name as it was given; a Path drops one slash of hf://."""
    return re.sub(r"^hf:/+", PREFIX, str(path))
