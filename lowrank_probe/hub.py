"""Hub ids: what may be one, and the local snapshot of a repository."""

import re
from pathlib import Path
from typing import Final

from lowrank_probe.adapter_format import CONFIG, WEIGHTS
from lowrank_probe.errors import CheckpointError
from lowrank_probe.outputs import why

_HUB_ID: Final = re.compile(r"[\w.-]+/[\w.-]+(?:@[\w./-]+)?")
_PAGE: Final = re.compile(r"https?://(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)/?(?:(?:tree|blob)/([\w.-]+).*)?")
_CONFIGS: Final = ("config.json", CONFIG)
# In this order: pickles only where a repository has no safetensors. A model's own shards, not copies in other formats
# (`consolidated.*`) that lie beside them.
_WEIGHTS: Final = (
    ("model.safetensors", "model*-of-*.safetensors", "model.safetensors.index.json", WEIGHTS),
    ("pytorch_model.bin", "pytorch_model*-of-*.bin", "pytorch_model.bin.index.json", "adapter_model.bin"),
)

_TOKENIZER: Final = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model", "chat_template*",
)  # fmt: skip


def is_hub_id(path: str) -> bool:
    """Whether a path that does not exist may be a hub id: `owner/name`, or `owner/name@revision`."""
    return _HUB_ID.fullmatch(path) is not None and not path.startswith((".", "/")) and not path.endswith("/")


def id_in_address(text: str) -> str:
    """The hub id of a page of the hub, which has no files; "" for any other address.

    >>> id_in_address("https://huggingface.co/org/name/tree/v2")
    'org/name@v2'
    """
    found = _PAGE.fullmatch(text)
    return "" if found is None else f"{found[1]}@{found[2]}" if found[2] else found[1]


def no_such(text: str) -> str:
    """Why nothing can be opened under this name, and the mend."""
    if not text:
        return "'' is no path (expected a checkpoint directory, file, address or hub id; an empty variable?)"
    return f"{text}: no such file or directory (expected a checkpoint directory, file, address or hub id, owner/name)"


def download(hub_id: str) -> Path:
    """The local snapshot of a hub repository: configs and weights, its safetensors files, else its pickles.

    Raises `CheckpointError`: no such repository, no access, no connection, a download that breaks off, a cache that
    cannot be written, no weights in it.
    """
    for patterns in _WEIGHTS:
        root = _snapshot(hub_id, [*_CONFIGS, *patterns])
        if any(next(root.glob(pattern), None) for pattern in patterns):
            return root
    raise CheckpointError(
        f"{hub_id}: its repository on the hub holds no model.safetensors, pytorch_model.bin or shards of them in its "
        "root; download what it has and give that directory or file"
    )


def download_tokenizer(hub_id: str) -> None:
    """Add the tokenizer of a hub repository to its local snapshot, as far as it has one. Raises as `download`."""
    _snapshot(hub_id, list(_TOKENIZER))


def download_config(hub_id: str) -> Path:
    """The local copy of a hub repository's config.json, alone. Raises `CheckpointError` as `download`."""
    file = _snapshot(hub_id, ["config.json"]) / "config.json"
    if not file.exists():
        raise CheckpointError(f"{hub_id}: its repository on the hub holds no config.json; give the model it belongs to")
    return file


def _snapshot(hub_id: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name, _, revision = hub_id.partition("@")
    nothing = f"{hub_id}: no such file or directory here, and"
    try:
        return Path(
            snapshot_download(name, revision=revision or None, allow_patterns=patterns, ignore_patterns=["*/*"])
        )
    except GatedRepoError:
        raise CheckpointError(
            f"{nothing} access to it on the hub is gated: accept its terms, then `hf auth login`"
        ) from None
    except RevisionNotFoundError:
        raise CheckpointError(f"{nothing} the hub's {name} has no revision {revision!r}") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise CheckpointError(f"{nothing} the hub has no model {name} (or it is private: `hf auth login`)") from None
    except LocalEntryNotFoundError as error:
        answer = error.__cause__ if isinstance(error.__cause__, HfHubHTTPError) else "offline?"
        raise CheckpointError(
            f"{nothing} the hub cannot be reached ({_first_line(answer)}) and {name} is not in its cache; give a local "
            "directory"
        ) from None
    except Exception as error:  # of the disk, of the hub, or of whichever HTTP library the client uses
        if isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError | TimeoutError):
            where = f" ({error.filename})" if error.filename else ""
            raise CheckpointError(
                f"{hub_id}: cannot be kept in the hub's cache{where}: {why(error, 'set HF_HOME to another directory')}"
            ) from None
        said = _first_line(f"{type(error).__name__}: {error}")
        raise CheckpointError(
            f"{hub_id}: its download broke off ({said}); try again, what is finished is kept, or give a local directory"
        ) from None


def _first_line(said: object) -> str:
    return str(said).strip().partition("\n")[0][:200]
