/*
 * Details of the current request that handlers need and pyfuse3 leaves out: who makes it, which bits it drops
 * from a file, how its file was opened.
 */
#include "last_request.h"

#include <malloc.h>
#include <sys/mman.h>
#include <unistd.h>

void *last_request;
bool last_request_extended;
bool last_request_tells_set_id;

static bool takes_by_acl; /* what the word more of SETXATTR says */

/* FUSE_SETXATTR_EXT (Linux 5.13): with SETXATTR the kernel says whether an ACL takes set-group-ID. libfuse learned of
 * that in 3.15, and passes it on to nobody: it is taken out of the request before libfuse sees it. What is left is
 * struct fuse_setxattr_in as it was, which the name follows. */
ssize_t last_request_shorten(char *request, ssize_t size)
{
	enum { SETXATTR = 21, SHORT = 8, LONG = 16, ACL_KILL_SGID = 1 };
	uint32_t opcode, flags, length = size - (LONG - SHORT);

	if (!last_request_extended || size < BODY + LONG)
		return size;
	memcpy(&opcode, request + OPCODE, sizeof opcode);
	if (opcode != SETXATTR)
		return size;
	memcpy(&flags, request + BODY + SHORT, sizeof flags);
	takes_by_acl = flags & ACL_KILL_SGID;
	memmove(request + BODY + SHORT, request + BODY + LONG, size - BODY - LONG);
	memcpy(request + LENGTH, &length, sizeof length);
	return length;
}

static PyObject *takes_set_id(PyObject *self, PyObject *args)
{
	enum { SETATTR = 4, OPEN = 14, WRITE = 16, SETXATTR = 21, CREATE = 35 };
	(void)self, (void)args;
	if (last_request && last_request_extended && request_word(OPCODE) == SETXATTR)
		return PyBool_FromLong(takes_by_acl);
	if (!last_request || !last_request_tells_set_id)
		Py_RETURN_NONE;
	switch (request_word(OPCODE)) {
	case SETATTR: /* FATTR_KILL_SUIDGID, in valid */
		return PyBool_FromLong(request_word(BODY) & 1 << 11);
	case OPEN: /* FUSE_OPEN_KILL_SUIDGID, in open_flags */
		return PyBool_FromLong(request_word(BODY + 4) & 1);
	case CREATE:
		return PyBool_FromLong(request_word(BODY + 12) & 1);
	case WRITE: /* FUSE_WRITE_KILL_SUIDGID, in write_flags */
		return PyBool_FromLong(request_word(BODY + 20) & 1 << 2);
	}
	Py_RETURN_NONE;
}

/* Of the open file, in a read or write. */
static uint32_t flags_of_file(void)
{
	enum { GETATTR = 3, SETATTR = 4, READ = 15, WRITE = 16, GETXATTR = 22, FLAGS = BODY + 32 };

	switch (request_word(OPCODE)) {
	case GETATTR:  /* FUSE_GETATTR_FH */
	case SETATTR:  /* what is to be set */
	case GETXATTR: /* how long the value may be */
		return request_word(BODY);
	}
	return request_word(OPCODE) == READ || request_word(OPCODE) == WRITE ? request_word(FLAGS) : 0;
}

static PyObject *request(PyObject *self, PyObject *args)
{
	(void)self, (void)args;
	if (!last_request)
		return Py_BuildValue("(III)", 0, 0, 0);
	return Py_BuildValue("(III)", request_word(PID), request_word(UID), flags_of_file());
}

static PyObject *said(PyObject *self, PyObject *args)
{
	PyObject *takes = takes_set_id(self, args);

	if (!last_request)
		return Py_BuildValue("(NIII)", takes, 0, 0, 0);
	return Py_BuildValue("(NIII)", takes, request_word(PID), request_word(UID), flags_of_file());
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

	/* It has room for the longest write, and tasks that wait may be many. */
	if (last_request && end > start)
		madvise((void *)start, end - start, MADV_DONTNEED);
	last_request = NULL;
	Py_RETURN_NONE;
}

PyMethodDef last_request_methods[] = {
	{ "request", request, METH_NOARGS,
	  "request(): process and user who make the request that has just come, and of a read or write the flags of\n"
	  "the open file; 0 where that is not known." },
	{ "inode", inode, METH_NOARGS,
	  "inode(): the number of the inode that the request that has just come is about; 0: not known." },
	{ "said", said, METH_NOARGS, "said(): what takes_set_id() and request() give, in one." },
	{ "takes_set_id", takes_set_id, METH_NOARGS,
	  "takes_set_id(): whether the request that has just come takes set-ID bits from a file, since who makes\n"
	  "it has not CAP_FSETID; None where the kernel does not say it." },
	{ "empty_buffer", empty_buffer, METH_NOARGS,
	  "empty_buffer(): give back the memory of the last request, which is being handled and was read." },
	{ NULL, NULL, 0, NULL },
};
