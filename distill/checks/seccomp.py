"""Which system calls code in the sandbox may make: a filter for bubblewrap's `--seccomp`, as bytes (Linux on x86-64 and ARM64).

What the limits of a process don't count is refused (memory without an owner: memfd, System V, message queues, keys), and so is what
namespaces don't hold (vsock and other families of sockets) or what only attacks on the kernel need. Numbers: asm/unistd_64.h and
asm-generic/unistd.h; the form: linux/filter.h, linux/seccomp.h.
"""

from __future__ import annotations

import errno
import platform
import struct

_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_X32 = 0x40000000  # calls of the x32 form of x86-64, which have other numbers
_NEW_NAMESPACES = 0x7E020000  # any of clone's CLONE_NEW flags
_AF_UNIX = 1

# Names, then numbers on x86-64 and ARM64. From 424 on they are the same everywhere.
_REFUSED = {
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "memfd_create": (319, 279),
    "shmget": (29, 194),
    "shmctl": (31, 195),
    "shmat": (30, 196),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "kexec_load": (246, 104),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "syslog": (103, 116),
    "acct": (163, 89),
    "quotactl": (179, 60),
    "personality": (135, 92),
    "fanotify_init": (300, 262),
    "pidfd_send_signal": (424, 424),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "mount_setattr": (442, 442),
    "memfd_secret": (447, 447),
}
_CLONE, _CLONE3, _SOCKET = (56, 220), (435, 435), (41, 198)
_SIGNALS = ((62, 129), (200, 130), (234, 131), (129, 138), (297, 240))  # kill, tkill, tgkill, rt_sigqueueinfo, rt_tgsigqueueinfo

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data
_ALLOW, _KILL = 0x7FFF0000, 0x80000000

_Step = tuple[int, int, int, int]  # code, jump if true, jump if false, value


def seccomp_filter(machine: str | None = None) -> bytes | None:
    """The filter for a kind of machine as `platform.machine` calls it, by default this one; null where its numbers are not known."""
    machine = machine or platform.machine()
    if machine not in _ARCHITECTURES:
        return None
    column = list(_ARCHITECTURES).index(machine)
    steps: list[_Step] = [(_LOAD, 0, 0, _ARCHITECTURE), (_EQUAL, 1, 0, _ARCHITECTURES[machine]), _give(_KILL), (_LOAD, 0, 0, _NUMBER)]
    if machine == "x86_64":
        steps += [(_AT_LEAST, 0, 1, _X32), _give(_error(errno.ENOSYS))]
    for numbers in _REFUSED.values():
        steps += _on(numbers[column], [_give(_error(errno.EPERM))])
    # Its flags lie in memory, where no filter sees them; told that there is no such call, the C library takes clone.
    steps += _on(_CLONE3[column], [_give(_error(errno.ENOSYS))])
    steps += _on(
        _CLONE[column], [(_LOAD, 0, 0, _FIRST_ARGUMENT), (_ANY_BIT, 0, 1, _NEW_NAMESPACES), _give(_error(errno.EPERM)), _give(_ALLOW)]
    )
    refused = _give(_error(errno.EAFNOSUPPORT))
    steps += _on(_SOCKET[column], [(_LOAD, 0, 0, _FIRST_ARGUMENT), (_EQUAL, 1, 0, _AF_UNIX), refused, _give(_ALLOW)])
    for numbers in _SIGNALS:  # to the first process of the sandbox, or to all
        body = [(_LOAD, 0, 0, _FIRST_ARGUMENT), (_EQUAL, 1, 0, 1), (_EQUAL, 0, 1, 0xFFFFFFFF), _give(_error(errno.EPERM)), _give(_ALLOW)]
        steps += _on(numbers[column], body)
    steps.append(_give(_ALLOW))
    return b"".join(struct.pack("=HBBI", *step) for step in steps)


def _on(number: int, body: list[_Step]) -> list[_Step]:
    """Steps that are taken for one system call; each way through them ends in an answer."""
    return [(_EQUAL, 0, len(body), number), *body]


def _give(answer: int) -> _Step:
    return (_RETURN, 0, 0, answer)


def _error(number: int) -> int:
    return 0x00050000 | number
