"""Settings: where a value comes from, and what is said of one that cannot be used."""

from __future__ import annotations

import dataclasses
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from queue_service import settings
from queue_service.errors import ConfigError
from queue_service.settings import Settings, env_name, load, parse_duration


def test_defaults_come_first() -> None:
    assert load({}) == Settings()
    assert (Settings().lease, Settings().payload_limit) == (timedelta(seconds=30), 256 * 1024)


def test_the_environment_overrides_defaults_and_arguments_override_both() -> None:
    environ = {"QUEUE_SERVICE_POOL_SIZE": "7", "QUEUE_SERVICE_LEASE": "2m"}
    loaded = load(environ, pool_size=9)
    assert (loaded.pool_size, loaded.lease, loaded.max_losses) == (9, timedelta(minutes=2), 3)
    assert load(environ, pool_size=None).pool_size == 7


def test_an_empty_variable_is_no_value() -> None:
    assert load({"QUEUE_SERVICE_POOL_SIZE": "", "QUEUE_SERVICE_DATA_DIR": ""}) == Settings()


def test_variables_of_others_are_not_read() -> None:
    assert load({"POOL_SIZE": "7", "queue_service_pool_size": "8", "QUEUE_SERVICE_POOLSIZE": "9"}) == Settings()


def test_every_setting_can_be_given_by_its_variable() -> None:
    texts = {
        "data_dir": ("/srv/x", Path("/srv/x")),
        "pool_size": ("5", 5),
        "pooler": ("transaction", "transaction"),
        "listen_url": ("postgresql://h/d", "postgresql://h/d"),
        "lent_connections": ("3", 3),
        "lent_statement_timeout": ("5m", timedelta(minutes=5)),
        "payload_limit": ("1000", 1000),
        "lease": ("40s", timedelta(seconds=40)),
        "poll_interval": ("250ms", timedelta(milliseconds=250)),
        "sweep_interval": ("3", timedelta(seconds=3)),
        "drain_timeout": ("0s", timedelta(0)),
        "max_losses": ("1", 1),
        "admission": ("7m", timedelta(minutes=7)),
        "execution": ("20s", timedelta(seconds=20)),
        "total": ("2h", timedelta(hours=2)),
        "retention": ("2d", timedelta(days=2)),
        "retention_failed": ("60d", timedelta(days=60)),
        "read_timeout": ("5s", timedelta(seconds=5)),
        "log_level": ("debug", "debug"),
        "log_format": ("json", "json"),
    }
    assert texts.keys() == {field.name for field in dataclasses.fields(Settings)}
    loaded = load({env_name(name): text for name, (text, _) in texts.items()})
    assert {name: getattr(loaded, name) for name in texts} == {name: value for name, (_, value) in texts.items()}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("500ms", timedelta(milliseconds=500)),
        ("30s", timedelta(seconds=30)),
        ("5m", timedelta(minutes=5)),
        ("2h", timedelta(hours=2)),
        ("14d", timedelta(days=14)),
        ("1.5h", timedelta(minutes=90)),
        ("90", timedelta(seconds=90)),
        ("0.25", timedelta(milliseconds=250)),
        ("0", timedelta(0)),
        ("  3 s ", timedelta(seconds=3)),
    ],
)
def test_a_duration_is_read(text: str, expected: timedelta) -> None:
    assert parse_duration(text) == expected


@pytest.mark.parametrize("text", ["", "-1s", "1w", "s", "1h30m", "1,5s", ".5s", "5.s", "1e3", "nan", "inf", "1 min"])
def test_what_is_no_duration_is_refused_with_examples(text: str) -> None:
    with pytest.raises(ConfigError, match=r"is not a duration\. Write 500ms, 30s, 5m, 2h or 14d"):
        parse_duration(text)


@pytest.mark.parametrize("text", ["99999999999999d", "9" * 400, "9" * 400 + "h"])
def test_a_duration_beyond_any_calendar_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_duration(text)


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("QUEUE_SERVICE_POOL_SIZE", "four"),
        ("QUEUE_SERVICE_POOL_SIZE", "4.5"),
        ("QUEUE_SERVICE_PAYLOAD_LIMIT", "256k"),
        ("QUEUE_SERVICE_LEASE", "soon"),
        ("QUEUE_SERVICE_RETENTION", "2 weeks"),
        ("QUEUE_SERVICE_DRAIN_TIMEOUT", "-1s"),
        ("QUEUE_SERVICE_LEASE", "99999999999999d"),
    ],
)
def test_an_unreadable_value_names_its_variable_and_itself(variable: str, text: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load({variable: text})
    assert str(refused.value).startswith(f"{variable}={text!r} cannot be used: ")


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("QUEUE_SERVICE_POOL_SIZE", "0"),
        ("QUEUE_SERVICE_PAYLOAD_LIMIT", "-1"),
        ("QUEUE_SERVICE_MAX_LOSSES", "0"),
        ("QUEUE_SERVICE_LEASE", "0"),
        ("QUEUE_SERVICE_POLL_INTERVAL", "9ms"),
        ("QUEUE_SERVICE_SWEEP_INTERVAL", "0s"),
        ("QUEUE_SERVICE_RETENTION", "23h"),
    ],
)
def test_a_value_out_of_range_names_its_setting(variable: str, text: str) -> None:
    with pytest.raises(ConfigError, match=variable.removeprefix("QUEUE_SERVICE_").lower()):
        load({variable: text})


def test_an_unknown_override_names_the_nearest_setting() -> None:
    with pytest.raises(ConfigError, match=r"no setting 'pol_size'\. Did you mean 'pool_size'\?"):
        load({}, pol_size=4)
    with pytest.raises(ConfigError) as refused:
        load({}, zzz=4)
    assert str(refused.value) == "There is no setting 'zzz'."


@pytest.mark.parametrize(
    "values",
    [
        {"pool_size": 0},
        {"lent_connections": 0},
        {"lent_statement_timeout": timedelta(0)},
        {"lease": timedelta(0)},
        {"drain_timeout": timedelta(seconds=-1)},
        {"retention": timedelta(0)},
    ],
)
def test_settings_made_by_hand_are_checked_too(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Settings(**values)


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().pool_size = 5  # type: ignore[misc]


def test_the_data_directory_of_an_ordinary_user_follows_the_desktop_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_DATA_HOME", "/xdg")
    assert settings.default_data_dir() == Path("/xdg/queue_service")
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert settings.default_data_dir() == Path("/home/someone/.local/share/queue_service")


def test_the_data_directory_of_root_is_the_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert settings.default_data_dir() == Path("/var/lib/queue_service")
