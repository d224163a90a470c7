"""The wire as a client sees it: greeting, negotiation, requests, ids, errors, events. After QEMU 7.2's own answers."""

import json

import pytest

NOT_FOUND, GENERIC = "CommandNotFound", "GenericError"
EXPECTING = "Expecting capabilities negotiation with 'qmp_capabilities'"
COMPLETE = "Capabilities negotiation is already complete, command ignored"


def error(text, error_class=GENERIC):
    return {"error": {"class": error_class, "desc": text}}


def test_the_greeting_comes_unasked_in_one_line(app):
    raw = app().stranger().raw_line()
    assert raw.endswith(b"}\r\n")
    greeting = json.loads(raw)["QMP"]
    assert greeting["capabilities"] == []
    version = greeting["version"]
    assert all(isinstance(version["qemu"][n], int) for n in ("major", "minor", "micro"))
    assert "whimbrel" in version["package"]


def test_nothing_but_negotiation_comes_first(app):
    wire = app().stranger()
    wire.line()
    assert wire.say('{"execute":"query-status"}') == error(EXPECTING, NOT_FOUND)
    assert wire.say('{"execute":"no-such"}') == error(EXPECTING, NOT_FOUND)
    wrong = {
        '["oob"]': "Parameter 'enable' does not accept value 'oob'",
        "[1]": "Invalid parameter type for 'enable[0]', expected: string",
        '"oob"': "Invalid parameter type for 'enable', expected: array",
    }
    for value, text in wrong.items():
        request = f'{{"execute":"qmp_capabilities","arguments":{{"enable":{value}}}}}'
        assert wire.say(request) == error(text)
    request = '{"execute":"qmp_capabilities","arguments":{"a":1}}'
    assert wire.say(request) == error("Parameter 'a' is unexpected")
    assert wire.say('{"execute":"query-status"}') == error(EXPECTING, NOT_FOUND)
    request = '{"execute":"qmp_capabilities","arguments":{"enable":[]},"id":1}'
    assert wire.say(request) == {"return": {}, "id": 1}
    assert wire.reply("qmp_capabilities") == error(COMPLETE, NOT_FOUND)


@pytest.mark.parametrize(
    "value", [0, 1.5, "x", "é\n", None, True, [], {"a": [1, {"b": None}]}, 1 << 64, ""]
)
def test_an_id_of_any_type_comes_back(wire, value):
    request = {"execute": "query-name", "id": value}
    assert wire.say(json.dumps(request)) == {"return": {"name": "app"}, "id": value}
    request["execute"] = "no-such"
    text = "The command no-such has not been found"
    assert wire.say(json.dumps(request)) == {**error(text, NOT_FOUND), "id": value}


def test_no_id_is_given_where_none_was(wire):
    assert wire.say('{"execute":"query-name"}') == {"return": {"name": "app"}}


WRONG = {
    "[1]": "QMP input must be a JSON object",
    '"x"': "QMP input must be a JSON object",
    "{}": "QMP input lacks member 'execute'",
    '{"execute":5}': "QMP input member 'execute' must be a string",
    '{"execute":"query-name","arguments":[]}': "QMP input member 'arguments' must be an object",
    '{"execute":"query-name","arguments":null}': "QMP input member 'arguments' must be an object",
    '{"execute":"query-name","foo":1}': "QMP input member 'foo' is unexpected",
    '{"exec-oob":"query-name"}': "QMP input member 'exec-oob' is unexpected",
    '{"execute":"query-name","arguments":{"x":1}}': "Parameter 'x' is unexpected",
    "{,}": "JSON parse error, expecting value",
}


@pytest.mark.parametrize("request_text", WRONG)
def test_what_is_no_request_is_named(wire, request_text):
    assert wire.say(request_text) == error(WRONG[request_text])
    assert wire.ask("query-name") == {"name": "app"}


def test_the_id_of_what_is_no_request(wire):
    expected = {**error("QMP input member 'foo' is unexpected"), "id": [3]}
    assert wire.say('{"execute":"query-name","foo":1,"id":[3]}') == expected


def test_requests_need_no_separator_and_are_answered_in_order(wire):
    wire.send("".join(f'{{"execute":"query-name","id":{n}}}' for n in range(50)))
    assert [wire.line()["id"] for _ in range(50)] == list(range(50))


def test_a_request_may_come_in_pieces(wire):
    for byte in b"{'execute': 'query-name',\r\n 'id': 'it\\'s'}":
        wire.send(bytes((byte,)))
    assert wire.line() == {"return": {"name": "app"}, "id": "it's"}


def test_lines_are_ascii(wire):
    wire.send('{"execute":"query-name","id":"é\U0001f600"}')
    raw = wire.raw_line()
    assert raw.isascii()
    assert json.loads(raw)["id"] == "é\U0001f600"


def test_empty_arguments_suit_every_command_without_arguments(wire):
    commands = [c["name"] for c in wire.ask("query-commands")]
    assert "qmp_capabilities" in commands
    for name in commands:
        if name.startswith("query-"):
            reply = wire.say(json.dumps({"execute": name, "arguments": {}}))
            assert "return" in reply, (name, reply)


def test_events_come_before_the_reply_and_only_after_negotiation(app):
    one = app()
    wire, stranger = one.client(), one.stranger()
    wire.send('{"execute":"stop"}{"execute":"stop"}{"execute":"cont"}')
    told = [json.loads(wire.raw_line()) for _ in range(5)]
    assert [m.get("event", "return") for m in told] == [
        *("STOP", "return", "return", "RESUME", "return")
    ]
    stamp = told[0].pop("timestamp")
    assert told[0] == {"event": "STOP"}
    assert set(stamp) == {"seconds", "microseconds"}
    stranger.negotiate()  # sees the greeting and its reply, and no event between


def test_an_app_without_the_plugins_hooks_has_no_monitor(tmp_path):
    from whimbrel import Kernel, Machine, PluginError, Plugins

    with pytest.raises(PluginError):
        Kernel(Machine("bare"), plugins=Plugins()).monitor(f"unix:{tmp_path}/a.qmp")
