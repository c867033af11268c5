"""Models on the Hugging Face Hub: downloaded into its cache by name, and pushed from a folder.

huggingface_hub finds the token of the user by itself (`hf auth login`, or HF_TOKEN). Nothing here reads, prints or
saves it. HF_HUB_OFFLINE=1 takes models from the cache alone, and HF_ENDPOINT names another server.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

from unet_diffusion.runtime.addresses import NAME, PREFIX, StrPath, is_hub_name

MOST_CONNECTIONS = 4  # files that are downloaded at once
PATIENCE = 5.0  # seconds to wait for the hub's first answer; huggingface_hub itself would wait for ever
PLAIN = ["*.json", "*.txt", "*.md"]  # small files, which say what a repository holds
WEIGHTS = ["*.safetensors", "*.json", "*.txt"]
OTHER_WEIGHTS = ["*.fp16.*", "*.bf16.*", "*.non_ema.*", "*onnx*", "*openvino*", "*flax*"]  # of the same model


def with_prefix(path: StrPath) -> str:
    """Return hf://owner/name for the name of a model on the hub, and another path as it is.

    With the prefix, a name is told from a relative path also on another machine, where other folders exist.

    Args:
        path: As for `is_hub_name`.
    """
    return f"{PREFIX}{check_hub_name(str(path))}" if is_hub_name(path) else str(path)


def check_hub_name(name: str) -> str:
    """Return owner/name without the prefix hf://.

    Raises:
        ValueError: If it is no name of a model or data set on the hub.
    """
    bare = name.removeprefix(PREFIX)
    if not NAME.fullmatch(bare):
        raise ValueError(f"what lies on the hub must be named as owner/name, got {name!r}")
    return bare


def download(path: str, revision: str | None = None) -> Path:
    """Return the folder of a model in the cache of the hub; what is missing there is downloaded.

    Code in the repository is not downloaded, and of several sets of weights only safetensors in full precision.

    Args:
        path: owner/name, or hf://owner/name.
        revision: Branch, tag or commit; None: the main branch.

    Raises:
        FileNotFoundError: If there is no such model, or it is not in the cache and the hub cannot be reached.
    """
    from huggingface_hub import snapshot_download

    name = check_hub_name(path)
    with _explained(path, revision):
        options: dict[str, Any] = {"max_workers": MOST_CONNECTIONS, "local_files_only": not hub_answers(name)}
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
    if not hub_answers(name):
        raise FileNotFoundError(f"the hub cannot be reached for {name}; connect to the network")
    with _explained(name, None):
        api.create_repo(name, private=private, exist_ok=True)
        operations = [
            CommitOperationAdd(path, content if isinstance(content, bytes) else str(content))
            for path, content in files.items()
        ]
        api.create_commit(name, operations, commit_message="Export from unet-diffusion")
    return f"{api.endpoint}/{name}"


def hub_answers(name: str, kind: Literal["model", "dataset"] = "model") -> bool:
    """Return whether the hub answers in time what it has under a name, if only that it has nothing.

    Args:
        name: owner/name.
        kind: What the name is of.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().repo_info(name, repo_type=kind, timeout=PATIENCE)
    except HfHubHTTPError:
        return True
    except (ConnectionError, _network_error()):
        return False
    return True


def _network_error() -> type[Exception]:
    """The class of the errors of huggingface_hub's HTTP client."""
    from huggingface_hub.errors import HfHubHTTPError

    return cast(type[Exception], HfHubHTTPError.__bases__[0])


@contextmanager
def _explained(name: str, revision: str | None) -> Iterator[None]:
    """Turn errors of the hub and of the network into an error that says what to do; they name no token.

    Args:
        name: The name as the user gave it. Without hf://, it may be a mistyped path.
        revision: Branch, tag or commit.
    """
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    no_path = "" if name.startswith(PREFIX) else f"there is no file or folder {name}, and "
    try:
        yield
    except RevisionNotFoundError as error:
        raise FileNotFoundError(f"{name} on the hub has no revision {revision}; leave it out, or name a branch, tag or "
                                "commit") from error  # fmt: skip
    except GatedRepoError as error:
        raise FileNotFoundError(f"{name} is open only to users who accept its conditions; accept them on its page, and "
                                "log in with: hf auth login") from error  # fmt: skip
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(f"{no_path}the hub has no model {check_hub_name(name)} that you may use; correct the "
                                "name, or log in with: hf auth login") from error  # fmt: skip
    except (LocalEntryNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(f"{no_path}the hub cannot be reached, nor is a model {check_hub_name(name)} in its "
                                "cache; correct the name, or connect to the network") from error  # fmt: skip
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "no answer")
        raise FileNotFoundError(f"the hub refused {name} (status {status}); log in with a token that may do this: hf "
                                "auth login") from error  # fmt: skip
    except _network_error() as error:
        raise FileNotFoundError(f"the hub cannot be reached for {name}; connect to the network") from error
