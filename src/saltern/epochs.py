"""Epochs: how often a user began anew, which a signed salt says, and from which the user's keys derive.

Who is erased gets the next epoch: another id in the cache, and another salt for vLLM's own prefix cache, so that
nothing from before is found by either. A user's epoch is the sum of the tenant's and the user's own; both only grow.

The file is JSON, of mode 0600, and only ever replaced as a whole. Users stand in it by the tag that is in salts:

    {"tenants": {"acme": {"epoch": 1, "users": {"4rW7…": 2}}}}
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from saltern.secret import read_private, write_private
from saltern.signing import EPOCH_MAX

Epoch = Annotated[int, Meta(ge=0, le=EPOCH_MAX)]


class TenantEpochs(Struct, frozen=True, forbid_unknown_fields=True):
    """How often a tenant began anew as a whole, and its users by themselves."""

    epoch: Epoch = 0
    users: dict[str, Epoch] = {}


class Epochs(Struct, frozen=True, forbid_unknown_fields=True):
    """All who began anew at least once."""

    tenants: dict[str, TenantEpochs] = {}

    def of(self, tenant: str, user_tag: str) -> int:
        """Return a user's epoch."""
        found = self.tenants.get(tenant)
        return found.epoch + found.users.get(user_tag, 0) if found is not None else 0


def read_epochs(path: Path) -> Epochs:
    """Return what a file says. Raises OSError, or ValueError with a text for a person."""
    content = read_private(path)
    try:
        return _decoder.decode(content)
    except ValueError as error:  # msgspec's are
        raise ValueError(f"{path}: {error}") from None


def make_epochs(path: Path) -> Epochs:
    """Make a file where there is none; of two who try, both get the first's."""
    with suppress(FileExistsError):
        write_private(path, _encoded(Epochs()), replace=False)
    return read_epochs(path)


def begin_anew(path: Path, tenant: str, user_tag: str | None) -> Epochs:
    """Give a user the next epoch, or with None all users of a tenant, durably, and return what the file now says.

    Raises OSError, or ValueError with a text for a person.
    """
    with _locked(path.parent):
        epochs = read_epochs(path)
        before = epochs.tenants.get(tenant, TenantEpochs())
        if user_tag is None:
            after = msgspec.structs.replace(before, epoch=before.epoch + 1)
        else:
            after = msgspec.structs.replace(before, users={**before.users, user_tag: before.users.get(user_tag, 0) + 1})
        if after.epoch + max(after.users.values(), default=0) > EPOCH_MAX:
            raise ValueError(f"{path}: {tenant} has begun anew too often: a salt has no room for more than {EPOCH_MAX}")
        changed = Epochs({**epochs.tenants, tenant: after})
        write_private(path, _encoded(changed))
        return changed


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let one change the file at a time. The lock is on its folder, since the file itself is replaced."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _encoded(epochs: Epochs) -> bytes:
    return msgspec.json.format(msgspec.json.encode(epochs), indent=2) + b"\n"


_decoder = msgspec.json.Decoder(Epochs)
