"""The executable stands for Python: output, input, exit codes, signals, folder, arguments."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import forking
from tests.helpers.launching import until

pytestmark = pytest.mark.slow
PROGRAMS = [
    "import sys; print(sys.argv, sys.stdin.read()); print('é', file=sys.stderr); sys.exit(3)",
    "raise SystemExit('no')",
    "1 / 0",
    "import os; print(os.getcwd(), os.environ['SAID']); os.kill(os.getpid(), 9)",
    "import atexit, os; atexit.register(print, 'at exit'); print(os.umask(0))",
    "raise KeyboardInterrupt",
]


def done(python: str, *typed: str, folder: Path) -> tuple[int, str, str]:
    """The exit code, what was printed, and the last line of errors."""
    environment = {**os.environ, "SAID": "so"}
    made = subprocess.run(
        [python, *typed], cwd=folder, env=environment, input="given", capture_output=True, text=True
    )
    return made.returncode, made.stdout, (made.stderr.splitlines() or [""])[-1]


@pytest.mark.parametrize("program", PROGRAMS)
def test_it_ends_as_python_does(program, tmp_path):
    (tmp_path / "script.py").write_text(program)
    for typed in (["-c", program, "a", "b c"], ["script.py", "a"], ["-u", "-m", "script"]):
        found = [done(one, *typed, folder=tmp_path) for one in (forking.python(), sys.executable)]
        if typed[-1] == "script":  # argv[0] is its path, spelt in another way
            found = [(code, "", error) for code, _, error in found]
        assert found[0] == found[1]


def test_signals_are_handed_on_and_who_kills_it_kills_the_fork(tmp_path):
    program = (
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGUSR2, lambda *_: os.write(1, b'heard\\n'))\n"
        "print(os.getpid(), flush=True)\n"
        "while True: time.sleep(0.05)\n"
    )
    process = subprocess.Popen([forking.python(), "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    fork = int(process.stdout.readline())
    assert fork != process.pid
    process.send_signal(signal.SIGUSR2)
    assert process.stdout.readline() == "heard\n"
    process.kill()
    process.wait()
    until(lambda: not Path(f"/proc/{fork}").exists())


def test_the_fork_has_the_libraries_and_nothing_of_ours(tmp_path):
    # An editable install has a finder of its own, which isn't ours.
    ours = "[n for n in sys.modules if n.split('.')[0] in ('crl_exp', 'hydra_plugins')]"
    program = f"import sys; print('torch' in sys.modules, {ours})"
    assert done(forking.python(), "-c", program, folder=tmp_path)[:2] == (0, "True []\n")
