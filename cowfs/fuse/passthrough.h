/* Files that the kernel itself reads, writes and maps: see passthrough.c. */
#ifndef COWFS_PASSTHROUGH_H
#define COWFS_PASSTHROUGH_H

#include <fuse3/fuse_lowlevel.h>
#include <stdbool.h>
#include <stddef.h>
#include <sys/uio.h>

/* Another session begins, on this descriptor of /dev/fuse. */
void passthrough_reset(int fd);

/* The next session should use it, if the kernel supports it. */
void passthrough_want(bool wanted);

/* A message from the kernel is given to libfuse. */
void passthrough_received(const void *request, size_t size);

/* Around libfuse's fuse_reply_open() and fuse_reply_create(): how the file is open. */
void passthrough_begin_reply(struct fuse_file_info *fi);
void passthrough_end_reply(void);

/* An answer is on its way to the kernel: what libfuse has no words for is put into it. */
void passthrough_complete(struct iovec *iov, int count);

extern PyMethodDef passthrough_methods[];

#endif
