"""Start one program under conditions that must be set between fork and exec. Run as a script by ``process.py``.

It stands alone (standard library only, ``python -I -S``), so that it costs 20 ms and needs no import path:

* the program is killed when its parent ends, however the parent ends (Linux ``PR_SET_PDEATHSIG``);
* run by root, the program gets another user (mode ``plain``). For an environment below folders that only root may
  enter there are two more ways: the other user with the capability to pass them (mode ``capability``:
  ``CAP_DAC_OVERRIDE``, ambient), and root's own identity under another number (mode ``namespace``: a user namespace
  that maps the given user to root, so that files of root belong to it and it has no privileges).

Arguments: ``PARENT_PID UID GID MODE PROGRAM ARGUMENT...``; UID -1 keeps the user.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
PR_SET_KEEPCAPS = 8
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_RAISE = 2
PR_SET_SECUREBITS = 28
SECBIT_NO_SETUID_FIXUP = 1 << 2
CLONE_NEWUSER = 0x10000000
CAP_DAC_OVERRIDE = 1
CAPABILITY_VERSION_3 = 0x20080522


class _Header(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]


class _Data(ctypes.Structure):
    _fields_ = [
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    ]


def main() -> None:
    """Set the conditions and become the program; exit 126 with the reason when that fails."""
    parent, uid, gid = (int(text) for text in sys.argv[1:4])
    mode = sys.argv[4]
    command = sys.argv[5:]
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
    if uid >= 0:
        if mode == "namespace":
            _enter_namespace(libc, uid, gid)
        else:
            _become(libc, uid, gid, mode == "capability")
    if libc is not None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # after the change of user, which clears it
    if parent > 0 and os.getppid() != parent:
        sys.exit("the parent has ended")
    # Python ignores the first two, and who starts the stack may have the others ignored: the program would inherit that
    for name in ("SIGPIPE", "SIGXFSZ", "SIGTERM", "SIGINT", "SIGQUIT"):
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    os.execvp(command[0], command)  # noqa: S606 - becoming the program is the purpose


def _become(libc: "ctypes.CDLL | None", uid: int, gid: int, keep_access: bool) -> None:
    if keep_access:
        if libc is None:
            sys.exit("keeping access needs Linux")
        # without this bit, access(2) leaves the capabilities of a user other than root out of account
        libc.prctl(PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP, 0, 0, 0)
        _checked(libc.prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0), "PR_SET_KEEPCAPS")
    os.setgroups([])
    os.setgid(gid)
    os.setuid(uid)
    if keep_access and libc is not None:
        bit = 1 << CAP_DAC_OVERRIDE
        data = (_Data * 2)(_Data(bit, bit, bit), _Data(0, 0, 0))
        _checked(libc.capset(ctypes.byref(_Header(CAPABILITY_VERSION_3, 0)), ctypes.byref(data)), "capset")
        _checked(libc.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, CAP_DAC_OVERRIDE, 0, 0), "PR_CAP_AMBIENT")


def _enter_namespace(libc: "ctypes.CDLL | None", uid: int, gid: int) -> None:
    if libc is None:
        sys.exit("a user namespace needs Linux")
    own_uid, own_gid = os.geteuid(), os.getegid()
    _checked(libc.unshare(CLONE_NEWUSER), "unshare")
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {own_uid} 1"), ("gid_map", f"{gid} {own_gid} 1")):
        with open(f"/proc/self/{name}", "w") as stream:
            stream.write(text)


def _checked(result: int, what: str) -> None:
    if result != 0:
        sys.exit(f"{what}: {os.strerror(ctypes.get_errno())}")


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        print(f"{sys.argv[5] if len(sys.argv) > 5 else '?'}: {error}", file=sys.stderr)  # noqa: T201 - it is a script
        sys.exit(126)
