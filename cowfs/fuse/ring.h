/* FUSE over io_uring, below libfuse: see ring.c. */
#ifndef COWFS_RING_H
#define COWFS_RING_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdbool.h>
#include <sys/types.h>
#include <sys/uio.h>

/* Set the session's descriptor of /dev/fuse, which ring_read() and ring_writev() get. */
void ring_device(int fd);

/* Called by libfuse instead of read(2) and writev(2), with the GIL. */
ssize_t ring_read(int fd, void *buffer, size_t size);
ssize_t ring_writev(int fd, struct iovec *iov, int count);

/* Whether the caller is a thread that serves a ring. */
bool ring_serves(void);

/* Whether it is, and no other request waits for it or for the core lock. */
bool ring_is_quiet(void);

/* Let others run while such a thread waits for something: release the core lock and the GIL, and take them again. */
PyThreadState *ring_step_out(void);
void ring_step_in(PyThreadState *state);

/* Functions for Python; rings.py describes them. */
extern PyMethodDef ring_methods[], ring_setup_methods[];

#endif
