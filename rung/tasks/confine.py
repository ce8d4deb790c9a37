"""The grading child's cage: what an ordinary process can have taken away from it and from all that it starts.

    limits        address space, one file's size, number of processes and threads, no core dump; first to be killed when
                  memory runs out
    namespaces    no network, no sight of other processes, files that can be read but not written (but for a temporary
                  folder in memory); all that was started ends with the first process of the namespace
    rights        root becomes nobody, and keeps only the right to read all files: RLIMIT_NPROC does not bind root

Each is tried and none is required: a kernel or a container may refuse.  `confine` says what came of it.  It forks: the
caller stays outside as a keeper, which ends everything when the parent lets go of its stdin, and then ends as the
serving process ended.

    parent --stdin--> keeper --> first process of the namespace --> the serving process, where `confine` returns
"""

import contextlib
import ctypes
import os
import platform
import resource
import select
import shutil
import signal
import struct
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

NEW_USER, NEW_PID, NEW_NET, NEW_IPC, NEW_MOUNT = 0x10000000, 0x20000000, 0x40000000, 0x08000000, 0x00020000
SET_DEATH_SIGNAL, SET_KEEP_CAPS, SET_SUBREAPER, SET_NO_NEW_PRIVILEGES, AMBIENT = 1, 8, 36, 38, 47  # prctl(2)
READ_ALL, OVERRIDE = 2, 1  # CAP_DAC_READ_SEARCH; CAP_DAC_OVERRIDE, where a container never had the first
NOBODY = 65534
OWN_PROCESSES = 4  # keeper, first process, serving process and its listening thread
MOUNT_SETATTR = 442  # the same number on every architecture, Linux 5.12
PRIVATE, READ_ONLY, RECURSIVE, NOSUID_NODEV = 1 << 18 | 1 << 14, 1, 0x8000, 2 | 4
PER_NAMESPACE = (5, 14)  # the Linux that counts processes per user *and* namespace

Facts = dict[str, str]


def confine(limits: Mapping[str, Any], folder: str) -> Facts:
    """Go on in a confined process, with `folder` as temporary folder; returns there alone, with what was achieved.

    limits: memory_bytes, file_bytes, processes, network, writable, as in `sandbox.Limits`
    """
    facts = {"processes": "not limited", "network": "open", "files": "writable", "others": "visible"}
    if sys.platform != "linux":
        _limits(limits)
        return facts
    _call("prctl", SET_SUBREAPER, 1, 0, 0, 0)
    apart = _unshare(network=limits["network"])
    if apart & NEW_NET:
        facts["network"] = "none"
    report, ending = os.pipe()
    first = os.fork()
    if first:
        os.close(ending)
        _keep(first, report, folder)
    os.close(report)
    _call("prctl", SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    if apart:
        facts["files"] = _close_files(limits, folder)
        facts["others"] = "hidden" if _succeeds(lambda: _mount("proc", "/proc")) else "out of reach"
        if serving := os.fork():
            _reap(serving, ending)
    os.close(ending)
    facts["processes"] = _drop_rights(limits, folder, own_count=bool(apart & NEW_USER))
    _limits(limits)
    return facts


def described(facts: Mapping[str, str]) -> str:
    """The facts on one line, for a record."""
    return ", ".join(f"{name} {value}" for name, value in facts.items())


def _limits(limits: Mapping[str, Any]) -> None:
    for kind, amount in (
        (resource.RLIMIT_AS, limits["memory_bytes"]),
        (resource.RLIMIT_FSIZE, limits["file_bytes"]),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(kind)
        amount = amount if hard == resource.RLIM_INFINITY else min(amount, hard)
        resource.setrlimit(kind, (amount, amount))


def _unshare(*, network: bool) -> int:
    """Leave the parent's namespaces; which were left.  With no right to, a user namespace of our own gives it."""
    wanted = NEW_PID | NEW_IPC | (0 if network else NEW_NET)
    for flags in (wanted | NEW_USER, wanted):
        if _possible(lambda: _enter(flags)):  # noqa: B023 (called at once)
            _enter(flags)
            return flags
    return 0


def _possible(action: Callable[[], object]) -> bool:
    """Does it succeed in a process that ends with it?  Half a new user namespace is worse than none."""
    if attempt := os.fork():
        return os.waitpid(attempt, 0)[1] == 0
    os._exit(0 if _succeeds(action) else 1)


def _enter(flags: int) -> None:
    """Raises OSError."""
    if not flags & NEW_USER or os.geteuid() != 0:
        uid, gid = os.geteuid(), os.getegid()
        _call("unshare", flags)
        if flags & NEW_USER:
            _map_ids("self", f"{uid} {uid} 1", f"{gid} {gid} 1", deny=True)
        return
    scribe, told = _scribe()
    try:
        _call("unshare", flags)
        os.write(told, b"1")
    finally:
        os.close(told)
        _, status = os.waitpid(scribe, 0)
    if status:
        raise PermissionError("the ids of the new user namespace could not be mapped")


def _scribe() -> tuple[int, int]:
    """A process that stays in the old namespace, to map there, once told to, every id of ours to itself."""
    waiting, told = os.pipe()
    scribe = os.fork()
    if scribe:
        os.close(waiting)
        return scribe, told
    os.close(told)
    uids, gids = (_identity(Path(f"/proc/self/{kind}_map").read_text()) for kind in ("uid", "gid"))
    told_to = os.read(waiting, 1) == b"1"
    os._exit(0 if told_to and _succeeds(lambda: _map_ids(str(os.getppid()), uids, gids, deny=False)) else 1)


def _identity(mapping: str) -> str:
    rows = [line.split() for line in mapping.splitlines()]
    return "\n".join(f"{inside} {inside} {count}" for inside, _, count in rows)


def _map_ids(process: str, uids: str, gids: str, *, deny: bool) -> None:
    place = Path("/proc") / process
    if deny:
        (place / "setgroups").write_text("deny")
    (place / "uid_map").write_text(uids)
    (place / "gid_map").write_text(gids)


def _close_files(limits: Mapping[str, Any], folder: str) -> str:
    """A view of all files that cannot be written, and a temporary folder in memory; "writable" where that fails."""
    if not _succeeds(lambda: _call("unshare", NEW_MOUNT)):
        return "writable"
    closed = _succeeds(lambda: _call("mount", None, b"/", None, ctypes.c_ulong(PRIVATE), None))
    if closed and not limits["writable"]:
        attributes = struct.pack("4Q", READ_ONLY, 0, 0, 0)
        closed = _succeeds(
            lambda: _call("syscall", MOUNT_SETATTR, -100, b"/", RECURSIVE, attributes, ctypes.c_size_t(len(attributes)))
        )
    options = f"size={limits['file_bytes']},mode=777".encode()
    for place in (folder, "/dev/shm"):
        _succeeds(lambda: _mount("tmpfs", place, options))  # noqa: B023 (called at once)
    return "read-only" if closed and not limits["writable"] else "writable"


def _mount(kind: str, place: str, options: bytes | None = None) -> None:
    _call("mount", kind.encode(), place.encode(), kind.encode(), ctypes.c_ulong(NOSUID_NODEV), options)


def _drop_rights(limits: Mapping[str, Any], folder: str, *, own_count: bool) -> str:
    """Nothing may be gained by running a program; root becomes nobody who can read.  Says how many may run."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    _call("prctl", SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    if os.geteuid() == 0:
        with contextlib.suppress(OSError):
            os.chown(folder, NOBODY, NOBODY)
        if not _succeeds(lambda: _become_nobody(OVERRIDE if limits["writable"] else READ_ALL)):
            return "not limited"
    uid = os.geteuid()
    others = 0 if own_count and _kernel() >= PER_NAMESPACE else _threads_of(uid)
    most = others + limits["processes"] + OWN_PROCESSES
    resource.setrlimit(resource.RLIMIT_NPROC, (most, most))
    _call("prctl", SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)  # it is forgotten where ids change
    return f"at most {limits['processes']}"


def _become_nobody(kept: int) -> None:
    """But for one right of root's.  Raises OSError where that is not allowed, before anything has changed."""
    _call("prctl", SET_KEEP_CAPS, 1, 0, 0, 0)
    with contextlib.suppress(OSError):
        os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    header = struct.pack("Ii", 0x20080522, 0)
    for right in (kept, OVERRIDE):
        bits = 1 << right
        if _succeeds(lambda: _call("capset", header, struct.pack("6I", bits, bits, bits, 0, 0, 0))):  # noqa: B023
            _succeeds(lambda: _call("prctl", AMBIENT, 2, right, 0, 0))  # noqa: B023 (programs that it runs can read too)
            return
    _call("capset", header, struct.pack("6I", *[0] * 6))


def _threads_of(uid: int) -> int:
    """Threads that run as this user, as the kernel counts them."""
    count = 0
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):
            fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
            count += int(fields["Threads"]) if int(fields["Uid"].split()[0]) == uid else 0
    return count


def _kernel() -> tuple[int, ...]:
    return tuple(int(part) for part in platform.release().split("-")[0].split(".")[:2])


def _reap(serving: int, ending: int) -> NoReturn:
    """The first process of a namespace: bury orphans, pass on how the serving process ended, and end all with it."""
    while True:
        pid, status = os.wait()
        if pid == serving:
            os.write(ending, struct.pack("i", status))
            os._exit(0)


def _keep(first: int, report: int, folder: str) -> NoReturn:
    """Outside: wait until the parent lets go of stdin or the child ends; leave nothing behind; end as it ended."""
    watch = select.poll()
    watch.register(0, 0)  # nothing is read here: only that the other end is closed
    watch.register(os.pidfd_open(first), select.POLLIN)
    watch.poll()
    with contextlib.suppress(ProcessLookupError):
        os.kill(first, signal.SIGKILL) if os.waitid(
            os.P_PID, first, os.WEXITED | os.WNOHANG | os.WNOWAIT
        ) is None else 0
    _, status = os.waitpid(first, 0)
    if told := os.read(report, 4) if _ready(report) else b"":
        (status,) = struct.unpack("i", told)
    _end_orphans()
    shutil.rmtree(folder, ignore_errors=True)
    if os.WIFSIGNALED(status):
        signal.signal(os.WTERMSIG(status), signal.SIG_DFL) if os.WTERMSIG(status) != signal.SIGKILL else None
        os.kill(os.getpid(), os.WTERMSIG(status))
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


def _ready(pipe: int) -> bool:
    return bool(select.select([pipe], [], [], 0)[0])


def _end_orphans() -> None:
    """Kill what the serving process started and left to us, and what that leaves, until there is nothing."""
    while True:
        for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(child), signal.SIGKILL)
        try:
            os.wait()
        except ChildProcessError:
            return


def _succeeds(action: Callable[[], object]) -> bool:
    try:
        action()
    except OSError:
        return False
    return True


def _call(name: str, *arguments: Any) -> int:
    """A function of the C library that sets errno.  Raises OSError."""
    result = getattr(_library(), name)(*arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
    return result


def _library() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
