/* Gives access to features of libfuse that pyfuse3 does not expose.
 *
 * pyfuse3 passes its handlers to libfuse through fuse_session_new(). From libfuse 3.17 on, that is a macro which calls
 * fuse_session_new_versioned(). This module has functions of both names. If it is loaded before pyfuse3 with global
 * symbols (RTLD_GLOBAL), the dynamic linker binds pyfuse3's call to them (ld.so(8): the global scope is searched
 * first). They wrap some of pyfuse3's handlers, and call the next function of the same name, which is libfuse's
 * (dlsym(3), RTLD_NEXT). If the linker binds the call elsewhere, nothing is changed, and libfuse.py reports it.
 *
 * The thread that serves requests calls everything here; it holds the GIL.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#define FUSE_USE_VERSION 35
#include <dlfcn.h>
#include <errno.h>
#include <fuse3/fuse_lowlevel.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#include "beyond.h"
#include "core_lock.h"
#include "handlers.h"
#include "held_data.h"
#include "last_change.h"
#include "last_request.h"
#include "messages.h"
#include "no_capability.h"
#include "passthrough.h"
#include "request_stats.h"
#include "ring.h"
#include "root_acl.h"
#include "shortcuts.h"
#include "store_inodes.h"

#if FUSE_VERSION >= FUSE_MAKE_VERSION(3, 17)
#define HAS_WANT_EXT
#endif

/* Bits in the handle numbers of directories: the kernel caches the listing; all have it. libfuse.py has them too. */
#define KEPT (UINT64_C(1) << 62)
#define LISTING (UINT64_C(1) << 61)

static unsigned wanted, granted;
static bool wrapped; /* pyfuse3 has called a function of this module */
static bool watched; /* messages between libfuse and the kernel pass through this module */

static bool knows_files; /* the daemon finds files by inode, and wants no open requests */

/* The kernel need not ask for security.capability before a write, because the layers remove it
 * (FUSE_HANDLE_KILLPRIV_V2 in linux/fuse.h). libfuse before 3.16 does not know this flag, so it is added to the reply
 * to FUSE_INIT. */
#ifdef FUSE_CAP_HANDLE_KILLPRIV_V2
#define KILLPRIV_V2 FUSE_CAP_HANDLE_KILLPRIV_V2
#else
#define KILLPRIV_V2 0
#endif

/* FUSE_SETXATTR_EXT: the kernel says with SETXATTR whether an ACL clears set-group-ID, see last_request.c. */
enum { HANDLE_KILLPRIV_V2 = 1 << 28, SETXATTR_EXT = 1 << 29 };

static uint32_t in_answer;   /* flags to add to the reply to FUSE_INIT, if that is written next */
static bool refuses_handles; /* name_to_handle_at(2) must not return handles that open_by_handle_at(2) accepts */

/* Accept that requests say which set-ID bits to clear; false if the kernel does not offer it to libfuse. */
static bool accept_killpriv(const struct fuse_conn_info *conn)
{
	if (!KILLPRIV_V2)
		in_answer |= HANDLE_KILLPRIV_V2;
	return !KILLPRIV_V2 || conn->capable & KILLPRIV_V2;
}

static ssize_t on_writev(int fd, struct iovec *iov, int count, void *userdata)
{
	enum { FLAGS = 12, FLAGS2 = 32, NO_EXPORT_SUPPORT = 1 << (38 - 32) };
	(void)userdata;
	if (in_answer && count >= 2 && iov[1].iov_len >= FLAGS + sizeof(uint32_t)) {
		uint32_t flags;
		memcpy(&flags, (char *)iov[1].iov_base + FLAGS, sizeof flags);
		flags |= in_answer;
		if (in_answer & INIT_EXT && iov[1].iov_len >= FLAGS2 + sizeof(uint32_t)) {
			uint32_t flags2;
			memcpy(&flags2, (char *)iov[1].iov_base + FLAGS2, sizeof flags2);
			flags2 |= NO_EXPORT_SUPPORT;
			memcpy((char *)iov[1].iov_base + FLAGS2, &flags2, sizeof flags2);
		}
		memcpy((char *)iov[1].iov_base + FLAGS, &flags, sizeof flags);
		last_request_extended = in_answer & SETXATTR_EXT;
	}
	in_answer = 0;
	passthrough_complete(iov, count);
	/* Count it before it is sent, so that the receiver already finds it counted. */
	struct out_header head;
	if (iov[0].iov_len >= sizeof head) {
		memcpy(&head, iov[0].iov_base, sizeof head);
		request_stats_end(head.unique, head.error);
	}
	root_acl_sent(iov, count);
	return ring_writev(fd, iov, count);
}

static ssize_t on_receive(int fd, void *request, size_t size, void *userdata)
{
	(void)userdata;
	ssize_t n = ring_read(fd, request, size);
	if (n > 0) {
		n = held_data_shorten(request, last_request_shorten(request, n));
		request_stats_begin(request, (size_t)n);
		root_acl_received(request, (size_t)n);
		passthrough_received(request, (size_t)n);
	}
	return n;
}

/* A libfuse built without custom I/O refuses: then there are no rings and no statistics, and all else works. */
static void watch_messages(struct fuse_session *session)
{
	static const struct fuse_custom_io io = { .writev = on_writev, .read = on_receive };

	request_stats_reset();
	root_acl_reset();
	ring_device(fuse_session_fd(session));
	passthrough_reset(fuse_session_fd(session));
	watched = !fuse_session_custom_io(session, &io, fuse_session_fd(session));
}

/* Whether the kernel offers a flag in the FUSE_INIT that is being handled. */
static bool kernel_has(uint32_t flag)
{
	enum { FLAGS = BODY + 12 };

	return last_request && request_word(OPCODE) == FUSE_INIT && request_word(FLAGS) & flag;
}

/* Choose capabilities. pyfuse3 reads a whole request into memory, so splicing through a pipe is only slower. Only
 * this daemon changes files, so the kernel need not drop cached data when a file's times change. Without open requests,
 * there is no O_TRUNC in them either. */
static uint32_t choose_capabilities(uint32_t want, const struct fuse_conn_info *conn)
{
	/* After an asynchronous direct write, the kernel would not drop pages that were read meanwhile. */
	uint32_t without = FUSE_CAP_SPLICE_READ | FUSE_CAP_AUTO_INVAL_DATA | FUSE_CAP_ASYNC_DIO;

	if (handlers_unopened)
		without |= FUSE_CAP_ATOMIC_O_TRUNC;
	return (want | ((wanted | KILLPRIV_V2) & conn->capable)) & ~without;
}

static void on_init(void *userdata, struct fuse_conn_info *conn)
{
#ifdef HAS_WANT_EXT
	uint64_t before = conn->want_ext;
#endif

	handlers_theirs.init(userdata, conn);
	conn->max_background = UINT16_MAX;
	last_request_extended = false;
	in_answer = watched && kernel_has(SETXATTR_EXT) ? SETXATTR_EXT : 0;
	if (watched && refuses_handles && kernel_has(INIT_EXT))
		in_answer |= INIT_EXT;
	last_request_tells_set_id = kernel_has(HANDLE_KILLPRIV_V2) && accept_killpriv(conn);
	handlers_unopened = knows_files && kernel_has(1u << 17); /* FUSE_NO_OPEN_SUPPORT */
#ifdef HAS_WANT_EXT
	/* There are two fields for it, and libfuse refuses a session in which they differ: set the one that pyfuse3
	 * sets. */
	if (conn->want_ext != before) {
		bool both = conn->want == (uint32_t)conn->want_ext;
		granted = choose_capabilities((uint32_t)conn->want_ext, conn);
		conn->want_ext = (conn->want_ext & ~(uint64_t)UINT32_MAX) | granted;
		if (both)
			conn->want = granted;
		return;
	}
#endif
	granted = conn->want = choose_capabilities(conn->want, conn);
}

/* Return the handlers to pass to libfuse instead of pyfuse3's, and their size. */
static const struct fuse_lowlevel_ops *wrap(const struct fuse_lowlevel_ops *op, size_t *size)
{
	if (op->init == on_init) /* already wrapped: libfuse's fuse_session_new() calls the other function */
		return op;
	struct fuse_lowlevel_ops *ours = handlers_wrap(op, *size, &knows_files);
	if (!ours)
		return op;
	ours->init = on_init;
	wrapped = true;
	*size = sizeof *ours;
	return ours;
}

/* These have other C names: fuse_lowlevel.h declares one as a macro and the other, depending on its version,
 * differently or not at all. */
struct fuse_session *session_new(struct fuse_args *args, const struct fuse_lowlevel_ops *op, size_t size,
				 void *userdata) __asm__("fuse_session_new");
struct fuse_session *session_new_versioned(struct fuse_args *args, const struct fuse_lowlevel_ops *op, size_t size,
					   const void *version, void *userdata) __asm__("fuse_session_new_versioned");

struct fuse_session *session_new(struct fuse_args *args, const struct fuse_lowlevel_ops *op, size_t size,
				 void *userdata)
{
	__typeof__(&session_new) real = (__typeof__(real))dlsym(RTLD_NEXT, "fuse_session_new");

	op = wrap(op, &size);
	return real ? real(args, op, size, userdata) : NULL;
}

/* version is that of the libfuse that pyfuse3 was compiled with: libfuse needs it to read pyfuse3's structures. */
struct fuse_session *session_new_versioned(struct fuse_args *args, const struct fuse_lowlevel_ops *op, size_t size,
					   const void *version, void *userdata)
{
	__typeof__(&session_new_versioned) real = (__typeof__(real))dlsym(RTLD_NEXT, "fuse_session_new_versioned");

	op = wrap(op, &size);
	return real ? real(args, op, size, version, userdata) : NULL;
}

int fuse_session_mount(struct fuse_session *session, const char *mountpoint)
{
	__typeof__(&fuse_session_mount) real = (__typeof__(real))dlsym(RTLD_NEXT, "fuse_session_mount");
	int failure = real ? real(session, mountpoint) : -1;

	if (!failure && wrapped)
		watch_messages(session);
	return failure;
}

int fuse_session_receive_buf(struct fuse_session *session, struct fuse_buf *buf)
{
	static __typeof__(&fuse_session_receive_buf) real;
	if (!real)
		real = (__typeof__(real))dlsym(RTLD_NEXT, "fuse_session_receive_buf");
	int got = real ? real(session, buf) : -ENOSYS;
	last_request = buf->mem;
	if (got > 0)
		buf->size = got = (int)beyond_received(last_request, (size_t)got);
	/* There is no memory for the buffer: pyfuse3 would end the mount, but tries again after EINTR. */
	return got == -ENOMEM && !buf->mem && !ring_serves() ? -EINTR : got;
}

int fuse_reply_open(fuse_req_t req, const struct fuse_file_info *fi)
{
	static __typeof__(&fuse_reply_open) real;
	if (!real)
		real = (__typeof__(real))dlsym(RTLD_NEXT, "fuse_reply_open");
	struct fuse_file_info changed = *fi;
	if (!(fi->fh & LISTING)) {
		passthrough_begin_reply(&changed);
	} else if (fi->fh & KEPT) {
		/* Only this daemon changes directories, so the kernel may cache listings. */
		changed.cache_readdir = 1;
		changed.keep_cache = 1;
	}
	int failure = real(req, &changed);
	passthrough_end_reply();
	return failure;
}

int fuse_reply_create(fuse_req_t req, const struct fuse_entry_param *entry, const struct fuse_file_info *fi)
{
	static __typeof__(&fuse_reply_create) real;
	if (!real)
		real = (__typeof__(real))dlsym(RTLD_NEXT, "fuse_reply_create");
	struct fuse_file_info changed = *fi;
	passthrough_begin_reply(&changed);
	int failure = real(req, entry, &changed);
	passthrough_end_reply();
	return failure;
}

static PyObject *prepare(PyObject *self, PyObject *args)
{
	PyObject *callable;
	int files, passthrough, exports, shared;
	unsigned long long most_held;
	(void)self;
	if (!PyArg_ParseTuple(args, "IOpppKp", &wanted, &callable, &files, &passthrough, &exports, &most_held, &shared))
		return NULL;
	held_data_allow(most_held, shared);
	refuses_handles = !exports;
	knows_files = files;
	passthrough_want(passthrough);
	no_capability_reset();
	store_inodes_reset();
	shortcuts_reset();
	handlers_reset(callable);
	wrapped = watched = last_request_extended = last_request_tells_set_id = false;
	granted = 0;
	Py_RETURN_NONE;
}

static PyObject *capabilities(PyObject *self, PyObject *args)
{
	(void)self, (void)args;
	return PyLong_FromUnsignedLong(granted);
}

static PyObject *takes_part(PyObject *self, PyObject *args)
{
	(void)self, (void)args;
	return PyBool_FromLong(wrapped);
}

static PyObject *watches(PyObject *self, PyObject *args)
{
	(void)self, (void)args;
	return PyBool_FromLong(watched);
}

static PyObject *opens_nothing(PyObject *self, PyObject *args)
{
	(void)self, (void)args;
	return PyBool_FromLong(handlers_unopened);
}

static PyMethodDef methods[] = {
	{ "prepare", prepare, METH_VARARGS,
	  "prepare(want, seek, files, passthrough, exports, most_held, shared): ask for these FUSE_CAP_* in the sessions\n"
	  "that follow; seek(fh, offset, whence) answers lseek(2) with SEEK_DATA and SEEK_HOLE: an offset, or an errno\n"
	  "negated; files: open requests are not needed; passthrough: lend files to the\n"
	  "kernel; most_held: bytes of data that writes may hold while they wait; shared: they are of several users." },
	{ "opens_nothing", opens_nothing, METH_NOARGS,
	  "opens_nothing(): whether the kernel opens files without requests after the reply ENOSYS to an open." },
	{ "capabilities", capabilities, METH_NOARGS,
	  "capabilities(): the FUSE_CAP_* of the session; 0 before FUSE_INIT." },
	{ "takes_part", takes_part, METH_NOARGS, "takes_part(): whether pyfuse3's session was made by this module." },
	{ "watches", watches, METH_NOARGS, "watches(): whether libfuse's messages pass through this module." },
	{ NULL, NULL, 0, NULL },
};

static struct PyModuleDef definition = {
	PyModuleDef_HEAD_INIT, .m_name = "_libfuse", .m_doc = "Between pyfuse3 and libfuse.",
	.m_size = -1,          .m_methods = methods,
};

PyMODINIT_FUNC PyInit__libfuse(void)
{
	PyObject *module = PyModule_Create(&definition);

	PyMethodDef *parts[] = { handlers_methods,    ring_methods,          ring_setup_methods,   core_lock_methods,
				 beyond_methods,      request_stats_methods, passthrough_methods,  last_request_methods,
				 last_change_methods, no_capability_methods, store_inodes_methods, shortcuts_methods };
	for (size_t i = 0; module && i < sizeof parts / sizeof *parts; i++)
		if (PyModule_AddFunctions(module, parts[i]))
			Py_CLEAR(module);
	return module;
}
