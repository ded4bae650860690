/* The request that has just come, as the kernel sent it (linux/fuse.h). See last_request.c. */
#ifndef COWFS_LAST_REQUEST_H
#define COWFS_LAST_REQUEST_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

/* In front of each request, struct fuse_in_header. */
enum { LENGTH = 0, OPCODE = 4, NODEID = 16, UID = 24, PID = 32, BODY = 40 };

/* The buffer that holds it: each of pyfuse3's tasks has its own. NULL: there is none. */
extern void *last_request;

extern bool last_request_extended;     /* SETXATTR has a word more */
extern bool last_request_tells_set_id; /* the kernel says with each request what it takes from a file */

/* A word of it, at this byte offset. */
static inline uint32_t request_word(size_t offset)
{
	uint32_t found;

	memcpy(&found, (char *)last_request + offset, sizeof found);
	return found;
}

/* Its inode. */
static inline uint64_t request_inode(void)
{
	uint64_t found;

	memcpy(&found, (char *)last_request + NODEID, sizeof found);
	return found;
}

/* Take out of a SETXATTR what libfuse does not know; return how long the request is then. */
ssize_t last_request_shorten(char *request, ssize_t size);

/* What Python calls. */
extern PyMethodDef last_request_methods[];

#endif
