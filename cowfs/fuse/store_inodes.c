/* Serves requests that need no decision: those for inodes whose content is all in the store's image.
 *
 * A program that unpacks an archive writes each new file, and sets its owner, mode and times: four requests, which the
 * engine can answer alone. Python says which inode of the image a node is. The engine refuses to change an inode with
 * anything that needs Python: set-ID bits, ACLs, capabilities, other names. Python also repeats what fails, and reports
 * the failure.
 *
 * The calling thread holds the core lock and the GIL.
 */
#include "store_inodes.h"

#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <string.h>

#include "../formats/ext3/engine.h"
#include "beyond.h"
#include "last_change.h"
#include "ring.h"
#include "shortcuts.h"

static struct {
	PyObject *find; /* find(inode): see serve_inodes(); NULL: Python answers all requests */
	bool observed;  /* Python must see changes that do not continue the last noted one */
	x3_image *image;
	__typeof__(&x3_getattr) getattr;
	__typeof__(&x3_setattr_simple) setattr;
	__typeof__(&x3_is_simple) is_simple;
	__typeof__(&x3_truncate) truncate;
	__typeof__(&x3_write) write;
	__typeof__(&x3_read) read;
	__typeof__(&x3_was_read) was_read;
	__typeof__(&x3_hurry) hurry;
	__typeof__(&x3_is_quick_to_sync) is_quick_to_sync;
	__typeof__(&x3_fsync) fsync;      /* NULL: others may delay it */
	const volatile uint32_t *pressed; /* not 0: changes must wait, which needs Python */
	unsigned block_size;
	int atime; /* when reading updates it: one of the following */
} store;

enum { NEVER, RELATIME, ALWAYS };
enum { SECOND = 1000000000 };
/* Parts of a SETATTR that need nothing: the engine sets the ctime in any case, and a simple inode has no set-ID bits
 * that could be cleared (FATTR_KILL_SUIDGID in linux/fuse.h). */
enum { REST = FUSE_SET_ATTR_CTIME | 1 << 11 };
#define LAST_SECOND (INT64_MAX / SECOND) /* the engine counts later times differently, as numbers before FIRST */
#define FIRST (INT64_C(-2147483648) * SECOND)

void store_inodes_reset(void)
{
	Py_CLEAR(store.find);
	store.observed = false;
	store.image = NULL;
}

/* Ask Python which inode of the image a node is: what find() returns. */
static int64_t ask(fuse_ino_t ino)
{
	if (!store.find)
		return 0;
	PyObject *number = PyLong_FromUnsignedLong(ino);
	PyObject *found = number ? PyObject_CallOneArg(store.find, number) : NULL;
	int64_t inode = found ? PyLong_AsLongLong(found) : 0;
	Py_XDECREF(number);
	Py_XDECREF(found);
	if (PyErr_Occurred()) {
		PyErr_WriteUnraisable(store.find);
		return 0;
	}
	return inode;
}

/* Return the number of the inode in the image that has all of a node; 0: Python must answer. */
static uint32_t find(fuse_ino_t ino, bool to_change)
{
	int64_t inode = ask(ino);

	if (inode < 0)
		inode = to_change ? 0 : -inode;
	return inode > UINT32_MAX ? 0 : (uint32_t)inode;
}

/* The same for a write; a small file of a lower is copied up for it. */
static uint32_t find_to_write(fuse_ino_t ino)
{
	uint32_t inode = find(ino, true);
	uint64_t blocks;

	return inode ? inode : shortcut_copy_up(ino, false, &blocks);
}

/* Whether the last request is a change that Python must see; else it is noted. */
static bool is_observed(void)
{
	return store.observed && last_change_goes_on() < 0;
}

/* --- attributes --- */

/* Translate attributes; false if a time is beyond 2262. */
static bool to_stat(const struct x3_attr *attr, fuse_ino_t ino, struct stat *now)
{
	if (attr->atime_ns < FIRST || attr->mtime_ns < FIRST || attr->ctime_ns < FIRST)
		return false;
	*now = (struct stat){
		.st_ino = ino,
		.st_mode = attr->mode,
		.st_nlink = attr->nlink,
		.st_uid = attr->uid,
		.st_gid = attr->gid,
		.st_size = (off_t)attr->size,
		.st_blksize = store.block_size,
		.st_blocks = (blkcnt_t)attr->blocks,
		.st_atim = to_timespec(attr->atime_ns),
		.st_mtim = to_timespec(attr->mtime_ns),
		.st_ctim = to_timespec(attr->ctime_ns),
	};
	return true;
}

static bool reply_attr(fuse_req_t req, fuse_ino_t ino, const struct x3_attr *attr)
{
	struct stat now;

	if (!to_stat(attr, ino, &now))
		return false;
	fuse_reply_attr(req, &now, FOREVER);
	return true;
}

bool store_may_change(void)
{
	return store.find && !store.observed && !*store.pressed;
}

int store_entry(uint32_t inode, struct fuse_entry_param *entry)
{
	struct x3_attr attr;
	int failure;

	Py_BEGIN_ALLOW_THREADS
	failure = store.getattr(store.image, inode, &attr);
	Py_END_ALLOW_THREADS
	entry->attr_timeout = entry->entry_timeout = FOREVER;
	return failure ? failure : to_stat(&attr, 0, &entry->attr) ? 0 : -EOVERFLOW;
}

/* Add the directories that only the lowers have to the link count of a merged directory. If the image does not count
 * them, nor does the union. */
static bool add_links(struct x3_attr *attr, int64_t merged)
{
	if (attr->nlink > 1)
		attr->nlink += (uint32_t)(merged >> 32) - 1;
	return S_ISDIR(attr->mode);
}

bool store_getattr(fuse_req_t req, fuse_ino_t ino)
{
	struct x3_attr attr;
	int64_t inode = ask(ino);
	int failure;

	if (!inode)
		return false;
	if (inode < 0)
		inode = -inode;
	Py_BEGIN_ALLOW_THREADS
	failure = store.getattr(store.image, (uint32_t)inode, &attr);
	Py_END_ALLOW_THREADS
	if (inode > UINT32_MAX && !add_links(&attr, inode))
		return false;
	/* For other types, and files with several names, Python must look further. */
	if (failure || !(S_ISDIR(attr.mode) || (S_ISREG(attr.mode) && attr.nlink == 1)))
		return false;
	return reply_attr(req, ino, &attr);
}

/* Translate what a SETATTR sets into what the engine sets; 0: it is something that Python must do. */
static uint32_t translate(const struct stat *to, int which, struct x3_attr *attr)
{
	enum {
		MODE = FUSE_SET_ATTR_MODE,
		UID = FUSE_SET_ATTR_UID,
		GID = FUSE_SET_ATTR_GID,
		ATIME = FUSE_SET_ATTR_ATIME,
		MTIME = FUSE_SET_ATTR_MTIME,
	};

	if (which & ~(MODE | UID | GID | ATIME | MTIME | REST) || (which & MODE && to->st_mode & (S_ISUID | S_ISGID)) ||
	    (which & ATIME && (to->st_atim.tv_sec < 0 || to->st_atim.tv_sec >= LAST_SECOND)) ||
	    (which & MTIME && (to->st_mtim.tv_sec < 0 || to->st_mtim.tv_sec >= LAST_SECOND)))
		return 0;
	attr->mode = to->st_mode & 07777;
	attr->uid = to->st_uid;
	attr->gid = to->st_gid;
	attr->atime_ns = which & ATIME ? to->st_atim.tv_sec * (int64_t)SECOND + to->st_atim.tv_nsec : 0;
	attr->mtime_ns = which & MTIME ? to->st_mtim.tv_sec * (int64_t)SECOND + to->st_mtim.tv_nsec : 0;
	return (which & MODE ? X3_MODE : 0) | (which & UID ? X3_UID : 0) | (which & GID ? X3_GID : 0) |
	       (which & ATIME ? X3_ATIME : 0) | (which & MTIME ? X3_MTIME : 0);
}

/* Set the size of a simple inode, unless much is freed. A file of a lower is left to Python: it copies no more of it up
 * than what remains. */
static bool set_size(fuse_req_t req, fuse_ino_t ino, off_t size)
{
	enum { MOST = 2048 }; /* blocks of 512 bytes, which are freed in no time */
	uint32_t inode = store_may_change() ? find(ino, true) : 0;
	struct x3_attr attr;
	bool done;

	if (!inode)
		return false;
	Py_BEGIN_ALLOW_THREADS
	done = store.is_simple(store.image, inode) > 0 && !store.getattr(store.image, inode, &attr) &&
	       attr.blocks < MOST && !store.truncate(store.image, inode, (uint64_t)size) &&
	       !store.getattr(store.image, inode, &attr);
	Py_END_ALLOW_THREADS
	return done && reply_attr(req, ino, &attr);
}

bool store_setattr(fuse_req_t req, fuse_ino_t ino, const struct stat *to, int which)
{
	if (which & FUSE_SET_ATTR_SIZE && !(which & ~(FUSE_SET_ATTR_SIZE | REST)))
		return set_size(req, ino, to->st_size);
	struct x3_attr attr;
	uint32_t what = store.find ? translate(to, which, &attr) : 0;
	uint32_t inode = what && !*store.pressed ? find(ino, true) : 0;
	uint64_t blocks = 0; /* those of a metacopy's data, plus 1 */
	int failure;

	if (!inode && what && !*store.pressed)
		inode = shortcut_copy_up(ino, true, &blocks);
	if (!inode || is_observed())
		return false;
	Py_BEGIN_ALLOW_THREADS
	failure = store.setattr(store.image, inode, what, &attr);
	Py_END_ALLOW_THREADS
	if (blocks)
		attr.blocks = blocks - 1;
	return !failure && reply_attr(req, ino, &attr);
}

/* Return the mode that an access ACL says, if it says nothing else; -1: it says more, or is none. See acl(5), and
 * linux/posix_acl_xattr.h for the format. */
static int mode_of_acl(const char *value, size_t size)
{
	enum { VERSION = 2, USER_OBJ = 1, GROUP_OBJ = 4, OTHER = 0x20, ENTRIES = 3 };
	static const struct {
		uint16_t tag;
		int shift;
	} expected[ENTRIES] = { { USER_OBJ, 6 }, { GROUP_OBJ, 3 }, { OTHER, 0 } };
	struct {
		uint16_t tag, permissions;
		uint32_t id;
	} entries[ENTRIES];
	uint32_t version;
	int mode = 0;

	if (size != sizeof version + sizeof entries)
		return -1;
	memcpy(&version, value, sizeof version);
	memcpy(entries, value + sizeof version, sizeof entries);
	for (int i = 0; i < ENTRIES; i++) {
		if (le16toh(entries[i].tag) != expected[i].tag || le16toh(entries[i].permissions) > 7)
			return -1;
		mode |= le16toh(entries[i].permissions) << expected[i].shift;
	}
	return le32toh(version) == VERSION ? mode : -1;
}

bool store_setxattr(fuse_req_t req, fuse_ino_t ino, const char *name, const char *value, size_t size, int flags)
{
	if (!store_may_change() || flags || strcmp(name, "system.posix_acl_access"))
		return false;
	int mode = mode_of_acl(value, size);
	uint32_t inode = mode < 0 ? 0 : find(ino, true);
	struct x3_attr attr;
	bool done = false;
	if (!inode)
		return false;
	Py_BEGIN_ALLOW_THREADS
	if (!store.getattr(store.image, inode, &attr)) {
		uint32_t before = attr.mode & 07777;
		attr.mode = (before & S_ISVTX) | (uint32_t)mode;
		/* Without a change, ext3 leaves the ctime, too. */
		done = attr.mode == before ? store.is_simple(store.image, inode) > 0
					   : !store.setattr(store.image, inode, X3_MODE, &attr);
	}
	Py_END_ALLOW_THREADS
	if (!done)
		return false;
	fuse_reply_err(req, 0);
	return true;
}

/* --- data --- */

/* Write all of *data* to a simple inode; false if Python must do it. */
static bool write_simple(uint32_t inode, const void *data, size_t size, off_t offset)
{
	int64_t written = 0;

	Py_BEGIN_ALLOW_THREADS
	if (store.is_simple(store.image, inode) > 0)
		written = store.write(store.image, inode, data, size, (uint64_t)offset);
	Py_END_ALLOW_THREADS
	return written > 0 && (size_t)written == size;
}

bool store_write(fuse_req_t req, fuse_ino_t ino, const struct fuse_bufvec *data, off_t offset,
		 const struct fuse_file_info *fi)
{
	const struct fuse_buf *from = data->buf;

	if (!store.find || *store.pressed || fi->writepage || fi->flags & (O_SYNC | O_DSYNC) || data->count != 1 ||
	    data->idx || data->off || from->flags & FUSE_BUF_IS_FD)
		return false;
	uint32_t inode = find_to_write(ino);
	if (!inode || is_observed() || !write_simple(inode, from->mem, from->size, offset))
		return false;
	if (store.observed)
		last_change_wrote(ino);
	fuse_reply_write(req, from->size);
	return true;
}

bool store_put(fuse_ino_t ino, const void *data, size_t size, off_t offset)
{
	uint32_t inode = store_may_change() ? find(ino, true) : 0;

	return inode && write_simple(inode, data, size, offset);
}

bool store_read(fuse_req_t req, fuse_ino_t ino, char *buffer, size_t size, off_t offset,
		const struct fuse_file_info *fi)
{
	uint32_t inode = fi->fh == BEYOND ? 0 : find(ino, false);
	int64_t got;

	if (!inode)
		return false;
	Py_BEGIN_ALLOW_THREADS
	if (store.atime != NEVER && !(fi->flags & O_NOATIME))
		store.was_read(store.image, inode, store.atime == ALWAYS);
	got = store.read(store.image, inode, buffer, size, (uint64_t)offset);
	if (got >= 0)
		fuse_reply_buf(req, buffer, (size_t)got);
	Py_END_ALLOW_THREADS
	return got >= 0;
}

bool store_release(fuse_req_t req, const struct fuse_file_info *fi)
{
	if (!store.find || fi->fh)
		return false;
	fuse_reply_err(req, 0);
	return true;
}

/* --- for Python --- */

static PyObject *py_serve(PyObject *self, PyObject *args)
{
	PyObject *find;
	unsigned long long image, getattr, setattr, is_simple, truncate, write, read, was_read, hurry, is_quick, fsync,
		pressed;
	unsigned block_size;
	int atime;

	(void)self;
	if (!PyArg_ParseTuple(args, "O(KKKKKKKKKKKKI)i", &find, &image, &getattr, &setattr, &is_simple, &truncate,
			      &write, &read, &was_read, &hurry, &is_quick, &fsync, &pressed, &block_size, &atime))
		return NULL;
	store_inodes_reset();
	Py_INCREF(find);
	store.find = find;
	store.image = (x3_image *)(uintptr_t)image;
	store.getattr = (__typeof__(store.getattr))(uintptr_t)getattr;
	store.setattr = (__typeof__(store.setattr))(uintptr_t)setattr;
	store.is_simple = (__typeof__(store.is_simple))(uintptr_t)is_simple;
	store.truncate = (__typeof__(store.truncate))(uintptr_t)truncate;
	store.write = (__typeof__(store.write))(uintptr_t)write;
	store.read = (__typeof__(store.read))(uintptr_t)read;
	store.was_read = (__typeof__(store.was_read))(uintptr_t)was_read;
	store.hurry = (__typeof__(store.hurry))(uintptr_t)hurry;
	store.is_quick_to_sync = (__typeof__(store.is_quick_to_sync))(uintptr_t)is_quick;
	store.fsync = (__typeof__(store.fsync))(uintptr_t)fsync;
	store.pressed = (const volatile uint32_t *)(uintptr_t)pressed;
	store.block_size = block_size;
	store.atime = atime;
	Py_RETURN_NONE;
}

static PyObject *py_quick_to_sync(PyObject *self, PyObject *number)
{
	uint64_t ino = PyLong_AsUnsignedLongLong(number);

	(void)self;
	if (PyErr_Occurred())
		return NULL;
	bool quick = store.find && store.fsync && ring_is_quiet() && store.is_quick_to_sync(store.image);
	return PyLong_FromUnsignedLong(quick ? find(ino, false) : 0);
}

static PyObject *py_sync(PyObject *self, PyObject *args)
{
	unsigned inode;
	int datasync;

	(void)self;
	if (!PyArg_ParseTuple(args, "Ip", &inode, &datasync))
		return NULL;
	PyThreadState *state = ring_step_out();
	int before = store.hurry(false);
	int failure = store.fsync(store.image, inode, datasync);
	store.hurry(before);
	ring_step_in(state);
	return PyBool_FromLong(!failure);
}

static PyObject *py_stop(PyObject *self, PyObject *args)
{
	(void)self, (void)args;
	store_inodes_reset();
	shortcuts_reset();
	Py_RETURN_NONE;
}

static PyObject *py_observe(PyObject *self, PyObject *wanted)
{
	(void)self;
	store.observed = wanted == Py_True;
	Py_RETURN_NONE;
}

PyMethodDef store_inodes_methods[] = {
	{ "serve_inodes", py_serve, METH_VARARGS,
	  "serve_inodes(find, engine, atime): serve GETATTR, SETATTR, READ, WRITE and RELEASE. find(inode) returns the\n"
	  "number of the inode in the image that has all of a node, negated if it may only be read; 0: there is none.\n"
	  "engine: addresses of the image, of functions of engine.h, and of what says that changes must wait; and the\n"
	  "size of a block. atime: when reading updates it: 0 never, 1 by the rule of relatime, 2 always." },
	{ "quick_to_sync", py_quick_to_sync, METH_O,
	  "quick_to_sync(inode): return the number of an inode in the image if it is likely to be quick to write it to\n"
	  "disk, and no other request waits for this ring's thread; else 0." },
	{ "sync_quickly", py_sync, METH_VARARGS,
	  "sync_quickly(number, datasync): write that inode to disk; return whether that is done. Others run meanwhile." },
	{ "stop_inodes", py_stop, METH_NOARGS, "stop_inodes(): leave all requests to pyfuse3's handlers." },
	{ "observe_inodes", py_observe, METH_O,
	  "observe_inodes(wanted): whether Python must see changes that do not continue the last noted one." },
	{ NULL, NULL, 0, NULL },
};
