/* The last received request, as the kernel sent it (linux/fuse.h). See last_request.c. */
#ifndef COWFS_LAST_REQUEST_H
#define COWFS_LAST_REQUEST_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include "messages.h"

/* Offsets in a request, which begins with a header. */
enum {
	LENGTH = offsetof(struct in_header, len),
	OPCODE = offsetof(struct in_header, opcode),
	NODEID = offsetof(struct in_header, nodeid),
	UID = offsetof(struct in_header, uid),
	PID = offsetof(struct in_header, pid),
	BODY = sizeof(struct in_header),
};

/* The buffer of the request; each of pyfuse3's tasks has its own. NULL: none. */
extern void *last_request;

extern bool last_request_extended;     /* SETXATTR has an additional field */
extern bool last_request_tells_set_id; /* requests say which set-ID bits the kernel wants cleared */

/* The word at this byte offset of the request. */
static inline uint32_t request_word(size_t offset)
{
	uint32_t found;

	memcpy(&found, (char *)last_request + offset, sizeof found);
	return found;
}

/* The inode of the request. */
static inline uint64_t request_inode(void)
{
	uint64_t found;

	memcpy(&found, (char *)last_request + NODEID, sizeof found);
	return found;
}

/* Remove the field that libfuse does not know from a SETXATTR; return the new size of the request. */
ssize_t last_request_shorten(char *request, ssize_t size);

/* Functions for Python. */
extern PyMethodDef last_request_methods[];

#endif
