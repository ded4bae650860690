"""The control socket belongs to the owner of the mount: nobody takes its name, or answers in its place."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from cowfs.client import Patience, Silent, find_mount, mount_with_store
from cowfs.linux.sockets import control_listener
from tests.support.mounts import cowfs, eventually, force_umount, is_mounted, mounted
from tests.support.system import CONTROL, NOBODY, needs_fuse, needs_root, run

pytestmark = [needs_fuse, needs_root]

STRANGER = 65533


@pytest.fixture
def lower(nobody_path: Path) -> Path:
    made = nobody_path / "lower"
    made.mkdir()
    (made / "file").write_text("content")
    return made


def as_stranger(script: str, *arguments: str) -> subprocess.Popen[str]:
    """Start a Python script as another ordinary user; return when it has printed a line."""
    prefix = ["setpriv", f"--reuid={STRANGER}", f"--regid={STRANGER}", "--clear-groups", "--"]
    process = subprocess.Popen(
        [*prefix, sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


LISTEN = """
import os, socket, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1].replace("@", chr(0), 1))
listener.listen(8)
print("ready", flush=True)
while True:
    connection, _ = listener.accept()
    message, fds, _, _ = socket.recv_fds(connection, 65536, 8)
    connection.sendall(b'{"pid": 1, "taken": true}\\n{"end": true}\\n')
"""


@contextmanager
def impostor(address: str) -> Iterator[None]:
    process = as_stranger(LISTEN, address)
    try:
        yield
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def test_names_that_anybody_can_take_are_not_asked(lower: Path, nobody_path: Path) -> None:
    """Abstract addresses have no owner: an impostor there, with the number of the mount, hears nothing."""
    with mounted(lower, nobody_path / "mnt") as here:
        found = find_mount(str(here.path))
        assert found is not None
        with impostor(f"@cowfs-{found.dev}"):
            assert '"taken"' not in cowfs("info", here.path, "--json", check=True).stdout


@pytest.mark.parametrize("mode", [0o755, 0o777])
def test_a_directory_that_a_stranger_has_made_is_refused(lower: Path, nobody_path: Path, mode: int) -> None:
    """Neither the daemon nor a client uses a runtime directory that another user has made."""
    runtime = nobody_path / "runtime"
    runtime.mkdir(mode=0o755)
    os.chown(runtime, NOBODY, NOBODY)
    (runtime / "cowfs").mkdir()
    os.chown(runtime / "cowfs", STRANGER, STRANGER)
    os.chmod(runtime / "cowfs", mode)
    (nobody_path / "mnt").mkdir()
    os.chown(nobody_path / "mnt", NOBODY, NOBODY)
    with mounted(lower, nobody_path / "mnt", nobody=True) as here:
        found = find_mount(str(here.path))
        assert found is not None
        with impostor(f"{runtime}/cowfs/{found.dev}"):
            shown = cowfs(
                "info", here.path, "--json", nobody=True, env={"XDG_RUNTIME_DIR": str(runtime)}, check=True
            )
        assert '"taken"' not in shown.stdout


def test_a_mount_whose_socket_a_stranger_could_replace_fails(lower: Path, nobody_path: Path) -> None:
    taken = Path("/tmp/cowfs-65532")
    taken.mkdir(mode=0o755)
    try:
        os.chown(taken, STRANGER, STRANGER)
        mountpoint = nobody_path / "mnt"
        mountpoint.mkdir()
        os.chown(mountpoint, 65532, 65532)
        done = run(
            "setpriv", "--reuid=65532", "--regid=65532", "--clear-groups", "--", sys.executable, "-m",
            "cowfs.cli.main", "mount", lower, mountpoint, check=False,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        )  # fmt: skip
        assert done.returncode == 2, done
        assert f"{taken}: cannot create the control socket" in done.stderr
        assert not is_mounted(mountpoint)
    finally:
        taken.rmdir()


_DEEP = b'{"command": ' + b"[" * 20_000 + b"]" * 20_000 + b"}\n"


def test_requests_that_are_none_are_refused(lower: Path, nobody_path: Path) -> None:
    with mounted(lower, nobody_path / "mnt") as here:
        found = find_mount(str(here.path))
        assert found is not None
        for garbage in (
            b"",
            b"\n",
            b"garbage\n",
            b"[1, 2]\n",
            b'{"command": []}\n',
            b"\xff\n",
            b"{" * 70000,
            _DEEP,
        ):
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(f"/run/cowfs/{found.dev}")
                client.sendall(garbage)
                client.shutdown(socket.SHUT_WR)
                with suppress(ConnectionResetError):  # it has not read all of it
                    assert b'"error"' in client.makefile("rb").read()
        assert here.pid() > 0


@pytest.mark.parametrize("nobody", [False, True], ids=["root", "nobody"])
def test_only_the_owner_can_touch_the_socket(lower: Path, nobody_path: Path, nobody: bool) -> None:
    with mounted(lower, nobody_path / "mnt", nobody=nobody) as here:
        found = find_mount(str(here.path))
        assert found is not None
        directory = Path(CONTROL[NOBODY if nobody else 0])
        above, socket_ = directory.stat(), (directory / found.dev).stat()
        assert {above.st_uid, socket_.st_uid} == {NOBODY if nobody else 0}
        assert stat.S_IMODE(above.st_mode) & 0o022 == 0 and stat.S_IMODE(socket_.st_mode) == 0o600
        place = directory / found.dev
    assert not place.exists(), "a socket is left behind"


def test_strangers_are_told_whose_the_mount_is(lower: Path, nobody_path: Path) -> None:
    with mounted(lower, nobody_path / "mnt") as here:
        done = cowfs("info", here.path, nobody=True)
        assert done.returncode != 0 and "belongs to another user (uid 0)" in done.stderr


def test_no_file_of_roots_is_handed_to_a_users_daemon(lower: Path, nobody_path: Path) -> None:
    with mounted(lower, nobody_path / "mnt", nobody=True) as here:
        done = cowfs("persist", here.path, nobody_path / "kept.bs", "64")
        assert done.returncode != 0 and "who gets none of your files" in done.stderr
        assert not (nobody_path / "kept.bs").exists()


def test_root_unmounts_what_is_a_users(lower: Path, nobody_path: Path) -> None:
    """Without handing anything over; the daemon is asked to save all the same."""
    with mounted(lower, nobody_path / "mnt", nobody_path / "store", nobody=True) as here:
        pid = here.pid()
        assert cowfs("umount", here.path).returncode == 0
        assert not is_mounted(here.path)
        eventually(lambda: not Path(f"/proc/{pid}").exists(), "the daemon has ended")
    assert not here.trouble()


def test_what_a_killed_daemon_left_is_replaced(lower: Path, nobody_path: Path) -> None:
    with mounted(lower, nobody_path / "mnt", quiet=False) as here:
        found = find_mount(str(here.path))
        assert found is not None
        dead = Path("/run/cowfs", found.dev)
        os.kill(here.pid(), signal.SIGKILL)
        eventually(lambda: not _listens(dead), "the daemon is gone")
        force_umount(here.path)
    assert dead.exists(), "a killed process removes nothing; or the test looks in the wrong place"
    for again in range(50):  # until the kernel gives the same number
        with mounted(lower, nobody_path / f"again{again}") as here:
            now = find_mount(str(here.path))
            assert now is not None
            assert here.pid() > 0
            if now.dev == found.dev:
                return
    pytest.skip("the number of the killed mount was not given again")


def test_the_socket_of_a_daemon_that_has_not_ended_yet_is_replaced(tmp_path: Path) -> None:
    """The kernel gives the number of a mount that is gone to the next, whose daemon may come before that."""
    directory = os.open(tmp_path, os.O_RDONLY)
    place = tmp_path / "0:99"
    try:
        with ExitStack() as first:
            first.enter_context(control_listener(directory, "0:99"))
            with control_listener(directory, "0:99") as second:
                first.close()
                with socket.socket(socket.AF_UNIX) as client:
                    client.connect(str(place))
                    second.accept()[0].close()
            assert not place.exists()
    finally:
        os.close(directory)


def _killed(lower: Path, mountpoint: Path, *, nobody: bool, stays: bool) -> Path:
    """The socket of a daemon that was killed, whose mount *stays* or was taken away by umount(8)."""
    with mounted(lower, mountpoint, nobody=nobody, quiet=False) as here:
        found = find_mount(str(here.path))
        assert found is not None
        dead = Path(CONTROL[NOBODY if nobody else 0], found.dev)
        os.kill(here.pid(), signal.SIGKILL)
        eventually(lambda: not _listens(dead), "the daemon is gone")
        if stays:
            done = cowfs("info", here.path, nobody=nobody)
            assert done.returncode == 32 and "is dead" in done.stderr and "cowfs umount" in done.stderr
            # Other mounts come meanwhile: it is still said of this one that it is dead.
            with mounted(lower, nobody_path_of(mountpoint), nobody=nobody):
                assert cowfs("info", here.path, nobody=nobody).stderr == done.stderr
        run("umount", "-i", here.path)
    assert dead.is_socket()
    return dead


def nobody_path_of(mountpoint: Path) -> Path:
    return mountpoint.with_name(f"{mountpoint.name}-beside")


@pytest.mark.parametrize("nobody", [False, True])
def test_the_next_mount_clears_away_what_killed_daemons_left(
    lower: Path, nobody_path: Path, nobody: bool
) -> None:
    """Sockets of mounts that are no more, and nothing else that is there."""
    with mounted(lower, nobody_path / "lives", nobody=nobody) as lives, ExitStack() as stack:
        dead = _killed(lower, nobody_path / "dead", nobody=nobody, stays=True)
        beside = [dead.with_name(f"99:{number}") for number in range(3)]
        for path in beside:
            stack.callback(path.unlink, missing_ok=True)
        beside[0].write_text("no socket")
        uid = NOBODY if nobody else 0
        slow, unheard, other = (stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(3))
        slow.bind(str(beside[1]))
        slow.listen(0)
        unheard.connect(str(beside[1]))
        other.bind(str(beside[2]))
        other.listen(8)
        other.setblocking(False)
        for path in beside:
            os.chown(path, uid, uid)
        gone = False
        for number in range(20):  # while another's mount has the number of the dead one, its socket stays
            with mounted(lower, nobody_path / f"next{number}", nobody=nobody) as here:
                gone = not dead.exists() or _listens(dead)  # that of a new mount with its number
                assert all(path.exists() for path in beside)
                assert not list(dead.parent.glob("dead-*")) and not list(dead.parent.glob("new-*"))
                assert lives.pid() > 0 and here.pid() > 0
            if gone:
                break
        assert gone
        with pytest.raises(BlockingIOError):  # a daemon whose mount is elsewhere was not disturbed
            other.accept()


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


# --- daemons that lie

LIE = """
import json, os, socket, sys
place, answers = sys.argv[1], json.loads(sys.argv[2])
os.unlink(place)
listener = socket.socket(socket.AF_UNIX)
listener.bind(place)
listener.listen(8)
print("ready", flush=True)
while True:
    connection, _ = listener.accept()
    message, fds, _, _ = socket.recv_fds(connection, 65536, 8)
    if not message:  # who only wants to know whether somebody answers
        connection.close()
        continue
    command = json.loads(message)["command"]
    try:
        connection.sendall(answers.get(command, answers.get("*", "")).encode() + b'{"end": true}\\n')
    except OSError:
        pass
    connection.close()
    if fds and sys.argv[3] != "0":
        print("got a descriptor", flush=True)
"""


@contextmanager
def lying(mountpoint: Path, uid: int, answers: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """Replace the daemon of a mount by one of the same user that gives these answers."""
    found = find_mount(str(mountpoint))
    assert found is not None
    place = f"{CONTROL[uid]}/{found.dev}"
    os.rename(place, f"{place}-real")
    Path(place).touch()
    os.chown(place, uid, uid)
    prefix = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--"]
    process = subprocess.Popen(
        [*prefix, sys.executable, "-c", LIE, place, json.dumps(answers), str(uid)],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        rest = process.stdout.read()
        process.stdout.close()
        os.rename(f"{place}-real", place)
    assert "got a descriptor" not in rest


ODD = [
    "[1, 2]\n",
    "null\n",
    '"text"\n',
    "{" * 100_000 + "\n",
    "[" * 100_000 + "\n",
    '{"pid": "1", "mountpoint": 7}\n',
    '{"pid": 1, "mountpoint": "/", "store": []}\n',
    '{"pid": 1e999, "mountpoint": "/", "store": {"kind": "image", "path": "/"}}\n',
    '{"pid": 1, "mountpoint": "\\u001b[2J", "store": {"kind": "image", "path": "\\u202e"}, "lowers": 5}\n',
    '{"pid": -1, "mountpoint": "/", "store": {"kind": "image", "path": "/", "size": "x", "free": null}}\n',
    '{"change": 5}\n',
    '{"change": {"path": []}}\n',
    '{"said": ["\\u001b"]}\n{"change": {}}\n',
    '{"error": {"a": "\\u001b[2J"}, "hint": 5, "exit_code": 0}\n',
    '{"error": "", "exit_code": "0"}\n',
    '{"error": "no", "exit_code": 256}\n',
]


@pytest.mark.slow
def test_nonsense_of_another_users_daemon_is_an_error(lower: Path, nobody_path: Path) -> None:
    """The error has no traceback, is never a success, and takes bounded time and memory."""
    with mounted(lower, nobody_path / "mnt", nobody=True, quiet=False) as here:
        for odd in ODD:
            with lying(here.path, NOBODY, {"*": odd}):
                for command in (["info"], ["diff"]):
                    done = cowfs(*command, here.path)
                    silent = "error" not in odd and (command[-1] == "diff" or '"change"' in odd)
                    assert done.returncode or (silent and not done.stderr.startswith("Trace")), (odd, done)
                    assert "Traceback" not in done.stderr and done.stderr.count("\n") <= 2, (odd, done)
                    assert (done.stdout + done.stderr).replace("\n", "").isprintable()


ENDLESS = """
import os, socket, sys
os.unlink(sys.argv[1])
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen(8)
print("ready", flush=True)
connection, _ = listener.accept()
while True:
    connection.sendall(b"x" * 65536)
"""


def test_an_endless_answer_ends(lower: Path, nobody_path: Path) -> None:
    with mounted(lower, nobody_path / "mnt", nobody=True, quiet=False) as here:
        found = find_mount(str(here.path))
        assert found is not None
        place = f"{CONTROL[NOBODY]}/{found.dev}"
        os.rename(place, f"{place}-real")
        prefix = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--"]
        Path(place).touch()
        os.chown(place, NOBODY, NOBODY)
        command = [*prefix, sys.executable, "-c", ENDLESS, place]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as talker:
            assert talker.stdout is not None and talker.stdout.readline() == "ready\n"
            bounded = ["prlimit", f"--as={600 << 20}", "--"]
            done = run(*bounded, sys.executable, "-m", "cowfs", "info", here.path, check=False)
            talker.kill()
        os.rename(f"{place}-real", place)
        assert done.returncode == 32 and "the daemon sent an invalid reply" in done.stderr, done


def test_the_pid_is_the_kernels_word(lower: Path, nobody_path: Path) -> None:
    """Root waits for the one who answered, not for whom it names, and looks at no other's memory."""
    with mounted(lower, nobody_path / "mnt", nobody=True, quiet=False) as here:
        info = {"pid": 1, "mountpoint": str(here.path), "store": {"kind": "memory", "path": "memory"}}
        with lying(here.path, NOBODY, {"*": json.dumps(info) + "\n"}) as process:
            from cowfs.client import facts_of

            found = find_mount(str(here.path))
            assert found is not None
            child = facts_of(found.dev)["pid"]
            assert child == process.pid


def kept(mountpoint: Path, path: str) -> dict[str, str]:
    store = {"kind": "memory", "path": path, "uuid": "none"}
    info = {"pid": 1, "mountpoint": str(mountpoint), "store": store}
    done = '{"said": "copying"}\n{"size": 16777216}\n'
    return {"info": json.dumps(info) + "\n", "persist": done, "grow": done}


@pytest.mark.parametrize("there", ["nothing", "a link", "a directory", "another store", "half a store"])
def test_persist_looks_at_what_it_reports(lower: Path, nobody_path: Path, tmp_path: Path, there: str) -> None:
    """The daemon says that all is kept, and it is not."""
    place = tmp_path / "kept.bs"
    with mounted(lower, nobody_path / "mnt", quiet=False) as here:
        if there != "nothing":
            cowfs("create", tmp_path / "other.bs", "16", check=True)
        if there == "a link":
            place.symlink_to(tmp_path / "other.bs")
        elif there == "a directory":
            place.mkdir()
        elif there != "nothing":
            (tmp_path / "other.bs").rename(place)
        if there == "half a store":
            os.truncate(place, 8 << 20)
        with lying(here.path, 0, kept(here.path, "memory")):
            done = cowfs("persist", here.path, place)
        assert done.returncode == 32 and done.stderr.count("\n") == 1, done
        assert "changes are now kept" not in done.stdout


def test_grow_looks_at_what_it_reports(lower: Path, nobody_path: Path, tmp_path: Path) -> None:
    store = tmp_path / "store.bs"
    cowfs("create", store, "16", check=True)
    with mounted(lower, nobody_path / "mnt", store, quiet=False) as here:
        facts = json.loads(cowfs("info", here.path, "--json", check=True).stdout)
        answers = {"info": json.dumps(facts) + "\n", "grow": f'{{"size": {32 << 20}}}\n'}
        with lying(here.path, 0, answers):
            for named in (here.path, store):
                done = cowfs("grow", named, "32")
                assert done.returncode == 32 and "differs from what the daemon" in done.stderr, done
        assert cowfs("grow", here.path, "32", check=True).stdout.endswith("resized to 32 MiB\n")
        assert cowfs("grow", store, "48", check=True).stdout.endswith("resized to 48 MiB\n")


@pytest.mark.parametrize(
    "told",
    [
        "[]",
        '{"operations": [], "under_way": [], "direct_reads": 0}',
        '{"operations": {"READ": {}}, "under_way": [], "direct_reads": 0}',
        '{"operations": {}, "under_way": [], "direct_reads": -1}',
        '{"operations": {}, "under_way": [], "direct_reads": NaN}',
        '{"operations": {}, "under_way": [], "direct_reads": 1e400}',
        f'{{"operations": {{}}, "under_way": [], "direct_reads": {1 << 64}}}',
        '{"operations": {}, "under_way": [{"operation": "READ", "ns": "long"}], "direct_reads": 0}',
        '{"operations": {"READ": {"count": 1, "errors": 0, "total_ns": 1, "durations_ns": [[1, 2]]}}, '
        '"under_way": [], "direct_reads": 0}',
    ],
)
def test_figures_that_make_no_sense(lower: Path, nobody_path: Path, told: str) -> None:
    with mounted(lower, nobody_path / "mnt", quiet=False) as here:
        facts = json.loads(cowfs("info", here.path, "--json", check=True).stdout)
        line = json.dumps({**facts, "requests": "HERE"}).replace('"HERE"', told)
        with lying(here.path, 0, {"info": f"{line}\n"}):
            for command in (["top", "-n", "1"], ["top", "-n", "1", "--json"], ["info"]):
                done = cowfs(*command, here.path)
                assert done.returncode == 32 and done.stdout == "", done
                assert done.stderr.startswith(f"cowfs: {here.path}: the daemon sent an invalid reply (")


def test_figures_are_data(lower: Path, nobody_path: Path) -> None:
    """Names that drive a terminal, one that is long, and more of all than can be."""
    with mounted(lower, nobody_path / "mnt", quiet=False) as here:
        facts = json.loads(cowfs("info", here.path, "--json", check=True).stdout)
        most = (1 << 64) - 1
        much = {"count": most, "errors": most, "total_ns": most, "durations_ns": [[0, most, most]]}
        names = ["\x1b[31mREAD", "LONG" * 5000, *(f"OP{number}" for number in range(300))]
        facts["requests"]["operations"] = dict.fromkeys(names, much)
        facts["requests"]["under_way"] = [{"operation": "\x1b[31mOPEN\n", "ns": most}]
        facts |= {"transport": "\x1b[31mby\n", "caches": {"\x1b[31m\r": {"hits": most, "misses": 1}}}
        with lying(here.path, 0, {"info": json.dumps(facts) + "\n"}):
            done = cowfs("top", "-n", "1", here.path, check=True)
        assert "\x1b" not in done.stdout and "\r" not in done.stdout
        assert "\n\\x1b[31mREAD " in done.stdout and "under way, \\x1b[31mOPEN\\n, for " in done.stdout
        assert len(done.stdout) < 200_000


def test_whose_store_it_is_no_daemon_says(lower: Path, nobody_path: Path, tmp_path: Path) -> None:
    """One of another user's that claims root's store does not keep root from using that."""
    store = tmp_path / "store.bs"
    cowfs("create", store, "16", check=True)
    with mounted(lower, nobody_path / "mnt", nobody=True, quiet=False) as here:
        info = {"pid": 1, "mountpoint": str(here.path), "store": {"kind": "image", "path": str(store)}}
        with lying(here.path, NOBODY, {"*": json.dumps(info) + "\n"}):
            assert mount_with_store(str(store)) is None
            assert cowfs("backup", store, tmp_path / "copy.bs").returncode == 0


def test_many_daemons_that_say_nothing(
    lower: Path, nobody_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user may have a thousand mounts: those of one take so long in all, whatever there are."""
    asked = []

    def never(dev: str, timeout: float) -> dict[str, object]:
        asked.append(timeout)
        clock[0] += timeout
        raise Silent("says nothing")

    clock = [0.0]
    monkeypatch.setattr("cowfs.client.facts_of", never)
    monkeypatch.setattr("cowfs.client.owner_of", lambda dev: NOBODY)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    patience = Patience(each=2.0, in_all=5.0)
    for _ in range(1000):
        with pytest.raises(Silent):
            patience.facts_of("0:1")
    assert asked == [2.0, 2.0, 1.0]
