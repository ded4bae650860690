/* The handlers that libfuse calls. Each answers a request here if that is possible, and else calls pyfuse3's.
 *
 * The thread that serves requests calls everything here; it holds the GIL.
 */
#include "handlers.h"

#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "beyond.h"
#include "no_capability.h"
#include "request_stats.h"
#include "root_acl.h"
#include "shortcuts.h"
#include "store_inodes.h"

/* The handle number of a file that the kernel opened without a request is its inode number with this bit. */
#define UNOPENED (UINT64_C(1) << 63)

struct fuse_lowlevel_ops handlers_theirs;
bool handlers_unopened;

static PyObject *seeker; /* called as seeker(fh, offset, whence) */

/* By handle number: the descriptor that reads are served from, or -1. */
static int *descriptors;
static size_t handles;
static char *buffer;
static size_t buffer_size;

void handlers_reset(PyObject *seek)
{
	Py_INCREF(seek);
	Py_XSETREF(seeker, seek);
	handlers_unopened = false;
}

/* The daemon's handle numbers begin with 1. */
static void find_file(fuse_ino_t ino, struct fuse_file_info *fi)
{
	if (handlers_unopened && !fi->fh)
		fi->fh = ino | UNOPENED;
}

static void on_write_buf(fuse_req_t req, fuse_ino_t ino, struct fuse_bufvec *data, off_t offset,
			 struct fuse_file_info *fi)
{
	if (store_write(req, ino, data, offset, fi))
		return;
	find_file(ino, fi);
	handlers_theirs.write_buf(req, ino, data, offset, fi);
}

static void on_fsync(fuse_req_t req, fuse_ino_t ino, int datasync, struct fuse_file_info *fi)
{
	find_file(ino, fi);
	handlers_theirs.fsync(req, ino, datasync, fi);
}

static void on_fsyncdir(fuse_req_t req, fuse_ino_t ino, int datasync, struct fuse_file_info *fi)
{
	if (!shortcut_fsyncdir(req, ino))
		handlers_theirs.fsyncdir(req, ino, datasync, fi);
}

static void on_release(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
	if (!store_release(req, fi))
		handlers_theirs.release(req, ino, fi);
}

static void on_getxattr(fuse_req_t req, fuse_ino_t ino, const char *name, size_t size)
{
	if (root_acl_is_none(ino, name) || no_capability_has(ino, name))
		fuse_reply_err(req, ENODATA);
	else if (!shortcut_getxattr(req, ino, name))
		handlers_theirs.getxattr(req, ino, name, size);
}

static void on_listxattr(fuse_req_t req, fuse_ino_t ino, size_t size)
{
	if (!shortcut_listxattr(req, ino, size))
		handlers_theirs.listxattr(req, ino, size);
}

static void on_setxattr(fuse_req_t req, fuse_ino_t ino, const char *name, const char *value, size_t size, int flags)
{
	if (!store_setxattr(req, ino, name, value, size, flags))
		handlers_theirs.setxattr(req, ino, name, value, size, flags);
}

static void on_getattr(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
	if (!store_getattr(req, ino) && !shortcut_getattr(req, ino))
		handlers_theirs.getattr(req, ino, fi);
}

static void on_setattr(fuse_req_t req, fuse_ino_t ino, struct stat *to, int which, struct fuse_file_info *fi)
{
	if (!store_setattr(req, ino, to, which))
		handlers_theirs.setattr(req, ino, to, which, fi);
}

static void on_lookup(fuse_req_t req, fuse_ino_t parent, const char *name)
{
	if (!shortcut_lookup(req, parent, name))
		handlers_theirs.lookup(req, parent, name);
}

static void on_create(fuse_req_t req, fuse_ino_t parent, const char *name, mode_t mode, struct fuse_file_info *fi)
{
	/* If files are not opened, the kernel need not send CREATE either: from then on it sends MKNOD, which opens
	 * nothing, and so it sends no RELEASE. */
	if (handlers_unopened && strcmp(name, NO_NAME))
		fuse_reply_err(req, ENOSYS);
	else
		handlers_theirs.create(req, parent, name, mode, fi);
}

static void on_mknod(fuse_req_t req, fuse_ino_t parent, const char *name, mode_t mode, dev_t device)
{
	if (!handlers_unopened || !S_ISREG(mode) || !shortcut_create(req, parent, name, mode))
		handlers_theirs.mknod(req, parent, name, mode, device);
}

static void on_mkdir(fuse_req_t req, fuse_ino_t parent, const char *name, mode_t mode)
{
	if (!shortcut_mkdir(req, parent, name, mode))
		handlers_theirs.mkdir(req, parent, name, mode);
}

static void on_symlink(fuse_req_t req, const char *target, fuse_ino_t parent, const char *name)
{
	if (!shortcut_symlink(req, target, parent, name))
		handlers_theirs.symlink(req, target, parent, name);
}

static void on_link(fuse_req_t req, fuse_ino_t ino, fuse_ino_t parent, const char *name)
{
	if (!shortcut_link(req, ino, parent, name))
		handlers_theirs.link(req, ino, parent, name);
}

static void on_rename(fuse_req_t req, fuse_ino_t parent, const char *name, fuse_ino_t to, const char *new_name,
		      unsigned flags)
{
	if (flags || !shortcut_rename(req, parent, name, to, new_name))
		handlers_theirs.rename(req, parent, name, to, new_name, flags);
}

static void on_unlink(fuse_req_t req, fuse_ino_t parent, const char *name)
{
	if (!shortcut_unlink(req, parent, name))
		handlers_theirs.unlink(req, parent, name);
}

/* Have a buffer for *size* bytes. False: there is no memory. */
static bool have_buffer(size_t size)
{
	if (size <= buffer_size)
		return true;
	char *larger = realloc(buffer, size);
	if (!larger)
		return false;
	buffer = larger;
	buffer_size = size;
	return true;
}

static void on_readlink(fuse_req_t req, fuse_ino_t ino)
{
	if (!shortcut_readlink(req, ino))
		handlers_theirs.readlink(req, ino);
}

static void on_opendir(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
	if (!shortcut_opendir(req, ino, fi))
		handlers_theirs.opendir(req, ino, fi);
}

static void on_releasedir(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
	if (!shortcut_releasedir(req, fi->fh))
		handlers_theirs.releasedir(req, ino, fi);
}

static void on_readdirplus(fuse_req_t req, fuse_ino_t ino, size_t size, off_t offset, struct fuse_file_info *fi)
{
	if (!have_buffer(size) || !shortcut_readdirplus(req, ino, buffer, size, offset, fi->fh))
		handlers_theirs.readdirplus(req, ino, size, offset, fi);
}

static void on_read(fuse_req_t req, fuse_ino_t ino, size_t size, off_t offset, struct fuse_file_info *fi)
{
	if (fi->fh == BEYOND && shortcut_copy(req))
		return;
	find_file(ino, fi);
	int fd = fi->fh < handles ? descriptors[fi->fh] : -1;
	if (!have_buffer(size)) {
		fuse_reply_err(req, ENOMEM);
		return;
	}
	if (fd < 0) {
		if (!store_read(req, ino, buffer, size, offset, fi) &&
		    !(fi->fh == (ino | UNOPENED) && shortcut_read(req, ino, size, offset)))
			handlers_theirs.read(req, ino, size, offset, fi);
		return;
	}
	request_stats_read_directly();
	ssize_t got;
	Py_BEGIN_ALLOW_THREADS
	do
		got = pread(fd, buffer, size, offset);
	while (got < 0 && errno == EINTR);
	int failure = got < 0 ? errno : 0;
	if (failure)
		fuse_reply_err(req, failure);
	else
		fuse_reply_buf(req, buffer, got);
	Py_END_ALLOW_THREADS
}

static void on_lseek(fuse_req_t req, fuse_ino_t ino, off_t offset, int whence, struct fuse_file_info *fi)
{
	find_file(ino, fi);
	PyObject *result = PyObject_CallFunction(seeker, "KLi", (unsigned long long)fi->fh, (long long)offset, whence);
	long long place = result ? PyLong_AsLongLong(result) : -EIO;
	Py_XDECREF(result);
	if (PyErr_Occurred()) {
		PyErr_WriteUnraisable(seeker);
		place = -EIO;
	}
	if (place < 0)
		fuse_reply_err(req, (int)-place);
	else
		fuse_reply_lseek(req, place);
}

/* Answer with on_X what pyfuse3 has a handler for. */
#define WRAP(X)                          \
	do {                             \
		if (handlers_theirs.X)   \
			ours.X = on_##X; \
	} while (0)

struct fuse_lowlevel_ops *handlers_wrap(const struct fuse_lowlevel_ops *op, size_t size, bool *knows_files)
{
	static struct fuse_lowlevel_ops ours;

	memset(&handlers_theirs, 0, sizeof handlers_theirs);
	memcpy(&handlers_theirs, op, size < sizeof handlers_theirs ? size : sizeof handlers_theirs);
	if (!handlers_theirs.init || !handlers_theirs.read)
		return NULL;
	ours = handlers_theirs;
	ours.read = on_read;
	if (handlers_theirs.write_buf && handlers_theirs.fsync) {
		ours.write_buf = on_write_buf;
		ours.fsync = on_fsync;
	} else {
		*knows_files = false;
	}
	WRAP(getxattr);
	WRAP(listxattr);
	WRAP(setxattr);
	WRAP(getattr);
	WRAP(setattr);
	WRAP(release);
	WRAP(readlink);
	WRAP(opendir);
	WRAP(releasedir);
	WRAP(readdirplus);
	WRAP(fsyncdir);
	WRAP(lookup);
	WRAP(create);
	WRAP(mknod);
	WRAP(mkdir);
	WRAP(symlink);
	WRAP(link);
	WRAP(unlink);
	WRAP(rename);
	if (seeker)
		ours.lseek = on_lseek;
	return &ours;
}

/* --- for Python --- */

static PyObject *read_from(PyObject *self, PyObject *args)
{
	unsigned long long number;
	int fd;
	(void)self;
	if (!PyArg_ParseTuple(args, "Ki", &number, &fd))
		return NULL;
	if (number >= handles) {
		size_t more = handles ? 2 * handles : 64;
		while (more <= number)
			more *= 2;
		int *larger = number < (1u << 30) ? realloc(descriptors, more * sizeof *larger) : NULL;
		if (!larger)
			return PyErr_NoMemory();
		for (size_t i = handles; i < more; i++)
			larger[i] = -1;
		descriptors = larger;
		handles = more;
	}
	descriptors[number] = fd;
	Py_RETURN_NONE;
}

PyMethodDef handlers_methods[] = {
	{ "read_from", read_from, METH_VARARGS,
	  "read_from(fh, fd): serve reads of handle number fh from descriptor fd; -1: pass them to pyfuse3." },
	{ NULL, NULL, 0, NULL },
};
