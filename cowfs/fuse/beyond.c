/* Handles requests for which pyfuse3 has no handlers. libfuse does not know some of them either.
 *
 * The reply to a READ is only bytes. So each of these requests is turned into a READ with a handle number that no file
 * has, and its message is kept here. The handler gets the message, and replies with the bytes that the kernel expects.
 * A TMPFILE has the same format as a CREATE, and is turned into one with the name "/", which no file has.
 */
#include "beyond.h"

#include "messages.h"

#include <linux/fs.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

struct read_in { /* struct fuse_read_in */
	uint64_t fh, offset;
	uint32_t size, read_flags;
	uint64_t lock_owner;
	uint32_t flags, padding;
};

#define KEPT 512u /* bytes of a message; what follows is data of an unknown ioctl */

static struct in_header last; /* the header of the last request, as received */
static char body[KEPT];
static size_t body_size;

/* Whether the handler knows an ioctl. Others are frequent: every program that tests for a terminal sends one. */
static bool is_known(const struct in_header *head, size_t size)
{
	uint32_t command;

	if (size < sizeof *head + sizeof(uint64_t) + 2 * sizeof command)
		return false;
	memcpy(&command, (const char *)(head + 1) + sizeof(uint64_t) + sizeof command, sizeof command);
	return command == FS_IOC_GETFLAGS || command == FS_IOC_SETFLAGS || command == FS_IOC_GETVERSION ||
	       command == FS_IOC_FSGETXATTR || command == FS_IOC_FSSETXATTR;
}

size_t beyond_received(void *request, size_t size)
{
	struct in_header *head = request;
	struct read_in as_read = { .fh = BEYOND };

	if (size < sizeof *head)
		return size;
	switch (head->opcode) {
	case FUSE_TMPFILE:
		head->opcode = FUSE_CREATE;
		return size;
	case FUSE_IOCTL:
		if (!is_known(head, size))
			return size;
		break;
	case FUSE_FALLOCATE:
	case FUSE_COPY_FILE_RANGE:
	case FUSE_COPY_FILE_RANGE_64:
	case FUSE_SYNCFS:
	case FUSE_STATX:
		break;
	default:
		return size;
	}
	last = *head;
	body_size = size - sizeof *head < KEPT ? size - sizeof *head : KEPT;
	memcpy(body, head + 1, body_size);
	head->opcode = FUSE_READ;
	head->len = sizeof *head + sizeof as_read;
	head->extlen = 0;
	memcpy(head + 1, &as_read, sizeof as_read); /* the buffer has space for the longest write */
	return head->len;
}

bool beyond_is_copy(struct beyond_copy *copy)
{
	struct { /* struct fuse_copy_file_range_in */
		uint64_t fh_in, off_in, nodeid_out, fh_out, off_out, len, flags;
	} in;

	if ((last.opcode != FUSE_COPY_FILE_RANGE && last.opcode != FUSE_COPY_FILE_RANGE_64) || body_size < sizeof in)
		return false;
	memcpy(&in, body, sizeof in);
	*copy = (struct beyond_copy){
		.from = last.nodeid,
		.from_offset = in.off_in,
		.to = in.nodeid_out,
		.to_offset = in.off_out,
		.length = in.len,
		.is_64 = last.opcode == FUSE_COPY_FILE_RANGE_64,
	};
	return !in.fh_in && !in.fh_out && !in.flags;
}

static PyObject *message(PyObject *self, PyObject *args)
{
	(void)self, (void)args;
	return Py_BuildValue("(IKIIy#)", last.opcode, (unsigned long long)last.nodeid, last.uid, last.pid, body,
			     (Py_ssize_t)body_size);
}

PyMethodDef beyond_methods[] = {
	{ "message", message, METH_NOARGS,
	  "message(): the last request that came as a read with the handle number BEYOND: opcode, inode, user,\n"
	  "process, and the bytes after the header." },
	{ NULL, NULL, 0, NULL },
};
