/* Inodes that are known to have no security.capability: see no_capability.c. */
#ifndef COWFS_NO_CAPABILITY_H
#define COWFS_NO_CAPABILITY_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdbool.h>
#include <stdint.h>

/* Another mount begins: nothing is known. */
void no_capability_reset(void);

/* Whether a GETXATTR asks for the capability of a file that has none, and may be answered here. */
bool no_capability_has(uint64_t inode, const char *name);

/* Note that an inode has no capability. */
void no_capability_add(uint64_t inode);

/* What Python calls. */
extern PyMethodDef no_capability_methods[];

#endif
