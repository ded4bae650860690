/* FUSE passthrough: the kernel itself reads, writes and maps files. See passthrough.c. */
#ifndef COWFS_PASSTHROUGH_H
#define COWFS_PASSTHROUGH_H

#include <fuse3/fuse_lowlevel.h>
#include <stdbool.h>
#include <stddef.h>
#include <sys/uio.h>

/* Reset for a new session on this descriptor of /dev/fuse. */
void passthrough_reset(int fd);

/* Set whether the next session uses passthrough, if the kernel supports it. */
void passthrough_want(bool wanted);

/* Examine a message from the kernel before libfuse gets it. */
void passthrough_received(const void *request, size_t size);

/* Call it before libfuse's fuse_reply_open() and fuse_reply_create(), with the data of the open file. */
void passthrough_begin_reply(struct fuse_file_info *fi);
void passthrough_end_reply(void);

/* Add the fields that libfuse does not know to a reply before it is sent. */
void passthrough_complete(struct iovec *iov, int count);

extern PyMethodDef passthrough_methods[];

#endif
