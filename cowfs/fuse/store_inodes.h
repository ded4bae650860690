/* Serves requests for inodes of the store's image: see store_inodes.c. */
#ifndef COWFS_STORE_INODES_H
#define COWFS_STORE_INODES_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#define FUSE_USE_VERSION 35
#include <fuse3/fuse_lowlevel.h>

#include <stdbool.h>
#include <sys/stat.h>

/* Another mount begins: Python answers all requests. */
void store_inodes_reset(void);

/* These answer a request, and return false if Python must answer it. Then nothing has happened, or what may happen again
 * without harm. */
bool store_getattr(fuse_req_t req, fuse_ino_t ino);
bool store_setattr(fuse_req_t req, fuse_ino_t ino, const struct stat *to, int which);
bool store_write(fuse_req_t req, fuse_ino_t ino, const struct fuse_bufvec *data, off_t offset,
		 const struct fuse_file_info *fi);

/* The same; *buffer* has space for *size* bytes. */
bool store_read(fuse_req_t req, fuse_ino_t ino, char *buffer, size_t size, off_t offset,
		const struct fuse_file_info *fi);

/* The same for a file that was created without a handle. */
bool store_release(fuse_req_t req, const struct fuse_file_info *fi);

/* Functions for Python. */
extern PyMethodDef store_inodes_methods[];

#endif
