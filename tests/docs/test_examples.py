"""What the documents show is run: Python as it stands, the commands as far as one machine allows."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

MIGCTL = [sys.executable, "-c", "from whimbrel_cli.main import main; main()"]


def run(command, **kwargs):
    environment = {**os.environ, "PYTHONWARNINGS": "error", "COLUMNS": "80"}
    return subprocess.run(
        command,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        stdin=subprocess.DEVNULL,
        **kwargs,
    )


def test_the_python_of_a_page_runs(python_page, tmp_path):
    """All blocks of a page are one program, each line where it stands in the page."""
    lines = []
    for first, text in python_page.blocks("python"):
        lines += [""] * (first - 1 - len(lines)) + text.split("\n")[:-1]
    script = tmp_path / python_page.path.with_suffix(".py").name
    script.write_text("\n".join(lines))
    done = run([sys.executable, script], cwd=tmp_path)
    assert done.returncode == 0, f"{python_page.name}: {done.stderr}"


def commands(page):
    """The commands in the console blocks: the lines behind '$ ', with those that a backslash continues."""
    for _, text in page.blocks("console"):
        for match in re.finditer(r"^\$ ((?:.*\\\n)*.*)$", text, re.MULTILINE):
            yield match[1]
    for _, text in page.blocks("sh"):
        yield text


def test_the_commands_of_a_page_are_shell(console_page):
    found = list(commands(console_page))
    assert found, f"{console_page.name} has a console block without a '$ ' line"
    for command in found:
        done = run(["bash", "-n", "-c", command])
        assert done.returncode == 0, f"{console_page.name}: {command}: {done.stderr}"


def test_migctl_has_the_commands_and_options_that_a_page_shows(console_page):
    for command in commands(console_page):
        for line in command.replace("\\\n", " ").split("\n"):
            words = shlex.split(line, comments=True)
            if words[:1] == ["migctl"] and "..." not in words:
                check_migctl(words[1:], console_page)


def check_migctl(words, page):
    if {"--help", "--version", "--plugins"} & set(words):
        done = run([*MIGCTL, *words[: words.index("|") if "|" in words else None]])
        assert done.returncode == 0, f"{page.name}: migctl {words}: {done.stderr}"
        return
    while words and words[0].startswith("-"):
        words = words[2 if words[0] in ("-p", "-m") else 1 :]
    done = run([*MIGCTL, words[0], "--help"])
    assert done.returncode == 0, f"{page.name}: there is no migctl {words[0]}: {done.stderr}"
    for word in words[1:]:
        if word.startswith("--"):
            assert word.partition("=")[0] in done.stdout, f"{page.name}: {words[0]} has no {word}"


def test_make_has_the_targets_that_a_page_shows(console_page, root):
    targets = set(re.findall(r"^(\w+):", (root / "Makefile").read_text(), re.MULTILINE))
    for command in commands(console_page):
        words = shlex.split(command, comments=True)
        if words[:1] == ["make"]:
            assert {w for w in words[1:] if "=" not in w} <= targets, console_page.name


def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.path.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if "://" not in target:
            assert (page.path.parent / Path(target)).exists(), f"{page.name}: {target}"
