"""Takes rights away from the process that calls it, for good: limits, Landlock, a user and network namespace, seccomp.

Standard library only, as it runs inside the sandbox (see inside.py). Every layer that the system does not have is left out, and `confine`
says which are in force:

    limits     setrlimit: address space, processor time, size of files, number of files, no core
    landlock   Linux >= 6.2: nothing outside one folder can be written, made or removed; no TCP, no signals to others
    namespace  Linux: a user and a network namespace of its own (no interface but a loopback that is down, no rights of root)
    seccomp    Linux on x86-64 and arm64: no sockets, no new processes or programs, no signals, no change of limits, owners, modes,
               mounts, clocks; without Landlock also nothing that writes to a file by its name. Threads are allowed
    hook       where seccomp is missing: Python itself refuses sockets, processes and writes outside the folder. Native code gets past it
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import struct
import sys

# name: number on x86-64, on arm64 (None: not there)
_REFUSED = {
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281), "socket": (41, 198), "ptrace": (101, 117),
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    "pidfd_send_signal": (424, 424), "pidfd_open": (434, 434), "pidfd_getfd": (438, 438), "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271), "mount": (165, 40), "umount2": (166, 39), "move_mount": (429, 429), "open_tree": (428, 428),
    "fsopen": (430, 430), "mount_setattr": (442, 442), "pivot_root": (155, 41), "chroot": (161, 51), "unshare": (272, 97),
    "setns": (308, 268), "bpf": (321, 280), "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218),
    "perf_event_open": (298, 241), "io_uring_setup": (425, 425), "setrlimit": (160, 164), "prlimit64": (302, 261),
    "setpriority": (141, 140), "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452),
    "chown": (92, None), "lchown": (94, None), "fchown": (93, 55), "fchownat": (260, 54), "setxattr": (188, 5), "lsetxattr": (189, 6),
    "fsetxattr": (190, 7), "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16), "utime": (132, None),
    "utimes": (235, None), "futimesat": (261, None), "utimensat": (280, 88), "reboot": (169, 142), "settimeofday": (164, 170),
    "clock_settime": (227, 112), "sethostname": (170, 161), "setdomainname": (171, 162), "open_by_handle_at": (304, 265),
    "shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190),
}
#: what changes files by name, refused where Landlock cannot tell folders apart; and where the flags of an opening stand
_WRITING = {
    "creat": (85, None), "openat2": (437, 437), "unlink": (87, None), "unlinkat": (263, 35), "rename": (82, None),
    "renameat": (264, 38), "renameat2": (316, 276), "rmdir": (84, None), "mkdir": (83, None), "mkdirat": (258, 34), "link": (86, None),
    "linkat": (265, 37), "symlink": (88, None), "symlinkat": (266, 36), "truncate": (76, 45), "mknod": (133, None), "mknodat": (259, 33),
}
_OPENING = {"open": ((2, None), 1), "openat": ((257, 56), 2)}
_CLONE, _CLONE3, _CLONE_THREAD = (56, 220), (435, 435), 0x10000
_ARCHITECTURE = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7), "arm64": (1, 0xC00000B7)}
_EPERM, _ENOSYS = 1, 38


def confine(folder: str, seconds: float, memory: int, *, landlock: bool = True, seccomp: bool = True) -> list[str]:
    """The layers that are in force afterwards. folder: the only one that may be written to. memory: bytes of address space."""
    found = []
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
    if libc is not None:
        libc.prctl(1, 9, 0, 0, 0)  # PR_SET_PDEATHSIG: does not outlive whoever started it
        if libc.unshare(0x10000000 | 0x40000000 | 0x08000000) == 0:  # CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWIPC
            found.append("namespace")
        libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
        if landlock and _landlock(libc, folder):
            found.append("landlock")
        libc.syscall(126 if platform.machine() == "x86_64" else 91, struct.pack("II", 0x20080522, 0), bytes(24))  # capset: nothing
    _limits(seconds, memory, alone="namespace" in found)
    found.append("limits")
    if libc is not None and seccomp and _seccomp(libc, writing="landlock" not in found):
        found.append("seccomp")
    else:
        _hook(folder)
        found.append("hook")
    return found


def _limits(seconds: float, memory: int, alone: bool) -> None:
    wanted = [("RLIMIT_CPU", int(seconds) + 1), ("RLIMIT_FSIZE", 4 << 20), ("RLIMIT_NOFILE", 64), ("RLIMIT_CORE", 0),
              ("RLIMIT_AS", memory), ("RLIMIT_STACK", 16 << 20)]
    if alone:  # counted by namespace, so others of the same user do not count
        wanted.append(("RLIMIT_NPROC", 64))
    for name, value in wanted:
        kind = getattr(resource, name, None)
        if kind is None:
            continue
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        try:
            resource.setrlimit(kind, (value, value))
        except (ValueError, OSError):  # macOS refuses RLIMIT_AS
            continue


def _landlock(libc, folder: str) -> bool:
    version = libc.syscall(444, None, 0, 1)
    if version < 3:  # before that truncating a file is not covered
        return False
    writes = sum(1 << bit for bit in (1, *range(4, 15))) | (1 << 15 if version >= 5 else 0)
    rules = struct.pack("QQQ", writes, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    ruleset = libc.syscall(444, rules, 24 if version >= 6 else 16 if version >= 4 else 8, 0)
    if ruleset < 0:
        return False
    for path, allowed in ((folder, writes), ("/dev/null", 1 << 1)):
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        added = libc.syscall(445, ruleset, 1, struct.pack("=Qi", allowed, place), 0)
        os.close(place)
        if added:
            return False
    done = libc.syscall(446, ruleset, 0) == 0
    os.close(ruleset)
    return done


def _seccomp(libc, writing: bool) -> bool:
    column, architecture = _ARCHITECTURE.get(platform.machine(), (None, None))
    if column is None:
        return False

    def numbers(table):
        return [pair[column] for pair in table.values() if pair[column] is not None]

    refuse, missing = 0x00050000 | _EPERM, 0x00050000 | _ENOSYS
    program = [(0x20, 0, 0, 4), (0x15, 1, 0, architecture), (0x06, 0, 0, 0x80000000),  # another architecture: killed
               (0x20, 0, 0, 0), (0x35, 0, 1, 0x40000000), (0x06, 0, 0, refuse)]  # x32: refused
    program += [step for number in numbers(_REFUSED) for step in ((0x15, 0, 1, number), (0x06, 0, 0, refuse))]
    program += [(0x15, 0, 1, _CLONE3[column]), (0x06, 0, 0, missing)]  # its flags lie in memory: glibc then takes clone
    program += _if_flags(_CLONE[column], 0, _CLONE_THREAD, refuse, when_set=False)
    if writing:
        program += [step for number in numbers(_WRITING) for step in ((0x15, 0, 1, number), (0x06, 0, 0, refuse))]
        flags = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
        for pair, place in _OPENING.values():
            if pair[column] is not None:
                program += _if_flags(pair[column], place, flags, refuse, when_set=True)
    program.append((0x06, 0, 0, 0x7FFF0000))  # allowed
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in program))
    head = struct.pack("HxxxxxxP", len(program), ctypes.addressof(code))
    return libc.prctl(22, 2, head, 0, 0) == 0


def _if_flags(number: int, place: int, flags: int, answer: int, *, when_set: bool) -> list[tuple[int, int, int, int]]:
    """Steps that answer a call by whether any of the flags are set in its argument; other calls go on with their number loaded."""
    return [(0x15, 0, 4, number), (0x20, 0, 0, 16 + 8 * place), (0x45, *((0, 1) if when_set else (1, 0)), flags), (0x06, 0, 0, answer),
            (0x06, 0, 0, 0x7FFF0000)]


def _hook(folder: str) -> None:
    """Python's own refusal, where the kernel offers none."""
    root = os.path.realpath(folder) + os.sep
    families = ("socket.", "subprocess.", "os.fork", "os.exec", "os.posix_spawn", "os.spawn", "os.system", "os.kill", "ctypes.", "pty.")
    changing = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown",
                "os.utime", "shutil.")

    def outside(path) -> bool:
        return isinstance(path, (str, bytes)) and not (os.path.realpath(os.fsdecode(path)) + os.sep).startswith(root)

    def refuse(event: str, arguments: tuple) -> None:
        if event.startswith(families):
            raise PermissionError(f"{event} is not allowed in the sandbox")
        if event.startswith(changing) and any(outside(argument) for argument in arguments[:2]):
            raise PermissionError(f"{event} is not allowed outside the sandbox's folder")
        if event == "open" and len(arguments) == 3 and isinstance(arguments[2], int):
            if arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC) and outside(arguments[0]):
                raise PermissionError("writing is not allowed outside the sandbox's folder")

    sys.addaudithook(refuse)
