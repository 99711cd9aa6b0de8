"""Programs that try to get out of the sandbox: each prints `through` where it has.

A control shows that it can: the same program without the sandbox, or with other limits. Where that needs root (`root`) or what not every
machine has (`perhaps`), it is tried only there. Words in capitals are replaced by what a test has ready: SECRET, a file that everybody may
read; FOLDER, its folder; PORT and NAME, servers on this machine; PID, of the tests.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Attack(NamedTuple):
    name: str
    source: str
    control: str = "unprotected"
    """`unprotected`, `root` or `perhaps`: without the sandbox; `loose`: with the limits in `loose`."""
    limit: str | None = None
    """Which limit ends it, where one has to."""
    loose: dict[str, Any] | None = None
    """Limits under which it comes through."""


_IMPORTS = "import ctypes, os, resource, signal, socket, sys, time\narm = os.uname().machine == 'aarch64'"


def tries(body: str) -> str:
    """A program that is through where nothing is raised."""
    lines = "\n".join("    " + line for line in body.strip().splitlines())
    return f"{_IMPORTS}\ntry:\n{lines}\n    print('through')\nexcept Exception as error:\n    print('held', error)\n"


def calls(expression: str) -> str:
    """A program that is through where a call of the C library, or of the kernel, does not fail."""
    return tries(f"libc = ctypes.CDLL(None, use_errno=True)\nif ({expression}) == -1:\n    raise OSError(ctypes.get_errno(), 'refused')")


FILES = [
    Attack("reads a file of the system", tries("open('/etc/passwd').read()")),
    Attack("reads a file of the user", tries("open('SECRET').read()")),
    Attack("lists the folder of a user", tries("assert os.listdir('FOLDER')")),
    Attack("reads the kit's settings", tries("open('ROOT/pyproject.toml').read()")),
    Attack("imports the kit", tries("sys.path.insert(0, 'ROOT')\nimport distill")),
    Attack("writes beside the user's files", tries("open('FOLDER/written', 'w').write('x')")),
    Attack(
        "links to a file by name",
        tries("os.symlink('SECRET', 'FOLDER/l' if os.path.exists('FOLDER') else '/tmp/l')\nopen('SECRET').read()"),
    ),
    Attack("links to a file for good", tries("os.link('SECRET', 'FOLDER/h' if os.path.exists('FOLDER') else '/tmp/h')")),
    Attack("goes up from its folder", tries("os.chdir('/' + '../' * 20)\nopen('./SECRET').read()")),
    Attack("reads by /proc/self/root", tries("open('/proc/self/root/SECRET').read()")),
    Attack("reads by the root of another process", tries("open('/proc/PID/root/SECRET').read()"), "root"),
    Attack("reads the environment of the tests", tries("open('/proc/PID/environ').read()")),
    Attack("lists processes", tries("assert [name for name in os.listdir('/proc') if name.isdigit()]")),
    Attack("reads its mounts", tries("open('/proc/self/mountinfo').read()")),
    Attack("reads memory by /proc", tries("open('/proc/self/mem', 'rb')")),
    Attack("changes the interpreter", tries("assert os.access(os.path.dirname(os.__file__), os.W_OK)"), "root"),
    Attack("changes what watches over it", tries("from inside import confine\nassert os.access(confine.__file__, os.W_OK)"), "root"),
    Attack("writes at the top", tries("assert os.access('/', os.W_OK)"), "root"),
    Attack("writes in /dev", tries("open('/dev/NAME', 'w')\nos.unlink('/dev/NAME')"), "root"),
    Attack("reads the kernel's log", tries("open('/dev/kmsg', 'rb')"), "perhaps"),
    Attack(
        "makes a device",
        tries("import stat\nos.mknod('/tmp/NAME', stat.S_IFCHR | 0o600, os.makedev(1, 1))\nos.unlink('/tmp/NAME')"),
        "root",
    ),
    Attack("opens a terminal", tries("os.openpty()")),
]

NETWORK = [
    Attack("connects to a server here", tries("socket.create_connection(('127.0.0.1', PORT), timeout=5)")),
    Attack("sends a datagram", tries("socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 9))")),
    Attack("opens a port", tries("socket.create_server(('127.0.0.1', 0))")),
    Attack("takes IPv6", tries("socket.socket(socket.AF_INET6, socket.SOCK_STREAM)"), "perhaps"),
    Attack("connects by an abstract name", tries("socket.socket(socket.AF_UNIX).connect('\\0NAME')")),
    Attack("connects by a path", tries("socket.socket(socket.AF_UNIX).connect('FOLDER/s')")),
    Attack("asks the kernel for interfaces", tries("socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)")),
    Attack("talks to the host of the machine", tries("socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)"), "perhaps"),
    Attack("takes the kernel's ciphers", tries("socket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET)"), "perhaps"),
    Attack("reads packets", tries("socket.socket(socket.AF_PACKET, socket.SOCK_RAW)"), "perhaps"),
]

_FORKS = """
import os, time
children = []
try:
    for _ in range(60):
        if (child := os.fork()) == 0:
            time.sleep(60)
            os._exit(0)
        children.append(child)
    print("through")
except OSError as error:
    print("held", error)
for child in children:
    os.kill(child, 9)
"""
_THREADS = """
import threading
over = threading.Event()
try:
    for _ in range(60):
        threading.Thread(target=over.wait).start()
    print("through")
except RuntimeError as error:
    print("held", error)
over.set()
"""

_BPF = """
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall(280 if arm else 321, 0, bytes(72), 72)
assert ctypes.get_errno() != 1
"""

PROCESSES = [
    Attack("forks", _FORKS, "loose", loose={"processes": 100, "memory_mib": 2048}),
    Attack("starts threads", _THREADS, "loose", loose={"processes": 100, "memory_mib": 2048}),
    Attack("signals who started it", tries("os.kill(os.getppid(), 0)")),
    Attack("signals the tests", tries("os.kill(PID, 0)")),
    Attack("signals all", tries("os.kill(-1, 0)")),
    Attack("watches who started it", tries("os.pidfd_open(os.getppid())")),
    Attack("is traced", calls("libc.ptrace(0, 0, 0, 0)")),
    Attack("reads the memory of another", calls("libc.syscall(270 if arm else 310, PID, 0, 0, 0, 0, 0)"), "root"),
    Attack("becomes root", tries("os.setuid(0)"), "root"),
    Attack("becomes somebody else", tries("os.setresuid(65534, 65534, 65534)"), "root"),
    Attack("may gain rights", tries("assert ctypes.CDLL(None).prctl(39, 0, 0, 0, 0) == 0")),
    Attack("goes before others", tries("os.setpriority(os.PRIO_PROCESS, 0, -5)"), "root"),
    Attack("raises its limits", tries("resource.setrlimit(resource.RLIMIT_AS, (-1, -1))"), "perhaps"),
    Attack("makes a namespace of users", calls("libc.unshare(0x10000000)"), "perhaps"),
    Attack("clones into a namespace", calls("libc.syscall(220 if arm else 56, 0x10000000 | 17, 0, 0, 0, 0) or os._exit(0)"), "perhaps"),
    Attack("mounts", tries("libc = ctypes.CDLL(None, use_errno=True)\nlibc.mount(0, 0, 0, 0, 0)\nassert ctypes.get_errno() != 1"), "root"),
    Attack("changes its root", tries("os.chroot('/')"), "root"),
    Attack("asks io_uring for it", calls("libc.syscall(425, 1, bytes(120))"), "perhaps"),
    Attack("loads a program into the kernel", tries(_BPF), "perhaps"),
]

_FAMILY = """
import os, time
for _ in range(6):
    if os.fork() == 0:
        held = b"x" * (80 << 20)
        time.sleep(60)
        os._exit(0)
time.sleep(1)
print("through", flush=True)
os._exit(0)
"""
_MANY_FILES = """
for number in range(40000):
    open(f"/tmp/{number}", "w").close()
import time
time.sleep(0.2)
print("through")
"""
_IN_PARTS = tries("""
for number in range(4):
    with open(f"/tmp/{number}", "wb", buffering=0) as file:
        assert file.write(bytes(1 << 20)) == 1 << 20
""")
_SYSTEM_V = "libc.shmctl(libc.shmget(0, 4096, 0o1600), 0, 0)"

RESOURCES = [
    Attack("takes memory at once", tries("x = bytearray(400 << 20)"), "loose", loose={"memory_mib": 1024}),
    Attack("takes memory bit by bit", tries("x = [bytearray(1 << 20) for _ in range(400)]"), "loose", loose={"memory_mib": 1024}),
    Attack("takes memory without pages", tries("import mmap\nx = mmap.mmap(-1, 400 << 20)"), "loose", loose={"memory_mib": 1024}),
    Attack("takes memory in a family", _FAMILY, "loose", "too_much_memory", {"memory_mib": 1024}),
    Attack("takes memory without an owner", tries("os.memfd_create('x')")),
    Attack("takes memory of System V", calls(_SYSTEM_V)),
    Attack("leaves a key with the kernel", calls("libc.syscall(217 if arm else 248, b'user', b'x', b'x', 1, -2)"), "perhaps"),
    Attack("locks memory", calls("libc.mlock(ctypes.create_string_buffer(1 << 20), 1 << 20)"), "root"),
    Attack(
        "writes a large file",
        tries("assert open('/tmp/x', 'wb', buffering=0).write(bytes(2 << 20)) == 2 << 20"),
        "loose",
        loose={"files_mib": 8},
    ),
    Attack("writes several files", _IN_PARTS, "loose", loose={"files_mib": 8}),
    Attack(
        "writes to shared memory",
        tries("assert open('/dev/shm/x', 'wb', buffering=0).write(bytes(2 << 20)) == 2 << 20"),
        "loose",
        loose={"files_mib": 8},
    ),
    Attack("writes files without end", _MANY_FILES, "loose", "too_many_files", {"inodes": 100_000}),
    Attack("opens files without end", tries("x = [open('/dev/null') for _ in range(500)]"), "perhaps"),
    Attack("prints without end", "for _ in range(300): print('x' * 9999)\nprint('through')", "loose", "too_much_output", {"output_mib": 8}),
]

_CLOSED = "import os, time\nos.dup2(os.open('/dev/null', os.O_RDWR), 1)\nos.close(0)\nwhile True: time.sleep(60)"
_DEAF = """
import signal
for number in range(1, 65):
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
while True:
    pass
"""
CHILDREN = "import os, time\nfor _ in range(3):\n    if os.fork() == 0:\n        os.setsid()\n        while True: pass\nos.wait()"
_THREAD = "import threading\ndef loop():\n    while True: pass\nthreading.Thread(target=loop).start()"

TIME = [
    Attack("loops", "while True: pass", limit="timed_out"),
    Attack("computes in C", "x = 9 ** 9 ** 9", limit="timed_out"),
    Attack("matches for ever", "import re\nre.match('(a*)*b', 'a' * 60)", limit="timed_out"),
    Attack("sleeps", "import time\ntime.sleep(10 ** 6)", limit="timed_out"),
    Attack("stops itself", "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)", limit="timed_out"),
    Attack("hears no signal", _DEAF, limit="timed_out"),
    Attack("closes what is read", _CLOSED, limit="timed_out"),
    Attack("waits for its children", CHILDREN, limit="timed_out"),
    Attack("goes on in a thread", _THREAD, limit="timed_out"),
    Attack("waits for input", "import os\nr, w = os.pipe()\nos.read(r, 1)", limit="timed_out"),
]
