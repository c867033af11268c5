"""Models on the Hugging Face Hub: downloaded into its cache by name, and pushed from a folder.

huggingface_hub finds the token of the user by itself (`hf auth login`, or HF_TOKEN). Nothing here reads, prints or
saves it. HF_HUB_OFFLINE=1 takes models from the cache alone, and HF_ENDPOINT names another server.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import Any, Literal, cast

from unet_diffusion.runtime.addresses import NAME, PREFIX, StrPath, is_hub_name
from unet_diffusion.runtime.weight_files import PIPELINE_FILES, only_weights, weights_among

MOST_CONNECTIONS = 4  # files that are downloaded at once
PATIENCE = 5.0  # seconds to wait for the hub's first answer; huggingface_hub itself would wait for ever
PLAIN = ["*.json", "*.txt", "*.md"]  # small files, which say what a repository holds
FILE = re.compile(rf"({NAME.pattern})/(.+\.safetensors)")  # one file in a repository


def with_prefix(path: StrPath) -> str:
    """Return hf://owner/name for a name on the hub, with its file if it names one, and another path as it is.

    With the prefix, a name is told from a relative path also on another machine, where other folders exist.

    Args:
        path: As for `is_hub_name`.
    """
    if not is_hub_name(path):
        return str(path)
    name, file = _name_and_file(str(path))
    return f"{PREFIX}{name}" if file is None else f"{PREFIX}{name}/{file}"


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
    """Return the folder or the file of a model in the cache of the hub; what is missing there is downloaded.

    Code in the repository is not downloaded, and of several sets of weights only safetensors in full precision. A
    variant such as fp16 is downloaded where there are no others.

    Args:
        path: owner/name, hf://owner/name, or hf://owner/name/file.safetensors.
        revision: Branch, tag or commit; None: the main branch.

    Raises:
        FileNotFoundError: If there is no such model or file, or it is not in the cache and the hub cannot be reached.
        ValueError: If the repository holds several files of weights, and no configuration that says which are read.
    """
    from huggingface_hub import HfApi, snapshot_download

    name, file = _name_and_file(path)
    with _explained(path, revision):
        is_online = hub_answers(name)
        options: dict[str, Any] = {"max_workers": MOST_CONNECTIONS, "local_files_only": not is_online}
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=PLAIN, **options))
        if is_online:  # the folder has the name of its commit
            files = HfApi().list_repo_files(name, revision=folder.name)
        else:
            files = [path.relative_to(folder).as_posix() for path in folder.rglob("*")]
        weights = _weights_to_read(name, files) if file is None else [file]
        snapshot_download(name, revision=folder.name, allow_patterns=[escape(each) for each in weights], **options)
    if file is not None and not (folder / file).is_file():
        raise FileNotFoundError(f"{name} on the hub has no file {file}; its files of weights are: "
                                f"{', '.join(weights_among(files)) or 'none'}")  # fmt: skip
    return folder if file is None else folder / file


def _name_and_file(path: str) -> tuple[str, str | None]:
    """owner/name without the prefix hf://, and the file in the repository if the path names one."""
    match = FILE.fullmatch(path.removeprefix(PREFIX))
    return (match[1], match[2]) if match else (check_hub_name(path), None)


def _weights_to_read(name: str, files: Sequence[str]) -> list[str]:
    """The weights of a repository. A pipeline's folders hold them; the same in one file often lies beside them."""
    if "model_index.json" in files:
        return [file for file in weights_among(files) if "/" in file]
    if any(file in files for file in PIPELINE_FILES):
        return weights_among(files)
    file = only_weights(f"{PREFIX}{name}", files)
    return [] if file is None else [file]


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
    bare = _name_and_file(name)[0]
    try:
        yield
    except RevisionNotFoundError as error:
        raise FileNotFoundError(f"{name} on the hub has no revision {revision}; leave it out, or name a branch, tag or "
                                "commit") from error  # fmt: skip
    except GatedRepoError as error:
        raise FileNotFoundError(f"{name} is open only to users who accept its conditions; accept them on its page, and "
                                "log in with: hf auth login") from error  # fmt: skip
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(f"{no_path}the hub has no model {bare} that you may use; correct the "
                                "name, or log in with: hf auth login") from error  # fmt: skip
    except (LocalEntryNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(f"{no_path}the hub cannot be reached, nor is a model {bare} in its "
                                "cache; correct the name, or connect to the network") from error  # fmt: skip
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "no answer")
        raise FileNotFoundError(f"the hub refused {name} (status {status}); log in with a token that may do this: hf "
                                "auth login") from error  # fmt: skip
    except _network_error() as error:
        raise FileNotFoundError(f"the hub cannot be reached for {name}; connect to the network") from error
