"""What an operator sees when something goes wrong: one line with what to do next, an exit status, no traceback."""

import json
import signal
import subprocess

import pytest

COMMANDS = '''
    import click
    from whimbrel import BlockedError, StreamError, hookimpl

    whimbrel_api = (1, 0)

    @click.command()
    def fail():
        """Fail as a migration does."""
        raise StreamError("the footer is missing", section="ram", offset=77, hint="Take another file")

    @click.command()
    def blocked():
        raise BlockedError(["newest reason", "oldest reason"])

    @click.command()
    def spoof():
        raise StreamError("unknown section 'a\\x1b[2Jb\\nc'")

    @click.command()
    def defect():
        raise ValueError("a bug")

    @click.command()
    @click.argument("path")
    def opening(path):
        open(path)

    @click.command()
    def nine():
        return 9

    @click.command()
    def hang():
        import signal
        print("ready", flush=True)
        signal.pause()

    @click.command()
    def which():
        from whimbrel import Plugins
        click.echo(" ".join(i.name for i in Plugins.shared().infos() if i.state == "disabled"))

    @hookimpl
    def cli_commands():
        return [fail, blocked, spoof, defect, opening, nine, hang, which]
'''


@pytest.fixture
def app(site):
    site.add("acme-commands", group="whimbrel.plugins", name="commands", source=COMMANDS)
    return site


def outcome(done):
    return done.returncode, done.stdout, done.stderr


def test_a_migration_error_is_one_line_that_says_what_to_do(app):
    assert outcome(app.migctl("fail")) == (
        1,
        "",
        "migctl: error: the footer is missing (section 'ram', byte offset 77). Take another file\n",
    )


def test_every_blocker_is_named(app):
    code, _, err = outcome(app.migctl("blocked"))
    assert code == 3
    assert err.count("\n") == 1
    assert "newest reason; oldest reason" in err


def test_text_from_a_peer_cannot_move_the_cursor_or_fake_a_line(app):
    code, _, err = outcome(app.migctl("spoof"))
    assert code == 1
    assert "\x1b" not in err
    assert err.count("\n") == 1
    assert r"a\x1b[2Jb c" in err


def test_a_defect_is_one_line_and_its_traceback_comes_with_v(app):
    code, _, err = outcome(app.migctl("defect"))
    assert (code, err) == (
        70,
        "migctl: error: unexpected ValueError: a bug; run with -v for the traceback\n",
    )
    code, _, err = outcome(app.migctl("-v", "defect"))
    assert code == 70
    assert "Traceback" in err
    assert "in defect" in err


def test_a_missing_file_is_the_operators_to_mend(app):
    code, _, err = outcome(app.migctl("opening", "/nonexistent/file"))
    assert code == 1
    assert err.startswith("migctl: error: /nonexistent/file: No such file or directory")
    assert err.count("\n") == 1


def test_ctrl_c_is_130(app):
    with subprocess.Popen(
        app.command("hang"),
        env=app.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert err.strip() == "migctl: error: interrupted"


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (["nonsense"], "No such command 'nonsense'"),
        (["--nonsense"], "No such option"),
        (["-p", "nonsense", "--plugins"], "'nonsense' is neither no:NAME"),
        (["-p", "no:", "--plugins"], "'no:' is neither no:NAME"),
        (["--json"], "--json goes with --plugins"),
        (["opening"], "Missing argument 'PATH'"),
    ],
)
def test_a_wrong_command_line_is_2(app, args, complaint):
    code, out, err = outcome(app.migctl(*args))
    assert code == 2
    assert ("error" in json.loads(out)) if "--json" in args else out == ""
    assert complaint in err
    assert "Usage: migctl" in err


def test_without_arguments_the_help_is_shown(app):
    code, out, err = outcome(app.migctl())
    assert (code, err) == (2, "")
    assert "migctl --plugins" in out
    assert "Fail as a migration does." in out


def test_a_command_may_choose_its_exit_status(app):
    assert app.migctl("nine").returncode == 9


def test_a_command_sees_the_plugins_that_the_operator_chose(app):
    assert outcome(app.migctl("-p", "no:fd", "which")) == (0, "fd\n", "")


def test_a_misspelt_plugin_name_is_said(app):
    code, out, err = outcome(app.migctl("-p", "no:fdd", "which"))
    assert (code, out) == (0, "\n")
    assert "warning" in err
    assert "no:fdd" in err


def test_a_command_that_two_plugins_claim_is_refused_naming_both(app):
    app.add("other-commands", group="whimbrel.plugins", name="others", source=COMMANDS)
    code, _, err = outcome(app.migctl("nine"))
    assert code == 1
    assert "commands of acme-commands 1.0" in err
    assert "others of other-commands 1.0" in err
    assert app.migctl("-p", "no:others", "nine").returncode == 9


def test_a_plugin_whose_commands_fail_leaves_the_others(app):
    app.add(
        "broken-commands",
        group="whimbrel.plugins",
        name="brokencommands",
        source="""
            from whimbrel import hookimpl
            whimbrel_api = (1, 0)
            @hookimpl
            def cli_commands(): return 1 // 0
        """,
    )
    code, _, err = outcome(app.migctl("nine"))
    assert code == 9
    assert "brokencommands of broken-commands 1.0 failed in cli_commands" in err
    assert "Traceback" not in err


def test_version_needs_neither_plugins_nor_rich(site):
    site.add(
        "loud-plugin",
        group="whimbrel.plugins",
        name="loud",
        source="raise SystemExit('imported')",
    )
    done = subprocess.run(
        [
            site.command()[0],
            "-X",
            "importtime",
            *site.command("--version")[1:],
        ],
        env=site.environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.startswith("migctl 0.1.0 ")
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "click" in imported
    assert not imported & {"rich", "numpy", "pluggy", "whimbrel.plugins", "loud_plugin"}


def test_logging_names_the_loggers_of_whimbrel(app):
    code, _, err = outcome(app.migctl("-vv", "-p", "no:fd", "nine"))
    assert code == 9
    assert "DEBUG   whimbrel.plugins: plugin fd of whimbrel-fd" in err
