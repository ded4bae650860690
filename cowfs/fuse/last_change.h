/* The last change and its process: see last_change.c. */
#ifndef COWFS_LAST_CHANGE_H
#define COWFS_LAST_CHANGE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdint.h>

/* Record that a process makes any request at this time (CLOCK_MONOTONIC, ns). */
void last_change_request(uint32_t pid, uint64_t now);

/*
 * Whether the last request is a change of the last noted inode, by the same process: 1 for a write, 2 for a mode, 4 for
 * an owner, 8 for times; 0 if such a change was noted before; else -1. It is noted now, a write by last_change_wrote().
 */
long last_change_goes_on(void);

/* Note that a write to this inode has succeeded, if it is the last noted one. */
void last_change_wrote(uint64_t ino);

/* Functions for Python. */
extern PyMethodDef last_change_methods[];

#endif
