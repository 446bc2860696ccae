"""Rotation: how the deployment's key is replaced, and finished at a start if it was interrupted.

key file: old      index: old          as ever
key file: new old  index: old          interrupted before the data keys were wrapped anew
key file: new old  index: new, purge   interrupted before the old wrapped keys were out of the file
key file: new old  index: new          interrupted before the old key was out of its file
key file: new      index: new          done
"""

import logging
from contextlib import suppress
from pathlib import Path

from saltern.secret import delete_unfinished, keep_private
from saltern.tiers.datakeys import (
    deployment_name,
    make_deployment_key,
    new_deployment_key,
    read_deployment_keys,
    unwrap,
    wrap,
    write_deployment_keys,
)
from saltern.tiers.errors import DiskError
from saltern.tiers.index import INDEX_ERRORS, Index, disk_error

log = logging.getLogger(__name__)


def open_index(folder: Path, key_path: Path) -> Index:
    """Open the index of a data folder, whose key must be in the key file. Both are made if neither is there.

    Raises `DiskError`.
    """
    path = folder / "index.db"
    try:
        keep_private(folder)
    except (OSError, ValueError) as error:
        raise DiskError(str(error)) from None
    if not path.exists() and not key_path.exists():
        make_deployment_key(key_path)
        log.warning("made the deployment key %s: back it up, without it nothing on the disk can be read", key_path)
    keys = read_deployment_keys(key_path)
    index = Index(path)
    try:
        if index.deployment is None:
            with index.transaction():
                index.set_keys(deployment_name(keys[0]), {})
        current_key(index, key_path)
        with suppress(OSError):
            delete_unfinished(key_path)  # now that nobody else is at it
        return index
    except INDEX_ERRORS as error:
        index.close()
        raise disk_error(path, error) from None
    except DiskError:
        index.close()
        raise


def current_key(index: Index, key_path: Path) -> bytes:
    """Return which of the keys in the file data keys are wrapped under. Raises `DiskError`."""
    for key in read_deployment_keys(key_path):
        if deployment_name(key) == index.deployment:
            return key
    raise DiskError(
        f"{key_path} is not the key that {index.path} was written with: put that one back from your backup. If it is"
        f" lost, so is what is stored: move {index.path.parent} away to start with an empty disk"
    )


def rotate(index: Index, key_path: Path) -> tuple[bytes, int]:
    """Replace the deployment key; return the new one, and how many data keys it wraps.

    Raises `DiskError`, `INDEX_ERRORS` and OSError. What was begun then is finished at the next start.
    """
    write_deployment_keys(key_path, (new_deployment_key(), current_key(index, key_path)))
    return finish_rotation(index, key_path)


def finish_rotation(index: Index, key_path: Path) -> tuple[bytes, int]:
    """Do what is left of a rotation; return the key that is the deployment's then, and how many data keys it wraps."""
    keys, present = read_deployment_keys(key_path), current_key(index, key_path)
    new = keys[0]
    data_keys = index.wrapped_keys()
    if new != present:
        wrapped_by_owner = {
            key.owner: wrap(new, key.owner, data_key)
            for key in data_keys
            if (data_key := unwrap(present, key.owner, key.id, key.wrapped)) is not None
        }
        with index.transaction():
            index.set_keys(deployment_name(new), wrapped_by_owner)
    if index.must_purge:
        index.purge()
    if len(keys) > 1:
        write_deployment_keys(key_path, (new,))
    return new, len(data_keys)
