/* Serves requests for inodes of the store's image: see store_inodes.c. */
#ifndef COWFS_STORE_INODES_H
#define COWFS_STORE_INODES_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#define FUSE_USE_VERSION 35
#include <fuse3/fuse_lowlevel.h>

#include <stdbool.h>
#include <stdint.h>
#include <sys/stat.h>
#include <time.h>

#define FOREVER 1e9 /* how many seconds attributes and names hold: only this daemon changes them */

static inline struct timespec to_timespec(int64_t ns)
{
	enum { SECOND = 1000000000 };
	int64_t rest = ns % SECOND;

	return (struct timespec){ ns / SECOND - (rest < 0), rest < 0 ? rest + SECOND : rest };
}

/* Another mount begins: Python answers all requests. */
void store_inodes_reset(void);

/* These answer a request, and return false if Python must answer it. Then nothing has happened, or what may happen again
 * without harm. */
bool store_getattr(fuse_req_t req, fuse_ino_t ino);
bool store_setattr(fuse_req_t req, fuse_ino_t ino, const struct stat *to, int which);
bool store_setxattr(fuse_req_t req, fuse_ino_t ino, const char *name, const char *value, size_t size, int flags);
bool store_write(fuse_req_t req, fuse_ino_t ino, const struct fuse_bufvec *data, off_t offset,
		 const struct fuse_file_info *fi);

/* The same; *buffer* has space for *size* bytes. */
bool store_read(fuse_req_t req, fuse_ino_t ino, char *buffer, size_t size, off_t offset,
		const struct fuse_file_info *fi);

/* The same for a file that was created without a handle. */
bool store_release(fuse_req_t req, const struct fuse_file_info *fi);

/* Whether inodes are served now, changes need not wait, and Python need not see each of them. */
bool store_may_change(void);

/* Describe the inode with this number in the image, without its numbers in the union; 0, or an errno negated. */
int store_entry(uint32_t inode, struct fuse_entry_param *entry);

/* Write all of *data* to a file; false if Python must do it. */
bool store_put(fuse_ino_t ino, const void *data, size_t size, off_t offset);

/* Functions for Python. */
extern PyMethodDef store_inodes_methods[];

#endif
