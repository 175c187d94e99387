"""Shards in object stores and on web servers, read through `fsspec` and a local cache."""

from __future__ import annotations

import functools
import glob
import os
import re
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec
from huggingface_hub import snapshot_download
from huggingface_hub.constants import HF_HOME

from modeling_amorlip.cli_amorlip import UserError
from training.config import DataConfig
from training.data.checksums import Checksum, read_checksum
from training.data.patterns import GLOB_CHARACTERS, expand_braces, is_tar
from training.data.shard_cache import RemoteFile, ShardCache
from training.data.shards import LocalFile, ShardError, Shards


ADDRESS = re.compile(r"([a-z][a-z0-9+.-]*)://")
VERSION_FIELDS = ("ETag", "etag", "md5Hash", "generation", "blob_id", "mtime", "LastModified", "Last-Modified")
INFO_THREADS = 32


def is_remote(source: str) -> bool:
    """Return whether an entry of `train_data` is an address.

    Raises:
        UserError: it is a command, which can be replaced by an address.
    """
    if source.startswith("pipe:"):
        raise UserError(
            f"train_data {source}: commands are not run. Write the address itself, s3://BUCKET/{{000..123}}.tar, "
            "gs://..., https://... or hf://datasets/OWNER/NAME/PATTERN: shards are then downloaded as they are needed."
        )
    return ADDRESS.match(source) is not None


def expand_remote(source: str) -> list[str]:
    """Return the addresses that an entry of `train_data` names: braces are expanded, `*` and `?` matched.

    Raises:
        UserError: the store cannot be read, or a pattern matches nothing.
    """
    if source.startswith("hf://"):
        split_repository(source)
    addresses: list[str] = []
    for pattern in expand_braces(source):
        # In a web address, a question mark begins the query, and there is nothing to list.
        if pattern.startswith(("http://", "https://")) or not GLOB_CHARACTERS.search(pattern):
            addresses.append(pattern)
            continue
        system, path = open_store(pattern)
        try:
            matches = sorted(system.glob(path))
        except Exception as error:  # clients of stores raise many kinds
            raise UserError(f"train_data {pattern} cannot be listed: {type(error).__name__}: {error}") from None
        if not matches:
            raise UserError(f"train_data {source}: there is no {pattern}.")
        addresses += [system.unstrip_protocol(match) for match in matches]
    return addresses


def is_remote_tar(address: str) -> bool:
    """Return whether an address, or a pattern of addresses, names tars."""
    return is_tar(urlsplit(address).path) or is_tar(address)


def download_repository(source: str) -> list[str]:
    """Download files of a data set repository of the Hub, and return their local names.

    Raises:
        UserError: the address is incomplete, or the files cannot be downloaded.
    """
    repository, path = split_repository(source)
    patterns = expand_braces(path)
    try:
        # Unlike in `glob`, ** stands for a folder at least here.
        allowed = [*patterns, *(pattern.replace("**/", "") for pattern in patterns)]
        folder = snapshot_download(repository, repo_type="dataset", allow_patterns=allowed)
    except Exception as error:  # the client raises many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"train_data {source} cannot be downloaded: {reason}") from None
    paths = [os.path.join(glob.escape(folder), pattern) for pattern in patterns]
    files = [file for path in paths for file in sorted(glob.glob(path, recursive=True))]
    if not files:
        raise UserError(f"train_data {source}: there is no such file in {repository}.")
    return files


def download_folder(repository: str) -> Path:
    """Download a data set repository of the Hub, and return its local folder."""
    return Path(snapshot_download(repository, repo_type="dataset"))


def split_repository(source: str) -> tuple[str, str]:
    """Return the name of a data set repository of the Hub, and the pattern of files in it.

    Raises:
        UserError: the address is of another kind, or incomplete.
    """
    kind, owner, name, path = [*source.removeprefix("hf://").split("/", 3), "", "", "", ""][:4]
    if kind != "datasets" or not path:
        raise UserError(f"train_data {source}: write hf://datasets/OWNER/NAME/PATTERN.")
    return f"{owner}/{name}", path


def open_store(address: str) -> tuple[Any, str]:
    """Return the file system of an address and the path in it.

    Raises:
        UserError: the client of the store is not installed.
    """
    try:
        return fsspec.core.url_to_fs(address)
    except (ImportError, ValueError) as error:
        raise UserError(f"train_data {address} cannot be opened: {error}") from None


class RemoteShards(Shards):
    """Shards at addresses, each copied to a local cache when it is opened.

    Args:
        addresses: the shards.
        config: size of the cache and shuffling.

    Raises:
        UserError: a shard cannot be read, or the cache is too small for the order in which pairs are read.
    """

    is_remote = True

    def __init__(self, addresses: Sequence[str], config: DataConfig):
        self.names = list(addresses)
        limit = int(config.shard_cache_size * 1e9)
        self.cache = ShardCache(Path(HF_HOME) / "amorlip" / "shards", limit)
        self.files = find_files(self.names)
        self.states = [(file.size, file.version) for file in self.files]
        largest, total = max(size for size, _ in self.states), sum(size for size, _ in self.states)
        if largest > limit:
            raise UserError(
                f"shard_cache_size is {config.shard_cache_size:g} GB, less than a shard ({largest / 1e9:.2f} GB): "
                "raise it to several shards at least."
            )
        if config.shuffle == "samples" and total > limit:
            raise UserError(
                f"shuffle samples would download a shard for every pair: the {len(self.names)} shards take "
                f"{total / 1e9:.1f} GB, shard_cache_size is {config.shard_cache_size:g} GB. Use shuffle shards, or a "
                "larger cache."
            )

    def open(self, shard: int) -> LocalFile:
        return self.cache.open(self.files[shard])

    def prefetch(self, shard: int) -> None:
        """Copy a shard to the cache.

        Raises:
            ShardError: see `open`.
        """
        self.cache.download(self.files[shard])


def find_files(addresses: Sequence[str]) -> list[RemoteFile]:
    """Return the files at addresses, as they are now.

    Raises:
        UserError: a file does not exist or cannot be read.
    """
    with ThreadPoolExecutor(INFO_THREADS) as pool:
        return list(pool.map(_find_file, addresses))


def copy_tables(addresses: Sequence[str]) -> list[str]:
    """Copy tables to the local disk, where they stay, and return their local names.

    Raises:
        UserError: a table cannot be read or copied.
    """
    cache = ShardCache(Path(HF_HOME) / "amorlip" / "tables", sys.maxsize)
    files = find_files(addresses)
    for file in files:
        try:
            cache.download(file)
        except ShardError as error:
            raise UserError(f"train_data {error}.") from None
    return [str(cache.path(file)) for file in files]


def read_state(address: str) -> tuple[int, str]:
    """Return size and version of a remote file."""
    return _read_info(address)[:2]


def _read_info(address: str) -> tuple[int, str, Checksum | None]:
    """Return size, version and checksum of a remote file."""
    system, path = open_store(address)
    system.invalidate_cache()
    info = system.info(path)
    if info.get("size") is None:
        raise OSError("the server does not tell its size")
    version = next((str(info[field]) for field in VERSION_FIELDS if info.get(field)), "")
    return int(info["size"]), version, read_checksum(address, info)


def _find_file(address: str) -> RemoteFile:
    try:
        state = _read_info(address)
    except UserError:
        raise
    except Exception as error:  # clients of stores raise many kinds
        raise UserError(f"train_data {address} cannot be read: {type(error).__name__}: {error}") from None
    return RemoteFile(address, *state, functools.partial(_read, address), functools.partial(read_state, address))


def _read(address: str, start: int, end: int) -> bytes:
    system, path = open_store(address)
    return system.cat_file(path, start=start, end=end)
