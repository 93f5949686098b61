"""Uploading exported folders to the Hugging Face Hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from milora_lightning.utils.errors import InvalidInputError

WEIGHTS = ["*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "adapter_config.json"]
"""Files of earlier uploads to delete: adapters left next to a merged model would be applied to it again."""


class HubError(InvalidInputError):
    """A folder cannot be uploaded to the Hub."""


def check_upload(name: str, private: bool) -> None:
    """Refuse, before any work, an upload that would fail, or that would be public although it should be private.

    Args:
        name: Name of the repository, ``"user/name"``, or ``"name"`` in the user's namespace.
        private: Whether the repository must be private.

    Raises:
        HubError: If there is no token, the Hub cannot be reached, or the repository exists and is public.
    """
    if constants.HF_HUB_OFFLINE:
        raise HubError(
            f"Nothing can be uploaded to {name!r}: HF_HUB_OFFLINE is set. Unset it, or export without uploading."
        )
    if get_token() is None:
        raise HubError(f"Nothing can be uploaded to {name!r} without a Hub token: run hf auth login, or set HF_TOKEN.")
    api = HfApi()
    with _clear_errors(name):
        user = api.whoami()["name"]
        try:
            there = api.model_info(name if "/" in name else f"{user}/{name}")
        except RepositoryNotFoundError:
            return
    if private and not there.private:
        raise HubError(
            f"{there.id!r} already exists and is public: make it private on the Hub, or choose another name."
        )


def upload(folder: str | Path, name: str, private: bool) -> str:
    """Upload an exported folder to a repository, creating it if necessary; weights of earlier uploads are deleted.

    Args:
        folder: The exported folder.
        name: Name of the repository.
        private: Whether to make a new repository private.

    Returns:
        The address of the repository.

    Raises:
        HubError: If the upload fails; the message says how to retry.
    """
    api = HfApi()
    again = f" {str(folder)!r} is complete; upload it with: hf upload {name} {folder}"
    with _clear_errors(name, again):
        repository = api.create_repo(name, private=private or None, exist_ok=True)
        api.upload_folder(
            repo_id=repository.repo_id,
            folder_path=str(folder),
            commit_message="Upload with milora-lightning",
            delete_patterns=WEIGHTS,
        )
    return str(repository)


def local_base(folder: str | Path) -> str | None:
    """Return the base that an exported adapter folder names, if it is a local folder."""
    path = Path(folder) / "adapter_config.json"
    base = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"] if path.is_file() else None
    return base if base and Path(base).is_dir() else None


@contextmanager
def _clear_errors(name: str, then: str = "") -> Iterator[None]:
    try:
        yield
    except Exception as error:  # from the Hub, or from the libraries that talk to it
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        first = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
        reason = {
            401: "the token is not valid: run hf auth login again",
            403: "the token has no write access: use one that has, or another name",
        }.get(status or 0, first)
        raise HubError(f"{name!r} cannot be uploaded to: {reason}.{then}") from error
