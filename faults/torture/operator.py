"""The operator of the tortured server: what is asked of its admin socket, and what was promised in return."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from demo.server import ServerError
from faults.torture.ledger import Ledger
from faults.torture.population import User
from faults.torture.server import TorturedServer
from saltern.audit import LOG_NAME, PUBLIC_KEY_NAME, Line, parse_receipt, read_public_key, verify_log
from saltern.client.admin import operate
from saltern.client.sockets import ConnectionLost
from saltern.epochs import read_epochs
from saltern.operations import Answer, Erase, Failed, Operation, RotateKey, SetTenant, TenantSettings, UserErased
from saltern.tiers.datakeys import KeyId

COMMAND_EVERY = 10
"""So often an erasure is the command's own, a process that does what others do here at once."""


class Erasure(NamedTuple):
    """An erasure that has a receipt: which keys it destroyed, and which generation of each user begins with it."""

    key_ids: list[KeyId]
    generations: dict[User, int]


class OperatorError(Exception):
    """The server refused what it should have done."""


class Operator:
    """Asks one thing at a time. A server that is killed meanwhile has promised nothing."""

    def __init__(self, server: TorturedServer, ledger: Ledger) -> None:
        self._server, self._ledger = server, ledger
        self.receipts: list[Line] = []
        self.cut_short = self.rotations = self._asked = 0

    def erase(self, tenant: str, user: User | None, users: Sequence[User]) -> Erasure | None:
        """Erase a user, or with None the tenant, whose `users` these are; None if the server was lost."""
        generations = {each: self._ledger.begin_erasing(each) for each in users}
        self._asked += 1
        text = self._erase_by_command(tenant, user) if self._asked % COMMAND_EVERY == 0 else self._erase(tenant, user)
        if text is None:
            self.cut_short += 1
            return None
        receipt = parse_receipt(text.encode())
        self.receipts.append(receipt)
        epochs = read_epochs(self._server.epochs_path)
        keys = receipt.details["keys"]
        assert isinstance(keys, list), "a receipt names the keys that it is of"
        return Erasure(
            [KeyId(bytes.fromhex(key)) for key in keys],
            {
                each: epochs.of(each.tenant, each.tag) if each.is_signed else generation
                for each, generation in generations.items()
            },
        )

    def rotate(self) -> None:
        """Have the deployment key replaced."""
        if self._ask(RotateKey()) is not None:
            self.rotations += 1

    def limit(self, tenant: str, disk_limit: int) -> None:
        """Change what a tenant may have on the disk."""
        self._ask(SetTenant(tenant, TenantSettings(disk_limit=disk_limit)))

    def verify_receipts(self) -> int:
        """Check the audit log against every receipt, and return how many lines it has. Raises `AuditError`."""
        state = self._server.state_path
        key = read_public_key(state / PUBLIC_KEY_NAME)
        for receipt in self.receipts:
            verify_log(state / LOG_NAME, key, receipt)
        return verify_log(state / LOG_NAME, key).lines

    def _erase(self, tenant: str, user: User | None) -> str | None:
        if user is None:
            erase = Erase(tenant)
        elif user.is_signed:
            erase = Erase(tenant, user_name=user.name)
        else:
            erase = Erase(tenant, salt=user.name)
        answer = self._ask(erase)
        assert answer is None or isinstance(answer, UserErased), f"an erasure was answered by {answer}"
        return None if answer is None else answer.receipt

    def _erase_by_command(self, tenant: str, user: User | None) -> str | None:
        if user is None:
            whom: tuple[str, ...] = ()
        elif user.is_signed:
            whom = ("--user", user.name)
        else:
            whom = ("--user-id", user.identity(self._server.naming_secret, 0).id.hex())
        socket = str(self._server.admin_socket_path)
        try:
            return self._server.command_line("erase", "--tenant", tenant, *whom, "--json", "--socket", socket)
        except ServerError:
            if self._server.has_ended():
                return None
            raise

    def _ask(self, operation: Operation) -> Answer | None:
        try:
            answer = operate(str(self._server.admin_socket_path), operation)
        except ConnectionLost:
            if self._server.has_ended():
                return None
            raise
        if isinstance(answer, Failed):
            raise OperatorError(f"{type(operation).__name__}: {answer.reason}")
        return answer
