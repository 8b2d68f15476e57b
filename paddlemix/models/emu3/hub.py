# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The name of a checkpoint to the folder of its files: a directory, a hub name, or the checkpoint in the package."""

import os
import re
from pathlib import Path

from paddlemix.utils import InputError

HUB_TIMEOUT = 15  # seconds that the hub may be silent
MINI = "emu3-mini"  # this name is always the small checkpoint that comes with the package; a folder is ./emu3-mini
ADAPTER_CONFIG = "adapter_config.json"
MINI_DIRECTORY = Path(__file__).resolve().parents[2] / "demo_models" / "emu3_mini"
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".pdparams")


def fetch(name_or_path, required, optional=(), part="language_model"):
    """The directory that holds a checkpoint's files, fetched from the hub where the name is no directory.

    Args:
        name_or_path: a directory, a hub name such as "BAAI/Emu3-Gen", or "emu3-mini", which is always the checkpoint
            that comes with the package, whatever the working folder holds. A hub name may end in @ and a revision, a
            branch, a tag or a commit: "BAAI/Emu3-Gen@main".
        required, optional: file names. Of a hub checkpoint these and no others are fetched.
        part: of emu3-mini, "language_model" or "vision_tokenizer".

    Raises:
        InputError: there is no such directory or checkpoint, a required file is missing in it, or it is
            neither cached nor within reach.
    """
    if not str(name_or_path or "").strip():
        raise InputError("the path of the checkpoint is empty: give a directory or a hub name such as BAAI/Emu3-Gen")
    path = local_directory(name_or_path, part)
    if path.suffix in PICKLE_SUFFIXES and path.is_file():
        refuse_pickle(name_or_path, path.name)
    if not path.is_dir():
        name = re.fullmatch(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@(\w[\w.-]*(?:/\w[\w.-]*)*))?", str(name_or_path))
        if not name or path.exists():
            raise InputError(
                f"no checkpoint at {str(name_or_path)!r}: give a directory that exists, "
                "a hub name such as BAAI/Emu3-Gen or BAAI/Emu3-Gen@REVISION, or emu3-mini"
            )
        path = _fetch_from_hub(name[1], name[2], required, optional)
    for name in required:
        if os.path.lexists(path / name) and not (path / name).is_file():
            raise InputError(f"{path / name} is not a regular file: download it again")
        if not (path / name).is_file():
            reason = "it is not a whole Emu3 checkpoint, or not the one for this; check the path or download it again"
            if (path / ADAPTER_CONFIG).is_file():
                reason = "it is a LoRA adapter: give the model that it belongs to, and the adapter as --lora_path"
            raise InputError(f"{str(name_or_path)!r} has no {name}: {reason}")
    return path


def local_directory(name_or_path, part="language_model"):
    """Where a checkpoint's files are if they are not the hub's; of a run of `emu3 train`, its newest checkpoint."""
    try:
        path = MINI_DIRECTORY / part if name_or_path == MINI else Path(name_or_path).expanduser()
    except RuntimeError:  # of a ~user that there is not
        return Path(name_or_path)
    of_run = checkpoints_of_run(path)
    return of_run[-1] if of_run and not any(path.glob("*config.json")) else path


def checkpoints_of_run(folder):
    """The folders `checkpoint-STEP` in the output_dir of a training run, the oldest first."""
    found = [(CHECKPOINT.fullmatch(path.name), path) for path in Path(folder).glob("checkpoint-*")]
    return [path for _, path in sorted((int(match[1]), path) for match, path in found if match)]


def at_revision(name_or_path, revision):
    """The name of a checkpoint at a revision; None is the one that the name has."""
    return name_or_path if revision is None else f"{name_or_path}@{revision}"


def matching_vision_tokenizer(name_or_path):
    """The vision tokenizer that a language model takes where none is named: emu3-mini has its own."""
    return MINI if name_or_path == MINI else "BAAI/Emu3-VisionTokenizer"


def refuse_pickle(name_or_path, name):
    raise InputError(
        f"{str(name_or_path)!r} holds {name}, a pickle: loading one can run any program, so it is "
        f"refused; convert it to model.safetensors with the tool that made it"
    )


def _fetch_from_hub(name, revision, required, optional):
    import requests
    from huggingface_hub import configure_http_backend, constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    failures = []  # snapshot_download gives what is in the cache where it cannot ask, and does not say so

    class Session(requests.Session):  # without it a hub that does not answer is waited for without end
        def request(self, *args, timeout=None, **kwargs):
            try:
                response = super().request(*args, timeout=timeout or HUB_TIMEOUT, **kwargs)
            except requests.RequestException:
                failures.append("the hub is out of reach")
                raise
            if response.status_code >= 500:
                failures.append(f"the hub answered {response.status_code}")
            return response

    def missing(path):
        """The files that are not there; of those that are optional, if one is needed and there is none, all."""
        lacks = [f for f in [*required, *optional] if not (path / f).is_file()]
        return [f for f in lacks if f in required] if required else lacks if len(lacks) == len(optional) else []

    configure_http_backend(Session)
    name_given = at_revision(name, revision)
    options = {"allow_patterns": [*required, *optional], **({"revision": revision} if revision else {})}
    try:  # what is in the cache needs no network; a checkpoint's files do not change
        path = Path(snapshot_download(name, local_files_only=True, **options))
        if not missing(path):
            return path
    except LocalEntryNotFoundError:
        pass
    except HFValidationError:
        reason = "it is not a directory, and not a name that the hub can have"
        raise InputError(f"no checkpoint at {name_given!r}: {reason}") from None
    advice = "connect to the network, set HF_ENDPOINT to a mirror, or give the directory of a downloaded checkpoint"
    if constants.HF_HUB_OFFLINE:
        failures.append("HF_HUB_OFFLINE is set, so that the hub is not asked")
        advice = "unset it, or give the directory of a downloaded checkpoint"
    try:
        # our Session would ask even so
        path = Path(snapshot_download(name, local_files_only=bool(constants.HF_HUB_OFFLINE), **options))
        lacks = missing(path)
        if not lacks or not failures:
            return path
        more = f" and {len(lacks) - 8} more" if len(lacks) > 8 else ""
        reason = f"its {', '.join(lacks[:8])}{more} are not in the local cache and {failures[-1]}: {advice}"
    except GatedRepoError:
        reason = "it asks for a login: accept its terms on the hub, then run `huggingface-cli login`"
    except RevisionNotFoundError:
        reason = f"the hub has no revision {revision!r} of it: give a branch, a tag or a commit of it"
    except RepositoryNotFoundError:
        reason = "the hub has no such checkpoint, or it is private: check the name, or run `huggingface-cli login`"
    except LocalEntryNotFoundError:
        reason = f"it is not in the local cache and {[*failures, 'the hub is out of reach'][0]}: {advice}"
    except HfHubHTTPError as error:
        reason = f"the hub answered {str(error).splitlines()[0]!r}: try again later"
    except (OSError, requests.RequestException) as error:
        reason = f"{error}: check the network, the disk and the cache directory, then try again"
    raise InputError(f"cannot fetch {name_given}: {reason}")
