"""Files, variables and flags: precedence, errors, and the output of --print-config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pilotfish.engine.config import EngineConfig
from pilotfish.errors import ConfigError
from pilotfish.server.cli import main as cli
from pilotfish.server.cli.settings import Setting, settings_of
from pilotfish.server.cli.sources import CONFIGS, PREFIX, ServeSettings, as_yaml, read
from pilotfish.server.config import ServerConfig
from pilotfish.server.keys import KeyRing

SETTINGS = {setting.name: setting for config in CONFIGS for setting in settings_of(config)}


def value_of(settings: ServeSettings, name: str) -> Any:
    return getattr(settings.engine if hasattr(settings.engine, name) else settings.server, name)


def other_values(setting: Setting) -> tuple[Any, Any, Any]:
    """Three values that are not its default, as far as there are so many, and differ one from the next."""
    match setting.type:
        case msgspec.inspect.BoolType():
            return (not setting.default, setting.default, not setting.default)
        case msgspec.inspect.LiteralType(values=values):
            rest = [value for value in values if value != setting.default]
            return (rest[0], values[-1] if len(rest) < 2 else rest[1], rest[0])
        case msgspec.inspect.VarTupleType():
            return (["a", "b"], ["c"], ["d"])
        case msgspec.inspect.FloatType():
            return (0.25, 0.5, 0.75)
        case msgspec.inspect.IntType():
            return (4097, 4098, 4099)
    return ("a", "b", "c")


def load(tmp_path: Path, file: dict[str, Any], variables: dict[str, Any], flags: dict[str, Any]) -> ServeSettings:
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump(file))
    environment = {
        f"{PREFIX}{name.upper()}": ",".join(value) if isinstance(value, list) else str(value)
        for name, value in variables.items()
    }
    return read({"config": str(path)} | flags, environment)


UNCHECKED = [name for name in SETTINGS if name not in ("api_key", "api_key_file", "max_batch_tokens", "max_num_seqs")]
"""But for those whose values have to fit each other, or a file."""


@pytest.mark.parametrize("name", UNCHECKED)
def test_a_flag_wins_over_a_variable_and_that_over_the_file(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    for config in CONFIGS:
        monkeypatch.setattr(config, "check", lambda self: self)
    first, second, third = other_values(SETTINGS[name])

    def got(*sources: dict[str, Any]) -> Any:
        value = value_of(load(tmp_path, *sources), name)
        return list(value) if isinstance(value, tuple) else value

    assert got({name: first}, {}, {}) == first
    assert got({name: first}, {name: second}, {}) == second
    assert got({name: first}, {name: second}, {name: third}) == third
    assert got({}, {name: second}, {name: third}) == third
    assert got({}, {name: first}, {}) == first


def test_variables_are_read_as_flags_are() -> None:
    variables = {"MAX_NUM_SEQS": "64", "KV_CACHE_MEMORY": "512MiB", "PREFIX_CACHING": "off", "DRAIN_TIMEOUT": "1.5"}
    variables |= {"SERVED_MODEL_NAME": "a, b", "HOST": "", "CACHE": "/somewhere", "NO_SUCH": " "}
    got = read({}, {f"{PREFIX}{name}": value for name, value in variables.items()} | {"PATH": "x"})
    assert (got.engine.max_num_seqs, got.engine.kv_cache_memory, got.engine.prefix_caching) == (64, 2**29, False)
    assert (got.server.served_model_name, got.server.drain_timeout) == (("a", "b"), 1.5)
    assert got.server.host == ServerConfig().host
    assert got.origins["max_num_seqs"] == "PILOTFISH_MAX_NUM_SEQS"


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("MAX_NUM_SEQ", "4", "PILOTFISH_MAX_NUM_SEQ, which is not a setting: did you mean PILOTFISH_MAX_NUM_SEQS?"),
        ("API_KEYS", "4", "did you mean PILOTFISH_API_KEY?"),
        ("XYZZY", "4", "PILOTFISH_XYZZY, which is not a setting"),
        ("MAX_NUM_SEQS", "many", "PILOTFISH_MAX_NUM_SEQS: max_num_seqs is 'many': expected `int`"),
        ("PREFIX_CACHING", "perhaps", "PILOTFISH_PREFIX_CACHING: prefix_caching is 'perhaps': expected `bool`"),
        ("KV_CACHE_MEMORY", "lots", "PILOTFISH_KV_CACHE_MEMORY: 'lots' is not a size"),
        ("PORT", "99999", "PILOTFISH_PORT: port is 99999: expected `int` <= 65535"),
        ("LOG_FORMAT", "xml", "PILOTFISH_LOG_FORMAT: log_format is 'xml'"),
    ],
)
def test_errors_of_a_variable_are_explained(variable: str, value: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        read({}, {f"{PREFIX}{variable}": value})
    assert message in str(error.value)


def test_kubernetes_service_variables_are_ignored() -> None:
    links = {
        "PILOTFISH_SERVICE_HOST": "10.0.0.1",
        "PILOTFISH_SERVICE_PORT": "8000",
        "PILOTFISH_SERVICE_PORT_HTTP": "8000",
        "PILOTFISH_PORT": "tcp://10.0.0.1:8000",
        "PILOTFISH_PORT_8000_TCP": "tcp://10.0.0.1:8000",
        "PILOTFISH_PORT_8000_TCP_PROTO": "tcp",
        "PILOTFISH_PORT_8000_TCP_PORT": "8000",
        "PILOTFISH_PORT_8000_TCP_ADDR": "10.0.0.1",
    }
    assert read({}, links) == read({}, {})
    assert read({}, links | {"PILOTFISH_PORT": "9000"}).server.port == 9000


def test_a_wrong_value_in_a_file_is_named_with_the_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"settings\.yaml: block_size is 'large': expected `int`"):
        load(tmp_path, {"block_size": "large"}, {}, {"block_size": 32})


def test_the_file_may_be_named_by_a_variable(tmp_path: Path) -> None:
    path = tmp_path / "other.yaml"
    path.write_text("port: 9001\n")
    assert read({}, {"PILOTFISH_CONFIG": str(path)}).server.port == 9001


def test_keys_come_from_a_file(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("first\n\n  second \n")
    got = read({"api_key": ["flag"]}, {"PILOTFISH_API_KEY_FILE": str(keys), "PILOTFISH_API_KEY": "variable"})
    assert [key.key for key in KeyRing(got.server.api_key, got.server.api_key_file).keys] == [
        "flag",
        "variable",
        "first",
        "second",
    ]
    keys.write_text("\n \n")
    with pytest.raises(ConfigError, match="has no keys"):
        read({"api_key_file": str(keys)}, {})
    with pytest.raises(ConfigError, match="cannot read the keys in api_key_file"):
        read({"api_key_file": str(tmp_path / "nowhere")}, {})


def test_print_config_says_where_values_come_from_and_hides_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("port: 9000\nmax_queue: 5\nprefix-caching: true\n")
    monkeypatch.setenv("PILOTFISH_API_KEY", "sesame")
    monkeypatch.setenv("PILOTFISH_MAX_NUM_SEQS", "64")
    flags = ["--config", str(path), "--port", "9001", "--no-prefix-caching", "--api-key", "hush"]
    flags += ["--otlp-endpoint", "http://me:secret@collector:4318"]
    assert cli.main(["serve", "--print-config", *flags]) == 0
    printed = capsys.readouterr().out
    for line in (
        "port: 9001  # --port",
        f"max_queue: 5  # {path}",
        "max_num_seqs: 64  # PILOTFISH_MAX_NUM_SEQS",
        "prefix_caching: false  # --no-prefix-caching",
        "# api_key: 2 of them, not shown (--api-key, PILOTFISH_API_KEY)",
        "# otlp_endpoint: set, not shown (--otlp-endpoint)",
        "block_size: 0",
    ):
        assert line in printed.splitlines()
    assert not [secret for secret in ("sesame", "hush", "secret@") if secret in printed]


@st.composite
def values(draw: st.DrawFn) -> dict[str, Any]:
    """Values of some settings, as a file may have them."""
    drawn: dict[str, Any] = {}
    for name in draw(st.sets(st.sampled_from(UNCHECKED))):
        setting = SETTINGS[name]
        match setting.type:
            case msgspec.inspect.BoolType():
                drawn[name] = draw(st.booleans())
            case msgspec.inspect.LiteralType(values=choices):
                drawn[name] = draw(st.sampled_from(choices))
            case msgspec.inspect.VarTupleType():
                drawn[name] = draw(st.lists(st.text(min_size=1, max_size=9), max_size=3))
            case msgspec.inspect.FloatType():
                drawn[name] = draw(st.floats(0.001, 1))
            case msgspec.inspect.IntType():
                drawn[name] = draw(st.integers(16, 9000))
            case _:
                drawn[name] = draw(st.text(max_size=30))
    return drawn


@settings(max_examples=60)
@given(given_values=values())
@example(given_values={"model": "\x85"})  # what YAML, but few others, takes for the end of a line
@example(given_values={"model": "a\u2028b\nc"})
@example(given_values={"otlp_endpoint": "http://[::1"})  # not a valid URL
def test_what_is_printed_can_be_read_again(given_values: dict[str, Any]) -> None:
    made = ServeSettings(
        msgspec.convert({k: v for k, v in given_values.items() if k in EngineConfig.__struct_fields__}, EngineConfig),
        msgspec.convert({k: v for k, v in given_values.items() if k in ServerConfig.__struct_fields__}, ServerConfig),
        dict.fromkeys(given_values, "a test"),
    )
    content = yaml.safe_load(as_yaml(made))
    assert msgspec.convert({k: content[k] for k in EngineConfig.__struct_fields__}, EngineConfig) == made.engine
    known = {k: content[k] for k in ServerConfig.__struct_fields__ if k in content}
    assert msgspec.convert(known, ServerConfig) == made.server
