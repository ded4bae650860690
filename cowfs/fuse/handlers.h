/* The handlers that libfuse calls instead of pyfuse3's: see handlers.c. */
#ifndef COWFS_HANDLERS_H
#define COWFS_HANDLERS_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#define FUSE_USE_VERSION 35
#include <fuse3/fuse_lowlevel.h>

#include <stdbool.h>

extern struct fuse_lowlevel_ops handlers_theirs; /* pyfuse3's handlers */
extern bool handlers_unopened;                   /* the kernel opens files without requests */

/* Another mount begins: seek(fh, offset, whence) answers lseek(2). */
void handlers_reset(PyObject *seek);

/* Return the handlers to pass to libfuse instead of pyfuse3's, which have that size; NULL if they are not a mount's.
 * Set *knows_files to false if they cannot serve files that are opened without requests. */
struct fuse_lowlevel_ops *handlers_wrap(const struct fuse_lowlevel_ops *op, size_t size, bool *knows_files);

/* Functions for Python. */
extern PyMethodDef handlers_methods[];

#endif
