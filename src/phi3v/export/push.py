"""``phi3v export --push``: a verified folder to the hub, by the hub's own client."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from huggingface_hub.utils.sha import git_hash
from rich.console import Console

from phi3v import __version__
from phi3v.errors import UserError
from phi3v.json_files import read_json
from phi3v.paths import is_hub_id
from phi3v.terminal import say
from phi3v.train.finetuned import ADAPTER_CONFIG
from phi3v.train.methods.weights import CARD_FILE, MANIFEST

OF_THE_HUB = ".gitattributes"


def check_push(repo_id: str, *, yes: bool) -> None:
    """Find what is wrong with an upload before there is anything to upload; nobody is asked.

    Raises:
        UserError: the name is none, there is no token, no network is wanted, or nobody can be asked.
    """
    where = f"--push {repo_id}"
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"is no name on the hub: {error}", where=where, hint="OWNER/NAME, e.g. me/my-model") from None
    if repo_id.count("/") != 1:
        raise UserError("does not say whose it is", where=where, hint="OWNER/NAME, e.g. me/my-model")
    if constants.HF_HUB_OFFLINE:
        raise UserError("HF_HUB_OFFLINE is set", where=where, hint="unset it to use the hub")
    if get_token() is None:
        hint = "log in with `hf auth login`, or set HF_TOKEN to a token with write permission"
        raise UserError("there is no token for the hub", where=where, hint=hint)
    if not (yes or sys.stdin.isatty()):
        raise UserError("there is no terminal to confirm it on", where=where, hint="add --yes")


def require_hub_base(base: str) -> None:
    """Refuse an adapter that nobody else could use."""
    if not is_hub_id(base):
        hint = "export it with --base-id OWNER/NAME, as the hub calls that model; or merged, without --adapter"
        raise UserError(f"the adapter goes on {base}, which is on this machine only", where="--push", hint=hint)


def push(folder: Path, repo_id: str, console: Console, *, private: bool = False, yes: bool = False) -> str | None:
    """Upload a folder in one commit, after asking.

    Args:
        private: of a repository that is made here.
        yes: do not ask.

    Returns:
        Its address, or None where the answer was no.

    Raises:
        UserError: the repository holds something else, or the hub refuses or cannot be reached.
    """
    if (folder / ADAPTER_CONFIG).is_file():
        require_hub_base(str(read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")))
    files = _contents(folder, repo_id)
    api = HfApi(library_name="phi3v", library_version=__version__)
    address = f"{api.endpoint}/{repo_id}"
    say(console, f"upload to {address} ({'private' if private else 'public'}):", style="bold")
    for file in files:
        say(console, f"  {_human(file.upload_info.size):>9}  {file.path_in_repo}")
    say(console, f"  {_human(sum(file.upload_info.size for file in files)):>9}  in {len(files)} files")
    again = f"phi3v export --verify {shlex.quote(str(folder))} --push {repo_id}{' --private' if private else ''}"
    if not yes and console.input("upload? [y/N] ").strip().lower() not in ("y", "yes"):
        say(console, f"not uploaded; later: {again}")
        return None
    try:
        _require_nothing_else(api, repo_id, files, private)
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        api.create_commit(repo_id, files, commit_message=f"Upload with phi3v {__version__}")
    except UserError:
        raise
    except Exception as error:  # the client's, and those of all that it uses to send
        what, hint = _reason(error)
        hint = f"{hint}; then `{again}`: the export is kept"
        raise UserError(f"not uploaded: {what}", where=address, hint=hint) from error
    say(console, f"uploaded: {address}", style="bold")
    return address


def _contents(folder: Path, repo_id: str) -> list[CommitOperationAdd]:
    """What is uploaded. The card loads the model by its name on the hub, and the manifest names no path."""
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    changed = {}
    if CARD_FILE in paths:
        text = (folder / CARD_FILE).read_text(encoding="utf-8")
        text = re.sub(r'^name = ".*".*$', f'name = "{repo_id}"', text, flags=re.MULTILINE)
        changed[CARD_FILE] = re.sub(r"vllm serve \S+", f"vllm serve {repo_id}", text).encode()
    if MANIFEST in paths:
        facts = read_json(folder / MANIFEST)
        if not is_hub_id(str(facts.get("tuned_from"))):
            facts.pop("tuned_from", None)
        changed[MANIFEST] = (json.dumps(facts, indent=2) + "\n").encode()
    return [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=changed.get(name, str(path)))
        for name, path in paths.items()
        if not re.search(r"(^|/)\.", name)  # hidden ones are not of the export
    ]


def _require_nothing_else(api: HfApi, repo_id: str, files: Sequence[CommitOperationAdd], private: bool) -> None:
    """Refuse a repository that holds anything but what is uploaded, or that is public and should not be."""
    try:
        there = [entry for entry in api.list_repo_tree(repo_id, recursive=True) if isinstance(entry, RepoFile)]
    except RepositoryNotFoundError:
        return
    where = f"{api.endpoint}/{repo_id}"
    if private and not api.model_info(repo_id).private:
        raise UserError("is there already, and public", where=where, hint="choose another name, or make it private")
    ours = {file.path_in_repo: file for file in files}
    others = [file.path for file in there if file.path != OF_THE_HUB and not _is_same(file, ours.get(file.path))]
    if others:
        raise UserError(
            f"holds {len(others)} files that are not of this export, first {others[0]}",
            where=where,
            hint="choose another name; or, to replace them on purpose, use `hf upload`",
        )


def _is_same(theirs: RepoFile, ours: CommitOperationAdd | None) -> bool:
    if ours is None:
        return False
    if theirs.lfs is not None:
        return ours.upload_info.sha256.hex() == theirs.lfs.sha256
    with ours.as_file() as content:
        return git_hash(content.read()) == theirs.blob_id


def _reason(error: BaseException) -> tuple[str, str]:
    """What went wrong at the hub, and what to do about it."""
    while error.__cause__ is not None and not isinstance(error, HfHubHTTPError):
        error = error.__cause__  # of the thread that sent a file
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    said = " ".join((getattr(error, "server_message", None) or str(error) or type(error).__name__).split())[:300]
    if status == 401:
        return f"the hub does not know the token ({said})", "log in anew with `hf auth login`"
    if status == 403:
        return f"the token may not write there ({said})", "take a token with write permission, or a name of yours"
    if status is not None:
        return f"the hub says {status}: {said}", "the message says what it does not take, or try again later"
    return f"the hub cannot be reached, or the connection broke: {said}", "is the network there?"


def _human(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"
