/*
 * Details of the present request that handlers need and pyfuse3 omits: the caller, the bits that it clears on a file,
 * and the flags with which its file was opened.
 */
#include "last_request.h"

#include <malloc.h>
#include <sys/mman.h>
#include <unistd.h>

void *last_request;
bool last_request_extended;
bool last_request_tells_set_id;

static bool acl_clears_sgid; /* says the additional field of SETXATTR */

/* With FUSE_SETXATTR_EXT (Linux 5.13), the kernel says in SETXATTR whether an ACL clears set-group-ID. libfuse supports
 * it since 3.15, but does not pass it on. So the additional field is removed from the request before libfuse sees it.
 * The old struct fuse_setxattr_in is left, followed by the name. */
ssize_t last_request_shorten(char *request, ssize_t size)
{
	enum { SHORT = 8, LONG = 16, ACL_KILL_SGID = 1 };
	uint32_t opcode, flags, length = size - (LONG - SHORT);

	if (!last_request_extended || size < BODY + LONG)
		return size;
	memcpy(&opcode, request + OPCODE, sizeof opcode);
	if (opcode != FUSE_SETXATTR)
		return size;
	memcpy(&flags, request + BODY + SHORT, sizeof flags);
	acl_clears_sgid = flags & ACL_KILL_SGID;
	memmove(request + BODY + SHORT, request + BODY + LONG, size - BODY - LONG);
	memcpy(request + LENGTH, &length, sizeof length);
	return length;
}

static PyObject *clears_set_id(PyObject *self, PyObject *args)
{
	(void)self, (void)args;
	if (last_request && last_request_extended && request_word(OPCODE) == FUSE_SETXATTR)
		return PyBool_FromLong(acl_clears_sgid);
	if (!last_request || !last_request_tells_set_id)
		Py_RETURN_NONE;
	switch (request_word(OPCODE)) {
	case FUSE_SETATTR: /* FATTR_KILL_SUIDGID, in valid */
		return PyBool_FromLong(request_word(BODY) & 1 << 11);
	case FUSE_OPEN: /* FUSE_OPEN_KILL_SUIDGID, in open_flags */
		return PyBool_FromLong(request_word(BODY + 4) & 1);
	case FUSE_CREATE:
		return PyBool_FromLong(request_word(BODY + 12) & 1);
	case FUSE_WRITE: /* FUSE_WRITE_KILL_SUIDGID, in write_flags */
		return PyBool_FromLong(request_word(BODY + 20) & 1 << 2);
	}
	Py_RETURN_NONE;
}

/* The flags of the open file, in a read or write. */
static uint32_t flags_of_file(void)
{
	enum { FLAGS = BODY + 32 };

	switch (request_word(OPCODE)) {
	case FUSE_GETATTR:  /* FUSE_GETATTR_FH */
	case FUSE_SETATTR:  /* the fields to set */
	case FUSE_GETXATTR: /* the size of the buffer for the value */
		return request_word(BODY);
	}
	return request_word(OPCODE) == FUSE_READ || request_word(OPCODE) == FUSE_WRITE ? request_word(FLAGS) : 0;
}

static PyObject *request(PyObject *self, PyObject *args)
{
	(void)self, (void)args;
	if (!last_request)
		return Py_BuildValue("(III)", 0, 0, 0);
	return Py_BuildValue("(III)", request_word(PID), request_word(UID), flags_of_file());
}

/* The caller's user ID, or KERNEL_UID (libfuse.py) if the kernel writes what was changed through mmap(2). */
static uint32_t user(void)
{
	enum { WRITE_FLAGS = BODY + 20, CACHE = 1, KERNEL_UID = -1 }; /* FUSE_WRITE_CACHE */

	return request_word(OPCODE) == FUSE_WRITE && request_word(WRITE_FLAGS) & CACHE ? (uint32_t)KERNEL_UID
										       : request_word(UID);
}

static PyObject *said(PyObject *self, PyObject *args)
{
	PyObject *clears = clears_set_id(self, args);

	if (!last_request)
		return Py_BuildValue("(NIII)", clears, 0, 0, 0);
	return Py_BuildValue("(NIII)", clears, request_word(PID), user(), flags_of_file());
}

static PyObject *inode(PyObject *self, PyObject *args)
{
	(void)self, (void)args;
	return PyLong_FromUnsignedLongLong(last_request ? request_inode() : 0);
}

static PyObject *empty_buffer(PyObject *self, PyObject *args)
{
	(void)self, (void)args;
	uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
	uintptr_t start = ((uintptr_t)last_request + page - 1) & ~(page - 1);
	uintptr_t end = ((uintptr_t)last_request + malloc_usable_size(last_request)) & ~(page - 1);

	/* The buffer has space for the longest write, and many tasks may wait. */
	if (last_request && end > start)
		madvise((void *)start, end - start, MADV_DONTNEED);
	last_request = NULL;
	Py_RETURN_NONE;
}

PyMethodDef last_request_methods[] = {
	{ "request", request, METH_NOARGS,
	  "request(): process and user of the last request and, for a read or write, the flags of the open file;\n"
	  "0 if unknown." },
	{ "inode", inode, METH_NOARGS, "inode(): the inode number in the last request; 0: unknown." },
	{ "said", said, METH_NOARGS, "said(): the results of clears_set_id() and request() together." },
	{ "clears_set_id", clears_set_id, METH_NOARGS,
	  "clears_set_id(): whether the last request clears set-ID bits, because the caller lacks CAP_FSETID; None if\n"
	  "the kernel does not say." },
	{ "empty_buffer", empty_buffer, METH_NOARGS,
	  "empty_buffer(): free the memory of the last request, after it was read." },
	{ NULL, NULL, 0, NULL },
};
