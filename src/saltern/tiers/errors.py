"""The error of a tier that can't be used."""


class DiskError(Exception):
    """The disk tier can't do what it was asked. The text says why, and what to do."""


class DiskInUseError(DiskError):
    """A server or a check holds the data folder."""


class DiskDamagedError(DiskError):
    """The index can't be read."""
