/* FUSE over io_uring, beneath libfuse: see ring.c. */
#ifndef COWFS_RING_H
#define COWFS_RING_H

#include <stdbool.h>
#include <sys/types.h>
#include <sys/uio.h>

/* The session's descriptor of /dev/fuse: what ring_read() and ring_writev() are given. */
void ring_device(int fd);

/* What libfuse calls instead of read(2) and writev(2). The GIL is held. */
ssize_t ring_read(int fd, void *buffer, size_t size);
ssize_t ring_writev(int fd, struct iovec *iov, int count);

/* Whether the caller is a thread that serves a ring. */
bool ring_serves(void);

/* What Python calls; rings.py says what for. */
extern PyMethodDef ring_methods[], ring_setup_methods[];

#endif
