"""Run a command and leave none of its processes behind, whether the call ends, times out, or the caller is killed.

The command gets a session and a process group of its own, which are killed when the call is over. On Linux, processes
that left the group (`setsid`, daemons) are found by a mark in their environment. A second process, the watcher, waits
for the caller's death, even by SIGKILL, and then does the same and removes the caller's temporary folder.

Out of reach are: processes that left the group *and* dropped the environment or belong to another user (containers,
`ssh`, `systemd-run`, batch queues); off Linux all that left the group; on Windows all but the command itself.

The file is also the watcher's script, so it imports the standard library only.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import BinaryIO

MARK = "METRICOPT_COMMAND"  # a variable; a command that runs commands of its own hands on both marks
MOST_SCANS = 20  # of all processes: the first may miss one that was just forked
LATER_LOOKS, PAUSE = 5, 0.2  # of the watcher, seconds between them: amid an exec a process shows no environment


def run(
    words: Sequence[str],
    environment: Mapping[str, str],
    folder: str,
    out: BinaryIO,
    err: BinaryIO,
    timeout: float | None = None,
) -> int:
    """The exit status of a command. Whatever happens, its processes have been killed when this returns or raises.

    Args:
        environment: variables of the command.
        folder: a temporary folder of the call, removed if this process dies meanwhile.
        timeout: seconds, None for no limit.

    Raises:
        subprocess.TimeoutExpired: it took longer.
    """
    mark = uuid.uuid4().hex
    environment = {**environment, MARK: f"{environment.get(MARK, '')},{mark}"}
    watcher = _start_watcher(mark, folder)
    process = None
    try:
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=environment, start_new_session=True
        )
        if watcher is not None and watcher.stdin is not None:
            with suppress(OSError):  # somebody has killed it
                watcher.stdin.write(f"{process.pid}\n".encode())
        return process.wait(timeout)
    finally:
        if process is not None:
            if process.poll() is None:
                process.kill()
            kill_all(process.pid, mark)
            process.wait()
        if watcher is not None:
            watcher.kill()
            watcher.communicate()  # closes its pipe


def kill_all(group: int | None, mark: str) -> None:
    """Kill the processes of a group, and those that have `mark` in their environment."""
    if os.name != "posix":
        return
    if group is not None:
        with suppress(OSError):  # nobody is left
            os.killpg(group, signal.SIGKILL)
    for _ in range(MOST_SCANS):
        if not (found := marked(mark)):
            break
        for pid in found:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)


def marked(mark: str) -> list[int]:
    """The processes, as far as Linux's /proc shows them, with `mark` in their environment; zombies have none."""
    found = []
    for name in os.listdir("/proc") if sys.platform == "linux" else []:
        with suppress(OSError):  # it has ended, or belongs to somebody else
            if name.isdigit() and int(name) != os.getpid():
                with open(f"/proc/{name}/environ", "rb") as file:
                    if mark.encode() in file.read():
                        found.append(int(name))
    return found


def _start_watcher(mark: str, folder: str) -> subprocess.Popen | None:
    if not sys.executable:  # Python is embedded into another program
        return None
    return subprocess.Popen(
        [sys.executable, "-I", "-S", os.path.abspath(__file__), mark, folder],
        bufsize=0,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # the signal that ends the caller's group must not reach it
    )


def watch(mark: str, folder: str) -> None:
    """Wait for the end of the caller, who holds the other end of stdin, and clean up behind it."""
    line = sys.stdin.buffer.read().split()  # the process group, as soon as the caller knows it
    kill_all(int(line[0]) if line else None, mark)
    for _ in range(LATER_LOOKS):
        time.sleep(PAUSE)
        kill_all(None, mark)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    watch(*sys.argv[1:])
