/*
 * FUSE passthrough: the kernel itself reads, writes and maps files, without requests (Linux 6.9: fs/fuse/passthrough.c,
 * fs/fuse/iomode.c).
 *
 * An ioctl(2) lends a file to the kernel and returns a number, which the reply to an open contains. The kernel requires
 * the same number in the replies to all opens of an inode while it is open, and refuses it for an inode that is open
 * through the page cache. passthrough.py ensures both.
 *
 * libfuse supports it since 3.17. For older versions, the fields are added to the replies on their way to the kernel.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#define FUSE_USE_VERSION 35
#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>

#include "passthrough.h"

#include "messages.h"

/* include/uapi/linux/fuse.h of Linux 6.9, protocol 7.40: Debian 12 has older headers. */
enum { WRITEBACK_CACHE = 1 << 16, PASSTHROUGH = 1 << (37 - 32) };
enum { IN_FLAGS = 3, IN_FLAGS2 = 4 };                        /* 32-bit words of struct fuse_init_in … */
enum { OUT_FLAGS = 3, OUT_FLAGS2 = 8, OUT_STACK_DEPTH = 9 }; /* … and of struct fuse_init_out */
enum { FOPEN_KEEP_CACHE = 1 << 1, FOPEN_PASSTHROUGH = 1 << 7 };

struct open_out {
	uint64_t fh;
	uint32_t open_flags;
	int32_t backing_id;
};

struct backing_map {
	int32_t fd;
	uint32_t flags;
	uint64_t padding;
};

#define BACKING_OPEN _IOW(229, 1, struct backing_map)
#define BACKING_CLOSE _IOW(229, 2, uint32_t)

struct lent {
	int32_t id; /* 0: none */
	bool direct;
};

static int device = -1;
static bool wanted, offered;
static uint64_t init_unique;
static const char *lacking = "the kernel has not asked yet";
static struct lent *files; /* by handle number */
static size_t numbers;
static __thread struct lent replying;

void passthrough_want(bool want)
{
	wanted = want;
	lacking = "the kernel has not asked yet";
}

void passthrough_reset(int fd)
{
	device = fd;
	init_unique = 0;
	for (size_t i = 0; i < numbers; i++)
		files[i].id = 0;
}

void passthrough_received(const void *request, size_t size)
{
	const struct in_header *in = request;
	const uint32_t *init = (const uint32_t *)(in + 1);

	if (size < sizeof *in + (IN_FLAGS2 + 1) * sizeof *init || in->opcode != FUSE_INIT)
		return;
	init_unique = in->unique;
	offered = init[IN_FLAGS] & INIT_EXT && init[IN_FLAGS2] & PASSTHROUGH;
}

static void complete_init(const struct out_header *out, uint32_t *init, size_t size)
{
	init_unique = 0;
	if (!wanted || out->error)
		return;
	if (!offered) {
		lacking = "the kernel does not offer it: Linux 6.9 brought it";
	} else if (size < (OUT_STACK_DEPTH + 1) * sizeof *init || init[OUT_FLAGS] & WRITEBACK_CACHE) {
		lacking = "libfuse is too old";
	} else {
		init[OUT_FLAGS] |= INIT_EXT;
		init[OUT_FLAGS2] |= PASSTHROUGH;
		init[OUT_STACK_DEPTH] = 1; /* files of filesystems that are not stacked on others */
		lacking = "";
	}
}

void passthrough_begin_reply(struct fuse_file_info *fi)
{
	if (fi->fh >= numbers || !files[fi->fh].id)
		return;
	replying = files[fi->fh];
	fi->keep_cache = 0;
	fi->direct_io = replying.direct;
}

void passthrough_end_reply(void)
{
	replying.id = 0;
}

void passthrough_complete(struct iovec *iov, int count)
{
	const struct out_header *out = iov[0].iov_base;

	if (count < 2 || !out->unique)
		return;
	if (out->unique == init_unique) {
		complete_init(out, iov[1].iov_base, iov[1].iov_len);
	} else if (replying.id && iov[1].iov_len >= sizeof(struct open_out)) {
		char *end = (char *)iov[1].iov_base + iov[1].iov_len; /* after a created file's attributes */
		struct open_out open;
		memcpy(&open, end - sizeof open, sizeof open);
		open.open_flags = (open.open_flags & ~(uint32_t)FOPEN_KEEP_CACHE) | FOPEN_PASSTHROUGH;
		open.backing_id = replying.id;
		memcpy(end - sizeof open, &open, sizeof open);
	}
}

/* --- for Python --- */

static PyObject *py_lacking(PyObject *self, PyObject *args)
{
	(void)self, (void)args;
	return PyUnicode_FromString(lacking);
}

static PyObject *py_lend(PyObject *self, PyObject *args)
{
	struct backing_map map = { .fd = -1 };
	(void)self;
	if (!PyArg_ParseTuple(args, "i", &map.fd))
		return NULL;
	int id = ioctl(device, BACKING_OPEN, &map);
	return id < 0 ? PyErr_SetFromErrno(PyExc_OSError) : PyLong_FromLong(id);
}

static PyObject *py_take_back(PyObject *self, PyObject *args)
{
	uint32_t id;
	(void)self;
	if (!PyArg_ParseTuple(args, "I", &id))
		return NULL;
	if (ioctl(device, BACKING_CLOSE, &id) < 0)
		return PyErr_SetFromErrno(PyExc_OSError);
	Py_RETURN_NONE;
}

static PyObject *py_pass_through(PyObject *self, PyObject *args)
{
	unsigned long long number;
	int id, direct;
	(void)self;
	if (!PyArg_ParseTuple(args, "Kip", &number, &id, &direct))
		return NULL;
	if (number >= numbers) {
		size_t more = numbers ? 2 * numbers : 64;
		while (more <= number)
			more *= 2;
		struct lent *larger = number < (1u << 30) ? realloc(files, more * sizeof *larger) : NULL;
		if (!larger)
			return PyErr_NoMemory();
		memset(larger + numbers, 0, (more - numbers) * sizeof *larger);
		files = larger;
		numbers = more;
	}
	files[number] = (struct lent){ id, direct };
	Py_RETURN_NONE;
}

PyMethodDef passthrough_methods[] = {
	{ "passthrough_lacking", py_lacking, METH_NOARGS,
	  "passthrough_lacking(): why the session cannot lend files to the kernel; '' if it can." },
	{ "lend", py_lend, METH_VARARGS, "lend(fd): lend a file to the kernel; return its number." },
	{ "take_back", py_take_back, METH_VARARGS,
	  "take_back(id): end a loan. Further opens cannot use the number; files that are open keep it." },
	{ "pass_through", py_pass_through, METH_VARARGS,
	  "pass_through(fh, id, direct): put a lent file into the reply to the open of handle number fh; 0: none.\n"
	  "direct: the kernel only maps it; reads and writes are sent to the daemon." },
	{ NULL, NULL, 0, NULL },
};
