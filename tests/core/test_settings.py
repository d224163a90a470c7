"""Settings: declared, checked, all or nothing."""

import pytest
from hypothesis import given, strategies as st

from whimbrel import (
    Capability,
    Parameter,
    PluginError,
    SettingError,
    Settings,
    Side,
    StateError,
    Type,
)
from whimbrel.settings import (
    KERNEL_SETTINGS,
    PROFILE_2013,
    TODAY,
    parse_duration,
    parse_size,
)


@pytest.fixture
def settings():
    settings = Settings(TODAY)
    settings.declare(KERNEL_SETTINGS)
    settings.declare(
        [
            Capability(name="multifd", help="", conflicts=("xbzrle",), side=Side.BOTH),
            Capability(name="xbzrle", help=""),
            Capability(name="zero-copy-send", help="", requires=("multifd",)),
            Parameter(
                name="multifd-channels",
                type=Type.INT,
                default=2,
                minimum=1,
                maximum=255,
                help="",
                aliases=("x-multifd-channels",),
            ),
            Parameter(name="cache", type=Type.SIZE, default=4096, power_of_two=True, help=""),
            Parameter(
                name="method", type=Type.CHOICE, default="none", choices=("none", "zlib"), help=""
            ),
        ]
    )
    return settings


def test_defaults_are_those_of_todays_qemu(settings):
    assert settings["max-bandwidth"] == 128 << 20
    assert settings["downtime-limit"] == 300
    assert settings["return-path"] is True


def test_defaults_of_2013():
    settings = Settings(PROFILE_2013)
    settings.declare(KERNEL_SETTINGS)
    assert settings["max-bandwidth"] == 32 << 20
    assert settings["downtime-limit"] == 30
    assert settings["return-path"] is False


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("64M", 64 << 20),
        ("500MiB/s", 500 << 20),
        ("1.5g", 3 << 29),
        ("7KB", 7168),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "ms"), [("300", 300), ("300ms", 300), ("0.3s", 300), ("2min", 120000)]
)
def test_durations(text, ms):
    assert parse_duration(text) == ms


@given(st.text())
def test_odd_texts_are_value_errors(text):
    for parse in (parse_size, parse_duration):
        try:
            assert parse(text) >= 0
        except ValueError as error:
            assert "is not a" in str(error)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("multifd-channels", 0, "'multifd-channels' expects a value between 1 and 255"),
        ("multifd-channels", 256, "between 1 and 255"),
        ("multifd-channels", 1.5, "whole number"),
        ("multifd-channels", True, "whole number"),
        ("multifd-channels", "many", "expects a int"),
        ("cache", 4097, "power of two"),
        ("method", "lzma", "does not accept value 'lzma'.*none, zlib"),
        ("xbzrle", "maybe", "expects on or off"),
        ("max-bandwidth", -1, "between 0 and 18446744073709551615 bytes/s"),
        ("max-bandwidth", "fast", "not a size such as"),
        ("downtime-limit", 2_000_001, "between 0 and 2000000 ms"),
        ("no-such", 1, "there is no setting 'no-such'.*There are: "),
    ],
)
def test_wrong_values_say_what_is_right(settings, name, value, message):
    before = settings.as_dict()
    with pytest.raises(SettingError, match=message):
        settings[name] = value
    assert settings.as_dict() == before


def test_all_or_nothing(settings):
    before = settings.as_dict()
    with pytest.raises(SettingError):
        settings.update({"max-bandwidth": 1, "multifd-channels": 0})
    assert settings.as_dict() == before


def test_combinations(settings):
    with pytest.raises(SettingError, match="requires 'multifd'"):
        settings["zero-copy-send"] = True
    settings.update({"multifd": True, "zero-copy-send": "on"})
    with pytest.raises(SettingError, match="exclude each other"):
        settings["xbzrle"] = True
    with pytest.raises(SettingError, match="requires 'multifd'"):
        settings["multifd"] = False
    settings.update({"multifd": False, "zero-copy-send": False, "xbzrle": True})


def test_a_parameter_that_is_never_below_another():
    settings = Settings(TODAY)
    low = Parameter(name="low", type=Type.INT, default=20, minimum=1, maximum=99, help="")
    high = Parameter(
        name="high", type=Type.INT, default=99, minimum=1, maximum=99, help="", not_below="low"
    )
    alone = Parameter(name="alone", type=Type.INT, default=1, not_below="of-nobody", help="")
    settings.declare([high, low, alone])
    said = "Parameter 'high' expects no less than low: 19 is below 20"
    with pytest.raises(SettingError, match=said):
        settings["high"] = 19
    settings["high"] = 20
    with pytest.raises(SettingError, match="20 is below 21"):
        settings["low"] = 21
    assert (settings["high"], settings["low"]) == (20, 20)
    settings.update({"low": 50, "high": 50})
    settings.update({"high": 3, "low": 2})
    assert (settings["high"], settings["low"]) == (3, 2)


def test_aliases(settings):
    settings["x-multifd-channels"] = 5
    assert settings["multifd-channels"] == settings.get("x-multifd-channels") == 5
    assert "x-multifd-channels" not in settings.as_dict()
    assert settings.get("not-declared", 7) == 7


def test_a_name_belongs_to_one(settings):
    with pytest.raises(PluginError, match="whimbrel-thief declares setting 'xbzrle'"):
        settings.declare(
            [Capability(name="other", help=""), Capability(name="xbzrle", help="")],
            by="whimbrel-thief",
        )
    assert "other" not in settings


def test_apply_is_called_for_changes_only():
    applied = []
    settings = Settings(TODAY)
    settings.declare(
        [
            Parameter(
                name="p",
                type=Type.INT,
                default=1,
                help="",
                apply=lambda k, v: applied.append((k, v)),
            )
        ]
    )
    kernel = object()
    settings.attach(kernel)
    settings["p"] = 1
    settings["p"] = 2
    assert applied == [(kernel, 2)]


def test_parameters_may_change_while_a_migration_runs_and_capabilities_may_not():
    settings = Settings(TODAY, is_running=lambda: True)
    settings.declare(KERNEL_SETTINGS)
    settings["max-bandwidth"] = 0
    with pytest.raises(StateError, match="in progress: return-path"):
        settings.update({"max-bandwidth": 5, "return-path": False})
    assert settings["max-bandwidth"] == 0
