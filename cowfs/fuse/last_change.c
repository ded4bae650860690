/* Remembers the last change, for observer.py. Most changes are by the same process to the same file as the one before,
 * and need not be reported again.
 */
#define _GNU_SOURCE
#include "last_change.h"

#include <fcntl.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>

#include "clock.h"
#include "last_request.h"

static struct {
	uint64_t ino, begun, last; /* ns */
	uint32_t pid, uid;
	long known; /* what has changed since: the IS_ bits */
} noted;

enum { IS_WRITE = 1, IS_CHMOD = 2, IS_CHOWN = 4, IS_UTIMES = 8, IS_SAME = 16 };

/* The command line of the process, which it loses when it ends or executes another program. */
enum { LONGEST_COMMAND = 4096 };
static int commanding = -1;
static char command[LONGEST_COMMAND];
static ssize_t command_size;

/* Within this time, in ns, the process is assumed to be the same. */
enum { SOON = 100 * 1000, A_WHILE = 10 * 1000 * 1000 };

void last_change_request(uint32_t pid, uint64_t now)
{
	if (pid && pid == noted.pid && now - noted.last < SOON)
		noted.last = now;
}

/* Whether the process is still the one that was noted. */
static bool is_same(void)
{
	char now_is[LONGEST_COMMAND];
	uint64_t now = (uint64_t)monotonic_ns();
	bool soon = now - noted.last < SOON && now - noted.begun < A_WHILE;
	noted.last = now;
	if (soon)
		return true;
	noted.begun = now;
	if (command_size > 0 && pread(commanding, now_is, sizeof now_is, 0) == command_size &&
	    !memcmp(now_is, command, (size_t)command_size))
		return true;
	noted.pid = 0; /* so that the next call also says no */
	return false;
}

static PyObject *identify(PyObject *self, PyObject *args)
{
	const char *content;
	Py_ssize_t size;
	int fd;

	(void)self;
	if (!PyArg_ParseTuple(args, "iy#", &fd, &content, &size))
		return NULL;
	if (commanding >= 0)
		close(commanding);
	commanding = fd >= 0 && size <= LONGEST_COMMAND ? fcntl(fd, F_DUPFD_CLOEXEC, 0) : -1;
	command_size = commanding >= 0 ? size : 0;
	memcpy(command, content, (size_t)command_size);
	Py_RETURN_NONE;
}

static PyObject *note(PyObject *self, PyObject *args)
{
	unsigned long long ino;
	unsigned pid, uid;

	(void)self;
	if (!PyArg_ParseTuple(args, "KII", &ino, &pid, &uid))
		return NULL;
	long before = noted.known;
	bool same = pid && noted.pid == pid && noted.uid == uid && is_same();
	noted.ino = ino;
	noted.pid = pid;
	noted.uid = uid;
	noted.known = 0;
	return PyLong_FromLong(before | (same ? IS_SAME : 0));
}

void last_change_wrote(uint64_t ino)
{
	if (noted.ino == ino)
		noted.known |= IS_WRITE;
}

static PyObject *wrote(PyObject *self, PyObject *args)
{
	unsigned long long ino;

	(void)self;
	if (!PyArg_ParseTuple(args, "K", &ino))
		return NULL;
	last_change_wrote(ino);
	Py_RETURN_NONE;
}

static PyObject *noted_changes(PyObject *self, PyObject *args)
{
	(void)self, (void)args;
	return PyLong_FromLong(noted.known);
}

long last_change_goes_on(void)
{
	enum { FATTR_MODE = 1, FATTR_OWNER = 6, FATTR_SIZE = 8, FATTR_TIMES = 48 };
	long found = 0;

	if (!last_request || !noted.ino || request_word(PID) != noted.pid || request_word(UID) != noted.uid)
		return -1;
	if (request_inode() != noted.ino || !is_same())
		return -1;
	if (request_word(OPCODE) == FUSE_WRITE)
		return IS_WRITE & ~noted.known;
	if (request_word(OPCODE) != FUSE_SETATTR || request_word(BODY) & FATTR_SIZE)
		return -1;
	found = request_word(BODY) & FATTR_OWNER   ? IS_CHOWN
		: request_word(BODY) & FATTR_MODE  ? IS_CHMOD
		: request_word(BODY) & FATTR_TIMES ? IS_UTIMES
						   : 0;
	found &= ~noted.known;
	noted.known |= found;
	return found;
}

static PyObject *goes_on(PyObject *self, PyObject *args)
{
	(void)self, (void)args;
	return PyLong_FromLong(last_change_goes_on());
}

PyMethodDef last_change_methods[] = {
	{ "note", note, METH_VARARGS,
	  "note(inode, pid, uid): record that a process has changed an inode; inode 0: by a change that goes_on() does\n"
	  "not know. Returns what changes() says of the inode before, and 16 if the same process made the last change." },
	{ "changes", noted_changes, METH_NOARGS,
	  "changes(): how the process has changed the inode since note(): the sum of 1 if it has written to it, 2 for a\n"
	  "mode, 4 for an owner, 8 for times." },
	{ "identify", identify, METH_VARARGS,
	  "identify(fd, command): set the command line of the last noted process, and the file it is read from; -1: none." },
	{ "goes_on", goes_on, METH_NOARGS,
	  "goes_on(): whether the last request is a change of the inode last passed to note(), by the same process: what it\n"
	  "adds to changes(), which has it from now on, a write only after wrote(); else -1." },
	{ "wrote", wrote, METH_VARARGS, "wrote(inode): record that the write reported by goes_on() has succeeded." },
	{ NULL, NULL, 0, NULL },
};
