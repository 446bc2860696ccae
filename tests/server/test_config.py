"""What holds for the settings file: whatever is wrong in it is named with its place."""

import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saltern.core.tenants import Limits
from saltern.paths import default_socket_path
from saltern.secret import make_secret
from saltern.server.config import Config, ConfigError, DiskSettings, ServerSettings, load_config, naming_secret
from saltern.server.tenancy import Layers
from saltern.sizes import format_duration, format_size, parse_duration, parse_size


def load(folder: Path, text: str, **overrides: str) -> object:
    path = folder / "saltern.toml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, **overrides)


def test_everything_may_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    config = load_config(None)
    assert config.server.socket_path == Path("/run/user/7/saltern/saltern.sock")
    assert config.arena.size == 4 * 1024**3
    assert config.server.admin_socket_path == Path("/run/user/7/saltern/admin.sock")
    assert not config.tenants
    assert not config.plans
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert default_socket_path() == Path(f"/tmp/saltern-{os.getuid()}/saltern.sock")


def test_every_setting_that_the_file_may_have_is_read(tmp_path: Path) -> None:
    path = tmp_path / "saltern.toml"
    path.write_text(
        """
        [server]
        socket = "/run/s.sock"
        socket_mode = 0o660
        allowed_uids = [0, 1000]
        connections_max = 7
        secret_file = "key"
        state_folder = "/state"
        signing_file = "/signing"
        epochs_file = "/epochs"
        admin_socket = "/run/a.sock"
        [arena]
        size = "2 GiB"
        page_size = 131072
        prefault = false
        huge_pages = false
        [disk]
        path = "/disk"
        size = "3 GiB"
        key_file = "/key"
        [tenants.default]
        limit = "1.5 GiB"
        user_limit = "200 MB"
        [tenants."a.cme"]
        plan = "gold"
        guarantee = 131072
        limit = "none"
        [plans.gold]
        guarantee = "1 GiB"
        limit = "2 GiB"
        ttl = "7 days"
        weight = 2
        [log]
        level = "warning"
        format = "json"
        """,
        encoding="utf-8",
    )
    config = load_config(path)
    assert config.server == ServerSettings(
        socket="/run/s.sock",
        socket_mode=0o660,
        allowed_uids=(0, 1000),
        connections_max=7,
        secret_file="key",
        state_folder="/state",
        signing_file="/signing",
        epochs_file="/epochs",
        admin_socket="/run/a.sock",
    )
    assert config.server.store_path == Path("/state/saltern.db")
    assert config.server.signing_path == Path("/signing")
    assert (config.arena.size, config.arena.page_size) == (2 * 1024**3, 131072)
    assert not config.arena.prefault
    assert not config.arena.huge_pages
    assert config.disk == DiskSettings(path="/disk", size=3 * 1024**3, key_file="/key")
    assert Layers(config.tenants, config.plans).limits_by_tenant() == {
        "default": Limits(limit_bytes=3 * 1024**3 // 2, user_limit_bytes=200_000_000),
        "a.cme": Limits(guarantee_bytes=131072, limit_bytes=None, ttl_seconds=7 * 86_400, weight=2.0),
    }
    assert (config.log.level, config.log.format) == ("warning", "json")


def test_the_command_line_stands_above_the_file(tmp_path: Path) -> None:
    path = tmp_path / "saltern.toml"
    path.write_text('[server]\nsocket = "/a"\n[arena]\nsize = "1 GiB"\nprefault = false', encoding="utf-8")
    config = load_config(path, socket="/b", arena="2 GiB")
    assert config.server.socket == "/b"
    assert config.arena.size == 2 * 1024**3
    assert not config.arena.prefault


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[arena]\nsize = 5000\npage_sise = 4096", ":3: unknown setting page_sise in [arena]; did you mean page_size?"),
        ("[arenas]\nsize = '1 GiB'", ":1: unknown setting arenas at the top; did you mean arena?"),
        ("[log]\n\nqqq = 1", ":3: unknown setting qqq in [log]; known are level, format"),
        ("arena.sise = 1", ":1: unknown setting sise in [arena]; did you mean size?"),
        ("[tenants.acme]\nlimit = 5", "tenants.acme.limit: 5 B is less than one page of the arena"),
        ("[tenants.Acme]\nlimit = 0", ":1: tenants: 'Acme' is no name: 1 to 40 of a-z, 0-9, dot, dash and"),
        ("[tenants]\nacme = 0", ":2: tenants.acme: expected `object`, got `int`"),
        ("[tenants.acme]\nplan = 'gold'", "tenants.acme.plan: nobody has defined the plan gold; there is none"),
        ("[plans.tin]\n[tenants.acme]\nplan = 'gold'", "nobody has defined the plan gold; known are tin"),
        ("[plans.none]", "plans.none: no plan can be called none"),
        ("[plans.gold]\nplan = 'gold'", ":2: unknown setting plan in [plans.gold]; known are guarantee, limit,"),
        ("[plans.gold]\nguarantee = 1", "plans.gold.guarantee: 1 B is less than one page of the arena"),
        ("[plans.gold]\nguarantee = 'none'", ":2: plans.gold.guarantee: 'none' is not a size"),
        ("[plans.gold]\ndisk_limit = 1", "plans.gold.disk_limit: 1 B is less than one page of the disk tier"),
        ("[disk]\nsize = 16", "disk.size: 16 B is less than one page; 0 turns the disk tier off"),
        ("[disk]\nfolder = '/d'", ":2: unknown setting folder in [disk]"),
        ("[plans.gold]\nguarantee = -1", ":2: plans.gold.guarantee: expected `int` >= 0"),
        ("[plans.gold]\nttl = 'a week'", ":2: plans.gold.ttl: 'a week' is not a duration: write a number and a unit"),
        ("[plans.gold]\nttl = 0", ":2: plans.gold.ttl: expected `float` > 0.0"),
        ("[plans.gold]\nttl = nan", ":2: plans.gold.ttl: expected `float`"),
        ("[plans.gold]\nweight = inf", ":2: plans.gold.weight: expected `float` <= 1000000.0"),
        ("[tenants.default]\nuserlimit = 5", ":2: unknown setting userlimit in [tenants.default]; did you"),
        ("[arena]\nsize = '64 GiBB'", ":2: arena.size: '64 GiBB' is not a size: write a number and a unit, such as"),
        ("[arena]\nsize = true", ":2: arena.size: expected `int`, got `bool`"),
        ("[arena]\nprefault = 'yes'", ":2: arena.prefault: expected `bool`, got `str`"),
        ("[server]\n# more\nconnections_max = 0", ":3: server.connections_max: expected `int` >= 1"),
        ("[server]\nallowed_uids = [1, 'x']", ":2: server.allowed_uids: expected `int`, got `str`"),
        ("[log]\nlevel = 'loud'", ":2: log.level: invalid enum value 'loud'"),
        ("arena = 5", ":1: arena: expected `object`, got `int`"),
        ("[arena\n", "at line 1"),
        ("[arena]\npage_size = 5000", "arena.page_size: 5000 is not a power of two from 4 KiB up"),
        ("[arena]\nsize = 5000", "arena.size: 4.9 KiB is less than one page"),
        ("[tenants.default]\nuser_limit = 7", "tenants.default.user_limit: 7 B is less than one page of the arena"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_its_place(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(tmp_path, text)
    assert str(error.value).startswith(str(tmp_path / "saltern.toml"))
    assert complaint in str(error.value)


def test_a_missing_file_and_a_wrong_argument_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.toml: No such file"):
        load_config(tmp_path / "nowhere.toml")
    with pytest.raises(ConfigError, match="--arena: 'much' is not a size"):
        load_config(None, arena="much")


@given(st.text(max_size=12), st.text(max_size=12))
def test_no_file_breaks_the_reader(tmp_path_factory: pytest.TempPathFactory, name: str, value: str) -> None:
    path = tmp_path_factory.getbasetemp() / "any.toml"
    for text in (f"{name} = {value}", f"[arena]\n{name} = '{value}'", f"[{name}]\nx = 1"):
        path.write_text(text, encoding="utf-8")
        try:
            load_config(path)
        except ConfigError as error:
            assert str(error).startswith(str(path))  # noqa: PT017 - either outcome is right


@given(st.integers(1, 2**50))
def test_a_size_is_read_as_it_is_written(size: int) -> None:
    assert parse_size(str(size)) == size
    assert abs(parse_size(format_size(size)) - size) <= 0.05 * 1024 ** (len(bin(size)) // 10) + size * 0.001


@pytest.mark.parametrize(
    ("text", "size"),
    [("64 GiB", 64 * 1024**3), ("1.5kib", 1536), ("2MB", 2_000_000), ("1 TiB", 1024**4), (" 7 ", 7), ("3 B", 3)],
)
def test_sizes_have_decimal_and_binary_units(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("7 days", 604_800), ("7d", 604_800), ("1.5h", 5400), ("90 s", 90), ("2 Weeks", 1_209_600), ("0.5", 0.5)],
)
def test_durations_have_units(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds
    assert parse_duration(format_duration(seconds)) == seconds


@pytest.mark.parametrize("text", ["", "d", "-1 d", "7 days ago", "1e9", "7 fortnights", "1 " * 40])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="write a number and a unit, such as 7 days"):
        parse_duration(text)


def test_a_naming_secret_is_made_once_and_for_its_owner_alone(tmp_path: Path) -> None:
    settings = ServerSettings(secret_file=str(tmp_path / "naming.key"))
    secret = naming_secret(settings)
    assert len(secret) == 32
    assert naming_secret(settings) == secret
    assert stat.S_IMODE((tmp_path / "naming.key").stat().st_mode) == 0o600
    (tmp_path / "naming.key").chmod(0o640)
    with pytest.raises(ConfigError, match=r"others may read .*: chmod 600 it"):
        naming_secret(settings)
    (tmp_path / "naming.key").chmod(0o600)
    (tmp_path / "naming.key").write_bytes(b"short")
    with pytest.raises(ConfigError, match="holds 5 bytes, a secret has 32"):
        naming_secret(settings)


def test_what_must_outlive_the_server_is_in_one_folder_unless_it_is_named(tmp_path: Path) -> None:
    config = Config(server=ServerSettings(state_folder=str(tmp_path)))
    assert config.server.naming_path == tmp_path / "naming.key"
    assert config.server.epochs_path == tmp_path / "epochs.json"
    assert config.disk_path == tmp_path / "disk"
    assert config.deployment_key_path == tmp_path / "deployment.key"
    assert config.disk.size == 16 * 1024**3
    assert naming_secret(config.server) == naming_secret(config.server) == (tmp_path / "naming.key").read_bytes()
    named = Config(disk=DiskSettings(path="/d", key_file="/k"))
    assert (named.disk_path, named.deployment_key_path) == (Path("/d"), Path("/k"))


def test_a_secret_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ServerSettings(secret_file=str(tmp_path / "naming.key"))

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", die)
        with pytest.raises(KeyboardInterrupt):
            naming_secret(settings)
    assert not list(tmp_path.iterdir()), "nothing half made is left"
    assert len(naming_secret(settings)) == 32


def test_of_two_that_make_a_secret_both_have_the_first(tmp_path: Path) -> None:
    path = tmp_path / "naming.key"
    first = make_secret(path)
    assert make_secret(path) == first


def test_a_list_of_nobody_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "saltern.toml"
    config.write_text("[server]\nallowed_uids = []\n")
    with pytest.raises(ConfigError, match="nobody could connect"):
        load_config(config)


def test_a_home_of_nobody_is_an_error_of_the_setting() -> None:
    with pytest.raises(ConfigError, match=r"server\.secret_file: ~nobody-of-that-name/key"):
        naming_secret(ServerSettings(secret_file="~nobody-of-that-name/key"))
