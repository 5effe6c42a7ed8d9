"""Models of the Hugging Face hub: fetched into its cache, with errors in one sentence each."""

from __future__ import annotations

import errno

from settings import ModelError

HUB_SECONDS = 10.0
MODEL_PATTERNS = ("*.json", "*.safetensors", "*.model", "*.jinja", "*.txt")
# Second copies of the same weights in their makers' own formats, as in Mistral's and Llama's.
COPIES = ("consolidated*", "original/*")


def fetch_model(model: str, revision: str | None, setting: str) -> str:
    """The folder of a hub model's files in the hub's cache, named by their commit.

    Args:
        model: Hub id, such as "meta-llama/Llama-2-7b-hf".
        revision: Branch, tag or commit; None for the newest.
        setting: The setting that named it, for messages.

    Raises:
        ModelError: One sentence that says what is missing and how to get it.
    """
    from huggingface_hub import is_offline_mode, snapshot_download

    commit = revision if is_offline_mode() else _commit(model, revision, setting)
    try:
        return snapshot_download(
            model,
            revision=commit,
            allow_patterns=list(MODEL_PATTERNS),
            ignore_patterns=list(COPIES),
        )
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise ModelError(
                f"the disk is too full to download {setting}={model!r}; free some space or set "
                "HF_HOME to another disk"
            ) from error
        raise ModelError(
            f"{setting}={model!r} is not in the hub cache and HF_HUB_OFFLINE is set; unset it, or "
            f"set {setting} to a model folder"
        ) from error


def _commit(model: str, revision: str | None, setting: str) -> str | None:
    """The commit that `revision` stands for; asks the hub once, with a short time limit."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return HfApi().model_info(model, revision=revision, timeout=HUB_SECONDS).sha
    except GatedRepoError:
        raise ModelError(
            f"{setting}={model!r} is gated; accept its licence on its hub page, then set HF_TOKEN"
        ) from None
    except RevisionNotFoundError:
        raise ModelError(
            f"{setting}={model!r} has no revision {revision!r}; set model.revision to one it has"
        ) from None
    except RepositoryNotFoundError:
        raise ModelError(
            f"{setting}={model!r} is neither a folder nor a hub model that this machine may read; "
            "correct it, or set HF_TOKEN if the model is private"
        ) from None
    except HfHubHTTPError as error:
        raise ModelError(f"the hub refused {setting}={model!r}: {error}; try again") from error
    except Exception as error:
        # What the hub's HTTP library raises without a network is no error of the hub's own.
        raise ModelError(
            f"the weights of {setting}={model!r} are not on this machine and the hub can't be "
            f"reached; connect to a network (and set HF_TOKEN if the model is gated), set "
            f"{setting} to a model folder, or set HF_HUB_OFFLINE=1 if they are in the hub cache"
        ) from error
