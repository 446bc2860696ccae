"""`saltern audit-log`: whether the log of what operators have changed is still what was written."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from saltern.cli.output import EXIT_FAILED, complain
from saltern.paths import default_state_folder

if TYPE_CHECKING:
    from saltern.cli.output import Commands


def add_commands(commands: "Commands") -> None:
    """Add the command's parser."""
    log = commands.add_parser("audit-log", help="verify what is written of operators' changes")
    verbs = log.add_subparsers(dest="verb", required=True, metavar="VERB")
    verify = verbs.add_parser("verify", help="check every line, and that a receipt's line is still there")
    verify.add_argument("--receipt", type=Path, metavar="FILE", help="what `saltern erase --json` has printed")
    verify.add_argument("--log", type=Path, metavar="FILE", help="default: audit.log in the state folder")
    verify.add_argument("--public-key", type=Path, metavar="FILE", help="default: receipt.pub beside the log")
    verify.set_defaults(run=_verify)


def _verify(options: argparse.Namespace) -> int:
    from saltern.audit import LOG_NAME, PUBLIC_KEY_NAME, AuditError, parse_receipt, read_public_key, verify_log

    try:
        path = options.log.expanduser() if options.log else default_state_folder() / LOG_NAME
        key = read_public_key(options.public_key or path.with_name(PUBLIC_KEY_NAME))
        receipt = parse_receipt(options.receipt.read_bytes()) if options.receipt else None
        verified = verify_log(path, key, receipt)
    except OSError as error:
        return complain(f"{error.filename}: {error.strerror}", EXIT_FAILED)
    except (AuditError, RuntimeError) as error:  # RuntimeError: nobody's home
        return complain(str(error), EXIT_FAILED)
    print(f"{path}: {verified.lines} lines, each as it was written; the last has hash {verified.head}")
    if receipt is not None:
        print(f"the receipt is of line {receipt.serial}: {receipt.what}, {receipt.time}", flush=True)
    return 0
