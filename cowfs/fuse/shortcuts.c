/* Answers requests by calling the union, in Python, without pyfuse3 (shortcuts.py).
 *
 * pyfuse3 makes a coroutine and three or four objects for each request, which takes as long as most handlers.
 *
 * The calling thread holds the core lock and the GIL.
 */
#include "shortcuts.h"

#include <errno.h>
#include <stdint.h>
#include <string.h>

#include "beyond.h"
#include "no_capability.h"
#include "store_inodes.h"

/* The functions of Shortcuts (shortcuts.py), in the order of NAMES. NULL: pyfuse3's handlers answer. */
enum function {
	LOOKUP,
	GETATTR,
	CREATE,
	MKDIR,
	SYMLINK,
	LINK,
	UNLINK,
	RENAME,
	READ,
	READLINK,
	OPENDIR,
	RELEASEDIR,
	LIST,
	COPY_UP,
	HAS_NO_XATTRS,
	HAS_NO_CAPABILITY,
	IS_SYNCED,
	FUNCTIONS
};
static const char *const NAMES[FUNCTIONS] = {
	[LOOKUP] = "lookup",
	[GETATTR] = "getattr",
	[CREATE] = "create",
	[MKDIR] = "mkdir",
	[SYMLINK] = "symlink",
	[LINK] = "link",
	[UNLINK] = "unlink",
	[RENAME] = "rename",
	[READ] = "read",
	[READLINK] = "readlink",
	[OPENDIR] = "opendir",
	[RELEASEDIR] = "releasedir",
	[LIST] = "list",
	[COPY_UP] = "copy_up",
	[HAS_NO_XATTRS] = "has_no_xattrs",
	[HAS_NO_CAPABILITY] = "has_no_capability",
	[IS_SYNCED] = "is_synced",
};
static PyObject *functions[FUNCTIONS];

void shortcuts_reset(void)
{
	for (int i = 0; i < FUNCTIONS; i++)
		Py_CLEAR(functions[i]);
}

/* Whether a function that changes something may be called. */
static bool may_change(enum function which)
{
	return functions[which] && store_may_change();
}

/* Call a function; return its result, NULL if that is None, or if there was an exception, which is logged. */
static PyObject *call(enum function which, PyObject *const *arguments, size_t count)
{
	bool made = true;

	for (size_t i = 0; i < count; i++)
		made = made && arguments[i];
	PyObject *result = made ? PyObject_Vectorcall(functions[which], arguments, count, NULL) : NULL;
	for (size_t i = 0; i < count; i++)
		Py_XDECREF(arguments[i]);
	if (!result)
		PyErr_WriteUnraisable(functions[which]);
	if (result == Py_None)
		Py_CLEAR(result);
	return result;
}

/* Call a function of a directory and a name. */
static PyObject *call_by_name(enum function which, fuse_ino_t parent, const char *name)
{
	PyObject *arguments[] = { PyLong_FromUnsignedLong(parent), PyBytes_FromString(name) };

	return call(which, arguments, 2);
}

/* Describe a new node, or one that the image has all of, in *entry*, without an inode if it cannot be read. */
static void parse_made(enum function which, PyObject *made, struct fuse_entry_param *entry)
{
	unsigned long long ino, generation;
	unsigned inode;

	*entry = (struct fuse_entry_param){ .ino = 0 };
	if (!PyArg_ParseTuple(made, "KKI", &ino, &generation, &inode)) {
		PyErr_WriteUnraisable(functions[which]);
	} else if (!store_entry(inode, entry)) {
		entry->ino = entry->attr.st_ino = ino;
		entry->generation = generation;
	}
}

/* Describe what a function has found in *entry*; false if it has found nothing. */
static bool parse(enum function which, PyObject *found, struct fuse_entry_param *entry)
{
	unsigned long long ino, generation, rdev, size, blocks, links;
	unsigned block_size;
	long long atime, mtime, ctime;
	struct stat *to = &entry->attr;

	*entry = (struct fuse_entry_param){ .attr_timeout = FOREVER, .entry_timeout = FOREVER };
	if (found == Py_False)
		return false;
	if (!PyArg_ParseTuple(found, "KKIKIIKKKILLL", &ino, &generation, &to->st_mode, &links, &to->st_uid, &to->st_gid,
			      &rdev, &size, &blocks, &block_size, &atime, &mtime, &ctime)) {
		PyErr_WriteUnraisable(functions[which]);
		return false;
	}
	entry->ino = to->st_ino = ino;
	entry->generation = generation;
	to->st_nlink = links;
	to->st_rdev = rdev;
	to->st_size = (off_t)size;
	to->st_blocks = (blkcnt_t)blocks;
	to->st_blksize = block_size;
	to->st_atim = to_timespec(atime);
	to->st_mtim = to_timespec(mtime);
	to->st_ctim = to_timespec(ctime);
	return true;
}

bool shortcut_lookup(fuse_req_t req, fuse_ino_t parent, const char *name)
{
	struct fuse_entry_param entry;

	if (!functions[LOOKUP] || !strcmp(name, ".") || !strcmp(name, ".."))
		return false;
	PyObject *found = call_by_name(LOOKUP, parent, name);
	if (!found)
		return false;
	parse(LOOKUP, found, &entry);
	Py_DECREF(found);
	fuse_reply_entry(req, &entry); /* without an inode, the kernel remembers that the name does not exist */
	return true;
}

bool shortcut_getattr(fuse_req_t req, fuse_ino_t ino)
{
	struct fuse_entry_param entry;
	PyObject *number = functions[GETATTR] ? PyLong_FromUnsignedLong(ino) : NULL;
	PyObject *found = number ? call(GETATTR, &number, 1) : NULL;
	bool done = found && parse(GETATTR, found, &entry);

	Py_XDECREF(found);
	if (done)
		fuse_reply_attr(req, &entry.attr, FOREVER);
	return done;
}

bool shortcut_link(fuse_req_t req, fuse_ino_t ino, fuse_ino_t parent, const char *name)
{
	struct fuse_entry_param entry;

	if (!may_change(LINK))
		return false;
	PyObject *arguments[] = { PyLong_FromUnsignedLong(ino), PyLong_FromUnsignedLong(parent),
				  PyBytes_FromString(name) };
	PyObject *found = call(LINK, arguments, 3);
	if (!found)
		return false;
	if (parse(LINK, found, &entry))
		fuse_reply_entry(req, &entry);
	else
		fuse_reply_err(req, EIO);
	Py_DECREF(found);
	return true;
}

/* Have a function create an inode, and describe it in *entry*; false if it has done nothing. *what* is its mode, or the
 * target of a symbolic link. */
static bool make(enum function which, fuse_req_t req, fuse_ino_t parent, const char *name, PyObject *what,
		 struct fuse_entry_param *entry)
{
	const struct fuse_ctx *ctx = fuse_req_ctx(req);
	PyObject *arguments[] = {
		PyLong_FromUnsignedLong(parent),
		PyBytes_FromString(name),
		what,
		PyLong_FromUnsignedLong(ctx->umask),
		PyLong_FromUnsignedLong(ctx->uid),
		PyLong_FromUnsignedLong(ctx->gid),
	};
	PyObject *result = call(which, arguments, sizeof arguments / sizeof *arguments);
	if (!result)
		return false;
	parse_made(which, result, entry);
	Py_DECREF(result);
	return true;
}

static void reply_made(fuse_req_t req, const struct fuse_entry_param *entry)
{
	if (entry->ino)
		fuse_reply_entry(req, entry);
	else
		fuse_reply_err(req, EIO);
}

bool shortcut_create(fuse_req_t req, fuse_ino_t parent, const char *name, mode_t mode)
{
	struct fuse_entry_param entry;

	if (!may_change(CREATE) || !make(CREATE, req, parent, name, PyLong_FromUnsignedLong(mode), &entry))
		return false;
	no_capability_add(entry.ino);
	reply_made(req, &entry);
	return true;
}

bool shortcut_mkdir(fuse_req_t req, fuse_ino_t parent, const char *name, mode_t mode)
{
	struct fuse_entry_param entry;

	if (!may_change(MKDIR) || !make(MKDIR, req, parent, name, PyLong_FromUnsignedLong(mode), &entry))
		return false;
	reply_made(req, &entry);
	return true;
}

bool shortcut_symlink(fuse_req_t req, const char *target, fuse_ino_t parent, const char *name)
{
	struct fuse_entry_param entry;

	if (!may_change(SYMLINK) || !make(SYMLINK, req, parent, name, PyBytes_FromString(target), &entry))
		return false;
	reply_made(req, &entry);
	return true;
}

bool shortcut_unlink(fuse_req_t req, fuse_ino_t parent, const char *name)
{
	if (!may_change(UNLINK))
		return false;
	PyObject *result = call_by_name(UNLINK, parent, name);
	bool done = result == Py_True;
	Py_XDECREF(result);
	if (done)
		fuse_reply_err(req, 0);
	return done;
}

bool shortcut_rename(fuse_req_t req, fuse_ino_t parent, const char *name, fuse_ino_t to, const char *new_name)
{
	if (!may_change(RENAME))
		return false;
	PyObject *arguments[] = { PyLong_FromUnsignedLong(parent), PyBytes_FromString(name),
				  PyLong_FromUnsignedLong(to), PyBytes_FromString(new_name) };
	PyObject *result = call(RENAME, arguments, 4);
	bool done = result == Py_True;
	Py_XDECREF(result);
	if (done)
		fuse_reply_err(req, 0);
	return done;
}

uint32_t shortcut_copy_up(fuse_ino_t ino, bool in_place, uint64_t *blocks)
{
	*blocks = 0;
	if (!may_change(COPY_UP))
		return 0;
	PyObject *arguments[] = { PyLong_FromUnsignedLong(ino), PyBool_FromLong(in_place) };
	PyObject *result = call(COPY_UP, arguments, 2);
	uint64_t found = result ? PyLong_AsUnsignedLongLong(result) : 0;
	Py_XDECREF(result);
	*blocks = found >> 32;
	return (uint32_t)found;
}

/* Return data of a small file; NULL if the handler must read it. */
static PyObject *read_small(fuse_ino_t ino, size_t size, off_t offset)
{
	if (!functions[READ])
		return NULL;
	PyObject *arguments[] = { PyLong_FromUnsignedLong(ino), PyLong_FromSize_t(size), PyLong_FromLongLong(offset) };
	return call(READ, arguments, 3);
}

bool shortcut_read(fuse_req_t req, fuse_ino_t ino, size_t size, off_t offset)
{
	PyObject *data = read_small(ino, size, offset);

	if (!data)
		return false;
	fuse_reply_buf(req, PyBytes_AS_STRING(data), (size_t)PyBytes_GET_SIZE(data));
	Py_DECREF(data);
	return true;
}

bool shortcut_copy(fuse_req_t req)
{
	enum { MOST = 1 << 17 };
	struct beyond_copy copy;

	if (!beyond_is_copy(&copy) || !store_may_change())
		return false;
	PyObject *data = read_small(copy.from, copy.length < MOST ? copy.length : MOST, (off_t)copy.from_offset);
	size_t size = data ? (size_t)PyBytes_GET_SIZE(data) : 0;
	bool is_all = size && (size < MOST || copy.length == MOST);
	bool done = is_all && store_put(copy.to, PyBytes_AS_STRING(data), size, (off_t)copy.to_offset);
	uint32_t answer[2] = { (uint32_t)size, 0 }; /* struct fuse_copy_file_range_out, or an uint64_t */
	uint64_t answer_64 = size;
	Py_XDECREF(data);
	if (done)
		fuse_reply_buf(req, copy.is_64 ? (char *)&answer_64 : (char *)answer, sizeof answer);
	return done;
}

/* Close an open directory; false if there is none. */
static bool close_directory(uint64_t handle)
{
	PyObject *number = PyLong_FromUnsignedLongLong(handle);
	PyObject *result = number ? call(RELEASEDIR, &number, 1) : NULL;

	Py_XDECREF(result);
	return result == Py_True;
}

bool shortcut_readlink(fuse_req_t req, fuse_ino_t ino)
{
	PyObject *number = functions[READLINK] ? PyLong_FromUnsignedLong(ino) : NULL;
	PyObject *target = number ? call(READLINK, &number, 1) : NULL;

	if (!target)
		return false;
	fuse_reply_readlink(req, PyBytes_AS_STRING(target));
	Py_DECREF(target);
	return true;
}

bool shortcut_opendir(fuse_req_t req, fuse_ino_t ino, const struct fuse_file_info *fi)
{
	if (!functions[OPENDIR])
		return false;
	PyObject *arguments[] = { PyLong_FromUnsignedLong(ino), PyLong_FromUnsignedLong(fuse_req_ctx(req)->uid) };
	PyObject *number = call(OPENDIR, arguments, 2);
	if (!number)
		return false;
	struct fuse_file_info opened = *fi;
	opened.fh = PyLong_AsUnsignedLongLong(number);
	Py_DECREF(number);
	if (fuse_reply_open(req, &opened) == -ENOENT) /* interrupted: there will be no RELEASEDIR */
		close_directory(opened.fh);
	return true;
}

bool shortcut_releasedir(fuse_req_t req, uint64_t number)
{
	if (!functions[RELEASEDIR] || !close_directory(number))
		return false;
	fuse_reply_err(req, 0);
	return true;
}

/* Describe an entry of a listing; return its name, and its place in *place*, or NULL if it cannot be read. */
static const char *parse_listed(PyObject *listed, unsigned long long *place, struct fuse_entry_param *entry)
{
	enum { DESCRIBED = 3 };
	unsigned long long ino, generation;
	PyObject *described;
	const char *name;
	unsigned inode;

	if (PyTuple_GET_SIZE(listed) == DESCRIBED) {
		bool done = PyArg_ParseTuple(listed, "KyO!", place, &name, &PyTuple_Type, &described) &&
			    parse(LIST, described, entry);
		return done ? name : NULL;
	}
	*entry = (struct fuse_entry_param){ .ino = 0 };
	if (!PyArg_ParseTuple(listed, "KyKKI", place, &name, &ino, &generation, &inode)) {
		PyErr_WriteUnraisable(functions[LIST]);
		return NULL;
	}
	if (!inode)
		entry->attr.st_mode = S_IFDIR;
	else if (store_entry(inode, entry))
		return NULL;
	else
		entry->ino = ino;
	entry->attr.st_ino = ino;
	entry->generation = generation;
	return name;
}

/* Add an entry that Python describes to a listing; return its size, 0 if it does not fit, or cannot be read. */
static size_t add_entry(fuse_req_t req, PyObject *listed, char *buffer, size_t room)
{
	struct fuse_entry_param entry;
	unsigned long long place;
	const char *name = parse_listed(listed, &place, &entry);
	size_t size = name ? fuse_add_direntry_plus(req, buffer, room, name, &entry, (off_t)place) : 0;

	return size <= room ? size : 0;
}

bool shortcut_readdirplus(fuse_req_t req, fuse_ino_t ino, char *buffer, size_t size, off_t offset, uint64_t number)
{
	size_t used = 0;

	if (!functions[LIST])
		return false;
	PyObject *arguments[] = { PyLong_FromUnsignedLong(ino), PyLong_FromUnsignedLong(number),
				  PyLong_FromLongLong(offset), PyLong_FromSize_t(size) };
	PyObject *entries = call(LIST, arguments, 4);
	if (!entries)
		return false;
	for (Py_ssize_t i = 0; i < PyList_GET_SIZE(entries); i++) {
		size_t more = add_entry(req, PyList_GET_ITEM(entries, i), buffer + used, size - used);
		if (!more) /* the image fails: the rest stays known here although the kernel does not know it */
			break;
		used += more;
	}
	bool failed = !used && PyList_GET_SIZE(entries); /* an empty answer would be the end of the directory */
	Py_DECREF(entries);
	if (failed)
		fuse_reply_err(req, EIO);
	else
		fuse_reply_buf(req, buffer, used);
	return true;
}

/* Ask a function about an inode. */
static bool ask(enum function which, fuse_ino_t ino)
{
	PyObject *number = functions[which] ? PyLong_FromUnsignedLong(ino) : NULL;
	PyObject *result = number ? call(which, &number, 1) : NULL;

	Py_XDECREF(result);
	return result == Py_True;
}

bool shortcut_fsyncdir(fuse_req_t req, fuse_ino_t ino)
{
	if (!ask(IS_SYNCED, ino))
		return false;
	fuse_reply_err(req, 0);
	return true;
}

bool shortcut_getxattr(fuse_req_t req, fuse_ino_t ino, const char *name)
{
	static const char *const kinds[] = { "user.", "trusted.", "security.", "system.posix_acl_" };
	bool known = false; /* a kind without a name is not: EINVAL */

	for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++)
		known = known || (!strncmp(name, kinds[i], strlen(kinds[i])) && name[strlen(kinds[i])]);
	bool capability = !strcmp(name, "security.capability");
	if (!known || !ask(capability ? HAS_NO_CAPABILITY : HAS_NO_XATTRS, ino))
		return false;
	if (capability)
		no_capability_add(ino);
	fuse_reply_err(req, ENODATA);
	return true;
}

bool shortcut_listxattr(fuse_req_t req, fuse_ino_t ino, size_t size)
{
	if (!ask(HAS_NO_XATTRS, ino))
		return false;
	if (size)
		fuse_reply_buf(req, NULL, 0);
	else
		fuse_reply_xattr(req, 0);
	return true;
}

/* --- for Python --- */

static PyObject *py_take(PyObject *self, PyObject *from)
{
	(void)self;
	shortcuts_reset();
	for (int i = 0; i < FUNCTIONS; i++) {
		functions[i] = PyObject_GetAttrString(from, NAMES[i]);
		if (!functions[i]) {
			shortcuts_reset();
			return NULL;
		}
	}
	Py_RETURN_NONE;
}

PyMethodDef shortcuts_methods[] = {
	{ "take_shortcuts", py_take, METH_O,
	  "take_shortcuts(functions): answer with the methods of this Shortcuts (shortcuts.py) what they can answer." },
	{ NULL, NULL, 0, NULL },
};
