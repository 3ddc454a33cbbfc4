"""Uploading a model folder to the Hugging Face hub with huggingface-hub (mlx-lm's upload calls a removed function).

The token comes from HF_TOKEN or `hf auth login`; it is neither read nor written here. Not here: the model card (see
models.export.model_card), and continuing an upload, which `hf upload` does.
"""

import shlex
from pathlib import Path

import httpx2
from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from common.errors import UserError, reason

# What a refusal or a broken connection makes the hub's API raise.
UPLOAD_ERRORS = (HfHubHTTPError, httpx2.HTTPError, OSError, RuntimeError, ValueError, KeyError)


def check_upload(name: str) -> None:
    """Raise UserError, before any work, for a name other than USER/REPO, and if no one is logged in."""
    try:
        validate_repo_id(name)
        well_formed = name.count("/") == 1
    except HFValidationError:
        well_formed = False
    if not well_formed:
        raise UserError(f"--upload-name is {name!r}; give USER/REPO")
    if get_token() is None:
        raise UserError("--upload-name needs the token of a Hugging Face account; set HF_TOKEN, or run: hf auth login")


def upload_command(folder: str | Path, name: str, public: bool) -> str:
    """The hub's own command that uploads the folder as `upload` does, and can continue an interrupted upload."""
    return shlex.join(["hf", "upload", name, str(folder), ".", *([] if public else ["--private"])])


def upload(folder: str | Path, name: str, public: bool) -> str:
    """Upload a folder as the repository `name`, which is created if necessary. Returns its address.

    If the hub refuses or the upload is interrupted, raises a UserError that says how to continue; also if the
    repository is public although `public` is false. The folder is not changed.
    """
    api = HfApi()
    try:
        address = api.create_repo(name, private=not public, exist_ok=True)
        seen_by_all = not api.repo_info(name).private
        if not seen_by_all or public:
            api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload a fused model")
    except UPLOAD_ERRORS as error:
        raise UserError(
            f"the upload to {name} failed ({reason(error)}); {folder} is complete; continue with: "
            f"{upload_command(folder, name, public)}"
        ) from None
    if seen_by_all and not public:
        raise UserError(
            f"{name} already exists and is public, so nothing was uploaded; add --public, or choose another name"
        )
    return str(address)
