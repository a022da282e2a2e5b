"""Settings: one name everywhere, precedence, ranges, and errors that say what to change."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from worker_orcd.cli.settings import PREFIX, Settings, about, allowed, load_config
from worker_orcd.config import (
    CallbackConfig,
    DeviceConfig,
    EngineConfig,
    ServerConfig,
    WatchConfig,
    WorkerConfig,
)
from worker_orcd.errors import InvalidConfiguration

SECTIONS = {
    "model": WorkerConfig,
    "device": DeviceConfig,
    "engine": EngineConfig,
    "server": ServerConfig,
    "callback": CallbackConfig,
    "watch": WatchConfig,
}


def toml(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "worker.toml"
    file.write_text(text)
    return file


def refusal(given: dict[str, Any], **options: Any) -> str:
    with pytest.raises(InvalidConfiguration) as caught:
        load_config(given, **options)
    return str(caught.value)


def test_every_field_of_the_configuration_has_exactly_one_setting() -> None:
    targets = [(about(info)["section"], about(info)["field"]) for info in Settings.model_fields.values()]
    fields = [
        (section, field.name)
        for section, kind in SECTIONS.items()
        for field in dataclasses.fields(kind)
        if not (section == "model" and field.name in ("device", "engine", "server", "callback", "watch"))
    ]
    assert sorted(targets) == sorted(fields)


def test_defaults_are_those_of_the_configuration() -> None:
    config, warnings = load_config({"model": "demo"})
    assert config == WorkerConfig(model="demo")
    assert warnings == []


def test_command_line_over_environment_over_file_over_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = toml(tmp_path, 'model = "from-file"\nport = 1001\nmax_num_seqs = 3\nblock_size = 32\n')
    monkeypatch.setenv(PREFIX + "PORT", "1002")
    monkeypatch.setenv(PREFIX + "MAX_NUM_SEQS", "4")
    config, _ = load_config({"port": "1003"}, config_file=file)
    assert config.model == "from-file"
    assert config.server.port == 1003
    assert config.engine.max_num_seqs == 4
    assert config.engine.block_size == 32
    assert config.engine.max_num_batched_tokens == EngineConfig().max_num_batched_tokens


def test_the_file_may_be_named_in_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PREFIX + "CONFIG", str(toml(tmp_path, 'model = "m.gguf"')))
    config, warnings = load_config({})
    assert (config.model, warnings) == ("m.gguf", [])


def test_names_are_those_of_the_contract() -> None:
    wanted = {"gpu_device": "1", "vram_fraction": "0.5", "kv_cache_size_mb": "64", "max_model_len": "128"}
    config, _ = load_config({"model": "demo", **wanted})
    device = config.device
    assert (device.gpu_index, device.memory_fraction, device.kv_cache_size_mb) == (1, 0.5, 64)
    assert config.engine.max_model_len == 128


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("port", "65536", "an integer from 0 to 65535"),
        ("port", "-1", "an integer from 0 to 65535"),
        ("port", "eighty", "an integer from 0 to 65535"),
        ("port", "80.5", "an integer from 0 to 65535"),
        ("port", "", "an integer from 0 to 65535"),
        ("vram_fraction", "0", "a number above 0.0, at most 1.0"),
        ("vram_fraction", "1.01", "a number above 0.0, at most 1.0"),
        ("vram_fraction", "nan", "a number above 0.0, at most 1.0"),
        ("keep_alive_seconds", "inf", "a number from 0.1 to 3600.0"),
        ("max_num_seqs", "0", "an integer from 1 to 4096"),
        ("max_num_seqs", "99999999999999999999", "an integer from 1 to 4096"),
        ("device", "gpu", "one of auto, cpu, cuda"),
        ("cpu_activations", "INT8", "one of int8, int16, float32"),
        ("enable_prefix_caching", "maybe", "true or false"),
        ("model", "", "a non-empty text"),
        ("model_sha256", "abc", "64 hexadecimal digits"),
        ("worker_id", "a b", "1 to 64 of A-Z a-z 0-9 . _ -"),
        ("callback_url", "ftp://x", "an http:// or https:// URL"),
        ("host", "127.0.0.1\n", "an IP address or host name"),
    ],
)
@pytest.mark.parametrize("source", ["command line", "environment", "file"])
def test_what_is_out_of_range_is_named_with_its_source(
    name: str, value: str, expected: str, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {} if name == "model" else {"model": "demo"}
    file = None
    if source == "command line":
        given[name] = value
        shown = "--" + name.replace("_", "-")
    elif source == "environment":
        shown = PREFIX + name.upper()
        monkeypatch.setenv(shown, value)
    else:
        file = tmp_path / "w.toml"
        escaped = value.replace("\n", "\\n")
        file.write_text(f'{name} = "{escaped}"\n')
        shown = "the --config file"
    message = refusal(given, config_file=file)
    assert message == f"{name} (from {shown}): found {value!r}; expected {expected}"


@pytest.mark.parametrize("line", ["port = true", "vram_fraction = false", "port = [1]", "port = {a = 1}"])
def test_a_toml_value_of_another_kind_is_refused(tmp_path: Path, line: str) -> None:
    name = line.split()[0]
    message = refusal({"model": "demo"}, config_file=toml(tmp_path, line))
    assert message.startswith(f"{name} (from the --config file): found ")


def test_every_setting_says_what_is_allowed_and_what_it_is() -> None:
    for name, info in Settings.model_fields.items():
        assert allowed(info), name
        assert info.description, name


def test_a_missing_model_says_all_three_ways_to_give_it() -> None:
    message = refusal({})
    assert "--model" in message
    assert "WORKER_ORCD_MODEL" in message


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("prot = 1", "unknown setting 'prot'; did you mean port?"),
        ("zzz = 1", "unknown setting 'zzz'"),
        ("[server]\nport = 1", "unknown setting 'server'"),
        ("port = ", "not valid TOML"),
        ('api_key_file = "x"', "unknown setting 'api_key_file'"),
    ],
)
def test_a_file_with_mistakes_is_refused(tmp_path: Path, text: str, why: str) -> None:
    assert why in refusal({"model": "demo"}, config_file=toml(tmp_path, text))


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert "No such file" in refusal({"model": "demo"}, config_file=tmp_path / "none.toml")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    assert "not valid TOML" in refusal({"model": "demo"}, config_file=tmp_path / "binary")


def test_unknown_variables_are_warned_about_with_a_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PREFIX + "MAX_NUM_SEQ", "3")
    config, [warning] = load_config({"model": "demo"})
    assert f"{PREFIX}MAX_NUM_SEQ is not a setting" in warning
    assert f"did you mean {PREFIX}MAX_NUM_SEQS?" in warning
    assert config.engine == EngineConfig()


# -- trust -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "worker.example", "fd00::1"])
def test_listening_beyond_this_machine_needs_a_key(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"model": "demo", "host": host}
    message = refusal(given)
    assert repr(host) in message
    assert "--insecure" in message
    assert load_config(given, insecure=True)[0].server.host == host
    monkeypatch.setenv(PREFIX + "API_KEY", "secret")
    assert load_config(given)[0].server.api_key == "secret"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_listening_on_this_machine_needs_none(host: str) -> None:
    assert load_config({"model": "demo", "host": host})[0].server.host == host


def test_a_key_comes_from_a_file_without_its_newline(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("s3cret\n")
    config, _ = load_config({"model": "demo"}, key_files={"api_key": file})
    assert config.server.api_key == "s3cret"
    assert "s3cret" not in repr(config)


@pytest.mark.parametrize("key", ["", "with space", "ümlaut", "x" * 513])
@pytest.mark.parametrize("source", ["environment", "file", "toml"])
@pytest.mark.parametrize("name", ["api_key", "admin_key"])
def test_a_bad_key_is_refused_and_never_repeated(
    name: str, key: str, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {}
    if source == "environment":
        monkeypatch.setenv(PREFIX + name.upper(), key)
    elif source == "file":
        file = tmp_path / "key"
        file.write_text(key)
        options["key_files"] = {name: file}
    else:
        options["config_file"] = toml(tmp_path, f'{name} = "{key}"')
    message = refusal({"model": "demo"}, **options)
    assert message.startswith(f"{name} (from ")
    assert not key or key not in message


@pytest.mark.parametrize("count", [1, 2, 63, 64, 65])
def test_keys_of_several_clients_are_lines(count: int, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("\r\n\n".join(f" key{k} " for k in range(count)) + "\n")
    if count > 64:
        assert refusal({"model": "demo"}, key_files={"api_key": file}).startswith(
            "api_key (from --api-key-file)"
        )
        return
    config, _ = load_config({"model": "demo"}, key_files={"api_key": file})
    assert config.server.api_key == "\n".join(f"key{k}" for k in range(count))


def test_there_is_one_admin_and_no_client_is_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text("a\nb\n")
    assert refusal({"model": "demo"}, key_files={"admin_key": file}).startswith("admin_key (from ")
    monkeypatch.setenv(PREFIX + "ADMIN_KEY", "b")
    assert "admin_key is one of api_key" in refusal({"model": "demo"}, key_files={"api_key": file})
    monkeypatch.setenv(PREFIX + "ADMIN_KEY", "c")
    config, _ = load_config({"model": "demo"}, key_files={"api_key": file})
    assert config.server.admin_key == "c"
    assert refusal({"model": "demo", "host": "0.0.0.0"})  # an admin key alone keeps nobody out


def test_a_key_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert "--api-key-file" in refusal({"model": "demo"}, key_files={"api_key": tmp_path / "none"})


# -- contradictions --------------------------------------------------------------------------------------


def test_settings_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    assert "callback_url" in refusal({"model": "demo", "callback_token_file": str(tmp_path)})
    assert "max_model_len" in refusal({"model": "demo", "max_model_len": "8", "block_size": "16"})


# -- the document ----------------------------------------------------------------------------------------


def test_the_document_lists_every_setting_as_it_is() -> None:
    document = (Path(__file__).parents[2] / "docs" / "settings.md").read_text()
    rows = [line for line in document.splitlines() if line.startswith("| `")]
    expected: list[str] = []
    for name, info in Settings.model_fields.items():
        value = str(info.default).lower() if isinstance(info.default, bool) else info.default
        default = "required" if info.is_required() else "none" if value is None else f"`{value}`"
        expected.append(f"| `{name}` | {default} | {allowed(info)} | {info.description} |")
    assert rows == expected


def test_the_example_in_the_document_is_valid(tmp_path: Path) -> None:
    document = (Path(__file__).parents[2] / "docs" / "settings.md").read_text()
    example = document.split("```toml\n")[1].split("```")[0]
    assert load_config({}, config_file=toml(tmp_path, example))[0].server.port == 9000
