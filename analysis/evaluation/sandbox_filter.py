"""The sandbox's system-call filter: which calls an untrusted program is refused, as a seccomp program.

sandbox.py sends it to the stage, which cannot import this module and applies it last before the program begins.
"""

from __future__ import annotations

import errno
import struct

# (x86_64, aarch64). Refused to the program: sockets of every family; memory that neither the address-space limit nor
# the tmpfs counts (memfd, System V shared memory, message queues, keys); everything that looks into or alters other
# processes, mounts or the kernel.
_REFUSED = {
    "socket": (41, 198),
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    "process_madvise": (440, 440),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "open_by_handle_at": (304, 265),
    "fanotify_init": (300, 262),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "personality": (135, 92),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "acct": (163, 89),
    "syslog": (103, 116),
    "quotactl": (179, 60),
}
_ANY_NAMESPACE = 0x7E020000  # CLONE_NEW flags: user, PID, mount, network, IPC, UTS, cgroup
_CLONE_CALL, _CLONE3 = (56, 220), 435
_AUDIT_ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
ARCHITECTURES = tuple(_AUDIT_ARCHITECTURE)


def filter_program(machine: str) -> bytes:
    """The filter for a machine of ARCHITECTURES as classic BPF, one struct (code u16, jt u8, jf u8, k u32) each."""
    column = ARCHITECTURES.index(machine)
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill, refuse, absent = 0x7FFF0000, 0x80000000, 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS
    numbers = sorted(pair[column] for pair in _REFUSED.values())
    rows = [(load, 0, 0, 4), (equal, 1, 0, _AUDIT_ARCHITECTURE[machine]), (give, 0, 0, kill), (load, 0, 0, 0)]
    rows += [(at_least, 0, 1, 0x40000000), (give, 0, 0, kill)]  # x32: other numbers for the same calls
    # its flags lie in memory, out of a filter's sight; libc then uses clone
    rows += [(equal, 0, 1, _CLONE3), (give, 0, 0, absent)]
    for number in numbers:
        rows += [(equal, 0, 1, number), (give, 0, 0, refuse)]
    rows += [
        (equal, 0, 3, _CLONE_CALL[column]),
        (load, 0, 0, 16),
        (any_bit, 0, 1, _ANY_NAMESPACE),
        (give, 0, 0, refuse),
        (give, 0, 0, allow),
    ]
    return b"".join(struct.pack("=HBBI", *row) for row in rows)
