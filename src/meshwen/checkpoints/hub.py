# SPDX-License-Identifier: Apache-2.0
"""Checkpoints by hub id, and files of data sets, through huggingface_hub and its cache."""

import re
from collections.abc import Callable
from pathlib import Path

from meshwen.checkpoints.safetensors import INDEX
from meshwen.errors import MeshwenError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILE_ENDINGS = (".gguf", ".safetensors", ".bin", ".json")
_ALWAYS = ["*.json", "merges.txt", "*.jinja"]
# A star also matches slashes. Of a subfolder only *.jinja is used: chat templates.
_NEVER = ["*/*[!a]"]


def looks_like_hub_id(text: str) -> bool:
    """Whether `text` has the form `organisation/name`; anything else is taken for a path."""
    return _HUB_ID.fullmatch(text) is not None and not text.endswith(_FILE_ENDINGS)


def download(repo_id: str, *, load_format: str, revision: str | None) -> Path:
    """The folder with the files of a hub repository, downloaded where the cache lacks them.

    Fetches configuration, tokenizer and safetensors; torch files only for `load_format="torch"`, or
    when there are no safetensors; no weights for `load_format="dummy"`. HF_HUB_OFFLINE, HF_HOME and
    HF_TOKEN have their usual meanings.
    Raises MeshwenError when the repository cannot be reached, found or opened.
    """
    if load_format == "gguf":
        raise MeshwenError(
            f"cannot choose a GGUF file of {repo_id} on the hub: download the one that you want "
            f"(`hf download {repo_id} FILE.gguf`) and pass its path"
        )
    if load_format == "dummy":
        return _snapshot(repo_id, revision)
    if load_format != "torch":
        folder = _snapshot(repo_id, revision, "*.safetensors")
        found = any(folder.glob("*.safetensors")) or (folder / INDEX).is_file()
        if found or load_format == "safetensors":
            return folder
    return _snapshot(repo_id, revision, "pytorch_model*.bin")


def dataset_file(repo_id: str, name: str) -> Path:
    """A file of a data set on the hub, downloaded where the cache lacks it.

    Raises MeshwenError when the data set cannot be reached, found or opened.
    """

    def download() -> str:
        import huggingface_hub

        return huggingface_hub.hf_hub_download(repo_id, name, repo_type="dataset")

    return _fetched(repo_id, None, download, "the path of a file with the data")


def _snapshot(repo_id: str, revision: str | None, *weights: str) -> Path:
    def download() -> str:
        import huggingface_hub

        return huggingface_hub.snapshot_download(
            repo_id,
            revision=revision,
            allow_patterns=[*_ALWAYS, *weights],
            ignore_patterns=_NEVER,
        )

    return _fetched(repo_id, revision, download, "the path of a model folder")


def _fetched(repo_id: str, revision: str | None, download: Callable[[], str], instead: str) -> Path:
    """What `download` gives, its errors told to a user, who may give something `instead`."""
    from huggingface_hub import errors  # Slow to import, and not needed for a path.

    where = f"{repo_id} (revision {revision})" if revision else repo_id
    try:
        return Path(download())
    except errors.GatedRepoError as error:
        raise MeshwenError(
            f"{repo_id} is gated on the hub: accept its licence on its page, then log in with "
            "`hf auth login` or set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise MeshwenError(f"{repo_id} has no revision {revision!r} on the hub") from error
    except errors.RepositoryNotFoundError as error:
        raise MeshwenError(
            f"{repo_id} is neither a path here nor a repository on the hub that you may read: "
            "check the spelling; for a private one, log in with `hf auth login` or set HF_TOKEN"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise MeshwenError(_unreachable(where, error, instead)) from error
    except Exception as error:  # the HTTP library, and so its errors, differs between hub versions
        raise MeshwenError(f"cannot download {where} from the hub: {_reason(error)}") from error


def _unreachable(where: str, error: Exception, instead: str) -> str:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return (
            f"{where} is not (wholly) in the hub cache at {constants.HF_HUB_CACHE}, and "
            f"HF_HUB_OFFLINE is set: unset it to download, or pass {instead}"
        )
    return (
        f"{where} is not (wholly) in the hub cache at {constants.HF_HUB_CACHE}, and the hub cannot "
        f"be reached ({_reason(error.__cause__ or error)}): check the network, or pass {instead}"
    )


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
