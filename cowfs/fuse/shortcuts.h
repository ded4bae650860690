/* Answers requests by calling the union without pyfuse3: see shortcuts.c. */
#ifndef COWFS_SHORTCUTS_H
#define COWFS_SHORTCUTS_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#define FUSE_USE_VERSION 35
#include <fuse3/fuse_lowlevel.h>

#include <stdbool.h>

/* Another mount begins: pyfuse3's handlers answer all requests. */
void shortcuts_reset(void);

/* These answer a request, and return false if pyfuse3's handler must answer it. Then nothing has happened. */
bool shortcut_lookup(fuse_req_t req, fuse_ino_t parent, const char *name);
bool shortcut_getattr(fuse_req_t req, fuse_ino_t ino);
bool shortcut_create(fuse_req_t req, fuse_ino_t parent, const char *name, mode_t mode);
bool shortcut_mkdir(fuse_req_t req, fuse_ino_t parent, const char *name, mode_t mode);
bool shortcut_symlink(fuse_req_t req, const char *target, fuse_ino_t parent, const char *name);
bool shortcut_link(fuse_req_t req, fuse_ino_t ino, fuse_ino_t parent, const char *name);
bool shortcut_unlink(fuse_req_t req, fuse_ino_t parent, const char *name);
bool shortcut_rename(fuse_req_t req, fuse_ino_t parent, const char *name, fuse_ino_t to, const char *new_name);
bool shortcut_read(fuse_req_t req, fuse_ino_t ino, size_t size, off_t offset);
bool shortcut_readlink(fuse_req_t req, fuse_ino_t ino);
bool shortcut_opendir(fuse_req_t req, fuse_ino_t ino, const struct fuse_file_info *fi);
bool shortcut_releasedir(fuse_req_t req, uint64_t number);
bool shortcut_readdirplus(fuse_req_t req, fuse_ino_t ino, char *buffer, size_t size, off_t offset, uint64_t number);
bool shortcut_fsyncdir(fuse_req_t req, fuse_ino_t ino); /* of a directory that is on disk already */
/* Copy up a file of an image below: a small one for a write, or, *in_place*, any for a change of owner, mode or times.
 * Return its number in the store's image, 0 if that is not done. *blocks: those of a metacopy's data, plus 1; or 0. */
uint32_t shortcut_copy_up(fuse_ino_t ino, bool in_place, uint64_t *blocks);
bool shortcut_copy(fuse_req_t req); /* a request that came as a read with the handle number BEYOND */
bool shortcut_getxattr(fuse_req_t req, fuse_ino_t ino, const char *name);
bool shortcut_listxattr(fuse_req_t req, fuse_ino_t ino, size_t size);

/* Functions for Python. */
extern PyMethodDef shortcuts_methods[];

#endif
